"""Sparse encode and decode, and the fused JumpReLU, in plain torch with hand-written gradients.

With k of d_sae latents active, a dense decode and the two dense weight gradients cost d_sae / k
times the arithmetic that matters. All products here are weighted sums of rows: of weights for each
token, or, with the pairs sorted by latent, of activations for each latent.
"""

import warnings

import torch
from jaxtyping import Float, Int
from torch import Tensor
from torch.nn.functional import embedding_bag

from lib.dictionaries.memory import Memory, product_dtype
from lib.dictionaries.pairs import SparseActs
from lib.dictionaries.selection import true_places


def active_pre_acts(
    x: Float[Tensor, "n d_in"],
    encoder: Float[Tensor, "d_sae d_in"],
    b_enc: Float[Tensor, "d_sae"],
    b_in: Float[Tensor, "d_in"],
    active: SparseActs,
    memory: Memory | None = None,
) -> Float[Tensor, "nnz"]:
    """Pre-activations of the `active` pairs: `active.values`, made differentiable.

    The caller has computed `active.values = ((x - b_in) @ encoder.T + b_enc)[rows, indices]`
    without a graph; the backward pass touches these pairs only. `x` gets a gradient if it wants
    one. Here and in `sparse_decode` the gradient of the weights lies in a matrix of `memory`.
    """
    return _ActivePreActs.apply(x, encoder, b_enc, b_in, active, memory)


def sparse_decode(
    values: Float[Tensor, "nnz"],
    active: SparseActs,
    W_dec: Float[Tensor, "d_sae d_out"],
    memory: Memory | None = None,
) -> Float[Tensor, "n d_out"]:
    """`acts @ W_dec` from the pairs of `active` with these `values`; no bias is added."""
    return _SparseDecode.apply(values, W_dec, active, memory)


def sum_by_latent(active: SparseActs, values: Float[Tensor, "nnz"]) -> Float[Tensor, "d_sae"]:
    """Sums of `values` over the pairs of each latent; equal from run to run, on a GPU too."""
    order, starts = active.by_latent
    ones = values.new_ones(active.n, 1)
    weights = values.index_select(0, order)  # five times as fast as values[order]
    return _bags(active.rows_by_latent, starts, weights, ones, values.dtype)[:, 0]


def _weight_gradient(
    active: SparseActs,
    values: Float[Tensor, "nnz"],
    dense: Float[Tensor, "n d"],
    dtype: torch.dtype,
    memory: Memory | None,
) -> Float[Tensor, "d_sae d"]:
    """`acts.T @ dense`, where acts holds `values` at the pairs of `active`."""
    order, starts = active.by_latent
    places, weights = active.rows_by_latent, values.index_select(0, order)
    plain = dense.device.type == "cpu" and dense.dtype != torch.bfloat16
    if not (plain and torch.backends.mkl.is_available()):
        return _bags(places, starts, weights, dense, dtype)
    size = (active.n_latents, dense.shape[1])
    out = memory.take(*size, dtype, dense.device) if memory else dense.new_empty(size, dtype=dtype)
    with warnings.catch_warnings(action="ignore"):  # "beta state"
        parts, size = (starts, places, weights.to(dtype)), (len(out), len(dense))
        acts = torch.sparse_csr_tensor(*parts, size, check_invariants=False)
    return torch.addmm(out, acts, dense, beta=0, out=out)


class _ActivePreActs(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x, encoder, b_enc, b_in, active, memory):
        ctx.save_for_backward(x, encoder, b_in)
        ctx.active, ctx.memory = active, memory
        return active.values.to(encoder.dtype, copy=True)

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx, grad):
        x, encoder, b_in = ctx.saved_tensors
        active, d_b_enc = ctx.active, sum_by_latent(ctx.active, grad)
        low = (x - b_in).to(active.values.dtype)
        d_encoder = _weight_gradient(active, grad, low, encoder.dtype, ctx.memory)
        tokens = (active.indices, active.offsets, grad, encoder, x.dtype)
        d_x = _bags(*tokens) if ctx.needs_input_grad[0] else None
        return d_x, d_encoder, d_b_enc, -(d_b_enc @ encoder), None, None


class _SparseDecode(torch.autograd.Function):
    @staticmethod
    def forward(ctx, values, W_dec, active, memory):
        rows = W_dec.to(product_dtype(W_dec))
        ctx.save_for_backward(values, rows)
        ctx.active, ctx.dtype, ctx.memory = active, W_dec.dtype, memory
        return _bags(active.indices, active.offsets, values, rows, W_dec.dtype)

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx, grad):
        values, rows = ctx.saved_tensors
        active, grad = ctx.active, grad.to(rows.dtype).contiguous()
        d_values = dots_at(active, grad, rows).to(values.dtype)
        return d_values, _weight_gradient(active, values, grad, ctx.dtype, ctx.memory), None, None


class _FusedJumpReLU(torch.autograd.Function):
    @staticmethod
    def forward(ctx, pre, log_threshold, bandwidth):
        wide = pre.to(torch.promote_types(pre.dtype, torch.float32))
        threshold, bandwidth = log_threshold.to(wide.dtype).exp(), bandwidth.to(wide.dtype)
        acts = torch.gt(wide, threshold, out=torch.empty_like(wide))  # twice as fast as a bool
        l0 = acts.sum(1)
        acts = acts.mul_(wide).to(pre.dtype)
        places = true_places((wide - threshold).abs_() < bandwidth / 2)
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


fused_jumprelu = _FusedJumpReLU.apply
"""`lib.dictionaries.kernels.fused_jumprelu` in plain torch, for any device.

Few pre-activations are near their threshold, so `gap` and the gradient of θ are computed for these
alone; only `acts` is kept for the backward pass.
"""


def _bags(
    places: Int[Tensor, "nnz"],
    offsets: Int[Tensor, "n_plus_1"],
    weights: Float[Tensor, "nnz"],
    rows: Float[Tensor, "m d"],
    dtype: torch.dtype,
) -> Float[Tensor, "n d"]:
    """Sum i is that of `weights * rows[places]` from `offsets[i]` to `offsets[i + 1]`, or zeros."""
    if rows.is_cuda:
        from lib.dictionaries.kernels.triton_kernels import triton_bags

        return triton_bags(places, offsets, weights, rows, dtype)
    if len(offsets) == 1:
        return rows.new_zeros(0, rows.shape[1], dtype=dtype)
    options = {"per_sample_weights": weights.to(rows.dtype), "include_last_offset": True}
    return embedding_bag(places, rows, offsets, mode="sum", **options).to(dtype)


def dots_at(
    active: SparseActs, left: Float[Tensor, "n d"], right: Float[Tensor, "d_sae d"]
) -> Float[Tensor, "nnz"]:
    """`(left @ right.T)` at the pairs of `active`."""
    if left.is_cuda:
        from lib.dictionaries.kernels.triton_kernels import triton_dots

        return triton_dots(left, active.rows, right, active.indices)
    order, starts = active.by_latent  # rows of `right` are read once, those of `left` from cache
    places = active.rows_by_latent, starts[:-1], active.indices.index_select(0, order), 0
    dots = torch.ops.aten._embedding_bag_per_sample_weights_backward(right, left, *places)
    return torch.empty_like(dots).index_copy_(0, order, dots)
