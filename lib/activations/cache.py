"""Write activations to disk: resumable after a kill at any moment, the same bytes every time.

A folder holds `manifest.json` and `shard-00000.safetensors`, …. Each shard is a run of whole
blocks of the source, under the fingerprint of what made it. The manifest lists a shard only after
it is on disk, so a writer that is killed leaves shards that are whole, or absent, and at most
temporary files, which the next writer removes.
"""

import hashlib
import json
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor
from tqdm.auto import tqdm

from lib.activations.source import Block, Source, finite_block
from lib.runtime import DTYPES, atomic_file, require_at_least, require_writable, sha256

MANIFEST = "manifest.json"
FORMAT = 1
_AGAIN = "; delete the folder and write the cache again"
_NAMES = {dtype: name for name, dtype in DTYPES.items()}


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
        require_at_least(1, block_tokens=block_tokens)
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
        self._places = [  # of each block: shard, first token in it, token after the last
            (shard, start, min(start + block_tokens, n))
            for shard, n in enumerate(sizes)
            for start in range(0, n, block_tokens)
        ]
        self.n_blocks = len(self._places)
        self._shards: dict[int, dict[str, Tensor]] = {}

    def __len__(self) -> int:
        """Tokens."""
        return self.manifest["n_tokens"]

    def block(self, i: int) -> Block:
        """Block `i`; `acts` is a view of the file."""
        if not 0 <= i < self.n_blocks:
            raise ValueError(f"need a block in 0 to {self.n_blocks - 1}, got {i}")
        number, start, stop = self._places[i]
        tensors = {name: x[start:stop] for name, x in self._shard(number).items()}
        rows, positions = tensors["rows"].long(), tensors["positions"].long()
        return Block(tensors["acts"], tensors["ids"], rows, positions)

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


def write_cache(
    source: Source, folder: str | Path, *, about: dict[str, Any], shard_tokens: int = 2**17
) -> ActivationCache:
    """Write every block of `source` below `folder`; go on where a killed writer stopped.

    The bytes written do not depend on where, or whether, the writing was interrupted. One writer
    at a time.

    Args:
        about: models, data, …: what a reader of the manifest should know, as JSON. It counts as
            part of what made the cache, so keep dates and paths out.
        shard_tokens: a shard ends with the block that brings it to so many tokens.

    Raises:
        ValueError: the folder holds a cache of something else, one that is damaged, or files that
            are no cache; a source without tokens; NaN or infinite activations.
        OSError: the folder cannot be written.
    """
    require_at_least(1, shard_tokens=shard_tokens)
    folder = require_writable(Path(folder))
    manifest = _begin(source, folder, about, shard_tokens)
    _remove_leftovers(folder)
    end = manifest["shards"][-1]["end_block"] if manifest["shards"] else 0
    with tqdm(total=source.n_blocks, initial=end, desc="cache", unit="block") as progress:
        while not manifest["complete"]:
            blocks, end = _collect(source, end, shard_tokens)
            if blocks:
                _write_shard(folder, manifest, blocks, end)
            elif not manifest["shards"]:
                (folder / MANIFEST).unlink()
                raise ValueError("need a source with tokens, got blocks that are all empty")
            manifest["complete"] = end == source.n_blocks
            _write_manifest(folder, manifest)
            progress.update(end - progress.n)
    return ActivationCache(folder)


