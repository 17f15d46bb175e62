"""Rules, loss terms and the module: invariants, gradients, folding, recipes, bad input."""

import math
from dataclasses import dataclass, replace

import pytest
import torch

from lib.dictionaries import (
    Dictionary,
    DictionaryConfig,
    FitConfig,
    fit,
    losses,
    matryoshka,
    recipes,
    rules,
)
from lib.dictionaries.dictionary import load_dictionaries
from lib.dictionaries.rules import BatchTopK, Codes, Gated, JumpReLU, ReLU, Rule, TopK
from lib.sparse import SparseActs, dense_jumprelu
from tests.small_fits import planted

RULES = [ReLU(), Gated(), JumpReLU(threshold=0.6), TopK(k=5), BatchTopK(k=5)]
IDS = [type(rule).__name__ for rule in RULES]


def config(**options) -> DictionaryConfig:
    return DictionaryConfig(**{"site_dims": (12,), "d_sae": 40, "rule": ReLU()} | options)


def perturbed(rule, seed=0, **options) -> Dictionary:
    """A dictionary none of whose parameters is at its initial value."""
    torch.manual_seed(seed)
    dictionary = Dictionary(config(rule=rule, **options))
    with torch.no_grad():
        for parameter in dictionary.parameters():
            parameter += 0.2 * torch.randn_like(parameter)
        dictionary.normalize_decoder_()
        if isinstance(rule, BatchTopK):
            dictionary.threshold.fill_(0.7)
    return dictionary.eval()


@pytest.mark.parametrize("rule", RULES[3:], ids=IDS[3:])
@pytest.mark.parametrize("tied", [False, True])
@pytest.mark.parametrize("shift", [0.0, -1.5, -100.0])
def test_sparse_training_has_the_gradients_of_dense_arithmetic(rule, tied, shift):
    """Also where latents are clamped, and where none is active."""
    d = perturbed(rule, tied=tied).double()
    with torch.no_grad():
        d.b_enc += shift
    x = torch.randn(30, 12, dtype=torch.float64)
    acts, parameters = d.encode_training(x).acts, list(d.parameters())
    assert (acts.dense() != 0).any() == (shift > -100)
    ours = torch.autograd.grad(d.decode(acts).square().sum(), parameters)
    x_hat = (d.pre_acts(x) * (acts.dense() != 0)).relu() @ d.W_dec + d.b_dec
    right = torch.autograd.grad(x_hat.square().sum(), parameters)
    torch.testing.assert_close(ours, right)


def test_topk_keeps_k_and_batchtopk_n_times_k_by_code_norm():
    d = perturbed(TopK(k=5))
    x = 3 * torch.randn(50, 12)
    assert (d.encode(x) > 0).sum(1).max() == 5
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


@pytest.mark.parametrize("rule", RULES, ids=IDS)
def test_inference_does_not_depend_on_neighbours(rule):
    d = perturbed(rule)
    x = torch.randn(4, 6, 12)
    with torch.no_grad():
        d.b_enc -= 1.5  # some tokens have fewer than k
        together = d.encode(x)
        assert together.shape == (4, 6, 40) and (together > 0).any()
        assert (together > 0).sum(-1).min() < 5
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
        assert isinstance(codes.acts, SparseActs) == bool(most)
        loss = (x - d.decode(codes.acts)).square().sum() + (codes.l0 * torch.arange(50) / 9).sum()
        grads = torch.autograd.grad(loss, list(d.parameters()))
        found.append((codes.acts.dense() if most else codes.acts, codes.l0, grads))
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


