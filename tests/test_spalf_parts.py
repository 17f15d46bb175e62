"""The parts of SPALF: constraints and their gradients, the stratified dictionary, the config."""

import math
from types import SimpleNamespace

import pytest
import torch
from torch.autograd import gradcheck

from lib.activations.moments import Moments
from lib.dictionaries import Dictionary
from lib.spalf import Anchors, SpalfConfig
from lib.spalf.config import LR_AREA
from lib.spalf.constraints import (
    coactivation,
    drift,
    faithfulness,
    lagrangian,
    orthogonality,
    penalty,
)
from lib.spalf.stratified import StratifiedDictionary, gram_schmidt, matched_filters
from lib.spalf.whitening import Whitener
from lib.sparse import SparseActs

D = 8


def wide(*shape: int, seed: int = 0) -> torch.Tensor:
    """Float64 with a graph, for `gradcheck`."""
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(shape, generator=generator, dtype=torch.float64, requires_grad=True)


def codes(*active: list[int], d_sae: int = 6) -> SparseActs:
    """Tokens with these latents active."""
    acts = torch.zeros(len(active), d_sae, dtype=torch.float64)
    for token, latents in enumerate(active):
        acts[token, latents] = 0.5 + torch.arange(len(latents), dtype=torch.float64)
    return SparseActs.of(acts)


MIXED = [0, 2, 5], [], [1], [2, 3], [0, 1, 2, 3, 4]


def test_faithfulness_is_the_share_of_the_bound():
    error = torch.tensor([[3.0, 4.0], [0.0, 1.0]])
    assert faithfulness(error, 2.0).item() == pytest.approx(13 / 2 - 1)
    x = wide(500, 3)
    variance = x.var(0, correction=0).sum().item()
    r2_07 = math.sqrt(0.3) * (x - x.mean(0))  # an error that explains 0.7
    assert faithfulness(r2_07, (1 - 0.7) * variance).item() == pytest.approx(0, abs=1e-9)
    assert gradcheck(lambda e: faithfulness(e, 0.7), wide(5, 3))


def test_drift_is_zero_at_its_share_of_the_anchors_norm():
    anchors = wide(4, D).detach()
    assert drift(anchors, anchors).item() == -1
    assert drift(anchors * 1.1, anchors).item() == pytest.approx(0, abs=1e-9)
    assert drift(anchors * 0.5, anchors, 0.25).item() == pytest.approx(3)
    assert gradcheck(lambda rows: drift(rows, anchors, 0.3), wide(4, D, seed=1))


def test_coactivation_against_a_double_loop():
    W_dec = wide(6, D).detach()
    squares = []
    for latents in MIXED:
        for i in latents:
            for j in latents:
                if i != j:
                    cosine = torch.nn.functional.cosine_similarity(W_dec[i], W_dec[j], dim=0)
                    squares.append(cosine.item() ** 2)
    assert len(squares) == 6 + 2 + 20
    expected = sum(squares) / len(squares)
    assert coactivation(codes(*MIXED), W_dec).item() == pytest.approx(expected, rel=1e-12)
    assert orthogonality(codes(*MIXED), W_dec, 0.2).item() == pytest.approx(expected / 0.2 - 1)
    longer = W_dec * torch.arange(1, 7)[:, None]  # cosines do not see length
    assert coactivation(codes(*MIXED), longer).item() == pytest.approx(expected, rel=1e-12)
    same = torch.ones(6, D, dtype=torch.float64)
    assert coactivation(codes(*MIXED), same).item() == pytest.approx(1)
    assert coactivation(codes(*MIXED), torch.eye(6, D, dtype=torch.float64)).item() == 0


def test_coactivation_gradient():
    for active in (MIXED, ([1, 4],), ([], [0, 1], [])):
        assert gradcheck(lambda W, active=active: coactivation(codes(*active), W), wide(6, 4))
    W_dec = wide(6, D)
    coactivation(codes([0, 2]), W_dec).backward()
    assert (W_dec.grad != 0).any(1).tolist() == [True, False, True, False, False, False]


