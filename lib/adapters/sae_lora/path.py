"""Several trainings of a SAE-LoRA, each from where the last one ended: a curve in one run."""

from collections.abc import Sequence
from dataclasses import replace

from torch import nn

from lib.adapters.chat_loss import Chats
from lib.adapters.sae_lora.adapter import SaeLora
from lib.adapters.sae_lora.config import SaeLoraConfig
from lib.adapters.sae_lora.trainer import SaeLoraFit, train_sae_lora


def sparsity_path(
    model: nn.Module,
    adapter: SaeLora,
    chats: Chats,
    held_out: Chats,
    values: Sequence[int | float],
    config: SaeLoraConfig,
) -> dict[int | float, SaeLoraFit]:
    """From a trained adapter to ever sparser ones, by the value that each was trained with.

    Each starts from the one before, so a whole curve costs little more than its last point;
    `adapter` itself stays as it is.

    Args:
        values: under `topk` falling numbers of latents, of reads as of writes; under `l1` rising
            weights of the penalty, without a target.
        config: of each stage, where `values` do not say otherwise.

    Raises:
        ValueError: values that do not fall or rise so, or a config of the dense variant.
    """
    if config.sparsity == "none":
        raise ValueError("need a sparsity method for a path, got 'none'")
    falling, fits = config.sparsity == "topk", {}
    if not values or list(values) != sorted(set(values), reverse=falling):
        raise ValueError(f"need values that {'fall' if falling else 'rise'}, got {list(values)}")
    for value in values:
        size, weight = (value, config.weight) if falling else (None, value)
        stage = replace(config, n_read=size, n_write=size, weight=weight)
        adapter = adapter.restricted()
        fits[value] = train_sae_lora(model, adapter, chats, held_out, config=stage)
    return fits
