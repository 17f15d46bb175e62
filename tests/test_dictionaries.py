"""Rules, kernels and the module: invariants, gradients against float64, folding, bad input."""

from dataclasses import replace

import pytest
import torch
from torch.autograd import gradcheck

from lib.dictionaries import (
    Dictionary,
    DictionaryConfig,
    SparseActs,
    load_dictionaries,
    losses,
    recipes,
)
from lib.dictionaries.losses import StepOutput
from lib.dictionaries.rules import (
    BatchTopK,
    Gated,
    JumpReLU,
    ReLU,
    TopK,
)
from lib.sparse import active_pre_acts, dense_jumprelu, sparse_decode

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


def some_pairs(n=7, d_sae=9, dtype=torch.float64) -> SparseActs:
    """Pairs with a token that has none, a latent that has none, and a zero value."""
    torch.manual_seed(1)
    acts = torch.randn(n, d_sae, dtype=dtype) * (torch.rand(n, d_sae) < 0.4)
    acts[2], acts[:, 4] = 0, 0
    pairs = SparseActs.of(acts)
    values = pairs.values.clone()
    values[3] = 0
    return pairs.with_values(values)


def test_pairs_and_matrix_agree():
    pairs = some_pairs()
    assert pairs.n == 7 and pairs.offsets[2] == pairs.offsets[3]
    dense = pairs.dense()
    torch.testing.assert_close(SparseActs.of(dense).dense(), dense)
    assert (pairs.nonzero().values != 0).all() and len(pairs.nonzero().values) < len(pairs.values)
    torch.testing.assert_close(pairs.nonzero().dense(), dense)
    order, starts = pairs.by_latent
    assert (pairs.indices[order].diff() >= 0).all()
    assert starts.diff().tolist() == torch.bincount(pairs.indices, minlength=9).tolist()


def test_sparse_decode_is_the_dense_product_and_so_is_its_gradient():
    pairs = some_pairs()
    W_dec = torch.randn(9, 4, dtype=torch.float64, requires_grad=True)
    values = pairs.values.clone().requires_grad_()
    torch.testing.assert_close(sparse_decode(values, pairs, W_dec), pairs.dense() @ W_dec)
    assert gradcheck(lambda v, W: sparse_decode(v, pairs, W), (values, W_dec))


def test_active_pre_acts_have_the_dense_gradient():
    """Every input: activations, encoder, both biases; also through a clamp, as in training."""
    pairs = some_pairs()
    leaves = [torch.randn(*shape, dtype=torch.float64) for shape in ((7, 4), (9, 4), (9,), (4,))]
    leaves = [leaf.requires_grad_() for leaf in leaves]

    def dense(x, encoder, b_enc, b_in):
        return ((x - b_in) @ encoder.T + b_enc)[pairs.rows, pairs.indices]

    here = pairs.with_values(dense(*leaves).detach())
    assert 0 < (here.values < 0).sum() < len(here.values)
    torch.testing.assert_close(active_pre_acts(*leaves, here), dense(*leaves))
    weights = torch.randn(len(here.values), dtype=torch.float64)
    for outer in (lambda v: v, torch.relu):
        ours = torch.autograd.grad((outer(active_pre_acts(*leaves, here)) * weights).sum(), leaves)
        right = torch.autograd.grad((outer(dense(*leaves)) * weights).sum(), leaves)
        torch.testing.assert_close(ours, right)


def test_kernels_without_any_pair_or_token():
    empty = SparseActs.of(torch.zeros(3, 5))
    W = torch.randn(5, 4, requires_grad=True)
    out = sparse_decode(empty.values, empty, W)
    out.sum().backward()
    assert out.abs().sum() == 0 and W.grad.abs().sum() == 0
    none = SparseActs.of(torch.zeros(0, 5))
    assert sparse_decode(none.values, none, W).shape == (0, 4)


