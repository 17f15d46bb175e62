"""The fused JumpReLU: eager against float64, Triton against eager.

Without a GPU the Triton kernels run under its interpreter, in a process of their own.
"""

import inspect
import os
import subprocess
import sys

import pytest
import torch
from torch.autograd import grad, gradcheck

from lib import paths
from lib.sparse import dense_jumprelu, eager

ROOT = paths.root()
CUDA = torch.cuda.is_available()
INTERPRETED = os.environ.get("TRITON_INTERPRET") == "1"
needs_triton = pytest.mark.skipif(not (CUDA or INTERPRETED), reason="no GPU, no interpreter")
WIDTHS = [0.01, 1.0, 20.0]
DTYPES = [torch.float32, torch.bfloat16, torch.float64]
EDGES = [[0.0], [0.75], [0.875], [1.0], [1.125], [1.25], [2.0]]
SHAPES = [(37, 203), (64, 256), (1, 1), (33, 129), (0, 70), (3, 8)]


def some(n, d, dtype=torch.float64, wide=torch.float64, width=1.0, seed=0):
    """Inputs with every kind of element, and a gradient for each output."""
    torch.manual_seed(seed)
    pre = torch.randn(n, d, dtype=torch.float64).to(dtype)
    log_threshold = (0.3 + 0.4 * torch.rand(d, dtype=torch.float64)).log()
    bandwidth = width * (0.2 + 0.4 * torch.rand(d, dtype=torch.float64))
    grads = [torch.randn(n, d).to(dtype), torch.randn(n).to(wide), torch.randn(n).to(wide)]
    return (pre, log_threshold.to(wide), bandwidth.to(wide)), grads


def run(function, inputs, grads):
    """Outputs, then the gradients of `pre` and `log_threshold`."""
    pre, log_threshold = (x.detach().clone().requires_grad_() for x in inputs[:2])
    out = function(pre, log_threshold, inputs[2])
    return [x.detach() for x in (*out, *grad(out, (pre, log_threshold), grads))]


def reference(pre, log_threshold, bandwidth):
    """By autograd: the jump of height θ and the step of height 1 become ramps, for θ alone."""
    theta = log_threshold.exp()
    hard = (pre > theta).to(pre)
    soft = ((pre.detach() - theta) / bandwidth + 0.5).clamp(0, 1)
    soft = soft - soft.detach()  # no value, only a gradient
    relaxed = ((pre - theta) / bandwidth + 0.5).clamp(0, 1)
    acts, l0 = pre * hard + theta.detach() * soft, (hard + soft).sum(1)
    return acts, l0, (relaxed - hard).abs().sum(1)


@pytest.mark.parametrize("shape", [*SHAPES, (40, 1000)])
@pytest.mark.parametrize("width", WIDTHS)
def test_eager_has_the_values_and_gradients_of_the_reference(shape, width):
    inputs, grads = some(*shape, width=width)
    ours, right = (run(f, inputs, grads) for f in (eager.dense_jumprelu, reference))
    torch.testing.assert_close(ours, right)


def test_the_reference_meets_every_way_of_finding_what_is_near():
    low, high = zip((0, 1 / 64), (1 / 16, 1 / 2), (0.9, 1), strict=True)
    for width, least, most in zip(WIDTHS, low, high, strict=True):
        pre, log_threshold, bandwidth = some(40, 1000, width=width)[0]
        assert least < ((pre - log_threshold.exp()).abs() < bandwidth / 2).double().mean() < most


def test_single_elements_by_hand():
    """Below, on both edges, on both sides, on the threshold itself, above; θ 1, bandwidth 1/2."""
    inputs = (torch.tensor(EDGES), torch.zeros(1), torch.tensor([0.5]))
    one = torch.ones(7)
    acts, l0, gap, _, _ = run(eager.dense_jumprelu, inputs, [one[:, None], one, one])
    assert acts[:, 0].tolist() == [0, 0, 0, 0, 1.125, 1.25, 2]
    assert l0.tolist() == [0, 0, 0, 0, 1, 1, 1]
    assert gap.tolist() == [0, 0, 0.25, 0.5, 0.25, 0, 0]
    for place, (through_acts, through_l0, through_gap) in enumerate(
        zip((0, 0, -2, -2, -2, 0, 0), (0, 0, -2, -2, -2, 0, 0), (0, 0, -2, 0, 2, 0, 0), strict=True)
    ):
        for which, right in enumerate((through_acts, through_l0, through_gap)):
            only = [torch.zeros(7, 1), torch.zeros(7), torch.zeros(7)]
            only[which][place] = 1
            d_pre, d_log_threshold = run(eager.dense_jumprelu, inputs, only)[3:]
            moves = {0: float(place > 3), 1: 0.0, 2: -float(right)}[which]
            assert d_pre[place].item() == moves and d_pre.abs().sum() == abs(moves)
            assert d_log_threshold.item() == right


