"""The one training loop: several trainers, one stream, checkpoints, tracking.

Whatever has the methods of `Trainable` is trained here: a dictionary of any recipe, SPALF, a
sparse adapter. Trainers of one kind of batch may share a stream.
"""

import time
from collections.abc import Callable, Iterable, Iterator, Mapping
from functools import partial
from pathlib import Path
from typing import Any, Protocol, runtime_checkable

import torch
from tqdm.auto import tqdm

from lib.runtime import require_writable
from lib.sparse import reused_buffers
from lib.training import checkpoint, distributed
from lib.training.feed import Feed, Resumable
from lib.training.tracking import check_tracking, tracker

History = dict[str, list[dict]]
"""By trainer, what it reported: `step` and numbers."""


@runtime_checkable
class Trainable(Protocol):
    """Weights, optimiser and whatever else the next step depends on."""

    n_steps: int
    stopped: bool
    """Whether it needs no further step."""

    def start(self, feed: Feed) -> None:
        """Calibrate on batches that are peeked at or taken; not called on resume."""

    def step(self, step: int, batch: Any) -> None:
        """One optimiser step; `step` counts from 0.

        Raises:
            FloatingPointError: the loss or its gradient is not finite; nothing has changed.
        """

    def report(self, n_done: int) -> dict | None:
        """Entry of the history after so many steps, where one is due."""

    def summary(self, entry: dict) -> str:
        """An entry in a few words, for the progress bar."""

    def state(self) -> checkpoint.Parts:
        """Everything that the next step depends on, by file."""

    def load_state(self, parts: checkpoint.Parts) -> None: ...

    def identity(self) -> dict:
        """All that the weights depend on besides the stream, as JSON."""

    def facts(self) -> dict:
        """What a reader of the checkpoint may want to know, as JSON."""


def fit(
    trainers: Mapping[str, Trainable],
    stream: Iterable,
    *,
    folder: str | Path | None = None,
    resume: bool = False,
    checkpoint_every: int = 0,
    tracking: str = "none",
    device: str | torch.device = "cpu",
    progress: bool = True,
    on_log: Callable[[History], None] | None = None,
) -> tuple[History, dict[str, float]]:
    """Train every trainer on the same batches; the stream is paid for once.

    Args:
        stream: a batch for each step, after those that trainers take to calibrate.
        folder: for checkpoints: every `checkpoint_every` steps, and when done. Every file is
            complete or absent.
        resume: go on from the newest checkpoint in `folder`, bit for bit on a CPU, if there is
            one; otherwise checkpoints there are removed.
        tracking: `none`, `tensorboard` or `wandb`.
        on_log: gets the history whenever it has grown.

    Returns:
        What each trainer reported, and the seconds spent on each alone, without the stream.

    Raises:
        ValueError: no trainer, a bad name, trainers of different lengths, a stream that ends
            early, a resume with another config, a damaged checkpoint.
        FloatingPointError: activations, a loss or a gradient that are not finite: the step, and
            (given a folder) where the batch was saved. The last checkpoint stays.
        OSError: the folder cannot be written.
        Under `torchrun` an error of one rank is raised on all of them.
    """
    n_steps, target = _check(trainers, folder, resume, checkpoint_every, tracking)
    device = distributed.join(torch.device(device))
    feed = Feed(stream, device, target)
    identity = _identity(trainers) if target else {}
    with tracker(tracking, (target or Path()) / "tracking", identity) as log, reused_buffers():
        start, history, seconds = _begin(target, trainers, feed, identity, resume)
        quiet = not progress or distributed.rank() > 0
        n_steps = start if _all_stopped(trainers) else n_steps
        steps = tqdm(range(start, n_steps), desc="fit", disable=quiet, mininterval=1)
        for step in steps:
            feed.at = f"step {step}"
            batch = next(feed, None)
            if batch is None:
                raise ValueError(f"the stream ended at step {step}; need a batch for every step")
            grown = {}
            for name, trainer in trainers.items():
                began = _now(device)
                try:
                    trainer.step(step, batch)
                except FloatingPointError as error:
                    raise FloatingPointError(f"{name}: {error}{feed.kept(batch)}") from None
                seconds[name] += _now(device) - began
                if entry := trainer.report(step + 1):
                    grown[name] = {"step": step + 1} | entry
                    history[name].append(grown[name])
            if grown:
                shown = [f"{name} {trainers[name].summary(e)}" for name, e in grown.items()]
                more = f", and {len(shown) - 3} more" if len(shown) > 3 else ""
                steps.set_postfix_str(", ".join(shown[:3]) + more, refresh=False)
                log({f"{n}/{k}": v for n, e in grown.items() for k, v in _numbers(e)}, step + 1)
                if on_log:
                    on_log(history)
            stopped = _all_stopped(trainers)
            due = checkpoint_every and (step + 1) % checkpoint_every == 0
            if target and (due or stopped or step + 1 == n_steps):
                about = {"identity": identity, "history": history, "seconds": seconds}
                _save(target, step + 1, trainers, feed, about)
            if stopped:
                break
    return history, seconds


