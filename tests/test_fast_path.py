"""No accuracy is paid for speed: the fast path against dense matrices and autograd alone."""

from itertools import islice

import pytest
import torch
from torch.nn.utils import clip_grad_norm_

from lib import paths
from lib.activations.harvest import HarvestConfig, Harvester
from lib.activations.moments import Normalizer
from lib.data.corpus import load_corpus
from lib.dictionaries import Dictionary, FitConfig, fit, recipes
from lib.dictionaries.losses import AuxK, Pass, Reconstruction
from lib.models.load import load_model
from lib.sparse import memory
from tests.small_fits import SPARSE, fvu_of, planted, trainee, watched

N_STEPS, BATCH, D_SAE, K = 2000, 64, 384, 8
FIT = FitConfig(n_steps=N_STEPS, lr=1e-3, dead_after=8 * BATCH, log_every=N_STEPS)


@pytest.fixture(scope="module")
def world_acts() -> tuple[torch.Tensor, torch.Tensor]:
    """A layer of a shipped model on the tiny world: to train on, and held out."""
    model, tokenizer = load_model(paths.shipped_dir() / "models" / "tiny-llama", device="cpu")
    found = []
    for split, n_tokens in (("train", 40_000), ("test", 6_000)):
        corpus = load_corpus("world", tokenizer, n_tokens=n_tokens, seq_len=64, split=split)
        config = HarvestConfig(hook_names=("blocks.1.hook_resid_post",), batch_rows=64)
        source = Harvester([model], corpus, config)
        found.append(torch.cat([source.block(i).acts for i in range(source.n_blocks)]))
    return found[0], found[1]


def shuffled(acts: torch.Tensor):
    generator = torch.Generator().manual_seed(1)
    while True:
        order = torch.randperm(len(acts), generator=generator)
        yield from (acts[part] for part in order.split(BATCH)[:-1])


