"""Sparsity rules: from pre-activations to latents.

A rule is a small frozen object. `init` gives the parameters and buffers that it needs beside the
dictionary's own, `acts` the latents at inference, which never depend on a token's neighbours.
In training a *sparse* rule (JumpReLU, TopK, BatchTopK) has `select`: the pairs that may be active,
found without a graph among `n` tokens, or None if too many to gain by it; with `scan` it looks
through blocks of pre-activations. Only pairs are decoded and get gradients, through `paired`. The
others, and a JumpReLU of many latents, train through `whole`.
Both give, beside the latents, the number of active ones of each token if it has a gradient.
"""

import math
from dataclasses import asdict, dataclass
from functools import partial
from typing import TYPE_CHECKING

import torch
from jaxtyping import Float
from torch import Tensor, nn

from lib.dictionaries import parallel
from lib.dictionaries.kernels import fused_jumprelu, sum_by_latent
from lib.dictionaries.pairs import SparseActs
from lib.dictionaries.search import Places, Search, Slack
from lib.dictionaries.selection import (
    bound_of_largest,
    largest,
    largest_of_rows,
    largest_of_runs,
    places_above,
)

if TYPE_CHECKING:
    from lib.dictionaries.dictionary import Dictionary

Acts = Float[Tensor, "n d_sae"]
Values = Float[Tensor, "nnz"]
L0s = Float[Tensor, "n"]
HINTS = (0.95, 0.8, 0.0)
"""Shares of the smallest score that BatchTopK kept last. Only scores above the first are compared,
if they are enough, or else above the next: the fewer, the faster."""
DENSE = 1 / 14
"""Share of active pairs from which on dense products are faster than sparse ones, on a CPU."""


@dataclass(frozen=True, kw_only=True)
class ReLU:
    """`max(pre, 0)`. Source: Bricken et al. 2023, Towards Monosemanticity."""

    sparse = False

    def init(self, dictionary: "Dictionary") -> None:
        pass

    def acts(self, pre: Acts, dictionary: "Dictionary") -> Acts:
        return pre.relu()

    def whole(self, pre: Acts, dictionary: "Dictionary") -> tuple[Acts, None]:
        return self.acts(pre, dictionary), None


@dataclass(frozen=True, kw_only=True)
class Gated:
    """`1[π > 0] · relu(r)`, where the gate π is the pre-activation and r shares its weights up to
    a scale `exp(r_mag)` for each latent. The gate learns from a loss term of its own.

    Source: Rajamanoharan et al. 2024, arXiv:2404.16014.
    """

    sparse = False

    def init(self, dictionary: "Dictionary") -> None:
        d_sae = dictionary.d_sae
        dictionary.r_mag = nn.Parameter(torch.zeros(d_sae))
        dictionary.b_mag = nn.Parameter(torch.zeros(d_sae))

    def acts(self, pre: Acts, dictionary: "Dictionary") -> Acts:
        magnitude = (pre - dictionary.b_enc) * dictionary.r_mag.exp() + dictionary.b_mag
        return torch.where(pre > 0, magnitude.relu(), 0)

    def whole(self, pre: Acts, dictionary: "Dictionary") -> tuple[Acts, None]:
        return self.acts(pre, dictionary), None


