"""Datasets on disk: rows written as they come, then memory-mapped."""

import hashlib
import itertools
import os
import uuid
from collections.abc import Iterable, Mapping
from typing import Any

import pyarrow as pa
from datasets import Dataset, Features

from lib.paths import data_dir
from lib.runtime import require_writable

_BATCH = 1000


def write_dataset(rows: Iterable[Mapping[str, Any]], features: Features, folder: str) -> Dataset:
    """Write `rows` as they come to `data/cache/<folder>`, in constant memory, and map the file.

    The file is named by a hash of its bytes: the same rows are stored once, and none can be
    taken for others (`Dataset.map` trusts fingerprints of functions and tokenizers, which two
    different ones may share). The file is complete or, when `rows` raises, absent.

    Raises:
        OSError: the folder cannot be written.
    """
    target = require_writable(data_dir() / "cache" / folder)
    temporary = target / f".{uuid.uuid4().hex}"
    schema = features.arrow_schema
    try:
        with temporary.open("wb") as sink:
            with pa.ipc.new_stream(sink, schema) as writer:
                rows = iter(rows)
                while batch := list(itertools.islice(rows, _BATCH)):
                    writer.write_table(pa.Table.from_pylist(batch, schema=schema))
            sink.flush()
            os.fsync(sink.fileno())
        with temporary.open("rb") as stream:
            digest = hashlib.file_digest(stream, lambda: hashlib.blake2b(digest_size=12))
        final = target / f"{digest.hexdigest()}.arrow"
        temporary.replace(final)
    finally:
        temporary.unlink(missing_ok=True)
    return Dataset.from_file(str(final))
