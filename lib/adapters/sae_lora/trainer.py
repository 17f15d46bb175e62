"""Train a SAE-LoRA: find a sparse support, then refit on it.

In the first `n_steps` the support is found by one of the methods in `lib.adapters.sae_lora.sparsify`;
then all but the strongest latents are masked, and `n_refit` steps without a penalty fit what is
left, at a learning rate that falls to 0. Model and dictionary are frozen throughout.
"""

import contextlib
import math
import time
from collections.abc import Callable, Iterator
from dataclasses import asdict, dataclass, replace
from pathlib import Path

import torch
from torch import Tensor, nn
from torch.nn.utils import clip_grad_norm_
from tqdm.auto import tqdm

from lib.activations.harvest import weights_fingerprint
from lib.adapters.chat_loss import Chats, assistant_loss, held_out_loss
from lib.adapters.sae_lora.adapter import SaeLora
from lib.adapters.sae_lora.checkpoints import load_checkpoint, save_checkpoint
from lib.adapters.sae_lora.config import SaeLoraConfig
from lib.adapters.sae_lora.sparsify import Regularizer, latent_norms, n_on
from lib.models.modes import frozen, require_eval
from lib.runtime import require_writable
from lib.training.checkpoint import clear_checkpoints, sweep

WARMUP = 10
"""Steps in which the learning rate rises, at the start of each phase."""


@dataclass
class SaeLoraFit:
    """A trained adapter and how it got there."""

    adapter: SaeLora
    history: list[dict]
    """Every `eval_every` steps and at the end of a phase: `step`, `phase` (`search`, `refit`),
    `loss` and `held_out` (nats per token of the assistant), `n_read`, `n_write` (latents with at
    least 1 % of the largest weight), `weight_read`, `weight_write`, `seconds`."""
    seconds: float


class Training:
    """The state of a run: what a checkpoint holds."""

    def __init__(self, adapter: SaeLora, config: SaeLoraConfig) -> None:
        self.adapter, self.config = adapter, config
        self.regularizer = Regularizer(adapter, config)
        groups = [
            {"params": [adapter.lora_A, adapter.lora_B], "lr": config.lr},
            {"params": [adapter.scale], "lr": config.scale_lr},
        ]
        if self.regularizer.log_alpha.numel():
            groups.append({"params": [self.regularizer.log_alpha], "lr": config.scale_lr})
        self.optimizer = torch.optim.Adam(groups, betas=(0.9, 0.99))
        self._rates = [group["lr"] for group in groups]
        self.step = 0
        self.history: list[dict] = []
        self.seconds = 0.0
        self.best: tuple[float, dict[str, Tensor]] | None = None
        """Held-out loss of the refit's best measurement, and the weights there."""
        self.since_best = 0

    @property
    def phase(self) -> str:
        return "search" if self.step < self.config.n_steps else "refit"

    @property
    def n_total(self) -> int:
        return self.config.n_steps + self.config.n_refit

    def set_rate_(self) -> float:
        """Constant while the support is found, then a cosine to 0; returns the weights' rate."""
        c = self.config
        start = 0 if self.phase == "search" else c.n_steps
        rise = min(1.0, (self.step - start + 1) / WARMUP)
        fall = 1.0
        if self.phase == "refit":
            fall = 0.5 * (1 + math.cos(math.pi * (self.step - start) / c.n_refit))
        for group, rate in zip(self.optimizer.param_groups, self._rates, strict=True):
            group["lr"] = rate * rise * fall
        return self.optimizer.param_groups[0]["lr"]

    def weights(self) -> dict[str, Tensor]:
        own = ("lora_A", "lora_B", "scale", "read_mask", "write_mask")
        return {name: getattr(self.adapter, name).detach().clone() for name in own}

    @torch.no_grad()
    def restore_(self, weights: dict[str, Tensor]) -> None:
        for name, value in weights.items():
            getattr(self.adapter, name).copy_(value)