def test_gradient_of_the_gap_is_exact():
    inputs, _ = some(6, 9, width=4.0)
    pre, log_threshold = (x.requires_grad_() for x in inputs[:2])
    u = (pre - log_threshold.exp()).abs()
    kinks = torch.stack([u, (u - inputs[2] / 2).abs()])
    assert kinks.min() > 1e-4 and 0.2 < (u < inputs[2] / 2).double().mean() < 0.8
    assert gradcheck(lambda a, b: eager.dense_jumprelu(a, b, inputs[2])[2], (pre, log_threshold))


def test_no_latent_active_and_all_active():
    inputs, grads = some(5, 40, width=0.1)
    inputs[0][1], inputs[0][2] = -3.0, 3.0
    acts, l0, gap, d_pre, _ = run(eager.dense_jumprelu, inputs, grads)
    assert l0[1] == 0 and acts[1].abs().sum() == 0 and d_pre[1].abs().sum() == 0
    assert l0[2] == 40 and torch.equal(acts[2], inputs[0][2]) and torch.equal(d_pre[2], grads[0][2])
    assert (gap[1:3] == 0).all() and 0 < l0[0] < 40


def odd_strides(tensor: torch.Tensor) -> torch.Tensor:
    """The same values, neither contiguous nor dense in memory."""
    return torch.stack([tensor.mT, tensor.mT + 1], dim=-1)[..., 0].mT


@pytest.mark.parametrize("width", [0.01, 1.0])
def test_strides_do_not_matter(width):
    inputs, grads = some(24, 40, width=width)
    right = run(eager.dense_jumprelu, inputs, grads)
    ours = run(lambda pre, *rest: eager.dense_jumprelu(odd_strides(pre), *rest), inputs, grads)
    torch.testing.assert_close(ours, right, rtol=0, atol=0)
    ours = run(eager.dense_jumprelu, inputs, [odd_strides(grads[0]), *grads[1:]])
    torch.testing.assert_close(ours, right, rtol=0, atol=0)
    spread = [torch.ones(()).double().expand(x.shape) for x in grads]  # as `.sum()` gives them
    dense = [x.contiguous() for x in spread]
    ours, right = (run(eager.dense_jumprelu, inputs, given) for given in (spread, dense))
    torch.testing.assert_close(ours, right, rtol=0, atol=0)


def test_half_precision_sums_in_float32():
    inputs, grads = some(30, 601, dtype=torch.bfloat16, wide=torch.float32)
    inputs[0][0] = 3.0  # 601 is no bfloat16
    ours = run(eager.dense_jumprelu, inputs, grads)
    assert ours[0].dtype == ours[3].dtype == torch.bfloat16
    as_float32 = (inputs[0].float(), *inputs[1:]), [grads[0].float(), *grads[1:]]
    right = run(eager.dense_jumprelu, *as_float32)
    assert ours[1][0] == 601
    torch.testing.assert_close(ours[1:3] + ours[4:], right[1:3] + right[4:], rtol=0, atol=0)
    assert torch.equal(ours[3], right[3].bfloat16()) and torch.equal(ours[0], right[0].bfloat16())


def test_bad_input_is_named():
    pre, log_threshold, bandwidth = some(4, 6)[0]
    unchecked = inspect.unwrap(dense_jumprelu)  # as outside the tests, where shapes are not types
    with pytest.raises(ValueError, match=r"need log_threshold of shape \(6,\).* got \(1,\)"):
        unchecked(pre, log_threshold[:1], bandwidth)
    with pytest.raises(ValueError, match=r"need bandwidth of shape \(6,\).* got \(\)"):
        unchecked(pre, log_threshold, torch.tensor(0.5))
    with pytest.raises(ValueError, match="need bandwidth on cpu, beside pre, got meta"):
        unchecked(pre, log_threshold, bandwidth.to("meta"))


