"""Checkpoints of a fit: one folder a step, complete or absent; the newest is what counts."""

import glob
import itertools
import json
import re
import shutil
from collections.abc import Iterable
from pathlib import Path
from typing import Any, Protocol, runtime_checkable

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import Tensor

from lib.dictionaries import parallel
from lib.dictionaries.trainee import Trainee
from lib.runtime import atomic_file, atomic_folder


@runtime_checkable
class Resumable(Protocol):
    """A stream that can be put back to where it was, such as `lib.activations.buffer.Buffer`."""

    def state_dict(self) -> dict[str, Tensor]: ...

    def load_state_dict(self, state: dict[str, Tensor]) -> None: ...


def save_checkpoint(
    folder: Path,
    step: int,
    trainees: dict[str, Trainee],
    stream: Any,
    config: dict,
    history: dict[str, list[dict]],
) -> None:
    """Write `checkpoint-<step>` and then remove older ones.

    The first rank writes it, with the states of all ranks' streams, which it holds for a moment.
    """
    state = parallel.together(
        lambda: plain(stream.state_dict()) if isinstance(stream, Resumable) else None
    )
    streams = parallel.gather_on_first(state)

    def write() -> None:
        with atomic_folder(folder / f"checkpoint-{step}") as new:
            for i, trainee in enumerate(trainees.values()):
                save_file(plain(trainee.state()), new / f"{i}.safetensors")
            for rank, state in enumerate(streams):
                if state is not None:
                    save_file(state, new / _stream_file(rank))
            state = {"step": step, "config": config, "names": list(trainees), "history": history}
            (new / "state.json").write_text(json.dumps(state))
        for other, path in checkpoints_in(folder):
            if other != step:
                remove(path)

    parallel.first(write)


def load_checkpoint(
    folder: Path, trainees: dict[str, Trainee], stream: Any, config: dict
) -> tuple[int, dict[str, list[dict]]] | None:
    """Put everything back to the newest checkpoint; None if there is none.

    A stream that is not `Resumable` is read and thrown away up to that step.

    Returns:
        The number of steps done, and the history so far.

    Raises:
        ValueError: it is of another config; the message lists what differs.
    """
    found = checkpoints_in(folder)
    if not found:
        return None
    newest = max(found)[1]
    state = json.loads((newest / "state.json").read_text())
    require_same(newest, state["config"], config)
    try:
        for name, trainee in trainees.items():
            i = state["names"].index(name)
            trainee.load_state(load_file(newest / f"{i}.safetensors"))
        position = newest / _stream_file(parallel.rank())
        saved = load_file(position) if position.exists() else None
    except SafetensorError as error:
        raise ValueError(f"checkpoint {newest} is damaged: {error}") from error
    if isinstance(stream, Resumable) and saved is not None:
        stream.load_state_dict(saved)
    elif sum(1 for _ in itertools.islice(stream, state["step"])) < state["step"]:
        raise ValueError(f"the stream ended before step {state['step']}, where {newest} goes on")
    return state["step"], state["history"]


def require_same(newest: Path, then: dict, now: dict) -> None:
    """Raises ValueError, with all that differs, if checkpoint `newest` was made with another config
    than `now`."""
    differing = list(_differences(then, json.loads(json.dumps(now))))
    if differing:
        raise ValueError(
            f"cannot resume {newest}: it was made with another config ({'; '.join(differing)}); "
            "use another folder, or resume=False to start again"
        )


def kept(folder: Path | None, batch: Tensor) -> str:
    """Save a batch that could not be trained on; where, for the error's message."""
    if folder is None:
        return ""

    def write() -> None:
        with atomic_file(folder / "bad_batch.safetensors") as temporary:
            save_file({"batch": batch.cpu().contiguous()}, temporary)

    parallel.first(write)
    return f"; the batch is in {folder / 'bad_batch.safetensors'}"


def clear_checkpoints(folder: Path) -> None:
    for _, path in checkpoints_in(folder):
        remove(path)


def sweep(folder: Path, names: Iterable[str]) -> None:
    """Remove what killed runs left under temporary names."""
    for name in ("checkpoint-", *(f"{name}." for name in names)):
        for path in folder.glob(f".{glob.escape(name)}*"):
            shutil.rmtree(path)


def remove(path: Path) -> None:
    """Absent at once: a kill while its files go leaves only a temporary name."""
    gone = path.with_name(f".{path.name}.gone")
    path.replace(gone)
    shutil.rmtree(gone)


def checkpoints_in(folder: Path) -> list[tuple[int, Path]]:
    if not folder.is_dir():
        return []
    named = ((re.fullmatch(r"checkpoint-(\d+)", path.name), path) for path in folder.iterdir())
    return [(int(match[1]), path) for match, path in named if match]


def _stream_file(rank: int) -> str:
    return f"stream-{rank}.safetensors" if rank else "stream.safetensors"


def plain(tensors: dict[str, Tensor]) -> dict[str, Tensor]:
    return {name: torch.as_tensor(t).detach().cpu().contiguous() for name, t in tensors.items()}


def _differences(then: Any, now: Any, where: str = ""):
    if isinstance(then, dict) and isinstance(now, dict):
        for key in sorted({*then, *now}):
            inner = f"{where}.{key}" if where else key
            yield from _differences(then.get(key), now.get(key), inner)
    elif then != now:
        yield f"{where}: then {then!r}, now {now!r}"
