"""Several sites: code norms against a float64 reference, and the partition of a DFC, never leaking.

What an exclusive latent reads and writes is probed from outside, by other sites' inputs and by what
its code decodes to.
"""

import copy
from dataclasses import replace

import pytest
import torch

from lib.dictionaries import Dictionary, DictionaryConfig, FitConfig, fit, recipes
from lib.dictionaries.crosscoder import DifferenceReconstruction, ExclusiveL1, delta
from lib.dictionaries.interop import to_sae_lens
from lib.dictionaries.partition import exclusive_sizes, parts
from lib.dictionaries.rules import BatchTopK, Gated, JumpReLU, ReLU, TopK
from lib.dictionaries.trainer import DictionaryTrainer

DIMS, SIZES, D_SAE = (6, 10), (4, 6), 32
SHAPE = {"site_dims": DIMS, "d_sae": D_SAE, "exclusive": SIZES}
RULES = [ReLU(), Gated(), JumpReLU(threshold=0.3), TopK(k=4), BatchTopK(k=4)]


def made(rule=None, seed=0, **options) -> Dictionary:
    torch.manual_seed(seed)
    return Dictionary(DictionaryConfig(**SHAPE | {"rule": rule or BatchTopK(k=4)} | options))


def leak(d: Dictionary) -> float:
    """The most that exclusive latents see of, or write at, the other sites."""
    worst, ends = 0.0, {0: slice(0, 4), 1: slice(4, 10)}
    columns = {0: slice(0, 6), 1: slice(6, 16)}
    for dtype in (torch.float32, torch.float64):
        d = copy.deepcopy(d).to(dtype)
        x = 5 * torch.randn(40, d.d_in, dtype=dtype)
        for site, latents in ends.items():
            other = x.clone()
            other[:, columns[1 - site]] = 9 * torch.randn_like(other[:, columns[1 - site]])
            seen = d.pre_acts(other) - d.pre_acts(x)
            one = torch.zeros(D_SAE, D_SAE, dtype=dtype)
            one[latents, latents] = torch.eye(latents.stop - latents.start, dtype=dtype)
            written = d.decode(one) - d.b_dec
            for part in (seen[:, latents], written[latents, columns[1 - site]]):
                worst = max(worst, part.abs().max().item())
    return worst


def spoil(d: Dictionary) -> Dictionary:
    """Every weight moved, forbidden ones too, as no optimiser of ours would."""
    with torch.no_grad():
        for parameter in d.parameters():
            parameter += 0.1 * torch.randn_like(parameter)
    return d


def trainer(recipe=None, dictionary=None, **options) -> DictionaryTrainer:
    recipe = recipe or recipes.batchtopk(k=4)
    settings = FitConfig(**{"n_steps": 1_000, "lr": 3e-3, "dead_after": 200} | options)
    return DictionaryTrainer(recipe.dictionary(**SHAPE | (dictionary or {})), recipe, settings)


def batches(n: int, size: int = 64):
    generator = torch.Generator().manual_seed(0)
    return [torch.randn(size, sum(DIMS), generator=generator) for _ in range(n)]


@pytest.mark.parametrize("rule", RULES, ids=lambda rule: type(rule).__name__)
@pytest.mark.parametrize("tied", [False, True])
def test_nothing_leaks_whatever_happened_to_the_weights(rule, tied, tmp_path):
    d = spoil(made(rule, tied=tied))
    assert d.integrity() == 0 == leak(d)
    assert leak(spoil(copy.deepcopy(d))) == 0
    assert leak(spoil(d).to(torch.bfloat16).float()) == 0
    spoil(d).eval().save(tmp_path / "it")
    loaded = Dictionary.load(tmp_path / "it")
    assert leak(loaded) == 0 and loaded.config == d.config
    x = torch.randn(30, 16)
    torch.testing.assert_close(loaded(x), d(x))
    if not isinstance(rule, TopK):
        few = spoil(d).narrowed(torch.tensor([0, 5, 20]))
        torch.testing.assert_close(few.encode(x), d.encode(x)[:, [0, 5, 20]])


def test_what_is_exported_or_folded_does_not_leak():
    d = spoil(made(JumpReLU(threshold=0.3), apply_b_dec_to_input=False)).eval()
    right = copy.deepcopy(d)
    right(torch.zeros(1, 16))  # zeros are in memory now
    mean, scale = torch.randn(16), torch.tensor([0.5] * 6 + [2.0] * 10)
    x = torch.randn(40, 16)
    folded = spoil_forbidden(copy.deepcopy(d)).folded(mean, scale)
    torch.testing.assert_close(folded.encode(x), right.encode((x - mean) * scale))
    exported = to_sae_lens(spoil_forbidden(d))
    assert exported.W_dec[:4, 6:].abs().max() == 0 == exported.W_enc[:6, 4:10].abs().max()