def test_without_pairs_coactivation_is_zero_with_a_zero_gradient():
    for active in (([0], [3], [3]), ([], []), ([], [4]), ()):
        W_dec = wide(6, D)
        value = coactivation(codes(*active), W_dec)
        value.backward()
        assert value.item() == 0, active
        assert torch.equal(W_dec.grad, torch.zeros_like(W_dec))


@pytest.mark.parametrize("y", [0.0, 0.8, 5.0])
def test_penalty_and_its_slope(y):
    for at in (-3.0, -y / 2 - 0.01, -0.2, 0.0, 0.3, 2.0):
        g = torch.tensor(at, dtype=torch.float64, requires_grad=True)
        value = penalty(g, y)
        (slope,) = torch.autograd.grad(value, g)
        assert value.item() == pytest.approx((max(0, 2 * at + y) ** 2 - y**2) / 4)
        assert slope.item() == pytest.approx(max(0, 2 * at + y), abs=1e-12)
    assert penalty(torch.tensor(0.0), y).item() == pytest.approx(0, abs=1e-6)
    assert gradcheck(lambda g: penalty(g, y), wide(seed=1))


def test_lagrangian_pulls_at_what_is_violated_and_divides_by_a_constant():
    """Each g is live: its slope is its pull over the divisor; no slope comes through the divisor.
    A slack constraint without multiplier, or far inside, has none."""
    g = {"a": 0.3, "b": -0.2, "c": 0.7, "d": -2.0}
    lam, rho = {"a": 2.0, "b": 0.0, "c": 0.0, "d": 3.0}, {"a": 0.5, "b": 4.0, "c": 1.0, "d": 2.0}
    pulls = {"a": 2.3, "b": 0.0, "c": 1.4, "d": 0.0}  # max(0, λ + 2ρg)
    leaves = {n: torch.tensor(v, dtype=torch.float64) for n, v in g.items()}
    objective = torch.tensor(1.7, dtype=torch.float64)
    for leaf in (*leaves.values(), objective):
        leaf.requires_grad_()
    value = lagrangian(objective, leaves, lam, rho)
    value.backward()
    top, divisor = 1.7, 1 + sum(pulls.values())
    for n in g:
        y = lam[n] / rho[n]
        top += rho[n] * (max(0, 2 * g[n] + y) ** 2 - y**2) / 4
    assert value.item() == pytest.approx(top / divisor)
    assert objective.grad.item() == pytest.approx(1 / divisor)
    for name, leaf in leaves.items():
        assert leaf.grad.item() == pytest.approx(pulls[name] / divisor, abs=0), name
    assert lagrangian(objective, {}, lam, rho).item() == 1.7


def activations(n: int = 4000, seed: int = 0) -> torch.Tensor:
    """Correlated, with a mean."""
    generator = torch.Generator().manual_seed(seed)
    mix = torch.randn(D, D, generator=generator) * torch.linspace(0.2, 2, D)
    generator.manual_seed(seed + 1)
    return torch.randn(n, D, generator=generator) @ mix + 3


def fitted(x: torch.Tensor) -> Whitener:
    moments = Moments(D)
    moments.update(x)
    return Whitener.fit(moments)


def stratified(d_sae: int = 20, n_anchored: int = 3, **names) -> StratifiedDictionary:
    torch.manual_seed(0)
    anchors = 5 * wide(n_anchored, D, seed=2).detach().float()
    return StratifiedDictionary(d_sae, D, anchors if n_anchored else None, **names)


def started(l0_target: float = 4.0, **options) -> tuple[StratifiedDictionary, Whitener, float]:
    """And the whitener and the output's scale."""
    x, dictionary = activations(), stratified(**options)
    whitener = fitted(x)
    scale = math.sqrt(D / whitener.total_variance)
    dictionary.start(x, whitener, scale, l0_target)
    return dictionary, whitener, scale


def test_impossible_anchors_are_refused():
    for d_sae in (2, 3):
        with pytest.raises(ValueError, match=f"d_sae above the 3 anchored latents, got {d_sae}"):
            stratified(d_sae)
    assert stratified(4).n_anchored == 3
    with pytest.raises(ValueError, match=f"need anchors of width {D}, got 5"):
        StratifiedDictionary(20, D, torch.ones(3, 5))
    for value in (0.0, math.nan, math.inf):
        rows = torch.ones(4, D)
        rows[2] = value
        with pytest.raises(ValueError, match=r"finite anchors that are not 0, .* ids \[12\]"):
            Anchors(torch.arange(10, 14), rows)
    with pytest.raises(ValueError, match="got 3 and 4 rows"):
        # past the shape check of tests, which would come first
        Anchors.__post_init__(SimpleNamespace(ids=torch.arange(3), rows=torch.ones(4, D)))