@pytest.mark.parametrize("rule", [TopK(k=5), BatchTopK(k=5)], ids=IDS[3:])
@pytest.mark.parametrize("tied", [False, True])
def test_sparse_training_has_the_gradients_of_dense_arithmetic(rule, tied):
    d = perturbed(rule, tied=tied).double()
    x = torch.randn(30, 12, dtype=torch.float64)
    acts, *_ = d.training_acts(x)
    d.decode_sparse(acts).square().sum().backward()
    ours = {name: p.grad.clone() for name, p in d.named_parameters()}
    d.zero_grad()
    mask = (acts.dense() != 0).double()
    ((d.pre_acts(x) * mask).relu() @ d.W_dec + d.b_dec).square().sum().backward()
    for name, parameter in d.named_parameters():
        torch.testing.assert_close(ours[name], parameter.grad, msg=name)


def test_topk_keeps_k_and_batchtopk_n_times_k():
    x = 3 * torch.randn(50, 12)
    d = perturbed(TopK(k=5))
    assert (d.encode(x) > 0).sum(1).max() == 5
    d = perturbed(BatchTopK(k=5))
    pre, (acts, *_) = d.pre_acts(x), d.training_acts(x)
    assert len(acts.values) == 250 and acts.offsets.diff().max() > 5
    kept = acts.dense() > 0
    assert pre[kept].min() >= pre[~kept].max()


def test_batchtopk_threshold_follows_the_smallest_kept():
    d = perturbed(BatchTopK(k=5, threshold_decay=0.5))
    x = torch.randn(400, 12)
    smallest = d.training_acts(x)[0].values.min()
    torch.testing.assert_close(d.threshold, 0.5 * torch.tensor(0.7) + 0.5 * smallest.detach())
    for _ in range(20):
        d.training_acts(x)
    assert (d.encode(x) > 0).sum() == pytest.approx(400 * 5, abs=2)
    assert "threshold" in d.state_dict()


def test_batchtopk_ranks_by_code_norm():
    d = perturbed(BatchTopK(k=2), unit_norm_decoder=False)
    with torch.no_grad():
        d.W_dec *= torch.linspace(0.1, 3, 40)[:, None]
    x = torch.randn(60, 12)
    pre, (acts, *_) = d.pre_acts(x), d.training_acts(x)
    scores = pre * d.W_dec.norm(dim=1)
    kept = acts.dense() > 0
    assert scores[kept].min() >= scores[~kept].max() and pre[kept].min() < pre[~kept].max()


@pytest.mark.parametrize("rule", RULES, ids=IDS)
def test_inference_does_not_depend_on_neighbours(rule):
    d = perturbed(rule)
    x = torch.randn(4, 6, 12)
    with torch.no_grad():
        together = d.encode(x)
        assert together.shape == (4, 6, 40) and (together > 0).any()
        torch.testing.assert_close(d.encode(x[1, 2]), together[1, 2])
        torch.testing.assert_close(d(x)[3, 5], d(x[3, 5]))
        torch.testing.assert_close(d.encode_sparse(x.flatten(0, 1)).dense(), together.flatten(0, 1))
        assert (d.encode_sparse(x[0]).values != 0).all()
        sparse = d.decode_sparse(d.encode_sparse(x[0]))
        torch.testing.assert_close(sparse, d(x[0]), atol=1e-5, rtol=1e-5)


def jumped(pre, theta, width):
    """`acts` and `l0` as the kernel gives them, with a gradient to θ itself."""
    return dense_jumprelu(pre, theta.log(), torch.full_like(theta, width).detach())[:2]


def test_jumprelu_uses_both_halves_of_the_band():
    """θ's gradient comes from pre-activations just below it as well as just above."""
    theta = torch.tensor([1.0], requires_grad=True)
    for offset in (-0.1, 0.1):
        for output in jumped(torch.tensor([[1 + offset]]), theta, 0.5):
            assert torch.autograd.grad(output.sum(), theta, retain_graph=True)[0] == -1 / 0.5
    far = jumped(torch.tensor([[1.3], [0.7]]), theta, 0.5)[1]
    assert torch.autograd.grad(far.sum(), theta)[0] == 0


