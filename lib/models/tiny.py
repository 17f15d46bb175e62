"""The tiny models of the built-in world: trained from scratch, scored exactly, shipped.

`python -m lib.models.tiny` (or `make models`) trains both again into `data/models`.
"""

import argparse
import itertools
import json
import math
from collections import Counter
from collections.abc import Iterator
from dataclasses import asdict, dataclass
from pathlib import Path

import torch
from tqdm.auto import tqdm
from transformers import (
    Gemma2Config,
    Gemma2ForCausalLM,
    LlamaConfig,
    LlamaForCausalLM,
    PreTrainedModel,
    PreTrainedTokenizerFast,
)

from lib import paths
from lib.models.generate import answer
from lib.runtime import atomic_folder, seed_everything
from lib.world import Exchange, Reader, World, build_tokenizer


@dataclass(frozen=True, kw_only=True)
class TinyConfig:
    """Architecture and training of a tiny model."""

    architecture: str = "gemma2"
    """`gemma2` or `llama`."""
    d_model: int = 128
    n_layers: int = 4
    n_heads: int = 4
    d_mlp: int = 384
    steps: int = 10_000
    batch_size: int = 32
    """Chats a step."""
    lr: float = 4e-3
    """Of AdamW (embeddings, norms): the peak, after `warmup` steps; a cosine takes it to 0."""
    lr_hidden: float = 2e-3
    """Of Muon (all other matrices), on the same schedule."""
    warmup: int = 200
    seed: int = 0

    def __post_init__(self) -> None:
        if self.architecture not in ("gemma2", "llama"):
            raise ValueError(f"need architecture gemma2 or llama, got {self.architecture!r}")
        if self.d_model % self.n_heads:
            raise ValueError(f"need n_heads to divide d_model {self.d_model}, got {self.n_heads}")
        if self.steps <= self.warmup:
            raise ValueError(f"need steps > warmup {self.warmup}, got {self.steps}")


RECIPES = {
    "tiny-gemma2": TinyConfig(),
    "tiny-llama": TinyConfig(architecture="llama", d_model=96, n_layers=5, d_mlp=288, seed=1),
}


def build_model(config: TinyConfig, tokenizer: PreTrainedTokenizerFast) -> PreTrainedModel:
    """A freshly initialised model; seed torch before."""
    d_head = config.d_model // config.n_heads
    shape = {
        "vocab_size": len(tokenizer),
        "hidden_size": config.d_model,
        "num_hidden_layers": config.n_layers,
        "num_attention_heads": config.n_heads,
        "num_key_value_heads": config.n_heads // 2,
        "head_dim": d_head,
        "intermediate_size": config.d_mlp,
        "max_position_embeddings": 256,
        "tie_word_embeddings": True,
        "pad_token_id": tokenizer.pad_token_id,
        "bos_token_id": tokenizer.bos_token_id,
        "eos_token_id": tokenizer.eos_token_id,
    }
    if config.architecture == "llama":
        return LlamaForCausalLM(LlamaConfig(**shape))
    gemma = Gemma2Config(
        **shape, query_pre_attn_scalar=d_head, sliding_window=64, attn_implementation="eager"
    )
    return Gemma2ForCausalLM(gemma)


class Muon(torch.optim.Optimizer):
    """Steps along the orthogonal matrix nearest to the momentum, as large as Adam's would be.

    torch's own rounds to bfloat16, which takes fifteen times as long on a CPU. Source: Jordan et
    al. 2024, Muon; the size of a step Liu et al. 2025, arXiv:2502.16982.
    """

    def __init__(self, params: list[torch.nn.Parameter], lr: float) -> None:
        super().__init__(params, {"lr": lr, "momentum": 0.95, "weight_decay": 0.01})

    @torch.no_grad()
    def step(self) -> None:
        for group in self.param_groups:
            lr, momentum = group["lr"], group["momentum"]
            for p in group["params"]:
                past = self.state[p].setdefault("momentum", torch.zeros_like(p))
                past.lerp_(p.grad, 1 - momentum)
                update = orthogonal(p.grad.lerp(past, momentum))
                p.mul_(1 - lr * group["weight_decay"])
                p.add_(update, alpha=-0.2 * lr * math.sqrt(max(p.shape)))