@pytest.mark.parametrize(("m", "V"), [(5, 3), (4, 3), (30, 3), (7, 0), (20, D), (20, 12), (1, 3)])
def test_gram_schmidt(m, V):
    rows, against = wide(m, D).detach(), wide(V, D, seed=1).detach()
    found = gram_schmidt(rows, against)
    assert found.shape == (m, D)
    room = max(0, D - V)
    if room and V:
        assert (found[:room] @ against.T).abs().max() < 1e-9
    for block in (found[:room], *found[room:].split(D)):
        eye = torch.eye(len(block), dtype=torch.float64)
        torch.testing.assert_close(block @ block.T, eye, atol=1e-9, rtol=0)


def test_a_matched_filter_reads_how_much_of_its_row_a_token_holds():
    whitener, rows = fitted(activations()), wide(5, D).detach().float()
    filters = matched_filters(rows, whitener)
    z = torch.tensor([[0.3], [1.0], [7.0], [-2.0], [0.01]])
    read = (whitener(z * rows + whitener.mean) * filters).sum(1, keepdim=True)
    torch.testing.assert_close(read, z, rtol=1e-4, atol=1e-5)
    white = whitener(activations())
    noise = (white @ filters.T).var(0)
    for other in (rows, whitener.fold(whitener.fold(rows)), wide(5, D, seed=9).detach().float()):
        gain = (whitener.fold(rows) * other).sum(1)  # any other filter, made to read z too
        assert (noise <= (white @ (other / gain[:, None]).T).var(0) * 1.2).all()


@pytest.mark.parametrize("n_anchored", [0, 3])
def test_start_reads_what_it_writes_and_fires_at_the_wanted_rate(n_anchored):
    dictionary, whitener, scale = started(n_anchored=n_anchored)
    torch.testing.assert_close(dictionary.W_dec.norm(dim=1), torch.ones(20))
    assert torch.equal(dictionary.W_dec[:n_anchored], dictionary.anchors)
    tokens = 2.5 * dictionary.W_dec / scale + whitener.mean  # 2.5 in the unit of the output
    with torch.no_grad():
        own = dictionary.pre_acts(whitener(tokens)).diagonal()
        torch.testing.assert_close(own, torch.full((20,), 2.5), rtol=1e-4, atol=1e-4)
        acts = dictionary.encode(whitener(activations()))
    rates = (acts > 0).float().mean(0)
    torch.testing.assert_close(rates, torch.full((20,), 4 / 20), atol=1e-3, rtol=0)
    assert (dictionary.bandwidth > 0).all()


def test_start_keeps_thresholds_positive():
    """With l0_target near d_sae the quantile is negative; log thresholds need it above 0."""
    assert started(l0_target=19.0)[0].log_threshold.isfinite().all()


def test_only_free_rows_are_normalized_and_projected():
    dictionary, *_ = started()
    with torch.no_grad():
        dictionary.W_dec *= torch.arange(1, 21)[:, None]
    before = dictionary.W_dec.detach().clone()
    dictionary.normalize_decoder_()
    after = dictionary.W_dec.detach()
    assert torch.equal(after[:3], before[:3])
    torch.testing.assert_close(after[3:], before[3:] / before[3:].norm(dim=1, keepdim=True))
    grad = torch.randn(20, D, generator=torch.Generator().manual_seed(1))
    dictionary.W_dec.grad = grad.clone()
    dictionary.project_decoder_grad_()
    left = dictionary.W_dec.grad
    assert torch.equal(left[:3], grad[:3])
    assert (left[3:] * after[3:]).sum(1).abs().max() < 1e-5
    along = (grad[3:] * after[3:]).sum(1, keepdim=True) * after[3:]
    torch.testing.assert_close(left[3:], grad[3:] - along)


