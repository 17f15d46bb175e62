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

BLOCK_N, BLOCK_D = 32, 128
"""Tokens and latents of one JumpReLU program."""
NEAR_L2 = 25 * 2**20
"""Bytes that one half of an H200's L2 holds."""


def triton_bags(
    places: Int[Tensor, "nnz"],
    offsets: Int[Tensor, "m_plus_1"],
    weights: Float[Tensor, "nnz"],
    rows: Float[Tensor, "r d"],
    out_dtype: torch.dtype,
) -> Float[Tensor, "m d"]:
    """`out[i] = Σ_j weights[j] · rows[places[j]]`, with j from `offsets[i]` to `offsets[i + 1]`."""
    m, d = len(offsets) - 1, rows.shape[1]
    out = rows.new_empty(m, d, dtype=out_dtype)
    if out.numel():
        # pairs a turn, as many as a bag has: a latent's 2 to 8 should leave few lanes idle, and
        # a token's k should keep many loads under way
        tile = _tile(min(max(triton.next_power_of_2(len(places) // m), 4), 32), rows, weights)
        given = [tensor.contiguous() for tensor in (places, offsets, weights, rows)]
        with torch.cuda.device_of(rows):  # Triton launches on the current device
            _bags[m, triton.cdiv(d, tile["BLOCK"])](*given, out, d, **tile)
    return out


def triton_dots(
    left: Float[Tensor, "n d"],
    left_rows: Int[Tensor, "nnz"],
    right: Float[Tensor, "r d"],
    right_rows: Int[Tensor, "nnz"],
) -> Float[Tensor, "nnz"]:
    """`dots[j] = ⟨left[left_rows[j]], right[right_rows[j]]⟩`, as wide as it is summed."""
    nnz, d = len(left_rows), right.shape[1]
    tile = _tile(16, right, left)
    blocks = triton.cdiv(d, tile["BLOCK"])
    wide = torch.promote_types(torch.promote_types(left.dtype, right.dtype), torch.float32)
    partial = right.new_empty(blocks, nnz, dtype=wide)
    if partial.numel():
        given = [tensor.contiguous() for tensor in (left, left_rows, right, right_rows)]
        with torch.cuda.device_of(right):
            _dots[triton.cdiv(nnz, tile["PAIRS"]), blocks](*given, partial, nnz, d, **tile)
    return partial.sum(0)


def triton_jumprelu(
    pre: Float[Tensor, "n d_sae"],
    log_threshold: Float[Tensor, "d_sae"],
    bandwidth: Float[Tensor, "d_sae"],
) -> tuple[Float[Tensor, "n d_sae"], Float[Tensor, "n"], Float[Tensor, "n"]]:
    """`lib.dictionaries.kernels.fused_jumprelu` on a GPU, or anywhere under the interpreter."""
    return _TritonJumpReLU.apply(pre, log_threshold, bandwidth)


def _tile(pairs: int, rows: Float[Tensor, "r d"], other: Tensor) -> dict:
    """What one program of `_bags` or `_dots` handles at a time: `pairs` by a block of columns.

    All programs of one block run before those of the next (the grid's first axis moves fastest),
    so a block of all `rows` should fit the L2: each row then comes from memory once, not once a
    pair. A thread has 32 numbers of the tile, so what is being loaded stays in registers.
    """
    block = 256 if len(rows) * 256 * rows.element_size() <= NEAR_L2 else 128
    block = min(block, triton.next_power_of_2(max(rows.shape[1], 1)))
    wide = tl.float64 if torch.float64 in (rows.dtype, other.dtype) else tl.float32
    warps = max(1, pairs * block // 1024)
    return {"PAIRS": pairs, "BLOCK": block, "WIDE": wide, "num_warps": warps}


@triton.jit
@no_type_check  # the annotations are Triton's own
def _bags(
    places, offsets, weights, rows, out, d,
    PAIRS: tl.constexpr, BLOCK: tl.constexpr, WIDE: tl.constexpr
):  # fmt: skip
    bag = tl.program_id(0).to(tl.int64)  # bag and row times d pass 2^31
    columns = tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
    sums = tl.zeros((PAIRS, BLOCK), dtype=WIDE)
    end = tl.load(offsets + bag + 1)
    for first in range(tl.load(offsets + bag), end, PAIRS):
        pairs = first + tl.arange(0, PAIRS)
        row = tl.load(places + pairs, mask=pairs < end, other=0).to(tl.int64)
        weight = tl.load(weights + pairs, mask=pairs < end, other=0.0).to(WIDE)
        inside = (pairs < end)[:, None] & (columns < d)[None, :]
        values = tl.load(rows + row[:, None] * d + columns[None, :], mask=inside, other=0.0)
        sums += weight[:, None] * values.to(WIDE)
    tl.store(out + bag * d + columns, tl.sum(sums, axis=0), mask=columns < d)


@triton.jit
@no_type_check
def _dots(
    left, left_rows, right, right_rows, partial, nnz, d,
    PAIRS: tl.constexpr, BLOCK: tl.constexpr, WIDE: tl.constexpr
):  # fmt: skip
    pairs = tl.program_id(0).to(tl.int64) * PAIRS + tl.arange(0, PAIRS)
    columns = tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
    inside = (pairs < nnz)[:, None] & (columns < d)[None, :]
    row = tl.load(left_rows + pairs, mask=pairs < nnz, other=0).to(tl.int64)
    ours = tl.load(left + row[:, None] * d + columns[None, :], mask=inside, other=0.0)
    row = tl.load(right_rows + pairs, mask=pairs < nnz, other=0).to(tl.int64)
    theirs = tl.load(right + row[:, None] * d + columns[None, :], mask=inside, other=0.0)
    sums = tl.sum(ours.to(WIDE) * theirs.to(WIDE), axis=1)
    tl.store(partial + tl.program_id(1).to(tl.int64) * nnz + pairs, sums, mask=pairs < nnz)


class _TritonJumpReLU(torch.autograd.Function):
    @staticmethod
    def forward(ctx, pre, log_threshold, bandwidth):
        wide = torch.promote_types(pre.dtype, torch.float32)
        pre, threshold = pre.contiguous(), log_threshold.to(wide).exp()
        bandwidth = bandwidth.to(wide).contiguous()
        n, d_sae = pre.shape
        acts = torch.empty_like(pre)
        l0, gap = threshold.new_empty(2, triton.cdiv(d_sae, BLOCK_D), n)
        _launch_jumprelu(_jumprelu_forward, pre, threshold, bandwidth, acts, l0, gap)
        ctx.save_for_backward(pre, threshold, bandwidth)
        ctx.parameter_dtype = log_threshold.dtype
        return acts, l0.sum(0), gap.sum(0)

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx, d_acts, d_l0, d_gap):
        pre, threshold, bandwidth = ctx.saved_tensors
        grads = [grad.contiguous() for grad in (d_acts, d_l0, d_gap)]
        d_pre = torch.empty_like(pre)
        d_threshold = threshold.new_empty(triton.cdiv(len(pre), BLOCK_N), pre.shape[1])
        _launch_jumprelu(_jumprelu_backward, pre, threshold, bandwidth, *grads, d_pre, d_threshold)
        d_log_threshold = threshold * d_threshold.sum(0)
        return d_pre, d_log_threshold.to(ctx.parameter_dtype), None


def _launch_jumprelu(kernel, pre: Float[Tensor, "n d_sae"], *others: Tensor) -> None:
    """Latent blocks on the first axis of the grid: the second ends at 65,535 blocks of tokens."""
    n, d_sae = pre.shape
    grid = (triton.cdiv(d_sae, BLOCK_D), triton.cdiv(n, BLOCK_N))
    with torch.cuda.device_of(pre):
        kernel[grid](pre, *others, n, d_sae, BLOCK_N=BLOCK_N, BLOCK_D=BLOCK_D)


@triton.jit
@no_type_check
def _jumprelu_block(
    pre, threshold, bandwidth, n, d_sae, BLOCK_N: tl.constexpr, BLOCK_D: tl.constexpr
):  # fmt: skip
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
def _jumprelu_forward(
    pre, threshold, bandwidth, acts, l0, gap, n, d_sae, BLOCK_N: tl.constexpr, BLOCK_D: tl.constexpr
):  # fmt: skip
    rows, _, places, inside, value, theta, width = _jumprelu_block(
        pre, threshold, bandwidth, n, d_sae, BLOCK_N, BLOCK_D
    )
    u = value - theta[None, :]
    tl.store(acts + places, tl.where(u > 0, value, 0.0), mask=inside)
    partial = tl.program_id(0).to(tl.int64) * n + rows
    tl.store(l0 + partial, tl.sum((u > 0).to(u.dtype), axis=1), mask=rows < n)
    short = tl.maximum(0.5 - tl.abs(u) / width[None, :], 0.0)
    tl.store(gap + partial, tl.sum(short, axis=1), mask=rows < n)


@triton.jit
@no_type_check
def _jumprelu_backward(
    pre, threshold, bandwidth, d_acts, d_l0, d_gap, d_pre, d_threshold,
    n, d_sae, BLOCK_N: tl.constexpr, BLOCK_D: tl.constexpr
):  # fmt: skip
    rows, columns, places, inside, value, theta, width = _jumprelu_block(
        pre, threshold, bandwidth, n, d_sae, BLOCK_N, BLOCK_D
    )
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
