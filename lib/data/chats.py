"""Chat datasets: load and check; `lib.data.mixing` mixes and splits them.

A chat has `id` (a hash of the content where the input has none), `messages` (all of it, as `[{role,
content}]`), `prompt` and `response` (text of the last user and assistant turns); a preference pair
has `id`, `prompt` (the turns before the answer), `chosen` and `rejected` (one assistant turn each).
`topic`, `source` and HelpSteer's scores come along where the input has them. TRL's DPOTrainer takes
pairs as they are, its SFTTrainer `chats.select_columns("messages")`.
"""

import csv
import hashlib
import itertools
import json
import logging
import re
import tempfile
from collections import Counter, defaultdict
from collections.abc import Callable, Iterable, Iterator, Mapping
from pathlib import Path
from typing import Any

import datasets
import pyarrow.parquet as pq
from datasets import Dataset, Features, IterableDataset, List, Value
from datasets.arrow_writer import ArrowWriter

from lib.paths import data_dir, resolve
from lib.runtime import require_writable, sha256

SCHEMAS: dict[str, tuple[str, ...]] = {
    "preferences": ("chosen", "rejected"),  # answers with `prompt`, whole chats, HH transcripts
    "messages": ("messages",),
    "ShareGPT": ("conversations",),
    "Alpaca": ("instruction", "output"),  # and `input`, which may be empty
    "prompt/response": ("prompt", "response"),  # HelpSteer is this with its five scores
    "prompt/completion": ("prompt", "completion"),
}
"""Columns that tell a schema; the first whose columns are all there is taken."""

Row = dict[str, Any]
Rows = Iterator[tuple[str, Row]]
_SCORES = ("helpfulness", "correctness", "coherence", "complexity", "verbosity")
_TEXT, _TURNS = Value("string"), List({"role": Value("string"), "content": Value("string")})
_CARRIED = {"topic": _TEXT, "source": _TEXT} | dict.fromkeys(_SCORES, Value("float64"))
_ROLES = {"human": "user", "gpt": "assistant"} | {r: r for r in ("system", "user", "assistant")}
_KINDS = (".csv", ".json", ".jsonl", ".parquet")


def load_chats(
    name_or_path: str | Path,
    *,
    split: str = "train",
    limit: int | None = None,
    streaming: bool = False,
    skip_bad: bool = False,
) -> Dataset | IterableDataset:
    """Chats or preference pairs from a hub id, a `save_to_disk` folder, or a folder or file of
    jsonl, json, csv or parquet; the columns of the first row tell the schema (`SCHEMAS`).

    A chat is one system turn or none, then user and assistant in turn, the assistant last, none of
    them empty: most chat templates raise on, or quietly drop, anything else. Every row is checked
    before the dataset exists. A stream checks rows as they come, and does not compare ids.

    Args:
        limit: read the first `limit` rows only.
        skip_bad: leave out bad rows (empty text, wrong turns, an earlier row's id); log how many.

    Raises:
        FileNotFoundError: a path where nothing is.
        ValueError: unknown schema or split, no rows, a row that is no chat, an id given twice, a
            broken file. The message names file, row and column; nothing is left behind.
    """
    source = open_source(name_or_path, split, streaming)
    where, first = next(itertools.islice(source(), limit), (f"{name_or_path} has no rows", {}))
    schema = next((s for s, needed in SCHEMAS.items() if first.keys() >= set(needed)), None)
    if schema is None:
        raise ValueError(f"{where}: need the columns of one of {SCHEMAS}, got {sorted(first)}")
    carried = {name: type_ for name, type_ in _CARRIED.items() if name in first or not streaming}
    kind = {"messages": _TURNS, "prompt": _TEXT, "response": _TEXT}
    if schema == "preferences":
        kind = dict.fromkeys(("prompt", "chosen", "rejected"), _TURNS)
    features = Features({"id": _TEXT, **kind, **carried})

    def rows() -> Iterator[Row]:
        n_bad, seen = 0, Counter()
        for where, row in itertools.islice(source(), limit):
            try:
                got = _columns(row, schema, features)
                name = got["id"]
                seen.update([] if streaming else [name])
                if seen[name] > 1 and not name.startswith("content-"):
                    raise ValueError(f"id {name!r} is an earlier row's; need unique ids")
                got["id"] += f"-{seen[name]}" * (seen[name] > 1)
            except ValueError as error:
                if not skip_bad:
                    raise ValueError(f"{where}: {error} (skip_bad=True skips)") from None
                n_bad += 1
            else:
                yield got
        if n_bad:
            logging.getLogger(__name__).warning("left out %d rows that are no chat", n_bad)

    if streaming:
        return IterableDataset.from_generator(rows, features=features)
    chats = write_dataset(rows(), features, "chats")
    if not len(chats):
        raise ValueError(f"{name_or_path} has no row that is a chat")
    absent = [name for name in carried if chats.data.column(name).null_count == len(chats)]
    return chats.remove_columns(absent)


