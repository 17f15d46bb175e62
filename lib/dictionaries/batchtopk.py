"""How BatchTopK selects: the largest `latent · code norm` of a batch, or of each site for itself.

With decoupled norms every site of a crosscoder keeps its own latents, so a latent may be active at
one site and not at another: what a site decodes depends on its own bound. Source: the crosscoders
of Minder et al. 2025, arXiv:2504.02922.
"""

import math
from typing import Protocol, runtime_checkable

import torch
from jaxtyping import Bool, Float
from torch import Tensor

from lib.sparse import Scan, SparseActs, sparse_decode
from lib.sparse.select import largest
from lib.training import distributed

HINTS = (0.95, 0.8, 0.5, 0.2, 0.0)
"""Shares of the smallest score that was kept last. Only scores above the first are compared, if
they are enough, or else above the next: the fewer, the faster."""


@runtime_checkable
class Bounds(Protocol):
    """Scores of a dictionary and what they must reach; `[n_sites]` where norms are decoupled."""

    threshold: Tensor
    """Moving average of the smallest score that was kept, for inference."""
    smallest: Tensor
    """The smallest that was kept last."""

    def code_norms(self) -> Float[Tensor, "d_sae"]: ...

    def site_norms(self) -> Float[Tensor, "n_sites d_sae"]: ...


def select(scan: Scan, d: Bounds, k: int, decay: float) -> SparseActs:
    """The n·k pairs of largest score in the whole batch; moves the bounds."""
    norms, count = d.code_norms(), scan.n * k
    if not d.smallest:  # in the first batch: what TopK would keep of half the tokens
        each = scan.topk(k)
        scores = (each.values * norms[each.indices]).relu()
        least = norms.new_full((scan.n,), math.inf)
        least = least.scatter_reduce(0, each.rows, scores, "amin")
        least[each.offsets.diff() < k] = 0
        d.smallest.copy_(distributed.least_(least.median()))
    for share in HINTS:
        active = scan.above(share * d.smallest / norms, k=k)
        if distributed.mean_count(len(active.values), norms.device) >= count:
            break
    scores = active.values * norms[active.indices]
    count = distributed.quota(scores, count)
    if len(scores) > count:
        kept = largest(scores, count)
        active, scores = active.at(kept), scores[kept]
    _move(d, (), scores, decay)
    return active


def select_by_site(scan: Scan, d: Bounds, k: int, decay: float) -> SparseActs:
    """The pairs that are among the n·k of largest score at any site; moves the bounds."""
    norms, count = d.site_norms().clamp(min=1e-12), scan.n * k
    for share in HINTS:
        bound = share * d.smallest
        active = scan.above((bound[:, None] / norms).amin(0), k=2 * k)
        scores = active.values * norms[:, active.indices]
        counts = [(site > least).sum().item() for site, least in zip(scores, bound, strict=True)]
        if min(distributed.mean_count(n, norms.device) for n in counts) >= count:
            break
    kept = torch.zeros_like(active.values, dtype=torch.bool)
    for site, all_scores in enumerate(scores):
        places = largest(all_scores, distributed.quota(all_scores, count))
        kept[places] = True
        _move(d, site, all_scores[places], decay)
    return active.where(kept)


def _move(d: Bounds, site: int | tuple, kept: Float[Tensor, "m"], decay: float) -> None:
    smallest = kept.min() if len(kept) else kept.new_tensor(math.inf)
    if distributed.least_(smallest).isfinite():
        d.smallest[site] = smallest
        past = torch.where(d.threshold[site] == 0, smallest, d.threshold[site])
        d.threshold[site] = past.lerp(smallest, 1 - decay)


def acts_by_site(pre: Float[Tensor, "n d_sae"], d: Bounds) -> Float[Tensor, "n d_sae"]:
    """At inference: what passes the bound of any site."""
    bound = (d.threshold[:, None] / d.site_norms().clamp(min=1e-12)).amin(0)
    return torch.where(pre > bound, pre, 0).relu()


def decode_by_site(
    acts: SparseActs | Float[Tensor, "*batch d_sae"],
    rows: tuple[Tensor, ...],
    d: Bounds,
    bounds: Float[Tensor, "n_sites"] | None = None,
) -> Float[Tensor, "*batch d_out"]:
    """Each site from the latents that pass its threshold, or reach its bound in training.

    Args:
        rows: each site's decoder rows `[d_sae d_site]`.
    """

    def on(scores: Tensor, site: int) -> Bool[Tensor, "..."]:
        return scores > d.threshold[site] if bounds is None else scores >= bounds[site]

    sites, norms = [], d.site_norms()
    for site, part in enumerate(rows):
        if isinstance(acts, SparseActs):
            own = acts.where(on(acts.values * norms[site][acts.indices], site))
            sites.append(sparse_decode(own, part))
        else:
            sites.append(torch.where(on(acts * norms[site], site), acts, 0) @ part)
    return torch.cat(sites, dim=-1)
