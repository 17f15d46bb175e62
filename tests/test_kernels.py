"""Products of pairs and JumpReLU: gradients against float64 autograd, Triton against torch.

Without a GPU the Triton kernels run under its interpreter, in a process of their own.
"""

import inspect
import os
import subprocess
import sys

import pytest
import torch
from torch.autograd import grad, gradcheck
from torch.nn.functional import embedding_bag

from lib import paths
from lib.sparse import (
    SparseActs,
    active_pre_acts,
    dense_jumprelu,
    ops,
    sparse_decode,
    sparse_jumprelu,
)

ROOT = paths.root()
CUDA = torch.cuda.is_available()
INTERPRETED = os.environ.get("TRITON_INTERPRET") == "1"
needs_triton = pytest.mark.skipif(not (CUDA or INTERPRETED), reason="no GPU, no interpreter")
DEVICE = "cuda" if CUDA else "cpu"
LIMITS = {torch.bfloat16: 1e-2, torch.float32: 1e-5, torch.float64: 1e-12}
SIZES = {
    "few": [1, 0, 3, 2, 0, 4, 1],
    "empty ends": [0, 0, 5, 0, 7, 0],
    "long": [3, 70, 0, 33, 100, 1],
    "no pair": [0, 0, 0],
    "no bag": [],
}
"""Pairs of each bag."""


def bags(sizes: list[int], d: int, n_rows: int = 23, seed: int = 0):
    """Places, offsets, weights and rows in float64; one bag at least has a place twice."""
    torch.manual_seed(seed)
    offsets = torch.tensor([0, *sizes]).cumsum(0)
    places = torch.randint(n_rows, (sum(sizes),))
    first = next((i for i, size in enumerate(sizes) if size > 1), None)
    if first is not None:
        places[offsets[first] + 1] = places[offsets[first]]
    weights = torch.randn(len(places), dtype=torch.float64)
    return places, offsets, weights, torch.randn(n_rows, d, dtype=torch.float64)


def dense(places, offsets, weights, rows) -> torch.Tensor:
    """The sums as one product with a matrix of weights."""
    owners = torch.arange(len(offsets) - 1).repeat_interleave(offsets.diff())
    matrix = rows.new_zeros(len(offsets) - 1, len(rows))
    return matrix.index_put((owners, places), weights, accumulate=True) @ rows


def clamped_pairs() -> tuple[SparseActs, dict[str, torch.Tensor]]:
    """Empty rows at both ends and inside, latents without a pair likewise, one with many pairs;
    and weights for which about half of the pre-activations are below zero."""
    torch.manual_seed(14)
    acts = torch.zeros(8, 7, dtype=torch.float64)
    acts[1:3, 1:3] = acts[4:7, 2] = acts[5, 3:6] = 1
    pairs = SparseActs.of(acts)
    counts = pairs.offsets.diff()
    assert (counts[[0, 3, 7]] == 0).all() and counts.max() > 1
    counts = torch.bincount(pairs.indices, minlength=7)
    assert (counts[[0, 6]] == 0).all() and counts.max() == 5
    shapes = {"x": (8, 3), "encoder": (7, 3), "b_enc": (7,), "b_in": (3,), "W_dec": (7, 4)}
    leaves = {name: torch.randn(shape, dtype=torch.float64) for name, shape in shapes.items()}
    return pairs, {name: leaf.requires_grad_() for name, leaf in leaves.items()}


def sparse_x_hat(pairs, x, encoder, b_enc, b_in, W_dec) -> torch.Tensor:
    with torch.no_grad():
        values = ((x - b_in) @ encoder.T + b_enc)[pairs.rows, pairs.indices]
    pairs = pairs.with_values(values)
    pairs = active_pre_acts(x, encoder, b_enc, b_in, pairs)
    return sparse_decode(pairs.with_values(pairs.values.relu()), W_dec)


def dense_x_hat(pairs, x, encoder, b_enc, b_in, W_dec) -> torch.Tensor:
    mask = torch.zeros(len(x), len(encoder), dtype=x.dtype)
    mask[pairs.rows, pairs.indices] = 1
    return (((x - b_in) @ encoder.T + b_enc).relu() * mask) @ W_dec


