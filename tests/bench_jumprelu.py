"""Speed of the fused JumpReLU: `python -m tests.bench_jumprelu`.

On a GPU, GB/s of each pass against a device copy that moves as many bytes. On a CPU, ms of the
eager twin.
"""

import torch
from torch.autograd import grad
from torch.utils.benchmark import Timer

from lib.sparse import dense_jumprelu


def inputs(n: int, d_sae: int, device: str, dtype=torch.float32):
    """Standard normal pre-activations, of which 1.4 % are active and 0.7 % near the threshold."""
    torch.manual_seed(0)
    pre = torch.randn(n, d_sae, device=device, dtype=dtype, requires_grad=True)
    log_threshold = torch.full((d_sae,), 2.2, device=device).log().requires_grad_()
    bandwidth = torch.full((d_sae,), 0.2, device=device)
    return pre, log_threshold, bandwidth


def seconds(function) -> float:
    """Median, on as many threads as torch has."""
    timer = Timer("f()", globals={"f": function}, num_threads=torch.get_num_threads())
    return timer.blocked_autorange(min_run_time=0.5).median


def on_gpu(n: int, d_sae: int, dtype: torch.dtype) -> None:
    pre, log_threshold, bandwidth = inputs(n, d_sae, "cuda", dtype)
    out = dense_jumprelu(pre, log_threshold, bandwidth)
    ones = [torch.ones_like(x) for x in out]
    leaves = (pre, log_threshold)
    passes = {  # matrices read and written
        "forward": (2, lambda: dense_jumprelu(pre, log_threshold, bandwidth)),
        "backward": (3, lambda: grad(out, leaves, ones, retain_graph=True)),
    }
    for name, (matrices, function) in passes.items():
        moved = matrices * pre.numel() * pre.element_size()
        source = torch.empty(moved // 2, dtype=torch.uint8, device="cuda")
        target = torch.empty_like(source)
        ours = moved / seconds(function) / 1e9
        copy = moved / seconds(lambda a=source, b=target: b.copy_(a)) / 1e9
        share = f"{ours:7.0f} GB/s, copy {copy:.0f} GB/s, share {ours / copy:.2f}"
        print(f"{n:6d} x {d_sae:6d} {dtype} {name:8s} {share}")


def on_cpu(n: int, d_sae: int) -> None:
    pre, log_threshold, bandwidth = inputs(n, d_sae, "cpu")
    d_acts, d_rows = torch.randn(n, d_sae), torch.randn(n)

    def fused():
        out = dense_jumprelu(pre, log_threshold, bandwidth)
        grad(out, (pre, log_threshold), (d_acts, d_rows, d_rows))

    print(f"{n:6d} x {d_sae:6d} eager {1000 * seconds(fused):.2f} ms")


def main() -> None:
    if torch.cuda.is_available():
        for dtype in (torch.float32, torch.bfloat16):
            for d_sae in (4096, 16384, 65536):
                on_gpu(8192, d_sae, dtype)
        return
    print(f"bandwidth needs a GPU; here, forward and backward on {torch.get_num_threads()} threads")
    for d_sae in (1024, 8192):
        on_cpu(1024, d_sae)


if __name__ == "__main__":
    main()
