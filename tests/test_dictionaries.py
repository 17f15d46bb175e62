"""Rules, loss terms and the module: invariants, gradients, folding, recipes, bad input."""

from dataclasses import dataclass, replace

import pytest
import torch

from lib.dictionaries import (
    Dictionary,
    DictionaryConfig,
    FitConfig,
    SparseActs,
    fit,
    load_dictionaries,
    losses,
    recipes,
    rules,
)
from lib.dictionaries.rules import BatchTopK, Codes, Gated, JumpReLU, ReLU, Rule, TopK
from lib.sparse import dense_jumprelu, sparse_decode
from tests.small_fits import planted

RULES = [ReLU(), Gated(), JumpReLU(threshold=0.6), TopK(k=5), BatchTopK(k=5)]
IDS = [type(rule).__name__ for rule in RULES]


def perturbed(rule, seed=0, **options) -> Dictionary:
    """A dictionary none of whose parameters is at its initial value."""
    torch.manual_seed(seed)
    shape = {"site_dims": (12,), "d_sae": 40, **options}
    dictionary = Dictionary(DictionaryConfig(rule=rule, **shape))
    with torch.no_grad():
        for parameter in dictionary.parameters():
            parameter += 0.2 * torch.randn_like(parameter)
        dictionary.normalize_decoder_()
        if isinstance(rule, BatchTopK):
            dictionary.threshold.fill_(0.7)
    return dictionary.eval()


def test_pairs_and_matrix_agree():
    """A token that has none, a latent that has none, and a zero value."""
    torch.manual_seed(1)
    acts = torch.randn(7, 9) * (torch.rand(7, 9) < 0.4)
    acts[2], acts[:, 4] = 0, 0
    pairs = SparseActs.of(acts)
    assert pairs.n == 7 and pairs.offsets[2] == pairs.offsets[3]
    assert torch.equal(pairs.dense(), acts)
    pairs.values[3] = 0
    few = pairs.nonzero()
    assert (few.values != 0).all() and len(few.values) == len(pairs.values) - 1
    assert torch.equal(few.dense(), pairs.dense())
    order, starts = pairs.by_latent
    assert (pairs.indices[order].diff() >= 0).all()
    assert starts.diff().tolist() == torch.bincount(pairs.indices, minlength=9).tolist()


def test_decoding_without_any_pair_or_token():
    empty, W_dec = SparseActs.of(torch.zeros(3, 5)), torch.randn(5, 4, requires_grad=True)
    x_hat = sparse_decode(empty, W_dec)
    x_hat.sum().backward()
    assert x_hat.abs().sum() == 0 and W_dec.grad.abs().sum() == 0
    assert sparse_decode(SparseActs.of(torch.zeros(0, 5)), W_dec).shape == (0, 4)


@pytest.mark.parametrize("rule", [TopK(k=5), BatchTopK(k=5)], ids=IDS[3:])
@pytest.mark.parametrize("tied", [False, True])
def test_sparse_training_has_the_gradients_of_dense_arithmetic(rule, tied):
    d = perturbed(rule, tied=tied).double()
    x = torch.randn(30, 12, dtype=torch.float64)
    acts = d.encode_training(x).acts
    d.decode(acts).square().sum().backward()
    ours = {name: p.grad.clone() for name, p in d.named_parameters()}
    d.zero_grad()
    mask = (acts.dense() != 0).double()
    ((d.pre_acts(x) * mask).relu() @ d.W_dec + d.b_dec).square().sum().backward()
    for name, parameter in d.named_parameters():
        torch.testing.assert_close(ours[name], parameter.grad, msg=name)


def test_topk_keeps_k_and_batchtopk_n_times_k_by_code_norm():
    x = 3 * torch.randn(50, 12)
    assert (perturbed(TopK(k=5)).encode(x) > 0).sum(1).max() == 5
    d = perturbed(BatchTopK(k=5), unit_norm_decoder=False)
    with torch.no_grad():
        d.W_dec *= torch.linspace(0.1, 3, 40)[:, None]
    pre, acts = d.pre_acts(x), d.encode_training(x).acts
    assert len(acts.values) == 250 and acts.offsets.diff().max() > 5
    kept, scores = acts.dense() > 0, pre * d.W_dec.norm(dim=1)
    assert scores[kept].min() >= scores[~kept].max() and pre[kept].min() < pre[~kept].max()


def test_batchtopk_threshold_follows_the_smallest_kept():
    d = perturbed(BatchTopK(k=5, threshold_decay=0.5))
    x = torch.randn(400, 12)
    smallest = d.encode_training(x).acts.values.min()
    torch.testing.assert_close(d.threshold, 0.5 * torch.tensor(0.7) + 0.5 * smallest.detach())
    for _ in range(20):
        d.encode_training(x)
    assert (d.encode(x) > 0).sum() == pytest.approx(400 * 5, abs=2)
    assert "threshold" in d.state_dict()


