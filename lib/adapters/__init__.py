"""Adapters that are sparse by construction."""

from lib.adapters.chat_loss import Chats, assistant_loss, held_out_loss
from lib.adapters.dense_lora import train_lora
from lib.adapters.fine_tune import fine_tune
from lib.adapters.sae_lora.adapter import SaeLora
from lib.adapters.sae_lora.config import SaeLoraConfig
from lib.adapters.sae_lora.path import sparsity_path
from lib.adapters.sae_lora.trainer import SaeLoraFit, train_sae_lora

__all__ = [
    "Chats",
    "SaeLora",
    "SaeLoraConfig",
    "SaeLoraFit",
    "assistant_loss",
    "fine_tune",
    "held_out_loss",
    "sparsity_path",
    "train_lora",
    "train_sae_lora",
]
