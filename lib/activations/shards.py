"""Read activations from disk, through a memory map: a cache may be larger than memory.

`lib.activations.cache` writes what is read here, and exports both sides.
"""

import hashlib
import json
from pathlib import Path
from typing import Any

import torch
from jaxtyping import Int
from safetensors import SafetensorError, safe_open
from torch import Tensor

from lib.activations.source import Block

MANIFEST = "manifest.json"
FORMAT = 1
_AGAIN = "; delete the folder and write the cache again"


class ActivationCache:
    """A finished cache, and a source: each block is `block_tokens` of a shard, the last fewer.

    Opening it looks at every shard's size and header. A shard is checked against its checksum
    when it is first read, so damaged numbers are never handed on.

    Raises:
        FileNotFoundError: no cache in `folder`.
        ValueError: a cache whose writing never ended, or a shard that is missing, empty,
            truncated, damaged or of another cache; the message names it.
    """

    def __init__(self, folder: str | Path, *, block_tokens: int = 4096) -> None:
        if block_tokens < 1:
            raise ValueError(f"need block_tokens >= 1, got {block_tokens}")
        self.folder, self.block_tokens = Path(folder), block_tokens
        self.manifest = read_manifest(self.folder)
        """`about`, `hook_names`, `site_dims`, `dtype`, `n_tokens`, and a row for each shard."""
        if not self.manifest["complete"]:
            raise ValueError(
                f"{folder} holds a cache whose writing never ended; write_cache with what it was "
                "begun with goes on"
            )
        sizes = [entry["n_tokens"] for entry in self.manifest["shards"]]
        for i in range(len(sizes)):
            require_whole(self.folder, self.manifest, i)
        self.site_dims = tuple(self.manifest["site_dims"])
        self.hook_names = tuple(self.manifest["hook_names"])
        made_by = f"{self.manifest['fingerprint']} in blocks of {block_tokens}"
        self.fingerprint = hashlib.sha256(made_by.encode()).hexdigest()
        self._starts = torch.tensor([0, *sizes]).cumsum(0)
        self._places = [  # of each block: shard, first token in it, token after the last
            (shard, start, min(start + block_tokens, n))
            for shard, n in enumerate(sizes)
            for start in range(0, n, block_tokens)
        ]
        self.n_blocks = len(self._places)
        self._shards: dict[int, dict[str, Tensor]] = {}

    def __len__(self) -> int:
        """Tokens."""
        return int(self._starts[-1])

    def block(self, i: int) -> Block:
        """Block `i`; `acts` is a view of the file."""
        if not 0 <= i < self.n_blocks:
            raise ValueError(f"need a block in 0 to {self.n_blocks - 1}, got {i}")
        number, start, stop = self._places[i]
        return _block({name: x[start:stop] for name, x in self._shard(number).items()})

    def gather(self, indices: Int[Tensor, " n"]) -> Block:
        """The tokens of these numbers, in the order of `indices`; they may repeat.

        Raises:
            ValueError: a number outside 0 to `len(self) - 1`.
        """
        indices = indices.long().cpu()
        if len(indices) and not (int(indices.min()) >= 0 and int(indices.max()) < len(self)):
            raise ValueError(
                f"need indices in 0 to {len(self) - 1}, got {int(indices.min())} to "
                f"{int(indices.max())}"
            )
        ordered, order = indices.sort()  # each shard is read once, from its front to its end
        bounds = torch.searchsorted(ordered, self._starts).tolist()
        parts = [
            {name: x[ordered[low:high] - start] for name, x in self._shard(shard).items()}
            for shard, (low, high, start) in enumerate(
                zip(bounds, bounds[1:], self._starts.tolist(), strict=False)
            )
            if low < high
        ]
        if not parts:
            return _block({name: x[:0] for name, x in self._shard(0).items()})
        back = order.argsort()
        return _block({name: torch.cat([p[name] for p in parts])[back] for name in parts[0]})

    def verify(self) -> None:
        """Compare every shard with its checksum.

        Raises:
            ValueError: shards that are damaged, all of them named.
        """
        damaged = [
            entry["file"]
            for entry in self.manifest["shards"]
            if sha256(self.folder / entry["file"]) != entry["sha256"]
        ]
        if damaged:
            names = ", ".join(damaged)
            raise ValueError(f"{self.folder}: damaged shards (checksum): {names}{_AGAIN}")

    def _shard(self, i: int) -> dict[str, Tensor]:
        if i not in self._shards:
            entry = self.manifest["shards"][i]
            path = self.folder / entry["file"]
            require_whole(self.folder, self.manifest, i)
            if sha256(path) != entry["sha256"]:
                raise ValueError(f"shard {path} is damaged: its checksum differs{_AGAIN}")
            with safe_open(path, "pt") as file:
                self._shards[i] = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118
        return self._shards[i]


def _block(tensors: dict[str, Tensor]) -> Block:
    rows, positions = tensors["rows"].long(), tensors["positions"].long()
    return Block(tensors["acts"], tensors["ids"], rows, positions)


def read_manifest(folder: Path) -> dict[str, Any]:
    """Raises FileNotFoundError without a manifest, ValueError if it cannot be read."""
    path = folder / MANIFEST
    if not path.is_file():
        raise FileNotFoundError(f"need a cache with {MANIFEST}, got {folder}")
    try:
        manifest = json.loads(path.read_text())
    except ValueError as error:
        raise ValueError(f"{path} is damaged: {error}") from None
    if not isinstance(manifest, dict) or manifest.get("format") != FORMAT:
        raise ValueError(f"{path}: need a manifest of format {FORMAT}")
    return manifest


def require_whole(folder: Path, manifest: dict[str, Any], i: int) -> None:
    """Raise ValueError for what can be told of shard `i` without reading its numbers."""
    entry = manifest["shards"][i]
    path = folder / entry["file"]
    if not path.is_file():
        raise ValueError(f"shard {path} is missing{_AGAIN}")
    size = path.stat().st_size
    if size != entry["bytes"]:
        raise ValueError(f"shard {path} is damaged: {size} bytes, need {entry['bytes']}{_AGAIN}")
    try:
        with safe_open(path, "pt") as file:
            found = (file.metadata() or {}).get("fingerprint", "none")
            n_tokens, _ = file.get_slice("acts").get_shape()
    except SafetensorError as error:
        raise ValueError(f"shard {path} is damaged: {error}{_AGAIN}") from None
    if found != manifest["fingerprint"]:
        raise ValueError(
            f"shard {path} is foreign: it has fingerprint {found[:12]}…, the manifest "
            f"{manifest['fingerprint'][:12]}…{_AGAIN}"
        )
    if n_tokens < 1:
        raise ValueError(f"shard {path} is empty{_AGAIN}")


def sha256(path: Path) -> str:
    """Of the file's bytes."""
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()
