"""Where activations come from: blocks of tokens, by number, from a model or from disk."""

from dataclasses import dataclass
from typing import Protocol, runtime_checkable

import torch
from jaxtyping import Float, Int
from torch import Tensor


@dataclass(eq=False)
class Block:
    """Activations of some tokens, and which tokens these are.

    `acts` may be on an accelerator; `ids`, `rows` and `positions` are on the CPU.
    """

    acts: Float[Tensor, "n d_in"]
    """All sites side by side: the first model's sites in order, then the second model's, …"""
    ids: Int[Tensor, " n"]
    """Token ids."""
    rows: Int[Tensor, " n"]
    """The row of the corpus that each token stands in."""
    positions: Int[Tensor, " n"]
    """The token's place in its row."""


@runtime_checkable
class Source(Protocol):
    """Activations in numbered blocks; the same number gives the same block again."""

    site_dims: tuple[int, ...]
    """Width of each site; they add up to `d_in`."""
    hook_names: tuple[str, ...]
    """Hook name of each site: with several models, each name comes once for every model."""
    n_blocks: int
    fingerprint: str
    """Hash of all that determines the blocks."""

    def block(self, i: int) -> Block:
        """Block `i` of `range(n_blocks)`; it may hold no token."""


def finite_block(source: Source, i: int) -> Block:
    """Block `i`, checked.

    Raises:
        ValueError: a NaN or an infinity, or another width than `site_dims` add up to; the message
            names the block.
    """
    block = source.block(i)
    n, width = block.acts.shape
    if width != sum(source.site_dims):
        raise ValueError(f"block {i}: need width {sum(source.site_dims)}, got {width}")
    # a NaN or an infinity survives every sum: one pass; a sum may also overflow, so look closer
    if not block.acts.sum(dtype=torch.float32).isfinite():
        finite = block.acts.isfinite().all(dim=1)
        if finite.all():
            return block
        bad = int((~finite).nonzero()[0, 0])
        raise ValueError(
            f"block {i}: need finite activations, got NaN or infinity at {n - int(finite.sum())} "
            f"of {n} tokens, first at row {int(block.rows[bad])} position "
            f"{int(block.positions[bad])}; the model overflows, or its dtype is too narrow"
        )
    return block
