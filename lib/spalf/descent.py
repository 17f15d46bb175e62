"""One step of SPALF: weights, whitener, multipliers, optimiser, and how they move."""

import math
from collections.abc import Callable

import torch
from jaxtyping import Float
from torch import Tensor

from lib.spalf.config import SpalfConfig
from lib.spalf.constraints import (
    drift,
    faithfulness,
    lagrangian,
    orthogonality,
)
from lib.spalf.control import ADRC, PI, Ascent, Control
from lib.spalf.stratified import Anchors, StratifiedDictionary
from lib.spalf.whitening import Whitener
from lib.sparse import SparseActs, dense_jumprelu
from lib.training.optim import Rows

Rebuild = Callable[[Float[Tensor, "n d"]], Float[Tensor, "n d"]]
KLMeasure = Callable[[Rebuild, int], Float[Tensor, ""]]

LAWS = {"pi": PI(), "adrc": ADRC(), "ascent": Ascent()}
BETAS = (0.9, 0.97)  # a short memory: the loss changes its scale as violations close
THRESHOLD_STEP = 0.5  # of log thresholds, in steps of the weights; it never falls: l0 follows r2
SLIDE_FROM = 0.5  # share of the run, if the target is reached then
SLIDE_STEP = 0.5  # of weights from there on: noise costs latents
ANCHOR_STEP = 0.1  # of anchored rows, whose drift may be a tenth of their length
ELASTICITY = 2.0  # of l0 in the error, about: the multiplier at the optimum, in l0 / l0_target
SPARSE_TOKENS, SPARSE_EVERY = 100, 4  # what orthogonality looks at
PHASE_1 = 0.7  # share of the run before which phase 2 never begins
CALM, L0_STILL = 0.03, 0.05  # phase 2: share of the run to be calm for; fall of l0 over it
KL_FILTER = 0.25  # weight of each new measurement of the KL in what its multiplier sees
KL_EVERY, KL_ENTRY, KL_SHARE = 4, 32, 0.9  # steps between, batches at entry; bound, of entry's
DEAD_SHARE = 0.04  # of the run's tokens without firing, after which a latent counts as dead
REVIVE, REVIVE_ROWS = 0.3, 4  # weight of what the dead explain; one token in so many