class Dense:
    """The same training, step by step as it is written: whole matrices, autograd, plain Adam."""

    def __init__(self, recipe: recipes.Recipe, first: torch.Tensor) -> None:
        self.rule, self.l0_term = recipe.rule, recipe.terms[1]
        config = recipe.dictionary(site_dims=(first.shape[1],), d_sae=D_SAE)
        torch.manual_seed(FIT.seed)
        self.dictionary = Dictionary(config)
        self.normalizer = Normalizer.fit("mean_norm", first, config.site_dims)
        with torch.no_grad():
            self.dictionary.b_dec.copy_(self.normalizer(first).mean(0))
        self.adam = torch.optim.Adam(self.dictionary.parameters(), lr=FIT.lr, foreach=False)
        self.tokens_since_fired = torch.zeros(D_SAE, dtype=torch.long)

    def acts(self, pre: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor | None]:
        if isinstance(self.rule, recipes.TopK):
            values, places = pre.relu().topk(K, dim=1)
            return torch.zeros_like(pre).scatter(1, places, values), None
        if isinstance(self.rule, recipes.BatchTopK):
            values, places = pre.relu().flatten().topk(K * len(pre))
            threshold = self.dictionary.threshold
            smallest = values.detach().min()
            threshold.copy_(smallest if threshold == 0 else 0.9 * threshold + 0.1 * smallest)
            return torch.zeros_like(pre).flatten().scatter(0, places, values).view_as(pre), None
        theta, width = self.dictionary.log_threshold.exp(), self.rule.bandwidth
        on, near = (pre > theta).float(), ((pre - theta).abs() < width / 2).float()
        jump = near / width * (theta.detach() - theta)  # zero, with the rectangle's gradient
        return pre * on + theta.detach() * jump, (on + jump).sum(1)

    def auxk(self, x: torch.Tensor, error: torch.Tensor, dead: torch.Tensor) -> torch.Tensor:
        d = self.dictionary
        pre = (x - d.b_dec.detach()) @ d.encoder[dead].T + d.b_enc[dead]
        values, places = pre.topk(min(d.d_in // 2, len(dead)), dim=1)
        codes = torch.zeros_like(pre).scatter(1, places, values.relu())
        left = (error - codes @ d.W_dec[dead]).square().sum()
        variance = (error - error.mean(0)).square().sum()
        return (x - x.mean(0)).square().sum(1).mean() / 32 * left / variance

    def step(self, step: int, batch: torch.Tensor) -> float:
        d, x = self.dictionary, self.normalizer(batch)
        acts, l0 = self.acts((x - d.b_dec) @ d.encoder.T + d.b_enc)
        error = x - (acts @ d.W_dec + d.b_dec)
        loss = error.square().sum(1).mean()
        dead = (self.tokens_since_fired >= FIT.dead_after).nonzero()[:, 0]
        if l0 is not None:
            weight = self.l0_term.weight * min(1.0, step / FIT.n_steps / self.l0_term.ramp)
            loss = loss + weight * (l0.mean() / K - 1).square()
        elif len(dead):
            loss = loss + self.auxk(x, error.detach(), dead)
        self.adam.zero_grad()
        loss.backward()
        with torch.no_grad():
            grad, W_dec = d.W_dec.grad, d.W_dec
            grad -= (grad * W_dec).sum(1, keepdim=True) * W_dec
        clip_grad_norm_(d.parameters(), FIT.grad_clip)
        self.adam.param_groups[0]["lr"] = FIT.lr * FIT.lr_factor(step)
        self.adam.step()
        with torch.no_grad():
            d.W_dec /= d.W_dec.norm(dim=1, keepdim=True)
        self.tokens_since_fired += len(x)
        self.tokens_since_fired[(acts.detach() > 0).any(0)] = 0
        return loss.item()


@pytest.mark.parametrize("name", ["topk", "batchtopk", "jumprelu_target"])
def test_fast_path_is_as_accurate_as_dense_arithmetic(name, world_acts):
    """The loss of the first 20 steps, and what 2,000 steps leave unexplained."""
    acts, held_out = world_acts
    recipe = recipes.NAMED[name](k=K)
    followed, seen = watched(recipe)
    plan = (recipe.dictionary(site_dims=(acts.shape[1],), d_sae=D_SAE), followed)
    fast = fit({"it": plan}, shuffled(acts), FIT, progress=False)["it"].dictionary

    batches = list(islice(shuffled(acts), N_STEPS))
    dense = Dense(recipe, batches[0])
    losses = [dense.step(i, batch) for i, batch in enumerate(batches)]
    assert [step.loss for step in seen[:20]] == pytest.approx(losses[:20], rel=1e-5)
    scale = dense.normalizer
    plain = dense.dictionary.folded(scale.mean, scale.scale).eval()
    found, expected = fvu_of(fast, held_out), fvu_of(plain, held_out)
    assert found == pytest.approx(expected, rel=0.01)
    assert 0.01 < found < 0.4  # and both have learnt
    sparse = [step.sparse for step in seen]
    if name == "jumprelu_target":  # whole at first, at pairs once few are active
        assert not any(sparse[:20]) and all(sparse[N_STEPS // 2 :])
    else:
        assert all(sparse)
        assert any(step.n_dead for step in seen[:20])  # AuxK is among the losses compared


# ---- clipping inside the optimiser's pass


SHAPES = {
    "plain": {},
    "tied": {"tied": True},
    "transcoder": {"site_dims": (8,), "out_dims": (8,)},
    "free rows": {"unit_norm_decoder": False},
}


@pytest.mark.parametrize("shape", SHAPES.values(), ids=SHAPES)
@pytest.mark.parametrize("name", SPARSE)
@pytest.mark.parametrize("grad_clip", [0.01, 1e6])
def test_clipping_is_that_of_clip_grad_norm(name, grad_clip, shape, monkeypatch):
    it = trainee(SPARSE[name], grad_clip=grad_clip, shape=shape, normalize="none")
    batches = [scale * x for scale, x in zip((3.0, 1.0, 30.0, 0.1), planted(4), strict=True)]
    it.start(batches[0])
    plain = Dictionary(it.dictionary.config)
    plain.load_state_dict(it.dictionary.state_dict())
    adam = torch.optim.Adam(plain.parameters(), lr=1.0, foreach=False)
    real, norms = it.optimizer.step, []

    def follow(lr: float, divisor: torch.Tensor) -> None:
        """The gradients of this step, to the other optimiser first."""
        for ours, theirs in zip(it.dictionary.parameters(), plain.parameters(), strict=True):
            theirs.grad = ours.grad.clone()
        norms.append(clip_grad_norm_(plain.parameters(), grad_clip).item())
        assert divisor.item() == pytest.approx(max(1.0, norms[-1] / grad_clip), rel=1e-5)
        adam.param_groups[0]["lr"] = lr
        adam.step()
        real(lr, divisor)

    monkeypatch.setattr(it.optimizer, "step", follow)
    for i, batch in enumerate(batches):
        it.step(i, batch)
        plain.normalize_decoder_()
        for key, tensor in plain.state_dict().items():
            if key != "threshold":
                ours = it.dictionary.state_dict()[key]
                torch.testing.assert_close(ours, tensor, rtol=1e-6, atol=1e-6, msg=f"{key} {i}")
    assert max(norms) > 10 * min(norms) and min(norms) > 0.01 and max(norms) < 1e6
    assert max(norms) > 1


@pytest.mark.parametrize("unit", [True, False])
@pytest.mark.parametrize("block", [1, 7 * 16, 2**17])
def test_the_projected_gradient_and_its_norm(unit, block, monkeypatch):
    """Row by row, in blocks of 7 rows of 64 (the last is a single one), and all at once."""
    monkeypatch.setattr(memory, "BLOCK", (block, block))
    config = SPARSE["topk"].dictionary(site_dims=(16,), d_sae=64, unit_norm_decoder=unit)
    d = Dictionary(config)
    assert d.project_decoder_grad_() == 0
    with torch.no_grad():
        d.W_dec *= 1.0 if unit else torch.rand(64, 1) + 0.5
    grad, rows = torch.randn(64, 16), d.W_dec.detach()
    d.W_dec.grad = grad.clone()
    norm = d.project_decoder_grad_()
    along = (grad * rows).sum(1, keepdim=True) * rows
    expected = grad - along if unit else grad
    torch.testing.assert_close(d.W_dec.grad, expected)
    torch.testing.assert_close(norm, expected.norm())
    assert along.norm() > 0.1 * grad.norm()


class Sum(Reconstruction):
    """A loss that knows no decoder."""

    def __call__(self, p: Pass) -> torch.Tensor:
        return 1e-3 * p.acts.values.sum()


def test_auxk_may_be_all_that_trains_the_decoder():
    """Its gradient is one of the dead rows alone, and nothing adds it to a whole matrix."""
    recipe = recipes.Recipe(rule=recipes.TopK(k=3), terms=(Sum(), AuxK()))
    it, batches = trainee(recipe, dead_after=1, normalize="none"), planted(3)
    it.start(batches[0])
    before = it.dictionary.W_dec.detach().clone()
    dead = [it.step(i, batch).dead for i, batch in enumerate(batches)]
    moved = (it.dictionary.W_dec - before).norm(dim=1) > 1e-4
    assert set(moved.nonzero()[:, 0].tolist()) == set(torch.cat(dead).tolist()) != set()
