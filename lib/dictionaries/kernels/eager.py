"""Sparse encode and decode, and the fused JumpReLU, in plain torch with hand-written gradients.

With k of d_sae latents active, a dense decode and the two dense weight gradients cost d_sae / k
times the arithmetic that matters. All products here are weighted sums of rows: of weights for each
token, or, with the pairs sorted by latent, of activations for each latent.
"""

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor
from torch.nn.functional import embedding_bag

from lib.dictionaries.pairs import SparseActs


def active_pre_acts(
    x: Float[Tensor, "n d_in"],
    encoder: Float[Tensor, "d_sae d_in"],
    b_enc: Float[Tensor, "d_sae"],
    b_in: Float[Tensor, "d_in"],
    active: SparseActs,
) -> Float[Tensor, "nnz"]:
    """Pre-activations of the `active` pairs: `active.values`, made differentiable.

    The caller has computed `active.values = ((x - b_in) @ encoder.T + b_enc)[rows, indices]`
    without a graph; the backward pass touches these pairs only. `x` gets a gradient if it wants
    one.
    """
    return _ActivePreActs.apply(x, encoder, b_enc, b_in, active)


def sparse_decode(
    values: Float[Tensor, "nnz"], active: SparseActs, W_dec: Float[Tensor, "d_sae d_out"]
) -> Float[Tensor, "n d_out"]:
    """`acts @ W_dec` from the pairs of `active` with these `values`; no bias is added."""
    return _SparseDecode.apply(values, W_dec, active)


def fused_jumprelu(
    pre: Float[Tensor, "n d_sae"],
    log_threshold: Float[Tensor, "d_sae"],
    bandwidth: Float[Tensor, "d_sae"],
) -> tuple[Float[Tensor, "n d_sae"], Float[Tensor, "n"], Float[Tensor, "n"]]:
    """`lib.dictionaries.kernels.fused_jumprelu` in plain torch, for any device.

    Few pre-activations are near their threshold, so `gap` and the gradient of θ are computed for
    these alone; only `acts` is kept for the backward pass.
    """
    return _FusedJumpReLU.apply(pre, log_threshold, bandwidth)


def _weight_gradient(
    active: SparseActs, values: Float[Tensor, "nnz"], dense: Float[Tensor, "n d"]
) -> Float[Tensor, "d_sae d"]:
    """`acts.T @ dense`, where acts holds `values` at the pairs of `active`."""
    order, starts = active.by_latent
    return _bags(active.rows[order], starts, values[order], dense)


class _ActivePreActs(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x, encoder, b_enc, b_in, active):
        ctx.save_for_backward(x, encoder, b_in)
        ctx.active = active
        return active.values.clone()

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx, grad):
        x, encoder, b_in = ctx.saved_tensors
        active = ctx.active
        ones = grad.new_ones(active.n, 1)
        d_b_enc = _weight_gradient(active, grad, ones)[:, 0]  # index_add_ is not exact on a GPU
        d_encoder = _weight_gradient(active, grad, x)
        d_encoder.addr_(d_b_enc, b_in, alpha=-1)  # (x - b_in) without a copy of x
        d_x = _by_token(active, grad, encoder) if ctx.needs_input_grad[0] else None
        return d_x, d_encoder, d_b_enc, -(d_b_enc @ encoder), None


class _SparseDecode(torch.autograd.Function):
    @staticmethod
    def forward(ctx, values, W_dec, active):
        ctx.save_for_backward(values, W_dec)
        ctx.active = active
        return _by_token(active, values, W_dec)

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx, grad):
        values, W_dec = ctx.saved_tensors
        active = ctx.active
        grad = grad.contiguous()
        d_values = torch.ops.aten._embedding_bag_per_sample_weights_backward(
            grad, W_dec, active.indices, active.offsets[:-1], active.rows, 0
        )
        return d_values, _weight_gradient(active, values, grad), None


class _FusedJumpReLU(torch.autograd.Function):
    @staticmethod
    def forward(ctx, pre, log_threshold, bandwidth):
        wide = pre.to(torch.promote_types(pre.dtype, torch.float32))
        threshold, bandwidth = log_threshold.to(wide.dtype).exp(), bandwidth.to(wide.dtype)
        acts = torch.gt(wide, threshold, out=torch.empty_like(wide))  # twice as fast as a bool
        l0 = acts.sum(1)
        acts = acts.mul_(wide).to(pre.dtype)
        places = _true_places((wide - threshold).abs_() < bandwidth / 2)
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
        d_log_threshold = threshold * d_threshold
        return d_pre.to(acts.dtype), d_log_threshold.to(ctx.parameter_dtype), None


def _true_places(mask: Bool[Tensor, "n d"]) -> Int[Tensor, "nnz"]:
    """Where a mask is true, counted along its rows.

    Eight entries at a time are looked at as one integer, which finds the few true ones of a large
    mask in a third of the time. With many, looking at each is faster.
    """
    flat = mask.flatten()
    if len(flat) % 8 == 0:
        eights = flat.view(torch.int64).nonzero()
        if len(eights) * 8 < len(flat) // 8:
            places = eights * 8 + torch.arange(8, device=mask.device)
            return places[flat[places]]
    return flat.nonzero()[:, 0]


def _by_token(
    active: SparseActs, values: Float[Tensor, "nnz"], rows: Float[Tensor, "d_sae d"]
) -> Float[Tensor, "n d"]:
    """`acts @ rows`, where acts holds `values` at the pairs of `active`."""
    return _bags(active.indices, active.offsets, values, rows)


def _bags(
    places: Int[Tensor, "nnz"],
    offsets: Int[Tensor, "n_plus_1"],
    weights: Float[Tensor, "nnz"],
    rows: Float[Tensor, "m d"],
) -> Float[Tensor, "n d"]:
    """Sum i is that of `weights * rows[places]` from `offsets[i]` to `offsets[i + 1]`, or zeros."""
    if len(offsets) == 1:
        return rows.new_zeros(0, rows.shape[1])
    return embedding_bag(
        places, rows, offsets, mode="sum", per_sample_weights=weights, include_last_offset=True
    )