def write_dataset(rows: Iterable[Mapping[str, Any]], features: Features, folder: str) -> Dataset:
    """Write `rows` as they come to `data/cache/<folder>`, complete or not at all, and map the file.

    A hash of its bytes is its name; two tokenizers may share the fingerprint that `map` trusts.
    """
    target = require_writable(data_dir() / "cache" / folder)
    with tempfile.TemporaryDirectory(dir=target) as temporary:
        new = Path(temporary) / "rows.arrow"
        with ArrowWriter(path=str(new), features=features) as writer:
            for row in rows:
                writer.write(row)
            writer.finalize()
        return Dataset.from_file(str(new.replace(target / f"{sha256(new)}.arrow")))


def open_source(name_or_path: str | Path, split: str, streaming: bool) -> Callable[[], Rows]:
    """Find the data; each call of the result is a pass over rows named as `chats.jsonl row 7`.

    A folder's files belong to the split that begins their name (`train-00000.jsonl`); where no
    file is named so, all of them are `train`, and so is a lone file or a `Dataset` on disk. A
    `Path`, a name with a data suffix, two slashes or a leading `/`, `.` or `~` is no hub id.
    """
    path, text = resolve(name_or_path), str(name_or_path)
    found: dict[str, Any] = defaultdict(list)
    if any((path / name).is_file() for name in ("dataset_dict.json", "state.json")):
        loaded = datasets.load_from_disk(path)
        found = {"train": loaded} if isinstance(loaded, Dataset) else loaded
    elif path.exists():
        for file in sorted(path.iterdir()) if path.is_dir() else [path]:
            named = re.match(r"(train|validation|valid|val|dev|eval|test)(?=[-_.]|$)", file.stem)
            if file.suffix in _KINDS:
                found[named[1] if named and file != path else ""].append(file)
        if unnamed := found.pop("", None):
            found = found or {"train": unnamed}
    elif isinstance(name_or_path, Path) or path.suffix in _KINDS or re.search("^[/.~]|/.*/", text):
        raise FileNotFoundError(f"no file or folder {path} (from {text!r})")
    else:
        found[split] = datasets.load_dataset(text, split=split, streaming=streaming)
    if (data := found.get(split)) is None:
        raise ValueError(f"{path}: no split {split!r} among {sorted(found)}, of kinds {_KINDS}")
    if isinstance(data, list):
        return lambda: (pair for file in data for pair in _read(file))
    return lambda: ((f"{path.name} row {n}", row) for n, row in enumerate(data, start=1))


