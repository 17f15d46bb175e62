"""JumpReLU with its straight-through gradients: of a dense matrix, and of active pairs alone."""

import torch
from jaxtyping import Float
from torch import Tensor

from lib.sparse.acts import SparseActs
from lib.sparse.ops import sum_by_latent, triton
from lib.sparse.select import places_of


def dense_jumprelu(
    pre: Float[Tensor, "n d_sae"],
    log_threshold: Float[Tensor, "d_sae"],
    bandwidth: Float[Tensor, "d_sae"],
) -> tuple[Float[Tensor, "n d_sae"], Float[Tensor, "n"], Float[Tensor, "n"]]:
    """`acts`, `l0` and `gap` of each token, with `u = pre - θ` and `θ = exp(log_threshold)`.

    `acts = pre · 1[u > 0]`, and `l0` counts them. `gap` sums over latents how far the relaxed gate
    `clip(u / bandwidth + 1/2, 0, 1)` is from the hard one: `max(0, 1/2 - |u| / bandwidth)`, so it
    is not zero only near the threshold. θ learns from `acts` and `l0` through a rectangle of width
    `bandwidth` round the jump; `pre` gets no gradient from `l0`. `gap` has its own gradient, to
    both. `bandwidth` is a constant, positive, in units of the pre-activations, which are finite.
    Sums are in float32 or wider, and equal from run to run; on CUDA, Triton takes them.

    Source: Rajamanoharan et al. 2024, arXiv:2407.14435, eq. 11 and 12.

    Raises:
        ValueError: `log_threshold` or `bandwidth` does not have one value per latent, or lies on
            another device than `pre`.
    """
    for name, given in (("log_threshold", log_threshold), ("bandwidth", bandwidth)):
        if given.shape != pre.shape[1:]:
            needed, got = tuple(pre.shape[1:]), tuple(given.shape)
            raise ValueError(f"need {name} of shape {needed}, one value per latent, got {got}")
        if given.device != pre.device:
            raise ValueError(f"need {name} on {pre.device}, beside pre, got {given.device}")
    if not pre.is_cuda:
        return _JumpReLU.apply(pre, log_threshold, bandwidth)
    return triton().triton_jumprelu(pre, log_threshold, bandwidth)


def sparse_jumprelu(
    active: SparseActs, threshold: Float[Tensor, "d_sae"], bandwidth: float
) -> tuple[SparseActs, Float[Tensor, "n"]]:
    """`acts` and `l0` of `dense_jumprelu`, at pairs; all in the band must be among them."""
    acts, l0 = _SparseJumpReLU.apply(active.values, threshold, bandwidth, active)
    return active.with_values(acts), l0


class _JumpReLU(torch.autograd.Function):
    @staticmethod
    def forward(ctx, pre, log_threshold, bandwidth):
        wide = pre.to(torch.promote_types(pre.dtype, torch.float32))
        threshold, bandwidth = log_threshold.to(wide.dtype).exp(), bandwidth.to(wide.dtype)
        acts = torch.gt(wide, threshold, out=torch.empty_like(wide))  # twice as fast as a bool
        l0 = acts.sum(1)
        acts = acts.mul_(wide).to(pre.dtype)
        places = places_of((wide - threshold).abs_() < bandwidth / 2)
        tokens, latents = places // pre.shape[1], places % pre.shape[1]
        u, widths = wide.take(places) - threshold[latents], bandwidth[latents]
        gap = torch.zeros_like(l0).index_add_(0, tokens, 0.5 - u.abs() / widths)
        ctx.save_for_backward(acts, threshold, places, tokens, latents, u.sign(), widths)
        ctx.parameter_dtype = log_threshold.dtype
        return acts, l0, gap

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx, d_acts, d_l0, d_gap):
        acts, threshold, places, tokens, latents, sign, widths = ctx.saved_tensors
        pull = d_gap[tokens] * sign / widths
        jump = (threshold[latents] * d_acts.take(places) + d_l0[tokens]) / widths
        d_threshold = torch.zeros_like(threshold).index_add_(0, latents, pull - jump)
        d_pre = torch.ne(acts, 0, out=threshold.new_empty(acts.shape)).mul_(d_acts)
        d_pre.view(-1).index_add_(0, places, -pull)
        return d_pre.to(acts.dtype), (threshold * d_threshold).to(ctx.parameter_dtype), None


class _SparseJumpReLU(torch.autograd.Function):
    @staticmethod
    def forward(ctx, values, threshold, bandwidth, active):
        threshold = threshold[active.indices]
        on = (values > threshold).to(values.dtype)
        ctx.save_for_backward(values, on, threshold)
        ctx.active, ctx.bandwidth = active, bandwidth
        l0 = on.new_zeros(active.n).index_add_(0, active.rows, on)  # of ones: exact in any order
        return values * on, l0

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx, d_acts, d_l0):
        values, on, threshold = ctx.saved_tensors
        near = (values - threshold).abs() < ctx.bandwidth / 2
        jump = torch.where(near, threshold * d_acts + d_l0[ctx.active.rows], 0) / ctx.bandwidth
        return d_acts * on, -sum_by_latent(ctx.active, jump), None, None