def spoil_forbidden(d: Dictionary) -> Dictionary:
    with torch.no_grad():
        d.W_dec[:4, 6:], d.W_dec[4:10, :6] = 3, 3
        d.W_enc[6:, :4], d.W_enc[:6, 4:10] = 3, 3
    return d


def test_gradients_of_others_are_left_alone():
    """Autograd may hand one gradient to two consumers."""
    d = made()
    leaf = torch.randn(D_SAE, 16, requires_grad=True)
    (d.decoder_rows + leaf).sum().backward()
    assert (leaf.grad == 1).all() and d.W_dec.grad[:4, 6:].abs().max() == 0


def test_a_resampled_exclusive_latent_is_of_its_own_site():
    recipe = recipes.standard_resample(l1=0.1)
    it = trainer(recipe, n_steps=10, dead_after=1, normalize="none")
    with torch.no_grad():
        it.dictionary.b_enc.fill_(-9)
    for i, batch in enumerate(batches(2)):
        it.tokens_since_fired.fill_(10_000)
        it.step(i, batch)
    d = it.dictionary  # at step 2 of 10 all were resampled
    assert d.integrity() == 0
    torch.testing.assert_close(d.W_dec.norm(dim=1), torch.ones(D_SAE))
    sizes = d.encoder_rows.norm(dim=1)
    torch.testing.assert_close(sizes, sizes[:1].expand(D_SAE))


def test_integrity_sees_a_leak(monkeypatch):
    d = spoil(made())
    monkeypatch.setattr("lib.dictionaries.dictionary.held", lambda rows, blocks: rows)
    assert spoil(d).integrity() > 0.1
    with pytest.raises(ValueError, match="exclusive"):
        made(exclusive=()).integrity()


@pytest.mark.parametrize(
    ("dtype", "n_steps"),
    [("float32", 100), pytest.param("bfloat16", 1_000, marks=pytest.mark.slow)],
)
def test_nothing_leaks_in_training(dtype, n_steps):
    """With AuxK at work and weight decay between the steps."""
    it, aux = trainer(dtype=dtype), 0
    with torch.no_grad():
        it.dictionary.b_enc[[1, 5, 20]] = -9  # dead, one of each part
    for i, batch in enumerate(batches(n_steps)):
        out = it.step(i, batch)
        aux += len(out.dead) > 0
        with torch.no_grad():
            for parameter in it.dictionary.parameters():
                parameter *= 1 - 1e-4
    assert aux > 20
    assert it.dictionary.integrity() == 0 == leak(it.dictionary)
    assert it.dictionary.W_dec[:4, 6:].abs().max() == 0  # nor did the parameters drift
    moved = it.dictionary.W_dec[:10].norm(dim=1)
    torch.testing.assert_close(moved, torch.full_like(moved, 1 - 1e-4))


@pytest.mark.parametrize("recipe", [recipes.batchtopk(k=4), recipes.standard(l1=0.3)])
def test_gradients_are_those_of_masked_dense_arithmetic(recipe):
    it = trainer(recipe, normalize="none")
    d, x = it.dictionary.double(), torch.randn(50, 16, dtype=torch.float64)
    mask = torch.ones(D_SAE, 16, dtype=torch.float64)
    mask[:4, 6:], mask[4:10, :6] = 0, 0
    acts = d.encode_training(x).acts
    ours = torch.autograd.grad(d.decode(acts).square().sum(), [d.W_enc, d.W_dec])
    on = (acts if isinstance(acts, torch.Tensor) else acts.dense()) != 0
    pre = (x - d.b_dec) @ (d.W_enc * mask.T) + d.b_enc
    x_hat = (pre * on).relu() @ (d.W_dec * mask) + d.b_dec
    right = torch.autograd.grad(x_hat.square().sum(), [d.W_enc, d.W_dec])
    torch.testing.assert_close(ours, right)


def test_an_exclusive_latent_gets_its_own_sites_residual():
    """AuxK alone, all latents dead: gradients stay inside each part's site."""
    it = trainer(dead_after=1)
    for batch in batches(3):
        it.tokens_since_fired += 10_000
        out = it._forward(batch, 0.0)
        it.recipe.terms[-1](out).backward()
        grad = it.dictionary.W_dec.grad.to_dense()
        assert len(out.dead) == D_SAE and grad[:4, :6].abs().sum() > 0
        assert grad[:4, 6:].abs().max() == 0 == grad[4:10, :6].abs().max()
        it.dictionary.zero_grad()


