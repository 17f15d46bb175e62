"""What a SAE-LoRA is, and how it is trained."""

import math
from dataclasses import dataclass
from typing import Literal, get_args

from lib.runtime import require_at_least

Mode = Literal["add", "replace"]
Sparsity = Literal["none", "l1", "topk"]


@dataclass(frozen=True, kw_only=True)
class SaeLoraConfig:
    """Shape, sparsity and schedule of a SAE-LoRA."""

    hook_name: str = ""
    """The site, in TransformerLens's form; empty: the dictionary's own."""
    rank: int = 1
    """Pairs of a read and a write direction."""
    mode: Mode = "add"
    """`add` to the activation, or `replace` it by what the changed latents decode to."""
    keep_error: bool = True
    """In `replace` mode, add back what the dictionary misses; the same as `add`, then."""
    sparsity: Sparsity = "topk"
    """See `lib.adapters.sae_lora.sparsify`; `none` is the dense variant."""
    weight: float | None = None
    """Of the L1 penalty, in nats; None: `topk` has its own, and that of `l1` adapts until `n_read`
    and `n_write` are met."""
    n_read: int | None = 16
    """Latents read in the end, over all ranks; None: as many as the penalty leaves."""
    n_write: int | None = 16
    """Latents written in the end, over all ranks."""
    n_steps: int = 300
    """Steps in which the support is found."""
    n_refit: int = 150
    """Steps on the support alone, without a penalty; the dense variant takes them as well."""
    lr: float = 1e-2
    """Adam's, for `lora_A` and `lora_B`."""
    scale_lr: float = 0.1
    """Adam's, for `scale`."""
    accumulate: int = 1
    """Batches of chats in a step."""
    grad_clip: float = 1.0
    """Norm that the gradient is cut to."""
    eval_every: int = 50
    """Steps between measurements of the held-out loss."""
    patience: int = 0
    """Measurements without a better held-out loss before the refit ends early; 0: never."""
    seed: int = 0
    """Of the initial weights and the order of the data."""

    def __post_init__(self) -> None:
        for name, known in (("mode", Mode), ("sparsity", Sparsity)):
            if getattr(self, name) not in get_args(known):
                raise ValueError(
                    f"need {name} in {list(get_args(known))}, got {getattr(self, name)!r}"
                )
        require_at_least(1, rank=self.rank, n_steps=self.n_steps)
        require_at_least(1, accumulate=self.accumulate, eval_every=self.eval_every)
        require_at_least(0, n_refit=self.n_refit, patience=self.patience, seed=self.seed)
        for name in ("lr", "scale_lr", "grad_clip"):
            if not 0 < getattr(self, name) < math.inf:
                raise ValueError(f"need {name} > 0, got {getattr(self, name)}")
        for name in ("n_read", "n_write"):
            if getattr(self, name) is not None and getattr(self, name) < 1:
                raise ValueError(f"need {name} >= 1 or None, got {getattr(self, name)}")
        if self.weight is not None and not 0 <= self.weight < math.inf:
            raise ValueError(f"need weight >= 0 or None, got {self.weight}")
        free = [name for name in ("n_read", "n_write") if getattr(self, name) is None]
        if free and (self.sparsity == "topk" or (self.sparsity == "l1" and self.weight is None)):
            raise ValueError(
                f"need {' and '.join(free)}: sparsity {self.sparsity!r} has nothing else to go by"
            )

    def require_within(self, d_sae: int) -> None:
        """Raises ValueError where more latents are to be read or written than there are."""
        for name in ("n_read", "n_write"):
            wanted = getattr(self, name)
            if wanted is not None and wanted > d_sae:
                raise ValueError(f"need {name} <= d_sae {d_sae}, got {wanted}")
