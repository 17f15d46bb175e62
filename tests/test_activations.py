"""Activations: what is harvested, by which backend, how it is shuffled, counted and scaled."""

import copy

import pytest
import torch
from safetensors.torch import load, save

from lib.activations.buffer import Buffer
from lib.activations.harvest import HarvestConfig, Harvester
from lib.activations.moments import Moments, Normalizer
from lib.activations.source import Block, Source
from lib.data.corpus import load_corpus
from lib.models import module_at, read
from lib.models.load import weights_fingerprint
from lib.models.sites import sites

POST, Z = "blocks.1.hook_resid_post", "blocks.2.attn.hook_z"
SIZES = (13, 0, 40, 7, 1, 0, 29, 10, 3)  # 103 tokens


class Numbered:
    """Block `i` holds `sizes[i]` tokens; column 0 numbers all tokens of the source.

    `change` makes other activations of a block's, or raises.
    """

    hook_names, site_dims = (POST, POST), (2, 1)

    def __init__(self, sizes=SIZES, dtype=torch.float32, fingerprint="0" * 64, change=None):
        self.sizes, self.dtype, self.fingerprint, self.change = sizes, dtype, fingerprint, change
        self.n_blocks, self.read = len(sizes), []

    def block(self, i):
        self.read.append(i)
        n = self.sizes[i]
        numbers = sum(self.sizes[:i]) + torch.arange(n)
        acts = torch.stack([numbers, numbers + 0.25, -numbers], dim=1).to(self.dtype)
        acts = self.change(i, acts) if self.change else acts
        return Block(acts, numbers.int() + 7, torch.full((n,), i), torch.arange(n))


@pytest.fixture(scope="module")
def corpus(gemma):
    return load_corpus("world", gemma[1], n_tokens=700, seq_len=64)


@pytest.fixture(scope="module")
def model(gemma):
    return gemma[0]


@pytest.fixture(scope="module")
def other(llama):
    return llama[0]


def harvest(models, corpus, *hook_names, **config):
    return Harvester(models, corpus, HarvestConfig(hook_names=hook_names or (POST,), **config))


def all_of(source):
    """Every block of a source, end to end."""
    blocks = [source.block(i) for i in range(source.n_blocks)]
    names = ("acts", "ids", "rows", "positions")
    return Block(*(torch.cat([getattr(block, name) for block in blocks]) for name in names))


def row_by_row(model, corpus, hook_names):
    """The truth, without batches or padding: `[n d_in]` of every real token."""
    parts = []
    for ids, mask in zip(corpus.ids, corpus.mask, strict=True):
        with torch.no_grad(), read(model, hook_names) as acts:
            model(ids[mask][None].long())
        parts.append(torch.cat([acts[name][0].flatten(1) for name in hook_names], dim=1))
    return torch.cat(parts)


