"""Training: one loop, one checkpoint, for anything that is a `Trainable`."""

from lib.training.feed import Feed, Resumable
from lib.training.loop import History, Trainable, fit

__all__ = ["Feed", "History", "Resumable", "Trainable", "fit"]