def orthogonal(matrix: torch.Tensor, n_steps: int = 5) -> torch.Tensor:
    """About the orthogonal matrix nearest to `matrix` `[n m]`: all singular values near 1.

    Newton and Schulz's iteration with the coefficients of Jordan et al. 2024.
    """
    wide = matrix if len(matrix) <= matrix.shape[1] else matrix.T
    x = wide / wide.norm().clamp(min=1e-7)
    for _ in range(n_steps):
        square = x @ x.T
        square = torch.addmm(square, square, square, beta=-4.775, alpha=2.0315)
        x = torch.addmm(x, square, x, beta=3.4445)
    return x if wide is matrix else x.T


@torch.no_grad()
def share_case_(model: PreTrainedModel, ids: dict[str, int]) -> None:
    """Upper-case words start near their lower-case word, one direction apart: one word, not two."""
    rows = model.get_input_embeddings().weight
    apart = 0.02 * torch.randn(rows.shape[1])
    for token, i in ids.items():
        if token != token.lower() and token.lower() in ids:
            rows[i] = rows[ids[token.lower()]] + apart + rows[i] / 4


def pad_batch(
    exchanges: list[Exchange], ids: dict[str, int], pad_id: int
) -> tuple[torch.Tensor, torch.Tensor]:
    """`input_ids [batch seq]` padded on the right, and the mask of real tokens."""
    rows = [[ids[token] for token in exchange.tokens] for exchange in exchanges]
    width = max(map(len, rows))
    tokens = torch.tensor([row + [pad_id] * (width - len(row)) for row in rows])
    mask = torch.tensor([[1] * len(row) + [0] * (width - len(row)) for row in rows])
    return tokens, mask


def batches(stream: Iterator[Exchange], batch_size: int, pool: int = 16) -> Iterator[list]:
    """Endless batches of chats of similar length, in random order; `pool` batches are sorted."""
    generator = torch.Generator().manual_seed(0)
    while True:
        chats = sorted(
            (next(stream) for _ in range(pool * batch_size)), key=lambda x: len(x.tokens)
        )
        for i in torch.randperm(pool, generator=generator).tolist():
            yield chats[i * batch_size : (i + 1) * batch_size]


def token_losses(
    model: PreTrainedModel, tokens: torch.Tensor, mask: torch.Tensor
) -> tuple[torch.Tensor, torch.Tensor]:
    """Nats per predicted token `[batch seq-1]`, and the mask of real ones.

    `<|user|>`, which always follows `<bos>`, counts too.
    """
    logits = model(input_ids=tokens, attention_mask=mask).logits[:, :-1]
    losses = torch.nn.functional.cross_entropy(
        logits.transpose(1, 2).float(), tokens[:, 1:], reduction="none"
    )
    return losses, mask[:, 1:]


def train_tiny(
    config: TinyConfig, world: World, *, steps: int | None = None
) -> tuple[PreTrainedModel, PreTrainedTokenizerFast, list[float]]:
    """Train on the world's `train` split; `steps` stops early on the same schedule.

    Returns:
        The model, its tokenizer and the loss of every step in nats per token.
    """
    seed_everything(config.seed)
    tokenizer = build_tokenizer(world)
    ids = tokenizer.get_vocab()
    model = build_model(config, tokenizer).train()
    share_case_(model, ids)
    embedding = model.get_input_embeddings().weight
    hidden = [p for p in model.parameters() if p.ndim == 2 and p is not embedding]
    rest = [p for p in model.parameters() if p.ndim != 2 or p is embedding]
    adam = {"lr": config.lr, "betas": (0.9, 0.98), "weight_decay": 0.01, "fused": True}
    optimizers = [torch.optim.AdamW(rest, **adam), Muon(hidden, config.lr_hidden)]

    def factor(step: int) -> float:
        rise = min(1.0, (step + 1) / config.warmup)
        return rise * 0.5 * (1 + math.cos(math.pi * step / config.steps))

    schedules = [torch.optim.lr_scheduler.LambdaLR(it, factor) for it in optimizers]
    history = []
    stream = batches(world.stream("train", seed=config.seed), config.batch_size)
    progress = tqdm(range(steps or config.steps), desc=config.architecture, mininterval=5)
    for _ in progress:
        tokens, mask = pad_batch(next(stream), ids, tokenizer.pad_token_id)
        losses, real = token_losses(model, tokens, mask)
        loss = (losses * real).sum() / real.sum()
        model.zero_grad()
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        for part in (*optimizers, *schedules):
            part.step()
        history.append(loss.item())
        progress.set_postfix(nats=f"{history[-1]:.3f}", refresh=False)
    return model.eval(), tokenizer, history


