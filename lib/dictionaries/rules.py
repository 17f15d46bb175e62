"""Sparsity rules: from pre-activations to latents.

A rule is a frozen object without state: what it learns or remembers is in its dictionary's
`Parameters`. A new rule is one class here, and to be saved an entry in `RULES` and in `format`:

| | |
|---|---|
| `parameters`, `buffers` | tensors that it needs beside the dictionary's own, by name |
| `acts` | latents at inference, which never depend on a token's neighbours |
| `select` | in training, the pairs that may be active, without a graph; None: train dense |
| `sparse`, `dense` | in training, latents with a graph, from those pairs or from the whole matrix |

Only selected pairs are decoded and get gradients.
"""

import math
from abc import ABC, abstractmethod
from dataclasses import asdict, dataclass, replace
from typing import Protocol, runtime_checkable

import torch
from jaxtyping import Float
from torch import Tensor

from lib.dictionaries import batchtopk
from lib.runtime import require_at_least
from lib.sparse import DENSE, Scan, SparseActs, dense_jumprelu, sparse_jumprelu

Acts = Float[Tensor, "n d_sae"]


@runtime_checkable
class Parameters(Protocol):
    """What a rule may read: `b_enc`, code norms, the share of the training that is done, and what
    it asked for."""

    b_enc: Tensor
    progress: float

    def code_norms(self) -> Float[Tensor, "d_sae"]: ...


class Codes:
    """Latents in training, and how many are active."""

    encoder_rows: Float[Tensor, "d_sae d_in"]
    """The encoder in this step's graph: gradients of few rows join the others here at no cost."""
    bounds: Float[Tensor, "n_sites"] | None = None
    """Of decoupled norms: the smallest score that each site kept."""

    def __init__(
        self,
        acts: SparseActs | Acts,
        l0: Float[Tensor, "n"] | None = None,
        pre_acts: Acts | None = None,
    ) -> None:
        self.acts, self._l0, self.pre_acts = acts, l0, pre_acts

    @property
    def l0(self) -> Float[Tensor, "n"]:
        """With a gradient where the rule gives one (JumpReLU); otherwise counted when asked for."""
        if self._l0 is not None:
            return self._l0
        sparse = isinstance(self.acts, SparseActs)
        return self.acts.l0() if sparse else (self.acts > 0).sum(1, dtype=self.acts.dtype)


class Rule(ABC):
    """What rules have in common: neither parameters nor a sparse path, unless they say so."""

    def parameters(self, d_sae: int) -> dict[str, Tensor]:
        """Start of each parameter, `[d_sae]`."""
        return {}

    def buffers(self) -> dict[str, Tensor]:
        """Start of each buffer."""
        return {}

    @abstractmethod
    def acts(self, pre: Acts, p: Parameters) -> Acts:
        """Latents at inference."""

    def active(self, scan: Scan, p: Parameters) -> SparseActs | None:
        """Latents at inference as pairs, where a scan finds them sooner than `acts`."""
        return None

    def select(self, scan: Scan, p: Parameters) -> SparseActs | None:
        return None

    def dense(self, pre: Acts, p: Parameters) -> Codes:
        return Codes(self.acts(pre, p), pre_acts=pre)

    def sparse(self, pre: SparseActs, p: Parameters) -> Codes:
        return Codes(pre.with_values(pre.values.relu()))

    def rescale_(self, p: Parameters, factor: float) -> "Rule":
        """Multiply biases and thresholds by `factor`; returns the rule in the new unit."""
        p.b_enc *= factor
        return self

    def shift_(self, p: Parameters, shift: Float[Tensor, "d_sae"]) -> None:
        """Lower the pre-activations by `shift`, through the biases."""
        p.b_enc -= shift

    def narrowed(self, d_sae: int) -> "Rule":
        """The rule of `d_sae` of the latents alone.

        Raises:
            ValueError: which latents fire depends on all of them.
        """
        return self


@dataclass(frozen=True, kw_only=True)
class ReLU(Rule):
    """`max(pre, 0)`. Source: Bricken et al. 2023, Towards Monosemanticity."""

    def acts(self, pre: Acts, p: Parameters) -> Acts:
        return pre.relu()


@dataclass(frozen=True, kw_only=True)
class Gated(Rule):
    """`1[π > 0] · relu(r)`, where the gate π is the pre-activation and r shares its weights up to
    a scale `exp(r_mag)` for each latent. The gate learns from a loss term of its own.

    Source: Rajamanoharan et al. 2024, arXiv:2404.16014.
    """

    def parameters(self, d_sae: int) -> dict[str, Tensor]:
        return {"r_mag": torch.zeros(d_sae), "b_mag": torch.zeros(d_sae)}

    def acts(self, pre: Acts, p: Parameters) -> Acts:
        magnitude = (pre - p.b_enc) * p.r_mag.exp() + p.b_mag
        return torch.where(pre > 0, magnitude.relu(), 0)

    def rescale_(self, p: Parameters, factor: float) -> "Gated":
        p.b_mag *= factor
        return super().rescale_(p, factor)

    def shift_(self, p: Parameters, shift: Float[Tensor, "d_sae"]) -> None:
        p.b_mag -= shift * p.r_mag.exp()
        super().shift_(p, shift)


