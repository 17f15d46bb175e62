"""What SPALF is asked for: four knobs, and the parts that can be switched off to see their use."""

import math
from dataclasses import dataclass

from lib.runtime import require_at_least

LAWS = ("pi", "adrc", "ascent")
ABLATIONS = {
    "no whitening": {"whiten": False},
    "no orthogonality": {"orthogonality": False},
    "no revival": {"revive": False},
    "no CAPU": {"capu": False},
    "ADRC for PI": {"law": "adrc"},
    "gradient ascent for PI": {"law": "ascent"},
    "with the correction": {"correction": True},
    "no phase 2": {"phase_2": False},
}
"""Changes to `SpalfConfig`, each of which switches one part (the correction is off by default)."""
LR_AREA = 2**27  # of the weights that `lr` is stated for: d_in 4096, d_sae 32768


@dataclass(frozen=True, kw_only=True)
class SpalfConfig:
    """Four knobs (`d_sae`, `l0_target`, `r2_target`, `lr`), the length of the run, and parts."""

    n_steps: int
    d_sae: int
    """Number of latents."""
    l0_target: float = 16.0
    """Latents per token at the start, and the unit in which l0 is weighed. Where l0 ends is found,
    not set."""
    r2_target: float = 0.95
    """Share of the variance of the raw activations that must be explained."""
    lr: float = 3e-4
    """Adam's step at `d_in * d_sae = 2²⁷` (4096 by 32768); narrower rows and dictionaries take
    longer steps, `step_size`."""
    seed: int = 0
    """Of the free decoder rows."""
    log_every: int = 10
    """Steps between entries of the history, and moves of the multipliers."""
    checkpoint_every: int = 0
    """Steps between checkpoints; 0: only when done."""
    whiten: bool = True
    """Read whitened activations; otherwise centred ones, scaled."""
    orthogonality: bool = True
    """Constrain the cosines of latents that are active together."""
    law: str = "pi"
    """What moves the multipliers: `pi`, `adrc` or `ascent` (`lib.spalf.control`)."""
    capu: bool = True
    """Adapt the penalties; otherwise they stay at 1."""
    correction: bool = False
    """In the last fifth, push pre-activations away from their thresholds (costs latents)."""
    phase_2: bool = True
    """Once converged, constrain the KL of the patched model too."""
    revive: bool = True
    """Let dead latents learn from the error (AuxK)."""

    def __post_init__(self) -> None:
        require_at_least(1, n_steps=self.n_steps, d_sae=self.d_sae, log_every=self.log_every)
        require_at_least(0, checkpoint_every=self.checkpoint_every)
        if not 0 < self.r2_target < 1:
            raise ValueError(f"need r2_target in (0, 1), got {self.r2_target}")
        if not 0 < self.l0_target < self.d_sae:
            raise ValueError(
                f"need l0_target above 0 and below d_sae {self.d_sae}, got {self.l0_target}"
            )
        if not (self.lr > 0 and math.isfinite(self.lr)):
            raise ValueError(f"need a finite lr > 0, got {self.lr}")
        if self.law not in LAWS:
            raise ValueError(f"need law in {LAWS}, got {self.law!r}")

    def step_size(self, d_in: int) -> float:
        """Adam's step for weights of unit rows: `lr · sqrt(2²⁷ / (d_in · d_sae))`.

        A step of lr in every coordinate turns a unit row of width d by lr · sqrt(d), so the angle
        stays; the square root of the number of latents is the rule of Gao et al. 2024. The batch
        size does not enter: the schedule adapts instead, by waiting until the target is reached.
        """
        return self.lr * math.sqrt(LR_AREA / (d_in * self.d_sae))

    def lr_factor(self, step: int) -> float:
        """Up over the first tenth, down to 0 over the last fifth."""
        rise = (step + 1) / (0.1 * self.n_steps)
        return min(1.0, rise, (self.n_steps - step) / (0.2 * self.n_steps))

    @property
    def decay_starts(self) -> int:
        """The first step whose learning rate is lowered at the end."""
        return int(0.8 * self.n_steps) + 1
