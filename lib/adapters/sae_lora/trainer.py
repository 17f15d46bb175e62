"""Train a SAE-LoRA: find a sparse support, then refit on it.

In the first `n_steps` the support is found by one of the methods in `sparsify`; then all but the
strongest latents are masked, and `n_refit` steps without a penalty fit what is left, at a learning
rate that falls to 0. Model and dictionary are frozen throughout.
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

from lib import training
from lib.adapters.chat_loss import Chats, ChatStream, assistant_loss, held_out_loss
from lib.adapters.sae_lora.adapter import SaeLora
from lib.adapters.sae_lora.config import SaeLoraConfig
from lib.adapters.sae_lora.sparsify import Regularizer, n_on
from lib.models.load import weights_fingerprint
from lib.models.sites import frozen, require_eval
from lib.training import checkpoint, distributed

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


class SaeLoraTrainer:
    """Trains one adapter in place on `ChatStream` batches; a `Trainable`."""

    def __init__(
        self,
        model: nn.Module,
        adapter: SaeLora,
        chats: Chats,
        held_out: Chats,
        config: SaeLoraConfig | None = None,
    ) -> None:
        """
        Args:
            config: of this training, where it is not the adapter's own; it becomes that.

        Raises:
            ValueError: a model in training mode; a config of another rank or mode.
        """
        config = replace(config or adapter.config, hook_name=adapter.config.hook_name)
        require_eval(model)
        config.require_within(adapter.d_sae)
        if config.rank != adapter.rank or config.mode != adapter.config.mode:
            raise ValueError(
                f"need a config of rank {adapter.rank} and mode {adapter.config.mode}, like the "
                f"adapter's, got {config.rank} and {config.mode}"
            )
        adapter.config = config  # which a saved adapter names
        self.model, self.adapter, self.config = model, adapter, config
        self.chats, self.held_out = chats, held_out
        self.n_steps, self.stopped = config.n_steps + config.n_refit, False
        self.regularizer = Regularizer(adapter, config)
        groups = [
            {"params": [adapter.lora_A, adapter.lora_B], "lr": config.lr},
            {"params": [adapter.scale], "lr": config.scale_lr},
        ]
        self.optimizer = torch.optim.Adam(groups, betas=(0.9, 0.99))
        self.seconds = self.loss = 0.0
        self.best: tuple[float, dict[str, Tensor]] | None = None
        """Held-out loss of the refit's best measurement, and the weights there."""
        self.since_best = 0

    def start(self, feed: training.Feed) -> None:
        """Nothing is to be calibrated."""

    def step(self, step: int, batch: list[dict[str, Tensor]]) -> None:
        """One step of Adam.

        Raises:
            FloatingPointError: the loss is not finite.
        """
        began = time.perf_counter()
        config, searching = self.config, step < self.config.n_steps
        self._set_rate_(step)
        self.optimizer.zero_grad(set_to_none=True)
        n_tokens = sum(int((part["labels"][:, 1:] >= 0).sum()) for part in batch)
        self.loss = 0.0
        with self._running():
            for i, part in enumerate(batch):
                loss = assistant_loss(self.model, part)[0] / n_tokens
                self.loss += loss.item()
                if searching and i == 0:
                    loss = loss + self.regularizer.penalty()
                loss.backward()
        if not math.isfinite(self.loss):
            raise FloatingPointError(f"the loss is {self.loss} at step {step}; use a smaller lr")
        clip_grad_norm_(self._parameters(), config.grad_clip)
        self.optimizer.step()
        if searching:
            self.regularizer.after_step((step + 1) / config.n_steps)
        if step + 1 == config.n_steps:
            self.regularizer.finish()
            self.optimizer.state.clear()  # moments of latents that are gone
        self.seconds += time.perf_counter() - began

    def report(self, n_done: int) -> dict | None:
        """See `SaeLoraFit.history`; also decides whether to stop early."""
        config = self.config
        if n_done % config.eval_every and n_done not in (config.n_steps, self.n_steps):
            return None
        began = time.perf_counter()
        with torch.no_grad(), self._running():
            loss = held_out_loss(self.model, self.held_out)
        if config.patience and n_done >= config.n_steps:
            if self.best is None or loss < self.best[0]:
                self.best, self.since_best = (loss, self.weights()), 0
            else:
                self.since_best += 1
            self.stopped = self.since_best >= config.patience
        n_read, n_write = n_on(self.adapter)
        self.seconds += time.perf_counter() - began
        return {
            "phase": "search" if n_done <= config.n_steps else "refit",
            "loss": self.loss,
            "held_out": loss,
            "n_read": n_read,
            "n_write": n_write,
            "weight_read": self.regularizer.weights[0].item(),
            "weight_write": self.regularizer.weights[1].item(),
            "seconds": self.seconds,
        }

    def summary(self, entry: dict) -> str:
        return f"held out {entry['held_out']:.3f}"

    def finished(self) -> SaeLora:
        """The adapter, at its best measurement where patience watched over it."""
        if self.best is not None:
            self._restore_(self.best[1])
        return self.adapter

    def identity(self) -> dict:
        return {
            "config": asdict(self.config),
            "chats": self.chats.fingerprint,
            "n_chats": len(self.chats),
            "batch_size": self.chats.batch_size,
            "data_seed": self.chats.seed,
            "n_held_out": len(self.held_out),
            "model": weights_fingerprint(self.model),
            "dictionary": [float(p.double().sum()) for p in self.adapter.dictionary.parameters()],
        }

    def facts(self) -> dict:
        return {}

    def weights(self) -> dict[str, Tensor]:
        own = ("lora_A", "lora_B", "scale", "read_mask", "write_mask")
        return {name: getattr(self.adapter, name).detach().clone() for name in own}

    def state(self) -> checkpoint.Parts:
        regularizer, adam = self.regularizer, {}
        for i, parameter in enumerate(self._parameters()):
            found = self.optimizer.state.get(parameter, {})
            adam |= {f"{i}.{key}": value for key, value in found.items()}
        numbers = [self.seconds, self.loss, self.since_best, self.stopped]
        trainer = {
            "weights": regularizer.weights,
            "started": torch.tensor(regularizer.started),
            "numbers": torch.tensor(numbers, dtype=torch.float64),
        }
        parts = {"model": self.weights(), "optimizer": adam, "trainer": trainer}
        if self.best is not None:
            loss = torch.tensor(self.best[0], dtype=torch.float64)
            parts["best"] = self.best[1] | {"held_out": loss}
        return parts

    def load_state(self, parts: checkpoint.Parts) -> None:
        trainer, regularizer = parts["trainer"], self.regularizer
        self._restore_(parts["model"])
        regularizer.weights.copy_(trainer["weights"])
        regularizer.started = tuple(trainer["started"].tolist())
        self.seconds, self.loss, since_best, stopped = trainer["numbers"].tolist()
        self.since_best, self.stopped = int(since_best), bool(stopped)
        for i, parameter in enumerate(self._parameters()):
            for key in ("step", "exp_avg", "exp_avg_sq"):
                if f"{i}.{key}" in parts["optimizer"]:
                    value = parts["optimizer"][f"{i}.{key}"]
                    device = "cpu" if key == "step" else parameter.device
                    self.optimizer.state[parameter][key] = value.to(device)
        if "best" in parts:
            weights = dict(parts["best"])
            self.best = weights.pop("held_out").item(), weights

    @contextlib.contextmanager
    def _running(self) -> Iterator[None]:
        with frozen(self.model), self.adapter.attached(self.model):
            yield

    def _parameters(self) -> list[Tensor]:
        return [p for group in self.optimizer.param_groups for p in group["params"]]

    def _set_rate_(self, step: int) -> None:
        """Constant while the support is found, then a cosine to 0."""
        c, searching = self.config, step < self.config.n_steps
        since = step if searching else step - c.n_steps
        rise = min(1.0, (since + 1) / WARMUP)
        fall = 1.0 if searching else 0.5 * (1 + math.cos(math.pi * since / c.n_refit))
        for group, rate in zip(self.optimizer.param_groups, (c.lr, c.scale_lr), strict=True):
            group["lr"] = rate * rise * fall

    @torch.no_grad()
    def _restore_(self, weights: dict[str, Tensor]) -> None:
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
            checkpoints or resuming without a folder; several processes.
        FloatingPointError: the loss is not finite; the step is named.
    """
    distributed.require_one_process("SAE-LoRA")
    trainer = SaeLoraTrainer(model, adapter, chats, held_out, config)
    with adapter.attached(model):  # a width that does not fit is found before anything
        pass
    history, _ = training.fit(
        {"SAE-LoRA": trainer},
        ChatStream(chats, trainer.config.accumulate),
        folder=folder,
        resume=resume,
        checkpoint_every=checkpoint_every,
        on_log=lambda entries: on_eval(entries["SAE-LoRA"]) if on_eval else None,
    )
    trainer.finished()
    if folder is not None:
        checkpoint.clear(Path(folder))
    return SaeLoraFit(adapter, history["SAE-LoRA"], trainer.seconds)
