"""Sparse products with hand-written gradients, and the buffers that they reuse.

With k of d_sae latents active, a dense decode and the two dense weight gradients cost d_sae / k
times the arithmetic that matters. All products here are weighted sums of rows: of weights for each
token, or, with the pairs sorted by latent, of activations for each latent.
"""

import contextlib
import importlib
import warnings
from collections import defaultdict
from collections.abc import Iterator
from functools import cache
from types import ModuleType

import torch
from jaxtyping import Float, Int
from torch import Tensor
from torch.nn.functional import embedding_bag

from lib.sparse.acts import SparseActs

BLOCK = (2**18, 2**27)
"""Numbers of a matrix handled at a time: what a CPU's cache holds, and enough to fill a GPU."""


def rows_in_cache(matrix: Tensor) -> int:
    """Rows that fit all threads' caches, so that several passes over them read memory once."""
    threads = 1 if matrix.is_cuda else torch.get_num_threads()
    return max(1, threads * BLOCK[matrix.is_cuda] // matrix.shape[1])


def product_dtype(matrix: Tensor) -> torch.dtype:
    """The dtype its products are taken in: autocast's, or its own."""
    kind = matrix.device.type
    return torch.get_autocast_dtype(kind) if torch.is_autocast_enabled(kind) else matrix.dtype


class _Buffers:
    """A pool of large buffers reused across steps.

    On a CPU, fresh pages cost as much as a fifth of the products that fill them; torch's own
    allocator keeps what a GPU frees.
    """

    def __init__(self) -> None:
        self.free: dict[tuple, list[Tensor]] = defaultdict(list)
        self.lent: set[int] = set()  # by address: a gradient is another tensor in the same place


_pools: list[_Buffers] = []


@contextlib.contextmanager
def reused_buffers() -> Iterator[None]:
    """Inside the context, weight gradients and blocks of pre-activations lie in reused buffers.

    Nobody may read a gradient after `release` got it.
    """
    # Linux hands freed blocks back to the system until it has seen one as large as this freed;
    # from then on it keeps the small ones of every step
    torch.empty(31 * 2**20, dtype=torch.uint8)
    _pools.append(_Buffers())
    try:
        yield
    finally:
        _pools.pop()


def borrow(n: int, m: int, dtype: torch.dtype, device: torch.device) -> Tensor:
    """A matrix `[n m]` with anything in it, the caller's until released."""
    if not _pools or device.type != "cpu":
        return torch.empty(n, m, dtype=dtype, device=device)
    free = _pools[-1].free[n, m, dtype]
    matrix = free.pop() if free else torch.empty(n, m, dtype=dtype)
    _pools[-1].lent.add(matrix.data_ptr())
    return matrix


def release(matrix: Tensor | None) -> None:
    """Take back a borrowed matrix that nobody reads any more; two of a shape are kept."""
    if matrix is None or not _pools or matrix.data_ptr() not in _pools[-1].lent:
        return
    _pools[-1].lent.remove(matrix.data_ptr())
    free = _pools[-1].free[(*matrix.shape, matrix.dtype)]
    if len(free) < 2:  # not as a view, whose base would keep autograd from adding in place
        free.append(matrix.data)


def own(matrix: Tensor) -> Tensor:
    """A matrix that may be written into: itself where it is borrowed, else a copy."""
    lent = _pools and matrix.data_ptr() in _pools[-1].lent
    return matrix if lent else matrix.clone()


@cache
def triton() -> ModuleType:
    """The Triton twins, loaded when first needed: slow to import, and not on every platform."""
    return importlib.import_module("lib.sparse.triton")


class _Rows(torch.autograd.Function):
    @staticmethod
    def forward(ctx, W_enc):
        return W_enc.T

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx, grad):
        return (grad.to_dense() if grad.is_sparse else grad).T


def rows_of(W_enc: Float[Tensor, "d_in d_sae"]) -> Float[Tensor, "d_sae d_in"]:
    """`W_enc.T`, through which sparse gradients pass; free where dense ones are there to join."""
    return _Rows.apply(W_enc)


class _Columns(torch.autograd.Function):
    @staticmethod
    def forward(ctx, rows, widths):
        return tuple(part.contiguous() for part in rows.split(widths, dim=1))

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx, *grads):
        whole = torch.cat(grads, dim=1)
        for grad in grads:
            release(grad)
        return whole, None


def columns_of(rows: Float[Tensor, "m d"], widths: tuple[int, ...]) -> tuple[Tensor, ...]:
    """`rows` cut into blocks of columns, each contiguous; takes their gradients' buffers back."""
    return _Columns.apply(rows, widths)


