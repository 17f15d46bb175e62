"""The fused JumpReLU in Triton; `eager.fused_jumprelu` is its twin.

A program handles one block of tokens by latents and reads `pre` once. Sums over latents or over
tokens leave it as one partial sum per block, added up afterwards: no atomics, so the same input
gives the same bits.
"""

from typing import no_type_check

import torch
import triton
import triton.language as tl
from jaxtyping import Float
from torch import Tensor

BLOCK_N, BLOCK_D = 32, 128
"""Tokens and latents of one program."""


def triton_jumprelu(
    pre: Float[Tensor, "n d_sae"],
    log_threshold: Float[Tensor, "d_sae"],
    bandwidth: Float[Tensor, "d_sae"],
) -> tuple[Float[Tensor, "n d_sae"], Float[Tensor, "n"], Float[Tensor, "n"]]:
    """`lib.dictionaries.kernels.fused_jumprelu` on a GPU, or anywhere under Triton's interpreter.

    Shapes and devices are the caller's to check: the kernels read what they are pointed at.
    """
    return _TritonJumpReLU.apply(pre, log_threshold, bandwidth)


class _TritonJumpReLU(torch.autograd.Function):
    @staticmethod
    def forward(ctx, pre, log_threshold, bandwidth):
        wide = torch.promote_types(pre.dtype, torch.float32)
        pre, threshold = pre.contiguous(), log_threshold.to(wide).exp()
        bandwidth = bandwidth.to(wide).contiguous()
        n, d_sae = pre.shape
        acts = torch.empty_like(pre)
        l0, gap = threshold.new_empty(2, triton.cdiv(d_sae, BLOCK_D), n)
        _launch(_forward, pre, threshold, bandwidth, acts, l0, gap)
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
        _launch(_backward, pre, threshold, bandwidth, *grads, d_pre, d_threshold)
        d_log_threshold = threshold * d_threshold.sum(0)
        return d_pre, d_log_threshold.to(ctx.parameter_dtype), None


def _launch(kernel, pre: Float[Tensor, "n d_sae"], *others: Tensor) -> None:
    """Latent blocks on the first axis of the grid: the second ends at 65,535 blocks of tokens."""
    n, d_sae = pre.shape
    grid = (triton.cdiv(d_sae, BLOCK_D), triton.cdiv(n, BLOCK_N))
    with torch.cuda.device_of(pre):  # Triton launches on the current device
        kernel[grid](pre, *others, n, d_sae, BLOCK_N=BLOCK_N, BLOCK_D=BLOCK_D)


@triton.jit
@no_type_check  # the annotations are Triton's own
def _block(
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
def _forward(
    pre, threshold, bandwidth, acts, l0, gap, n, d_sae, BLOCK_N: tl.constexpr, BLOCK_D: tl.constexpr
):  # fmt: skip
    rows, _, places, inside, value, theta, width = _block(
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
def _backward(
    pre, threshold, bandwidth, d_acts, d_l0, d_gap, d_pre, d_threshold,
    n, d_sae, BLOCK_N: tl.constexpr, BLOCK_D: tl.constexpr
):  # fmt: skip
    rows, columns, places, inside, value, theta, width = _block(
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
