"""Where each architecture keeps the sites of `lib.models.sites`.

Source: transformer_lens 3.9, `model_bridge/supported_architectures`.
"""

from dataclasses import dataclass, replace

from torch import nn
from transformers import PreTrainedModel


@dataclass(frozen=True, kw_only=True)
class Family:
    """Where an architecture keeps its sites: paths of modules.

    `layers` and `final_norm` start at the model, the others at a layer.
    """

    layers: str
    final_norm: str
    """Between the last block and the unembedding."""
    norm_offset: float = 0.0
    """The final norm multiplies by this plus its weight."""
    norm_centres: bool = False
    """The final norm is a LayerNorm, which subtracts the mean; else an RMSNorm."""
    z: str
    """Attention's output projection; its input is `hook_z`."""
    attn_out: str
    """Its output is what attention adds to the residual stream."""
    mid: str | None
    """The norm whose input is `hook_resid_mid`; None in parallel blocks."""
    mlp_out: str
    """Its output is what the MLP adds to the residual stream."""


LLAMA = Family(
    layers="model.layers",
    final_norm="model.norm",
    z="self_attn.o_proj",
    attn_out="self_attn",
    mid="post_attention_layernorm",
    mlp_out="mlp",
)
GEMMA = Family(
    layers="model.layers",
    final_norm="model.norm",
    norm_offset=1.0,
    z="self_attn.o_proj",
    attn_out="post_attention_layernorm",
    mid="pre_feedforward_layernorm",
    mlp_out="post_feedforward_layernorm",
)
GPT_NEOX = Family(
    layers="gpt_neox.layers",
    final_norm="gpt_neox.final_layer_norm",
    norm_centres=True,
    z="attention.dense",
    attn_out="post_attention_dropout",
    mid="post_attention_layernorm",
    mlp_out="post_mlp_dropout",
)
GPT2 = Family(
    layers="transformer.h",
    final_norm="transformer.ln_f",
    norm_centres=True,
    z="attn.c_proj",
    attn_out="attn",
    mid="ln_2",
    mlp_out="mlp",
)

FAMILIES = {
    "gemma2": GEMMA,
    "gemma3": replace(  # with vision
        GEMMA, layers="model.language_model.layers", final_norm="model.language_model.norm"
    ),
    "gemma3_text": GEMMA,
    "gpt2": GPT2,
    "gpt_neox": GPT_NEOX,
    "llama": LLAMA,
    "mistral": LLAMA,
    "qwen2": LLAMA,
    "qwen3": LLAMA,
}
"""By `config.model_type`."""

SITES = {
    "hook_resid_pre": ("layer", "input"),
    "attn.hook_z": ("z", "input"),
    "hook_attn_out": ("attn_out", "output"),
    "hook_resid_mid": ("mid", "input"),
    "hook_mlp_out": ("mlp_out", "output"),
    "hook_resid_post": ("layer", "output"),
}
"""Site: (module, side), in the order in which a block reaches them."""


def hugging_face(model: nn.Module) -> PreTrainedModel:
    """The transformers model itself, also inside PEFT, DDP or torch.compile."""
    for module in model.modules():
        if isinstance(module, PreTrainedModel):
            return module
    raise ValueError(f"need a transformers model, got {type(model).__name__}")


def family_of(base: PreTrainedModel) -> Family:
    kind = base.config.model_type
    if kind not in FAMILIES:
        raise ValueError(f"need an architecture in {sorted(FAMILIES)}, got {kind!r}")
    parallel = kind == "gpt_neox" and base.config.use_parallel_residual
    return replace(FAMILIES[kind], mid=None) if parallel else FAMILIES[kind]
