"""How a SAE-LoRA becomes sparse: two methods, and the pruning that ends each.

| method | what it does |
|---|---|
| `l1` | the published baseline: adds `w (‖A‖₁ + ‖B‖₁)` of the raw weights |
| `topk` | keeps the largest, fewer and fewer (Zhu and Gupta 2017), under a little of `l1` |

Latents are counted and kept by their *effective* weight, of unit norm, with all ranks as one group;
the penalty is on the raw weights, whose scale the normalisation takes away again.

After a third of the steps, in which the weights outgrow their random start, the number of latents
is to fall geometrically from all of them to the target: `topk` masks the rest, and a weight of `l1`
that is not given grows while the latents over 1 % of the largest are too many. `topk` has a weight
that stays: it does no pruning, but lets weights shrink that hardly matter, so that size tells which
do.
"""

import math

import torch
from jaxtyping import Float
from torch import Tensor

from lib.adapters.sae_lora.adapter import SaeLora
from lib.adapters.sae_lora.config import SaeLoraConfig

SMALL = 0.01
"""A latent with less than this share of the largest weight counts as off."""

_WEIGHTS = {"none": 0.0, "l1": 1e-3, "topk": 3e-3}  # where the config gives none
_DENSE = 1 / 3  # share of the steps before the number of latents begins to fall
_GAIN = 0.1  # of the adapting weight, per step and unit of log


class Regularizer:
    """One training's sparsity: `penalty` and `after_step` at each step, `finish` at the end.

    `weights` (of reads and writes) and `started` are its state; a checkpoint keeps both.
    """

    def __init__(self, adapter: SaeLora, config: SaeLoraConfig) -> None:
        self.adapter, self.config = adapter, config
        start = _WEIGHTS[config.sparsity] if config.weight is None else config.weight
        self.weights = torch.full((2,), float(start), dtype=torch.float64)
        self.started = (int(adapter.read_mask.sum()), int(adapter.write_mask.sum()))
        """Latents at the start, read and written."""

    def penalty(self) -> Float[Tensor, ""] | float:
        """In nats."""
        if self.config.sparsity == "none":
            return 0.0
        w_read, w_write = self.weights.tolist()
        lora_A, lora_B = self.adapter.lora_A, self.adapter.lora_B
        return w_read * lora_A.abs().sum() + w_write * lora_B.abs().sum()

    def after_step(self, progress: float) -> None:
        """
        Args:
            progress: share of the steps that are done.
        """
        if self.config.sparsity == "topk":
            prune_(self.adapter, *self.sizes(progress))
        if self.config.sparsity == "l1" and self.config.weight is None:
            now, wanted = n_on(self.adapter), self.sizes(progress)
            for i in (0, 1):
                behind = math.log(max(now[i], 1) / wanted[i])
                self.weights[i] *= math.exp(_GAIN * max(-1.0, min(1.0, behind)))

    def finish(self) -> None:
        """All but the targets go; under `l1` without targets, as published, nothing does."""
        targets = self.config.n_read, self.config.n_write
        if self.config.sparsity != "none" and targets != (None, None):
            pairs = zip(targets, n_on(self.adapter), strict=True)
            prune_(self.adapter, *(on if wanted is None else wanted for wanted, on in pairs))

    def sizes(self, progress: float) -> list[int]:
        """Latents to read and to write by now: geometric from those of the start to the targets."""
        fallen = max(0.0, (progress - _DENSE) / (1 - _DENSE))
        targets = self.config.n_read, self.config.n_write
        return [
            round(math.exp((1 - fallen) * math.log(n) + fallen * math.log(min(n, target))))
            for n, target in zip(self.started, targets, strict=True)
        ]


def latent_norms(
    adapter: SaeLora,
) -> tuple[Float[Tensor, " d_sae"], Float[Tensor, " d_sae"]]:
    """Effective weight of each latent, read and written: its norm over ranks."""
    return adapter.read_weights.norm(dim=1), adapter.write_weights.norm(dim=0)


@torch.no_grad()
def n_on(adapter: SaeLora) -> list[int]:
    """Latents, read and written, with at least 1 % of the largest weight."""
    return [int((norms >= SMALL * norms.max()).sum()) for norms in latent_norms(adapter)]


@torch.no_grad()
def prune_(adapter: SaeLora, n_read: int, n_write: int) -> None:
    """Mask all but the strongest."""
    masks = (adapter.read_mask, adapter.write_mask)
    for norms, mask, n in zip(latent_norms(adapter), masks, (n_read, n_write), strict=True):
        n = min(n, int(mask.sum()))
        kept = norms.masked_fill(mask == 0, -1).topk(n).indices
        mask.zero_()[kept] = 1.0
    adapter.lora_A *= adapter.read_mask
    adapter.lora_B *= adapter.write_mask[:, None]