def _read(file: Path) -> Rows:
    """By `json` and `csv`: Arrow would turn dates into times and refuse a column that first comes
    late, pandas would turn `NA` into nothing and `007` into 7."""
    csv.field_size_limit(2**31 - 1)  # of the process: an answer may be longer than 128 KiB
    number, rows = 1, []
    try:
        with file.open("rb") as stream:
            lines = (str(line, "utf-8-sig") for line in stream)
            if file.suffix == ".parquet":
                batches = pq.ParquetFile(stream).iter_batches(batch_size=1000)
                rows = (row for batch in batches for row in batch.to_pylist())
            elif file.suffix == ".csv":
                rows = csv.DictReader(lines, strict=True)
            elif stream.peek(64).lstrip(b"\xef\xbb\xbf \t\r\n").startswith(b"["):
                rows = json.loads(str(stream.read(), "utf-8-sig"))
            else:
                rows = (json.loads(line) for line in lines if line.strip())
            for row in rows:
                if not isinstance(row, dict) or None in row:
                    raise ValueError(f"need an object, each field with its name, got {row!r:.80}")
                yield f"{file.name} row {number}", row
                number += 1
    except (ValueError, RecursionError, csv.Error) as error:
        raise ValueError(f"{file.name} row {number}: {error}") from None


def _columns(row: Row, schema: str, features: Features) -> Row:
    if schema == "preferences":
        chosen, rejected = (_chat(row, "prompt", column) for column in SCHEMAS[schema])
        if chosen == rejected or chosen[:-1] != rejected[:-1]:
            raise ValueError("chosen and rejected must differ, and in their last turn only")
        got = {"prompt": chosen[:-1], "chosen": chosen[-1:], "rejected": rejected[-1:]}
    else:
        got = {"messages": _chat(row, *SCHEMAS[schema])}
    digest = hashlib.blake2b(json.dumps(got, sort_keys=True).encode(), digest_size=10)
    if "messages" in got:
        got["prompt"], got["response"] = (turn["content"] for turn in got["messages"][-2:])
    for name in features.keys() - got.keys():
        value = row.get(name)
        value = value if value is None or isinstance(value, list | dict) else str(value)
        text = _text(value, name) if value else None
        try:
            got[name] = float(text) if text and name in _SCORES else text
        except ValueError:
            raise ValueError(f"{name}: need a number, got {text!r}") from None
    got["id"] = got["id"] or f"content-{digest.hexdigest()}"
    return got


def _text(value: Any, column: str) -> str:
    if not isinstance(value, str) or not value.strip() or re.search(r"[\ud800-\udfff]", value):
        raise ValueError(f"{column}: need text, got {value!r:.80}")
    return value


def _turns(value: Any, column: str, role: str) -> list[Row]:
    if not isinstance(value, list):
        return [{"role": role, "content": _text(value, column)}]
    turns = []
    for number, turn in enumerate(value, start=1):
        here, given = f"{column} turn {number}", turn if isinstance(turn, dict) else {}
        name = str(given.get("role", given.get("from")))
        if name not in _ROLES:
            raise ValueError(f"{here}: need a role system, user or assistant, got {turn!r:.80}")
        text = _text(given.get("content", given.get("value")), here)
        turns.append({"role": _ROLES[name], "content": text})
    return turns


def _marked(text: str, mark: str) -> list[Row]:
    _, *parts = re.split(mark, text)
    return [{"role": r.lower(), "content": t} for r, t in zip(parts[::2], parts[1::2], strict=True)]


def _chat(row: Row, *columns: str) -> list[Row]:
    """The last column is a whole chat, or the answer to the one before it."""
    *before, last = columns
    value = row.get(last)
    if row.get("prompt") is None and str(value).startswith("\n\nHuman:"):
        value = _marked(value.rstrip(), r"\s*\n\n(Human|Assistant):\s*")
    turns = _turns(value, last, "assistant")
    if before and turns and turns[0]["role"] == "assistant":
        value = row.get(before[0])
        if before[0] == "instruction" and row.get("input"):
            value = f"{_text(value, before[0])}\n\n{row['input']}"
        if "helpfulness" in row and isinstance(value, str):  # earlier turns may be in the prompt
            value = _marked(f"<extra_id_1>User\n{value}", r"\n?<extra_id_1>(User|Assistant)\n")
        turns = _turns(value, before[0], "user") + turns
    roles = [turn["role"] for turn in turns]
    rest = roles[roles[:1] == ["system"] :]
    if not rest or rest != ["user", "assistant"] * (len(rest) // 2):
        raise ValueError(f"need user and assistant in turn, the assistant last; got {roles}")
    return turns
