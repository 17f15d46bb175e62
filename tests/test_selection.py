"""Which latents are kept: selection by groups, by hints and by blocks is the plain one."""

from collections.abc import Iterator
from contextlib import nullcontext
from itertools import pairwise

import pytest
import torch

from lib.dictionaries import Dictionary, recipes
from lib.dictionaries import rules as sparsity
from lib.dictionaries.rules import TopK
from lib.sparse import SparseActs
from lib.sparse.acts import starts_of
from lib.sparse.select import (
    bound_of_largest,
    largest,
    largest_of_rows,
    largest_of_runs,
    order_of,
    places_above,
    true_places,
)
from tests.small_fits import (
    SPARSE,
    Recorded,
    below,
    in_small_blocks,
    marked,
    planted,
    same,
    screening,
    trainee,
)

# ---- of a matrix


def drawn(n: int, m: int, kind: str) -> torch.Tensor:
    matrix = torch.randn(n, m, generator=torch.Generator().manual_seed(n * m))
    if kind == "ties":
        return (2 * matrix).round()
    if kind == "-inf":
        return matrix.where(matrix > 0.5, -torch.inf)
    if kind == "negative":
        return -matrix.abs() - 1
    if kind == "transposed":
        return matrix.T.contiguous().T
    if kind == "every other":
        return torch.stack([matrix, matrix + 9], dim=2).flatten(1)[:, ::2]
    return matrix