def test_the_whole_path_has_the_gradients_of_dense_autograd():
    pairs, leaves = clamped_pairs()
    ours, right = (f(pairs, **leaves) for f in (sparse_x_hat, dense_x_hat))
    torch.testing.assert_close(ours, right)
    below = ((leaves["x"] - leaves["b_in"]) @ leaves["encoder"].T + leaves["b_enc"]) < 0
    assert 0.2 < below[pairs.rows, pairs.indices].double().mean() < 0.8
    upstream = torch.randn_like(right)
    ours, right = (grad(out, list(leaves.values()), upstream) for out in (ours, right))
    torch.testing.assert_close(ours, right)
    for d_weight in (ours[1], ours[4]):
        assert (d_weight[[0, 6]] == 0).all() and d_weight[2].abs().min() > 0
    assert (ours[0][[0, 3, 7]] == 0).all()


def test_the_whole_path_passes_gradcheck():
    pairs, leaves = clamped_pairs()
    names = list(leaves)
    assert gradcheck(
        lambda *values: sparse_x_hat(pairs, **dict(zip(names, values, strict=True))),
        tuple(leaves.values()),
    )


def test_a_gradient_that_is_not_dense_in_memory():
    """As `.sum()` and a transposed loss give it."""
    pairs, leaves = clamped_pairs()
    for function in (
        torch.sum,
        lambda x_hat: (x_hat.mT @ torch.ones(8, 2).double()).square().sum(),
    ):
        ours, right = (
            grad(function(f(pairs, **leaves)), list(leaves.values()))
            for f in (sparse_x_hat, dense_x_hat)
        )
        torch.testing.assert_close(ours, right)


@pytest.mark.parametrize("sizes", SIZES.values(), ids=SIZES)
@pytest.mark.parametrize("d", [1, 5])
def test_eager_bags_are_the_dense_product(sizes, d):
    given = bags(sizes, d)
    torch.testing.assert_close(ops._bags(*given, torch.float64), dense(*given))


@needs_triton
@pytest.mark.parametrize("sizes", SIZES.values(), ids=SIZES)
@pytest.mark.parametrize("d", [1, 300])
def test_triton_path_bags(sizes, d):
    """300 columns are two blocks."""
    places, offsets, weights, rows = bags(sizes, d)
    for dtype in LIMITS:
        low_weights, low_rows = weights.to(dtype), rows.to(dtype)
        wide = [x.to(torch.float64) for x in (low_weights, low_rows)]
        right = dense(places, offsets, *wide)
        if sizes:
            other = embedding_bag(
                places, wide[1], offsets, mode="sum", per_sample_weights=wide[0],
                include_last_offset=True,
            )  # fmt: skip
            torch.testing.assert_close(other, right)
        summed = torch.promote_types(dtype, torch.float32)
        for out_dtype in {dtype, summed}:
            check_bags((places, offsets, low_weights, low_rows), out_dtype, right)


def check_bags(given, out_dtype, right) -> None:
    """Also: the same bits again, whatever the strides and the integers' width."""
    places, offsets, weights, rows = (tensor.to(DEVICE) for tensor in given)
    ours = ops.triton().triton_bags(places, offsets, weights, rows, out_dtype)
    assert ours.dtype == out_dtype and ours.is_contiguous()
    limit = LIMITS[out_dtype]
    torch.testing.assert_close(ours.cpu(), right.to(out_dtype), rtol=limit, atol=10 * limit)
    spread = torch.stack([rows.mT, rows.mT + 1], dim=-1)[..., 0].mT
    again = ops.triton().triton_bags(places.int(), offsets.int(), weights, spread, out_dtype)
    assert torch.equal(ours, again)


@needs_triton
def test_triton_path_bags_sum_bfloat16_in_float32():
    """257 ones are no bfloat16; weights of another type than rows."""
    places, offsets = torch.zeros(257, dtype=torch.long), torch.tensor([0, 257])
    for weights in (torch.ones(257), torch.ones(257).bfloat16()):
        given = [x.to(DEVICE) for x in (places, offsets, weights, torch.ones(1, 3).bfloat16())]
        assert ops.triton().triton_bags(*given, torch.float32).tolist() == [[257.0] * 3]
        given[3] = torch.full((1, 3), 1 + 2**-40, dtype=torch.float64, device=DEVICE)
        assert ops.triton().triton_bags(*given, torch.float64).tolist() == [
            [257 * (1 + 2**-40)] * 3
        ]