@dataclass(frozen=True, kw_only=True)
class JumpReLU(Rule):
    """`pre · 1[pre > θ]` with a threshold for each latent, `θ = exp(log_threshold)`.

    θ learns through a rectangle of width `bandwidth` round the jump, in pre-activations before any
    clamping, so that both halves of the band count.

    Source: Rajamanoharan et al. 2024, arXiv:2407.14435.
    """

    threshold: float = 1.0
    """Where every θ starts, in units of the pre-activations."""
    bandwidth: float = 0.5
    """Width of the rectangle, in the same units."""

    def __post_init__(self) -> None:
        for name in ("threshold", "bandwidth"):
            if not getattr(self, name) > 0:
                raise ValueError(f"need {name} > 0, got {getattr(self, name)}")

    def parameters(self, d_sae: int) -> dict[str, Tensor]:
        return {"log_threshold": torch.full((d_sae,), math.log(self.threshold))}

    def acts(self, pre: Acts, p: Parameters) -> Acts:
        return torch.where(pre > p.log_threshold.exp(), pre, 0)

    def select(self, scan: Scan, p: Parameters) -> SparseActs | None:
        """All above `θ - bandwidth / 2`: below it nothing has a gradient."""
        return scan.above(p.log_threshold.exp() - self.bandwidth / 2, most=DENSE)

    def dense(self, pre: Acts, p: Parameters) -> Codes:
        bandwidth = torch.full_like(p.log_threshold, self.bandwidth)
        acts, l0, _ = dense_jumprelu(pre, p.log_threshold, bandwidth)
        return Codes(acts, l0, pre)

    def sparse(self, pre: SparseActs, p: Parameters) -> Codes:
        return Codes(*sparse_jumprelu(pre, p.log_threshold.exp(), self.bandwidth))

    def rescale_(self, p: Parameters, factor: float) -> "JumpReLU":
        p.log_threshold += math.log(factor)
        super().rescale_(p, factor)
        return JumpReLU(threshold=self.threshold * factor, bandwidth=self.bandwidth * factor)


@dataclass(frozen=True, kw_only=True)
class Annealed(Rule):
    """A rule that keeps k latents of each token; in training k may fall from a larger one."""

    k: int = 32
    """Latents kept per token (BatchTopK: on average over a batch)."""
    k_start: int | None = None
    """k of the first step."""
    k_anneal: float = 0.3
    """Share of the training over which k falls from `k_start` to `k`, linearly."""

    def __post_init__(self) -> None:
        require_at_least(1, k=self.k)
        start = self.k if self.k_start is None else self.k_start
        if start < self.k or not 0 < self.k_anneal <= 1:
            raise ValueError(f"need k_start >= k and k_anneal in (0, 1], got {self}")

    def k_at(self, progress: float) -> int:
        left = max(0.0, 1 - progress / self.k_anneal)
        return self.k + round(left * ((self.k_start or self.k) - self.k))


@dataclass(frozen=True, kw_only=True)
class TopK(Annealed):
    """The k largest positive pre-activations of each token.

    Source: Gao et al. 2024, arXiv:2406.04093.
    """

    def acts(self, pre: Acts, p: Parameters) -> Acts:
        values, indices = pre.topk(self.k, dim=1, sorted=False)
        return torch.zeros_like(pre).scatter(1, indices, values.relu())

    def active(self, scan: Scan, p: Parameters) -> SparseActs:
        found = scan.topk(self.k)
        return found.with_values(found.values.relu()).nonzero()

    def select(self, scan: Scan, p: Parameters) -> SparseActs:
        return scan.topk(self.k_at(p.progress))

    def narrowed(self, d_sae: int) -> Rule:
        raise ValueError("cannot narrow a TopK dictionary: which latents fire depends on all")


@dataclass(frozen=True, kw_only=True)
class BatchTopK(Annealed):
    """In training the n·k largest positive `pre · code norm` of a batch of n tokens (the whole
    batch, under data parallelism, of which a rank keeps those that are its own); at inference
    those above `threshold`, a saved buffer: the moving average of the smallest that was kept.

    With decoupled norms both are each site's own. Source: Bussmann et al. 2024, arXiv:2412.06410.
    """

    threshold_decay: float = 0.9
    """Weight of the past in the moving average of the threshold, per batch."""

    def __post_init__(self) -> None:
        super().__post_init__()
        if not 0 <= self.threshold_decay < 1:
            raise ValueError(f"need threshold_decay in [0, 1), got {self.threshold_decay}")

    def buffers(self) -> dict[str, Tensor]:
        return {"threshold": torch.zeros(()), "smallest": torch.zeros(())}

    def acts(self, pre: Acts, p: Parameters) -> Acts:
        if p.threshold.ndim:
            return batchtopk.acts_by_site(pre, p)
        return torch.where(pre * p.code_norms() > p.threshold, pre, 0).relu()

    def select(self, scan: Scan, p: Parameters) -> SparseActs:
        """Also moves `threshold`, and `smallest`, the least score that was kept."""
        select = batchtopk.select_by_site if p.threshold.ndim else batchtopk.select
        return select(scan, p, self.k_at(p.progress), self.threshold_decay)

    def rescale_(self, p: Parameters, factor: float) -> "BatchTopK":
        p.threshold *= factor
        return super().rescale_(p, factor)

    def narrowed(self, d_sae: int) -> "BatchTopK":
        return replace(self, k=min(self.k, d_sae), k_start=None)  # k counts in training only


RULES = {rule.__name__: rule for rule in (ReLU, Gated, JumpReLU, TopK, BatchTopK)}


def rule_to_json(rule: Rule) -> dict:
    return {"name": type(rule).__name__, **asdict(rule)}


def rule_from_json(fields: dict) -> Rule:
    return RULES[fields["name"]](**{key: fields[key] for key in fields.keys() - {"name"}})