@dataclass(frozen=True, kw_only=True)
class JumpReLU:
    """`pre · 1[pre > θ]` with a threshold for each latent, `θ = exp(log_threshold)`.

    θ learns through a rectangle of width `bandwidth` round the jump, in pre-activations before any
    clamping, so that both halves of the band count.

    Source: Rajamanoharan et al. 2024, arXiv:2407.14435.
    """

    threshold: float = 1.0
    """Where every θ starts, in units of the pre-activations."""
    bandwidth: float = 0.5
    """Width of the rectangle, in the same units."""
    sparse = True

    def __post_init__(self) -> None:
        for name in ("threshold", "bandwidth"):
            if not getattr(self, name) > 0:
                raise ValueError(f"need {name} > 0, got {getattr(self, name)}")

    def init(self, dictionary: "Dictionary") -> None:
        start = torch.full((dictionary.d_sae,), math.log(self.threshold))
        dictionary.log_threshold = nn.Parameter(start)

    def acts(self, pre: Acts, dictionary: "Dictionary") -> Acts:
        return torch.where(pre > dictionary.log_threshold.exp(), pre, 0)

    def whole(self, pre: Acts, dictionary: "Dictionary") -> tuple[Acts, L0s]:
        bandwidth = torch.full_like(dictionary.log_threshold, self.bandwidth)
        acts, l0, _ = fused_jumprelu(pre, dictionary.log_threshold, bandwidth)
        return acts, l0

    def select(self, dictionary: "Dictionary", n: int, scan: Search) -> SparseActs | None:
        """All above `θ - bandwidth / 2`: below it nothing has a gradient."""
        band = dictionary.log_threshold.exp() - self.bandwidth / 2

        def find(pre: Acts, slack: Slack) -> Places | None:
            places = places_above(pre, band)
            return places if len(places) <= DENSE * pre.numel() else None

        return scan(find, partial(_above, bound=band))

    def paired(
        self, values: Values, active: SparseActs, dictionary: "Dictionary"
    ) -> tuple[SparseActs, L0s]:
        threshold = dictionary.log_threshold.exp()
        acts, l0 = _PairedJumpReLU.apply(values, threshold, self.bandwidth, active)
        return active.with_values(acts), l0


@dataclass(frozen=True, kw_only=True)
class TopK:
    """The k largest positive pre-activations of each token.

    Source: Gao et al. 2024, arXiv:2406.04093.
    """

    k: int = 32
    """Latents kept per token."""
    sparse = True

    def __post_init__(self) -> None:
        if self.k < 1:
            raise ValueError(f"need k >= 1, got {self.k}")

    def init(self, dictionary: "Dictionary") -> None:
        pass

    def acts(self, pre: Acts, dictionary: "Dictionary") -> Acts:
        indices = largest_of_rows(pre.detach(), self.k)
        return torch.zeros_like(pre).scatter(1, indices, pre.gather(1, indices).relu())

    def select(self, dictionary: "Dictionary", n: int, scan: Search) -> SparseActs:
        return scan(self.find, self.keep)

    def find(self, pre: Acts, slack: Slack) -> Places:
        """The k largest; on a screen those above a bound of the k-th largest, and above 0."""
        if slack is None:
            tokens = torch.arange(len(pre), device=pre.device)[:, None]
            return (tokens * pre.shape[1] + largest_of_rows(pre, self.k)).flatten()
        return places_above(pre, (bound_of_largest(pre, self.k)[:, None] - slack).clamp(min=0))

    def keep(self, active: SparseActs) -> SparseActs:
        return active.at(largest_of_runs(active.values, active.offsets, self.k))

    def paired(
        self, values: Values, active: SparseActs, dictionary: "Dictionary"
    ) -> tuple[SparseActs, None]:
        return active.with_values(values.relu()), None


