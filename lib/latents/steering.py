"""Change latents while a model runs and measure what it does: edits, units, dose and response."""

import math
from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager, ExitStack
from dataclasses import dataclass
from statistics import fmean

import torch
from jaxtyping import Float
from torch import Tensor

from lib.latents.record import LatentRecord
from lib.latents.source import Edit, LatentSource, require_latents
from lib.models.sites import add

KINDS = ("clamp", "scale")


def ablate() -> Edit:
    """The latent is silent on every token."""
    return torch.zeros_like


def scale(factor: float) -> Edit:
    """The latent times `factor`: 1 is unchanged, 0 ablates, −1 turns it round.

    Where it is silent it stays so. Raises ValueError for a factor that is not finite.
    """
    _require_finite("factor", factor)
    return lambda values: values * factor


def clamp(value: float) -> Edit:
    """The latent has this value, in its own unit, on every token.

    Raises ValueError for a value that is not finite.
    """
    _require_finite("value", value)
    return lambda values: torch.full_like(values, value)


def typical_activations(record: LatentRecord) -> Float[Tensor, " n_latents"]:
    """Mean of |value| over the tokens on which each latent fires: the unit of a dose.

    0 for a latent that never fires.
    """
    indices, n = record.indices.long(), record.n_latents
    sums = torch.bincount(indices, weights=record.values.abs().double(), minlength=n)
    return (sums / torch.bincount(indices, minlength=n).clamp(min=1)).float()


@dataclass(frozen=True, kw_only=True)
class DoseResponse:
    """What was measured at each dose, and with random directions in the latents' place."""

    doses: tuple[float, ...]
    values: tuple[float, ...]
    baseline: float
    """With no latent changed."""
    control: tuple[tuple[float, ...], ...]
    """For each random direction its value at each dose."""

    def _control(self, of: Callable[[Sequence[float]], float]) -> tuple[float, ...]:
        return tuple(of(at) for at in zip(*self.control, strict=True))

    control_mean = property(lambda self: self._control(fmean), doc="Of each dose's controls.")
    control_low = property(lambda self: self._control(min), doc="Each dose's smallest control.")
    control_high = property(lambda self: self._control(max), doc="Each dose's largest control.")


def dose_response(
    source: LatentSource,
    measure: Callable[[], float],
    latents: Sequence[int],
    doses: Sequence[float],
    *,
    units: Float[Tensor, " n_latents"],
    kind: str = "clamp",
    n_random: int = 5,
    seed: int = 0,
) -> DoseResponse:
    """Run `measure` with the latents at each dose, all at once, and with random directions.

    | `kind` | 1 | 0 | −1 |
    |---|---|---|---|
    | `clamp` | every token has the latent at its typical activation | it is ablated | as 1, with \
the opposite sign |
    | `scale` | unchanged | it is ablated | turned round where it fires, silent elsewhere |

    The control adds a random direction to the activation of every token, of the norm of
    `Σ_j unit_j · write_directions[j]`, times the dose in `clamp` and times `dose − 1` in `scale`:
    the change that the edit makes on a token where the latents are silent, or typical. A latent
    that fires on few tokens is scaled on these few, and its control acts on all. Of an SAE-LoRA
    the adapter is attached throughout.

    Args:
        measure: runs `source.model` and returns a number; the same each time it is called.
        units: of every latent, such as `typical_activations`.
        n_random: random directions; each runs `measure` once for each dose.
        seed: of the directions, the same ones at every dose.

    Raises:
        ValueError: no latents or one twice, one that there is not, or one whose unit is not above
            0 (it never fires); latents that write nothing; no doses, or one that is not finite;
            another number of units than of latents; an unknown kind; `n_random` below 1.
    """
    if kind not in KINDS:
        raise ValueError(f"need a kind in {KINDS}, got {kind!r}")
    if not doses:
        raise ValueError("need at least one dose, got none")
    for dose in doses:
        _require_finite("dose", dose)
    vector = _typical_change(source, latents, units)
    still = 0.0 if kind == "clamp" else 1.0
    directions = random_directions(n_random, len(vector), norm=float(vector.norm()), seed=seed)

    def edits(dose: float) -> dict[int, Edit]:
        if kind == "scale":
            return {latent: scale(dose) for latent in latents}
        return {latent: clamp(dose * float(units[latent])) for latent in latents}

    def measured(*contexts: AbstractContextManager[None]) -> float:
        with ExitStack() as stack:
            for context in contexts:
                stack.enter_context(context)
            return float(measure())

    def controlled(vector: Tensor) -> float:
        return measured(source.edited({}), add(source.model, source.hook_name, vector))

    return DoseResponse(
        doses=tuple(float(dose) for dose in doses),
        values=tuple(measured(source.edited(edits(dose))) for dose in doses),
        baseline=measured(source.edited({})),
        control=tuple(
            tuple(controlled((dose - still) * direction) for dose in doses)
            for direction in directions
        ),
    )


def random_directions(n: int, d: int, *, norm: float, seed: int) -> Float[Tensor, "n d"]:
    """Directions drawn evenly from the sphere of this radius, the same for the same seed.

    Raises:
        ValueError: `n` below 1, or a norm that is not above 0 and finite.
    """
    if n < 1:
        raise ValueError(f"need n >= 1 random directions, got {n}")
    if not 0 < norm < math.inf:
        raise ValueError(f"need a norm above 0 and finite, got {norm}")
    drawn = torch.randn(n, d, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)
    return (norm * drawn / drawn.norm(dim=1, keepdim=True)).float()


def _typical_change(
    source: LatentSource, latents: Sequence[int], units: Float[Tensor, " n_latents"]
) -> Float[Tensor, " d_model"]:
    """What the latents add together when each is at its unit; on the CPU."""
    if not latents or len(set(latents)) < len(latents):
        raise ValueError(f"need at least one latent, each once, got {list(latents)}")
    if len(units) != source.n_latents:
        raise ValueError(f"need a unit for each of {source.n_latents} latents, got {len(units)}")
    require_latents(latents, source.n_latents)
    chosen = units[list(latents)].float().cpu()
    if not (chosen > 0).all():
        raise ValueError(
            f"need latents with a unit above 0 (those that fire), got units {chosen.tolist()} "
            f"of latents {list(latents)}"
        )
    change = chosen @ source.write_directions[list(latents)].float().cpu()
    if not change.any():
        raise ValueError(f"need latents that write something, got {list(latents)}")
    return change


def _require_finite(name: str, value: float) -> None:
    if not math.isfinite(value):
        raise ValueError(f"need a finite {name}, got {value}")
