"""Device, dtype, seeds, and writes that are complete or absent."""

import contextlib
import hashlib
import os
import random
import shutil
import tempfile
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import torch

DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}


def resolve_device(name: str) -> torch.device:
    """`auto` takes a GPU where there is one.

    Raises:
        ValueError: the name is no device, or this machine has none of that kind.
    """
    if name == "auto":
        return torch.device("cuda" if torch.cuda.is_available() else "cpu")
    try:
        device = torch.device(name)
    except RuntimeError as error:
        raise ValueError(f"need device auto, cpu, cuda, cuda:N or mps, got {name!r}") from error
    if device.type == "cuda" and (device.index or 0) >= torch.cuda.device_count():
        raise ValueError(
            f"got device {name!r}, but this machine has {torch.cuda.device_count()} GPUs; use 'cpu'"
        )
    return device


def resolve_dtype(name: str) -> torch.dtype:
    """Raises ValueError for a name that is none of `DTYPES`."""
    if name not in DTYPES:
        raise ValueError(f"need dtype in {sorted(DTYPES)}, got {name!r}")
    return DTYPES[name]


def require_at_least(least: int, **values: int) -> None:
    """Raises ValueError for the first of `values` that is smaller; its name is in the message."""
    for name, value in values.items():
        if value < least:
            raise ValueError(f"need {name} >= {least}, got {value}")


def seed_everything(seed: int) -> None:
    """Seed Python, NumPy and torch (CPU and every GPU)."""
    random.seed(seed)
    np.random.seed(seed % 2**32)
    torch.manual_seed(seed)


def require_writable(folder: Path) -> Path:
    """Create `folder` and prove that a file can be written in it, before any work starts.

    Raises:
        OSError: it cannot be created or written; the message names the folder.
    """
    try:
        folder.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryFile(dir=folder):
            pass
    except OSError as error:
        raise OSError(error.errno, f"cannot write in {folder}: {error.strerror}") from error
    return folder


def sha256(path: Path) -> str:
    """Checksum of a file's bytes."""
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def _fsync(path: Path) -> None:
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def _share(file: Path) -> None:
    """Readable as far as the umask lets: mkstemp, and safetensors, make files private."""
    umask = os.umask(0)
    os.umask(umask)
    file.chmod(0o666 & ~umask)


@contextlib.contextmanager
def atomic_file(path: str | Path) -> Iterator[Path]:
    """Yield a temporary path beside `path`; it takes the name only if the block ends well."""
    path = Path(path)
    require_writable(path.parent)
    descriptor, name = tempfile.mkstemp(dir=path.parent, prefix=f".{path.name}.")
    os.close(descriptor)
    temporary = Path(name)
    try:
        yield temporary
        _fsync(temporary)
        _share(temporary)
        temporary.replace(path)
        _fsync(path.parent)
    finally:
        temporary.unlink(missing_ok=True)


@contextlib.contextmanager
def atomic_folder(path: str | Path) -> Iterator[Path]:
    """Yield a temporary folder beside `path`; it takes the name only if the block ends well.

    A folder that stands there already is replaced as a whole, never merged.
    """
    path = Path(path)
    require_writable(path.parent)
    temporary = Path(tempfile.mkdtemp(dir=path.parent, prefix=f".{path.name}."))
    try:
        new, old = temporary / "new", temporary / "old"
        new.mkdir()
        yield new
        for file in sorted(new.rglob("*")):
            _fsync(file)
            if file.is_file():
                _share(file)
        _fsync(new)
        if path.exists():
            path.replace(old)
        try:
            new.replace(path)
        except BaseException:
            if old.exists():
                old.replace(path)
            raise
        _fsync(path.parent)
    finally:
        shutil.rmtree(temporary, ignore_errors=True)
