"""SPALF as a `Trainable`: calibration, reports, state."""

import math
from collections.abc import Iterable
from dataclasses import asdict

import torch
from torch import Tensor

from lib.activations.buffer import Buffer
from lib.activations.prefetch import Prefetch
from lib.dictionaries.dictionary import Dictionary
from lib.spalf.descent import Descent
from lib.spalf.whitening import Whitener, calibrate
from lib.training import Feed, checkpoint

SAMPLE = 4096  # tokens at least that thresholds are calibrated on
DISTINCT = 8  # tokens a dimension at least that a repeating source must hold
BAND = 0.01  # of r2 round its target


class SpalfTrainer(Descent):
    """Trains one SPALF dictionary on batches `[n d_in]` that others may share; a `Trainable`.

    It calibrates on batches of its own, before the first step.
    """

    stopped = False

    def start(self, feed: Feed) -> None:
        """Whitener, rows, thresholds and bounds, from the stream.

        Raises:
            ValueError: too few tokens, or too few different ones.
        """
        batches = (self.checked(batch) for batch in feed)
        moments = calibrate(batches)
        self.whitener = (Whitener.fit if self.config.whiten else Whitener.centring)(moments)
        needed = max(SAMPLE, math.ceil(16 * self.config.d_sae / self.config.l0_target))
        sample: list[Tensor] = []
        while sum(map(len, sample)) < needed:
            batch = next(batches, None)
            if batch is None:
                got = sum(map(len, sample))
                raise ValueError(
                    f"too few tokens to calibrate: need {needed} for thresholds, got {got}"
                )
            sample.append(batch)
        x = torch.cat(sample)
        self.dictionary.start(x, self.whitener, self.scale, self.config.l0_target)
        self.encoder_unit = self.dictionary.W_enc.norm(dim=0).mean().item()
        _require_distinct(feed.stream, self.dictionary.d_in)

    def report(self, n_done: int) -> dict | None:
        """See `SpalfFit.history`."""
        if n_done % self.config.log_every and n_done != self.n_steps:
            return None
        control, step, kl = self.control, n_done - 1, self.latest.get("kl")
        dead = (self.since_fired > self.dead_after(self._batch_size)).float().mean().item()
        return {
            "tokens": n_done * self._batch_size,
            "lr": self.optimizer.param_groups[0]["lr"],
            "phase": 1 if self.phase_2_at is None or step < self.phase_2_at else 2,
            **self._seen,
            "kl": None if kl is None else (1 + kl) * self.numbers["kl_bound"],
            "dead": dead,
            "violations": {name: self.latest[name] for name in control.names},
            "multipliers": dict(zip(control.names, control.multipliers.tolist(), strict=True)),
            "penalties": dict(zip(control.names, control.penalties.tolist(), strict=True)),
        }

    def summary(self, entry: dict) -> str:
        """Constraints by their first letter."""
        lam, rho = entry["multipliers"], entry["penalties"]
        each = (
            f"{name[0]} {g:+.2f} λ {lam[name]:.1f} ρ {rho[name]:.1f}"
            for name, g in entry["violations"].items()
        )
        return f"l0 {entry['l0']:.1f} r2 {entry['r2']:.3f} | " + " | ".join(each)

    def finished(self) -> Dictionary:
        """The dictionary on raw activations, in eval mode."""
        return self.dictionary.folded_out(self.whitener, self.scale)

    @property
    def smoothed_r2(self) -> float:
        """From the fast average of log(1 + g), which is log(mse / bound)."""
        return 1 - self.control.fast[0].exp().item() * (1 - self.config.r2_target)

    @property
    def reached(self) -> bool:
        """Whether r2, averaged over the last ten steps or so, met its target to within 0.01."""
        return abs(self.smoothed_r2 - self.config.r2_target) <= BAND

    def identity(self) -> dict:
        described = asdict(self.config)
        del described["checkpoint_every"]
        shape = {"d_in": self.dictionary.d_in, "anchor_ids": self.anchor_ids}
        return {"config": described, **shape, "patched_kl": self.kl is not None}

    def facts(self) -> dict:
        return {"phase_2_at": self.phase_2_at, "reached": self.reached}

    def state(self) -> checkpoint.Parts:
        numbers = self.numbers | {f"latest.{name}": g for name, g in self.latest.items()}
        control = {f"law.{key}": value for key, value in self.control.state_dict().items()}
        control |= {key: torch.tensor(x, dtype=torch.float64) for key, x in numbers.items()}
        moments = {
            f"{name}.{key}": value
            for name, rows in self.parameters.items()
            for key, value in self.optimizer.state[rows].items()
        }
        return {
            "model": self.dictionary.state_dict(),
            "whitener": self.whitener.state_dict(),
            "control": control | {"since_fired": self.since_fired},
            "optimizer": moments | {"encoder_unit": torch.tensor(self.encoder_unit)},
        }

    def load_state(self, parts: checkpoint.Parts) -> None:
        control, device = parts["control"], self.since_fired.device
        self.dictionary.load_state_dict(parts["model"])
        self.whitener = Whitener.from_state(parts["whitener"]).to(device)
        self.numbers = {name: control[name].item() for name in self.numbers}
        if self.phase_2_at is not None:
            self.control.add("kl")
            self.latest["kl"] = 0.0
        self.latest = {name: control[f"latest.{name}"].item() for name in self.latest}
        law = {k.removeprefix("law."): v for k, v in control.items() if k.startswith("law.")}
        self.control.load_state_dict(law)
        self.since_fired.copy_(control["since_fired"])
        self.encoder_unit = parts["optimizer"]["encoder_unit"].item()
        for name, rows in self.parameters.items():
            self.optimizer.state[rows] = {
                key: parts["optimizer"][f"{name}.{key}"].to(device).clone()
                for key in ("step", "exp_avg", "exp_avg_sq")
            }


def _require_distinct(stream: Iterable[Tensor], d_in: int) -> None:
    """A buffer starts its source again when it ends, so it never runs short of tokens itself."""
    buffer = stream.buffer if isinstance(stream, Prefetch) else stream
    if not isinstance(buffer, Buffer) or not buffer.epoch:
        return
    n, needed = buffer.n_served // buffer.epoch, DISTINCT * d_in
    if n < needed:
        raise ValueError(f"too few tokens to calibrate: need {needed} different ones, got {n}")