def test_plain_torch_does_not_import_triton():
    code = """
import sys, torch
from lib.sparse import dense_jumprelu
dense_jumprelu(torch.ones(2, 3), torch.zeros(3), torch.ones(3))
assert "triton" not in sys.modules
"""
    subprocess.run([sys.executable, "-c", code], check=True, cwd=ROOT)


@needs_triton
@pytest.mark.parametrize("dtype", DTYPES)
def test_triton_path_is_the_eager_one(dtype):
    wide = torch.promote_types(dtype, torch.float32)
    for shape in SHAPES:
        compare_with_triton(*some(*shape, dtype, wide))


@needs_triton
def test_triton_path_on_the_edges():
    inputs = (torch.tensor(EDGES), torch.zeros(1), torch.tensor([0.5]))
    torch.manual_seed(0)
    compare_with_triton(inputs, [torch.randn(7, 1), torch.randn(7), torch.randn(7)])


def compare_with_triton(inputs, grads):
    """Also: the same bits again, whatever the strides."""
    from lib.sparse.triton import triton_jumprelu

    device = "cuda" if CUDA else "cpu"
    right = run(eager.dense_jumprelu, inputs, grads)
    there = tuple(x.to(device) for x in inputs)
    upstream = [x.to(device) for x in grads]
    ours = run(triton_jumprelu, there, upstream)
    upstream[0] = odd_strides(upstream[0])
    again = run(lambda pre, *rest: triton_jumprelu(odd_strides(pre), *rest), there, upstream)
    for mine, same, other in zip(ours, again, right, strict=True):
        assert torch.equal(mine, same)
        limit = {torch.bfloat16: 1e-2, torch.float32: 1e-5, torch.float64: 1e-12}[mine.dtype]
        torch.testing.assert_close(mine.cpu(), other, rtol=limit, atol=min(limit, 1e-5))


@pytest.mark.skipif(CUDA or INTERPRETED, reason="the tests of the Triton path run here")
def test_the_kernels_under_the_interpreter():
    """The variable is read when triton is imported, so this needs a new process."""
    command = [
        sys.executable,
        "-m",
        "pytest",
        "-k",
        "triton_path",
        "-p",
        "no:cacheprovider",
        __file__,
    ]
    environment = {**os.environ, "TRITON_INTERPRET": "1"}
    done = subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True)
    assert done.returncode == 0, done.stdout
    assert f"{len(DTYPES) + 1} passed" in done.stdout and "skipped" not in done.stdout


@pytest.mark.skipif(INTERPRETED, reason="nothing is compiled")
@pytest.mark.filterwarnings("ignore:TRITON_DEFAULT_FP_FUSION")
@pytest.mark.parametrize("kernel", ["_jumprelu", "_jumprelu_backward"])
@pytest.mark.parametrize("pre", ["fp32", "bf16"])
def test_the_kernels_compile_for_a_gpu(kernel, pre, tmp_path, monkeypatch):
    """What the interpreter accepts the compiler may not; it needs no GPU."""
    triton = pytest.importorskip("triton")
    from triton.backends.compiler import GPUTarget
    from triton.compiler import ASTSource

    from lib.sparse import triton_kernels

    monkeypatch.setenv("TRITON_CACHE_DIR", str(tmp_path))
    function = getattr(triton_kernels, kernel)
    types = dict.fromkeys(function.arg_names, "*fp32")
    types |= dict.fromkeys(("pre", "acts", "d_acts", "d_pre"), f"*{pre}")
    types |= dict.fromkeys(("n", "d_sae"), "i32")
    signature = {name: types[name] for name in function.arg_names}
    source = ASTSource(function, signature)
    assert triton.compile(source, target=GPUTarget("cuda", 90, 32)).asm["cubin"]


@pytest.mark.skipif(not CUDA, reason="no GPU")
def test_cuda_tensors_go_to_triton_and_agree_with_the_cpu():
    inputs, grads = some(1000, 5000, torch.float32, torch.float32)
    right = run(dense_jumprelu, inputs, grads)
    there, upstream = ([x.cuda() for x in tensors] for tensors in (inputs, grads))
    ours = run(dense_jumprelu, there, upstream)
    out = dense_jumprelu(there[0].requires_grad_(), *there[1:])
    assert "Triton" in type(out[0].grad_fn).__name__
    torch.testing.assert_close([x.cpu() for x in ours], right, rtol=1e-4, atol=1e-3)
