"""Sparsity rules: from pre-activations to latents.

A rule is a small frozen object. `init` gives the parameters and buffers that it needs beside the
dictionary's own, `acts` the latents at inference, which never depend on a token's neighbours.
A *sparse* rule (TopK, BatchTopK) also has `select`: which pairs are active in training, found
without a graph; only they are decoded and get gradients. The others train through `acts`.
"""

import math
from dataclasses import asdict, dataclass
from typing import TYPE_CHECKING

import torch
from jaxtyping import Float
from torch import Tensor, nn

from lib.dictionaries.pairs import SparseActs, starts_of

if TYPE_CHECKING:
    from lib.dictionaries.dictionary import Dictionary

Acts = Float[Tensor, "n d_sae"]


@dataclass(frozen=True, kw_only=True)
class ReLU:
    """`max(pre, 0)`. Source: Bricken et al. 2023, Towards Monosemanticity."""

    sparse = False

    def init(self, dictionary: "Dictionary") -> None:
        pass

    def acts(self, pre: Acts, dictionary: "Dictionary") -> Acts:
        return pre.relu()


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
    sparse = False

    def __post_init__(self) -> None:
        for name in ("threshold", "bandwidth"):
            if not getattr(self, name) > 0:
                raise ValueError(f"need {name} > 0, got {getattr(self, name)}")

    def init(self, dictionary: "Dictionary") -> None:
        start = torch.full((dictionary.d_sae,), math.log(self.threshold))
        dictionary.log_threshold = nn.Parameter(start)

    def acts(self, pre: Acts, dictionary: "Dictionary") -> Acts:
        return jumprelu(pre, dictionary.log_threshold.exp(), self.bandwidth)


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
        values, indices = pre.topk(self.k, dim=1, sorted=False)
        return torch.zeros_like(pre).scatter(1, indices, values.relu())

    def select(self, pre: Acts, dictionary: "Dictionary") -> SparseActs:
        values, indices = pre.topk(self.k, dim=1, sorted=False)
        offsets = torch.arange(len(pre) + 1, device=pre.device) * self.k
        return SparseActs(indices.flatten(), values.flatten(), offsets, pre.shape[1])


@dataclass(frozen=True, kw_only=True)
class BatchTopK:
    """In training the n·k largest positive `pre · code norm` of a batch of n tokens; at inference
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

    def acts(self, pre: Acts, dictionary: "Dictionary") -> Acts:
        return torch.where(pre * dictionary.code_norms() > dictionary.threshold, pre, 0).relu()

    def select(self, pre: Acts, dictionary: "Dictionary") -> SparseActs:
        scores = pre * dictionary.code_norms()
        kept = _largest(scores.flatten(), len(pre) * self.k, 0.9 * dictionary.threshold)
        rows, indices = kept // pre.shape[1], kept % pre.shape[1]
        counts = torch.bincount(rows, minlength=len(pre))
        offsets = starts_of(counts)
        if len(kept):
            smallest = scores.flatten()[kept].min()
            past = torch.where(dictionary.threshold == 0, smallest, dictionary.threshold)
            dictionary.threshold.copy_(past.lerp(smallest, 1 - self.threshold_decay))
        return SparseActs(indices, pre[rows, indices], offsets, pre.shape[1])


def _largest(scores: Float[Tensor, "m"], count: int, hint: Float[Tensor, ""]) -> Tensor:
    """Places of the `count` largest positive scores, ascending.

    Sorting all of them is slow: those above `hint` are tried first, and only when they are too
    few, all positive ones.
    """
    places = (scores > hint.clamp(min=0)).nonzero().flatten()
    if len(places) < count:
        places = (scores > 0).nonzero().flatten()
    if len(places) > count:
        places = places[scores[places].topk(count, sorted=False).indices].sort().values
    return places


Rule = ReLU | Gated | JumpReLU | TopK | BatchTopK
RULES = {rule.__name__: rule for rule in (ReLU, Gated, JumpReLU, TopK, BatchTopK)}


def rule_to_json(rule: Rule) -> dict:
    return {"name": type(rule).__name__, **asdict(rule)}


def rule_from_json(fields: dict) -> Rule:
    fields = dict(fields)
    return RULES[fields.pop("name")](**fields)


class _JumpReLU(torch.autograd.Function):
    @staticmethod
    def forward(ctx, pre, threshold, bandwidth):
        ctx.save_for_backward(pre, threshold)
        ctx.bandwidth = bandwidth
        return torch.where(pre > threshold, pre, 0)

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx, grad):
        pre, threshold = ctx.saved_tensors
        near = (pre - threshold).abs() < ctx.bandwidth / 2
        d_threshold = -(threshold / ctx.bandwidth) * torch.where(near, grad, 0).sum(0)
        return torch.where(pre > threshold, grad, 0), d_threshold, None


class _Step(torch.autograd.Function):
    @staticmethod
    def forward(ctx, pre, threshold, bandwidth):
        ctx.save_for_backward(pre, threshold)
        ctx.bandwidth = bandwidth
        return (pre > threshold).to(pre)

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx, grad):
        pre, threshold = ctx.saved_tensors
        near = (pre - threshold).abs() < ctx.bandwidth / 2
        return None, -torch.where(near, grad, 0).sum(0) / ctx.bandwidth, None


def jumprelu(pre: Acts, threshold: Float[Tensor, "d_sae"], bandwidth: float) -> Acts:
    """`pre · 1[pre > θ]`; θ's gradient is the rectangle's estimate (arXiv:2407.14435, eq. 11)."""
    return _JumpReLU.apply(pre, threshold, bandwidth)


def step(pre: Acts, threshold: Float[Tensor, "d_sae"], bandwidth: float) -> Acts:
    """`1[pre > θ]`, whose row sums are L0; θ's gradient as in `jumprelu` (eq. 12)."""
    return _Step.apply(pre, threshold, bandwidth)
