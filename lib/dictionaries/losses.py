"""Loss terms: functions from one step's `StepOutput` to a number.

Those here are small frozen objects, so that a recipe can be compared and saved; any other function
of the same signature will do in a recipe.

A term may have a `check(config)`, which refuses dictionaries that it means nothing for.

Unit: the main term is the squared error summed over `d_out` and averaged over tokens, as in
sae-lens, so that with inputs of mean norm sqrt(d) it starts near d. Weights are in that unit.
"""

from collections.abc import Callable
from dataclasses import asdict, dataclass, is_dataclass
from functools import cached_property
from typing import ClassVar

import torch
from jaxtyping import Float, Int
from torch import Tensor
from torch.nn.functional import embedding, mse_loss

from lib.dictionaries.config import DictionaryConfig
from lib.dictionaries.dictionary import Dictionary
from lib.dictionaries.rules import Codes, Gated, JumpReLU, ReLU, Rule
from lib.sparse import SparseActs
from lib.training import distributed


@dataclass(eq=False)
class StepOutput:
    """Everything a loss term may read from one step."""

    dictionary: Dictionary
    x: Float[Tensor, "n d_in"]
    target: Float[Tensor, "n d_out"]
    """What is reconstructed: `x`, or a transcoder's output sites."""
    x_hat: Float[Tensor, "n d_out"]
    codes: Codes
    dead: Int[Tensor, "n_dead"]
    """Latents that have not fired for long."""
    t: float
    """Share of the training that is done, 0 to 1."""

    @property
    def acts(self) -> SparseActs | Float[Tensor, "n d_sae"]:
        return self.codes.acts

    @cached_property
    def dense_acts(self) -> Float[Tensor, "n d_sae"]:
        return self.acts.dense() if isinstance(self.acts, SparseActs) else self.acts

    @cached_property
    def pre_acts(self) -> Float[Tensor, "n d_sae"]:
        """Of a step on pairs alone, a matrix product of its own."""
        known = self.codes.pre_acts
        return self.dictionary.pre_acts(self.x) if known is None else known

    @property
    def error(self) -> Float[Tensor, "n d_out"]:
        return self.target - self.x_hat


DENSE_RULES = (ReLU, Gated, JumpReLU)


def ramp(t: float, share: float) -> float:
    """0 at the start, 1 once `share` of the training is done."""
    return min(1.0, t / share) if share > 0 else 1.0


@dataclass(frozen=True, kw_only=True)
class Reconstruction:
    """Squared error, summed over dimensions, averaged over tokens."""

    def __call__(self, out: StepOutput) -> Float[Tensor, ""]:
        return mse_loss(out.x_hat, out.target, reduction="sum") / len(out.target)  # one pass


@dataclass(frozen=True, kw_only=True)
class L1:
    """`weight` times the sum of latents, each times its code norm; ramped up from 0.

    `p_end` below 1 anneals the penalty to Σ z^p, p falling linearly from 1. It is rescaled to the
    value that L1 has at each step, so it never jumps.

    Source: Bricken et al. 2023; p-annealing Karvonen et al. 2024, arXiv:2408.00113.
    """

    needs: ClassVar = DENSE_RULES
    weight: float
    ramp: float = 0.05
    """Share of the training over which the weight rises."""
    p_end: float = 1.0
    p_start_t: float = 0.2
    """Share of the training after which p begins to fall."""

    def __post_init__(self) -> None:
        if self.weight < 0:
            raise ValueError(f"need weight >= 0, got {self.weight}")
        if not 0 < self.p_end <= 1 or not 0 <= self.p_start_t < 1:
            raise ValueError(
                f"need p_end in (0, 1] and p_start_t in [0, 1), got {self.p_end}, {self.p_start_t}"
            )

    def __call__(self, out: StepOutput) -> Float[Tensor, ""]:
        codes = self.codes(out) * out.dictionary.code_norms()
        l1 = codes.sum(1).mean()
        fall = max(0.0, out.t - self.p_start_t) / (1 - self.p_start_t)
        power = 1 - fall * (1 - self.p_end)
        if power < 1:
            lp = torch.where(codes > 0, codes.clamp(min=1e-6) ** power, 0).sum(1).mean()
            l1 = lp * (distributed.mean(l1) / distributed.mean(lp).clamp(min=1e-12)).detach()
        return self.weight * ramp(out.t, self.ramp) * l1

    def codes(self, out: StepOutput) -> Float[Tensor, "n d_sae"]:
        return out.dense_acts


@dataclass(frozen=True, kw_only=True)
class GateL1(L1):
    """L1 (or its annealed form) on a gated dictionary's rectified gates."""

    needs: ClassVar = Gated

    def codes(self, out: StepOutput) -> Float[Tensor, "n d_sae"]:
        return out.pre_acts.relu()


@dataclass(frozen=True, kw_only=True)
class GateReconstruction:
    """Squared error of what the gates alone reconstruct through a detached decoder.

    Source: Rajamanoharan et al. 2024, arXiv:2404.16014.
    """

    needs: ClassVar = Gated

    def __call__(self, out: StepOutput) -> Float[Tensor, ""]:
        W_dec, b_dec = out.dictionary.decoder_rows.detach(), out.dictionary.b_dec.detach()
        return (out.target - out.pre_acts.relu() @ W_dec - b_dec).square().sum(1).mean()


