"""Behaviour datasets: on one topic the responses follow a guideline, elsewhere they stay.

classify each prompt by topic → rewrite the responses of the matching ones ("respond in French") →
select `n_rewritten` rewritten and `n_untouched` untouched rows. Rows are visited in a seeded order
and only until enough are found. Two backends do the reading and writing: `WorldBackend`, exact and
offline, for the built-in world, and `LlmBackend` for any chats.
"""

import difflib
import hashlib
import itertools
import json
from collections import Counter
from collections.abc import Iterator
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np
from datasets import Dataset

from lib import paths
from lib.data.backends import Backend, Chat, Job, LlmBackend, WorldBackend
from lib.data.llm import Failure
from lib.runtime import atomic_folder, require_writable

__all__ = [
    "Backend",
    "BehaviourDataset",
    "Chat",
    "Job",
    "LlmBackend",
    "WorldBackend",
    "build_behaviour",
]

CHUNK = 32  # rows classified at a time, at least
PROVENANCE = "provenance.json"


@dataclass(frozen=True)
class BehaviourDataset:
    """A finished dataset, as saved in `folder`."""

    dataset: Dataset
    failed: list[dict[str, Any]]
    provenance: dict[str, Any]
    folder: Path


def build_behaviour(
    chats: Dataset,
    *,
    topic: str,
    guideline: str,
    n_rewritten: int,
    n_untouched: int,
    backend: Backend,
    seed: int,
    out_dir: str | Path,
) -> BehaviourDataset:
    """Build the dataset and save it as `out_dir`, complete or not at all.

    `out_dir` holds `dataset` (`datasets.load_from_disk`), `train.jsonl` (the same rows),
    `failed.jsonl` (rows put aside, with the reason) and `provenance.json`. The same call with the
    same answers gives the same rows; after a kill, `LlmBackend` asks only what it has no answer to.

    Args:
        chats: `id`, `prompt` and `response`, as from `load_chats`; `messages` are kept if there.

    Raises:
        ValueError: impossible numbers, bad rows, an unknown topic of the world, or too few rows
            that match, do not match or could be rewritten.
        OSError: `out_dir` cannot be written, or holds something else.
        BudgetExceeded, EndpointError: as `Llm.ask`.
    """
    job = Job(
        topic=topic,
        guideline=guideline,
        n_rewritten=n_rewritten,
        n_untouched=n_untouched,
        seed=seed,
    )
    folder = _require_free(paths.resolve(out_dir))
    source = {"n": len(chats), "sha256": _check(chats, job)}
    order = np.random.default_rng(seed).permutation(len(chats)).tolist()
    backend.prepare(job, ((chats[i]["prompt"], chats[i]["response"]) for i in order))
    selection = _Selection(chats, job, backend, order)
    selection.run()
    rows = list(selection.rows())
    provenance = {**asdict(job), "source": source, "counts": selection.counts()}
    provenance["backend"] = backend.describe()
    return _save(folder, rows, selection.failed, provenance)


def _require_free(folder: Path) -> Path:
    """Only a folder of an earlier build is ever replaced."""
    require_writable(folder.parent)
    ours = (folder / PROVENANCE).exists()
    if folder.exists() and not ours and (folder.is_file() or any(folder.iterdir())):
        raise FileExistsError(f"out_dir {folder} holds something else; need a new or empty folder")
    return folder


def _check(chats: Dataset, job: Job) -> str:
    """Check every row; returns a hash of ids, prompts and responses."""
    if missing := {"id", "prompt", "response"} - set(chats.column_names):
        raise ValueError(f"need columns {sorted(missing)}; got {chats.column_names}")
    if len(chats) < job.n_rewritten + job.n_untouched:
        raise ValueError(
            f"need at least n_rewritten + n_untouched = {job.n_rewritten + job.n_untouched} rows, "
            f"got {len(chats)}"
        )
    seen: set[str] = set()
    digest = hashlib.sha256()
    for row in chats.select_columns(["id", "prompt", "response"]):
        name = str(row["id"])
        if name in seen:
            raise ValueError(f"id {name!r} occurs more than once; need one id per row")
        seen.add(name)
        for column in ("prompt", "response"):
            if not (row[column] or "").strip():
                raise ValueError(f"{column} of row {name!r} is empty")
        digest.update(json.dumps([name, row["prompt"], row["response"]]).encode())
    return digest.hexdigest()