def test_a_rule_and_a_term_of_ones_own_train(tmp_path):
    seen = []

    def absolute(out):
        seen.append(isinstance(out.acts, SparseActs))
        return out.error.abs().mean()

    recipe = recipes.Recipe(rule=ScaledTopK(k=3), terms=(losses.Reconstruction(), absolute))
    names = [term["name"] for term in recipe.to_json()["terms"]]
    assert names == ["Reconstruction", f"{__name__}.{absolute.__qualname__}"]
    plan, batches = (recipe.dictionary(site_dims=(16,), d_sae=32), recipe), planted(40)
    settings = FitConfig(n_steps=40, lr=2e-2, log_every=1)
    fitted = fit({"it": plan}, batches, settings, progress=False)["it"]
    d, x, fvus = fitted.dictionary, batches[0], [entry["fvu"] for entry in fitted.history]
    assert seen == 40 * [True] and fvus[-1] < 0.35 < 0.65 < fvus[0]
    assert (d.scale - 1).abs().max() > 0.1 and (d.encode(x) > 0).sum(1).max() == 3
    torch.testing.assert_close(d.encode_training(x).acts.dense(), d.encode(x))
    n_steps = len(seen)
    with pytest.raises(ValueError, match=r"it: cannot save ScaledTopK.*need a rule in"):
        fit({"it": plan}, batches, settings, folder=tmp_path, progress=False)
    assert len(seen) == n_steps  # before any step


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
        sites = torch.stack([part.norm(dim=1) for part in d.W_dec.split([5, 7], dim=1)])
        rows = {"decoder": d.W_dec.norm(dim=1), "crosscoder": sites.sum(0), "none": torch.ones(40)}
    torch.testing.assert_close(d.code_norms(), rows[norm])
    x, mean = 3 * torch.randn(50, 12) + 1, torch.zeros(12)
    scale = torch.tensor([0.4] * 5 + [0.7] * 7)
    folded = d.folded(mean, scale)
    with torch.no_grad():
        torch.testing.assert_close(folded(x), d(x * scale) / scale, atol=1e-4, rtol=1e-4)
        assert torch.equal(folded.encode(x) > 0, d.encode(x * scale) > 0)


def output(recipe, dead=(), t=0.5) -> losses.StepOutput:
    d, dead = perturbed(recipe.rule), torch.tensor(dead, dtype=torch.long)
    x = 2 * torch.randn(64, 12)
    codes = d.encode_training(x)
    return losses.StepOutput(d, x, x, d.decode(codes.acts), codes, dead, t)


def test_auxk_reaches_the_dead_and_nobody_else():
    out = output(recipes.topk(k=4), dead=[3, 8, 11])
    losses.AuxK()(out).backward()
    d = out.dictionary
    for grad in (d.W_enc.grad.T, d.W_dec.grad.to_dense(), d.b_enc.grad[:, None]):
        assert grad.any(1).nonzero().flatten().tolist() == [3, 8, 11]
    assert d.b_dec.grad is None
    assert losses.AuxK()(output(recipes.topk(k=4))) == 0


def test_ghost_gradients_move_only_the_dead():
    out = output(recipes.ghost(), dead=[2, 5])
    loss = losses.GhostGradients()(out)
    torch.testing.assert_close(loss, losses.Reconstruction()(out))
    loss.backward()
    assert out.dictionary.W_enc.grad.any(0).nonzero().flatten().tolist() == [2, 5]


def test_matryoshka_prefixes_are_the_dense_ones():
    out = output(recipes.matryoshka(k=4))
    d, dense = out.dictionary, out.dense_acts
    errors = [out.x - dense[:, :m] @ d.W_dec[:m] - d.b_dec for m in (10, 20, 40)]
    expected = torch.stack([error.square().sum(1).mean() for error in errors]).mean()
    ours = matryoshka.PrefixReconstruction(shares=(0.25, 0.5, 1.0))(out)
    torch.testing.assert_close(ours, expected)


def test_p_annealing_is_continuous_and_favours_few_large_latents():
    anneal = losses.L1(weight=1.0, ramp=0.0, p_end=0.2, p_start_t=0.2)
    start, end = (output(recipes.standard(), t=t) for t in (0.2, 1.0))
    for out in (start, end):
        torch.testing.assert_close(anneal(out), losses.L1(weight=1.0, ramp=0.0)(out))
    slope = torch.autograd.grad(anneal(end), end.acts)[0]
    active = end.acts > 0
    large = active & (end.acts > end.acts[active].median())
    assert slope[active & ~large].mean() > 2 * slope[large].mean() > 0


def test_entropy_is_blind_to_scale_and_prefers_one_latent():
    out, one = output(recipes.entropy()), torch.zeros(64, 40)
    one[:, 3] = 1

    def entropy(acts):
        return losses.Entropy(weight=1.0, ramp=0.0)(replace(out, codes=Codes(acts))).item()

    assert entropy(3 * out.acts) == pytest.approx(entropy(out.acts), rel=1.3e-6)
    assert entropy(one) == pytest.approx(0, abs=1e-6)
    assert entropy(torch.ones(64, 40)) == pytest.approx(math.log(40), rel=1e-4)


