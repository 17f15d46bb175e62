"""A shuffle buffer: activations of many texts mixed into batches, in seeded order, resumable."""

from collections.abc import Iterator

import torch
from jaxtyping import Float
from torch import Tensor

from lib.activations.source import Source, finite_block
from lib.runtime import require_at_least


class Buffer(Iterator[Tensor]):
    """Endless batches of exactly `batch_size` tokens, drawn from a pool of `n_tokens`.

    Blocks enter the pool in an order drawn anew each epoch; whenever the pool is half empty it is
    filled up and shuffled. Every token of the source is served once an epoch, the last of an epoch
    before the first of the next, so the batch between two epochs holds tokens of both.

    Raises:
        ValueError: `batch_size` below 1 or above `n_tokens`, a source without blocks; later, at
            the batch that meets it, a source without tokens, NaN or infinite activations.
    """

    def __init__(
        self, source: Source, *, batch_size: int, n_tokens: int = 65536, seed: int = 0
    ) -> None:
        require_at_least(1, batch_size=batch_size)
        if n_tokens < batch_size:
            raise ValueError(f"need n_tokens >= batch_size {batch_size}, got {n_tokens}")
        if source.n_blocks < 1:
            raise ValueError("need a source with at least one block, got an empty one")
        self.source, self.batch_size, self.n_tokens = source, batch_size, n_tokens
        self.epoch = 0
        """Of the next token to be drawn from the pool."""
        self.n_served = 0
        """Tokens served since the beginning, over all epochs."""
        self._random = torch.Generator().manual_seed(seed)
        self._blocks = torch.randperm(source.n_blocks, generator=self._random)
        self._next_block = 0
        self._pool: Tensor | None = None  # [n_tokens d_in]; made when the first block is seen
        self._order = torch.empty(0, dtype=torch.long)  # slots of the pool still to be served
        self._rest: Tensor | None = None  # fetched, but not in the pool: it did not fit
        self._again: list[Tensor] = []  # put back: to be served before the pool

    def __next__(self) -> Float[Tensor, "batch d_in"]:
        parts, missing = [], self.batch_size
        try:
            while missing:
                parts.append(self._draw(missing))
                missing -= len(parts[-1])
        except BaseException:  # such as a full disk, or Ctrl-C: no token is lost
            self.put_back(parts)
            raise
        if not len(self._order) and self._exhausted:
            self._start_epoch()
        return _joined(parts)

    def put_back(self, batches: list[Float[Tensor, "_ d_in"]]) -> None:
        """Serve the last batches that were served again, in this order, before all others."""
        self.n_served -= sum(map(len, batches))
        self._again[:0] = batches

    def _draw(self, n: int) -> Float[Tensor, "_ d_in"]:
        """The next tokens, 1 to `n` of them."""
        if self._again:
            drawn, left = self._again[0][:n], self._again[0][n:]
            self._again[:1] = [left] if len(left) else []
        else:
            if len(self._order) <= self.n_tokens // 2:
                self._refill()
            while not len(self._order):
                self._start_epoch()
                self._refill()
            slots, self._order = self._order[:n], self._order[n:]
            drawn = self._pool.index_select(0, slots.to(self._pool.device))
        self.n_served += len(drawn)
        return drawn

    @property
    def _exhausted(self) -> bool:
        waiting = self._rest is not None and len(self._rest) > 0
        return self._next_block == len(self._blocks) and not waiting

    def _start_epoch(self) -> None:
        if not self.n_served:
            raise ValueError("need a source with tokens, got blocks that are all empty")
        self.epoch += 1
        self._next_block = 0
        self._blocks = torch.randperm(len(self._blocks), generator=self._random)

    def _refill(self) -> None:
        """Fill the free slots from the blocks that are left of the epoch, and shuffle."""
        if self._exhausted:
            return
        taken = torch.zeros(self.n_tokens, dtype=torch.bool)
        taken[self._order] = True
        free = (~taken).nonzero()[:, 0]
        n_filled = 0
        while n_filled < len(free) and not self._exhausted:
            if self._rest is None or not len(self._rest):
                try:
                    self._rest = self._fetch()
                except BaseException:
                    if n_filled:  # these are in the pool, but not in the order yet
                        self._rest = self._pool[free[:n_filled].to(self._pool.device)]
                    raise
            slots = free[n_filled : n_filled + len(self._rest)]
            self._pool[slots.to(self._pool.device)] = self._rest[: len(slots)]
            self._rest = self._rest[len(slots) :].clone()  # a view would hold the whole block
            n_filled += len(slots)
        live = torch.cat([self._order, free[:n_filled]])
        self._order = live[torch.randperm(len(live), generator=self._random)]

    def _fetch(self) -> Tensor:
        acts = finite_block(self.source, int(self._blocks[self._next_block])).acts
        if self._pool is None:
            self._pool = acts.new_empty(self.n_tokens, acts.shape[1])
        self._pool = self._pool.to(acts.device)  # after load_state_dict it may be on the CPU
        self._next_block += 1
        return acts

    def state_dict(self) -> dict[str, Tensor]:
        """All that the coming batches depend on besides the source: tensors, for safetensors."""
        pool = torch.empty(0) if self._pool is None else self._pool[:0].clone()
        rest = pool.clone() if self._rest is None else self._rest.clone()
        again = _joined(self._again).clone() if self._again else pool.clone()
        if len(self._order):
            pool = self._pool[self._order.to(self._pool.device)]  # in serving order
        numbers = [self.batch_size, self.n_tokens, self.epoch, self.n_served, self._next_block]
        return {
            "pool": pool,
            "rest": rest,
            "again": again,
            "blocks": self._blocks.clone(),
            "random": self._random.get_state(),
            "numbers": torch.tensor(numbers),
            "source": _bytes(self.source.fingerprint),
        }

    def load_state_dict(self, state: dict[str, Tensor]) -> None:
        """Continue where `state_dict` was taken: the same batches, bit for bit.

        Raises:
            ValueError: the state is of another source, `batch_size` or `n_tokens`.
        """
        batch_size, n_tokens, epoch, n_served, next_block = state["numbers"].tolist()
        for name, got in (("batch_size", batch_size), ("n_tokens", n_tokens)):
            if got != getattr(self, name):
                raise ValueError(
                    f"need a state with {name} {getattr(self, name)}, got one with {got}"
                )
        if not torch.equal(state["source"].cpu(), _bytes(self.source.fingerprint)):
            raise ValueError(
                f"need a state of source {self.source.fingerprint[:12]}…, got one of "
                f"{bytes(state['source'].tolist()).decode()[:12]}…"
            )
        self.epoch, self.n_served, self._next_block = epoch, n_served, next_block
        self._blocks = state["blocks"].cpu().clone()
        self._random.set_state(state["random"].cpu())
        pool, self._rest = state["pool"], state["rest"].clone()
        again = state.get("again", state["rest"][:0])  # as older states have none
        self._again = [again.clone()] if len(again) else []
        self._order = torch.arange(len(pool))
        self._pool = None
        if len(pool) or len(self._rest):
            self._pool = pool.new_empty(n_tokens, *pool.shape[1:])
            self._pool[: len(pool)] = pool


def _joined(parts: list[Tensor]) -> Tensor:
    """End to end; after `load_state_dict` the first parts may lie on the CPU, later ones not."""
    if len(parts) == 1:
        return parts[0]  # cat would copy it
    return torch.cat([part.to(parts[-1].device) for part in parts])


def _bytes(text: str) -> Tensor:
    return torch.tensor(list(text.encode()), dtype=torch.uint8)