@pytest.mark.parametrize("rule", RULES, ids=IDS)
def test_inference_does_not_depend_on_neighbours(rule):
    d = perturbed(rule)
    x = torch.randn(4, 6, 12)
    with torch.no_grad():
        together = d.encode(x)
        assert together.shape == (4, 6, 40) and (together > 0).any()
        torch.testing.assert_close(d.encode(x[1, 2]), together[1, 2])
        torch.testing.assert_close(d(x)[3, 5], d(x[3, 5]))
        pairs = d.encode_sparse(x.flatten(0, 1))
        torch.testing.assert_close(pairs.dense(), together.flatten(0, 1))
        assert (pairs.values != 0).all()
        torch.testing.assert_close(d.decode(pairs), d(x).flatten(0, 1), atol=1e-5, rtol=1e-5)


def test_jumprelu_gradient_is_that_of_the_smoothed_loss():
    """The rectangle estimate, averaged over many tokens, is the slope of the expected L0."""
    torch.manual_seed(0)
    pre = torch.randn(400_000, 1, dtype=torch.float64)
    log_theta = torch.tensor([0.8], dtype=torch.float64).log().requires_grad_()
    l0 = dense_jumprelu(pre, log_theta, torch.full((1,), 0.1, dtype=torch.float64))[1]
    estimate = torch.autograd.grad(l0.mean(), log_theta)[0].item() / 0.8
    density = torch.exp(torch.tensor(-0.5 * 0.8**2)).item() / (2 * torch.pi) ** 0.5
    assert estimate == pytest.approx(-density, rel=0.03)


@pytest.mark.parametrize("bandwidth", [0.1, 0.8])
def test_jumprelu_at_pairs_is_the_dense_one(bandwidth, monkeypatch):
    """Values, L0 and every gradient, though pairs below the band are never looked at."""
    d = perturbed(JumpReLU(threshold=1.2, bandwidth=bandwidth)).double()
    x = torch.randn(50, 12, dtype=torch.float64)
    x[[0, 7, 49]] = 0.01  # tokens without a latent
    found = []
    for most in (1.0, 0.0):
        monkeypatch.setattr(rules, "DENSE", most)
        codes = d.encode_training(x)
        acts = codes.acts
        assert isinstance(acts, SparseActs) == bool(most)
        error = (x - d.decode(acts)).square().sum()
        (error + (codes.l0 * torch.arange(50) / 9).sum()).backward()
        acts = acts.dense() if most else acts
        found.append([acts.detach(), codes.l0.detach(), *(p.grad for p in d.parameters())])
        d.zero_grad()
    assert found[0][0].any(1).sum() < 50 and not found[0][0].any(0).all()
    torch.testing.assert_close(found[0], found[1])


@dataclass(frozen=True, kw_only=True)
class ScaledTopK(Rule):
    """The k largest positive pre-activations, each times its latent's learnt scale."""

    k: int

    def parameters(self, d_sae):
        return {"scale": torch.ones(d_sae)}

    def acts(self, pre, p):
        values, indices = pre.topk(self.k, dim=1)
        return torch.zeros_like(pre).scatter(1, indices, values.relu()) * p.scale

    def select(self, scan, p):
        return scan.topk(self.k)

    def sparse(self, pre, p):
        return Codes(pre.with_values(pre.values.relu() * p.scale[pre.indices]))


SEEN = []


def absolute(out: losses.StepOutput) -> torch.Tensor:
    """The mean absolute error."""
    SEEN.append(out.acts)
    return out.error.abs().mean()


def test_a_rule_and_a_term_of_ones_own_train():
    recipe = recipes.Recipe(rule=ScaledTopK(k=3), terms=(losses.Reconstruction(), absolute))
    assert recipe.to_json()["terms"] == [
        {"name": "Reconstruction"},
        {"name": f"{__name__}.absolute"},
    ]
    plan, batches = (recipe.dictionary(site_dims=(16,), d_sae=32), recipe), planted(150)
    settings = FitConfig(n_steps=150, lr=1e-2, log_every=149)
    SEEN.clear()
    fitted = fit({"it": plan}, batches, settings, progress=False)["it"]
    assert len(SEEN) == 150 and all(isinstance(acts, SparseActs) for acts in SEEN)
    first, last = fitted.history[0], fitted.history[-1]
    assert last["fvu"] < 0.5, fitted.history
    d, x = fitted.dictionary, batches[0]
    assert (d.scale - 1).abs().max() > 0.1 and (d.encode(x) > 0).sum(1).max() == 3
    torch.testing.assert_close(d.encode_training(x).acts.dense(), d.encode(x))


