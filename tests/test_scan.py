"""Scans find the pairs that a plain product would show: whole, in blocks, and on a screen.

The screen is forced: it works on any CPU, if slowly, and at any size.
"""

import contextlib
from collections.abc import Iterator
from functools import partial
from itertools import pairwise

import pytest
import torch

from lib.dictionaries import Dictionary, recipes
from lib.sparse import Scan, SparseActs, screen
from lib.sparse.acts import starts_of
from lib.sparse.select import largest, largest_of_rows, largest_of_runs
from tests.small_fits import SPARSE, in_small_blocks, planted, same, screening, started


def hostile(kind: str, n: int, d: int, d_sae: int, seed: int) -> tuple[torch.Tensor, ...]:
    """Activations, encoder rows and their biases."""
    generator = torch.Generator().manual_seed(seed)
    draw, uniform = (partial(f, generator=generator) for f in (torch.randn, torch.rand))
    x, rows, b_enc = draw(n, d), draw(d_sae, d) / d**0.5, 0.1 * draw(d_sae)
    if kind == "aligned":
        x, rows, b_enc = aligned(n, d, generator), aligned(d_sae, d, generator), 0 * b_enc
    if kind == "scales":
        x, rows = x * 10 ** (10 * uniform(n, 1) - 6), rows * 10 ** (10 * uniform(d_sae, 1) - 6)
    if kind == "massive":
        x[:, d // 2] = 1e4
    if kind == "cancelling":
        x[:, 0], rows[:, 0], b_enc = 1e3, 1 + rows[:, 0], -1e3 - 1e3 * rows[:, 0]
    if kind == "biases":
        b_enc = 10 ** (12 * uniform(d_sae) - 6) * draw(d_sae).sign()
    if kind == "tiny":  # some have squares that float32 has not
        x, rows = x * 10 ** (14 - 40 * uniform(n, 1)), rows * 10 ** (-30 * uniform(d_sae, 1))
    if kind in ("tiny", "zeros"):
        b_enc *= 1e-38
        for some in (x, rows, b_enc):
            some[uniform(len(some)) < 0.5] = 0
    if kind == "ties":
        x, rows, b_enc = (2 * x).round(), rows.sign(), b_enc.round()
    return x, rows, b_enc


def aligned(n: int, d: int, generator: torch.Generator) -> torch.Tensor:
    """Rows of one number each, whose roundings all take, or all add, as much as any can."""
    size = 1 + 2**-8 * (1 + 1e-3 * torch.tensor([1, -1, 1, -1]))
    signed = size * torch.tensor([1, 1, -1, -1]) * 2 ** torch.randn(4, generator=generator).round()
    return signed.repeat(-(-n // 4))[:n, None].expand(n, d).contiguous()


KINDS = (
    "plain", "aligned", "scales", "massive", "cancelling", "biases", "tiny", "zeros", "ties",
)  # fmt: skip
SIZES = ((40, 32, 64), (7, 1, 37), (1, 200, 50), (33, 5, 8), (0, 16, 32), (4, 6000, 9))


@pytest.fixture(params=["at once", "in blocks", "on a screen", "on a screen in blocks"])
def way(request, monkeypatch) -> Iterator[str]:
    """How pre-activations are looked through."""
    if "blocks" in request.param:
        in_small_blocks(monkeypatch)
    with screening() if "screen" in request.param else contextlib.nullcontext():
        yield request.param


def exactly(x, rows, b_enc) -> tuple[torch.Tensor, torch.Tensor]:
    """Pre-activations in float64, and what float32 may lose of each."""
    x, rows, b_enc = x.double(), rows.double(), b_enc.double()
    share = (8 + x.shape[1]) * 2**-24
    return x @ rows.T + b_enc, share * (x.abs() @ rows.abs().T + b_enc.abs()) + 1e-37


def test_topk_is_that_of_the_product(way):
    check_topk(KINDS, exact_number="screen" not in way)


def check_topk(kinds: tuple[str, ...], exact_number: bool) -> None:
    for kind in kinds:
        for seed, size in enumerate(SIZES):
            given = hostile(kind, *size, seed)
            exact, lost = exactly(*given)
            for k in {1, size[2] // 5, size[2]}:
                with Scan(*given) as scan:
                    found = scan.topk(k)
                assert found.n == size[0] and (found.offsets.diff() <= k).all()
                assert not exact_number or (found.offsets.diff() == k).all()
                if not size[0]:
                    continue
                ours = found.dense().double().clamp(min=0).topk(k, dim=1).values
                theirs = exact.clamp(min=0).topk(k, dim=1).values
                assert ((ours - theirs).abs() <= lost.amax(1, keepdim=True)).all(), (kind, size)


def test_above_finds_all_and_nothing_else(way):
    """Bounds just below each token's own pre-activations, so that all are near ties."""
    for kind in KINDS:
        for seed, size in enumerate(SIZES):
            given = hostile(kind, *size, seed)
            exact, lost = exactly(*given)
            for i in range(0, size[0], 9):
                bound = (exact[i] - 2 * lost[i]).float()
                with Scan(*given) as scan:
                    found = scan.above(bound)
                mask = torch.zeros_like(exact, dtype=torch.bool)
                mask[found.rows, found.indices] = True
                assert mask[exact > bound + 2 * lost].all(), (kind, size)
                assert not mask[exact < bound - 2 * lost].any(), (kind, size)
                values = exact[found.rows, found.indices]
                assert ((found.values - values).abs() <= lost[found.rows, found.indices]).all()


def test_two_threads_find_the_same():
    before = torch.get_num_threads()
    torch.set_num_threads(2)
    try:
        with screening() as looks:
            check_topk(("aligned", "cancelling"), exact_number=False)
        assert looks and all(looks)
    finally:
        torch.set_num_threads(before)


def test_above_gives_up_where_too_many_are_found(monkeypatch):
    in_small_blocks(monkeypatch)
    x, rows, b_enc = hostile("plain", 40, 32, 64, 0)
    x[32:] *= 100  # the last block has many
    for most, gives in ((1.0, True), (0.1, False)):
        with Scan(x, rows, b_enc) as scan:
            assert (scan.above(torch.full((64,), 2.5), most=most) is not None) == gives


def test_few_are_candidates_in_a_dictionary_of_some_size():
    d, x = topk(512, 256, d_sae=4096, k=32)
    with screening(candidates=screen.CANDIDATES) as looks:
        found = d.encode_sparse(x).values.view(512, 32).sort(descending=True).values
    torch.testing.assert_close(found, d.encode(x).topk(32).values)
    assert looks == [True]


def topk(n: int, d_in: int, d_sae: int, k: int) -> tuple[Dictionary, torch.Tensor]:
    """And activations."""
    with torch.random.fork_rng():
        torch.manual_seed(1)
        config = recipes.topk(k=k).dictionary(site_dims=(d_in,), d_sae=d_sae)
        return Dictionary(config).requires_grad_(False), torch.randn(n, d_in)


@pytest.mark.parametrize("n", [1, 200])
def test_encode_sparse_is_encode(n, way):
    """Some tokens have fewer than k positive pre-activations."""
    d, x = topk(200, 16, d_sae=64, k=5)
    d.b_enc.fill_(-2)
    found, nothing = d.encode_sparse(x[:n]), d.encode_sparse(x[:0])
    expected = d.encode(x[:n])
    assert d.encode(x[:0]).shape == (0, 64)
    assert (found.n, nothing.n, len(nothing.values)) == (n, 0, 0)
    assert torch.equal(found.dense() > 0, expected > 0) and (found.values > 0).all()
    torch.testing.assert_close(found.dense(), expected)
    assert n < 200 or {0, 5} < set((expected > 0).sum(1).tolist())


def test_only_large_products_in_float32_on_such_a_cpu_are_screened(monkeypatch):
    def screened(d: Dictionary, x: torch.Tensor) -> bool:
        with screening(candidates=screen.CANDIDATES) as looks, pytest.MonkeyPatch.context() as p:
            p.setattr(screen, "SCREENED", gain)
            p.setattr(screen, "has_amx", lambda: amx)
            d.encode_sparse(x)
        return any(looks)

    gain, amx = screen.SCREENED, True
    d, x = topk(512, 256, d_sae=4096, k=32)
    assert screened(d, x) and not screened(d, x[:192])
    assert not screened(*topk(512, 256, d_sae=4096, k=64))  # whose candidates would be too many
    assert not screened(*topk(512, 2048, d_sae=1024, k=8))
    assert not screened(*topk(8, 4096, d_sae=128, k=1))
    with torch.autocast("cpu", torch.bfloat16):
        assert not screened(d, x)
    assert not screened(d.double(), x.double())
    amx = False
    assert not screened(d.float(), x)


# ---- selection of matrices and runs


def drawn(n: int, m: int, kind: str) -> torch.Tensor:
    matrix = torch.randn(n, m, generator=torch.Generator().manual_seed(n * m))
    if kind == "ties":
        return (2 * matrix).round()
    if kind == "-inf":
        return matrix.where(matrix > 0.5, -torch.inf)
    if kind == "negative":
        return -matrix.abs() - 1
    if kind == "every other":
        return torch.stack([matrix, matrix + 9], dim=2).flatten(1)[:, ::2]
    return matrix


@pytest.mark.parametrize("kind", ["plain", "ties", "-inf", "negative", "every other"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_selections_are_topks(kind, dtype):
    """The largest of each row, in groups or not; of a vector; of runs, empty and equal ones too."""
    for n, m, k in (
        (3, 97, 5), (3, 97, 97), (1, 1, 1), (4, 4096, 32), (0, 64, 3), (2, 3072, 8), (7, 1000, 33),
        (6, 120, 119), (3, 6144, 400),
    ):  # fmt: skip
        matrix = drawn(n, m, kind).to(dtype)
        found = largest_of_rows(matrix, k)
        assert found.shape == (n, k) and (found.sort(dim=1).values.diff(dim=1) > 0).all()
        values = matrix.gather(1, found).sort(dim=1, descending=True).values
        assert torch.equal(values, matrix.topk(k, dim=1).values), (n, m, k)
        if n:
            places = largest(matrix[0], k)
            assert (places.diff() > 0).all()
            assert torch.equal(matrix[0, places].sort(descending=True).values, values[0])
    offsets = starts_of(torch.arange(300) % 12)
    values = drawn(int(offsets[-1]), 3, kind)[:, 0]
    for k in (1, 3, 100):
        found = largest_of_runs(values, offsets, k)
        assert (found.diff() > 0).all()
        for start, end in pairwise(offsets.tolist()):
            kept = values[found[(found >= start) & (found < end)]].sort().values
            expected = values[start:end].topk(min(k, end - start)).values
            assert torch.equal(kept, expected.flip(0))


# ---- BatchTopK, by hints and by blocks


def batchtopk() -> tuple[Dictionary, torch.Tensor]:
    """k 3 of 64, and 64 tokens; about half of their pre-activations are above zero."""
    generator = torch.Generator().manual_seed(3)
    d = Dictionary(SPARSE["batchtopk"].dictionary(site_dims=(16,), d_sae=64))
    return d, torch.randn(64, 16, generator=generator)


def keeps_the_largest(d: Dictionary, x: torch.Tensor) -> torch.Tensor:
    """Checks what is kept in training against a plain `topk` of the batch; gives it."""
    acts = d.encode_training(x).acts
    pre = d.pre_acts(x).detach().relu().flatten()
    values, places = pre.topk(3 * len(x))
    expected = torch.zeros_like(pre).scatter(0, places, values).view(len(x), -1)
    torch.testing.assert_close(acts.dense(), expected)
    assert len(acts.values) == (values > 0).sum()
    if len(acts.values):
        torch.testing.assert_close(d.smallest, values[values > 0].min())
    return acts.rows


@pytest.mark.usefixtures("way")
@pytest.mark.parametrize("share", [0.0, 1e-30, 0.5, 0.94, 1.0, 1.02, 1.2, 2.0, 1e9])
def test_batchtopk_is_exact_whatever_the_hint(share):
    """None, so low that all is compared, right, and so high that nothing exceeds it."""
    d, x = batchtopk()
    keeps_the_largest(d, x)
    d.smallest.mul_(share)
    keeps_the_largest(d, x)


def test_batchtopk_is_exact_if_bounds_alone_exceed_a_hint():
    """Those of large encoder rows are looser: below a hint these may hide what else is there."""
    d, x = batchtopk()
    size = torch.logspace(-1, 0, 64)
    with torch.no_grad():
        d.W_enc.mul_(size)
        d.b_enc.copy_(1.6 * (1 - size))
    for scale in torch.linspace(0.8, 1.2, 11):
        keeps_the_largest(d, scale * x)
        right = d.smallest.clone()
        for share in torch.linspace(1.05, 1.07, 9):
            d.smallest.copy_(share * right)
            with screening() as looks:
                keeps_the_largest(d, scale * x)
            assert looks and all(looks)


@pytest.mark.usefixtures("way")
@pytest.mark.parametrize("hint", [0.0, 1e-3, 1.0, 1e9])
@pytest.mark.parametrize("quiet", [0.0, 1e-2])
def test_batchtopk_is_exact_if_all_winners_lie_in_one_block(quiet, hint):
    """The third block has them, more than its share of n·k; without a hint, and with any."""
    d, x = batchtopk()
    scale = torch.full((64, 1), quiet)
    scale[32:48] = 100.0
    d.smallest.fill_(hint)
    for _ in range(2):
        rows = keeps_the_largest(d, scale * x)
        assert rows.min() >= 32 and rows.max() < 48 and len(rows) == 3 * 64


@pytest.mark.usefixtures("way")
@pytest.mark.parametrize("loud", [1, 20, 33, 40])
def test_batchtopk_is_exact_if_the_first_batch_is_uneven(loud):
    """What TopK keeps of half the tokens is far from what a batch keeps."""
    d, x = batchtopk()
    scale = torch.full((64, 1), 1e-3)
    scale[:loud] = 1.0
    keeps_the_largest(d, scale * x)
    keeps_the_largest(d, x)


@pytest.mark.usefixtures("way")
def test_batchtopk_of_a_batch_without_winners_keeps_its_hint():
    d, x = batchtopk()
    with torch.no_grad():
        d.b_enc.fill_(-100)
    for hint in (0.0, 0.7):
        d.smallest.fill_(hint)
        assert not len(keeps_the_largest(d, x))
        assert d.smallest.item() == pytest.approx(hint) and d.threshold == 0


def test_a_column_that_nothing_exceeds_hides_no_other():
    """A decoder row of zeros has code norm 0; latents beside it are still found."""
    shape = {"site_dims": (32, 32), "d_sae": 64, "code_norm": "crosscoder"}
    dictionary = Dictionary(recipes.batchtopk(k=2).dictionary(**shape, unit_norm_decoder=False))
    with torch.no_grad():
        dictionary.W_dec[3] = 0
        dictionary.W_enc.copy_(torch.eye(64))
    x = torch.zeros(5, 64)
    x[:, (3, 11)], x[:, 40] = 5.0, 1.0  # 3 and 11 are far enough apart to be looked at together
    for _ in range(2):  # without a hint of the threshold, and with one
        assert dictionary.encode_training(x).acts.indices.tolist() == 5 * [11, 40]


# ---- a JumpReLU of many latents


def test_a_jumprelu_that_gives_up_late_trains_dense(monkeypatch):
    """The third block of four has many active; what was found before it is forgotten."""
    in_small_blocks(monkeypatch)
    few, many = 0.6 * planted(1, batch_size=64)[0], 5 * planted(2, batch_size=64)[1]
    late, dense = (started(SPARSE["jumprelu"], 0 * few, normalize="none") for _ in range(2))
    batch = torch.cat([few[:32], many[32:48], few[48:]])
    for i in range(3):
        out = late.step(i, batch)
        with monkeypatch.context() as patch:
            patch.setattr(Scan, "above", lambda *given, **named: None)
            expected = dense.step(i, batch)
        assert torch.equal(out.acts, expected.acts)
        assert torch.equal(out.codes.l0, expected.codes.l0)
        same(late.state(), dense.state())
    assert isinstance(late.step(3, few).acts, SparseActs)