@pytest.mark.parametrize("n_anchored", [0, 3])
@torch.no_grad()
def test_folded_out_does_the_same_on_raw_activations(n_anchored, tmp_path):
    import sae_lens

    names = {"hook_names": ("blocks.1.hook_resid_post",), "model_name": "tiny"}
    dictionary, whitener, scale = started(n_anchored=n_anchored, **names)
    generator = torch.Generator().manual_seed(3)
    for parameter in dictionary.parameters():  # as after training: anchored rows of other lengths
        parameter += 0.1 * torch.randn(parameter.shape, generator=generator)
    dictionary.normalize_decoder_()
    raw = dictionary.folded_out(whitener, scale)
    assert type(raw) is Dictionary and not raw.training
    assert raw.config.unit_norm_decoder == (n_anchored == 0)
    folder = raw.save(tmp_path / "d")
    loaded = Dictionary.load(folder)
    assert loaded.config == raw.config and loaded.config.hook_names == names["hook_names"]
    x = activations(500, seed=4)
    acts = dictionary.encode(whitener(x))
    x_hat = dictionary.decode(acts) / scale + whitener.mean
    assert 0 < (acts > 0).float().mean() < 0.5
    size = (acts / scale).abs().max().item()
    for it in (raw, loaded, sae_lens.SAE.load_from_disk(folder)):
        torch.testing.assert_close(it.encode(x), acts / scale, rtol=1e-4, atol=1e-4 * size)
        torch.testing.assert_close(it(x), x_hat, rtol=1e-4, atol=1e-4 * x.abs().max().item())


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"n_steps": 0}, "need n_steps >= 1, got 0"),
        ({"d_sae": 0}, "need d_sae >= 1, got 0"),
        ({"log_every": 0}, "need log_every >= 1, got 0"),
        ({"r2_target": 0.0}, r"need r2_target in \(0, 1\), got 0.0"),
        ({"r2_target": 1.0}, "got 1.0"),
        ({"r2_target": math.nan}, "got nan"),
        ({"l0_target": 0.0}, "need l0_target above 0 and below d_sae 64, got 0.0"),
        ({"l0_target": 64.0}, "got 64.0"),
        ({"l0_target": math.nan}, "need l0_target"),
        ({"lr": 0.0}, "need a finite lr > 0, got 0.0"),
        ({"lr": -1e-3}, "need a finite lr"),
        ({"lr": math.inf}, "need a finite lr"),
        ({"lr": math.nan}, "need a finite lr"),
        ({"checkpoint_every": -1}, "need checkpoint_every >= 0, got -1"),
        ({"law": "sgd"}, "need law in .*got 'sgd'"),
    ],
)
def test_impossible_configs_are_refused(change, message):
    with pytest.raises(ValueError, match=message):
        SpalfConfig(**{"n_steps": 100, "d_sae": 64} | change)


def test_step_size_is_lr_at_its_area_and_shrinks_with_the_root_of_it():
    config = SpalfConfig(n_steps=10, d_sae=32768, lr=3e-4)
    assert config.step_size(LR_AREA // 32768) == pytest.approx(3e-4)
    assert config.step_size(LR_AREA // 32768 // 16) == pytest.approx(4 * 3e-4)
    narrow = SpalfConfig(n_steps=10, d_sae=32768 // 4, lr=6e-4)
    assert narrow.step_size(LR_AREA // 32768) == pytest.approx(2 * 6e-4)


def test_learning_rate_rises_stays_and_falls():
    config = SpalfConfig(n_steps=100, d_sae=64)
    factors = [config.lr_factor(step) for step in range(100)]
    assert factors[0] == pytest.approx(0.1) and factors[4] == pytest.approx(0.5)
    assert all(f == 1 for f in factors[9 : config.decay_starts])
    assert factors[90] == pytest.approx(0.5) and factors[99] == pytest.approx(0.05)
    for n in (1, 7, 33, 100, 1001):
        config = SpalfConfig(n_steps=n, d_sae=64)
        assert all(0 < config.lr_factor(step) <= 1 for step in range(n))
        assert all(config.lr_factor(step) < 1 for step in range(config.decay_starts + 1, n))
