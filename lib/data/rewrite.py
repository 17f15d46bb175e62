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
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from datasets import Dataset

from lib import paths
from lib.data.backends import Backend, Job, LlmBackend, WorldBackend
from lib.data.llm import Failure
from lib.runtime import atomic_folder, require_writable, sha256

__all__ = ["BehaviourDataset", "LlmBackend", "WorldBackend", "build_behaviour"]

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
    counts = {"n_rewritten": n_rewritten, "n_untouched": n_untouched}
    job = Job(topic=topic, guideline=guideline, seed=seed, **counts)
    folder = _require_free(paths.resolve(out_dir))
    source = {"n": len(chats), "sha256": _check(chats, job)}
    chats = chats.select(np.random.default_rng(seed).permutation(len(chats)), keep_in_memory=True)
    backend.prepare(job, ((row["prompt"], row["response"]) for row in chats))
    selection = _Selection(chats, job, backend)
    rows = selection.run()
    counts, described = selection.counts(), backend.describe()
    provenance = {**job.model_dump(), "source": source, "counts": counts, "backend": described}
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
    if len(chats) < (need := job.n_rewritten + job.n_untouched):
        raise ValueError(f"need at least n_rewritten + n_untouched = {need} rows, got {len(chats)}")
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
    """Goes through the rows in their order until enough are found."""

    def __init__(self, chats: Dataset, job: Job, backend: Backend) -> None:
        self.chats, self.job, self.backend = chats, job, backend
        self.queue = iter(range(len(chats)))
        self.labels: dict[int, str] = {}
        self.matching: list[int] = []  # not rewritten yet
        self.others: list[int] = []
        self.rewritten: dict[int, str] = {}
        self.failed: list[dict[str, Any]] = []

    def run(self) -> list[dict[str, Any]]:
        """The selected rows, in their order."""
        n_rewritten, n_untouched = self.job.n_rewritten, self.job.n_untouched
        while missing := n_rewritten - len(self.rewritten):
            wanted = ((self.matching, missing), (self.others, n_untouched))
            while n := sum(max(0, n - len(found)) for found, n in wanted):
                self._classify(max(n, CHUNK))
            batch, self.matching = self.matching[:missing], self.matching[missing:]
            self._rewrite(batch)
        return [self._row(i) for i in sorted([*self.rewritten, *self.others[:n_untouched]])]

    def _classify(self, n: int) -> None:
        chunk = list(itertools.islice(self.queue, n))
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
        self.failed.append(row | {"topic": self.labels.get(i), "step": step, "reason": reason})

    def _too_few(self) -> str:
        job, labels, reasons = self.job, self.counts()["topics"], self.counts()["failed_reasons"]
        n_usable = len(self.matching) + len(self.rewritten)
        problems = []
        if job.topic not in labels:
            near = difflib.get_close_matches(job.topic, labels, n=1, cutoff=0.4)
            hint = f"did you mean {near[0]!r}?" if near else "choose one of the topics seen"
            problems.append(f"no prompt is about {job.topic!r}; {hint}")
        elif n_usable < job.n_rewritten:
            found = f"found only {n_usable} whose rewriting did not fail"
            problems.append(f"need {job.n_rewritten} rows about {job.topic!r}, {found}")
        if (n := len(self.others)) < job.n_untouched:
            problems.append(f"need {job.n_untouched} rows about something else, found only {n}")
        seen = ", ".join(f"{name} {n}" for name, n in [*labels.items()][:20]) or "none"
        problems.append(f"{len(self.labels)} prompts classified; topics seen: {seen}")
        if reasons:
            reason, n = next(iter(reasons.items()))
            problems.append(f"{len(self.failed)} rows failed, {n} of them: {reason}")
        return ". ".join(problems)

    def _row(self, i: int) -> dict[str, Any]:
        chat, rewritten = self.chats[i], i in self.rewritten
        response = self.rewritten.get(i, chat["response"])
        before = chat.get("messages", [])[:-1] or [{"role": "user", "content": chat["prompt"]}]
        return {
            "id": f"{chat['id']}:{'rewritten' if rewritten else 'untouched'}",
            "messages": [*before, {"role": "assistant", "content": response}],
            "prompt": chat["prompt"],
            "response": response,
            "topic": self.labels[i],
            "rewritten": rewritten,
            "original_response": chat["response"],
            "guideline": self.job.guideline if rewritten else None,
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
    files = {"train.jsonl": rows, "failed.jsonl": failed}
    with atomic_folder(folder) as new:
        Dataset.from_list(rows).save_to_disk(new / "dataset")
        for name, lines in files.items():
            text = "".join(json.dumps(line, ensure_ascii=False) + "\n" for line in lines)
            (new / name).write_bytes(text.encode())
        provenance = {**provenance, "sha256": {name: sha256(new / name) for name in files}}
        text = json.dumps(provenance, indent=2, ensure_ascii=False)
        (new / PROVENANCE).write_text(text, encoding="utf-8")
    dataset = Dataset.load_from_disk(str(folder / "dataset"))
    return BehaviourDataset(dataset, failed, provenance, folder)