@needs_triton
@pytest.mark.parametrize("nnz", [0, 1, 45])
@pytest.mark.parametrize("d", [1, 300])
def test_triton_path_dots(nnz, d):
    torch.manual_seed(nnz)
    left, right = (torch.randn(n, d, dtype=torch.float64) for n in (9, 13))
    ours, theirs = torch.randint(9, (nnz,)), torch.randint(13, (nnz,))
    for dtype in LIMITS:
        low = [tensor.to(dtype) for tensor in (left, right)]
        expected = (low[0].double() @ low[1].double().mT)[ours, theirs]
        wide = torch.promote_types(dtype, torch.float32)
        there = [tensor.to(DEVICE) for tensor in (low[0], ours, low[1], theirs)]
        dots = ops.triton().triton_dots(*there)
        assert dots.dtype == wide
        limit = LIMITS[wide]
        torch.testing.assert_close(dots.cpu(), expected.to(wide), rtol=limit, atol=10 * limit)
        there[0] = there[0].mT.contiguous().mT
        assert torch.equal(dots, ops.triton().triton_dots(*there))


@needs_triton
def test_triton_path_dots_without_a_token():
    none = torch.zeros(0, dtype=torch.long, device=DEVICE)
    left, right = torch.zeros(0, 4, device=DEVICE), torch.zeros(5, 4, device=DEVICE)
    assert ops.triton().triton_dots(left, none, right, none).shape == (0,)


@needs_triton
def test_triton_path_blocks_of_columns(monkeypatch):
    """Narrower where all rows would not fit the cache, and the same sums."""
    triton_kernels = ops.triton()

    assert triton_kernels._tile(8, torch.empty(65536, 2304, dtype=torch.bfloat16))["BLOCK"] == 128
    given = bags(SIZES["few"], 300)
    before = triton_kernels._tile(8, given[3])
    assert before == {"PAIRS": 8, "BLOCK": 256, "num_warps": 2}
    monkeypatch.setattr(triton_kernels, "_tile", lambda p, r: {"PAIRS": p, "BLOCK": 128})
    check_bags(given, torch.float64, dense(*given))


# ---- JumpReLU

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
    ours, right = (run(f, inputs, grads) for f in (dense_jumprelu, reference))
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
    acts, l0, gap, _, _ = run(dense_jumprelu, inputs, [one[:, None], one, one])
    assert acts[:, 0].tolist() == [0, 0, 0, 0, 1.125, 1.25, 2]
    assert l0.tolist() == [0, 0, 0, 0, 1, 1, 1]
    assert gap.tolist() == [0, 0, 0.25, 0.5, 0.25, 0, 0]
    for place, (through_acts, through_l0, through_gap) in enumerate(
        zip((0, 0, -2, -2, -2, 0, 0), (0, 0, -2, -2, -2, 0, 0), (0, 0, -2, 0, 2, 0, 0), strict=True)
    ):
        for which, right in enumerate((through_acts, through_l0, through_gap)):
            only = [torch.zeros(7, 1), torch.zeros(7), torch.zeros(7)]
            only[which][place] = 1
            d_pre, d_log_threshold = run(dense_jumprelu, inputs, only)[3:]
            moves = {0: float(place > 3), 1: 0.0, 2: -float(right)}[which]
            assert d_pre[place].item() == moves and d_pre.abs().sum() == abs(moves)
            assert d_log_threshold.item() == right


def test_gradient_of_the_gap_is_exact():
    inputs, _ = some(6, 9, width=4.0)
    pre, log_threshold = (x.requires_grad_() for x in inputs[:2])
    u = (pre - log_threshold.exp()).abs()
    kinks = torch.stack([u, (u - inputs[2] / 2).abs()])
    assert kinks.min() > 1e-4 and 0.2 < (u < inputs[2] / 2).double().mean() < 0.8
    assert gradcheck(lambda a, b: dense_jumprelu(a, b, inputs[2])[2], (pre, log_threshold))


