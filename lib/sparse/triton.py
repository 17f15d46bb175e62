"""The sparse path's two products and the fused JumpReLU in Triton; their twins are in `eager`.

A sum is one program's, or leaves it as one partial sum per block, added up afterwards: no atomics,
so the same input gives the same bits. Sums are in float32, or float64 where an input is. Shapes,
places and devices are the caller's to check: the kernels read what they are pointed at.
"""

from typing import no_type_check

import torch
import triton
import triton.language as tl
from jaxtyping import Float, Int
from torch import Tensor
from triton.language import constexpr

BLOCK_N, BLOCK_D = constexpr(32), constexpr(128)
"""Tokens and latents of one JumpReLU program."""


def triton_bags(
    places: Int[Tensor, "nnz"],
    offsets: Int[Tensor, "m_plus_1"],
    weights: Float[Tensor, "nnz"],
    rows: Float[Tensor, "r d"],
    out_dtype: torch.dtype,
) -> Float[Tensor, "m d"]:
    """`out[i] = Σ_j weights[j] · rows[places[j]]`, with j from `offsets[i]` to `offsets[i + 1]`."""
    m, d = len(offsets) - 1, rows.shape[1]
    # a turn takes the pairs of a mean bag: few of a latent, or lanes idle; many of a token, or
    # too few loads are under way
    tile = _tile(min(max(triton.next_power_of_2(len(places) // max(m, 1)), 4), 32), rows)
    out, weights = rows.new_empty(m, d, dtype=out_dtype), weights.to(_wide(weights, rows))
    grid = (m, triton.cdiv(d, tile["BLOCK"]))
    _launch(_bags, grid, places, offsets, weights, rows, out, d, **tile)
    return out


def triton_dots(
    left: Float[Tensor, "n d"],
    left_rows: Int[Tensor, "nnz"],
    right: Float[Tensor, "r d"],
    right_rows: Int[Tensor, "nnz"],
) -> Float[Tensor, "nnz"]:
    """`dots[j] = ⟨left[left_rows[j]], right[right_rows[j]]⟩`, as wide as it is summed."""
    nnz, d, tile = len(left_rows), right.shape[1], _tile(16, right)
    grid = (triton.cdiv(nnz, 16), triton.cdiv(d, tile["BLOCK"]))
    sums = right.new_empty(grid[1], nnz, dtype=_wide(left, right))
    _launch(_dots, grid, left, left_rows, right, right_rows, sums, nnz, d, **tile)
    return sums.sum(0)


class _TritonJumpReLU(torch.autograd.Function):
    @staticmethod
    def forward(ctx, pre, log_threshold, bandwidth):
        wide, (n, d_sae) = torch.promote_types(pre.dtype, torch.float32), pre.shape
        pre, threshold = pre.contiguous(), log_threshold.to(wide).exp()
        bandwidth, acts = bandwidth.to(wide), torch.empty_like(pre)
        # latents on the first axis: the second ends at 65,535 blocks of tokens
        ctx.grid = triton.cdiv(d_sae, BLOCK_D.value), triton.cdiv(n, BLOCK_N.value)
        l0, gap = threshold.new_empty(2, ctx.grid[0], n)
        _launch(_jumprelu, ctx.grid, pre, threshold, bandwidth, acts, l0, gap, n, d_sae)
        ctx.save_for_backward(pre, threshold, bandwidth)
        ctx.parameter_dtype = log_threshold.dtype
        return acts, l0.sum(0), gap.sum(0)

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx, *grads):
        pre, threshold, bandwidth = ctx.saved_tensors
        d_pre, d_threshold = torch.empty_like(pre), threshold.new_empty(ctx.grid[1], pre.shape[1])
        given = (pre, threshold, bandwidth, *grads, d_pre, d_threshold, *pre.shape)
        _launch(_jumprelu_backward, ctx.grid, *given)
        return d_pre, (threshold * d_threshold.sum(0)).to(ctx.parameter_dtype), None


triton_jumprelu = _TritonJumpReLU.apply
"""`lib.sparse.fused_jumprelu` on a GPU, or anywhere under Triton's interpreter."""


def _tile(pairs: int, rows: Float[Tensor, "r d"]) -> dict:
    """What one program of `_bags` or `_dots` handles at a time: `pairs` by a block of columns.

    The first axis of the grid moves fastest, so all programs of a block run before the next: while
    a block of all `rows` fits the nearer half of an H200's 50 MB L2, each row is fetched once, not
    once a pair. 32 numbers of the tile for each thread stay in registers.
    """
    block = 256 if len(rows) * 256 * rows.element_size() <= 25e6 else 128
    block = min(block, triton.next_power_of_2(rows.shape[1]))
    return {"PAIRS": pairs, "BLOCK": block, "num_warps": max(1, pairs * block // 1024)}


def _wide(one: Tensor, other: Tensor) -> torch.dtype:
    return torch.promote_types(torch.result_type(one, other), torch.float32)


def _launch(kernel, grid: tuple[int, int], *given: Tensor | int, **sizes) -> None:
    with torch.cuda.device_of(given[0]):  # Triton launches on the current device
        kernel[grid](*[x.contiguous() if isinstance(x, Tensor) else x for x in given], **sizes)


@triton.jit
@no_type_check  # the annotations are Triton's own
def _gather(rows, places, pairs, end, columns, d):
    """`rows[places[pairs], columns]`, and zeros from pair `end` and column `d` on."""
    row = tl.load(places + pairs, mask=pairs < end, other=0).to(tl.int64)  # row * d passes 2^31
    inside = (pairs < end)[:, None] & (columns < d)[None, :]
    return tl.load(rows + row[:, None] * d + columns[None, :], mask=inside, other=0.0)


@triton.jit
@no_type_check
def _bags(places, offsets, weights, rows, out, d, PAIRS: constexpr, BLOCK: constexpr):
    bag = tl.program_id(0).to(tl.int64)
    columns = tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
    sums = tl.zeros((PAIRS, BLOCK), dtype=weights.dtype.element_ty)
    end = tl.load(offsets + bag + 1)
    for first in range(tl.load(offsets + bag), end, PAIRS):
        pairs = first + tl.arange(0, PAIRS)
        weight = tl.load(weights + pairs, mask=pairs < end, other=0.0)
        sums += weight[:, None] * _gather(rows, places, pairs, end, columns, d)
    tl.store(out + bag * d + columns, tl.sum(sums, axis=0), mask=columns < d)


@triton.jit
@no_type_check
def _dots(left, left_rows, right, right_rows, out, nnz, d, PAIRS: constexpr, BLOCK: constexpr):
    pairs = tl.program_id(0).to(tl.int64) * PAIRS + tl.arange(0, PAIRS)
    columns = tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
    ours = _gather(left, left_rows, pairs, nnz, columns, d).to(out.dtype.element_ty)
    theirs = _gather(right, right_rows, pairs, nnz, columns, d)
    out += tl.program_id(1).to(tl.int64) * nnz
    tl.store(out + pairs, tl.sum(ours * theirs, axis=1), mask=pairs < nnz)


@triton.jit
@no_type_check
def _block(pre, threshold, bandwidth, n, d_sae):
    """This program's block. Outside the matrix `pre` is -inf: neither active nor near."""
    rows = tl.program_id(1) * BLOCK_N + tl.arange(0, BLOCK_N)
    columns = tl.program_id(0) * BLOCK_D + tl.arange(0, BLOCK_D)
    inside = (rows < n)[:, None] & (columns < d_sae)[None, :]
    places = rows[:, None].to(tl.int64) * d_sae + columns[None, :]
    theta = tl.load(threshold + columns, mask=columns < d_sae, other=0.0)
    width = tl.load(bandwidth + columns, mask=columns < d_sae, other=1.0)
    value = tl.load(pre + places, mask=inside, other=float("-inf")).to(theta.dtype)
    return rows, columns, places, inside, value, theta, width


@triton.jit
@no_type_check
def _jumprelu(pre, threshold, bandwidth, acts, l0, gap, n, d_sae):
    rows, _, places, inside, value, theta, width = _block(pre, threshold, bandwidth, n, d_sae)
    u = value - theta[None, :]
    tl.store(acts + places, tl.where(u > 0, value, 0.0), mask=inside)
    partial = tl.program_id(0).to(tl.int64) * n + rows
    tl.store(l0 + partial, tl.sum((u > 0).to(u.dtype), axis=1), mask=rows < n)
    short = tl.maximum(0.5 - tl.abs(u) / width[None, :], 0.0)
    tl.store(gap + partial, tl.sum(short, axis=1), mask=rows < n)


@triton.jit
@no_type_check
def _jumprelu_backward(
    pre, threshold, bandwidth, d_acts, d_l0, d_gap, d_pre, d_threshold, n, d_sae
):
    rows, columns, places, inside, value, theta, width = _block(pre, threshold, bandwidth, n, d_sae)
    u = value - theta[None, :]
    to_acts = tl.load(d_acts + places, mask=inside, other=0.0).to(u.dtype)
    to_l0 = tl.load(d_l0 + rows, mask=rows < n, other=0.0)[:, None]
    to_gap = tl.load(d_gap + rows, mask=rows < n, other=0.0)[:, None]
    near = tl.abs(u) < width[None, :] / 2
    sign = (u > 0).to(u.dtype) - (u < 0).to(u.dtype)
    pull = tl.where(near, sign * to_gap / width[None, :], 0.0)
    tl.store(d_pre + places, tl.where(u > 0, to_acts, 0.0) - pull, mask=inside)
    jump = (theta[None, :] * to_acts + to_l0) / width[None, :]
    column_sums = tl.sum(pull - tl.where(near, jump, 0.0), axis=0)
    partial = tl.program_id(1).to(tl.int64) * d_sae + columns
    tl.store(d_threshold + partial, column_sums, mask=columns < d_sae)
