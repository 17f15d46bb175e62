"""Multipliers and penalties that follow the violations of constraints `g <= 0`.

A law is a small frozen object: `update` gives the next multipliers λ, not yet clipped, and `start`
what it remembers beside λ. It sees `v`, the filtered violation, and `dv`, how far `v` moved since
the law last ran. λ rests only where `v = 0`, or at 0 while `v < 0`.
"""

import math
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from jaxtyping import Bool, Float
from torch import Tensor

from lib.runtime import require_at_least

TOLERANCE = 0.1  # of a settled constraint's filtered violation: an active one hovers round 0
LOG_RANGE = 3.0  # log(1 + g) is clipped to ± this before it is filtered
REFERENCE = 0.1  # root mean square of g at which the adaptive penalty is rho
RHO_RANGE = (0.1, 10.0)

Values = Float[Tensor, " m"]
State = dict[str, Tensor]


def _require_positive(name: str, value: float, most: float = math.inf) -> None:
    if not (0 < value <= most and math.isfinite(value)):
        raise ValueError(f"need a finite {name} in (0, {most:g}], got {value}")


@dataclass(frozen=True, kw_only=True)
class PI:
    """`Δλ = (1 + λ) (gain · v + damping · Δv)`: steps in proportion to 1 + λ, so that a multiplier
    of 50 moves as readily as one of 0.5. Sohrabi et al. 2024, arXiv:2406.04558, with Δλ additive.
    """

    gain: float = 0.3
    """Pull of a standing violation, per update."""
    damping: float = 1.5
    """Pull of a moving one: with less a slow plant overshoots, with twice it a fast one swings."""

    def __post_init__(self) -> None:
        _require_positive("gain", self.gain)
        if not (self.damping >= 0 and math.isfinite(self.damping)):
            raise ValueError(f"need a finite damping >= 0, got {self.damping}")

    def start(self, lam: Values) -> State:
        return {}

    def update(self, lam: Values, v: Values, dv: Values, state: State) -> Values:
        return lam + (1 + lam) * (self.gain * v + self.damping * dv)


@dataclass(frozen=True, kw_only=True)
class ADRC:
    """Active disturbance rejection: an observer estimates the multiplier `f` that would hold `v`
    still, and λ is set a little above it while `v > 0`, a little below while `v < 0`.

    For a plant `Δv = b (f - λ)`, `b = 1 / (1 + λ)`: `f ← (1 - ω) f + ω (Δv / b + λ)`, then
    `λ = f + gain · v / b`. The observer sees λ as applied, clipped, so nothing winds up at the
    bounds. With ω = 1 this is `PI` with a damping of 1. The form `Δλ = 2ω Δv + ω² v - f` whose f
    tracks -λ is unstable: λ is added to itself, so it grows without end, for slack constraints too.
    Source: Gao 2003, Scaling and bandwidth-parameterization based controller tuning.
    """

    gain: float = 0.3
    """Pull of a standing violation, per update."""
    bandwidth: float = 0.8
    """ω: the share of each new estimate that enters the observer, per update."""

    def __post_init__(self) -> None:
        _require_positive("gain", self.gain)
        _require_positive("bandwidth", self.bandwidth, 1.0)

    def start(self, lam: Values) -> State:
        return {"holding": lam.clone()}

    def update(self, lam: Values, v: Values, dv: Values, state: State) -> Values:
        """Also moves `state["holding"]`, the estimate f."""
        state["holding"] = state["holding"].lerp((1 + lam) * dv + lam, self.bandwidth)
        return state["holding"] + self.gain * (1 + lam) * v


@dataclass(frozen=True, kw_only=True)
class Ascent:
    """`Δλ = rate · v`: gradient ascent on the dual. No damping, so it swings where λ acts late."""

    rate: float = 0.5

    def __post_init__(self) -> None:
        _require_positive("rate", self.rate)

    def start(self, lam: Values) -> State:
        return {}

    def update(self, lam: Values, v: Values, dv: Values, state: State) -> Values:
        return lam + self.rate * v


Law = PI | ADRC | Ascent


