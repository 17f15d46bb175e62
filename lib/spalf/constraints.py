"""The constraints `g <= 0` of SPALF, and how they enter the loss. All are differentiable.

Each is relative to its bound, `value / bound - 1`, so that one unit of violation means the same in
all of them.
"""

import torch
from jaxtyping import Float
from torch import Tensor
from torch.nn.functional import normalize

from lib.sparse import SparseActs


def faithfulness(error: Float[Tensor, "n d"], bound: float) -> Float[Tensor, ""]:
    """Squared error of a token, summed over dimensions, mean over tokens, against `bound`.

    With `bound = (1 - r2_target) * variance` it is violated while r2 is below its target.
    """
    return error.square().sum(1).mean() / bound - 1


def drift(
    rows: Float[Tensor, "V d"], anchors: Float[Tensor, "V d"], share: float = 0.1
) -> Float[Tensor, ""]:
    """`‖rows - anchors‖²` against `(share ‖anchors‖)²`, Frobenius norms."""
    return (rows - anchors).square().sum() / (share**2 * anchors.square().sum()) - 1


def coactivation(acts: SparseActs, W_dec: Float[Tensor, "d_sae d"]) -> Float[Tensor, ""]:
    """Mean squared cosine between decoder rows of latents that are active on the same token.

    Pooled over all such pairs of all tokens; 0 if no token has two. Its graph reaches `W_dec`
    only: which latents are active is given. Costs O(n · l0² · d), so pass few tokens.
    """
    counts = acts.offsets.diff()
    widest = int(counts.max()) if acts.n else 0
    pairs = int((counts * (counts - 1)).sum())
    if not pairs:
        return W_dec.sum() * 0
    slots = torch.arange(widest, device=counts.device)
    taken = slots < counts[:, None]
    places = (acts.offsets[:-1, None] + slots).clamp(max=len(acts.indices) - 1)
    rows = normalize(W_dec[acts.indices[places]], dim=2) * taken[:, :, None]
    cosines = rows @ rows.mT
    own = cosines.diagonal(dim1=1, dim2=2)
    return (cosines.square().sum() - own.square().sum()) / pairs


def orthogonality(
    acts: SparseActs, W_dec: Float[Tensor, "d_sae d"], bound: float
) -> Float[Tensor, ""]:
    """`coactivation` against `bound`."""
    return coactivation(acts, W_dec) / bound - 1


def penalty(g: Float[Tensor, ""], y: float) -> Float[Tensor, ""]:
    """`Ψ(g, y) = (max(0, 2g + y)² - y²) / 4`, whose slope is `max(0, 2g + y)`.

    With `y = λ / ρ` the term `ρ Ψ` pulls with `max(0, λ + 2ρg)`: a slack constraint of multiplier
    0 costs nothing, an active one is held at `g = 0` by λ.

    Source: AL-CoLe, Boero et al. 2025, arXiv:2510.20995; the slope is that of Ψ as written there.
    """
    return ((2 * g + y).clamp(min=0).square() - y**2) / 4


def lagrangian(
    objective: Float[Tensor, ""],
    violations: dict[str, Float[Tensor, ""]],
    multipliers: dict[str, float],
    penalties: dict[str, float],
) -> Float[Tensor, ""]:
    """`(objective + Σ ρ_i Ψ(g_i, λ_i / ρ_i)) / (1 + Σ m_i)`, `m_i = max(0, λ_i + 2 ρ_i g_i)`.

    The divisor has no graph. Without it the first penalties, tens of times the objective, fill
    Adam's second moment, and nothing is learned for a thousand steps.
    """
    total, pulls = objective, 1.0
    for name, g in violations.items():
        lam, rho = multipliers[name], penalties[name]
        total = total + rho * penalty(g, lam / rho)
        pulls += max(0.0, lam + 2 * rho * g.item())
    return total / pulls
