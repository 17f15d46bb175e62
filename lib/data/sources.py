"""Raw rows out of a hub dataset, a `save_to_disk` folder, or files of jsonl, json, csv, parquet.

Nothing here knows what a chat is: a source is a function that starts a fresh pass of
`(where, row)` pairs, `where` being what an error message calls the row (`chats.jsonl line 7`).
Files are read piece by piece, in memory that does not grow with their length (a JSON array
excepted), and a byte that is not UTF-8, a broken or over-long line raise `ValueError` there.
"""

import csv
import json
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import datasets
import pyarrow as pa
import pyarrow.parquet as pq

from lib.paths import resolve

MAX_LINE = 16 * 2**20
"""Longest line of a jsonl or csv file, in bytes; a longer one is never read whole."""

MAX_JSON = 512 * 2**20
"""Largest file that holds one JSON array, in bytes: it has to be parsed at once."""

Rows = Iterator[tuple[str, dict[str, Any]]]

_SPLITS = ("train", "validation", "valid", "val", "dev", "eval", "test")
_BOM = b"\xef\xbb\xbf"


def open_source(name_or_path: str | Path, split: str, streaming: bool) -> Callable[[], Rows]:
    """Find the data and its split; reading starts when the returned function is called.

    A folder's files belong to the split that begins their name (`train-00000.jsonl`); where no
    file is named so, all of them are `train`, and so is a lone file or a `Dataset` on disk.

    Raises:
        FileNotFoundError: it looks like a path (a `Path`, a leading `/`, `.` or `~`, a data
            suffix, or two slashes) and nothing is there. Any other name is a hub id.
        ValueError: no such split, or no file of a kind that can be read.
    """
    path = resolve(name_or_path)
    if path.is_file():
        _need_split(split, ["train"], path)
        return _files([path])
    if path.is_dir() and any(
        (path / name).is_file() for name in ("dataset_dict.json", "state.json")
    ):
        return _on_disk(path, split)
    if path.is_dir():
        return _files(_files_of_split(path, split))
    text = str(name_or_path)
    suffixed = path.suffix in _READERS
    if isinstance(name_or_path, Path) or suffixed or text[:1] in "/.~" or text.count("/") > 1:
        raise FileNotFoundError(f"no file or folder {path} (from {text!r})")
    rows = datasets.load_dataset(text, split=split, streaming=streaming)
    return lambda: _enumerated(rows, text)


def _need_split(split: str, found: list[str], path: Path) -> None:
    if split not in found:
        raise ValueError(f"{path} has no split {split!r}; it has {', '.join(map(repr, found))}")


def _on_disk(path: Path, split: str) -> Callable[[], Rows]:
    loaded = datasets.load_from_disk(path)
    if isinstance(loaded, datasets.Dataset):
        loaded = {"train": loaded}
    _need_split(split, sorted(loaded), path)
    return lambda: _enumerated(loaded[split], path.name)


def _enumerated(rows: datasets.Dataset | datasets.IterableDataset, name: str) -> Rows:
    return ((f"{name} row {number}", row) for number, row in enumerate(rows, start=1))


def _files_of_split(folder: Path, split: str) -> list[Path]:
    files = sorted(file for file in folder.iterdir() if file.suffix in _READERS)
    if not files:
        kinds = ", ".join(sorted(_READERS))
        raise ValueError(f"{folder} holds no file of a kind that can be read ({kinds})")
    by_split: dict[str, list[Path]] = {}
    for file in files:
        named = next((name for name in _SPLITS if _begins(file.stem, name)), None)
        by_split.setdefault(named or "", []).append(file)
    if set(by_split) == {""}:
        by_split = {"train": files}
    _need_split(split, sorted(name for name in by_split if name), folder)
    return by_split[split]


def _begins(stem: str, name: str) -> bool:
    return stem == name or stem.startswith((f"{name}-", f"{name}_", f"{name}."))


def _files(files: list[Path]) -> Callable[[], Rows]:
    for file in files:
        if file.suffix not in _READERS:
            kinds = ", ".join(sorted(_READERS))
            raise ValueError(f"{file}: cannot read {file.suffix or 'no suffix'!r}; need {kinds}")
        if file.stat().st_size == 0:
            raise ValueError(f"{file} is empty")
    return lambda: (pair for file in files for pair in _READERS[file.suffix](file))