class Descent:
    """One SPALF dictionary and all that its next step depends on.

    `trainer` calibrates it; it moves to phase 2 by itself.
    """

    def __init__(
        self,
        config: SpalfConfig,
        d_in: int,
        anchors: Anchors | None,
        kl: KLMeasure | None,
        device: torch.device,
        **names,
    ) -> None:
        self.config, self.kl, self.n_steps = config, kl, config.n_steps
        self.anchor_ids = [] if anchors is None else anchors.ids.tolist()
        with torch.random.fork_rng(devices=range(torch.cuda.device_count())):
            torch.manual_seed(config.seed)
            rows = None if anchors is None else anchors.rows.detach().float().cpu()
            self.dictionary = StratifiedDictionary(config.d_sae, d_in, rows, **names)
        self.dictionary.to(device).train()
        d = self.dictionary
        step = config.step_size(d_in)
        self.parameters = {name: Rows(p) for name, p in d.named_parameters()}
        p = self.parameters
        self.optimizer = torch.optim.Adam(
            [
                {"params": [p["W_dec"], p["b_dec"], p["b_enc"]], "unit": 1.0, "falls": True},
                {"params": [p["W_enc"]], "unit": math.nan, "falls": True},
                {"params": [p["log_threshold"]], "unit": THRESHOLD_STEP, "falls": False},
            ],
            lr=step,
            betas=BETAS,
            fused=True,
        )
        measured = ["faithfulness"]
        measured += ["drift"] if d.n_anchored else []
        measured += ["orthogonality"] if config.orthogonality else []
        self.control = Control(
            measured,
            LAWS[config.law],
            every=config.log_every,
            capu=config.capu,
            unmet_at_limit=("faithfulness",),
        )
        self.whitener: Whitener | None = None
        self.latest = dict.fromkeys(measured, 0.0)
        """Violations, each as last measured."""
        self.since_fired = torch.zeros(config.d_sae, dtype=torch.long, device=device)
        self.numbers = dict.fromkeys(("l0", "l0_before", "fall", "slid", "kl_bound"), 0.0)
        self.numbers["phase_2_at"] = -1.0

    @property
    def phase_2_at(self) -> int | None:
        """The first step of phase 2; None before it."""
        at = int(self.numbers["phase_2_at"])
        return None if at < 0 else at

    @property
    def scale(self) -> float:
        """Raw activations, centred, times this have a mean squared norm of d_in."""
        return math.sqrt(self.dictionary.d_in / self.whitener.total_variance)

    def checked(self, batch: Tensor) -> Float[Tensor, "n d"]:
        """A batch of this width, or ValueError."""
        d_in = self.dictionary.d_in
        if batch.ndim != 2 or batch.shape[1] != d_in or not len(batch):
            raise ValueError(f"need batches [n {d_in}], n >= 1, got {tuple(batch.shape)}")
        return batch

    @property
    def encoder_unit(self) -> float:
        """Mean norm of encoder rows at the start: what their steps are relative to."""
        return self.optimizer.param_groups[1]["unit"]

    @encoder_unit.setter
    def encoder_unit(self, value: float) -> None:
        self.optimizer.param_groups[1]["unit"] = value

    def _encode(self, x: Float[Tensor, "n d"]) -> tuple[Tensor, Tensor, Tensor]:
        d = self.dictionary
        return dense_jumprelu(d.pre_acts(self.whitener(x)), d.log_threshold, d.bandwidth)

    def rebuild(self, x: Float[Tensor, "n d"]) -> Float[Tensor, "n d"]:
        """Raw activations, reconstructed, with a graph."""
        acts, _, _ = self._encode(x.to(self.dictionary.W_dec))
        return self.dictionary.decode(acts) / self.scale + self.whitener.mean

    def step(self, step: int, batch: Float[Tensor, "n d"]) -> dict[str, float]:
        """One optimiser step on raw activations; gives l0 and r2.

        Raises:
            ValueError: a batch of another width.
            FloatingPointError: the loss or its gradient is not finite; weights and optimiser are
                as they were.
        """
        d, config, x = self.dictionary, self.config, self.checked(batch)
        acts, l0, gap = self._encode(x)
        error = (x - self.whitener.mean) * self.scale - d.decode(acts)
        violations = self._violations(step, error, acts)
        loss = self._loss(step, x, error, l0.mean(), gap, violations)
        if not loss.isfinite():
            raise FloatingPointError(f"loss is {loss.item()} at step {step}")
        loss.backward()
        self._descend(step)
        seen = {name: g.item() for name, g in violations.items()}
        if "kl" in seen:
            seen["kl"] = (1 - KL_FILTER) * self.latest["kl"] + KL_FILTER * seen["kl"]
        self.latest |= seen
        names = self.control.names
        start = ELASTICITY * l0.mean().item() / config.l0_target
        self.control.observe(torch.tensor([self.latest[name] for name in names]), start)
        self.since_fired += len(x)
        self.since_fired[(acts > 0).any(0)] = 0
        if config.phase_2 and self.kl is not None and self.phase_2_at is None:
            self._maybe_enter_phase_2(step, l0.mean().item())
        r2 = 1 - (1 + self.latest["faithfulness"]) * (1 - config.r2_target)
        self._batch_size, self._seen = len(x), {"l0": l0.mean().item(), "r2": r2}
        return self._seen

    def _violations(self, step: int, error: Tensor, acts: Tensor) -> dict[str, Tensor]:
        """With a graph; those that are not measured at every step only when they are."""
        d, config = self.dictionary, self.config
        found = {"faithfulness": faithfulness(error, (1 - config.r2_target) * d.d_in)}
        if d.n_anchored:
            found["drift"] = drift(d.W_dec[: d.n_anchored], d.anchors)
        if config.orthogonality and step % SPARSE_EVERY == 0:
            few = _largest(acts[:SPARSE_TOKENS].detach(), math.ceil(4 * config.l0_target))
            found["orthogonality"] = orthogonality(few, d.W_dec, self.orthogonality_bound)
        if self.phase_2_at is not None and step % KL_EVERY == 0:
            found["kl"] = self.kl(self.rebuild, step) / self.numbers["kl_bound"] - 1
        return found

    @property
    def orthogonality_bound(self) -> float:
        """Three times what random rows have."""
        return 3 / self.dictionary.d_in

    def _loss(self, step, x, error, l0, gap, violations) -> Float[Tensor, ""]:
        config, control = self.config, self.control
        objective = l0 / config.l0_target
        if config.correction:
            late = max(0.0, 5 * step / config.n_steps - 4)
            objective = objective + late * gap.mean() / config.l0_target
        multipliers = dict(zip(control.names, control.multipliers.tolist(), strict=True))
        penalties = dict(zip(control.names, control.penalties.tolist(), strict=True))
        loss = lagrangian(objective, violations, multipliers, penalties)
        return loss + self._revival(x, error) if config.revive else loss

    def _revival(self, x: Float[Tensor, "n d"], error: Float[Tensor, "n d"]) -> Tensor:
        """Share of the error that the best dead latents leave, on some of the tokens: AuxK of Gao
        et al. 2024, arXiv:2406.04093."""
        d = self.dictionary
        dead = (self.since_fired > self.dead_after(len(x))).nonzero()[:, 0]
        if not len(dead):
            return error.new_zeros(())
        some = max(1, len(x) // REVIVE_ROWS)
        reads, error = self.whitener(x[:some]), error[:some].detach()
        pre = torch.addmm(d.b_enc[dead], reads, d.W_enc[:, dead])
        values, places = pre.topk(min(d.d_in // 2 or 1, len(dead)), dim=1, sorted=False)
        codes = torch.zeros_like(pre).scatter(1, places, values.relu())
        left = (error - codes @ d.W_dec[dead]).square().sum()
        return REVIVE * left / error.square().sum().clamp(min=1e-12)

    def dead_after(self, batch_size: int) -> int:
        """Tokens without firing after which a latent is dead."""
        return min(1_000_000, math.ceil(DEAD_SHARE * self.config.n_steps * batch_size))

    def _descend(self, step: int) -> None:
        d, config = self.dictionary, self.config
        d.project_decoder_grad_()
        norm = torch.nn.utils.clip_grad_norm_(d.parameters(), 1.0)
        if not norm.isfinite():
            d.zero_grad()
            raise FloatingPointError(f"the gradient's norm is {norm.item()} at step {step}")
        lr = config.step_size(d.d_in)
        for group in self.optimizer.param_groups:
            falls = group["falls"] or step < config.decay_starts
            factor = config.lr_factor(step) if falls else 1.0
            slides = step >= SLIDE_FROM * config.n_steps and not self.control.unmet.any()
            lower = SLIDE_STEP if slides and group["falls"] else 1.0
            group["lr"] = lr * group["unit"] * factor * lower
        before = d.W_dec[: d.n_anchored].detach().clone()
        for rows in self.parameters.values():
            rows.take_grad_()
        self.optimizer.step()
        self.optimizer.zero_grad(set_to_none=True)
        with torch.no_grad():
            d.W_dec[: d.n_anchored].lerp_(before, 1 - ANCHOR_STEP)
        d.normalize_decoder_()

    def _maybe_enter_phase_2(self, step: int, l0: float) -> None:
        """Once violations and l0 have been still for a while, before the learning rate falls.

        Not in the first seven tenths: while l0 falls, the KL is that of a denser code.
        """
        config, numbers = self.config, self.numbers
        numbers["l0"] = l0 if step == 0 else 0.95 * numbers["l0"] + 0.05 * l0
        window = math.ceil(CALM * config.n_steps)
        if (step + 1) % window == 0:
            numbers["fall"] = 1 - numbers["l0"] / max(numbers["l0_before"], 1e-9)
            numbers["l0_before"] = numbers["l0"]
        numbers["slid"] = 0.0 if self.control.unmet.any() else numbers["slid"] + 1
        early = step < PHASE_1 * config.n_steps or numbers["slid"] < 3 * window
        late = step + 1 >= config.decay_starts
        if early or late or self.control.calm < window or numbers["fall"] > L0_STILL:
            return
        with torch.no_grad():
            found = [self.kl(self.rebuild, step + i) for i in range(KL_ENTRY)]
        entry = torch.stack(found).mean().item()
        if not entry > 0:  # of a perfect reconstruction; there is nothing to hold
            return
        numbers["kl_bound"] = KL_SHARE * entry
        numbers["phase_2_at"] = float(step + 1)
        self.control.add("kl")
        self.latest["kl"] = 1 / KL_SHARE - 1


def _largest(acts: Float[Tensor, "n d_sae"], k: int) -> SparseActs:
    """At most k of each token, so that a token where all fire costs no more than others."""
    values, places = acts.topk(min(k, acts.shape[1]), dim=1, sorted=False)
    return SparseActs.of(torch.zeros_like(acts).scatter(1, places, values))