def test_no_latent_active_and_all_active():
    inputs, grads = some(5, 40, width=0.1)
    inputs[0][1], inputs[0][2] = -3.0, 3.0
    acts, l0, gap, d_pre, _ = run(dense_jumprelu, inputs, grads)
    assert l0[1] == 0 and acts[1].abs().sum() == 0 and d_pre[1].abs().sum() == 0
    assert l0[2] == 40 and torch.equal(acts[2], inputs[0][2]) and torch.equal(d_pre[2], grads[0][2])
    assert (gap[1:3] == 0).all() and 0 < l0[0] < 40


@pytest.mark.parametrize("width", WIDTHS)
def test_at_pairs_it_is_that_of_the_matrix(width):
    """All in the band among the pairs, and some others."""
    (pre, log_threshold, _), grads = some(37, 203, width=width)
    near = pre > log_threshold.exp() - width / 2 - 0.1
    leaf = pre.where(near, -100.0).requires_grad_()
    threshold = log_threshold.exp().requires_grad_()
    pairs = SparseActs.of(near.double())
    acts, l0 = sparse_jumprelu(pairs.with_values(leaf[near]), threshold, width)
    ours = grad((acts.dense(), l0), (leaf, threshold), grads[:2])
    theta = log_threshold.detach().requires_grad_()
    band = torch.full_like(theta, width)
    right_acts, right_l0, _ = dense_jumprelu(leaf, theta, band)
    right = grad((right_acts, right_l0), (leaf, theta), grads[:2])
    torch.testing.assert_close((acts.dense(), l0), (right_acts, right_l0))
    torch.testing.assert_close((ours[0], ours[1] * threshold), right)


def odd_strides(tensor: torch.Tensor) -> torch.Tensor:
    """The same values, neither contiguous nor dense in memory."""
    return torch.stack([tensor.mT, tensor.mT + 1], dim=-1)[..., 0].mT


@pytest.mark.parametrize("width", [0.01, 1.0])
def test_strides_do_not_matter(width):
    inputs, grads = some(24, 40, width=width)
    right = run(dense_jumprelu, inputs, grads)
    ours = run(lambda pre, *rest: dense_jumprelu(odd_strides(pre), *rest), inputs, grads)
    torch.testing.assert_close(ours, right, rtol=0, atol=0)
    ours = run(dense_jumprelu, inputs, [odd_strides(grads[0]), *grads[1:]])
    torch.testing.assert_close(ours, right, rtol=0, atol=0)
    spread = [torch.ones(()).double().expand(x.shape) for x in grads]  # as `.sum()` gives them
    dense = [x.contiguous() for x in spread]
    ours, right = (run(dense_jumprelu, inputs, given) for given in (spread, dense))
    torch.testing.assert_close(ours, right, rtol=0, atol=0)


def test_half_precision_sums_in_float32():
    inputs, grads = some(30, 601, dtype=torch.bfloat16, wide=torch.float32)
    inputs[0][0] = 3.0  # 601 is no bfloat16
    ours = run(dense_jumprelu, inputs, grads)
    assert ours[0].dtype == ours[3].dtype == torch.bfloat16
    as_float32 = (inputs[0].float(), *inputs[1:]), [grads[0].float(), *grads[1:]]
    right = run(dense_jumprelu, *as_float32)
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
    triton_jumprelu = ops.triton().triton_jumprelu
    device = "cuda" if CUDA else "cpu"
    right = run(dense_jumprelu, inputs, grads)
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
    pytest.importorskip("triton")
    command = [sys.executable, "-m", "pytest", "-k", "triton_path", "-n0", "-p", "no:nbmake"]
    environment = {**os.environ, "TRITON_INTERPRET": "1"}
    done = subprocess.run(
        [*command, __file__], cwd=ROOT, env=environment, capture_output=True, text=True
    )
    assert done.returncode == 0, done.stdout
    expected = 2 * len(SIZES) + 2 * 3 + 3 + len(DTYPES) + 1
    assert f"{expected} passed" in done.stdout and "skipped" not in done.stdout