def active_pre_acts(
    x: Float[Tensor, "n d_in"],
    encoder: Float[Tensor, "d_sae d_in"],
    b_enc: Float[Tensor, "d_sae"],
    b_in: Float[Tensor, "d_in"],
    active: SparseActs,
) -> SparseActs:
    """Pre-activations of the `active` pairs: `active` with values made differentiable.

    The caller has computed `active.values = ((x - b_in) @ encoder.T + b_enc)[rows, indices]`
    without a graph; the backward pass touches these pairs only. `x` gets a gradient if it wants
    one.
    """
    return active.with_values(_ActivePreActs.apply(x, encoder, b_enc, b_in, active))


def sparse_decode(
    acts: SparseActs, W_dec: Float[Tensor, "d_sae d_out"]
) -> Float[Tensor, "n d_out"]:
    """`acts @ W_dec`; no bias is added."""
    return _SparseDecode.apply(acts.values, W_dec, acts)


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
) -> Float[Tensor, "d_sae d"]:
    """`acts.T @ dense`, where acts holds `values` at the pairs of `active`."""
    order, starts = active.by_latent
    places, weights = active.rows_by_latent, values.index_select(0, order)
    plain = dense.device.type == "cpu" and dense.dtype != torch.bfloat16
    if not (plain and torch.backends.mkl.is_available()):
        return _bags(places, starts, weights, dense, dtype)
    out = borrow(active.n_latents, dense.shape[1], dtype, dense.device)
    with warnings.catch_warnings(action="ignore"):  # "beta state"
        parts, size = (starts, places, weights.to(dtype)), (len(out), len(dense))
        acts = torch.sparse_csr_tensor(*parts, size, check_invariants=False)
    return torch.addmm(out, acts, dense, beta=0, out=out)


class _ActivePreActs(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x, encoder, b_enc, b_in, active):
        ctx.save_for_backward(x, encoder, b_in)
        ctx.active = active
        return active.values.to(encoder.dtype, copy=True)

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx, grad):
        x, encoder, b_in = ctx.saved_tensors
        active, d_b_enc = ctx.active, sum_by_latent(ctx.active, grad)
        low = (x - b_in).to(active.values.dtype)
        d_encoder = _weight_gradient(active, grad, low, encoder.dtype)
        tokens = (active.indices, active.offsets, grad, encoder, x.dtype)
        d_x = _bags(*tokens) if ctx.needs_input_grad[0] else None
        return d_x, d_encoder, d_b_enc, -(d_b_enc @ encoder), None


class _SparseDecode(torch.autograd.Function):
    @staticmethod
    def forward(ctx, values, W_dec, active):
        rows = W_dec.to(product_dtype(W_dec))
        ctx.save_for_backward(values, rows)
        ctx.active, ctx.dtype = active, W_dec.dtype
        return _bags(active.indices, active.offsets, values, rows, W_dec.dtype)

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx, grad):
        values, rows = ctx.saved_tensors
        active, grad = ctx.active, grad.to(rows.dtype).contiguous()
        d_values = dots_at(active, grad, rows).to(values.dtype)
        return d_values, _weight_gradient(active, values, grad, ctx.dtype), None


def _bags(
    places: Int[Tensor, "nnz"],
    offsets: Int[Tensor, "n_plus_1"],
    weights: Float[Tensor, "nnz"],
    rows: Float[Tensor, "m d"],
    dtype: torch.dtype,
) -> Float[Tensor, "n d"]:
    """Sum i is that of `weights * rows[places]` from `offsets[i]` to `offsets[i + 1]`, or zeros."""
    if rows.is_cuda:
        return triton().triton_bags(places, offsets, weights, rows, dtype)
    if len(offsets) == 1:
        return rows.new_zeros(0, rows.shape[1], dtype=dtype)
    options = {"per_sample_weights": weights.to(rows.dtype), "include_last_offset": True}
    return embedding_bag(places, rows, offsets, mode="sum", **options).to(dtype)


def dots_at(
    active: SparseActs, left: Float[Tensor, "n d"], right: Float[Tensor, "d_sae d"]
) -> Float[Tensor, "nnz"]:
    """`(left @ right.T)` at the pairs of `active`."""
    if left.is_cuda:
        return triton().triton_dots(left, active.rows, right, active.indices)
    order, starts = active.by_latent  # rows of `right` are read once, those of `left` from cache
    places = active.rows_by_latent, starts[:-1], active.indices.index_select(0, order), 0
    dots = torch.ops.aten._embedding_bag_per_sample_weights_backward(right, left, *places)
    return torch.empty_like(dots).index_copy_(0, order, dots)
