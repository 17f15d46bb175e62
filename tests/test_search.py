"""Pairs found on a screen in bfloat16 are those found in float32, as its bounds hold.

The screen is forced: it works on any CPU, if slowly, and at any size.
"""

from collections.abc import Iterator
from functools import partial

import pytest
import torch

from lib.dictionaries import Dictionary, FitConfig, recipes
from lib.dictionaries.rules import TopK
from lib.dictionaries.trainer import DictionaryTrainer
from lib.sparse import SparseActs
from lib.sparse import screen as search
from lib.sparse.memory import Memory
from lib.sparse.screen import Screen, Search
from lib.sparse.select import places_above
from tests.small_fits import (
    SPARSE,
    Recorded,
    below,
    in_small_blocks,
    marked,
    planted,
    same,
    screening,
    stopped_and_resumed,
    trained,
    trainee,
    watched,
)

# ---- bounds


def aligned(n: int, d: int, generator: torch.Generator) -> torch.Tensor:
    """Rows of one number each, whose roundings all take, or all add, as much as any can."""
    size = 1 + 2**-8 * (1 + 1e-3 * torch.tensor([1, -1, 1, -1]))
    signed = size * torch.tensor([1, 1, -1, -1]) * 2 ** torch.randn(4, generator=generator).round()
    return signed.repeat(-(-n // 4))[:n, None].expand(n, d).contiguous()


def hostile(kind: str, n: int, d: int, d_sae: int, seed: int) -> tuple[torch.Tensor, ...]:
    """Activations, encoder rows and their biases."""
    generator = torch.Generator().manual_seed(seed)
    draw, uniform = (partial(f, generator=generator) for f in (torch.randn, torch.rand))
    x, rows, b_enc = draw(n, d), draw(d_sae, d) / d**0.5, 0.1 * draw(d_sae)
    if kind == "aligned":
        x, rows = aligned(n, d, generator), aligned(d_sae, d, generator)
        b_enc *= 0
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
    return x, rows, b_enc


KINDS = ("plain", "aligned", "scales", "massive", "cancelling", "biases", "tiny", "zeros")
SIZES = ((40, 32, 64), (7, 1, 37), (1, 200, 50), (33, 5, 8), (0, 16, 32), (4, 6000, 9))


@pytest.fixture(params=[1, 2])
def threads(request) -> Iterator[None]:
    before = torch.get_num_threads()
    torch.set_num_threads(request.param)
    yield
    torch.set_num_threads(before)


@pytest.mark.usefixtures("threads")
@pytest.mark.parametrize("kind", KINDS)
def test_bounds_hold_in_whatever_order_sums_are_taken(kind):
    """None is too low, none higher than its slack says, and slack is what bfloat16 may cost."""
    for seed, (n, d, d_sae) in enumerate(SIZES):
        x, rows, b_enc = hostile(kind, n, d, d_sae, seed)
        screen, exact = Screen(x, rows, b_enc, Memory()), exactly(x, rows, b_enc)
        left, right, slack = screen.x.double(), screen.rows.double(), screen.slack.double()
        product, in_sums = left @ right.T, left.shape[1] * 2**-24 * (left.abs() @ right.abs().T)
        assert (product - in_sums >= exact).all(), (n, d, d_sae)
        assert (product + in_sums - slack <= exact).all(), (n, d, d_sae)
        of_x, of_rows = (m.double().norm(dim=1, keepdim=True) + 1e-15 for m in (x, rows))
        share = 1.05 * (2**-6 + 2**-21 * d)  # of roundings, twice those of x and rows; and of sums
        most = of_x * of_rows.max() + b_enc.abs().max() + 1e-15
        assert (slack <= share * most).all(), (n, d, d_sae)


@pytest.mark.parametrize("kind", KINDS)
def test_all_above_a_threshold_are_found(kind, monkeypatch):
    """Just below each pre-activation of a row in turn, so that bounds are near ties."""
    in_small_blocks(monkeypatch)
    for seed, size in enumerate(SIZES):
        x, rows, b_enc = hostile(kind, *size, seed)
        exact, screen = exactly(x, rows, b_enc), Screen(x, rows, b_enc, Memory())
        blocks = [(bounds.clone(), slack) for bounds, slack in screen.blocks()]
        assert [len(bounds) for bounds, _ in blocks] == [len(part) for part in x.split(16)]
        for (bounds, slack), pre in zip(blocks, exact.split(16), strict=True):
            for column in pre.T:
                threshold = below(column)[:, None]
                found = marked(places_above(bounds, threshold), bounds)
                assert found[pre > threshold.double()].all(), size
            for k in {1, 3, pre.shape[1] // 5, pre.shape[1]}:
                values, places = pre.topk(k, dim=1)
                found = marked(TopK(k=k).find(bounds, slack), bounds)
                assert found.gather(1, places)[values > 0].all(), (size, k)


def exactly(x: torch.Tensor, rows: torch.Tensor, b_enc: torch.Tensor) -> torch.Tensor:
    return x.double() @ rows.double().T + b_enc.double()


# ---- training


CASES = {
    "topk": (recipes.topk(k=3), {}),
    "batchtopk": (recipes.batchtopk(k=3), {}),
    "matryoshka": (recipes.matryoshka(k=3), {}),
    "jumprelu": (SPARSE["jumprelu"], {}),
    "crosscoder": (recipes.batchtopk(k=3), {"site_dims": (10, 6)}),
    "tied": (recipes.topk(k=3), {"tied": True}),
    "transcoder": (recipes.batchtopk(k=3), {"site_dims": (8,), "out_dims": (8,)}),
}


def places_in_search(it: DictionaryTrainer) -> list[int]:
    """Of all that was lent but for gradients, which are copied, as memory holds what it lends."""
    return [matrix.data_ptr() for matrix in it.memory.out if matrix.shape[1] != it.dictionary.d_in]


def stepped(
    name: str, n_steps: int = 20
) -> tuple[DictionaryTrainer, list[SparseActs], list[float]]:
    """And the active pairs and the loss of each step."""
    (recipe, seen), batches = watched(CASES[name][0]), planted(n_steps)
    it = trainee(recipe, Recorded(), n_steps=n_steps, shape=CASES[name][1], normalize="none")
    it.start(batches[0])
    with torch.no_grad():  # or a token's error would be orthogonal to its latent, if it has one:
        it.dictionary.encoder_rows.mul_(0.9)  # Adam enlarges what rounding leaves of a gradient
    pairs = [it.step(i, batch).acts for i, batch in enumerate(batches)]
    return it, pairs, [step.loss for step in seen]


@pytest.mark.parametrize("blocks", ["one", "of 16"])
@pytest.mark.parametrize("name", CASES)
def test_training_on_screens_is_training_in_float32(name, blocks, monkeypatch):
    if blocks == "of 16":
        in_small_blocks(monkeypatch)
    with screening() as scans:
        it, pairs, losses = stepped(name)
    assert len(scans) >= 20 and all(scans)
    with screening(False):
        plain, expected, plain_losses = stepped(name)
    for ours, theirs in zip(pairs, expected, strict=True):
        assert len(ours.values) <= len(theirs.values)
        ours, theirs = ours.dense(), theirs.dense()
        assert torch.equal(ours > 0, theirs > 0)
        torch.testing.assert_close(ours, theirs, rtol=1e-4, atol=1e-6)
    assert losses == pytest.approx(plain_losses, rel=1e-5)
    theirs = plain.state()
    for key, tensor in it.state().items():
        if key.startswith("weights."):
            torch.testing.assert_close(tensor, theirs[key], rtol=1e-5, atol=1e-5, msg=key)


def test_training_on_screens_resumes_bit_for_bit(tmp_path):
    often = {"n_steps": 12, "lr": 3e-3, "dead_after": 150, "checkpoint_every": 2, "log_every": 5}
    with screening() as scans:
        stopped_and_resumed(tmp_path, FitConfig(**often))
    assert len(scans) > 2 * 3 * 12 and all(scans)


@pytest.mark.parametrize("n", [1, 200])
def test_encode_sparse_on_a_screen_is_encode(n):
    """Some tokens have fewer than k positive pre-activations."""
    d, x = topk(200, 16, d_sae=64, k=5)
    d.b_enc.fill_(-2)
    with screening() as scans:
        found, nothing = d.encode_sparse(x[:n]), d.encode_sparse(x[:0])
    expected = d.encode(x[:n])
    assert d.encode(x[:0]).shape == (0, 64)
    assert scans == [True, True] and (found.n, nothing.n, len(nothing.values)) == (n, 0, 0)
    assert torch.equal(found.dense() > 0, expected > 0) and (found.values > 0).all()
    torch.testing.assert_close(found.dense(), expected)
    assert n < 200 or {0, 5} < set((expected > 0).sum(1).tolist())


def test_few_are_candidates_in_a_dictionary_of_some_size():
    d, x = topk(512, 256, d_sae=4096, k=32)
    with screening(candidates=search.CANDIDATES) as scans:
        found = d.encode_sparse(x).values.view(512, 32).sort(descending=True).values
    torch.testing.assert_close(found, d.encode(x).topk(32).values)
    assert scans == [True]


def topk(n: int, d_in: int, d_sae: int, k: int) -> tuple[Dictionary, torch.Tensor]:
    """And activations."""
    with torch.random.fork_rng():
        torch.manual_seed(1)
        config = recipes.topk(k=k).dictionary(site_dims=(d_in,), d_sae=d_sae)
        return Dictionary(config).requires_grad_(False), torch.randn(n, d_in)


# ---- without a screen


@pytest.mark.parametrize("name", ["topk", "batchtopk", "jumprelu"])
def test_with_too_many_candidates_everything_is_in_float32(name, monkeypatch):
    """In the last block: half of each encoder row is that of all, and all that these tokens have.
    BatchTopK gives up while it has no hint yet, a JumpReLU as too many are active."""
    in_small_blocks(monkeypatch)
    batch = 0.3 * planted(1)[0]
    batch[:, 8:], batch[32:, :8], batch[32:, 8:] = 0, 0, 5

    def trained() -> DictionaryTrainer:
        it = trainee(SPARSE[name], Recorded(), normalize="none")
        with torch.no_grad():
            it.dictionary.encoder[:, 8:] = 0.3
        it.start(0 * batch)
        for i in range(3):
            it.step(i, batch)
        return it

    with screening(candidates=0.6) as scans:
        it = trained()
    with screening(False):
        plain = trained()
    assert scans == 3 * [False]
    same(it.state(), plain.state())  # bit for bit
    places = places_in_search(it)
    assert len(places) == 3 * 4 == 3 * len(set(places))  # what the first step took it gave back


@pytest.mark.parametrize("spoilt", [torch.inf, torch.nan, 1e30, "weights"])
def test_what_is_not_finite_is_refused_as_without_a_screen(spoilt):
    messages, batches = [], planted(3)
    for on in (True, False):
        it = trainee(SPARSE["topk"], Recorded())
        with screening(on) as scans:
            it.start(batches[0])
            it.step(0, batches[0])
            bad, encoder = batches[1].clone(), it.dictionary.encoder.detach()
            place = (encoder if spoilt == "weights" else bad)[3, 2:3]
            kept = place.clone()
            place.fill_(torch.inf if spoilt == "weights" else spoilt)
            before = {key: tensor.clone() for key, tensor in it.state().items()}
            with pytest.raises(FloatingPointError) as raised:
                it.step(1, bad)
            same(before, it.state())
            place.copy_(kept)
            places = set(places_in_search(it))
            it.step(1, batches[2])
            assert set(places_in_search(it)) == places
        messages.append(str(raised.value))
        assert scans == on * [True, True]
    assert messages[0] == messages[1]


def test_only_large_products_in_float32_on_such_a_cpu_are_screened(monkeypatch):
    def screened(d: Dictionary, x: torch.Tensor) -> bool:
        with Search(d, x) as scan:
            return scan.screen is not None

    monkeypatch.setattr(search, "has_amx", lambda: True)
    d, x = topk(512, 256, d_sae=4096, k=32)
    assert screened(d, x) and not screened(d, x[:192])
    assert not screened(*topk(512, 256, d_sae=4096, k=64))  # whose candidates would be too many
    assert not screened(*topk(512, 2048, d_sae=1024, k=8))
    assert not screened(*topk(8, 4096, d_sae=128, k=1))
    with torch.autocast("cpu", torch.bfloat16):
        assert not screened(d, x)
    assert not screened(d.double(), x.double())
    monkeypatch.setattr(search, "has_amx", lambda: False)
    assert not screened(d.float(), x)
    with screening() as scans:
        trainee(SPARSE["topk"], dtype="bfloat16").step(0, planted(1)[0])
    assert not scans


@pytest.mark.parametrize("on", [True, False])
@pytest.mark.parametrize("name", SPARSE)
def test_training_runs_where_torch_must_be_deterministic(name, on):
    torch.use_deterministic_algorithms(True)
    try:
        with screening(on):
            trained(SPARSE[name], 2)
    finally:
        torch.use_deterministic_algorithms(False)
