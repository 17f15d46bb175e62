"""Several trainings of a SAE-LoRA, each from where the last one ended: a curve in one run."""

from collections.abc import Sequence
from dataclasses import replace
from typing import Any

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
    sizes: Sequence[int],
    config: SaeLoraConfig,
) -> dict[int, SaeLoraFit]:
    """From a trained adapter to ever smaller supports of `size` reads and `size` writes.

    Each starts from the one before, so a whole curve costs little more than its smallest point;
    `adapter` itself stays as it is.

    Args:
        config: of each stage; its `n_read` and `n_write` are set to the stage's size.

    Raises:
        ValueError: sizes that do not fall, or a config of the dense variant, which has no size.
    """
    if config.sparsity == "none":
        raise ValueError("need a sparsity method for a path of sizes, got 'none'")
    if not sizes or list(sizes) != sorted(set(sizes), reverse=True):
        raise ValueError(f"need sizes that fall, got {list(sizes)}")
    stages = {size: replace(config, n_read=size, n_write=size) for size in sizes}
    return _one_after_another(model, adapter, chats, held_out, stages)


def weight_path(
    model: nn.Module,
    adapter: SaeLora,
    chats: Chats,
    held_out: Chats,
    weights: Sequence[float],
    config: SaeLoraConfig,
) -> dict[float, SaeLoraFit]:
    """From a trained adapter under an ever heavier penalty, without a target: each from the last.

    Args:
        config: of each stage, with a sparsity that has a weight; weight and targets are set here.

    Raises:
        ValueError: weights that do not rise, or a method without a weight.
    """
    if not config.penalised:
        raise ValueError(f"need a sparsity with a weight to sweep, got {config.sparsity!r}")
    if not weights or list(weights) != sorted(set(weights)):
        raise ValueError(f"need weights that rise, got {list(weights)}")
    free = {"n_read": None, "n_write": None}
    stages = {weight: replace(config, weight=weight, **free) for weight in weights}
    return _one_after_another(model, adapter, chats, held_out, stages)


def _one_after_another(
    model: nn.Module,
    adapter: SaeLora,
    chats: Chats,
    held_out: Chats,
    stages: dict[Any, SaeLoraConfig],
) -> dict[Any, SaeLoraFit]:
    fits = {}
    for name, stage in stages.items():
        adapter = adapter.restricted()
        fits[name] = train_sae_lora(model, adapter, chats, held_out, config=stage)
    return fits
