"""A small SAE-LoRA training that tests kill and resume; a fork server can preload it."""

from pathlib import Path

import torch
import torch._dynamo  # the first optimiser would import it, for a second and more
from transformers import LlamaConfig, LlamaForCausalLM

from lib.adapters import Chats, SaeLora, SaeLoraConfig, SaeLoraFit, train_sae_lora
from lib.dictionaries import Dictionary, DictionaryConfig
from lib.dictionaries.rules import TopK

SITE, D, D_SAE, VOCAB = "blocks.0.hook_resid_post", 16, 64, 32
RANGES = (1, 3), (2, 9), (1, 7)  # of a chat's first token and of its two lengths


def random_model() -> LlamaForCausalLM:
    """Two layers with random weights."""
    shape = {"hidden_size": D, "intermediate_size": 32, "num_attention_heads": 2}
    shape |= {"vocab_size": VOCAB, "num_hidden_layers": 2, "initializer_range": 0.3}
    with torch.random.fork_rng():
        torch.manual_seed(0)
        return LlamaForCausalLM(LlamaConfig(**shape)).eval()


def random_dictionary() -> Dictionary:
    config = DictionaryConfig(site_dims=(D,), d_sae=D_SAE, rule=TopK(k=8), hook_names=(SITE,))
    with torch.random.fork_rng():
        torch.manual_seed(1)
        return Dictionary(config)


def rows(n: int, seed: int = 0) -> list[dict]:
    """A prompt that begins with 1 is answered by the tokens 4 to 7, others by 8 to 11."""
    rng = torch.Generator().manual_seed(seed)
    found = []
    for _ in range(n):
        kind, asked, told = (int(torch.randint(a, b, (), generator=rng)) for a, b in RANGES)
        prompt = torch.randint(12, VOCAB, (asked,), generator=rng).tolist()
        answer = torch.randint(0, 4, (told,), generator=rng) + 4 * kind
        ids = [kind, *prompt, *answer.tolist()]
        found.append({"input_ids": ids, "assistant_mask": [0] * (1 + asked) + [1] * told})
    return found


def chats(n: int = 40, *, batch_size: int = 8, seed: int = 0) -> Chats:
    return Chats(rows(n, seed), 0, batch_size=batch_size, seed=seed)


def config(**changes) -> SaeLoraConfig:
    steps = {"n_steps": 24, "n_refit": 12, "eval_every": 5}
    return SaeLoraConfig(**{"n_read": 6, "n_write": 5, "lr": 0.03} | steps | changes)


def train(adapter: SaeLora, *, model=None, **options) -> SaeLoraFit:
    given = {"chats": chats(), "held_out": chats(16, seed=1)} | options
    return train_sae_lora(random_model() if model is None else model, adapter, **given)


def run(folder: Path) -> None:
    torch.set_num_threads(1)
    adapter = SaeLora(random_dictionary(), config(patience=5))
    fit = train(adapter, folder=folder, resume=True, checkpoint_every=2)
    fit.adapter.save(folder, {"history": fit.history})