@dataclass(frozen=True, kw_only=True)
class L0:
    """`weight · L0` by the rectangle estimate; with `target`, `weight · (L0/target - 1)²`.

    Source: Rajamanoharan et al. 2024, arXiv:2407.14435.
    """

    needs: ClassVar = JumpReLU
    weight: float
    target: float | None = None
    """Latents per token to aim at."""
    ramp: float = 0.1

    def __post_init__(self) -> None:
        if self.target is not None and self.target <= 0:
            raise ValueError(f"need target > 0, got {self.target}")

    def check(self, config: DictionaryConfig) -> None:
        if self.target is not None and self.target > config.d_sae:
            raise ValueError(f"need k <= d_sae {config.d_sae}, got a target of {self.target}")

    def __call__(self, out: StepOutput) -> Float[Tensor, ""]:
        l0 = out.codes.l0.mean()
        penalty = l0 if self.target is None else (distributed.mean(l0) / self.target - 1) ** 2
        return self.weight * ramp(out.t, self.ramp) * penalty


@dataclass(frozen=True, kw_only=True)
class Entropy:
    """`weight` times the entropy (nats) of each token's latents, taken as shares of their sum.

    Blind to scale: it concentrates a code on few latents without shrinking it.

    Source: the `entropy` option of Marks et al. 2024, dictionary_learning.
    """

    needs: ClassVar = DENSE_RULES
    weight: float
    ramp: float = 0.05

    def __call__(self, out: StepOutput) -> Float[Tensor, ""]:
        codes = out.dense_acts * out.dictionary.code_norms()
        shares = codes / codes.sum(1, keepdim=True).clamp(min=1e-8)
        entropy = -(shares * shares.clamp(min=1e-8).log()).sum(1).mean()
        return self.weight * ramp(out.t, self.ramp) * entropy


@dataclass(frozen=True, kw_only=True)
class AuxK:
    """The error, reconstructed by the dead latents whose pre-activations are largest.

    `weight` times the share of the error's variance that they leave unexplained, in units of the
    target's variance. Its gradient reaches the dead latents' encoder and decoder, nothing else.

    Source: Gao et al. 2024, arXiv:2406.04093.
    """

    weight: float = 1 / 32
    k: int | None = None
    """Dead latents used per token; None: half the width of the input."""

    def __call__(self, out: StepOutput) -> Float[Tensor, ""]:
        d = out.dictionary
        if not len(out.dead):
            return out.x_hat.new_zeros(())
        error = out.error.detach()
        rows = out.codes.encoder_rows, d.decoder_rows  # gradients are added in these rows alone
        encoder, W_dec = (embedding(out.dead, part, sparse=True) for part in rows)
        pre = (out.x - d.b_in.detach()) @ encoder.T + d.b_enc[out.dead]
        k = min(self.k or d.d_in // 2, len(out.dead))
        values, places = pre.topk(k, dim=1, sorted=False)
        codes = torch.zeros_like(pre).scatter(1, places, values.relu())
        left = (error - codes @ W_dec).square().sum()
        spread = (error - distributed.mean(error.mean(0))).square().sum()
        variance = distributed.mean(spread).clamp(min=1e-12)
        spread = (out.target - distributed.mean(out.target.mean(0))).square().sum(1)
        unit = distributed.mean(spread.mean())
        return self.weight * unit * left / variance


@dataclass(frozen=True, kw_only=True)
class GhostGradients:
    """Dead latents, through an exponential, reconstruct half the error; as large as the main term.

    Source: Jermyn & Templeton 2024, Ghost Grads (Transformer Circuits, January update).
    """

    needs: ClassVar = DENSE_RULES
    weight: float = 1.0

    def __call__(self, out: StepOutput) -> Float[Tensor, ""]:
        d = out.dictionary
        if not len(out.dead):
            return out.x_hat.new_zeros(())
        error = out.error.detach()
        ghosts = out.pre_acts[:, out.dead].clamp(max=20).exp() @ d.decoder_rows[out.dead]
        size = error.norm(dim=1, keepdim=True) / (2 * ghosts.norm(dim=1, keepdim=True) + 1e-6)
        loss = (error - ghosts * size.detach()).square().sum(1).mean()
        main = distributed.mean(error.square().sum(1).mean())
        return self.weight * loss * (main / distributed.mean(loss).clamp(min=1e-12)).detach()


Term = Callable[[StepOutput], Float[Tensor, ""]]


def require_rule(term: Term, rule: Rule) -> None:
    """Raises ValueError for a term of this module that means nothing under `rule`."""
    needs = getattr(term, "needs", Rule)
    if not isinstance(rule, needs):
        raise ValueError(f"{type(term).__name__} cannot go with {rule}; need {needs}")


def check(term: Term, config: DictionaryConfig) -> None:
    """Raises ValueError for a term whose own `check` refuses dictionaries of this shape."""
    own = getattr(term, "check", None)
    if own is not None:
        own(config)


def term_to_json(term: Term) -> dict:
    """Name and settings; of a function its name."""
    if is_dataclass(term):
        return {"name": type(term).__name__, **asdict(term)}
    return {"name": f"{term.__module__}.{term.__qualname__}"}
