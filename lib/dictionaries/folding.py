"""A normaliser of inputs, folded into a dictionary's weights; weights to go on from."""

import copy
import hashlib
from dataclasses import replace

import torch
from jaxtyping import Float
from torch import Tensor, nn

from lib.dictionaries.config import DictionaryConfig
from lib.dictionaries.rules import BatchTopK


@torch.no_grad()
def fold_normalizer(
    d: nn.Module, mean: Float[Tensor, "d_in"], scale: Float[Tensor, "d_in"]
) -> nn.Module:
    """See `Dictionary.folded`."""
    if d.config.out_dims is not None:
        raise ValueError("cannot fold a normaliser into a transcoder; fit it without one")
    d.held_state()
    uniform = bool((scale == scale[0]).all())
    sites = scale.split(d.config.site_dims)
    by_site = all(bool((site == site[0]).all()) for site in sites)
    if d.config.code_norm == "decoupled" and not by_site:
        raise ValueError("cannot fold per_dim into decoupled norms; fit with mean_norm")
    config = replace(
        d.config,
        unit_norm_decoder=d.config.unit_norm_decoder and uniform,
        tied=d.config.tied and uniform,
        code_norm=d.config.code_norm if by_site else "none",
        site_scales=d.config.site_scales if by_site else (),
    )
    if by_site and not uniform:
        before = d.config.site_scales or [1.0] * len(sites)
        scales = (site[0].item() * old for site, old in zip(sites, before, strict=True))
        config = replace(config, site_scales=tuple(scales))
    other = copy.deepcopy(d)
    other.config = config
    if d.config.tied and not config.tied:
        other.W_enc = nn.Parameter(d.W_dec.clone().T)
    if not by_site and isinstance(config.rule, BatchTopK):  # whose ranks must stay
        norms = d.code_norms()
        other.W_enc *= norms
        other.b_enc *= norms
        other.W_dec /= norms[:, None]
    other.b_dec.copy_(mean + d.b_dec / scale)
    if not config.apply_b_dec_to_input:
        config.rule.shift_(other, (mean * scale) @ other.W_enc)
    if uniform:
        rule = config.rule.rescale_(other, 1 / scale[0].item())
        other.config = replace(config, rule=rule)
    else:
        other.W_enc *= scale[:, None]
        other.W_dec /= scale
    return other


def require_alike(begin: DictionaryConfig, config: DictionaryConfig) -> None:
    """Raises ValueError where weights of `begin` mean something else under `config`."""
    if begin.out_dims is not None:
        raise ValueError("need an autoencoder to begin with, got a transcoder")
    for name in ("d_sae", "site_dims", "out_dims", "tied", "apply_b_dec_to_input", "exclusive"):
        if getattr(begin, name) != getattr(config, name):
            raise ValueError(
                f"need {name} {getattr(begin, name)}, as of the dictionary to begin with; "
                f"got {getattr(config, name)}"
            )
    if type(begin.rule) is not type(config.rule):
        raise ValueError(f"need the rule {begin.rule} to begin with, got {config.rule}")


def content_hash(d: nn.Module) -> str:
    """SHA-256 of all weights and buffers."""
    digest = hashlib.sha256()
    for name, tensor in sorted(d.state_dict().items()):
        digest.update(name.encode())
        digest.update(
            tensor.detach().cpu().flatten().contiguous().view(torch.uint8).numpy().tobytes()
        )
    return digest.hexdigest()