@pytest.mark.parametrize("name", ["model", "other"])
def test_harvest_is_the_models_activations(request, corpus, name):
    model = request.getfixturevalue(name)
    names = (Z, "blocks.0.hook_resid_pre", "blocks.3.hook_mlp_out")  # in no special order
    source = harvest([model], corpus, *names, batch_rows=7, skip_special=False)
    assert isinstance(source, Source)
    d = model.config.hidden_size
    assert (source.hook_names, source.site_dims) == (names, (d, d, d))
    assert source.n_blocks == -(-len(corpus.ids) // 7)
    got = all_of(source)
    torch.testing.assert_close(got.acts, row_by_row(model, corpus, names), atol=1e-4, rtol=1e-4)
    assert torch.equal(torch.stack([got.rows, got.positions], dim=1), corpus.mask.nonzero())
    assert torch.equal(got.ids, corpus.ids[corpus.mask])


def places(source):
    """Rows and positions of what the source keeps."""
    return torch.cat([source.keep(i) for i in range(source.n_blocks)]).nonzero()


def test_special_tokens_and_padding_are_left_out(model, corpus):
    everything = all_of(harvest([model], corpus, batch_rows=7, skip_special=False))
    source = harvest([model], corpus, batch_rows=7)
    got = all_of(source)
    wanted = ~corpus.special[everything.rows, everything.positions]
    assert torch.equal(got.acts, everything.acts[wanted])
    assert torch.equal(places(source), (corpus.mask & ~corpus.special).nonzero())
    assert torch.equal(places(source), torch.stack([got.rows, got.positions], dim=1))
    few = copy.deepcopy(corpus.rows(0, 4))
    few.special[:2] = few.mask[:2]
    source = harvest([model], few, batch_rows=2)
    assert source.block(0).acts.shape == (0, 128)
    assert len(source.block(1).acts) > 0


def test_models_stand_side_by_side_and_a_head_is_a_site(model, other, corpus):
    names = (f"{Z}.3", POST, Z, f"{Z}.0")
    both = harvest([model, other], corpus, *names)
    assert both.site_dims == (32, 128, 128, 32, 24, 96, 96, 24)
    assert both.hook_names == names * 2
    acts = all_of(both).acts
    alone = [all_of(harvest([one], corpus, POST, Z)).acts for one in (model, other)]
    for one, parts in zip(alone, acts.split([320, 240], dim=1), strict=True):
        post, z = one.chunk(2, dim=1)
        d_head = post.shape[1] // 4
        assert torch.equal(parts, torch.cat([z[:, -d_head:], post, z, z[:, :d_head]], dim=1))


def test_outliers_are_left_out_by_the_first_blocks_median(model, other, corpus):
    settings = {"batch_rows": 5, "skip_special": False}
    everything = all_of(harvest([model, other], corpus, POST, Z, **settings))
    source = harvest([model, other], corpus, POST, Z, max_norm=1.5, **settings)
    norms = torch.stack([x.norm(dim=1) for x in everything.acts.split(source.site_dims, dim=1)])
    medians = norms[:, everything.rows < 5].median(dim=1).values
    usual = norms <= 1.5 * medians[:, None]
    assert (~usual).any(dim=1).sum() >= 2  # more than one site has outliers
    keep, got = usual.all(dim=0), all_of(source)
    assert 0 < keep.sum() < len(keep)
    assert torch.equal(got.acts, everything.acts[keep])
    assert torch.equal(got.rows, everything.rows[keep])
    assert torch.equal(places(source), torch.stack([got.rows, got.positions], dim=1))


@pytest.mark.parametrize("dtype", ["float32", "bfloat16", "float16"])
def test_dtypes(model, corpus, dtype):
    exact = all_of(harvest([model], corpus)).acts
    handed_on = all_of(harvest([model], corpus, dtype=dtype)).acts
    assert torch.equal(handed_on, exact.to(getattr(torch, dtype)))
    half = copy.deepcopy(model).to(getattr(torch, dtype))
    got = all_of(harvest([half], corpus, max_norm=50.0)).acts
    assert got.dtype == torch.float32
    assert (got - exact).norm() / exact.norm() < {"float32": 1e-6}.get(dtype, 0.05)


def hooks_and_names(model):
    n_hooks = sum(len(m._forward_hooks) + len(m._forward_pre_hooks) for m in model.modules())
    return n_hooks, [name for name, _ in model.named_modules()]


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("backend", ["nnsight", "transformer_lens"])
@pytest.mark.parametrize("name", ["model", "other"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_backends_agree(request, corpus, name, backend, dtype):
    model = copy.deepcopy(request.getfixturevalue(name)).to(dtype)
    model.set_attn_implementation("eager")  # as in the bridge; sdpa rounds otherwise
    before = hooks_and_names(model)
    names = (f"{Z}.1", *(s for s in sites(model) if s.startswith(("blocks.1", "blocks.2"))))
    wanted = all_of(harvest([model], corpus, *names))
    got = all_of(harvest([model], corpus, *names, backend=backend))
    torch.testing.assert_close(got.acts, wanted.acts, atol=1e-5, rtol=0)
    assert torch.equal(got.positions, wanted.positions)
    assert hooks_and_names(model) == before


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("backend", ["hf", "nnsight", "transformer_lens"])
def test_no_layer_runs_after_the_highest_site(model, corpus, backend):
    model, calls = copy.deepcopy(model), []
    for i in range(4):
        layer = module_at(model, f"blocks.{i}.hook_resid_pre")
        layer.register_forward_pre_hook(lambda m, args, i=i: calls.append(i))
    model.model.layers[2].mlp.register_forward_pre_hook(lambda m, args: calls.append("mlp"))
    harvest([model], corpus, Z, POST, backend=backend).block(0)
    assert calls == [0, 1, 2]  # and not layer 2's MLP
    calls.clear()
    harvest([model], corpus, "blocks.3.hook_resid_pre", POST, backend=backend).block(0)
    assert calls[:4] == [0, 1, 2, "mlp"]


def test_fingerprint_tells_weights_corpus_and_config(model, other, corpus):
    base = harvest([model], corpus).fingerprint
    assert base == harvest([copy.deepcopy(model)], corpus).fingerprint
    others = [
        harvest([other], corpus),
        harvest([model, other], corpus),
        harvest([model], corpus.rows(1, 99)),
        harvest([model], corpus, POST, Z),
        harvest([model], corpus, batch_rows=8),
        harvest([model], corpus, skip_special=False),
    ]
    assert len({base, *(other.fingerprint for other in others)}) == 1 + len(others)


def test_weights_fingerprint_sees_any_one_weight(model):
    original = weights_fingerprint(model)
    changed = copy.deepcopy(model)
    for name, weight in changed.named_parameters():
        flat, place = weight.data.view(-1), weight.numel() // 2
        before = flat[place].clone()
        flat[place] = torch.nextafter(before, before + 1)
        assert weights_fingerprint(changed) != original, name
        flat[place] = before
    weight = changed.model.layers[1].mlp.up_proj.weight.data
    for swapped in (weight, weight.T):
        swapped[[0, 1]] = swapped[[1, 0]]
        assert weights_fingerprint(changed) != original
        swapped[[0, 1]] = swapped[[1, 0]]
        assert weights_fingerprint(changed) == original
    changed.config.rope_parameters["rope_theta"] = 5e5
    assert weights_fingerprint(changed) != original


def test_harvest_errors(model, other, corpus):
    def refuse(match, *hook_names, models=(model,), rows=corpus, **config):
        with pytest.raises(ValueError, match=match):
            harvest(list(models), rows, *hook_names, **config)

    refuse("near ones: .*blocks.1.hook_resid_post", "blocks.1.hook_resid_pots")
    refuse("no hook name 'blocks.4", "blocks.4.hook_resid_post", models=(other, model))
    refuse("blocks.2.attn.hook_z.4: need a head in 0 to 3, got 4", f"{Z}.4")
    refuse("need each hook name once", POST, POST)
    refuse("need batch_rows >= 1, got 0", batch_rows=0)
    refuse("need backend in .*got 'jax'", backend="jax")
    refuse("need dtype in .*got 'int8'", dtype="int8")
    refuse("need max_norm > 0 or None, got 0.0", max_norm=0.0)
    refuse("need at least one model", models=())
    with pytest.raises(ValueError, match="need at least one hook name"):
        HarvestConfig(hook_names=())
    with pytest.raises(ValueError, match="need a block in 0 to 1, got 2"):
        harvest([model], corpus.rows(0, 33)).block(2)
    foreign = copy.copy(corpus.rows(0, 2))
    object.__setattr__(foreign, "ids", foreign.ids + 5000)
    refuse("model 0 has 1887 token ids, but the corpus holds id", rows=foreign)
    refuse("model 0 is in training mode", models=(copy.deepcopy(model).train(),))


def served(buffer, n_batches):
    return torch.cat([next(buffer) for _ in range(n_batches)])


@pytest.mark.parametrize(
    ("batch_size", "n_tokens"), [(1, 1), (4, 20), (7, 30), (20, 20), (50, 500)]
)
def test_each_token_once_an_epoch(batch_size, n_tokens):
    buffer = Buffer(Numbered(), batch_size=batch_size, n_tokens=n_tokens)
    batches = [next(buffer) for _ in range(-(-4 * 103 // batch_size))]
    assert all(batch.shape == (batch_size, 3) for batch in batches)
    x = torch.cat(batches)
    epochs = x[: 4 * 103].view(4, 103, 3)
    for epoch in epochs:  # whole epochs follow each other: none begins before the last has ended
        assert torch.equal(epoch[:, 0].sort().values, torch.arange(103.0))
        assert torch.equal(epoch[:, 1:], torch.stack([epoch[:, 0] + 0.25, -epoch[:, 0]], dim=1))
    if n_tokens > 1:
        assert not torch.equal(epochs[0], epochs[1])
    assert buffer.n_served == len(x)
    assert buffer.epoch == len(x) // 103


def test_order_follows_from_the_seed():
    first, again, another = (
        served(Buffer(Numbered(), batch_size=8, n_tokens=32, seed=seed), 30) for seed in (0, 0, 1)
    )
    assert torch.equal(first, again)
    assert not torch.equal(first, another)


def test_batches_mix_blocks():
    source = Numbered([16] * 64)
    first = next(Buffer(source, batch_size=64, n_tokens=512))
    assert len(set((first[:, 0] // 16).tolist())) > 20  # of 32 blocks in the pool
    numbers = served(Buffer(source, batch_size=64, n_tokens=512), 16)[:, 0]
    assert torch.corrcoef(torch.stack([numbers, torch.arange(1024.0)]))[0, 1].abs() < 0.2


def test_refilled_when_half_empty_and_not_before():
    source = Numbered([10] * 30)
    buffer = Buffer(source, batch_size=10, n_tokens=100)
    assert not source.read  # lazy
    for n_batches, n_read in ((1, 10), (4, 10), (1, 15), (4, 15), (1, 20)):
        served(buffer, n_batches)
        assert len(source.read) == n_read
    assert len(set(source.read)) == 20
    assert source.read != sorted(source.read)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize(("batch_size", "n_tokens"), [(7, 30), (20, 20), (30, 200)])
def test_resume_continues_bit_for_bit(batch_size, n_tokens, dtype):
    source = Numbered(dtype=dtype)
    buffer = Buffer(source, batch_size=batch_size, n_tokens=n_tokens)
    x, states, counts = [], [], []
    for _ in range(40):
        states.append(buffer.state_dict())  # a copy: saved when the buffer has gone on
        counts.append((buffer.n_served, buffer.epoch, len(source.read)))
        x.append(next(buffer))
    assert x[0].dtype == dtype
    for stop in range(30):
        again = Numbered(dtype=dtype)
        resumed = Buffer(again, batch_size=batch_size, n_tokens=n_tokens, seed=99)
        resumed.load_state_dict(load(save(states[stop])))
        assert (resumed.n_served, resumed.epoch, again.read) == (*counts[stop][:2], [])
        rest = [next(resumed) for _ in range(10)]
        assert torch.equal(torch.stack(rest), torch.stack(x[stop : stop + 10]))
        assert again.read == source.read[counts[stop][2] : counts[stop + 10][2]]  # none twice


def test_buffer_errors():
    def refuse(match, source=None, state=None, **sizes):
        with pytest.raises(ValueError, match=match):
            buffer = Buffer(source or Numbered(), **{"batch_size": 8} | sizes)
            buffer.load_state_dict(state) if state else next(buffer)

    refuse("need batch_size >= 1, got 0", batch_size=0)
    refuse("need n_tokens >= batch_size 8, got 7", n_tokens=7)
    refuse("at least one block", Numbered([]))
    refuse("all empty", Numbered([0, 0]))
    state = Buffer(Numbered(), batch_size=8).state_dict()
    refuse("state with batch_size 4, got one with 8", state=state, batch_size=4)
    refuse("state with n_tokens 16, got one with 65536", state=state, n_tokens=16)
    foreign = Numbered(fingerprint="1" * 64)
    refuse("state of source 1111.*got one of 0000", foreign, state=state)
    wide = Numbered()
    wide.site_dims = (2, 2)
    refuse("need width 4, got 3", wide)


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_broken_activations_name_their_block(value):
    def spoil(i, acts):
        acts[5:6, 1] = value if i == 3 else 0
        return acts

    with pytest.raises(ValueError, match=r"block 3: .*NaN or infinity at 1 of 7.*row 3 position 5"):
        next(Buffer(Numbered(change=spoil), batch_size=103, n_tokens=103))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_large_activations_are_not_broken(dtype):
    large = torch.finfo(dtype).max
    source = Numbered(dtype=dtype, change=lambda i, acts: acts.fill_(large))
    batch = next(Buffer(source, batch_size=20, n_tokens=20))
    assert (batch == large).all()  # though their sum overflows


def sample(n, d=5, seed=0):
    generator = torch.Generator().manual_seed(seed)
    mix = torch.randn(d, d, generator=generator)
    return torch.randn(n, d, generator=generator) @ mix + torch.arange(d)


def check_moments(moments, x):
    x = x.double()
    assert moments.count == len(x)
    torch.testing.assert_close(moments.mean, x.mean(dim=0))
    torch.testing.assert_close(moments.covariance, torch.cov(x.T))
    torch.testing.assert_close(moments.variance, x.var(dim=0))


def moments_of(x, sizes):
    moments = Moments(5)
    for part in x.split(sizes):
        moments.update(part)
    return moments


def test_moments_do_not_depend_on_batches():
    x = sample(200)
    for sizes in ([200], [1] * 200, [3, 0, 100, 97]):
        check_moments(moments_of(x, sizes), x)


def test_moments_far_from_zero_keep_their_digits():
    x = sample(1000).double() + 1e7
    torch.testing.assert_close(moments_of(x, 10).covariance, torch.cov(x.T), rtol=1e-8, atol=0)


def test_moments_state():
    x = sample(100)
    moments, resumed = moments_of(x[:60], 60), Moments(5)
    resumed.load_state_dict(load(save(moments.state_dict())))
    for one in (moments, resumed):
        one.update(x[60:].bfloat16())
    assert torch.equal(resumed.covariance, moments.covariance)
    assert resumed.count == 100


def test_moments_errors():
    moments = Moments(5)
    with pytest.raises(ValueError, match="need d_in >= 1"):
        Moments(0)
    with pytest.raises(ValueError, match="need width 5, got 4"):
        moments.update(torch.zeros(2, 4))
    with pytest.raises(ValueError, match="NaN"):
        moments.update(torch.full((2, 5), float("nan")))
    moments.update(torch.ones(1, 5))
    with pytest.raises(ValueError, match="at least two tokens.*got 1"):
        _ = moments.covariance


def test_mean_norm_of_each_site_becomes_sqrt_d():
    x = sample(500, d=9) * torch.tensor([100.0] * 2 + [0.01] * 7)
    normalizer = Normalizer.fit("mean_norm", x, (2, 7))
    small, large = normalizer(x).split([2, 7], dim=1)
    torch.testing.assert_close(small.norm(dim=1).mean(), torch.tensor(2**0.5))
    torch.testing.assert_close(large.norm(dim=1).mean(), torch.tensor(7**0.5))
    assert torch.equal(normalizer.mean, torch.zeros(9))
    assert len(set(normalizer.scale.tolist())) == 2  # directions within a site stay


def test_per_dim_standardises():
    x = sample(500) * torch.tensor([1e3, 1, 1e-3, 0, 0]) + torch.tensor([5.0, 0, 1, 0.1, 0])
    y = Normalizer.fit("per_dim", x, (5,))(x)
    torch.testing.assert_close(y.mean(dim=0), torch.zeros(5), atol=1e-4, rtol=0)
    torch.testing.assert_close(y.std(dim=0), torch.tensor([1.0, 1, 1, 0, 0]), atol=1e-4, rtol=0)


def test_a_dimension_that_only_rounding_moves_is_constant():
    x = torch.tensor([[1000.0], [1000.0]])
    x[1] = torch.nextafter(x[1], x[1] + 1)
    assert torch.equal(Normalizer.fit("per_dim", x, (1,)).scale, torch.ones(1))


@pytest.mark.parametrize("kind", ["none", "mean_norm", "per_dim"])
def test_normalizers_take_any_shape_and_half_precision(kind):
    x = sample(500)
    normalizer = Normalizer.fit(kind, x, (2, 3))
    assert torch.equal(normalizer(x.view(5, 100, 5)).view_as(x), normalizer(x))
    assert torch.equal(normalizer(x), x) == (kind == "none")
    half = Normalizer.fit(kind, x.bfloat16(), (2, 3))
    assert half(x.bfloat16()).dtype == torch.float32
    torch.testing.assert_close(half.scale, normalizer.scale, rtol=0.05, atol=0)


def test_normalizer_errors():
    x = sample(10)

    def refuse(match, kind="mean_norm", x=x, site_dims=(5,)):
        with pytest.raises(ValueError, match=match):
            Normalizer.fit(kind, x, site_dims)

    refuse("need normalisation in .*got 'zca'", kind="zca")
    refuse("add up to 5", site_dims=(5, 1))
    refuse("at least 1 tokens", x=x[:0])
    refuse("at least 2 tokens", kind="per_dim", x=x[:1])
    refuse("NaN", x=x / 0)
    refuse("site 1 is zero", x=x * torch.tensor([1.0, 1, 0, 0, 0]), site_dims=(2, 3))