def _begin(
    source: Source, folder: Path, about: dict[str, Any], shard_tokens: int
) -> dict[str, Any]:
    """The manifest to go on from, checked; or a new one, written so that the folder is taken."""
    made_by = {
        "source": source.fingerprint,
        "hook_names": list(source.hook_names),
        "site_dims": list(source.site_dims),
        "shard_tokens": shard_tokens,
        "about": about,
    }
    text = json.dumps(made_by, sort_keys=True)
    fingerprint = hashlib.sha256(text.encode()).hexdigest()
    if not (folder / MANIFEST).exists():
        others = sorted(f.name for f in folder.iterdir() if not f.name.startswith(f".{MANIFEST}."))
        if others:
            raise ValueError(f"need an empty folder or a cache, got {folder} with {others[:5]}")
        manifest = {"format": FORMAT, "fingerprint": fingerprint, **json.loads(text)}
        manifest |= {"dtype": None, "n_tokens": 0, "complete": False, "shards": []}
        _write_manifest(folder, manifest)
        return manifest
    manifest = read_manifest(folder)
    if manifest["fingerprint"] != fingerprint:
        differing = sorted(key for key in made_by if manifest[key] != json.loads(text)[key])
        raise ValueError(
            f"{folder} holds a cache that something else made (fingerprint "
            f"{manifest['fingerprint'][:12]}…, not {fingerprint[:12]}…; differing: "
            f"{', '.join(differing)}); need another folder"
        )
    for i in range(len(manifest["shards"])):
        require_whole(folder, manifest, i)
    return manifest


def _remove_leftovers(folder: Path) -> None:
    """Remove what killed writers left under temporary names."""
    for prefix in (".shard-", f".{MANIFEST}.", ".tmp"):  # the last is safetensors' own
        for file in folder.glob(f"{prefix}*"):
            file.unlink()


def _collect(source: Source, first: int, shard_tokens: int) -> tuple[list[Block], int]:
    """The blocks with tokens of one shard, and the block that comes after it."""
    blocks, n, i = [], 0, first
    while i < source.n_blocks and n < shard_tokens:
        block = finite_block(source, i)
        i += 1
        if len(block.ids):
            blocks.append(block)
            n += len(block.ids)
    return blocks, i


def _write_shard(folder: Path, manifest: dict[str, Any], blocks: list[Block], end: int) -> None:
    acts = torch.cat([block.acts.cpu() for block in blocks])
    dtype = manifest["dtype"] or _NAMES[acts.dtype]
    if _NAMES[acts.dtype] != dtype:
        raise ValueError(f"need activations in {dtype}, got {_NAMES[acts.dtype]}")
    names = ("ids", "rows", "positions")
    tensors = {name: torch.cat([getattr(b, name) for b in blocks]).int() for name in names}
    path = folder / f"shard-{len(manifest['shards']):05d}.safetensors"
    with atomic_file(path) as temporary:
        # one entry: safetensors writes several in no fixed order
        save_file({"acts": acts, **tensors}, temporary, {"fingerprint": manifest["fingerprint"]})
        entry = {
            "file": path.name,
            "n_tokens": len(acts),
            "end_block": end,
            "bytes": temporary.stat().st_size,
            "sha256": sha256(temporary),
        }
    manifest["shards"].append(entry)
    manifest["dtype"] = dtype
    manifest["n_tokens"] += len(acts)


def _write_manifest(folder: Path, manifest: dict[str, Any]) -> None:
    with atomic_file(folder / MANIFEST) as temporary:
        temporary.write_text(json.dumps(manifest, indent=1) + "\n")


def cached(source: Source, folder: str | Path, *, about: dict[str, Any]) -> ActivationCache:
    """The finished cache in `folder`, if it holds the same sites; else `source`, written there.

    A finished cache is taken as it is, whatever model and data made it: it stands in for them.

    Raises:
        ValueError: it holds other sites; and as `write_cache`.
    """
    folder = Path(folder)
    if not (folder / MANIFEST).exists() or not read_manifest(folder)["complete"]:
        return write_cache(source, folder, about=about)
    cache = ActivationCache(folder)
    if (cache.hook_names, cache.site_dims) != (source.hook_names, source.site_dims):
        here, there = (dict(zip(s.hook_names, s.site_dims, strict=True)) for s in (source, cache))
        raise ValueError(f"need a cache of sites {here}, got {folder} with {there}")
    return cache


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