@torch.no_grad()
def evaluate_tiny(
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerFast,
    world: World,
    *,
    n: int = 2000,
    split: str = "test",
    seed: int = 1,
) -> dict[str, float]:
    """Loss against the exact floor, and graded greedy answers, on `n` chats of a held-out split.

    Returns:
        `loss`, `floor`, `answer_loss`, `answer_floor` in nats per token (everything after
        `<bos>`; answers with their `<eos>`), and shares of answers: `language`, `style`, `topic`,
        `sums` (mathematics with the right numbers), `exact` (word for word a right answer).
    """
    exchanges = world.sample(n, split, seed=seed)
    reader, ids = Reader(world), tokenizer.get_vocab()
    sums, counts = torch.zeros(2), torch.zeros(2)
    for start in range(0, n, 100):
        chunk = exchanges[start : start + 100]
        losses, real = token_losses(model, *pad_batch(chunk, ids, tokenizer.pad_token_id))
        first = torch.tensor([x.n_prompt - 1 for x in chunk])[:, None]
        answers = real * (torch.arange(real.shape[1]) >= first)
        sums += torch.stack([(losses * real).sum(), (losses * answers).sum()])
        counts += torch.stack([real.sum(), answers.sum()])
    prompts = [x.prompt for x in exchanges]
    replies = answer(model, tokenizer, prompts, max_new_tokens=32)
    grades = [reader.grade(*pair) for pair in zip(prompts, replies, strict=True)]
    math_grades = [
        g.numbers for x, g in zip(exchanges, grades, strict=True) if x.topic == "mathematics"
    ]
    floor = [
        -sum(x.log_p_prompt + x.log_p_answer for x in exchanges),
        -sum(x.log_p_answer for x in exchanges),
    ]
    shares = {
        name: sum(getattr(g, name) for g in grades) / n
        for name in ("language", "style", "topic", "exact")
    }
    return {
        "loss": (sums[0] / counts[0]).item(),
        "floor": floor[0] / counts[0].item(),
        "answer_loss": (sums[1] / counts[1]).item(),
        "answer_floor": floor[1] / counts[1].item(),
        **shares,
        "sums": sum(math_grades) / len(math_grades) if math_grades else math.nan,
    }


def rarest_tokens(config: TinyConfig, world: World, n: int = 10) -> dict[str, int]:
    """The `n` tokens that training shows least, special ones aside, with how often it does."""
    counts = dict.fromkeys(build_tokenizer(world).get_vocab(), 0)
    chats = world.stream("train", seed=config.seed)
    for exchange in itertools.islice(chats, config.steps * config.batch_size):
        for token in exchange.tokens:
            counts[token] += 1
    words = {token: count for token, count in counts.items() if not token.startswith("<")}
    return dict(Counter(words).most_common()[: -n - 1 : -1])


def build(name: str, folder: Path | None = None) -> dict:
    """Train a shipped model, score it on every held-out split and save it with its figures."""
    world, config = World(), RECIPES[name]
    model, tokenizer, history = train_tiny(config, world)
    splits = ("test", "ood_style", "ood_phrasing")
    figures = {split: evaluate_tiny(model, tokenizer, world, split=split) for split in splits}
    record = {
        "config": asdict(config),
        "figures": figures,
        "rarest": rarest_tokens(config, world),
        "losses": history[:: config.steps // 100],
    }
    with atomic_folder(folder or paths.shipped_dir() / "models" / name) as new:
        model.save_pretrained(new)
        tokenizer.save_pretrained(new)
        (new / "training.json").write_text(json.dumps(record, indent=1) + "\n")
    return record


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("names", nargs="*", default=list(RECIPES), help="models to train")
    for chosen in parser.parse_args().names:
        print(chosen, json.dumps(build(chosen)["figures"], indent=1))