KERNELS = [
    *((kernel, low) for kernel in ("_bags", "_dots") for low in ("fp32", "bf16", "fp64")),
    *((kernel, pre) for kernel in ("_jumprelu", "_jumprelu_backward") for pre in ("fp32", "bf16")),
]


@pytest.mark.skipif(INTERPRETED, reason="nothing is compiled")
@pytest.mark.filterwarnings("ignore:TRITON_DEFAULT_FP_FUSION")
@pytest.mark.parametrize(("kernel", "low"), KERNELS)
def test_the_kernels_compile_for_a_gpu(kernel, low, tmp_path, monkeypatch):
    """What the interpreter accepts the compiler may not; it needs no GPU."""
    triton = pytest.importorskip("triton")
    from triton.backends.compiler import GPUTarget
    from triton.compiler import ASTSource

    monkeypatch.setenv("TRITON_CACHE_DIR", str(tmp_path))
    function = getattr(ops.triton(), kernel)
    wide, sizes = "*fp64" if low == "fp64" else "*fp32", {}
    types = dict.fromkeys(function.arg_names, wide)
    types |= dict.fromkeys(("places", "offsets", "left_rows", "right_rows"), "*i64")
    narrow = (
        ("rows", "left", "right") if "jump" not in kernel else ("pre", "acts", "d_acts", "d_pre")
    )
    types |= dict.fromkeys(narrow, f"*{low}")
    types |= dict.fromkeys(("nnz", "d", "n", "d_sae"), "i32")
    if "jump" not in kernel:
        sizes = {"PAIRS": 8, "BLOCK": 256}
        types |= dict.fromkeys(sizes, "constexpr")
    signature = {name: types[name] for name in function.arg_names}
    source = ASTSource(function, signature, sizes)
    assert triton.compile(source, target=GPUTarget("cuda", 90, 32)).asm["cubin"]


@pytest.mark.skipif(not CUDA, reason="no GPU")
def test_cuda_tensors_go_to_triton_and_have_the_gradients_of_the_cpu():
    pairs, leaves = clamped_pairs()
    right = grad(sparse_x_hat(pairs, **leaves).square().sum(), list(leaves.values()))
    there = {name: leaf.detach().cuda().requires_grad_() for name, leaf in leaves.items()}
    pairs = SparseActs(pairs.indices.cuda(), pairs.values.cuda(), pairs.offsets.cuda(), 7)
    ours = grad(sparse_x_hat(pairs, **there).square().sum(), list(there.values()))
    torch.testing.assert_close([x.cpu() for x in ours], list(right))


@pytest.mark.skipif(not CUDA, reason="no GPU")
def test_places_past_two_to_the_31():
    """1.1 million rows of 2,048: the last rows' first element has no 32-bit place."""
    rows = torch.zeros(1_100_000, 2048, dtype=torch.bfloat16, device="cuda")
    rows[-1] = 1.0
    place, one = torch.tensor([len(rows) - 1], device="cuda"), torch.ones(1, device="cuda")
    offsets = torch.tensor([0, 1], device="cuda")
    assert (ops.triton().triton_bags(place, offsets, one, rows, torch.float32) == 1).all()
    assert ops.triton().triton_dots(rows[-1:], place * 0, rows, place).tolist() == [2048.0]
    ends = torch.ones(len(rows) + 1, dtype=torch.long, device="cuda")
    ends[:-1] = 0  # only the last bag has a pair
    assert (ops.triton().triton_bags(place, ends, one, rows, torch.bfloat16) == rows).all()


@pytest.mark.skipif(not CUDA, reason="no GPU")
def test_cuda_tensors_go_to_triton_and_agree_with_the_cpu():
    inputs, grads = some(1000, 5000, torch.float32, torch.float32)
    right = run(dense_jumprelu, inputs, grads)
    there, upstream = ([x.cuda() for x in tensors] for tensors in (inputs, grads))
    ours = run(dense_jumprelu, there, upstream)
    out = dense_jumprelu(there[0].requires_grad_(), *there[1:])
    assert "Triton" in type(out[0].grad_fn).__name__
    torch.testing.assert_close([x.cpu() for x in ours], right, rtol=1e-4, atol=1e-3)
