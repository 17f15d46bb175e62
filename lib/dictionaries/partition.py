"""Dedicated feature crosscoders: latents that belong to one site alone.

The partition is held where weights are read, so nothing that happens to the parameters in between
(an optimiser's moments, weight decay, a copy, another dtype, a file) can leak into what a
dictionary computes or learns.
"""

from collections.abc import Sequence
from itertools import accumulate, pairwise
from typing import Any, Protocol, runtime_checkable

import torch
from jaxtyping import Float
from torch import Tensor

from lib.sparse.ops import own


@runtime_checkable
class Crosscoder(Protocol):
    """What `leak` asks of a dictionary."""

    config: Any
    b_dec: Tensor

    def pre_acts(self, x: Tensor) -> Tensor: ...

    def decode(self, acts: Tensor) -> Tensor: ...


Block = tuple[slice, slice]
"""Rows (latents) and columns (dimensions) of a matrix `[d_sae d]`."""


def exclusive_sizes(d_sae: int, n_sites: int, fraction: float | Sequence[float]) -> tuple[int, ...]:
    """Latents of each site alone, for `DictionaryConfig.exclusive`; rounded to nearest.

    Args:
        fraction: share of `d_sae` that each site gets, or one for each site.

    Raises:
        ValueError: a share below 0, one too many, or no shared latent left.
    """
    shares = [fraction] * n_sites if isinstance(fraction, int | float) else list(fraction)
    sizes = tuple(round(share * d_sae) for share in shares)
    if len(sizes) != n_sites or min(shares) < 0 or sum(sizes) >= d_sae:
        raise ValueError(
            f"need a share >= 0 for each of {n_sites} sites that leaves shared latents, "
            f"got {shares} of {d_sae} latents"
        )
    return sizes


def parts(exclusive: Sequence[int], d_sae: int) -> dict[str, slice]:
    """Latents of each part: `only 0`, `only 1`, …, `shared`."""
    ends = [0, *accumulate(exclusive), d_sae]
    names = [*(f"only {site}" for site in range(len(exclusive))), "shared"]
    return {name: slice(*pair) for name, pair in zip(names, pairwise(ends), strict=True)}


def forbidden(exclusive: Sequence[int], dims: Sequence[int]) -> tuple[Block, ...]:
    """What latents of one site alone may not touch: the columns before and after their site's."""
    latents, columns = [0, *accumulate(exclusive)], [0, *accumulate(dims)]
    return tuple(
        (slice(latents[site], latents[site + 1]), columns_)
        for site in range(len(exclusive))
        for columns_ in (slice(0, columns[site]), slice(columns[site + 1], columns[-1]))
        if latents[site] < latents[site + 1] and columns_.start < columns_.stop
    )


class _Held(torch.autograd.Function):
    @staticmethod
    def forward(ctx, rows, blocks):
        ctx.blocks = blocks
        for block in blocks:
            rows.data[block] = 0  # in place: a masked copy would be another pass over memory
        return rows.view_as(rows)

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx, grad):
        if grad.is_sparse:  # of few rows (AuxK): as such it joins the dense ones at no cost
            grad = grad.coalesce()
            latents, values = grad.indices()[0], grad.values().clone()
            for rows, columns in ctx.blocks:
                values[(latents >= rows.start) & (latents < rows.stop), columns] = 0
            where, options = grad.indices(), {"check_invariants": False, "is_coalesced": True}
            return torch.sparse_coo_tensor(where, values, grad.shape, **options), None
        grad = own(grad)  # autograd may have handed it to others too
        for block in ctx.blocks:
            grad[block] = 0
        return grad, None


def held(rows: Float[Tensor, "d_sae d"], blocks: Sequence[Block]) -> Float[Tensor, "d_sae d"]:
    """`rows` with zeros in `blocks`, where their gradient is zero too; free without blocks."""
    return _Held.apply(rows, blocks) if blocks else rows


def leak(crosscoder: Crosscoder, n: int = 64) -> float:
    """The most that an exclusive latent's pre-activation moves when all other sites get other
    inputs, or that it writes there; of `n` random inputs.

    Raises:
        ValueError: there is no partition.
    """
    exclusive, dims = crosscoder.config.exclusive, crosscoder.config.site_dims
    if not exclusive:
        raise ValueError("need a dictionary with exclusive latents, got none")
    b_dec = crosscoder.b_dec
    draw = torch.randn(2, n, sum(dims), generator=torch.Generator().manual_seed(0)).to(b_dec)
    columns = torch.arange(len(dims)).repeat_interleave(torch.tensor(dims)).to(b_dec.device)
    worst, whole = 0.0, crosscoder.pre_acts(draw[0])
    for site, latents in enumerate(list(parts(exclusive, whole.shape[1]).values())[:-1]):
        seen = crosscoder.pre_acts(torch.where(columns == site, *draw)) - whole
        codes = torch.zeros_like(whole)
        codes[:, latents] = whole[:, latents].abs()
        written = (crosscoder.decode(codes) - b_dec)[:, columns != site]
        for moved in (seen[:, latents], written):
            worst = max(worst, moved.abs().max().item() if moved.numel() else 0.0)
    return worst
