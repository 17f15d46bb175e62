"""How a SAE-LoRA becomes sparse: five methods, and the pruning that ends each.

Weights of a latent count as one group over all ranks, so that what is few are latents, and the
weights are the *effective* ones, of unit norm, except under `l1`, the published baseline: there
the penalty is on the raw weights, whose scale the normalisation takes away again.

| method | what it does |
|---|---|
| `l1` | adds `w (‖A‖₁ + ‖B‖₁)` of the raw weights |
| `hoyer` | adds `w (Σ_j ‖a_j‖ + Σ_j ‖b_j‖)` of the effective ones: L1 over L2 (Hoyer 2004) |
| `proximal` | after each step, `‖a_j‖ ← max(0, ‖a_j‖ − lr·w)`: exact zeros (Yuan and Lin 2006) |
| `hard_concrete` | a random gate per latent, penalised while it may open (Louizos et al. 2018) |
| `topk` | keeps the largest, fewer and fewer (Zhu and Gupta 2017), under a little of `l1` |

After a third of the steps, in which the weights outgrow their random start, the number of latents
is to fall geometrically from all of them to the target: `topk` masks the rest, and a weight that is
not given grows while the latents over 1 % of the largest are too many. `topk` has a weight that
stays: it does no pruning, but lets weights shrink that hardly matter, so that size tells which do.
"""

import math

import torch
from jaxtyping import Float
from torch import Tensor

from lib.adapters.sae_lora.adapter import SaeLora
from lib.adapters.sae_lora.config import SaeLoraConfig

SMALL = 0.01
"""A latent with less than this share of the largest weight counts as off."""

_STARTS = {"topk": 3e-3, "l1": 1e-3, "hoyer": 1e-3, "proximal": 1e-2, "hard_concrete": 1e-2}
_DENSE = 1 / 3  # share of the steps before the number of latents begins to fall
_GAIN = 0.1  # of the adapting weight, per step and unit of log
_BETA, _LOW, _HIGH = 2 / 3, -0.1, 1.1  # of the hard concrete distribution, as in its paper


def latent_norms(
    adapter: SaeLora,
) -> tuple[Float[Tensor, " d_sae"], Float[Tensor, " d_sae"]]:
    """Effective weight of each latent, read and written: its norm over ranks."""
    return adapter.read_weights.norm(dim=1), adapter.write_weights.norm(dim=0)


