"""Live metrics in tensorboard or wandb, through accelerate's trackers."""

import contextlib
import importlib.util
from collections.abc import Callable, Iterator
from pathlib import Path

from lib.training.distributed import rank

TRACKERS = ("none", "tensorboard", "wandb")

Log = Callable[[dict[str, float], int], None]


def check_tracking(kind: str) -> None:
    """Raise ValueError for an unknown tracker, ImportError for one that is not installed."""
    if kind not in TRACKERS:
        raise ValueError(f"need tracking in {TRACKERS}, got {kind!r}")
    if kind != "none" and importlib.util.find_spec(kind) is None:
        raise ImportError(f"tracking={kind!r} needs it installed: pip install {kind}")


@contextlib.contextmanager
def tracker(kind: str, folder: Path, config: dict) -> Iterator[Log]:
    """Yield what logs `{name: value}` of a step, on the first rank; files go below `folder`.

    wandb obeys its own environment: `WANDB_MODE=offline` sends nothing.
    """
    if kind == "none" or rank() > 0:
        yield lambda values, step: None
        return
    from accelerate.tracking import TensorBoardTracker, WandBTracker

    folder.mkdir(parents=True, exist_ok=True)
    if kind == "tensorboard":
        live = TensorBoardTracker(folder.name, folder.parent)
    else:
        live = WandBTracker("latent-bench", dir=str(folder))
    live.start()
    live.store_init_configuration(dict(_flat(config)))
    try:
        yield lambda values, step: live.log(values, step=step)
    finally:
        live.finish()


def _flat(config: dict, where: str = "") -> Iterator[tuple[str, str | float]]:
    """Numbers as they are, all else as text, under dotted names."""
    for key, value in config.items():
        if isinstance(value, dict):
            yield from _flat(value, f"{where}{key}.")
        else:
            yield f"{where}{key}", value if isinstance(value, int | float) else str(value)