def test_jumprelu_gradient_is_that_of_the_smoothed_loss():
    """The rectangle estimate, averaged over many tokens, is the slope of the expected L0."""
    torch.manual_seed(0)
    pre = torch.randn(400_000, 1, dtype=torch.float64)
    theta = torch.tensor([0.8], dtype=torch.float64, requires_grad=True)
    estimate = torch.autograd.grad(jumped(pre, theta, 0.1)[1].mean(), theta)[0].item()
    density = torch.exp(torch.tensor(-0.5 * 0.8**2)).item() / (2 * torch.pi) ** 0.5
    assert estimate == pytest.approx(-density, rel=0.03)


@pytest.mark.parametrize("bandwidth", [0.1, 0.8])
def test_jumprelu_at_pairs_is_the_whole_one(bandwidth, monkeypatch):
    """Values, L0 and every gradient, though pairs below the band are never looked at."""
    monkeypatch.setattr("lib.dictionaries.rules.DENSE", 1.0)
    d = perturbed(JumpReLU(threshold=1.2, bandwidth=bandwidth)).double()
    x = torch.randn(50, 12, dtype=torch.float64)
    x[[0, 7, 49]] = 0.01  # tokens without a latent
    found = []
    for whole in (False, True):
        acts, l0, _ = d.training_acts(x, whole=whole)
        assert isinstance(acts, SparseActs) != whole
        x_hat = d.decode(acts) if whole else d.decode_sparse(acts)
        ((x - x_hat).square().sum() + (l0 * torch.arange(50) / 9).sum()).backward()
        code = acts if whole else acts.dense()
        found.append([code.detach(), l0.detach(), *(p.grad.clone() for p in d.parameters())])
        d.zero_grad()
    assert found[0][0].any(1).sum() < 50 and not found[0][0].any(0).all()
    torch.testing.assert_close(found[0], found[1])


def test_a_jumprelu_of_many_latents_trains_whole():
    d = perturbed(JumpReLU(threshold=0.1))
    x = torch.randn(50, 12)
    assert isinstance(d.training_acts(x)[0], torch.Tensor)
    with torch.no_grad():
        d.log_threshold.fill_(1.4)
    assert isinstance(d.training_acts(x)[0], SparseActs)


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


def a_pass(recipe, dead=(), t=0.5, **options) -> Pass:
    d = perturbed(recipe.rule, **options)
    x = 2 * torch.randn(64, 12)
    acts, l0, pre = d.training_acts(x, whole=recipe.whole)
    x_hat = d.decode_sparse(acts) if isinstance(acts, SparseActs) else d.decode(acts)
    return StepOutput(d, x, x, x_hat, acts, pre, torch.tensor(dead, dtype=torch.long), t, l0)


def test_auxk_reaches_the_dead_and_nobody_else():
    p = a_pass(recipes.topk(k=4), dead=[3, 8, 11])
    losses.AuxK()(p).backward()
    for name in ("encoder", "W_dec", "b_enc"):
        grad = getattr(p.dictionary, name).grad.to_dense()
        touched = grad.reshape(40, -1).abs().sum(1).nonzero().flatten().tolist()
        assert touched == [3, 8, 11]
    assert p.dictionary.b_dec.grad is None
    assert losses.AuxK()(a_pass(recipes.topk(k=4))) == 0


def test_ghost_gradients_move_only_the_dead():
    p = a_pass(recipes.ghost(), dead=[2, 5])
    loss = losses.GhostGradients()(p)
    torch.testing.assert_close(loss, losses.Reconstruction()(p))
    loss.backward()
    assert p.dictionary.encoder.grad.abs().sum(1).nonzero().flatten().tolist() == [2, 5]


def test_matryoshka_prefixes_are_the_dense_ones():
    p = a_pass(recipes.matryoshka(k=4))
    shares, dense = (0.25, 0.5, 1.0), p.acts.dense()
    expected = [
        (p.x - dense[:, :m] @ p.dictionary.W_dec[:m] - p.dictionary.b_dec).square().sum(1).mean()
        for m in (10, 20, 40)
    ]
    ours = losses.PrefixReconstruction(shares=shares)(p)
    torch.testing.assert_close(ours, torch.stack(expected).mean())