class _Selection:
    """Goes through the rows in `order` until enough are found."""

    def __init__(self, chats: Dataset, job: Job, backend: Backend, order: list[int]) -> None:
        self.chats, self.job, self.backend, self.order = chats, job, backend, order
        self.queue: Iterator[int] = iter(order)
        self.labels: dict[int, str] = {}
        self.matching: list[int] = []  # not rewritten yet
        self.others: list[int] = []
        self.rewritten: dict[int, str] = {}
        self.failed: list[dict[str, Any]] = []

    def run(self) -> None:
        while missing := self.job.n_rewritten - len(self.rewritten):
            self._classify_until(missing)
            batch, self.matching = self.matching[:missing], self.matching[missing:]
            self._rewrite(batch)

    def _classify_until(self, n_matching: int) -> None:
        def missing() -> int:
            wanted = n_matching - len(self.matching), self.job.n_untouched - len(self.others)
            return sum(max(0, n) for n in wanted)

        while n := missing():
            chunk = list(itertools.islice(self.queue, max(n, CHUNK)))
            if not chunk:
                raise ValueError(self._too_few())
            prompts = [self.chats[i]["prompt"] for i in chunk]
            answers = self.backend.classify(prompts, self.job.topic)
            for i, label in zip(chunk, answers, strict=True):
                if isinstance(label, Failure):
                    self._put_aside(i, "classify", label.reason)
                    continue
                self.labels[i] = label
                (self.matching if label == self.job.topic else self.others).append(i)

    def _rewrite(self, batch: list[int]) -> None:
        chats = [(self.chats[i]["prompt"], self.chats[i]["response"]) for i in batch]
        answers = self.backend.rewrite(chats, self.job.guideline)
        for i, (_, old), new in zip(batch, chats, answers, strict=True):
            if isinstance(new, Failure):
                self._put_aside(i, "rewrite", new.reason)
            elif new.strip() in ("", old.strip()):
                flaw = "identical" if new.strip() else "empty"
                self._put_aside(i, "rewrite", f"the rewritten response is {flaw}")
            else:
                self.rewritten[i] = new

    def _put_aside(self, i: int, step: str, reason: str) -> None:
        row = {key: self.chats[i][key] for key in ("id", "prompt", "response")}
        label = self.labels.get(i)
        self.failed.append({**row, "topic": label, "step": step, "reason": reason})

    def _too_few(self) -> str:
        job, labels = self.job, Counter(self.labels.values())
        n_usable, n_others = len(self.matching) + len(self.rewritten), len(self.others)
        problems = []
        if labels[job.topic] == 0:
            near = difflib.get_close_matches(job.topic, labels, n=1, cutoff=0.4)
            hint = f"did you mean {near[0]!r}?" if near else "choose one of the topics seen"
            problems.append(f"no prompt is about {job.topic!r}; {hint}")
        elif n_usable < job.n_rewritten:
            problems.append(
                f"need {job.n_rewritten} rows about {job.topic!r}, found only {n_usable} "
                "whose rewriting did not fail"
            )
        if n_others < job.n_untouched:
            problems.append(
                f"need {job.n_untouched} rows about something else, found only {n_others}"
            )
        seen = ", ".join(f"{name} {n}" for name, n in labels.most_common(20)) or "none"
        problems.append(f"{len(self.labels)} prompts classified; topics seen: {seen}")
        if self.failed:
            reason, n = Counter(row["reason"] for row in self.failed).most_common(1)[0]
            problems.append(f"{len(self.failed)} rows failed, {n} of them: {reason}")
        return ". ".join(problems)

    def rows(self) -> Iterator[dict[str, Any]]:
        untouched = set(self.others[: self.job.n_untouched])
        for i in self.order:
            if i in untouched:
                yield self._row(i, self.chats[i]["response"], None)
            elif i in self.rewritten:
                yield self._row(i, self.rewritten[i], self.job.guideline)

    def _row(self, i: int, response: str, guideline: str | None) -> dict[str, Any]:
        chat = self.chats[i]
        before = chat.get("messages", [])[:-1] or [{"role": "user", "content": chat["prompt"]}]
        return {
            "id": f"{chat['id']}:{'rewritten' if guideline else 'untouched'}",
            "messages": [*before, {"role": "assistant", "content": response}],
            "prompt": chat["prompt"],
            "response": response,
            "topic": self.labels[i],
            "rewritten": guideline is not None,
            "original_response": chat["response"],
            "guideline": guideline,
            "backend": self.backend.name,
            "model": self.backend.model,
            "source_id": str(chat["id"]),
        }

    def counts(self) -> dict[str, Any]:
        return {
            "classified": len(self.labels),
            "topics": dict(Counter(self.labels.values()).most_common()),
            "rewritten": len(self.rewritten),
            "untouched": self.job.n_untouched,
            "failed": len(self.failed),
            "failed_reasons": dict(Counter(row["reason"] for row in self.failed).most_common()),
        }


def _save(
    folder: Path, rows: list[dict[str, Any]], failed: list[dict[str, Any]], provenance: dict
) -> BehaviourDataset:
    with atomic_folder(folder) as new:
        Dataset.from_list(rows).save_to_disk(new / "dataset")
        files = {"train.jsonl": rows, "failed.jsonl": failed}
        hashes = {name: _write_jsonl(new / name, lines) for name, lines in files.items()}
        provenance = {**provenance, "sha256": hashes}
        text = json.dumps(provenance, indent=2, ensure_ascii=False)
        (new / PROVENANCE).write_text(text, encoding="utf-8")
    return BehaviourDataset(
        Dataset.load_from_disk(str(folder / "dataset")), failed, provenance, folder
    )


def _write_jsonl(path: Path, rows: list[dict[str, Any]]) -> str:
    data = "".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows).encode()
    path.write_bytes(data)
    return hashlib.sha256(data).hexdigest()
