"""Checkpoints: one folder a step, complete or absent; the newest is what counts.

`checkpoint-<step>/` holds safetensors of plain tensors and `metadata.json`, with the checksum of
each file.
"""

import glob
import json
import re
import shutil
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load, save_file
from torch import Tensor

from lib.runtime import atomic_folder, sha256

METADATA = "metadata.json"
Parts = dict[str, dict[str, Tensor]]
"""Tensors by file (`model`, `topk/model`) and name."""


def write(folder: Path, step: int, parts: Mapping[str, Mapping[str, Tensor]], about: dict) -> None:
    """Write `checkpoint-<step>` and then remove older ones; `about` is anything of JSON."""
    with atomic_folder(folder / f"checkpoint-{step}") as new:
        sums = {}
        for name, tensors in parts.items():
            file = new / f"{name}.safetensors"
            file.parent.mkdir(exist_ok=True)
            plain = {key: torch.as_tensor(t).detach().cpu() for key, t in tensors.items()}
            save_file({key: t.contiguous() for key, t in plain.items()}, file)
            sums[name] = sha256(file)
        about = {**about, "step": step, "sha256": sums}
        (new / METADATA).write_text(json.dumps(about))
    for other, path in found_in(folder):
        if other != step:
            remove(path)


def read(folder: Path) -> tuple[dict, Parts] | None:
    """Metadata and tensors of the newest checkpoint; None if there is none.

    Raises:
        ValueError: a file is missing or damaged.
    """
    about = metadata(folder)
    if about is None:
        return None
    parts, newest = {}, newest_in(folder)
    for name, expected in about["sha256"].items():
        file = newest / f"{name}.safetensors"
        if not file.is_file() or sha256(file) != expected:
            raise ValueError(f"checkpoint {newest} is damaged: {file.name} is not what was written")
        parts[name] = load(file.read_bytes())
    return about, parts


def metadata(folder: Path) -> dict | None:
    """`metadata.json` of the newest checkpoint; None if there is none.

    Raises:
        ValueError: it is damaged.
    """
    newest = newest_in(folder)
    if newest is None:
        return None
    try:
        about = dict(json.loads((newest / METADATA).read_text()))
        return about | {"sha256": dict(about["sha256"]), "identity": dict(about["identity"])}
    except (OSError, TypeError, ValueError, KeyError) as error:
        raise ValueError(f"checkpoint {newest} is damaged: {METADATA}: {error!r}") from error


def require_same(newest: Path, then: dict, now: dict) -> None:
    """Raises ValueError, with all that differs, if checkpoint `newest` was made with another config
    than `now`."""
    differing = list(_differences(then, json.loads(json.dumps(now))))
    if differing:
        raise ValueError(
            f"cannot resume {newest}: it was made with another config ({'; '.join(differing)}); "
            "use another folder, or resume=False to start again"
        )


def clear(folder: Path) -> None:
    for _, path in found_in(folder):
        remove(path)


def remove_leftovers(folder: Path, names: Iterable[str]) -> None:
    """Remove what killed runs left under temporary names, of checkpoints and of `names`."""
    for name in ("checkpoint-", *(f"{name}." for name in names)):
        for path in folder.glob(f".{glob.escape(name)}*"):
            shutil.rmtree(path)


def remove(path: Path) -> None:
    """Absent at once: a kill while its files go leaves only a temporary name."""
    gone = path.with_name(f".{path.name}.gone")
    path.replace(gone)
    shutil.rmtree(gone)


def newest_in(folder: Path) -> Path | None:
    return max(found_in(folder), default=(0, None))[1]


def found_in(folder: Path) -> list[tuple[int, Path]]:
    """Step and folder of each checkpoint."""
    if not folder.is_dir():
        return []
    named = ((re.fullmatch(r"checkpoint-(\d+)", path.name), path) for path in folder.iterdir())
    return [(int(match[1]), path) for match, path in named if match]


def _differences(then: Any, now: Any, where: str = ""):
    if isinstance(then, dict) and isinstance(now, dict):
        for key in sorted({*then, *now}):
            inner = f"{where}.{key}" if where else key
            yield from _differences(then.get(key), now.get(key), inner)
    elif then != now:
        yield f"{where}: then {then!r}, now {now!r}"