@dataclass(frozen=True, kw_only=True)
class BatchTopK:
    """In training the n·k largest positive `pre · code norm` of a batch of n tokens (the whole
    batch, under data parallelism, of which a rank keeps those that are its own); at inference
    those above `threshold`, a saved buffer: the moving average of the smallest that was kept.

    Source: Bussmann et al. 2024, arXiv:2412.06410.
    """

    k: int = 32
    """Latents kept per token, on average over a batch."""
    threshold_decay: float = 0.9
    """Weight of the past in the moving average of the threshold, per batch."""
    sparse = True

    def __post_init__(self) -> None:
        if self.k < 1:
            raise ValueError(f"need k >= 1, got {self.k}")
        if not 0 <= self.threshold_decay < 1:
            raise ValueError(f"need threshold_decay in [0, 1), got {self.threshold_decay}")

    def init(self, dictionary: "Dictionary") -> None:
        dictionary.register_buffer("threshold", torch.zeros(()))
        dictionary.register_buffer("smallest", torch.zeros(()), persistent=False)  # kept last time

    def acts(self, pre: Acts, dictionary: "Dictionary") -> Acts:
        return torch.where(pre * dictionary.code_norms() > dictionary.threshold, pre, 0).relu()

    def select(self, dictionary: "Dictionary", n: int, scan: Search) -> SparseActs:
        norms, count = dictionary.code_norms(), n * self.k
        most = count * parallel.world_size()  # as all winners may be in one place

        def find(pre: Acts, slack: Slack, bound: Float[Tensor, "d_sae"]) -> Places:
            places = places_above(pre, bound)
            if slack is not None or len(places) <= most:
                return places
            return places[largest(pre.take(places) * norms[places % len(norms)], most)]

        if not dictionary.smallest:  # in the first batch: what TopK would keep of half the tokens
            each = TopK(k=self.k).select(dictionary, n, scan)
            scores = (each.values * norms[each.indices]).relu()
            least = norms.new_full((n,), math.inf).scatter_reduce(0, each.rows, scores, "amin")
            least[each.offsets.diff() < self.k] = 0
            dictionary.smallest.copy_(parallel.least_(least.median()))
        for share in HINTS:
            bound = share * dictionary.smallest / norms
            active = scan(partial(find, bound=bound), partial(_above, bound=bound))
            if parallel.mean_count(len(active.values), norms.device) >= count:
                break
        scores = active.values * norms[active.indices]
        count = parallel.quota(scores, count)
        if len(scores) > count:
            kept = largest(scores, count)
            active, scores = active.at(kept), scores[kept]
        smallest = scores.min() if len(scores) else scores.new_tensor(math.inf)
        if parallel.least_(smallest).isfinite():
            dictionary.smallest.copy_(smallest)
            past = torch.where(dictionary.threshold == 0, smallest, dictionary.threshold)
            dictionary.threshold.copy_(past.lerp(smallest, 1 - self.threshold_decay))
        return active

    def paired(
        self, values: Values, active: SparseActs, dictionary: "Dictionary"
    ) -> tuple[SparseActs, None]:
        return active.with_values(values.relu()), None


def _above(active: SparseActs, bound: Float[Tensor, "d_sae"]) -> SparseActs:
    """Only the pairs whose values exceed the bound of their latent."""
    return active.where(active.values > bound[active.indices])


Rule = ReLU | Gated | JumpReLU | TopK | BatchTopK
RULES = {rule.__name__: rule for rule in (ReLU, Gated, JumpReLU, TopK, BatchTopK)}


def rule_to_json(rule: Rule) -> dict:
    return {"name": type(rule).__name__, **asdict(rule)}


def rule_from_json(fields: dict) -> Rule:
    fields = dict(fields)
    return RULES[fields.pop("name")](**fields)


class _PairedJumpReLU(torch.autograd.Function):
    """`acts` and `l0` of `fused_jumprelu`, at pairs; all in the band must be among them."""

    @staticmethod
    def forward(ctx, values, threshold, bandwidth, active):
        threshold = threshold[active.indices]
        on = (values > threshold).to(values.dtype)
        ctx.save_for_backward(values, on, threshold)
        ctx.active, ctx.bandwidth = active, bandwidth
        l0 = on.new_zeros(active.n).index_add_(0, active.rows, on)  # of ones: exact in any order
        return values * on, l0

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx, d_acts, d_l0):
        values, on, threshold = ctx.saved_tensors
        near = (values - threshold).abs() < ctx.bandwidth / 2
        jump = torch.where(near, threshold * d_acts + d_l0[ctx.active.rows], 0) / ctx.bandwidth
        return d_acts * on, -sum_by_latent(ctx.active, jump), None, None