def test_gate_loss_trains_the_gate_but_not_the_decoder():
    out = output(recipes.gated())
    losses.GateReconstruction()(out).backward()
    assert out.dictionary.W_dec.grad is None and out.dictionary.W_enc.grad.abs().sum() > 0


def test_l0_counts_the_lower_half_of_the_band():
    """Latents are zero below the threshold: a step on them would miss half of the gradient."""
    out = output(recipes.jumprelu(threshold=0.6, bandwidth=0.4))
    losses.L0(weight=1.0, ramp=0.0)(out).backward()
    log_threshold = out.dictionary.log_threshold
    theta, pre = log_threshold.detach().exp(), out.dictionary.pre_acts(out.x).detach()
    near = (pre - theta).abs() < 0.2
    assert (near & (pre < theta)).sum() > 20
    torch.testing.assert_close(log_threshold.grad, -theta * near.sum(0) / 0.4 / len(out.x))


def test_l0_towards_a_target():
    for target, sign in ((0.5, -1), (30.0, 1)):
        out = output(recipes.jumprelu())
        losses.L0(weight=1.0, target=target, ramp=0.0)(out).backward()
        assert sign * out.dictionary.log_threshold.grad.sum() > 0


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: config(rule=TopK(k=41)), "k <= d_sae 40, got k 41"),
        (lambda: config(site_dims=()), "site_dims"),
        (lambda: config(d_sae=0), "d_sae >= 1"),
        (lambda: config(hook_names=("a", "b")), "hook name for each of 1 sites"),
        (lambda: config(code_norm="l7"), "code_norm"),
        (lambda: config(out_dims=(7,)), "apply_b_dec_to_input=False"),
        (lambda: TopK(k=0), "need k >= 1"),
        (lambda: BatchTopK(k=2, threshold_decay=1.0), "need threshold_decay"),
        (lambda: JumpReLU(bandwidth=0.0), "need bandwidth > 0"),
        (
            lambda: matryoshka.PrefixReconstruction(shares=(0.5, 0.5, 1.0)),
            "need shares that ascend",
        ),
        (lambda: losses.L0(weight=1.0, target=0.0), "need target > 0"),
        (lambda: losses.L1(weight=-1.0), "need weight >= 0"),
        (lambda: losses.L1(weight=1.0, p_start_t=1.0), "need p_end .* and p_start_t"),
        (lambda: recipes.Recipe(rule=TopK(k=3), terms=(losses.L1(weight=1.0),)), "L1 cannot go"),
        (lambda: recipes.Recipe(rule=ReLU(), terms=(losses.L0(weight=1.0),)), "L0 cannot go"),
        (lambda: perturbed(ReLU()).encode(torch.randn(3, 11)), "width 12, got"),
    ],
)
def test_what_is_impossible_is_refused(make, message):
    with pytest.raises(ValueError, match=message):
        make()


def test_grid_sweeps_each_recipes_own_knob():
    shape = {"site_dims": (12,), "hook_names": ("x",)}
    names = ["topk", "gated", "jumprelu"]
    plans = recipes.grid(names, d_sae=[40, 80], k=[4, 8], l1=[0.5], **shape)
    assert list(plans) == [
        "topk d_sae=40 k=4", "topk d_sae=40 k=8", "topk d_sae=80 k=4", "topk d_sae=80 k=8",
        "gated d_sae=40", "gated d_sae=80", "jumprelu d_sae=40", "jumprelu d_sae=80",
    ]  # fmt: skip
    found, recipe = plans["topk d_sae=80 k=8"]
    assert (found.d_sae, found.rule.k, recipe.rule) == (80, 8, found.rule)
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
    (tmp_path / "a" / "cfg.json").unlink()
    perturbed(Gated()).save(tmp_path / "a")  # whole
    assert load_dictionaries(tmp_path)["a"].config.rule == Gated()
    with pytest.raises(FileNotFoundError, match="need a dictionary"):
        load_dictionaries(tmp_path / "c")