@pytest.mark.slow  # without type checks, which do not go with dynamo
@pytest.mark.parametrize("backend", ["eager", "aot_eager"])
def test_nothing_leaks_where_torch_compiles(backend):
    d = spoil(made(TopK(k=4))).eval()
    x = torch.randn(20, 16)
    with torch.no_grad():
        torch.testing.assert_close(torch.compile(d, backend=backend)(x), d(x))
    assert leak(d) == 0


def test_resume_and_statistics_of_the_parts(tmp_path):
    plan = (recipes.batchtopk(k=4).dictionary(**SHAPE), recipes.batchtopk(k=4))
    settings = FitConfig(n_steps=12, lr=3e-3, dead_after=100, log_every=4)
    stream = batches(12)
    whole = fit({"it": plan}, stream, settings, progress=False)["it"]
    settings = replace(settings, checkpoint_every=4)
    with pytest.raises(ValueError, match="stream"):
        fit({"it": plan}, stream[:9], settings, folder=tmp_path, progress=False)
    resumed = fit({"it": plan}, stream, settings, folder=tmp_path, resume=True, progress=False)
    d = resumed["it"].dictionary
    for name, tensor in whole.dictionary.state_dict().items():
        assert torch.equal(tensor, d.state_dict()[name]), name
    assert d.integrity() == 0 == leak(d)
    last = whole.history[-1]
    assert set(parts(SIZES, D_SAE)) == {"only 0", "only 1", "shared"}
    assert all(last[f"dead {name}"] == 0 for name in parts(SIZES, D_SAE))
    by_part = sum(last[f"l0 {name}"] for name in parts(SIZES, D_SAE))
    assert by_part == pytest.approx(last["l0"], rel=1e-6)


NORMS = {
    "decoder": lambda a, b: (a**2 + b**2) ** 0.5,
    "crosscoder": lambda a, b: a + b,
    "mixed": lambda a, b: (a**2 + b**2) ** 0.5 + 0.1 * (a + b),
    "none": lambda a, b: a * 0 + 1,
}


@pytest.mark.parametrize("norm", NORMS)
def test_code_norms_in_the_unit_of_training(norm):
    """Same latents as a float64 reference, before and after a scale of each site is folded in."""
    d = spoil(made(code_norm=norm, unit_norm_decoder=False, exclusive=())).eval()
    d.threshold.fill_(0.6)
    x = 2 * torch.randn(200, 16)
    scale = torch.tensor([0.25] * 6 + [3.0] * 10)
    W, b = d.W_dec.double(), d.b_dec.double()
    sites = [part.norm(dim=1) for part in W.split(DIMS, dim=1)]
    pre = (x.double() * scale - b) @ d.W_enc.double() + d.b_enc.double()
    on = (pre * NORMS[norm](*sites) > d.threshold) & (pre > 0)
    right = ((pre * on) @ W + b) / scale
    folded = d.folded(torch.zeros(16), scale)
    torch.testing.assert_close(d.code_norms().double(), NORMS[norm](*sites), rtol=1e-5, atol=1e-6)
    torch.testing.assert_close(folded.code_norms(), d.code_norms())
    torch.testing.assert_close(folded(x).double(), right, rtol=1e-4, atol=1e-4)
    assert folded.config.code_norm == norm and folded.config.site_scales == (0.25, 3.0)


@pytest.mark.parametrize("exclusive", [(), SIZES])
def test_decoupled_sites_keep_their_own(exclusive, tmp_path):
    """In training exactly n·k pairs at each site; against dense float64 arithmetic."""
    shape = {"code_norm": "decoupled", "unit_norm_decoder": False, "exclusive": exclusive}
    d = spoil(made(**shape)).double().train()
    x = 2 * torch.randn(60, 16, dtype=torch.float64)
    for _ in range(3):
        codes = d.encode_training(x)
    acts, bounds = codes.acts, codes.bounds
    W, pre, norms = d.decoder_rows, d.pre_acts(x).relu(), d.site_norms()
    x_hat = []
    for site, part in enumerate(W.split(DIMS, dim=1)):
        scores = pre * norms[site]
        bound = scores.flatten().topk(240).values[-1]
        torch.testing.assert_close(d.smallest[site], bound)
        x_hat.append((pre * (scores >= bound)) @ part)
    right = torch.cat(x_hat, dim=1) + d.b_dec
    torch.testing.assert_close(d.decode(acts, bounds), right)
    ours = torch.autograd.grad(
        d.decode(acts, bounds).square().sum(), [d.W_enc, d.W_dec], retain_graph=True
    )
    dense = torch.autograd.grad(right.square().sum(), [d.W_enc, d.W_dec])
    torch.testing.assert_close(ours, dense)
    d.eval()
    d.threshold *= 0.97  # between scores
    on = pre[:, None] * norms > d.threshold[:, None]
    torch.testing.assert_close(d.encode(x), pre * on.any(1))
    parts_ = zip(range(2), W.split(DIMS, dim=1), strict=True)
    right = torch.cat([(pre * on[:, site]) @ part for site, part in parts_], dim=1) + d.b_dec
    torch.testing.assert_close(d(x), right)
    torch.testing.assert_close(d.decode(d.encode_sparse(x)), right)
    folded = d.float().folded(torch.zeros(16), torch.tensor([0.25] * 6 + [3.0] * 10))
    loaded = Dictionary.load(folded.save(tmp_path / "it"))
    scale = torch.tensor([0.25] * 6 + [3.0] * 10)
    torch.testing.assert_close(loaded(x.float() / scale), right.float() / scale)
    with pytest.raises(ValueError, match="per_dim"):
        d.folded(torch.zeros(16), torch.rand(16) + 1)


