"""Chat datasets: load and check; `lib.data.mixing` mixes and splits them.

Everything is a memory-mapped `datasets.Dataset` (an `IterableDataset` when streaming). Columns:

| column | chats | preferences |
|---|---|---|
| `id` | text, unique; a hash of the content where the input has none | same |
| `messages` | the whole chat, `[{role, content}]`, ending with an assistant turn | |
| `prompt` | text of the last user turn | the turns before the answer, as messages |
| `response` | text of the last assistant turn | |
| `chosen`, `rejected` | | one assistant turn each, as messages |

`topic`, `source` and HelpSteer's five scores come along where the input has them. TRL's DPOTrainer
takes preferences as they are. Its SFTTrainer wants `messages` alone, because it takes a `prompt`
beside them for a prompt-completion pair: give it `chats.select_columns("messages")`.
"""

import hashlib
import itertools
import json
import logging
from collections import defaultdict
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

from datasets import (
    Dataset,
    Features,
    IterableDataset,
    List,
    Value,
)

from lib.data import schemas, sources
from lib.data.store import write_dataset

logger = logging.getLogger(__name__)

SCORES = ("helpfulness", "correctness", "coherence", "complexity", "verbosity")
"""HelpSteer's ratings of an answer, 0 to 4."""

_MESSAGES = List({"role": Value("string"), "content": Value("string")})
_CHAT = {"messages": _MESSAGES, "prompt": Value("string"), "response": Value("string")}
_PREFERENCE = {"prompt": _MESSAGES, "chosen": _MESSAGES, "rejected": _MESSAGES}
_CARRIED = {"topic": Value("string"), "source": Value("string")} | dict.fromkeys(
    SCORES, Value("float64")
)
_HASHED = "content-"
_SHOWN = 5


def load_chats(
    name_or_path: str | Path,
    *,
    split: str = "train",
    limit: int | None = None,
    streaming: bool = False,
    skip_bad: bool = False,
) -> Dataset | IterableDataset:
    """Chats or preference pairs from a hub id, a `save_to_disk` folder, or a folder or file of
    jsonl, json, csv or parquet; `lib.data.schemas` lists the schemas.

    Every row is checked before the dataset exists. When streaming, rows are checked as they
    come, and ids are not compared: that would take memory for each.

    Args:
        limit: read the first `limit` rows only.
        skip_bad: leave out rows that are no chat (empty text, wrong turns) and log how many.

    Raises:
        FileNotFoundError: a path where nothing is.
        ValueError: unknown schema or split, no rows, rows that are no chat, ids given twice,
            text that is not UTF-8, broken JSON, a line over `sources.MAX_LINE`. The message
            names file, line and field; nothing is left behind.
    """
    if limit is not None and limit < 1:
        raise ValueError(f"need limit >= 1 or None, got {limit}")
    source = sources.open_source(name_or_path, split, streaming)
    first = next(source(), None)
    if first is None:
        raise ValueError(f"{name_or_path} has no rows")
    where, row = first
    kind = _PREFERENCE if schemas.schema_of(list(row), where) == "preferences" else _CHAT
    if streaming:
        carried = {name: value for name, value in _CARRIED.items() if name in row}
        features = Features({"id": Value("string"), **kind, **carried})

        def stream() -> Iterator[dict[str, Any]]:
            for _, got in _checked(itertools.islice(source(), limit), features, skip_bad):
                yield got

        return IterableDataset.from_generator(stream, features=features)
    features = Features({"id": Value("string"), **kind, **_CARRIED})
    checked = _checked(itertools.islice(source(), limit), features, skip_bad, collect=True)
    chats = write_dataset(_unique(checked), features, "chats")
    if not len(chats):
        raise ValueError(f"{name_or_path} has no row that is a chat")
    table = chats.data
    return chats.remove_columns([c for c in _CARRIED if table.column(c).null_count == len(chats)])


def _checked(
    rows: sources.Rows, features: Features, skip_bad: bool, collect: bool = False
) -> Iterator[tuple[str, dict[str, Any]]]:
    """Rows in the columns of `features`, `id` None where the input has none.

    Bad rows are skipped; or raise at the first; or (`collect`) raise together at the end.
    """
    preferences = "chosen" in features
    faults, n_bad = [], 0
    for where, row in rows:
        schema = schemas.schema_of(list(row), where)
        if (schema == "preferences") != preferences:
            raise ValueError(f"{where}: chats and preferences cannot share one dataset")
        try:
            got = _columns(row, schema, features)
        except schemas.BadRow as error:
            if not (skip_bad or collect):
                raise ValueError(f"{where}: {error}") from None
            n_bad += 1
            if len(faults) < _SHOWN:
                faults.append(f"{where}: {error}")
        else:
            yield where, got
    if n_bad:
        report = f"{n_bad} rows are no chat: {'; '.join(faults)}{'; …' * (n_bad > _SHOWN)}"
        if not skip_bad:
            raise ValueError(f"{report}. Mend them, or leave them out with skip_bad=True")
        logger.warning("left out: %s", report)


def _unique(rows: Iterator[tuple[str, dict[str, Any]]]) -> Iterator[dict[str, Any]]:
    """Number the repeats of a hashed id (`-2`, `-3`); raise at the end for ids given twice."""
    seen: set[int] = set()  # of 8-byte hashes: ids themselves may be long
    repeats: defaultdict[str, int] = defaultdict(lambda: 1)
    twice, n_twice = [], 0
    for where, row in rows:
        key = _key(row["id"])
        if key in seen and row["id"].startswith(_HASHED):
            repeats[row["id"]] += 1
            row["id"] += f"-{repeats[row['id']]}"
            key = _key(row["id"])
        elif key in seen:
            n_twice += 1
            if len(twice) < _SHOWN:
                twice.append(f"{row['id']!r} ({where})")
        seen.add(key)
        yield row
    if n_twice:
        shown = ", ".join(twice) + ", …" * (n_twice > _SHOWN)
        raise ValueError(f"{n_twice} rows repeat an id of an earlier row: {shown}; need unique ids")


def _key(text: str) -> int:
    return int.from_bytes(hashlib.blake2b(text.encode(), digest_size=8).digest())


def _columns(row: Mapping[str, Any], schema: str, features: Features) -> dict[str, Any]:
    got: dict[str, Any] = schemas.read_row(row, schema)
    given = row.get("id")
    if given is not None and (isinstance(given, bool) or not isinstance(given, str | int)):
        raise schemas.BadRow(f"id: need text or a whole number, got {type(given).__name__}")
    if given is None or given == "":
        text = json.dumps(got, sort_keys=True).encode()
        got["id"] = _HASHED + hashlib.blake2b(text, digest_size=10).hexdigest()
    else:
        got["id"] = schemas.checked_text(str(given), "id")
    if "messages" in got:
        got["prompt"], got["response"] = (turn["content"] for turn in got["messages"][-2:])
    for name in _CARRIED.keys() & features.keys():
        got[name] = _carried(row.get(name), name)
    return got


def _carried(value: Any, name: str) -> str | float | None:
    if value is None or value == "":
        return None
    if name not in SCORES:
        if isinstance(value, list | dict):
            raise schemas.BadRow(f"{name}: need text or a number, got {type(value).__name__}")
        return schemas.checked_text(str(value), name)
    try:
        return float(value)
    except (TypeError, ValueError):
        raise schemas.BadRow(f"{name}: need a number, got {value!r}") from None