def _lines(file: Path) -> Iterator[tuple[int, str]]:
    """Numbered lines with their ends, decoded strictly and never longer than `MAX_LINE`."""
    offset = number = 0
    with file.open("rb") as stream:
        while line := stream.readline(MAX_LINE + 1):
            number += 1
            if len(line) > MAX_LINE:
                raise ValueError(
                    f"{file.name} line {number} is longer than {MAX_LINE} bytes; need shorter rows"
                )
            yield number, _decode(line, file, number, offset)
            offset += len(line)


def _decode(data: bytes, file: Path, line: int, offset: int) -> str:
    skipped = len(_BOM) if offset == 0 and data.startswith(_BOM) else 0
    try:
        return data[skipped:].decode()
    except UnicodeDecodeError as error:
        start = skipped + error.start
        line += data.count(b"\n", 0, start)
        raise ValueError(
            f"{file.name} line {line}: byte {offset + start} (0x{data[start]:02x}) "
            f"is not UTF-8; need a UTF-8 file"
        ) from None


def _parse(text: str, file: Path, line: int) -> Any:
    try:
        return json.loads(text)
    except json.JSONDecodeError as error:
        where = f"{file.name} line {line + error.lineno - 1} column {error.colno}"
        raise ValueError(f"{where} is not JSON: {error.msg}") from None
    except ValueError as error:  # a number of more digits than Python reads
        raise ValueError(f"{file.name} line {line} is not JSON that can be read: {error}") from None
    except RecursionError:
        raise ValueError(
            f"{file.name} line {line} is not JSON that can be read: too deep"
        ) from None


def _object(value: Any, where: str) -> tuple[str, dict[str, Any]]:
    if type(value) is not dict:
        raise ValueError(f"{where}: need a JSON object, got {type(value).__name__}")
    return where, value


def _read_jsonl(file: Path) -> Rows:
    for number, line in _lines(file):
        if line.strip():
            yield _object(_parse(line.rstrip(), file, number), f"{file.name} line {number}")


def _read_json(file: Path) -> Rows:
    """One array of objects, or else one object a line."""
    with file.open("rb") as stream:
        start = stream.read(4096).removeprefix(_BOM).lstrip()
    if not start.startswith(b"["):
        yield from _read_jsonl(file)
        return
    if file.stat().st_size > MAX_JSON:
        raise ValueError(f"{file.name} is one JSON array of over {MAX_JSON} bytes; need jsonl")
    array = _parse(_decode(file.read_bytes(), file, 1, 0), file, 1)
    for number, value in enumerate(array, start=1):
        yield _object(value, f"{file.name} element {number}")


def _read_csv(file: Path) -> Rows:
    last = 0

    def lines() -> Iterator[str]:
        nonlocal last
        for number, line in _lines(file):
            last = number
            yield line

    former = csv.field_size_limit(MAX_LINE)
    try:
        for row in csv.DictReader(lines(), strict=True):
            where = f"{file.name} line {last}"
            if None in row:
                raise ValueError(f"{where}: more fields than the header's {len(row) - 1}")
            yield where, row
    except csv.Error as error:
        raise ValueError(f"{file.name} line {last} is not CSV: {error}") from None
    finally:
        csv.field_size_limit(former)


def _read_parquet(file: Path) -> Rows:
    number = 0
    try:
        for batch in pq.ParquetFile(file).iter_batches(batch_size=1000):
            for row in batch.to_pylist():
                number += 1
                yield f"{file.name} row {number}", row
    except pa.ArrowInvalid as error:
        raise ValueError(f"{file.name} is not Parquet that can be read: {error}") from None
    except UnicodeDecodeError:
        raise ValueError(f"{file.name}: text after row {number} is not UTF-8") from None


_READERS: dict[str, Callable[[Path], Rows]] = {
    ".jsonl": _read_jsonl,
    ".json": _read_json,
    ".csv": _read_csv,
    ".parquet": _read_parquet,
}