def test_k_falls_from_its_start():
    rule = BatchTopK(k=4, k_start=12, k_anneal=0.5)
    assert [rule.k_at(t) for t in (0.0, 0.25, 0.5, 1.0)] == [12, 8, 4, 4]
    it = trainer(recipes.batchtopk(k=4, k_start=12), {"exclusive": ()}, n_steps=20)
    assert it.dictionary.progress == 1  # and so at inference
    counts = [len(it.step(i, batch).acts.values) / 64 for i, batch in enumerate(batches(20))]
    assert counts[0] == 12 and counts[-1] == 4 and sorted(counts, reverse=True) == counts


def test_terms_on_the_difference_and_on_exclusive_latents():
    it = trainer(recipes.standard(l1=0.3), {"site_dims": (8, 8)})
    out = it._forward(batches(1)[0], 0.5)
    a, b = out.error[:, :8], out.error[:, 8:]
    expected = 2 * (b - a).square().sum(1).mean()
    torch.testing.assert_close(DifferenceReconstruction(weight=2.0)(out), expected)
    only = (out.acts * it.dictionary.code_norms())[:, :10].sum(1).mean()
    torch.testing.assert_close(ExclusiveL1(weight=3.0)(out), 3 * only)
    sparse = trainer()._forward(batches(1)[0], 0.5)
    only = sparse.dense_acts[:, :10].sum(1).mean()
    torch.testing.assert_close(ExclusiveL1(weight=3.0)(sparse), 3 * only)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"exclusive": (4,)}, "2 numbers"),
        ({"exclusive": (-1, 4)}, ">= 0"),
        ({"exclusive": (16, 16)}, "shared latents"),
        ({"exclusive": (4,), "site_dims": (16,)}, "two or more sites"),
        ({"site_scales": (1.0,)}, "site_scales"),
        ({"code_norm": "both"}, "code_norm"),
        ({"code_norm": "decoupled", "rule": ReLU()}, "BatchTopK"),
        ({"code_norm": "mixed", "mix": (0.0, 0.0)}, "mix"),
    ],
)
def test_shapes_that_cannot_be(options, message):
    with pytest.raises(ValueError, match=message):
        made(**options)


def test_recipes_that_mean_nothing_are_refused():
    assert exclusive_sizes(1_000, 3, 0.0205) == (20, 20, 20)  # to nearest
    for fractions in (0.5, [0.1], [-0.1, 0.1]):
        with pytest.raises(ValueError, match="leaves shared latents"):
            exclusive_sizes(100, 2, fractions)
    with pytest.raises(ValueError, match="prefixes"):
        recipes.matryoshka().dictionary(**SHAPE | {"d_sae": 64})
    with pytest.raises(ValueError, match="one width"):
        delta(k=4).dictionary(**SHAPE)
    with pytest.raises(ValueError, match="need exclusive"):
        recipe = recipes.standard()
        replace(recipe, terms=(*recipe.terms, ExclusiveL1(weight=1.0))).dictionary(
            site_dims=DIMS, d_sae=D_SAE
        )
    with pytest.raises(ValueError, match="k_start"):
        recipes.topk(k=4, k_start=0)
    with pytest.raises(ValueError, match="one width"):  # by hand, past the recipe
        DictionaryTrainer(
            DictionaryConfig(site_dims=DIMS, d_sae=D_SAE, rule=BatchTopK(k=4)),
            delta(k=4),
            FitConfig(n_steps=3),
        )