class Regularizer:
    """One training's sparsity: `before_step`, `penalty`, `after_step`, in this order.

    `weights` (of reads and writes) and `log_alpha` are its state; a checkpoint keeps both.
    """

    def __init__(self, adapter: SaeLora, config: SaeLoraConfig) -> None:
        self.config = config
        start = config.weight if config.weight is not None else _STARTS.get(config.sparsity, 0.0)
        self.weights = torch.full((2,), float(start), dtype=torch.float64)
        self.started = tuple(
            int((mask > 0).sum()) for mask in (adapter.read_mask, adapter.write_mask)
        )
        """Latents at the start, read and written."""
        gated = config.sparsity == "hard_concrete"
        masks = torch.stack([adapter.read_mask, adapter.write_mask])
        starts = torch.where(masks > 0, 2.0, -torch.inf)  # what is masked already never opens
        self.log_alpha = (starts if gated else starts.new_zeros(0)).requires_grad_(gated)

    def before_step(self, adapter: SaeLora, generator: torch.Generator) -> None:
        if self.config.sparsity == "hard_concrete":
            noise = torch.rand(self.log_alpha.shape, generator=generator).clamp(1e-6, 1 - 1e-6)
            noise = noise.to(self.log_alpha)
            opened = ((noise.logit() + self.log_alpha) / _BETA).sigmoid()
            adapter.gates = tuple(_stretched(opened))

    def penalty(self, adapter: SaeLora) -> Float[Tensor, ""] | float:
        """In nats."""
        w_read, w_write = self.weights.tolist()
        match self.config.sparsity:
            case "l1" | "topk":
                return w_read * adapter.lora_A.abs().sum() + w_write * adapter.lora_B.abs().sum()
            case "hoyer":
                read, write = latent_norms(adapter)
                return w_read * read.sum() + w_write * write.sum()
            case "hard_concrete":
                open_ = (self.log_alpha - _BETA * math.log(-_LOW / _HIGH)).sigmoid().sum(1)
                return w_read * open_[0] + w_write * open_[1]
        return 0.0

    @torch.no_grad()
    def after_step(self, adapter: SaeLora, lr: float, progress: float) -> None:
        """
        Args:
            lr: of the step that was just taken.
            progress: share of the steps that are done.
        """
        if self.config.sparsity == "proximal":
            _shrink_(adapter, [lr * w for w in self.weights.tolist()])
        if self.config.sparsity == "topk":
            prune_(adapter, *self.sizes(progress))
        if self.config.penalised and self.config.weight is None:
            pairs = zip(self._norms(adapter), self.sizes(progress), strict=True)
            for i, (norms, wanted) in enumerate(pairs):
                behind = math.log(max(n_on(norms), 1) / wanted)
                self.weights[i] *= math.exp(_GAIN * max(-1.0, min(1.0, behind)))

    @torch.no_grad()
    def finish(self, adapter: SaeLora) -> None:
        """Gates at their most likely value become weights; then all but the targets go.

        Under `l1` without targets nothing goes: the published recipe ends there.
        """
        if adapter.gates is not None:
            read, write = self.likely_gates()
            adapter.gates = None
            adapter.lora_A *= read
            adapter.lora_B *= write[:, None]
        published = self.config.sparsity == "l1" and self._targets == (None, None)
        if self.config.sparsity != "none" and not published:
            prune_(adapter, *self._targets)

    def sizes(self, progress: float) -> tuple[int, int]:
        """Latents to have at this point: geometric from those of the start to the targets."""
        progress = max(0.0, (progress - _DENSE) / (1 - _DENSE))
        ends = [
            s if n is None else min(s, n) for s, n in zip(self.started, self._targets, strict=True)
        ]
        logs = [
            (1 - progress) * math.log(s) + progress * math.log(e)
            for s, e in zip(self.started, ends, strict=True)
        ]
        return round(math.exp(logs[0])), round(math.exp(logs[1]))

    @property
    def _targets(self) -> tuple[int | None, int | None]:
        return self.config.n_read, self.config.n_write

    def _norms(self, adapter: SaeLora) -> tuple[Tensor, Tensor]:
        if self.config.sparsity != "hard_concrete":
            return latent_norms(adapter)
        return self.likely_gates()

    @torch.no_grad()
    def likely_gates(self) -> tuple[Float[Tensor, " d_sae"], Float[Tensor, " d_sae"]]:
        """Gates at their most likely value; where all would close, the last one stays open."""
        gates = _stretched(self.log_alpha.sigmoid())
        last = self.log_alpha == self.log_alpha.amax(1, keepdim=True)
        read, write = torch.where(gates.amax(1, keepdim=True) > 0, gates, last.to(gates))
        return read, write


def n_on(norms: Float[Tensor, " d_sae"]) -> int:
    """Latents with at least 1 % of the largest weight."""
    return int((norms >= SMALL * norms.max()).sum())


@torch.no_grad()
def prune_(adapter: SaeLora, n_read: int | None, n_write: int | None) -> None:
    """Mask all but the strongest; None keeps those with at least 1 % of the largest weight."""
    masks = (adapter.read_mask, adapter.write_mask)
    for norms, mask, n in zip(latent_norms(adapter), masks, (n_read, n_write), strict=True):
        n = min(n_on(norms) if n is None else n, int((mask > 0).sum()))
        kept = norms.masked_fill(mask == 0, -1).topk(n).indices
        mask.zero_()[kept] = 1.0
    adapter.lora_A *= adapter.read_mask
    adapter.lora_B *= adapter.write_mask[:, None]


def _shrink_(adapter: SaeLora, by: list[float]) -> None:
    """Soft-threshold the effective weights of every latent as a group."""
    for rows, amount in ((adapter.lora_A, by[0]), (adapter.lora_B.T, by[1])):
        rows /= rows.norm(dim=1, keepdim=True).clamp(min=1e-12)
        norms = rows.norm(dim=0)
        amount = min(amount, 0.5 * float(norms.max()))  # never all of them
        rows *= (1 - amount / norms.clamp(min=1e-12)).clamp(min=0)


def _stretched(share: Tensor) -> Tensor:
    return (share * (_HIGH - _LOW) + _LOW).clamp(0, 1)
