"""What a dictionary is, and how it is optimised."""

import importlib.util
import math
from dataclasses import dataclass, fields

import torch
from jaxtyping import Float
from torch import Tensor

from lib.activations.moments import KINDS
from lib.dictionaries.rules import BatchTopK, Rule, rule_from_json, rule_to_json
from lib.runtime import require_at_least

CODE_NORMS = ("decoder", "crosscoder", "mixed", "decoupled", "none")
SCHEDULES = ("constant", "linear", "cosine")


@dataclass(frozen=True, kw_only=True)
class DictionaryConfig:
    """Shape and rule of a dictionary; saved beside its weights."""

    site_dims: tuple[int, ...]
    """Width of each site that is read, in order."""
    d_sae: int
    """Number of latents."""
    rule: Rule
    hook_names: tuple[str, ...] = ()
    """Name of each site, when known."""
    out_dims: tuple[int, ...] | None = None
    """Transcoder: widths of the sites that are written instead of those read."""
    tied: bool = False
    """Encode with the decoder's rows."""
    unit_norm_decoder: bool = True
    """Decoder rows (all sites together) are kept at norm 1."""
    apply_b_dec_to_input: bool = True
    """Subtract `b_dec` from the input before encoding."""
    code_norm: str = "decoder"
    """Factor that makes a latent's activation comparable with others': `decoder` its row's
    norm, `crosscoder` the sum over sites of its rows' norms (Lindsey et al. 2024), `mixed` a sum
    of both weighted by `mix`, `decoupled` each site's norm, by which each site selects for itself
    (BatchTopK), `none` 1."""
    mix: tuple[float, float] = (1.0, 0.1)
    """Weights of `decoder` and `crosscoder` in `mixed`."""
    site_scales: tuple[float, ...] = ()
    """What each site was multiplied by in training, when known: norms are taken in that unit."""
    exclusive: tuple[int, ...] = ()
    """Dedicated feature crosscoder: how many latents belong to each site alone and neither read
    nor write another. They come first, in the order of the sites; the others are shared."""
    model_name: str = ""

    def __post_init__(self) -> None:
        for name in ("site_dims", "out_dims"):
            dims = getattr(self, name)
            if dims is not None and (not dims or min(dims) < 1):
                raise ValueError(f"need {name} to be widths of at least 1, got {dims}")
        require_at_least(1, d_sae=self.d_sae)
        k = getattr(self.rule, "k_start", None) or getattr(self.rule, "k", 1)
        if k > self.d_sae:
            raise ValueError(f"need k <= d_sae {self.d_sae}, got k {k}")
        if self.hook_names and len(self.hook_names) != len(self.site_dims):
            raise ValueError(
                f"need a hook name for each of {len(self.site_dims)} sites, got {self.hook_names}"
            )
        if self.code_norm not in CODE_NORMS:
            raise ValueError(f"need code_norm in {CODE_NORMS}, got {self.code_norm!r}")
        n_sites = len(self.out_dims or self.site_dims)
        if self.site_scales and (len(self.site_scales) != n_sites or min(self.site_scales) <= 0):
            raise ValueError(f"need {n_sites} site_scales > 0, got {self.site_scales}")
        decoupled = self.code_norm == "decoupled"
        if decoupled and (type(self.rule) is not BatchTopK or self.out_dims is not None):
            raise ValueError(
                f"need the rule BatchTopK and no transcoder for decoupled norms, got {self.rule}"
            )
        if len(self.mix) != 2 or min(self.mix) < 0 or not 0 < sum(self.mix) < math.inf:
            raise ValueError(f"need two weights >= 0 as mix, not both 0; got {self.mix}")
        if self.exclusive:
            if self.out_dims is not None or n_sites < 2:
                raise ValueError("need exclusive latents in a crosscoder of two or more sites")
            if len(self.exclusive) != n_sites or min(self.exclusive) < 0:
                raise ValueError(f"need {n_sites} numbers >= 0 as exclusive, got {self.exclusive}")
            if sum(self.exclusive) >= self.d_sae:
                raise ValueError(
                    f"need shared latents among {self.d_sae}, got exclusive {self.exclusive}"
                )
        other = self.out_dims is not None and self.out_dims != self.site_dims
        if other and (self.tied or self.apply_b_dec_to_input):
            raise ValueError(
                "a transcoder between other widths needs tied=False and "
                f"apply_b_dec_to_input=False, got {self.tied} and {self.apply_b_dec_to_input}"
            )

    @property
    def d_in(self) -> int:
        return sum(self.site_dims)

    @property
    def d_out(self) -> int:
        return sum(self.out_dims or self.site_dims)


def site_norms(
    config: DictionaryConfig, W_dec: Float[Tensor, "d_sae d_out"]
) -> Float[Tensor, "n_sites d_sae"]:
    """Norm of each latent's row at each site, in the unit of training."""
    dims = config.out_dims or config.site_dims
    scales = config.site_scales or [1.0] * len(dims)
    parts = zip(W_dec.split(dims, dim=1), scales, strict=True)
    return torch.stack([part.norm(dim=1) * scale for part, scale in parts])