class Control:
    """Filters violations at two rates, lets a law move the multipliers, adapts the penalties.

    `log(1 + g)`, clipped, enters a fast and a slow moving average; a constraint's first observation
    sets both. Every `every` steps the law sees the fast one. All is float64 on the CPU.

    Penalties are `rho · REFERENCE / rms(g)` within `RHO_RANGE`, at every step: they fall while a
    violation is large, which bounds their share of the gradient, and rise as it closes. Basir and
    Senocak 2023, arXiv:2306.04904; CAPU itself (arXiv:2508.15695) lets them only rise.

    Args:
        every, limit: steps between updates of the multipliers, and how large these may become.
        fast, slow: weight of the past, per step, in each average; the penalties' one has `slow`.
        capu: adapt the penalties; otherwise they stay at `rho`.
        unmet_at_limit: constraints whose multiplier stays at `limit` until they are first met (by
            the fast average); the law then takes over, from `observe`'s `start`.

    Raises ValueError for a value out of range or a name that comes twice.
    """

    def __init__(
        self,
        names: Sequence[str],
        law: Law,
        *,
        every: int = 10,
        limit: float = 100.0,
        fast: float = 0.9,
        slow: float = 0.99,
        capu: bool = True,
        rho: float = 1.0,
        unmet_at_limit: Sequence[str] = (),
    ) -> None:
        require_at_least(1, every=every)
        _require_positive("limit", limit)
        if not 0 <= fast <= slow < 1:
            raise ValueError(f"need 0 <= fast <= slow < 1, got fast {fast}, slow {slow}")
        if not RHO_RANGE[0] <= rho <= RHO_RANGE[1]:
            raise ValueError(f"need rho in {list(RHO_RANGE)}, got {rho}")
        self.law, self.every, self.limit, self.capu, self.rho = law, every, limit, capu, rho
        self.decay = {"fast": fast, "slow": slow, "square": slow}
        self.names: tuple[str, ...] = ()
        self.steps = self.calm = 0  # calm: steps in a row, up to now, with all settled
        self._unmet_at_limit = tuple(unmet_at_limit)
        self._held, self._memory = self._fresh(0)
        for name in names:
            self.add(name)

    def _fresh(self, m: int) -> tuple[State, State]:
        zeros = torch.zeros(m, dtype=torch.float64)
        held = dict.fromkeys(("multipliers", "fast", "slow", "square", "previous"), zeros)
        flags = {"seen": zeros > 0, "unmet": zeros > 0}
        return {**held, **flags, "penalties": zeros + self.rho}, self.law.start(zeros)

    def add(self, name: str) -> None:
        """Let a constraint join, last in order, with multiplier 0; `calm` starts again."""
        if name in self.names:
            raise ValueError(f"need distinct names, got {name!r} twice")
        self.names, self.calm = (*self.names, name), 0
        for held, new in zip((self._held, self._memory), self._fresh(1), strict=True):
            held.update({key: torch.cat([held[key], new[key]]) for key in held})
        if name in self._unmet_at_limit:
            self._held["unmet"][-1] = True
            self._held["multipliers"][-1] = self.limit

    multipliers = property(lambda self: self._held["multipliers"], doc="λ, [m].")
    penalties = property(lambda self: self._held["penalties"], doc="ρ, [m].")
    fast = property(lambda self: self._held["fast"], doc="Average of about ten steps, [m].")
    slow = property(lambda self: self._held["slow"], doc="Average of about a hundred steps, [m].")

    def settled(self, tolerance: float = TOLERANCE) -> Bool[Tensor, " m"]:
        """Whose fast average is below `tolerance`; never a constraint not yet observed."""
        return self._held["seen"] & (self.fast < tolerance)

    def observe(self, g: Values, start: float = 1.0) -> None:
        """Take in one step's violations, from any device, with a graph or without; `start` is the
        multiplier of a constraint of `unmet_at_limit` that is met for the first time.

        Raises ValueError for another number of them, NaN, infinity, `g < -1`; nothing changes then.
        """
        if not (start >= 0 and math.isfinite(start)):
            raise ValueError(f"need a finite start >= 0, got {start}")
        if len(g) != len(self.names):
            raise ValueError(f"need violations of {list(self.names)}, got {len(g)}")
        g = g.detach().to("cpu", torch.float64)
        if (bad := ~(g.isfinite() & (g >= -1))).any():
            found = {self.names[i]: g[i].item() for i in bad.nonzero().flatten().tolist()}
            raise ValueError(f"need finite violations >= -1, got {found}")
        logs = g.log1p().clamp(-LOG_RANGE, LOG_RANGE)
        square = g.clamp(max=math.expm1(LOG_RANGE)).square()
        held, seen = self._held, self._held["seen"]
        for name, value in (("fast", logs), ("slow", logs), ("square", square)):
            held[name] = torch.where(seen, held[name].lerp(value, 1 - self.decay[name]), value)
        held["previous"] = torch.where(seen, held["previous"], logs)
        held["seen"] = torch.ones_like(seen)
        if self.capu:
            held["penalties"] = (self.rho * REFERENCE / held["square"].sqrt()).clamp(*RHO_RANGE)
        self.steps += 1
        self.calm = self.calm + 1 if self.settled().all() else 0
        if self.steps % self.every == 0:
            dv, held["previous"] = held["fast"] - held["previous"], held["fast"]
            new = self.law.update(self.multipliers, held["fast"], dv, self._memory)
            held["multipliers"] = torch.where(held["unmet"], self.limit, new.clamp(0, self.limit))
        self._start_met(start)

    def _start_met(self, start: float) -> None:
        """Constraints of `unmet_at_limit` that are met for the first time."""
        held = self._held
        met = held["unmet"] & (held["fast"] < 0)
        if met.any():
            held["unmet"] = held["unmet"] & ~met
            held["multipliers"] = torch.where(met, min(start, self.limit), held["multipliers"])
            held["previous"] = torch.where(met, held["fast"], held["previous"])
            started = self.law.start(held["multipliers"])
            for key, value in started.items():
                self._memory[key] = torch.where(met, value, self._memory[key])

    @property
    def unmet(self) -> Bool[Tensor, " m"]:
        """Whose multiplier still waits at the limit."""
        return self._held["unmet"]

    def state_dict(self) -> State:
        """Tensors, for safetensors. A control that loads them goes on bit for bit."""
        counts = {"steps": torch.tensor(self.steps), "calm": torch.tensor(self.calm)}
        law = {f"law.{key}": t for key, t in self._memory.items()}
        return {key: t.clone() for key, t in (counts | self._held | law).items()}

    def load_state_dict(self, state: State) -> None:
        """Raises ValueError for the state of another law or of another number of constraints."""
        now = self.state_dict()
        need, got = ({key: tuple(t.shape) for key, t in each.items()} for each in (now, state))
        if need != got:
            raise ValueError(f"need a state of {need}, got {got}")
        copied = {key: state[key].to(t, copy=True) for key, t in now.items()}
        self.steps, self.calm = int(copied["steps"]), int(copied["calm"])
        self._held = {key: copied[key] for key in self._held}
        self._memory = {key: copied[f"law.{key}"] for key in self._memory}
