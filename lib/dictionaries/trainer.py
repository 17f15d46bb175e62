"""A dictionary in training: its weights, its optimiser, its memory of dead latents."""

from collections.abc import Mapping
from dataclasses import asdict
from itertools import accumulate

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor

from lib.activations.moments import Normalizer
from lib.dictionaries import losses
from lib.dictionaries.config import DictionaryConfig, FitConfig, config_to_json
from lib.dictionaries.dictionary import Dictionary
from lib.dictionaries.folding import content_hash, require_alike
from lib.dictionaries.losses import StepOutput
from lib.dictionaries.partition import forbidden, parts
from lib.dictionaries.recipes import Recipe
from lib.runtime import resolve_dtype
from lib.sparse import SparseActs
from lib.training import Feed, distributed
from lib.training.optim import OPTIMIZERS

LATER = {"mix": (1.0, 0.1), "site_scales": (), "exclusive": (), "k_start": None, "k_anneal": 0.3}
"""Fields that older checkpoints lack, and what stands for that."""


class DictionaryTrainer:
    """Trains one dictionary on batches `[n d]` that others may share; a `Trainable`."""

    stopped = False

    def __init__(
        self,
        config: DictionaryConfig,
        recipe: Recipe,
        fit: FitConfig,
        device: torch.device | str = "cpu",
        sites: Mapping[str, int] | None = None,
        begin: Dictionary | None = None,
    ) -> None:
        """
        Args:
            begin: on raw activations; training goes on from its weights, not from random ones.
            sites: hook name → width of the batches' columns, in order; the dictionary reads those
                of its own `hook_names`. None: it reads all columns.

        Raises:
            ValueError: a rule that differs from the recipe's, a normaliser for a transcoder, hook
                names that are not among the sites, sites of other widths, a loss term that means
                nothing for the dictionary, or a `begin` of another shape or rule.
        """
        if config.rule != recipe.rule:
            raise ValueError(
                f"need the recipe's rule {recipe.rule}, got {config.rule}; "
                "make the config with recipe.dictionary(...)"
            )
        for term in recipe.terms:
            losses.check(term, config)
        if config.out_dims is not None and fit.normalize != "none":
            raise ValueError("need normalize 'none' for a transcoder")
        if begin is not None:
            require_alike(begin.config, config)
        self.recipe, self.fit, self.n_steps, self.begin = recipe, fit, fit.n_steps, begin
        self._sites, self._columns = sites, _columns(config, sites)
        with torch.random.fork_rng(devices=range(torch.cuda.device_count())):
            torch.manual_seed(fit.seed)
            self.dictionary = Dictionary(config).to(device).train()
        self.optimizer = OPTIMIZERS[fit.moments](self.dictionary, fit.betas)
        self.generator = torch.Generator().manual_seed(fit.seed)
        self.tokens_since_fired = torch.zeros(config.d_sae, dtype=torch.long, device=device)
        self.normalizer = Normalizer.fit("none", torch.zeros(1, config.d_in), config.site_dims)
        self._metrics: dict[str, float] = {}

    @torch.no_grad()
    def start(self, feed: Feed) -> None:
        """Calibrate on the first batch: the normaliser, and `b_dec` at the mean."""
        config = self.dictionary.config
        x, target = self._split(distributed.gather_rows(self._part(feed.peek())))
        self._set_normalizer(Normalizer.fit(self.fit.normalize, x, config.site_dims))
        if self.begin is not None:
            place = self.begin.b_dec.device
            mean, scale = self.normalizer.mean.to(place), self.normalizer.scale.to(place)
            begin = self.begin.folded(-mean * scale, 1 / scale)  # x = (y + mean * scale) / scale
            self.dictionary.load_state_dict(begin.state_dict())
            return
        target = self.normalizer(target) if config.out_dims is None else target
        self.dictionary.b_dec.copy_(target.mean(0))

    def step(self, step: int, batch: Float[Tensor, "n d"]) -> StepOutput:
        """One optimiser step.

        Raises:
            ValueError: a batch of another width.
            FloatingPointError: the loss or its gradient is not finite; parameters and optimiser
                are as they were.
        """
        d, fit, dtype = self.dictionary, self.fit, resolve_dtype(self.fit.dtype)
        batch = self._part(batch)
        with torch.autocast(batch.device.type, dtype, enabled=dtype != torch.float32):
            out = self._forward(batch, step / fit.n_steps)
            loss = torch.stack([term(out) for term in self.recipe.terms]).sum()
        value = distributed.mean(loss.detach())
        if not value.isfinite():
            raise FloatingPointError(f"loss is {value.item()} at step {step}")
        (loss / distributed.world_size()).backward()
        self._descend(step)
        d.normalize_decoder_()  # after the step, or rows drift off the sphere
        self.tokens_since_fired += len(out.x) * distributed.world_size()
        self.tokens_since_fired[fired(out.acts)] = 0
        distributed.least_(self.tokens_since_fired)  # 0 for what fired on any rank
        resample = self.recipe.resample
        if resample and step + 1 in [round(share * fit.n_steps) for share in resample.shares]:
            self._resample(out)
        if (step + 1) % fit.log_every == 0 or step + 1 == fit.n_steps:
            self._metrics = self.metrics(out) | {
                "tokens": (step + 1) * len(out.x) * distributed.world_size()
            }
        return out

    def _descend(self, step: int) -> None:
        """Project, clip, step; gradients are gone afterwards."""
        d, fit = self.dictionary, self.fit
        for parameter in d.parameters():
            if parameter.grad is not None and parameter.grad.is_sparse:  # of AuxK alone
                dense = torch.empty_like(parameter).copy_(parameter.grad.to_dense())
                parameter.grad = dense  # in memory as the parameter is
        distributed.sum_gradients_(d.parameters())
        decoder = d.project_decoder_grad_()
        others = [p.grad for p in d.parameters() if p is not d.W_dec and p.grad is not None]
        norms = [torch.linalg.vector_norm(grad, dim=0).norm() for grad in others]
        norm = torch.stack([decoder, *norms]).norm()
        if not norm.isfinite():
            d.zero_grad()
            raise FloatingPointError(f"the gradient's norm is {norm.item()} at step {step}")
        lr = (self.recipe.lr or fit.lr) * fit.lr_factor(step)
        self.optimizer.step(lr, (norm / fit.grad_clip).clamp(min=1))

    @torch.no_grad()
    def metrics(self, out: StepOutput) -> dict[str, float]:
        """`fvu`, `l0` and the share of `dead` latents, of one batch."""
        variance = (out.target - distributed.mean(out.target.mean(0))).square().sum()
        values = out.acts.values if isinstance(out.acts, SparseActs) else out.acts
        l0 = distributed.mean((values > 0).sum().double()) / len(out.x)
        fvu = distributed.mean(out.error.square().sum()) / distributed.mean(variance)
        dead = len(out.dead) / self.dictionary.d_sae
        return {"fvu": fvu.item(), "l0": l0.item(), "dead": dead} | self._of_parts(out)

    def _of_parts(self, out: StepOutput) -> dict[str, float]:
        """`l0` and the share of dead latents of each part of a partition."""
        d, found = self.dictionary, {}
        if not d.config.exclusive:
            return found
        acts = out.acts if isinstance(out.acts, SparseActs) else SparseActs.of(out.acts)
        latents = acts.indices[acts.values > 0]
        for name, part in parts(d.config.exclusive, d.d_sae).items():
            size = max(1, part.stop - part.start)
            inside = ((ids >= part.start) & (ids < part.stop) for ids in (latents, out.dead))
            firings, dead = (distributed.mean(mask.sum().double()).item() for mask in inside)
            found |= {f"l0 {name}": firings / len(out.x), f"dead {name}": dead / size}
        return found

    def report(self, n_done: int) -> dict | None:
        """`tokens`, `fvu`, `l0`, `dead` of one batch every `FitConfig.log_every` steps."""
        due = n_done % self.fit.log_every == 0 or n_done == self.n_steps
        return self._metrics if due else None

    def summary(self, entry: dict) -> str:
        return f"fvu {entry['fvu']:.3f} l0 {entry['l0']:.1f} dead {entry['dead']:.0%}"

    def finished(self) -> Dictionary:
        """The dictionary on raw activations, in eval mode."""
        if self.dictionary.config.out_dims is not None or self.fit.normalize == "none":
            return self.dictionary.eval()
        return self.dictionary.folded(self.normalizer.mean, self.normalizer.scale).eval()

    def identity(self) -> dict:
        optimisation = asdict(self.fit)
        for harmless in ("log_every", "checkpoint_every"):
            del optimisation[harmless]
        config, recipe = config_to_json(self.dictionary.config), self.recipe.to_json()
        for saved in (config, config["rule"], recipe["rule"]):  # checkpoints from before these
            for name, default in LATER.items():
                if saved.get(name, default) == default:
                    saved.pop(name, None)
        made_of = {"fit": optimisation, "dictionary": config, "recipe": recipe}
        if self.begin is not None:
            made_of["begin"] = content_hash(self.begin)
        return made_of

    def facts(self) -> dict:
        return {}

    def state(self) -> dict[str, dict[str, Tensor]]:
        trainer = {
            "tokens_since_fired": self.tokens_since_fired,
            "generator": self.generator.get_state(),
            "normalizer.mean": self.normalizer.mean,
            "normalizer.scale": self.normalizer.scale,
        }
        model = self.dictionary.state_dict()
        return {"model": model, "optimizer": self.optimizer.state(), "trainer": trainer}

    def load_state(self, parts: dict[str, dict[str, Tensor]]) -> None:
        self.dictionary.load_state_dict(parts["model"])
        self.optimizer.load_state(parts["optimizer"])
        trainer = parts["trainer"]
        self.tokens_since_fired.copy_(trainer["tokens_since_fired"])
        self.generator.set_state(trainer["generator"].cpu())
        self._set_normalizer(Normalizer(trainer["normalizer.mean"], trainer["normalizer.scale"]))

    def _set_normalizer(self, normalizer: Normalizer) -> None:
        self.normalizer = normalizer.to(self.tokens_since_fired.device)

    def _dead(self) -> Int[Tensor, "n_dead"]:
        return (self.tokens_since_fired >= self.fit.dead_after).nonzero().flatten()

    def _part(self, batch: Tensor) -> Float[Tensor, "n d"]:
        """The columns that this dictionary reads."""
        if batch.ndim != 2 or not len(batch):
            raise ValueError(f"need batches [n d], n >= 1, got {tuple(batch.shape)}")
        config = self.dictionary.config
        width = config.d_in + (config.d_out if config.out_dims is not None else 0)
        if self._columns is not None:
            if batch.shape[1] != sum(self._sites.values()):
                raise ValueError(
                    f"need batches of width {sum(self._sites.values())}, got {batch.shape[1]}"
                )
            parts = [batch[:, column] for column in self._columns]
            batch = parts[0].contiguous() if len(parts) == 1 else torch.cat(parts, dim=1)
        if batch.shape[1] != width:
            raise ValueError(f"need activations of width {width}, got {batch.shape[1]}")
        return batch

    def _split(self, batch: Float[Tensor, "n d"]) -> tuple[Tensor, Tensor]:
        """Input and target: one and the same, or a transcoder's two halves."""
        config = self.dictionary.config
        if config.out_dims is None:
            return batch, batch
        x, target = batch.split([config.d_in, config.d_out], dim=1)
        return x, target

    def _forward(self, batch: Float[Tensor, "n d"], t: float) -> StepOutput:
        d = self.dictionary
        x, target = self._split(batch)
        x = x if self.fit.normalize == "none" else self.normalizer(x)
        target = x if d.config.out_dims is None else target
        d.progress = t
        codes = d.encode_training(x)
        return StepOutput(d, x, target, d.decode(codes.acts, codes.bounds), codes, self._dead(), t)

    @torch.no_grad()
    def _resample(self, out: StepOutput) -> None:
        """Give dead latents the directions of tokens drawn by their squared loss."""
        d, dead = self.dictionary, self._dead()
        if not len(dead):
            return
        chances = distributed.gather_rows(out.error.square().sum(1)).square().double().cpu()
        drawn = chances.multinomial(len(dead), replacement=True, generator=self.generator)
        rows = distributed.gather_rows(out.target)[drawn.to(dead.device)] - d.b_dec
        for latents, columns in forbidden(d.config.exclusive, d.config.site_dims):
            rows[(dead >= latents.start) & (dead < latents.stop), columns] = 0
        rows = rows / rows.norm(dim=1, keepdim=True).clamp(min=1e-12)
        alive = torch.ones(d.d_sae, dtype=torch.bool, device=dead.device)
        alive[dead] = False
        size = d.encoder_rows[alive].norm(dim=1).mean() if alive.any() else 1.0
        d.W_dec[dead] = rows
        d.b_enc[dead] = 0
        if not d.config.tied and d.d_in == d.d_out:
            d.W_enc[:, dead] = (rows * size * self.recipe.resample.encoder_scale).T
        for name in ("W_dec", "b_enc") if d.config.tied else ("W_dec", "b_enc", "W_enc"):
            self.optimizer.forget(name, dead)
        self.tokens_since_fired[dead] = 0


def fired(
    acts: SparseActs | Float[Tensor, "n d_sae"],
) -> Int[Tensor, "n_fired"] | Bool[Tensor, "d_sae"]:
    """Which latents were above zero on any token; an index."""
    if isinstance(acts, SparseActs):
        return acts.indices[acts.values > 0]
    return (acts > 0).any(0)


def _columns(config: DictionaryConfig, sites: Mapping[str, int] | None) -> list[slice] | None:
    """Where in a batch a dictionary's sites stand."""
    if sites is None:
        return None
    ends = dict(zip(sites, accumulate(sites.values()), strict=True))
    missing = [hook for hook in config.hook_names if hook not in sites]
    if len(set(config.hook_names)) < len(config.hook_names):
        raise ValueError(f"need each hook name once, got {config.hook_names}")
    if missing or not config.hook_names:
        raise ValueError(f"need hook names among {list(sites)}, got {config.hook_names}")
    found = tuple(sites[hook] for hook in config.hook_names)
    if config.out_dims is None and found != config.site_dims:
        raise ValueError(f"need site_dims {found} of these sites, got {config.site_dims}")
    return [slice(ends[hook] - sites[hook], ends[hook]) for hook in config.hook_names]
