"""A stream's batches on their way to the trainers: on their device, checked, counted."""

import itertools
from collections.abc import Iterable, Iterator, Mapping
from pathlib import Path
from typing import Any, Protocol, runtime_checkable

import torch
from safetensors.torch import save_file
from torch import Tensor

from lib.runtime import atomic_file
from lib.training import distributed


@runtime_checkable
class Resumable(Protocol):
    """A stream that can be put back to where it was, such as `lib.activations.buffer.Buffer`."""

    def state_dict(self) -> dict[str, Tensor]: ...

    def load_state_dict(self, state: dict[str, Tensor]) -> None: ...


class Feed:
    """Batches of a stream, on their device, checked to be finite, counted."""

    def __init__(self, stream: Iterable, device: torch.device, folder: Path | None = None) -> None:
        self.stream, self.device, self.folder = iter(stream), device, folder
        self.drawn, self.at = 0, "calibration"
        self._ahead: list = []

    def __iter__(self) -> Iterator:
        return self

    def __next__(self) -> Any:
        if self._ahead:
            return self._ahead.pop()
        batch = self._on_device(distributed.together(lambda: next(self.stream)))
        self.drawn += 1
        sizes = distributed.gather_rows(torch.tensor([_rows(batch)], device=self.device))
        if len(set(sizes.tolist())) > 1:
            raise ValueError(f"need batches of the same size on every rank, got {sizes.tolist()}")
        bad, ranks = sum(_n_bad(x) for x in _tensors(batch).values()), distributed.world_size()
        bad = round(ranks * distributed.mean_count(bad, self.device))
        if bad:
            raise FloatingPointError(
                f"{bad} of {ranks * _rows(batch)} activations at {self.at} are NaN or infinite"
                f"{self.kept(batch)}"
            )
        return batch

    def peek(self) -> Any:
        """The next batch, which stays the next.

        Raises:
            ValueError: the stream has none.
        """
        at, self.at = self.at, "step 0"
        batch = next(self, None)
        if batch is None:
            raise ValueError("the stream ended at step 0; need a batch for every step")
        self.at = at
        self._ahead.append(batch)
        return batch

    def kept(self, batch: Any) -> str:
        """Save a batch that could not be trained on; where, for the error's message."""
        tensors = {n: distributed.gather_rows(x) for n, x in _tensors(batch).items()}
        if self.folder is None:
            return ""
        file = self.folder / "bad_batch.safetensors"

        def write() -> None:
            with atomic_file(file) as temporary:
                save_file({n: x.cpu().contiguous() for n, x in tensors.items()}, temporary)

        distributed.first(write)
        return f"; the batch is in {file}"

    def skip_to(self, n: int, state: dict[str, Tensor] | None) -> None:
        """Go on after `n` batches: put the stream back to its state, or read on.

        Raises:
            ValueError: the stream ends before.
        """
        self.drawn = n
        if isinstance(self.stream, Resumable) and state is not None:
            self.stream.load_state_dict(state)
        elif sum(1 for _ in itertools.islice(self.stream, n)) < n:
            raise ValueError(f"the stream ended before batch {n}, where the checkpoint goes on")

    def _on_device(self, batch: Any) -> Any:
        if isinstance(batch, Tensor):
            return batch.to(self.device, torch.float32)
        return batch


def _tensors(batch: Any) -> dict[str, Tensor]:
    """The tensors of a batch: one, those of a dict, or of a list of dicts."""
    if isinstance(batch, Tensor):
        return {"batch": batch}
    if isinstance(batch, Mapping):
        return dict(batch)
    return {f"{i}.{name}": x for i, part in enumerate(batch) for name, x in part.items()}


def _rows(batch: Any) -> int:
    return len(next(iter(_tensors(batch).values())))


def _n_bad(x: Tensor) -> int:
    finite = x.isfinite()
    return 0 if finite.all() else int((~finite).reshape(len(x), -1).any(1).sum())
