"""No accuracy is paid for speed: the fast path against dense matrices and autograd alone, training
on screens and in reused buffers against training without."""

import copy
from itertools import islice

import pytest
import torch
from torch.nn.utils import clip_grad_norm_

from lib.activations.harvest import HarvestConfig, Harvester
from lib.activations.moments import Normalizer
from lib.data.corpus import load_corpus
from lib.dictionaries import Dictionary, FitConfig, fit, recipes, rules
from lib.dictionaries.losses import AuxK, Reconstruction, StepOutput
from lib.sparse import SparseActs, ops, reused_buffers, screen
from lib.training import optim
from tests.small_fits import (
    SPARSE,
    fvu_of,
    in_small_blocks,
    planted,
    same,
    screening,
    started,
    stopped_and_resumed,
    trained,
    watched,
)

pytestmark = pytest.mark.slow

N_STEPS, BATCH, D_SAE, K = 300, 64, 384, 8
FIT = FitConfig(n_steps=N_STEPS, lr=1e-3, dead_after=8 * BATCH, log_every=N_STEPS)


@pytest.fixture(scope="module")
def world_acts(llama) -> tuple[torch.Tensor, torch.Tensor]:
    """A layer of a shipped model on the tiny world: to train on, and held out."""
    (model, tokenizer), found = llama, []
    for split, n_tokens in (("train", 20_000), ("test", 4_000)):
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
        pre = (x - d.b_dec.detach()) @ d.W_enc[:, dead] + d.b_enc[dead]
        values, places = pre.topk(min(d.d_in // 2, len(dead)), dim=1)
        codes = torch.zeros_like(pre).scatter(1, places, values.relu())
        left = (error - codes @ d.W_dec[dead]).square().sum()
        variance = (error - error.mean(0)).square().sum()
        return (x - x.mean(0)).square().sum(1).mean() / 32 * left / variance

    def step(self, step: int, batch: torch.Tensor) -> float:
        d, x = self.dictionary, self.normalizer(batch)
        acts, l0 = self.acts((x - d.b_dec) @ d.W_enc + d.b_enc)
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
    """The loss of the first 20 steps, and what 300 steps leave unexplained."""
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
    assert 0.01 < found < 0.6  # and both have learnt
    sparse = [step.sparse for step in seen]
    if name == "jumprelu_target":  # dense at first
        assert not any(sparse[:20])
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
def test_clipping_is_that_of_clip_grad_norm(name, grad_clip, shape):
    batches = [scale * x for scale, x in zip((3.0, 1.0, 30.0, 0.1), planted(4), strict=True)]
    it = started(SPARSE[name], batches[0], grad_clip=grad_clip, shape=shape, normalize="none")
    plain = copy.deepcopy(it.dictionary)
    adam, norms = torch.optim.Adam(plain.parameters(), lr=1.0, foreach=False), []
    for i, batch in enumerate(batches):
        plain.load_state_dict(it.dictionary.state_dict())
        out = StepOutput(*step_of(plain, batch), it._dead(), i / it.n_steps)
        torch.stack([term(out) for term in it.recipe.terms]).sum().backward()
        plain.project_decoder_grad_()
        norms.append(clip_grad_norm_(plain.parameters(), grad_clip).item())
        adam.param_groups[0]["lr"] = it.fit.lr * it.fit.lr_factor(i)
        adam.step()
        adam.zero_grad()
        plain.normalize_decoder_()
        it.step(i, batch)
        for key, tensor in plain.named_parameters():
            ours = it.dictionary.state_dict()[key]
            torch.testing.assert_close(ours, tensor.data, rtol=1e-5, atol=1e-5, msg=f"{key} {i}")
    assert max(norms) > 10 * min(norms) and min(norms) > 0.01 and 1 < max(norms) < 1e6


def step_of(d: Dictionary, batch: torch.Tensor) -> tuple:
    """What `StepOutput` begins with."""
    x, target = (batch, batch) if d.config.out_dims is None else batch.split([8, 8], dim=1)
    codes = d.encode_training(x)
    return d, x, target, d.decode(codes.acts), codes


@pytest.mark.parametrize("unit", [True, False])
@pytest.mark.parametrize("block", [1, 7 * 16, 2**17])
def test_the_projected_gradient_and_its_norm(unit, block, monkeypatch):
    """Row by row, in blocks of 7 rows of 64 (the last is a single one), and all at once."""
    monkeypatch.setattr(ops, "BLOCK", (block, block))
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

    def __call__(self, out: StepOutput) -> torch.Tensor:
        return 1e-3 * out.acts.values.sum()


def test_auxk_may_be_all_that_trains_the_decoder():
    """Its gradient is one of the dead rows alone, and nothing adds it to a whole matrix."""
    recipe = recipes.Recipe(rule=recipes.TopK(k=3), terms=(Sum(), AuxK()))
    batches = planted(3)
    it = started(recipe, batches[0], dead_after=1, normalize="none")
    before = it.dictionary.W_dec.detach().clone()
    dead = [it.step(i, batch).dead for i, batch in enumerate(batches)]
    moved = (it.dictionary.W_dec - before).norm(dim=1) > 1e-4
    assert set(moved.nonzero()[:, 0].tolist()) == set(torch.cat(dead).tolist()) != set()


# ---- on screens


CASES = {
    "topk": (recipes.topk(k=3), {}),
    "batchtopk": (recipes.batchtopk(k=3), {}),
    "matryoshka": (recipes.matryoshka(k=3), {}),
    "jumprelu": (SPARSE["jumprelu"], {}),
    "crosscoder": (recipes.batchtopk(k=3), {"site_dims": (10, 6)}),
    "dfc": (recipes.batchtopk(k=3), {"site_dims": (10, 6), "exclusive": (3, 3)}),
    "tied": (recipes.topk(k=3), {"tied": True}),
    "transcoder": (recipes.batchtopk(k=3), {"site_dims": (8,), "out_dims": (8,)}),
}


def stepped(name: str, n_steps: int = 20):
    """A trainer, the active pairs and the loss of each step."""
    (recipe, seen), batches = watched(CASES[name][0]), planted(n_steps)
    it = started(recipe, batches[0], n_steps=n_steps, shape=CASES[name][1], normalize="none")
    with torch.no_grad():  # or a token's error would be orthogonal to its latent, if it has one:
        it.dictionary.encoder_rows.mul_(0.9)  # Adam enlarges what rounding leaves of a gradient
    pairs = [it.step(i, batch).acts for i, batch in enumerate(batches)]
    return it, pairs, [step.loss for step in seen]


@pytest.mark.parametrize("blocks", ["one", "of 16"])
@pytest.mark.parametrize("name", CASES)
def test_training_on_screens_is_training_in_float32(name, blocks, monkeypatch):
    if blocks == "of 16":
        in_small_blocks(monkeypatch)
    with screening() as looks:
        it, pairs, losses = stepped(name)
    assert len(looks) >= 20 and all(looks)
    with screening(False):
        plain, expected, plain_losses = stepped(name)
    for ours, theirs in zip(pairs, expected, strict=True):
        assert len(ours.values) <= len(theirs.values)
        ours, theirs = ours.dense(), theirs.dense()
        assert torch.equal(ours > 0, theirs > 0)
        torch.testing.assert_close(ours, theirs, rtol=1e-4, atol=1e-6)
    assert losses == pytest.approx(plain_losses, rel=1e-5)
    theirs = plain.dictionary.state_dict()
    for key, tensor in it.dictionary.state_dict().items():
        torch.testing.assert_close(tensor, theirs[key], rtol=1e-5, atol=1e-5, msg=key)


def test_training_on_screens_resumes_bit_for_bit(tmp_path):
    often = {"n_steps": 12, "lr": 3e-3, "dead_after": 150, "checkpoint_every": 2, "log_every": 5}
    with screening() as looks:
        stopped_and_resumed(tmp_path, FitConfig(**often))
    assert len(looks) > 2 * 3 * 12 and all(looks)


@pytest.mark.parametrize("name", ["topk", "batchtopk", "jumprelu"])
def test_with_too_many_candidates_everything_is_in_float32(name, monkeypatch):
    """In the last block: half of each encoder row is that of all, and all that these tokens have.
    BatchTopK gives up while it has no hint yet, a JumpReLU as too many are active."""
    in_small_blocks(monkeypatch)
    batch = 0.3 * planted(1)[0]
    batch[:, 8:], batch[32:, :8], batch[32:, 8:] = 0, 0, 5

    def three_steps():
        it = started(SPARSE[name], 0 * batch, normalize="none")
        with torch.no_grad():
            it.dictionary.W_enc[8:] = 0.3
        for i in range(3):
            it.step(i, batch)
        return it.state()

    with screening(candidates=0.6) as looks:
        state = three_steps()
    with screening(False):
        same(state, three_steps())  # bit for bit
    assert looks == 3 * [False]


@pytest.mark.parametrize("spoilt", [torch.inf, torch.nan, 1e30, "weights"])
def test_what_is_not_finite_is_refused_as_without_a_screen(spoilt):
    messages, batches = [], planted(3)
    for on in (True, False):
        it = started(SPARSE["topk"], batches[0])
        with screening(on):
            it.step(0, batches[0])
            bad, encoder = batches[1].clone(), it.dictionary.W_enc.detach()
            place = (encoder if spoilt == "weights" else bad)[3, 2:3]
            kept = place.clone()
            place.fill_(torch.inf if spoilt == "weights" else spoilt)
            before = copy.deepcopy(it.state())
            with pytest.raises(FloatingPointError) as raised:
                it.step(1, bad)
            same(before, it.state())
            place.copy_(kept)
            it.step(1, batches[2])
        messages.append(str(raised.value))
    assert messages[0] == messages[1]


@pytest.mark.parametrize("on", [True, False])
@pytest.mark.parametrize("name", SPARSE)
def test_training_runs_where_torch_must_be_deterministic(name, on):
    torch.use_deterministic_algorithms(True)
    try:
        with screening(on):
            trained(SPARSE[name], 2)
    finally:
        torch.use_deterministic_algorithms(False)


# ---- in reused buffers


needs_mkl = pytest.mark.skipif(
    not torch.backends.mkl.is_available(), reason="gradients lie in buffers only with MKL's product"
)


@pytest.mark.parametrize("screened", [True, False])
def test_trainers_that_share_buffers_train_as_each_alone(screened, monkeypatch):
    """Nothing that is read again lies in what was released, and nothing left there is read."""
    batches, given = planted(12), []

    def poisoned(*what) -> torch.Tensor:
        given.append(real(*what).fill_(torch.nan))
        return given[-1]

    def forgotten(matrix: torch.Tensor | None) -> None:
        release(matrix)
        if matrix is not None and any(m.data_ptr() == matrix.data_ptr() for m in given):
            matrix.detach().fill_(torch.nan)

    real, release = ops.borrow, ops.release
    with screening(screened) as looks:
        with reused_buffers(), monkeypatch.context() as patch:
            for module, names in ((ops, ("borrow", "release")), (screen, ("borrow", "release"))):
                for name, stand_in in zip(names, (poisoned, forgotten), strict=True):
                    patch.setattr(module, name, stand_in)
            patch.setattr(optim, "release", forgotten)
            together = {name: started(recipe, batches[0]) for name, recipe in SPARSE.items()}
            for i, batch in enumerate(batches):
                for it in together.values():
                    assert it.step(i, batch).error.isfinite().all()
        for name, recipe in SPARSE.items():
            alone, outs = trained(recipe, 12)
            assert isinstance(outs[0].acts, SparseActs) == ("dense" not in name)
            same(together[name].state(), alone.state())
    assert any(looks) == screened and given


@needs_mkl
def test_gradients_lie_where_those_of_the_step_before_lay():
    """Storages are held here, so that no allocator gives a place twice."""
    held, batches = [], planted(6)
    both = [started(SPARSE["topk"], batches[0], dead_after=10**6) for _ in range(2)]
    for it in both:
        for parameter in (it.dictionary.W_dec, it.dictionary.W_enc):
            parameter.register_post_accumulate_grad_hook(lambda p: held.append(p.grad.detach()[:]))
    with reused_buffers():
        for i, batch in enumerate(batches):
            for it in both:
                it.step(i, batch)
                assert all(p.grad is None for p in it.dictionary.parameters())
    assert len(held) == 24 and len({tensor.data_ptr() for tensor in held}) == 2


@needs_mkl
def test_gradients_of_the_dead_are_added_in_place():
    """What AuxK adds to a borrowed matrix leaves it where it was, so that it is released."""
    batches = planted(6)
    it = started(SPARSE["topk"], batches[0], dead_after=1)
    with reused_buffers():
        n_dead = [len(it.step(i, batch).dead) for i, batch in enumerate(batches)]
        assert min(n_dead[1:]) > 0 and not ops._pools[-1].lent


@pytest.mark.parametrize("name", ["topk", "batchtopk", "jumprelu"])
def test_pre_activations_are_overwritten_block_by_block(name, monkeypatch):
    """Never more than one block of them, in one place, and with the same pairs."""
    batches, blocks = planted(6, batch_size=50), []
    it, whole = (started(SPARSE[name], batches[0]) for _ in range(2))
    expected = [whole.step(i, batch) for i, batch in enumerate(batches)]
    in_small_blocks(monkeypatch)
    borrow = screen.borrow
    monkeypatch.setattr(screen, "borrow", lambda *w: blocks.append(borrow(*w)) or blocks[-1])
    monkeypatch.setattr(rules, "DENSE", 1.0)  # few tokens may have many
    with reused_buffers():
        for i, batch in enumerate(batches):
            acts = it.step(i, batch).acts
            assert torch.equal(acts.offsets, expected[i].acts.offsets)
            theirs = expected[i].acts.dense()
            torch.testing.assert_close(acts.dense(), theirs, rtol=1e-4, atol=1e-5)
    assert len(blocks) >= 6 and {tuple(block.shape) for block in blocks} == {(16, 64)}
    assert len({block.data_ptr() for block in blocks}) == 1


def test_buffers_are_lent_once_and_two_of_a_shape_are_kept():
    what = 3, 4, torch.float32, torch.device("cpu")
    with reused_buffers():
        given, foreign = [ops.borrow(*what) for _ in range(3)], torch.zeros(3, 4)
        for matrix in (given[0].detach(), *given, foreign, None):  # the first is released twice
            ops.release(matrix)
        taken = [ops.borrow(*what).data_ptr() for _ in range(3)]
        assert set(taken[:2]) == {given[0].data_ptr(), given[1].data_ptr()}
        assert len(set(taken)) == 3 and foreign.data_ptr() not in taken
        assert ops.borrow(3, 4, torch.bfloat16, torch.device("cpu")).dtype == torch.bfloat16
    ops.release(given[0])
    assert ops.borrow(*what).data_ptr() != given[0].data_ptr()  # nothing is kept outside


def test_a_failed_step_leaves_no_gradient():
    """Whoever goes on after it trains as if it had never been."""
    batches = planted(2)
    it, other = (started(SPARSE["topk"], batches[0]) for _ in range(2))
    with pytest.raises(FloatingPointError, match="gradient's norm"):
        it.step(0, batches[0] * 1e17)
    for one in (it, other):
        one.step(0, batches[1])
    same(it.state(), other.state())