@pytest.mark.parametrize("rule", RULES, ids=IDS)
@pytest.mark.parametrize("applied", [True, False])
@pytest.mark.parametrize("kind", ["uniform", "centred", "per_dim"])
def test_folding_the_normaliser_changes_nothing(rule, applied, kind):
    d = perturbed(rule, apply_b_dec_to_input=applied)
    x = 3 * torch.randn(50, 12) + 1
    mean = torch.zeros(12) if kind == "uniform" else x.mean(0)
    scale = 1 / x.std(0) if kind == "per_dim" else torch.full((12,), 0.4)
    folded = d.folded(mean, scale)
    with torch.no_grad():
        right = d((x - mean) * scale) / scale + mean
        torch.testing.assert_close(folded(x), right, atol=1e-4, rtol=1e-4)
        ours, theirs = folded.encode(x), d.encode((x - mean) * scale)
        assert ((ours > 0) == (theirs > 0)).float().mean() > 0.999
    if kind != "per_dim":
        torch.testing.assert_close(ours, theirs / 0.4, atol=1e-4, rtol=1e-4)
        torch.testing.assert_close(folded.W_dec.norm(dim=1), torch.ones(40))


@pytest.mark.parametrize("norm", ["decoder", "crosscoder", "none"])
@pytest.mark.parametrize("tied", [True, False])
def test_folding_keeps_the_ranks_of_code_norms(norm, tied):
    """Two sites with scales of their own, rows of any norm: what fires stays what fires."""
    d = perturbed(
        BatchTopK(k=5), site_dims=(5, 7), unit_norm_decoder=False, code_norm=norm, tied=tied
    )
    with torch.no_grad():
        d.W_dec *= torch.linspace(0.5, 2, 40)[:, None]
    x, mean = 3 * torch.randn(50, 12) + 1, torch.zeros(12)
    scale = torch.tensor([0.4] * 5 + [0.7] * 7)
    folded = d.folded(mean, scale)
    with torch.no_grad():
        torch.testing.assert_close(folded(x), d(x * scale) / scale, atol=1e-4, rtol=1e-4)
        assert torch.equal(folded.encode(x) > 0, d.encode(x * scale) > 0)


def test_code_norms():
    options = {"site_dims": (5, 7), "unit_norm_decoder": False}
    d = perturbed(ReLU(), **options)
    torch.testing.assert_close(d.code_norms(), d.W_dec.norm(dim=1))
    d.config = replace(d.config, code_norm="crosscoder")
    sites = d.W_dec[:, :5].norm(dim=1) + d.W_dec[:, 5:].norm(dim=1)
    torch.testing.assert_close(d.code_norms(), sites)
    d.config = replace(d.config, code_norm="none")
    assert (d.code_norms() == 1).all()


REST


def test_grid_sweeps_each_recipes_own_knob():
    shape = {"site_dims": (12,), "hook_names": ("x",)}
    names = ["topk", "gated", "jumprelu"]
    plans = recipes.grid(names, d_sae=[40, 80], k=[4, 8], l1=[0.5], **shape)
    assert list(plans) == [
        "topk d_sae=40 k=4", "topk d_sae=40 k=8", "topk d_sae=80 k=4", "topk d_sae=80 k=8",
        "gated d_sae=40", "gated d_sae=80", "jumprelu d_sae=40", "jumprelu d_sae=80",
    ]  # fmt: skip
    config, recipe = plans["topk d_sae=80 k=8"]
    assert (config.d_sae, config.rule.k, recipe.rule) == (80, 8, config.rule)
    assert plans["gated d_sae=40"][1] == recipes.gated(l1=0.5)
    assert plans["jumprelu d_sae=40"][1] == recipes.jumprelu()
    assert list(recipes.grid(["topk"], d_sae=40, k=4, **shape)) == ["topk"]
    assert len(recipes.grid(list(recipes.NAMED), d_sae=[40], k=[4], **shape)) == 12
    with pytest.raises(ValueError, match="no recipe 'top-k'; near ones: topk"):
        recipes.grid(["top-k"], d_sae=[40], **shape)
    for name in ("topk", "jumprelu_target"):
        with pytest.raises(ValueError, match="k <= d_sae 40, got"):
            recipes.grid([name], d_sae=40, k=41, **shape)
    with pytest.raises(ValueError, match="at least one d_sae"):
        recipes.grid(["topk"], d_sae=[], **shape)


def test_load_dictionaries_by_name(tmp_path):
    for name in ("a", "b"):
        perturbed(TopK(k=3), seed=ord(name)).save(tmp_path / name)
    found = load_dictionaries(tmp_path)
    assert list(found) == ["a", "b"]
    torch.testing.assert_close(found["b"].W_dec, perturbed(TopK(k=3), seed=ord("b")).W_dec)
    assert list(load_dictionaries(tmp_path / "a")) == ["a"]
    with pytest.raises(ValueError, match="a folder that is new or a dictionary's"):
        perturbed(TopK(k=3)).save(tmp_path)
    perturbed(TopK(k=3)).save(tmp_path / "a")
    assert list(load_dictionaries(tmp_path)) == ["a", "b"]
    with pytest.raises(FileNotFoundError, match="need a dictionary"):
        load_dictionaries(tmp_path / "c")
