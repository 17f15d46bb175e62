"""Logistic regression of many concepts at once: on a few chosen features, or on all."""

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor
from torch.nn.functional import binary_cross_entropy_with_logits, softplus

from lib.analysis.probes import Features

RIDGE = 1.0
"""Weight of half the squared coefficients, of features in units of their standard deviation,
against the log-likelihood summed over tokens."""


def greedy(
    features: Features, labels: Bool[Tensor, "n c"], m: int
) -> tuple[Int[Tensor, "c m"], Float[Tensor, "c m"]]:
    """For each concept `m` features, chosen one after the other, and their logistic weights.

    The next feature is the one that a score test finds to improve the fit so far most, in first
    order: (its product with the residual)² over the information that the intercept leaves it.
    Source: Gurnee et al. 2023, arXiv:2305.01610, who choose all at once.
    """
    y = labels.T.float().contiguous()
    c, n = y.shape
    weights = torch.logit(y.mean(1, keepdim=True), eps=1e-6)
    table = torch.ones(c, 1, n)
    scale = _spread(features)
    chosen = torch.empty(c, 0, dtype=torch.int64)
    for i in range(m):
        p = _logits(table, weights).sigmoid()
        gain = _score_test(features, (y - p).T, (p * (1 - p)).T, scale)
        gain.scatter_(0, chosen.T, -1)
        chosen = torch.cat([chosen, gain.argmax(0)[:, None]], 1)
        column = features.columns(chosen[:, -1]) / scale[chosen[:, -1]]
        table = torch.cat([table, column.T[:, None]], 1)
        weights = torch.cat([weights, torch.zeros(c, 1)], 1)
        weights = newton(table, y, weights, max_steps=30 if i == m - 1 else 4)
    return chosen, weights[:, 1:] / scale[chosen]


def _spread(features: Features) -> Float[Tensor, " m"]:
    """Standard deviation of each feature; infinite for a constant one, which so weighs nothing."""
    each = torch.full((features.n, 1), 1 / features.n)
    mean, square = (features.against(each, power)[:, 0] for power in (1, 2))
    variance = square - mean.square()
    return torch.where(variance > 1e-5 * square, variance.clamp(min=0).sqrt(), torch.inf)


def _score_test(
    features: Features, residual: Float[Tensor, "n c"], w: Float[Tensor, "n c"], scale: Tensor
) -> Float[Tensor, "m c"]:
    u = features.against(residual) / scale[:, None]
    cross = features.against(w) / scale[:, None]
    information = features.against(w, power=2) / scale[:, None] ** 2
    information = information - cross.square() / w.sum(0).clamp(min=1e-12)
    return u.square() / (information.clamp(min=0) + RIDGE)


def newton(
    table: Float[Tensor, "c p n"],
    y: Float[Tensor, "c n"],
    weights: Float[Tensor, "c p"],
    max_steps: int = 30,
) -> Float[Tensor, "c p"]:
    """Ridge logistic regression on each concept's own features, from a starting point.

    The first feature is 1 for the intercept. A step that makes a concept's loss worse is halved.
    """
    ridge = torch.full((table.shape[1],), RIDGE)
    ridge[0] = 1e-3

    against = 1 - 2 * y

    def loss(w: Tensor) -> Tensor:
        fit = softplus(_logits(table, w) * against).sum(1)
        return fit + 0.5 * (ridge * w.square()).sum(1)

    value = loss(weights)
    for _ in range(max_steps):
        p = _logits(table, weights).sigmoid()
        gradient = (table @ (p - y)[:, :, None])[:, :, 0] + ridge * weights
        hessian = (table * (p * (1 - p))[:, None]) @ table.mT + ridge.diag()
        step = torch.linalg.solve(hessian, gradient)
        rate = torch.ones(len(y), 1)
        for _ in range(8):
            tried = loss(weights - rate * step)
            worse = ~(tried <= value * (1 + 1e-5))  # more than rounding
            if not worse.any():
                break
            rate[worse] /= 2
        rate[worse] = 0
        tried = torch.where(worse, value, tried)
        weights = weights - rate * step
        if (value - tried <= 1e-5 * value).all():
            break
        value = tried
    return weights


def _logits(table: Float[Tensor, "c p n"], weights: Float[Tensor, "c p"]) -> Float[Tensor, "c n"]:
    return (weights[:, None] @ table)[:, 0]


def linear_probe(
    x: Float[Tensor, "n d"], labels: Bool[Tensor, "n c"], max_steps: int = 100
) -> Float[Tensor, "c d"]:
    """Weights of a ridge logistic regression on all of `x`, fitted in whitened coordinates."""
    y = labels.to(x)
    n = len(x)
    centred = x - x.mean(0)
    variance, basis = torch.linalg.eigh((centred.T @ centred / n).double())
    kept = variance > 1e-6 * variance.max()
    whiten = (basis[:, kept] / variance[kept].sqrt()).to(x)
    z = centred @ whiten
    weights = z.new_zeros(z.shape[1], y.shape[1], requires_grad=True)
    bias = torch.logit(y.mean(0), eps=1e-6).requires_grad_()
    optimizer = torch.optim.LBFGS(
        [weights, bias], max_iter=max_steps, history_size=20, line_search_fn="strong_wolfe"
    )

    def closure() -> Tensor:
        optimizer.zero_grad()
        fit = binary_cross_entropy_with_logits(z @ weights + bias, y, reduction="sum")
        loss = (fit + 0.5 * RIDGE * weights.square().sum()) / n
        loss.backward()
        return loss

    with torch.enable_grad():
        optimizer.step(closure)
    return (whiten @ weights.detach()).T.contiguous()
