"""The sparse path: its gradients against dense autograd in float64, and Triton against torch.

Without a GPU the Triton kernels run under its interpreter, in a process of their own.
"""

import os
import subprocess
import sys

import pytest
import torch
from torch.autograd import grad, gradcheck
from torch.nn.functional import embedding_bag

from lib import paths
from lib.dictionaries import SparseActs
from lib.sparse import active_pre_acts, eager, sparse_decode

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
    values = active_pre_acts(x, encoder, b_enc, b_in, pairs).relu()
    return sparse_decode(values, pairs, W_dec)


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
    torch.testing.assert_close(eager._bags(*given, torch.float64), dense(*given))


@needs_triton
@pytest.mark.parametrize("sizes", SIZES.values(), ids=SIZES)
@pytest.mark.parametrize("d", [1, 200, 300])
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
    from lib.sparse.triton import triton_bags

    places, offsets, weights, rows = (tensor.to(DEVICE) for tensor in given)
    ours = triton_bags(places, offsets, weights, rows, out_dtype)
    assert ours.dtype == out_dtype and ours.is_contiguous()
    limit = LIMITS[out_dtype]
    torch.testing.assert_close(ours.cpu(), right.to(out_dtype), rtol=limit, atol=10 * limit)
    spread = torch.stack([rows.mT, rows.mT + 1], dim=-1)[..., 0].mT
    again = triton_bags(places.int(), offsets.int(), weights, spread, out_dtype)
    assert torch.equal(ours, again)


@needs_triton
def test_triton_path_bags_sum_bfloat16_in_float32():
    """257 ones are no bfloat16; weights of another type than rows."""
    from lib.sparse.triton import triton_bags

    places, offsets = torch.zeros(257, dtype=torch.long), torch.tensor([0, 257])
    for weights in (torch.ones(257), torch.ones(257).bfloat16()):
        given = [x.to(DEVICE) for x in (places, offsets, weights, torch.ones(1, 3).bfloat16())]
        assert triton_bags(*given, torch.float32).tolist() == [[257.0] * 3]
        given[3] = torch.full((1, 3), 1 + 2**-40, dtype=torch.float64, device=DEVICE)
        assert triton_bags(*given, torch.float64).tolist() == [[257 * (1 + 2**-40)] * 3]


@needs_triton
@pytest.mark.parametrize("nnz", [0, 1, 16, 45])
@pytest.mark.parametrize("d", [1, 200, 300])
def test_triton_path_dots(nnz, d):
    from lib.sparse.triton import triton_dots

    torch.manual_seed(nnz)
    left, right = (torch.randn(n, d, dtype=torch.float64) for n in (9, 13))
    ours, theirs = torch.randint(9, (nnz,)), torch.randint(13, (nnz,))
    for dtype in LIMITS:
        low = [tensor.to(dtype) for tensor in (left, right)]
        expected = (low[0].double() @ low[1].double().mT)[ours, theirs]
        wide = torch.promote_types(dtype, torch.float32)
        there = [tensor.to(DEVICE) for tensor in (low[0], ours, low[1], theirs)]
        dots = triton_dots(*there)
        assert dots.dtype == wide
        limit = LIMITS[wide]
        torch.testing.assert_close(dots.cpu(), expected.to(wide), rtol=limit, atol=10 * limit)
        there[0] = there[0].mT.contiguous().mT
        assert torch.equal(dots, triton_dots(*there))


@needs_triton
def test_triton_path_dots_without_a_token():
    from lib.sparse.triton import triton_dots

    none = torch.zeros(0, dtype=torch.long, device=DEVICE)
    left, right = torch.zeros(0, 4, device=DEVICE), torch.zeros(5, 4, device=DEVICE)
    assert triton_dots(left, none, right, none).shape == (0,)


@needs_triton
def test_triton_path_blocks_of_columns(monkeypatch):
    """Narrower where all rows would not fit the cache, and the same sums."""
    from lib.sparse import triton_kernels

    assert triton_kernels._tile(8, torch.empty(65536, 2304, dtype=torch.bfloat16))["BLOCK"] == 128
    given = bags(SIZES["few"], 300)
    before = triton_kernels._tile(8, given[3])
    assert before == {"PAIRS": 8, "BLOCK": 256, "num_warps": 2}
    monkeypatch.setattr(triton_kernels, "_tile", lambda p, r: {"PAIRS": p, "BLOCK": 128})
    check_bags(given, torch.float64, dense(*given))


@pytest.mark.skipif(CUDA or INTERPRETED, reason="the tests of the Triton path run here")
def test_the_sparse_kernels_under_the_interpreter():
    """The variable is read when triton is imported, so this needs a new process."""
    pytest.importorskip("triton")
    command = [sys.executable, "-m", "pytest", "-k", "triton_path", "-p", "no:cacheprovider"]
    environment = {**os.environ, "TRITON_INTERPRET": "1"}
    done = subprocess.run(
        [*command, __file__], cwd=ROOT, env=environment, capture_output=True, text=True
    )
    assert done.returncode == 0, done.stdout
    assert f"{3 * len(SIZES) + 3 * 4 + 3} passed" in done.stdout and "skipped" not in done.stdout


@pytest.mark.skipif(INTERPRETED, reason="nothing is compiled")
@pytest.mark.filterwarnings("ignore:TRITON_DEFAULT_FP_FUSION")
@pytest.mark.parametrize("kernel", ["_bags", "_dots"])
@pytest.mark.parametrize("low", ["fp32", "bf16", "fp64"])
def test_the_sparse_kernels_compile_for_a_gpu(kernel, low, tmp_path, monkeypatch):
    """What the interpreter accepts the compiler may not; it needs no GPU."""
    triton = pytest.importorskip("triton")
    from triton.backends.compiler import GPUTarget
    from triton.compiler import ASTSource

    from lib.sparse import triton_kernels

    monkeypatch.setenv("TRITON_CACHE_DIR", str(tmp_path))
    function = getattr(triton_kernels, kernel)
    types = dict.fromkeys(("places", "offsets", "left_rows", "right_rows"), "*i64")
    types |= dict.fromkeys(("rows", "left", "right"), f"*{low}")
    wide = "*fp64" if low == "fp64" else "*fp32"
    types |= {"weights": wide, "out": wide, "nnz": "i32", "d": "i32"}
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
    from lib.sparse.triton import triton_bags, triton_dots

    rows = torch.zeros(1_100_000, 2048, dtype=torch.bfloat16, device="cuda")
    rows[-1] = 1.0
    place, one = torch.tensor([len(rows) - 1], device="cuda"), torch.ones(1, device="cuda")
    offsets = torch.tensor([0, 1], device="cuda")
    assert (triton_bags(place, offsets, one, rows, torch.float32) == 1).all()
    assert triton_dots(rows[-1:], place * 0, rows, place).tolist() == [2048.0]
    ends = torch.ones(len(rows) + 1, dtype=torch.long, device="cuda")
    ends[:-1] = 0  # only the last bag has a pair
    assert (triton_bags(place, ends, one, rows, torch.bfloat16) == rows).all()
