"""One dictionary in training: its weights, its optimiser, its memory of dead latents."""

import time

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor

from lib.activations.normalize import Normalizer
from lib.dictionaries import parallel
from lib.dictionaries.config import DictionaryConfig
from lib.dictionaries.dictionary import Dictionary
from lib.dictionaries.fit_config import FitConfig
from lib.dictionaries.kernels import SparseActs
from lib.dictionaries.losses import Pass
from lib.dictionaries.memory import Memory
from lib.dictionaries.optimizer import OPTIMIZERS
from lib.dictionaries.recipes import Recipe
from lib.runtime import resolve_dtype


class Trainee:
    """Trains one dictionary on batches that others may share, and `memory` with them."""

    def __init__(
        self,
        config: DictionaryConfig,
        recipe: Recipe,
        fit: FitConfig,
        device: torch.device,
        memory: Memory | None = None,
    ) -> None:
        self.recipe, self.fit, self.memory = recipe, fit, memory or Memory()
        with torch.random.fork_rng(devices=range(torch.cuda.device_count())):
            torch.manual_seed(fit.seed)
            self.dictionary = Dictionary(config).to(device).train()
        self.optimizer = OPTIMIZERS[fit.moments](self.dictionary, fit)
        self.generator = torch.Generator().manual_seed(fit.seed)
        self.tokens_since_fired = torch.zeros(config.d_sae, dtype=torch.long, device=device)
        self.normalizer = Normalizer.fit("none", torch.zeros(1, config.d_in), config.site_dims)
        self.seconds = 0.0

    @torch.no_grad()
    def start(self, batch: Float[Tensor, "n d"]) -> None:
        """Calibrate on the first batch: the normaliser, and `b_dec` at the mean."""
        config = self.dictionary.config
        x, target = self._split(parallel.gather_rows(batch))
        self._set_normalizer(Normalizer.fit(self.fit.normalize, x, config.site_dims))
        target = self.normalizer(target) if config.out_dims is None else target
        self.dictionary.b_dec.copy_(target.mean(0))

    def step(self, step: int, batch: Float[Tensor, "n d"]) -> Pass:
        """One optimiser step.

        Raises:
            FloatingPointError: the loss or its gradient is not finite; parameters and optimiser
                are as they were.
        """
        began = self._now()
        d, fit = self.dictionary, self.fit
        dtype = resolve_dtype(fit.dtype)
        with torch.autocast(batch.device.type, dtype, enabled=dtype != torch.float32):
            out = self._forward(batch, step / fit.n_steps)
            loss = torch.stack([term(out) for term in self.recipe.terms]).sum()
        value = parallel.mean(loss.detach())
        if not value.isfinite():
            raise FloatingPointError(f"loss is {value.item()} at step {step}")
        (loss / parallel.world_size()).backward()
        for parameter in d.parameters():
            if parameter.grad is not None and parameter.grad.is_sparse:  # of AuxK alone
                parameter.grad = parameter.grad.to_dense()
        parallel.sum_gradients_(d.parameters())
        decoder = d.project_decoder_grad_()
        others = [p.grad for p in d.parameters() if p is not d.W_dec and p.grad is not None]
        norms = [torch.linalg.vector_norm(grad, dim=-1).norm() for grad in others]
        norm = torch.stack([decoder, *norms]).norm()
        if not norm.isfinite():
            self.optimizer.zero_grad()
            raise FloatingPointError(f"the gradient's norm is {norm.item()} at step {step}")
        lr = (self.recipe.lr or fit.lr) * fit.lr_factor(step)
        self.optimizer.step(lr, (norm / fit.grad_clip).clamp(min=1))
        for parameter in d.parameters():
            self.memory.give(parameter.grad)  # to the next step, or the next dictionary
        self.optimizer.zero_grad()
        d.normalize_decoder_()  # after the step, or rows drift off the sphere
        self.tokens_since_fired += len(out.x) * parallel.world_size()
        self.tokens_since_fired[fired(out.acts)] = 0
        parallel.least_(self.tokens_since_fired)  # 0 for what fired on any rank
        resample = self.recipe.resample
        if resample and step + 1 in [round(share * fit.n_steps) for share in resample.shares]:
            self._resample(out)
        self.seconds += self._now() - began
        return out

    @torch.no_grad()
    def metrics(self, out: Pass) -> dict[str, float]:
        """`fvu`, `l0` and the share of `dead` latents, of one batch."""
        variance = (out.target - parallel.mean(out.target.mean(0))).square().sum()
        values = out.acts.values if isinstance(out.acts, SparseActs) else out.acts
        l0 = parallel.mean((values > 0).sum().double()) / len(out.x)
        return {
            "fvu": (parallel.mean(out.error.square().sum()) / parallel.mean(variance)).item(),
            "l0": l0.item(),
            "dead": len(out.dead) / self.dictionary.d_sae,
        }

    def finished(self) -> Dictionary:
        """The dictionary on raw activations, in eval mode."""
        if self.dictionary.config.out_dims is not None or self.fit.normalize == "none":
            return self.dictionary.eval()
        return self.dictionary.folded(self.normalizer.mean, self.normalizer.scale).eval()

    def state(self) -> dict[str, Tensor]:
        """Everything that the next step depends on."""
        weights = self.dictionary.state_dict() | dict(self.dictionary.named_buffers())
        tensors = {f"weights.{k}": v for k, v in weights.items()}
        tensors |= {f"optimizer.{k}": v for k, v in self.optimizer.state().items()}
        return tensors | {
            "tokens_since_fired": self.tokens_since_fired,
            "generator": self.generator.get_state(),
            "normalizer.mean": self.normalizer.mean,
            "normalizer.scale": self.normalizer.scale,
            "seconds": torch.tensor(self.seconds, dtype=torch.float64),
        }

    def load_state(self, tensors: dict[str, Tensor]) -> None:
        """Go on from `state`."""
        weights = _below("weights.", tensors)
        for name, buffer in self.dictionary.named_buffers():  # those that no file keeps among them
            buffer.copy_(weights[name])
        self.dictionary.load_state_dict({k: weights[k] for k in self.dictionary.state_dict()})
        self.optimizer.load_state(_below("optimizer.", tensors))
        self.tokens_since_fired.copy_(tensors["tokens_since_fired"])
        self.generator.set_state(tensors["generator"].cpu())
        self._set_normalizer(Normalizer(tensors["normalizer.mean"], tensors["normalizer.scale"]))
        self.seconds = tensors["seconds"].item()

    def _set_normalizer(self, normalizer: Normalizer) -> None:
        device = self.tokens_since_fired.device
        self.normalizer = Normalizer(normalizer.mean.to(device), normalizer.scale.to(device))

    def _now(self) -> float:
        """Seconds, once the device has done what it was given."""
        if self.tokens_since_fired.is_cuda:
            stream = torch.cuda.current_stream(self.tokens_since_fired.device)
            stream.synchronize()  # not those on which batches are made ahead
        return time.perf_counter()

    def _dead(self) -> Int[Tensor, "n_dead"]:
        return (self.tokens_since_fired >= self.fit.dead_after).nonzero().flatten()

    def _split(self, batch: Float[Tensor, "n d"]) -> tuple[Tensor, Tensor]:
        """Input and target: one and the same, or a transcoder's two halves."""
        config = self.dictionary.config
        if config.out_dims is None:
            return batch, batch
        x, target = batch.split([config.d_in, config.d_out], dim=1)
        return x, target

    def _forward(self, batch: Float[Tensor, "n d"], t: float) -> Pass:
        d = self.dictionary
        x, target = self._split(batch)
        x = x if self.fit.normalize == "none" else self.normalizer(x)
        target = x if d.config.out_dims is None else target
        acts, l0, pre = d.training_acts(x, whole=self.recipe.whole, memory=self.memory)
        sparse = isinstance(acts, SparseActs)
        x_hat = d.decode_sparse(acts, self.memory) if sparse else d.decode(acts)
        return Pass(d, x, target, x_hat, acts, pre, self._dead(), t, l0)

    @torch.no_grad()
    def _resample(self, out: Pass) -> None:
        """Give dead latents the directions of tokens drawn by their squared loss."""
        d, dead = self.dictionary, self._dead()
        if not len(dead):
            return
        chances = parallel.gather_rows(out.error.square().sum(1)).square().double().cpu()
        drawn = chances.multinomial(len(dead), replacement=True, generator=self.generator)
        rows = parallel.gather_rows(out.target)[drawn.to(dead.device)] - d.b_dec
        rows = rows / rows.norm(dim=1, keepdim=True).clamp(min=1e-12)
        alive = torch.ones(d.d_sae, dtype=torch.bool, device=dead.device)
        alive[dead] = False
        size = d.encoder_rows[alive].norm(dim=1).mean() if alive.any() else 1.0
        d.W_dec[dead] = rows
        if d.encoder is not None and d.d_in == d.d_out:
            d.encoder[dead] = rows * size * self.recipe.resample.encoder_scale
        d.b_enc[dead] = 0
        for parameter in (d.W_dec, d.encoder, d.b_enc):
            if parameter is not None:
                self.optimizer.forget(parameter, dead)
        self.tokens_since_fired[dead] = 0


def _below(prefix: str, tensors: dict[str, Tensor]) -> dict[str, Tensor]:
    return {k.removeprefix(prefix): v for k, v in tensors.items() if k.startswith(prefix)}


def fired(
    acts: SparseActs | Float[Tensor, "n d_sae"],
) -> Int[Tensor, "n_fired"] | Bool[Tensor, "d_sae"]:
    """Which latents were above zero on any token; an index."""
    if isinstance(acts, SparseActs):
        return acts.indices[acts.values > 0]
    return (acts > 0).any(0)
