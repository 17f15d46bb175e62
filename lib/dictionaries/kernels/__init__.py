"""Kernels with hand-written gradients: the sparse path, of pairs alone, and the fused JumpReLU."""

from jaxtyping import Float
from torch import Tensor

from lib.dictionaries.kernels import eager
from lib.dictionaries.kernels.eager import active_pre_acts, sparse_decode, sum_by_latent
from lib.dictionaries.pairs import SparseActs

__all__ = ["SparseActs", "active_pre_acts", "fused_jumprelu", "sparse_decode", "sum_by_latent"]


def fused_jumprelu(
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
        return eager.fused_jumprelu(pre, log_threshold, bandwidth)
    from lib.dictionaries.kernels.triton_kernels import triton_jumprelu  # slow, not everywhere

    return triton_jumprelu(pre, log_threshold, bandwidth)
