"""How the latents of a crosscoder stand at two of its sites: norms, directions, latent scaling.

A latent that one site seems not to have may be there all the same: in what the crosscoder misses of
that site (complete shrinkage), or written by other latents (decoupling). Latent scaling tells: how
much of the latent's own direction, when it fires, does the other site's error or reconstruction
hold? Source: Minder et al. 2025, arXiv:2504.02922; relative norms: Lindsey et al. 2024, Sparse
Crosscoders (Transformer Circuits). All is in the unit of training (`DictionaryConfig.site_scales`),
and in the raw one of a dictionary that was trained with `per_dim`.
"""

import math
from collections.abc import Iterable
from dataclasses import dataclass

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor

from lib.dictionaries import Dictionary, SparseActs
from lib.sparse.ops import dots_at, sum_by_latent

KINDS = ("dead", "neither", "shared", "only a", "only b", "rotated", "shrinkage", "decoupling")


@dataclass(frozen=True, eq=False)
class SiteReading:
    """Two sites, a and b, as every latent sees them; first index of a pair: the latent's own site.

    `error[1]` is ν of the error for a latent as one of site b: the scale at which the latent's
    direction at b fits site a's error, over that at which it fits b's own. 0: site a does not hold
    it; 1: as much as b. `reconstruction` is the same for what the crosscoder writes.
    """

    relative_norm: Float[Tensor, "d_sae"]
    """‖d_b‖ / (‖d_a‖ + ‖d_b‖): 0 only a, 1 only b; NaN where both are zero."""
    cosine: Float[Tensor, "d_sae"]
    """Of the two decoder rows; 0 where one is zero."""
    error: Float[Tensor, "2 d_sae"]
    reconstruction: Float[Tensor, "2 d_sae"]
    n_firings: Int[Tensor, "d_sae"]

    def lacks(self, *, error: float = 0.2, reconstruction: float = 0.5) -> Bool[Tensor, "2 d_sae"]:
        """For a latent as one of site a (0) or b (1): is it missing at the other site?"""
        return (self.error < error) & (self.reconstruction < reconstruction)

    def kinds(self, *, norm: float = 0.9, min_firings: int = 20) -> list[str]:
        """One of `KINDS` for each latent.

        `rotated` latents write something of its own at either site. `shrinkage` and `decoupling`
        are exclusive by norm alone. `neither`: latents of a third site.

        Args:
            norm: relative norm above which (or below 1 - `norm`) a latent seems exclusive.
            min_firings: tokens below which a latent is `dead`.
        """
        missing, found = self.lacks(), []
        for j, share in enumerate(self.relative_norm.tolist()):
            own = 1 if share > 0.5 else 0
            only_a, only_b = missing[0, j].item(), missing[1, j].item()
            exclusive = max(share, 1 - share) > norm
            if self.n_firings[j] < min_firings:
                found.append("dead")
            elif math.isnan(share):
                found.append("neither")
            elif exclusive and missing[own, j]:
                found.append(("only a", "only b")[own])
            elif exclusive:
                found.append("shrinkage" if self.error[own, j] >= 0.2 else "decoupling")
            elif only_a and only_b:
                found.append("rotated")
            elif only_a or only_b:
                found.append("only b" if only_b else "only a")
            else:
                found.append("shared")
        return found


@torch.no_grad()
def compare_sites(
    crosscoder: Dictionary,
    batches: Iterable[Tensor],
    sites: tuple[int, int] = (0, 1),
) -> SiteReading:
    """Latent scaling in closed form, from one pass over activations.

    Args:
        batches: activations `[n d_in]` of all sites side by side, as from a `Source`.
        sites: a and b.

    Raises:
        ValueError: fewer than two sites, sites of different widths (where a direction of one means
            nothing at the other), or no batch.
    """
    config = crosscoder.config
    dims, a, b = config.site_dims, *sites
    if config.out_dims is not None or not (0 <= a < len(dims) and 0 <= b < len(dims) and a != b):
        raise ValueError(f"need two sites of a crosscoder with widths {dims}, got {sites}")
    if dims[a] != dims[b]:
        raise ValueError(f"need sites of one width, got {dims[a]} and {dims[b]}")
    scales = config.site_scales or [1.0] * len(dims)
    parts = crosscoder.decoder_rows.split(dims, dim=1)
    rows = [(parts[site] * scales[site]).contiguous() for site in sites]
    squares = [part.square().sum(1).double() for part in rows]
    product = (rows[0] * rows[1]).sum(1).double()
    error, written = torch.zeros(2, 2, 2, crosscoder.d_sae, dtype=torch.double)
    energy = torch.zeros(2, crosscoder.d_sae, dtype=torch.double)  # of what each site writes
    n_firings = torch.zeros(crosscoder.d_sae, dtype=torch.long)
    for x in batches:
        acts = crosscoder.encode_sparse(x)
        x_hat = crosscoder.decode(acts)
        for at, site in enumerate(sites):
            on = crosscoder.written_at(acts, site)
            energy[at] += sum_by_latent(acts, acts.values.square() * on).double().cpu()
        n_firings += torch.bincount(acts.indices, minlength=crosscoder.d_sae).cpu()
        left = (x.to(x_hat) - x_hat).split(dims, dim=1)
        made = (x_hat - crosscoder.b_dec).split(dims, dim=1)
        for own in (0, 1):
            for at in (0, 1):  # Σ z (y · d): the direction of `own` in what is at `at`
                site = sites[at]
                error[own, at] += _along(acts, left[site] * scales[site], rows[own])
                written[own, at] += _along(acts, made[site] * scales[site], rows[own])
    if not energy.any():
        raise ValueError("need a batch in which a latent fires, got none")
    for own in (0, 1):
        error[own, own] += energy[own] * squares[own].cpu()
        error[own, 1 - own] += energy[1 - own] * product.cpu()
    norms = [square.sqrt() for square in squares]
    total = norms[0] + norms[1]
    cosine = product / (norms[0] * norms[1]).clamp(min=1e-12)
    return SiteReading(
        (norms[1] / total).float().cpu(),
        cosine.float().cpu(),
        *(
            torch.stack([_over(part[0, 1], part[0, 0]), _over(part[1, 0], part[1, 1])])
            for part in (error, written)
        ),
        n_firings,
    )


def _along(
    acts: SparseActs, y: Float[Tensor, "n d"], rows: Float[Tensor, "d_sae d"]
) -> Float[Tensor, "d_sae"]:
    """For each latent the sum over tokens of `latent · (y · row)`."""
    dots = dots_at(acts, y.contiguous(), rows)
    return sum_by_latent(acts, dots * acts.values).double().cpu()


def _over(other: Float[Tensor, "d_sae"], own: Float[Tensor, "d_sae"]) -> Float[Tensor, "d_sae"]:
    """How much the other site has of what the own site has; 1 where that is nothing."""
    return torch.where(own > 0, other / own.clamp(min=1e-12), 1.0).float()
