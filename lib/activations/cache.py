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
from safetensors.torch import save_file
from tqdm.auto import tqdm

from lib.activations.shards import (
    FORMAT,
    MANIFEST,
    ActivationCache,
    read_manifest,
    require_whole,
    sha256,
)
from lib.activations.source import Block, Source, finite_block
from lib.runtime import DTYPES, atomic_file, require_writable

__all__ = ["ActivationCache", "write_cache"]

_NAMES = {dtype: name for name, dtype in DTYPES.items()}


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
    if shard_tokens < 1:
        raise ValueError(f"need shard_tokens >= 1, got {shard_tokens}")
    folder = require_writable(Path(folder))
    manifest = _begin(source, folder, about, shard_tokens)
    _sweep(folder)
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


def _sweep(folder: Path) -> None:
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