def _all_stopped(trainers: Mapping[str, Trainable]) -> bool:
    return all(trainer.stopped for trainer in trainers.values())


def _check(
    trainers: Mapping[str, Trainable],
    folder: str | Path | None,
    resume: bool,
    checkpoint_every: int,
    tracking: str,
) -> tuple[int, Path | None]:
    if not trainers:
        raise ValueError("need at least one trainer, got none")
    lengths = {name: trainer.n_steps for name, trainer in trainers.items()}
    if len(set(lengths.values())) > 1:
        raise ValueError(f"need trainers of the same number of steps, got {lengths}")
    require_names(trainers)
    check_tracking(tracking)
    if folder is None:
        if resume or checkpoint_every or tracking != "none":
            raise ValueError("resume, checkpoint_every and tracking need a folder, got none")
        return max(lengths.values()), None
    return max(lengths.values()), Path(folder)


def require_names(names: Iterable[str]) -> None:
    """Raises ValueError for names that cannot be folders of their own."""
    for name in names:
        if not name or Path(name).name != name or name.startswith((".", "checkpoint-")):
            raise ValueError(f"need names that are plain folder names, got {name!r}")


def _begin(
    folder: Path | None,
    trainers: Mapping[str, Trainable],
    feed: Feed,
    identity: dict,
    resume: bool,
) -> tuple[int, History, dict[str, float]]:
    """Steps done, history and seconds so far; the folder is ready for more."""
    if folder:
        distributed.first(lambda: require_writable(folder))
        found = distributed.together(lambda: checkpoint.read(folder)) if resume else None
        if found is not None:
            distributed.together(partial(_restore, folder, *found, trainers, feed, identity))
            distributed.first(lambda: checkpoint.remove_leftovers(folder, trainers))
            about = found[0]
            return about["step"], about["history"], about["seconds"]
        distributed.first(lambda: checkpoint.clear(folder))
        distributed.first(lambda: checkpoint.remove_leftovers(folder, trainers))
    for trainer in trainers.values():
        trainer.start(feed)
    return 0, {name: [] for name in trainers}, dict.fromkeys(trainers, 0.0)


def _restore(
    folder: Path,
    about: dict,
    parts: checkpoint.Parts,
    trainers: Mapping[str, Trainable],
    feed: Feed,
    identity: dict,
) -> None:
    newest = checkpoint.newest_in(folder)
    checkpoint.require_same(newest, about["identity"], identity)
    for name, trainer in trainers.items():
        own = {k.partition("/")[2]: v for k, v in parts.items() if k.startswith(f"{name}/")}
        trainer.load_state(own)
    feed.skip_to(about["drawn"], parts.get(_stream_file(distributed.rank())))


def _save(
    folder: Path, step: int, trainers: Mapping[str, Trainable], feed: Feed, about: dict
) -> None:
    """The first rank writes, with the states of all ranks' streams, which it holds for a moment."""
    stream = feed.stream
    state = distributed.together(
        lambda: stream.state_dict() if isinstance(stream, Resumable) else None
    )
    streams = distributed.gather_on_first(state)

    def write() -> None:
        parts = {
            f"{name}/{part}": tensors
            for name, trainer in trainers.items()
            for part, tensors in trainer.state().items()
        }
        parts |= {_stream_file(i): state for i, state in enumerate(streams) if state is not None}
        facts = {name: trainer.facts() for name, trainer in trainers.items()}
        checkpoint.write(folder, step, parts, about | {"drawn": feed.drawn, "facts": facts})

    distributed.first(write)


def _identity(trainers: Mapping[str, Trainable]) -> dict:
    together = {"ranks": distributed.world_size()} if distributed.world_size() > 1 else {}
    return {name: trainer.identity() for name, trainer in trainers.items()} | together


def _stream_file(rank: int) -> str:
    return f"stream-{rank}" if rank else "stream"


def _now(device: torch.device) -> float:
    """Seconds, once the device has done what it was given."""
    if device.type == "cuda":  # not the streams on which batches are made ahead
        torch.cuda.current_stream(device).synchronize()
    return time.perf_counter()


def _numbers(entry: dict) -> Iterator[tuple[str, float]]:
    for key, value in entry.items():
        if isinstance(value, dict):
            yield from ((f"{key}/{inner}", number) for inner, number in value.items())
        elif isinstance(value, int | float):
            yield key, value
