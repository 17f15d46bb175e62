"""What an adapter's latents are needed for: the behaviour without them, and with others instead."""

from collections.abc import Callable, Sequence

import torch
from jaxtyping import Float, Int
from torch import Tensor

from lib.adapters.sae_lora.adapter import SaeLora

Row = dict[str, str | int | float]
N_NEAR = 20
"""Latents of the nearest firing rates, of which a control takes one."""


def causal_check(adapter: SaeLora, measure: Callable[[SaeLora], float], *, n: int) -> list[Row]:
    """The behaviour without each of the strongest latents, and without the strongest 1, 2, … `n`.

    What is left keeps its weights, so the adapter gets weaker as it loses latents.

    Args:
        measure: the behaviour under an adapter, such as the share of prompts answered in French.
        n: latents on each side, or as many as there are.

    Returns:
        Rows of `side`, `latent` (the last that is removed, -1 for none), `n_removed`, `alone`
        (whether the stronger ones are still there) and `value`; on each side the whole adapter is
        the first row.
    """
    whole = measure(adapter)
    rows: list[Row] = []
    for side, support in (("read", adapter.read_support), ("write", adapter.write_support)):
        latents = support[:n].tolist()
        rows.append(_row(side, -1, 0, False, whole))
        for i, latent in enumerate(latents, start=1):
            alone = measure(without(adapter, side, [latent]))
            together = alone if i == 1 else measure(without(adapter, side, latents[:i]))
            rows.append(_row(side, latent, 1, True, alone))
            rows.append(_row(side, latent, i, False, together))
    return rows


def without(adapter: SaeLora, side: str, latents: Sequence[int]) -> SaeLora:
    """A copy that no longer reads, or writes, these latents; the others keep their weights."""
    kept = torch.ones(adapter.d_sae, dtype=torch.bool, device=adapter.scale.device)
    kept[list(latents)] = False
    return adapter.restricted(**{side: kept})


@torch.no_grad()
def on_random_latents(
    adapter: SaeLora, seed: int, firing_rate: Float[Tensor, " d_sae"] | None = None
) -> SaeLora:
    """The control: a copy whose weights and scale lie on random other latents, on both sides.

    As it is, it shows that the weights mean something only where they were learned. Trained again
    on its own support, it shows what any support of that size can learn.

    Args:
        firing_rate: of every latent. With it each latent gives its weights to one of those that
            fire about as often; without it random latents are often dead, and the control weaker.

    Raises:
        ValueError: an adapter that uses more than half of the latents on one side.
    """
    generator = torch.Generator().manual_seed(seed)
    other = adapter.restricted()
    sides = (
        (adapter.read_support, other.lora_A, adapter.read_weights.T, other.read_mask),
        (adapter.write_support, other.lora_B.T, adapter.write_weights, other.write_mask),
    )
    for support, raw, weights, mask in sides:
        others = _others(support.cpu(), adapter.d_sae, firing_rate, generator).to(support.device)
        raw.zero_()[:, others] = weights[:, support]
        mask.zero_()[others] = 1
    return other


def _others(
    support: Int[Tensor, " n"],
    d_sae: int,
    firing_rate: Float[Tensor, " d_sae"] | None,
    generator: torch.Generator,
) -> Int[Tensor, " n"]:
    """For each latent of a support another one that is not in it, none twice."""
    free = torch.ones(d_sae, dtype=torch.bool)
    free[support] = False
    if 2 * len(support) > d_sae:
        raise ValueError(f"need a support of at most {d_sae // 2} latents, got {len(support)}")
    if firing_rate is None:
        candidates = free.nonzero()[:, 0]
        return candidates[torch.randperm(len(candidates), generator=generator)[: len(support)]]
    rates, chosen = firing_rate.double().cpu(), torch.empty_like(support)
    for i in torch.randperm(len(support), generator=generator).tolist():
        candidates = free.nonzero()[:, 0]
        distance = (rates[candidates] - rates[support[i]]).abs()
        near = candidates[distance.argsort(stable=True)[:N_NEAR]]
        chosen[i] = near[int(torch.randint(len(near), (1,), generator=generator))]
        free[chosen[i]] = False
    return chosen


def _row(side: str, latent: int, n_removed: int, alone: bool, value: float) -> Row:
    names = ("side", "latent", "n_removed", "alone", "value")
    return dict(zip(names, (side, latent, n_removed, alone, value), strict=True))
