"""Several dictionaries beside each other: what each costs in latents and gives in return."""

import math
from collections.abc import Iterable, Mapping, Sequence

import numpy as np
import torch
from transformers import PreTrainedModel

from lib.activations.source import Block
from lib.analysis.metrics import ReconstructionSums, patched_losses, require_patchable
from lib.data.corpus import Corpus
from lib.dictionaries import Dictionary

Point = dict[str, str | float]
"""A dictionary on the frontier: its name, and what it costs and gives."""


@torch.no_grad()
def frontier_points(
    dictionaries: Mapping[str, Dictionary],
    model: PreTrainedModel,
    corpus: Corpus,
    hook_name: str,
    blocks: Iterable[Block],
    *,
    batch_rows: int = 16,
) -> list[Point]:
    """What each dictionary costs in latents and gives in variance and loss, on the same tokens.

    Args:
        dictionaries: by name; the first word of a name is the recipe.
        corpus: what `model` reads under the patch.
        blocks: activations at `hook_name`, gone through once for all dictionaries.
        batch_rows: see `patched_losses`.

    Returns:
        One row each, in the order given: `name`, `recipe`, `l0`, `r2`, `fvu`, `dead`,
        `ce_patched`, `kl`, `loss_recovered`.

    Raises:
        ValueError: no dictionaries, or what `reconstruction` and `patched_losses` refuse.
    """
    if not dictionaries:
        raise ValueError("need at least one dictionary, got none")
    for dictionary in dictionaries.values():
        require_patchable(model, dictionary, hook_name)
    sums = {name: ReconstructionSums(d.d_sae) for name, d in dictionaries.items()}
    for block in blocks:
        for name, dictionary in dictionaries.items():
            acts = dictionary.encode_sparse(block.acts)
            sums[name].update(block.acts, dictionary.decode(acts), acts)
    points: list[Point] = []
    for name, dictionary in dictionaries.items():
        quality = sums[name].result()
        losses = patched_losses(model, dictionary, corpus, hook_name, batch_rows=batch_rows)
        own = {key: getattr(quality, key) for key in ("l0", "r2", "fvu", "dead")}
        own |= {key: getattr(losses, key) for key in ("ce_patched", "kl", "loss_recovered")}
        points.append({"name": name, "recipe": name.split(" ")[0], **own})
    return points


def interpolated(
    points: Sequence[Mapping[str, object]], at: float, x: str = "r2", y: str = "l0"
) -> float:
    """The `y` that a swept recipe would have at `x = at`: linear between neighbours, in log(l0).

    Outside the range of the sweep NaN, as nothing was measured there. Of points of equal `x` the
    lowest `y` counts.

    Raises:
        ValueError: no points, or an l0 that is not above 0, which has no logarithm.
    """
    if not points:
        raise ValueError("need at least one point to interpolate, got none")
    for key, values in ((x, [at, *(p[x] for p in points)]), (y, [p[y] for p in points])):
        if key == "l0" and not min(values) > 0:
            raise ValueError(f"need l0 above 0 at every point, got {min(values)}")
    lowest = {p[x]: p[y] for p in sorted(points, key=lambda p: -p[y])}
    across, up = (math.log if key == "l0" else float for key in (x, y))
    xs = sorted(lowest)
    known = [across(place) for place in xs], [up(lowest[place]) for place in xs]
    value = float(np.interp(across(at), *known, left=math.nan, right=math.nan))
    return math.exp(value) if y == "l0" else value