KINDS = ("plain", "ties", "-inf", "negative", "transposed", "every other")
SIZES = [
    (3, 97, 5), (3, 97, 97), (1, 1, 1), (5, 64, 1), (5, 64, 64), (4, 4096, 32), (0, 64, 3),
    (2, 24576, 32), (2, 3072, 8), (7, 1000, 33), (6, 2**15, 1), (6, 120, 119), (3, 6144, 400),
]  # fmt: skip


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_largest_of_rows_are_topks(kind, dtype):
    for n, m, k in SIZES:
        matrix = drawn(n, m, kind).to(dtype)
        found = largest_of_rows(matrix, k)
        assert found.shape == (n, k)
        once = found.sort(dim=1).values.diff(dim=1) > 0
        assert once.all(), (n, m, k)
        values = matrix.gather(1, found).sort(dim=1, descending=True).values
        assert torch.equal(values, matrix.topk(k, dim=1).values), (n, m, k)


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("at", [-4.0, 0.0, 1.0, 2.8, 99.0, torch.inf, -torch.inf])
def test_places_above_are_those_of_a_comparison(kind, dtype, at):
    """Many, few and no hits; a bound for all columns, one for each, and one for each row. What was
    rounded may have exceeded a bound that it equals once that is rounded, too."""
    for n, m in ((9, 64), (9, 97), (9, 100), (50, 1024), (0, 64), (1, 8), (3, 1)):
        matrix = drawn(n, m, kind).to(dtype)
        matrix[matrix == 0] = 0  # not -0, of which nothing is asked at a bound of 0
        spread = at + torch.linspace(-1, 1, m)
        lone = torch.full((m,), torch.inf)
        lone[m // 2] = at
        for bound in (torch.tensor(at), spread, lone, at + torch.linspace(-1, 1, n)[:, None]):
            above = matrix > bound if dtype == torch.float32 else matrix >= bound.to(dtype)
            expected = above.flatten().nonzero()[:, 0]  # which ascend
            assert torch.equal(places_above(matrix, bound), expected), (n, m)


@pytest.mark.parametrize(("m", "k"), [(8, 8), (37, 3), (512, 9), (600, 32), (5000, 32), (300, 1)])
def test_bounds_of_the_largest_are_just_below_them(m, k):
    """Of random numbers, of numbers that were all rounded up, and of too few positive ones."""
    drawn = torch.randn(50, m, generator=torch.Generator().manual_seed(m))
    found = bound_of_largest(drawn.bfloat16(), k)
    kth = drawn.topk(k, dim=1).values[:, -1]
    assert ((found <= kth) | (kth <= 0)).all()
    n_above = (drawn > found[:, None]).sum(1).float()
    assert ((n_above >= k) | (kth <= 0)).all() and n_above.mean() < 1.2 * k + 3
    up = torch.full((3, m), 1 + 2**-8 + 2**-20)
    assert (up.bfloat16() > up).all() and (bound_of_largest(up.bfloat16(), k) <= up[:, 0]).all()
    few = drawn.where(drawn.argsort(dim=1).argsort(dim=1) > m - k, -drawn.abs())
    places = TopK(k=k).find(few.bfloat16(), torch.zeros(50, 1))
    assert torch.equal(marked(places, few), few > 0) and ((few > 0).sum(1) < k).all()


@pytest.mark.parametrize("scale", [1e-3, 1.0, 1e30])
def test_what_was_above_a_bound_is_found_after_rounding(scale):
    """For all columns, for each and for each row; near ties, negative, zero and infinite ones."""
    generator = torch.Generator().manual_seed(0)
    exact = scale * torch.randn(60, 90, generator=generator)
    exact[:, 3], exact[4], exact[5] = 0.0, -torch.inf, torch.inf
    rounded = exact.bfloat16()
    columns, rows = below(exact[7]), below(exact[:, :1])
    flat = [torch.tensor(bound) for bound in (0.0, scale, -scale, torch.inf, -torch.inf)]
    for bound in (*flat, columns, columns.abs(), rows, rows.abs()):
        found = marked(places_above(rounded, bound), exact)
        assert found[exact > bound].all()
        ulp = 1e-38 + 2**-7 * bound.where(bound.isfinite(), 0).abs()
        assert not found[exact < bound - ulp].any()


def test_true_places_are_where_a_mask_is_true():
    generator = torch.Generator().manual_seed(0)
    for n, m in ((9, 64), (9, 97), (1, 8), (1, 7), (0, 8), (4, 0), (64, 200)):
        for share in (0.0, 0.003, 0.1, 0.5, 1.0):
            mask = torch.rand(n, m, generator=generator) < share
            for given in (mask, mask.T, mask[1:], mask[:, 1:]):
                expected = given.flatten().nonzero()[:, 0]
                assert torch.equal(true_places(given), expected), (n, m, share)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_largest_are_topks(dtype):
    for kind in ("plain", "ties", "-inf", "negative", "transposed"):
        for m, count in ((1, 1), (97, 97), (97, 1), (4096, 1000), (1000, 999)):
            values = drawn(m, 3, kind)[:, 0].to(dtype)
            found = largest(values, count)
            assert len(found) == count and (found.diff() > 0).all()
            assert torch.equal(values[found].sort().values, values.topk(count).values.sort().values)


@pytest.mark.parametrize("k", [1, 3, 100])
def test_largest_of_runs_are_topks(k):
    """Of no, one, few and many values, and of equal ones."""
    for n in (0, 1, 7, 13, 300):  # after 12 and of 1 the last is empty
        offsets = starts_of(torch.arange(n) % 12)
        for kind in ("plain", "ties", "negative", "-inf"):
            values = drawn(int(offsets[-1]), 3, kind)[:, 0]
            found = largest_of_runs(values, offsets, k)
            assert (found.diff() > 0).all()
            for start, end in pairwise(offsets.tolist()):
                kept = values[found[(found >= start) & (found < end)]].sort().values
                expected = values[start:end].topk(min(k, end - start)).values
                assert torch.equal(kept, expected.flip(0)), (n, kind)


@pytest.mark.parametrize("end", [1, 300, 2**16, 2**16 + 1])
def test_order_sorts_and_leaves_equal_ones_in_their_order(end):
    indices = torch.randint(end, (500,), generator=torch.Generator().manual_seed(end))
    indices[::2] = end - 1
    assert torch.equal(order_of(indices, end), indices.argsort(stable=True))
    assert order_of(indices[:0], end).tolist() == []


# ---- BatchTopK, by hints and by blocks


def test_a_column_that_nothing_exceeds_hides_no_other():
    """A decoder row of zeros has code norm 0; latents beside it are still found."""
    recipe = recipes.batchtopk(k=2)
    shape = {"site_dims": (32, 32), "d_sae": 64, "code_norm": "crosscoder"}
    dictionary = Dictionary(recipe.dictionary(**shape, unit_norm_decoder=False))
    with torch.no_grad():
        dictionary.W_dec[3] = 0
        dictionary.encoder.copy_(torch.eye(64))
    x = torch.zeros(5, 64)
    x[:, (3, 11)], x[:, 40] = 5.0, 1.0  # 3 and 11 are far enough apart to be looked at together
    for _ in range(2):  # without a hint of the threshold, and with one
        active, *_ = dictionary.training_acts(x)
        assert active.indices.tolist() == 5 * [11, 40]


def batchtopk() -> tuple[Dictionary, torch.Tensor]:
    """k 3 of 64, and 64 tokens; about half of their pre-activations are above zero."""
    generator = torch.Generator().manual_seed(3)
    d = Dictionary(SPARSE["batchtopk"].dictionary(site_dims=(16,), d_sae=64))
    return d, torch.randn(64, 16, generator=generator)


def keeps_the_largest(d: Dictionary, x: torch.Tensor) -> torch.Tensor:
    """Checks what is kept in training against a plain `topk` of the batch; gives it."""
    acts, *_ = d.training_acts(x)
    pre = d.pre_acts(x).detach().relu().flatten()
    values, places = pre.topk(3 * len(x))
    expected = torch.zeros_like(pre).scatter(0, places, values).view(len(x), -1)
    torch.testing.assert_close(acts.dense(), expected)
    assert len(acts.values) == (values > 0).sum()
    if len(acts.values):
        torch.testing.assert_close(d.smallest, values[values > 0].min())
    return acts.rows


@pytest.fixture(params=["one block", "blocks of 16", "screens"])
def way(request, monkeypatch) -> Iterator[None]:
    """In which pre-activations are looked through."""
    if request.param == "blocks of 16":
        in_small_blocks(monkeypatch)
    with screening() if request.param == "screens" else nullcontext():
        yield


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
        d.encoder.mul_(size[:, None])
        d.b_enc.copy_(1.6 * (1 - size))
    for scale in torch.linspace(0.8, 1.2, 11):
        keeps_the_largest(d, scale * x)
        right = d.smallest.clone()
        for share in torch.linspace(1.05, 1.07, 9):
            d.smallest.copy_(share * right)
            with screening() as scans:
                keeps_the_largest(d, scale * x)
            assert all(scans)


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


# ---- a JumpReLU that gives up


def test_a_jumprelu_that_gives_up_late_trains_whole(monkeypatch):
    """The third block of four has many active; what was found before it is forgotten."""
    in_small_blocks(monkeypatch)
    recipe, memory = SPARSE["jumprelu"], Recorded()
    late, whole = trainee(recipe, memory, normalize="none"), trainee(recipe, normalize="none")
    few, many = 0.6 * planted(1, batch_size=64)[0], 5 * planted(2, batch_size=64)[1]
    batch = torch.cat([few[:32], many[32:48], few[48:]])
    for it in (late, whole):
        it.start(0 * few)
    seen = []

    def counted(pre: torch.Tensor, bound: torch.Tensor) -> torch.Tensor:
        seen.append(places_above(pre, bound))
        return seen[-1]

    for i in range(3):
        with monkeypatch.context() as patch:
            patch.setattr(sparsity, "places_above", counted)
            out = late.step(i, batch)
        with monkeypatch.context() as patch:
            patch.setattr(sparsity, "DENSE", -1.0)  # gives up at once
            expected = whole.step(i, batch)
        assert not isinstance(out.acts, SparseActs) and out.pre_acts is not None
        assert torch.equal(out.acts, expected.acts) and torch.equal(out.l0, expected.l0)
        same(late.state(), whole.state())
    assert len(seen) == 3 * 3  # the fourth block is not looked at
    limit = sparsity.DENSE * 16 * 64
    for first, second, third in zip(*3 * [iter(seen)], strict=True):
        assert 0 < max(len(first), len(second)) <= limit < len(third)
    assert len({block.data_ptr() for block in memory.out}) == 1  # it was given back


def test_a_jumprelu_of_few_in_every_block_stays_at_pairs(monkeypatch):
    in_small_blocks(monkeypatch)
    it = trainee(SPARSE["jumprelu"], normalize="none")
    few = 0.6 * planted(1, batch_size=64)[0]
    it.start(0 * few)
    assert isinstance(it.step(0, few).acts, SparseActs)