def code_norms(
    config: DictionaryConfig, W_dec: Float[Tensor, "d_sae d_out"]
) -> Float[Tensor, "d_sae"]:
    """See `DictionaryConfig.code_norm`; of `decoupled` the sum over sites."""
    kind, dims = config.code_norm, config.out_dims or config.site_dims
    plain = kind == "decoder" or (len(dims) == 1 and kind != "mixed")
    if kind == "none" or (plain and config.unit_norm_decoder):
        return W_dec.new_ones(config.d_sae)
    if kind == "decoder" and not config.site_scales:
        return W_dec.norm(dim=1)
    norms = site_norms(config, W_dec)
    if kind in ("crosscoder", "decoupled"):
        return norms.sum(0)
    whole = norms.norm(dim=0)
    return whole if kind == "decoder" else config.mix[0] * whole + config.mix[1] * norms.sum(0)


def config_to_json(config: DictionaryConfig) -> dict:
    plain = {field.name: getattr(config, field.name) for field in fields(config)}
    return {**plain, "rule": rule_to_json(config.rule)}


def config_from_json(saved: dict) -> DictionaryConfig:
    tuples = {
        name: tuple(saved[name]) if saved[name] is not None else None
        for name in ("site_dims", "hook_names", "out_dims")
    }
    later = ("mix", "site_scales", "exclusive")  # which older files lack
    tuples |= {name: tuple(saved[name]) for name in later if name in saved}
    return DictionaryConfig(**{**saved, **tuples, "rule": rule_from_json(saved["rule"])})


@dataclass(frozen=True, kw_only=True)
class FitConfig:
    """Optimisation that all dictionaries of a run share."""

    n_steps: int
    lr: float = 1e-3
    """Adam's, between warm-up and decay."""
    lr_schedule: str = "linear"
    """How it falls to 0 over the last `lr_decay`: `linear`, `cosine`, or `constant` (it does not).
    """
    lr_warmup: float = 0.02
    """Share of the steps over which it rises from 0."""
    lr_decay: float = 0.3
    betas: tuple[float, float] = (0.9, 0.999)
    grad_clip: float = 1.0
    """Largest norm of a dictionary's gradient."""
    normalize: str = "mean_norm"
    """What inputs go through, and what is folded into the weights at the end: `mean_norm` scales
    each site to mean norm sqrt(d), `per_dim` centres and scales each dimension, `none`."""
    dead_after: int = 1_000_000
    """Tokens without firing after which a latent counts as dead."""
    dtype: str = "float32"
    """Of the large products: float32, or bfloat16, meant for GPUs (most CPUs are slower with it).
    Weights, their gradients and the loss are in float32 with either."""
    moments: str = "float32"
    """Of Adam: float32, or 8bit, a quarter of that, which needs the extra `gpu` (bitsandbytes)."""
    seed: int = 0
    """Of initial weights and of resampling; the stream has its own."""
    log_every: int = 20
    """Steps between entries of the history."""
    checkpoint_every: int = 0
    """Steps between checkpoints; 0: only when done."""

    def __post_init__(self) -> None:
        require_at_least(1, n_steps=self.n_steps, log_every=self.log_every)
        require_at_least(1, dead_after=self.dead_after)
        require_at_least(0, checkpoint_every=self.checkpoint_every)
        for name in ("lr", "grad_clip"):
            if not (getattr(self, name) > 0 and math.isfinite(getattr(self, name))):
                raise ValueError(f"need {name} > 0 and finite, got {getattr(self, name)}")
        for name in ("lr_warmup", "lr_decay"):
            if not 0 <= getattr(self, name) <= 1:
                raise ValueError(f"need {name} in [0, 1], got {getattr(self, name)}")
        if not all(0 <= beta < 1 for beta in self.betas):
            raise ValueError(f"need betas in [0, 1), got {self.betas}")
        if self.lr_schedule not in SCHEDULES:
            raise ValueError(f"need lr_schedule in {SCHEDULES}, got {self.lr_schedule!r}")
        if self.dtype not in ("float32", "bfloat16"):
            raise ValueError(f"need dtype float32 or bfloat16, got {self.dtype!r}")
        if self.moments not in ("float32", "8bit"):
            raise ValueError(f"need moments float32 or 8bit, got {self.moments!r}")
        if self.moments == "8bit" and importlib.util.find_spec("bitsandbytes") is None:
            raise ImportError("moments='8bit' needs bitsandbytes: pip install '.[gpu]'")
        if self.normalize not in KINDS:
            raise ValueError(f"need normalize in {KINDS}, got {self.normalize!r}")

    def lr_factor(self, step: int) -> float:
        """What the learning rate is multiplied by at `step`, from 0."""
        rise = min(1.0, (step + 1) / max(1.0, self.lr_warmup * self.n_steps))
        left = (self.n_steps - step) / max(1.0, self.lr_decay * self.n_steps)
        if self.lr_schedule == "constant" or left >= 1:
            return rise
        return rise * (left if self.lr_schedule == "linear" else math.sin(math.pi * left / 2) ** 2)
