"""Batches made while the trainer works on earlier ones: in a thread, on its own CUDA stream."""

import queue
import threading
import weakref
from collections.abc import Iterator

import torch
from jaxtyping import Float
from torch import Tensor

from lib.activations.buffer import Buffer

Made = tuple[Tensor, torch.cuda.Event | None] | BaseException
"""A batch, and on CUDA the event after which it may be read; or the error that came instead."""


class Prefetch(Iterator[Tensor]):
    """The batches of `buffer`, bit for bit, with up to `depth` of them ready on `device`.

    On a GPU the model's and the trainer's kernels share the device, and what comes from disk
    crosses in pinned memory. On a CPU both want the same cores: it gives little. A checkpoint is
    that of the bare buffer at the same step, so each can resume the other.

    While batches are made ahead, nobody else may run or change the source's models (a hook acts on
    whoever comes by) or use `buffer`. `close`, or the end of a `with` block, ends the thread. Then
    the buffer goes on after the last batch handed out; so does this, with a new thread.

    Args:
        device: Where the trainer wants the batches.
        depth: By default what a buffer serves between two refills, each of which is half its pool:
            with fewer the trainer waits for the rest of a refill. They take half a pool's memory.

    Raises:
        ValueError: `depth` below 1. Later, at the batch concerned, what the buffer raises.
    """

    def __init__(
        self, buffer: Buffer, *, device: str | torch.device, depth: int | None = None
    ) -> None:
        self.buffer, self.device = buffer, torch.device(device)
        self.depth = max(buffer.n_tokens // 2 // buffer.batch_size, 1) if depth is None else depth
        if self.depth < 1:
            raise ValueError(f"need depth >= 1, got {depth}")
        self._stream = torch.cuda.Stream(self.device) if self.device.type == "cuda" else None
        self._worker: _Worker | None = None

    def __next__(self) -> Float[Tensor, "batch d_in"]:
        if self._worker is None:
            self._worker = _Worker(self.buffer, self.device, self._stream, self.depth)
            # the thread has no reference to this object: once nobody has, this ends the thread
            self._finalizer = weakref.finalize(self, self._worker.stop)
        made = self._worker.take()
        if isinstance(made, BaseException):
            self.close()
            try:
                raise made
            finally:
                del made  # its traceback holds this frame: a cycle that would keep the pool
        batch, ready = made
        if ready is not None:
            stream = torch.cuda.current_stream(self.device)
            stream.wait_event(ready)
            batch.record_stream(stream)  # or its memory goes to a later batch while still read
        return batch

    def close(self) -> None:
        """End the thread after the batch it is at, and give back what it made to the buffer."""
        if self._worker is not None:
            self._finalizer.detach()
            self.buffer.put_back(self._worker.stop())
            self._worker = None

    def __enter__(self) -> "Prefetch":
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def state_dict(self) -> dict[str, Tensor]:
        """`Buffer.state_dict` as of the last batch handed out; waits for the one being made."""
        self.close()
        return self.buffer.state_dict()

    def load_state_dict(self, state: dict[str, Tensor]) -> None:
        """`Buffer.load_state_dict`."""
        self.close()
        self.buffer.load_state_dict(state)


class _Worker:
    """A thread that makes batches until `depth` wait, an error or `stop`."""

    def __init__(
        self, buffer: Buffer, device: torch.device, stream: torch.cuda.Stream | None, depth: int
    ) -> None:
        self.buffer, self.device, self.stream = buffer, device, stream
        self.made: queue.SimpleQueue[Made] = queue.SimpleQueue()
        self.room, self.stopped = threading.Semaphore(depth), False
        if stream is not None:  # weights and pool may be on their way on the trainer's stream
            stream.wait_stream(torch.cuda.current_stream(device))
        # a daemon: Python waits for other threads before, not after, it calls finalizers
        self.thread = threading.Thread(target=self._run, name="prefetch", daemon=True)
        self.thread.start()

    def take(self) -> Made:
        made = self.made.get()
        self.room.release()
        return made

    def stop(self) -> list[Tensor]:
        """End the thread; the batches that nobody took, in order."""
        self.stopped = True
        self.room.release()
        if self.thread is not threading.current_thread():  # garbage is collected in any thread
            self.thread.join()
        if self.stream is not None:
            self.stream.synchronize()
        left = [self.made.get() for _ in range(self.made.qsize())]
        return [made[0] for made in left if not isinstance(made, BaseException)]

    def _run(self) -> None:
        with torch.cuda.stream(self.stream):
            while self.room.acquire() and not self.stopped:
                try:
                    self.made.put(self._batch())
                except BaseException as error:
                    self.made.put(error)
                    return

    def _batch(self) -> Made:
        batch = next(self.buffer)
        if self.stream is None:
            return batch.to(self.device), None
        batch = batch.pin_memory() if batch.device.type == "cpu" else batch
        return batch.to(self.device, non_blocking=True), self.stream.record_event()