def test_p_annealing_is_continuous_and_favours_few_large_latents():
    anneal = losses.L1(weight=1.0, ramp=0.0, p_end=0.2, p_start_t=0.2)
    start, end = (a_pass(recipes.standard(), t=t) for t in (0.2, 1.0))
    torch.testing.assert_close(anneal(start), losses.L1(weight=1.0, ramp=0.0)(start))
    torch.testing.assert_close(anneal(end), losses.L1(weight=1.0, ramp=0.0)(end))
    slope = torch.autograd.grad(anneal(end), end.acts)[0]
    active = end.acts > 0
    large = active & (end.acts > end.acts[active].median())
    assert slope[active & ~large].mean() > 2 * slope[large].mean() > 0


def test_entropy_is_blind_to_scale_and_prefers_one_latent():
    p = a_pass(recipes.entropy())
    term = losses.Entropy(weight=1.0, ramp=0.0)
    before = term(p)
    p.acts = 3 * p.acts
    torch.testing.assert_close(term(p), before)
    p.acts = torch.zeros(64, 40)
    p.acts[:, 3] = 1
    assert term(p) == pytest.approx(0, abs=1e-6)
    p.acts = torch.ones(64, 40)
    assert term(p) == pytest.approx(torch.log(torch.tensor(40.0)).item(), rel=1e-4)


def test_gate_loss_trains_the_gate_but_not_the_decoder():
    p = a_pass(recipes.gated())
    losses.GateReconstruction()(p).backward()
    assert p.dictionary.W_dec.grad is None or p.dictionary.W_dec.grad.abs().sum() == 0
    assert p.dictionary.encoder.grad.abs().sum() > 0


def test_l0_counts_the_lower_half_of_the_band():
    """Codes are zero below the threshold, so a step on codes would miss half of the gradient."""
    p = a_pass(recipes.jumprelu(threshold=0.6, bandwidth=0.4))
    losses.L0(weight=1.0, ramp=0.0)(p).backward()
    theta = p.dictionary.log_threshold.detach().exp()
    pre = p.dictionary.pre_acts(p.x).detach()
    near = (pre - theta).abs() < 0.2
    below = near & (pre < theta)
    assert below.sum() > 20
    expected = -theta * near.sum(0) / 0.4 / len(p.x)
    torch.testing.assert_close(p.dictionary.log_threshold.grad, expected)


def test_l0_towards_a_target():
    for target, sign in ((0.5, -1), (30.0, 1)):
        p = a_pass(recipes.jumprelu())
        losses.L0(weight=1.0, target=target, ramp=0.0)(p).backward()
        assert sign * p.dictionary.log_threshold.grad.sum() > 0


@pytest.mark.parametrize(
    ("bad", "message"),
    [
        ({"rule": TopK(k=41)}, "k <= d_sae 40, got k 41"),
        ({"site_dims": ()}, "site_dims"),
        ({"d_sae": 0}, "d_sae >= 1"),
        ({"hook_names": ("a", "b")}, "hook name for each of 1 sites"),
        ({"code_norm": "l7"}, "code_norm"),
        ({"out_dims": (7,)}, "apply_b_dec_to_input=False"),
    ],
)
def test_impossible_configs_are_refused(bad, message):
    with pytest.raises(ValueError, match=message):
        DictionaryConfig(**{"site_dims": (12,), "d_sae": 40, "rule": ReLU()} | bad)


def test_impossible_rules_terms_and_widths_are_refused():
    for make in (
        lambda: TopK(k=0),
        lambda: BatchTopK(k=2, threshold_decay=1.0),
        lambda: JumpReLU(bandwidth=0.0),
        lambda: losses.PrefixReconstruction(shares=(0.5, 0.5, 1.0)),
        lambda: losses.L0(weight=1.0, target=0.0),
        lambda: losses.L1(weight=-1.0),
        lambda: losses.L1(weight=1.0, p_start_t=1.0),
        lambda: recipes.Recipe(rule=TopK(k=3), terms=(losses.L1(weight=1.0),)),
        lambda: recipes.Recipe(rule=ReLU(), terms=(losses.L0(weight=1.0),)),
    ):
        with pytest.raises(ValueError, match="need"):
            make()
    with pytest.raises(ValueError, match="width 12, got"):
        perturbed(ReLU()).encode(torch.randn(3, 11))


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