def train_sae_lora(
    model: nn.Module,
    adapter: SaeLora,
    chats: Chats,
    held_out: Chats,
    *,
    config: SaeLoraConfig | None = None,
    folder: str | Path | None = None,
    resume: bool = False,
    checkpoint_every: int = 0,
    on_eval: Callable[[list[dict]], None] | None = None,
) -> SaeLoraFit:
    """Train `adapter` in place, from wherever its weights are; on a CPU bit for bit repeatable.

    Args:
        config: of this training, where it is not the adapter's own; it becomes that.
        folder: for checkpoints, which are removed when the training ends; `loras/<name>`, to be
            followed by `adapter.save` there.
        resume: go on from the newest checkpoint in `folder`, if there is one; otherwise those
            there are removed.
        checkpoint_every: steps between checkpoints; 0: none.
        on_eval: gets the history whenever it has grown.

    Raises:
        ValueError: a model in training mode or of another width; a checkpoint of another config;
            checkpoints or resuming without a folder.
        FloatingPointError: the loss is not finite; the step is named.
    """
    config = replace(config or adapter.config, hook_name=adapter.config.hook_name)
    _check(model, adapter, config)
    adapter.config = config  # which a saved adapter names
    if folder is None and (resume or checkpoint_every):
        raise ValueError("resume and checkpoint_every need a folder, got none")
    run, identity = Training(adapter, config), {}
    if folder is not None:
        folder = require_writable(Path(folder))
        identity = _identity(model, adapter, chats, held_out)
        sweep(folder, ())
        if resume:
            load_checkpoint(folder, run, identity)
        else:
            clear_checkpoints(folder)
    progress = tqdm(total=run.n_total, initial=run.step, desc="SAE-LoRA", mininterval=2)
    with _without_gates(adapter), frozen(model), adapter.attached(model), progress:
        began = time.perf_counter() - run.seconds
        while run.step < run.n_total:
            loss = _step(model, run, chats)
            run.step += 1
            progress.update()
            run.seconds = time.perf_counter() - began
            if run.step == config.n_steps:
                run.regularizer.finish(adapter)
                run.optimizer.state.clear()  # moments of latents that are gone
            if run.step % config.eval_every == 0 or run.step in (config.n_steps, run.n_total):
                _measure(model, run, held_out, loss)
                progress.set_postfix(held_out=f"{run.history[-1]['held_out']:.3f}", refresh=False)
                if on_eval is not None:
                    on_eval(run.history)
                if _stops_early(run):
                    break
            if checkpoint_every and run.step % checkpoint_every == 0:
                save_checkpoint(folder, run, identity)
    if run.best is not None:
        run.restore_(run.best[1])
    if folder is not None:
        clear_checkpoints(folder)
    return SaeLoraFit(adapter, run.history, run.seconds)


def _identity(model: nn.Module, adapter: SaeLora, chats: Chats, held_out: Chats) -> dict:
    """What a checkpoint must agree with to be gone on from."""
    return {
        "config": asdict(adapter.config),
        "chats": chats.fingerprint,
        "n_chats": len(chats),
        "batch_size": chats.batch_size,
        "data_seed": chats.seed,
        "n_held_out": len(held_out),
        "model": weights_fingerprint(model),
        "dictionary": [float(p.double().sum()) for p in adapter.dictionary.parameters()],
    }


@contextlib.contextmanager
def _without_gates(adapter: SaeLora) -> Iterator[None]:
    """Gates that are learned in here do not outlive it, whatever happens."""
    try:
        yield
    finally:
        adapter.gates = None


def _step(model: nn.Module, run: Training, chats: Chats) -> float:
    """One step of Adam; returns its loss in nats per token, without the penalty."""
    adapter, config = run.adapter, run.config
    rate = run.set_rate_()
    searching = run.phase == "search"
    run.optimizer.zero_grad(set_to_none=True)
    first = run.step * config.accumulate
    batches = [chats.batch(first + i) for i in range(config.accumulate)]
    n_tokens = sum(int((batch["labels"][:, 1:] >= 0).sum()) for batch in batches)
    total = 0.0
    for i, batch in enumerate(batches):
        if searching:  # the same gates for every batch of the step, with a graph of its own
            noise = torch.Generator().manual_seed(config.seed * 1_000_003 + run.step)
            run.regularizer.before_step(adapter, noise)
        loss = assistant_loss(model, batch)[0] / n_tokens
        total += loss.item()
        if searching and i == 0:
            loss = loss + run.regularizer.penalty(adapter)
        loss.backward()
    if not math.isfinite(total):
        raise FloatingPointError(f"the loss is {total} at step {run.step}; use a smaller lr")
    parameters = [p for group in run.optimizer.param_groups for p in group["params"]]
    clip_grad_norm_(parameters, config.grad_clip)
    run.optimizer.step()
    if searching:
        done = (run.step + 1) / config.n_steps
        run.regularizer.after_step(adapter, rate, done)
    return total


def _measure(model: nn.Module, run: Training, held_out: Chats, loss: float) -> None:
    if run.adapter.gates is not None:  # not the last draw, but what the gates have come to
        run.adapter.gates = run.regularizer.likely_gates()
    with torch.no_grad():
        norms = [n_on(x) for x in latent_norms(run.adapter)]
    entry = {
        "step": run.step,
        "phase": "search" if run.step <= run.config.n_steps else "refit",
        "loss": loss,
        "held_out": held_out_loss(model, held_out),
        "n_read": norms[0],
        "n_write": norms[1],
        "weight_read": run.regularizer.weights[0].item(),
        "weight_write": run.regularizer.weights[1].item(),
        "seconds": run.seconds,
    }
    run.history.append(entry)


def _stops_early(run: Training) -> bool:
    """Keeps the best weights of a refit, and says whether it has waited long enough."""
    searched = run.step >= run.config.n_steps
    if not run.config.patience or not searched:
        return False
    loss = run.history[-1]["held_out"]
    if run.best is None or loss < run.best[0]:
        run.best, run.since_best = (loss, run.weights()), 0
    else:
        run.since_best += 1
    return run.since_best >= run.config.patience


def _check(model: nn.Module, adapter: SaeLora, config: SaeLoraConfig) -> None:
    require_eval(model)
    if config.rank != adapter.rank or config.mode != adapter.config.mode:
        raise ValueError(
            f"need a config of rank {adapter.rank} and mode {adapter.config.mode}, like the "
            f"adapter's, got {config.rank} and {config.mode}"
        )
    config.require_within(adapter.d_sae)
