"""Speed of the fused JumpReLU: `python -m tests.bench_jumprelu`.

GB/s of each pass against a copy that moves as many bytes: of the Triton kernels on a GPU, else of
the eager twin.
"""

from functools import partial

import torch
from torch.autograd import grad
from torch.utils.benchmark import Timer

from lib.sparse import dense_jumprelu


def seconds(function) -> float:
    """Median, on as many threads as torch has."""
    timer = Timer("f()", globals={"f": function}, num_threads=torch.get_num_threads())
    return timer.blocked_autorange(min_run_time=0.5).median


def measure(n: int, d_sae: int, device: str, dtype: torch.dtype) -> None:
    """Standard normal pre-activations, of which 1.4 % are active and 0.7 % near the threshold."""
    torch.manual_seed(0)
    pre = torch.randn(n, d_sae, device=device, dtype=dtype, requires_grad=True)
    log_threshold = torch.full((d_sae,), 2.2, device=device).log().requires_grad_()
    bandwidth = torch.full((d_sae,), 0.2, device=device)
    out = dense_jumprelu(pre, log_threshold, bandwidth)
    ones = [torch.ones_like(x) for x in out]
    passes = {  # matrices read and written
        "forward": (2, lambda: dense_jumprelu(pre, log_threshold, bandwidth)),
        "backward": (3, lambda: grad(out, (pre, log_threshold), ones, retain_graph=True)),
    }
    for name, (matrices, function) in passes.items():
        moved = matrices * pre.numel() * pre.element_size()
        source, target = torch.zeros(2, moved // 2, dtype=torch.uint8, device=device)
        spent, copy = seconds(function), seconds(partial(target.copy_, source))
        print(
            f"{n:6d} x {d_sae:6d} {dtype} {name:8s} {1000 * spent:8.3f} ms, "
            f"{moved / spent / 1e9:7.1f} GB/s, share of a copy's {copy / spent:.2f}"
        )


def main() -> None:
    if not torch.cuda.is_available():
        for d_sae in (1024, 8192):
            measure(1024, d_sae, "cpu", torch.float32)
        return
    for dtype in (torch.float32, torch.bfloat16):
        for d_sae in (4096, 16384, 65536):
            measure(8192, d_sae, "cuda", dtype)


if __name__ == "__main__":
    main()
