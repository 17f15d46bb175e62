"""Adapters that are sparse by construction."""

from lib.adapters.config import SaeLoraConfig
from lib.adapters.lora import train_lora
from lib.adapters.loss import Chats, assistant_loss, held_out_loss
from lib.adapters.sae_lora import SaeLora
from lib.adapters.sweeps import sparsity_path, weight_sweep
from lib.adapters.train import SaeLoraFit, train_sae_lora

__all__ = [
    "Chats",
    "SaeLora",
    "SaeLoraConfig",
    "SaeLoraFit",
    "assistant_loss",
    "held_out_loss",
    "sparsity_path",
    "train_lora",
    "train_sae_lora",
    "weight_sweep",
]
