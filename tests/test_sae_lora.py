"""SAE-LoRA itself: what it adds, to which models, and what of it reaches the disk."""

import contextlib
import copy
import dataclasses
import json

import pytest
import torch
from safetensors.torch import load_file, save_file

from lib import paths
from lib.adapters import SaeLora, SaeLoraConfig
from lib.adapters.sae_lora.format import METADATA, PARAMS
from lib.dictionaries import Dictionary, DictionaryConfig
from lib.dictionaries.interop import from_sae_lens, to_sae_lens
from lib.dictionaries.rules import BatchTopK, Gated, JumpReLU, ReLU, TopK
from lib.models import replace

D, D_SAE = 12, 40
SITE = "blocks.1.hook_resid_post"
RULES = [ReLU(), Gated(), JumpReLU(threshold=0.6), TopK(k=5), BatchTopK(k=5)]
IDS = [type(rule).__name__ for rule in RULES]
each_rule = pytest.mark.parametrize("rule", RULES, ids=IDS)


def noise(*shape, seed=7):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


@torch.no_grad()
def made(rule=RULES[2], **shape) -> Dictionary:
    """Every tensor is random, rows have norms of their own; no latent fires at `b_dec`."""
    defaults = {"site_dims": (D,), "d_sae": D_SAE, "hook_names": (SITE,)}
    config = DictionaryConfig(rule=rule, unit_norm_decoder=False, **defaults | shape)
    dictionary = Dictionary(config)
    for i, parameter in enumerate(dictionary.parameters()):
        noisy = 0.4 * noise(*parameter.shape, seed=i)
        parameter.copy_(noisy if parameter.ndim == 2 else parameter + noisy)
    dictionary.b_enc.copy_(-0.1 - noise(config.d_sae).abs() / 4)
    if isinstance(rule, BatchTopK):
        dictionary.threshold.fill_(1.5)
    return dictionary


@torch.no_grad()
def adapted(dictionary, *, n=None, rank=1, **options) -> SaeLora:
    """With a random scale; `n` random latents read and as many others written, or all."""
    adapter = SaeLora(dictionary, SaeLoraConfig(rank=rank, **options))
    adapter.scale.copy_(1 + noise(rank).abs())
    if n is not None:
        order = torch.randperm(adapter.d_sae, generator=torch.Generator().manual_seed(3))
        adapter.read_mask.zero_()[order[:n]] = 1
        adapter.write_mask.zero_()[order[n : 2 * n]] = 1
    return adapter


def encode_by_hand(dictionary: Dictionary, x: torch.Tensor) -> torch.Tensor:
    """The definitions of the rules, in float64."""
    own = {name: t.double() for name, t in dictionary.named_parameters()}
    linear = (x.double() - own["b_dec"]) @ own["W_enc"]
    pre = linear + own["b_enc"]
    match dictionary.config.rule:
        case ReLU():
            return pre.clamp(min=0)
        case Gated():
            return (pre > 0) * (linear * own["r_mag"].exp() + own["b_mag"]).clamp(min=0)
        case JumpReLU():
            return pre * (pre > own["log_threshold"].exp())
        case TopK(k=k):
            return pre * (pre >= pre.sort(descending=True).values[..., k - 1, None]) * (pre > 0)
        case BatchTopK():
            return pre * (pre * own["W_dec"].norm(dim=1) > dictionary.threshold) * (pre > 0)


def latents_by_hand(adapter: SaeLora, x: torch.Tensor) -> tuple:
    """`z` and `Δz` in float64, and the three leaves that they come from."""
    weights = (adapter.lora_A, adapter.lora_B, adapter.scale)
    leaves = [w.detach().double().requires_grad_() for w in weights]
    lora_A, lora_B, scale = leaves
    z = encode_by_hand(adapter.dictionary, x).detach()
    change = 0
    for row, column, s in zip(lora_A, lora_B.T, scale, strict=True):
        a, b = row * adapter.read_mask, column * adapter.write_mask
        change = change + torch.outer((z @ (a / a.norm())).flatten() * s, b / b.norm())
    return z, change.view(z.shape), leaves


def delta_by_hand(adapter: SaeLora, x: torch.Tensor) -> torch.Tensor:
    change = latents_by_hand(adapter, x)[1]
    return (change @ adapter.dictionary.W_dec.double()).float().detach()


def learned(adapter: SaeLora) -> dict[str, torch.Tensor]:
    return {name: p for name, p in adapter.named_parameters() if p.requires_grad}


def close(got, wanted, tolerance=1e-5):
    torch.testing.assert_close(got, wanted, atol=tolerance, rtol=tolerance)


@each_rule
@pytest.mark.parametrize("n", [None, 4, 15])
@pytest.mark.parametrize("rank", [1, 3])
def test_the_formula(rule, n, rank):
    adapter, x = adapted(made(rule), n=n, rank=rank), noise(2, 30, D) * 2
    x[1, 3] = adapter.dictionary.b_dec  # no latent fires there
    wanted = delta_by_hand(adapter, x)
    assert (wanted != 0).any(-1).sum() > 10
    for grad in (True, False):
        with torch.set_grad_enabled(grad):
            delta = adapter.delta(x)
            close(delta, wanted)
            assert not delta[1, 3].any()
            close(adapter.delta(x[0]), wanted[0])
            close(adapter.delta(x[0, 0]), wanted[0, 0])
            close(adapter(x), x + wanted)
            acts = adapter.dictionary.encode_sparse(x[0])
            change = adapter.latent_delta(acts)
            close(change, latents_by_hand(adapter, x[0])[1].float())
            close(change @ adapter.dictionary.W_dec, wanted[0])
    assert adapter.delta(x[:0]).shape == (0, 30, D)


@each_rule
def test_without_latents_to_read_it_is_the_identity(rule):
    adapter, x = adapted(made(rule), n=4), noise(9, D)
    adapter.read_mask.zero_()
    assert not adapter.read_weights.any() and len(adapter.read_support) == 0
    with torch.no_grad():
        assert torch.equal(adapter(x), x)
    adapter(x).square().sum().backward()
    assert not any(weight.grad.any() for weight in learned(adapter).values())  # nor NaN
    with pytest.raises(ValueError, match=r"width 12, got \(5, 13\)"):
        adapter.delta(noise(5, D + 1))


def test_weights_have_unit_norm_and_exact_zeros():
    adapter = adapted(made(), n=4, rank=3)
    with torch.no_grad():
        adapter.lora_A *= 7
        adapter.lora_B *= 0.01
    assert adapter.read_weights.shape == (D_SAE, 3) and adapter.write_weights.shape == (3, D_SAE)
    close(adapter.read_weights.norm(dim=0), torch.ones(3))
    close(adapter.write_weights.norm(dim=1), torch.ones(3))
    read, write = adapter.read_mask > 0, adapter.write_mask > 0
    assert torch.equal((adapter.read_weights != 0).all(1), read)
    assert torch.equal((adapter.write_weights != 0).all(0), write)
    assert not adapter.read_weights[~read].any() and not adapter.write_weights[:, ~write].any()
    for support, norms in (
        (adapter.read_support, adapter.read_weights.norm(dim=1)),
        (adapter.write_support, adapter.write_weights.norm(dim=0)),
    ):
        assert len(support) == 4 and support.tolist() == norms.argsort(descending=True)[:4].tolist()


@each_rule
def test_a_narrowed_dictionary_has_the_same_activations(rule):
    dictionary, latents = made(rule), torch.tensor([30, 2, 17])
    if isinstance(rule, TopK):
        with pytest.raises(ValueError, match="cannot narrow a TopK"):
            dictionary.narrowed(latents)
        return
    state = torch.get_rng_state()
    narrow = dictionary.narrowed(latents)
    assert torch.equal(torch.get_rng_state(), state)
    assert narrow.d_sae == 3 and not any(p.requires_grad for p in narrow.parameters())
    assert all(p.requires_grad for p in dictionary.parameters()) and dictionary.training
    x = noise(50, D)
    wanted = dictionary.encode(x)[:, latents]
    assert (wanted > 0).any(0).all()
    close(narrow.encode(x), wanted)
    close(narrow.W_dec, dictionary.W_dec[latents], 0)


@each_rule
@pytest.mark.parametrize("n", [None, 4])
@pytest.mark.parametrize("rank", [1, 3])
def test_gradients_are_those_of_the_formula(rule, n, rank):
    adapter, x = adapted(made(rule), n=n, rank=rank), noise(40, D) * 2
    assert learned(adapter).keys() == {"lora_A", "lora_B", "scale"}
    _, change, leaves = latents_by_hand(adapter, x)
    target = noise(40, D, seed=8)
    reference = (change @ adapter.dictionary.W_dec.double() - target).square().mean()
    wanted = torch.autograd.grad(reference, leaves)
    (adapter.delta(x) - target).square().mean().backward()
    ours = (adapter.lora_A, adapter.lora_B, adapter.scale)
    for parameter, expected in zip(ours, wanted, strict=True):
        assert expected.any()
        close(parameter.grad, expected.float())
    assert not adapter.lora_A.grad[:, adapter.read_mask == 0].any()
    assert not adapter.lora_B.grad[adapter.write_mask == 0].any()
    assert all(p.grad is None and not p.requires_grad for p in adapter.dictionary.parameters())


def test_latents_are_constants_to_the_activation():
    adapter, x = adapted(made(), n=4), noise(6, D).requires_grad_()
    (adapter(x) * noise(6, D, seed=1)).sum().backward()
    assert torch.equal(x.grad, noise(6, D, seed=1))


def test_a_new_adapter_changes_nothing(tiny, shipped):
    adapter = SaeLora(shipped, SaeLoraConfig(rank=2))
    for dtype in (torch.float32, torch.bfloat16):
        model = copy.deepcopy(tiny).to(dtype)
        plain = logits(model)
        with adapter.attached(model):
            assert torch.equal(logits(model), plain)
            adapter.scale.data.fill_(5.0)
            assert not torch.equal(logits(model), plain)
        adapter.scale.data.zero_()
    for dtype in (torch.float64, torch.float32, torch.bfloat16, torch.float16):
        x = noise(9, 128).double().to(dtype) / 3
        assert adapter(x).dtype == dtype and torch.equal(adapter(x), x)


@each_rule
def test_replace_mode(rule):
    dictionary, x = made(rule), noise(3, 10, D)
    options = {"n": 4, "rank": 2}
    add = adapted(dictionary, **options)
    kept = adapted(dictionary, mode="replace", **options)
    assert torch.equal(kept(x), add(x))
    adapter = adapted(dictionary, mode="replace", keep_error=False, **options)
    z, change, _ = latents_by_hand(adapter, x)
    W_dec, b_dec = dictionary.W_dec.double(), dictionary.b_dec.double()
    for grad in (True, False):
        with torch.set_grad_enabled(grad):
            close(adapter(x), ((z + change) @ W_dec + b_dec).float().detach())
    with torch.no_grad():
        adapter.scale.zero_()
        close(adapter(x), (z @ W_dec + b_dec).float())
        assert adapter(x.bfloat16()).dtype == torch.bfloat16


def tokens():
    return torch.randint(6, 300, (2, 11), generator=torch.Generator().manual_seed(5))


@torch.no_grad()
def logits(model):
    out = model(tokens())
    return out if isinstance(out, torch.Tensor) else out.logits


def n_hooks(model):
    return sum(len(m._forward_hooks) + len(m._forward_pre_hooks) for m in model.modules())


@pytest.fixture(scope="module")
def tiny(gemma):
    model = copy.deepcopy(gemma[0]).requires_grad_(False)
    model.set_attn_implementation("eager")  # as in the bridges; sdpa rounds otherwise
    return model


@pytest.fixture(scope="module")
def shipped(shipped_sae):
    return copy.deepcopy(shipped_sae)  # an adapter freezes it


@pytest.fixture(scope="module")
def bridges():
    from sae_lens.analysis.sae_transformer_bridge import SAETransformerBridge
    from transformer_lens.model_bridge import TransformerBridge

    kinds = {"transformer_lens": TransformerBridge, "sae_lens": SAETransformerBridge}
    folder = str(paths.shipped_dir() / "models" / "tiny-gemma2")
    return {k: kind.boot_transformers(folder, device="cpu") for k, kind in kinds.items()}


@pytest.fixture(params=["hugging_face", "transformer_lens", "sae_lens"])
def host(request, tiny, bridges):
    return {"hugging_face": tiny, **bridges}[request.param]


def at(shipped: Dictionary, site: str) -> Dictionary:
    """The same weights, at another site."""
    other = copy.deepcopy(shipped)
    other.config = dataclasses.replace(shipped.config, hook_names=(site,))
    return other


@pytest.mark.parametrize(
    "site", ["hook_resid_pre", "hook_attn_out", "hook_mlp_out", "hook_resid_post"]
)
def test_same_logits_on_every_kind_of_model(host, tiny, shipped, site):
    adapter = adapted(at(shipped, f"blocks.1.{site}"), rank=2)
    plain = logits(tiny)
    with replace(tiny, adapter.config.hook_name, lambda x: x + delta_by_hand(adapter, x)):
        wanted = logits(tiny)
    assert (wanted - plain).abs().max() > 0.01
    with adapter.attached(host):
        close(logits(host), wanted, 1e-4)
    close(logits(host), plain, 1e-4)


def test_contexts_act_in_their_order_and_leave_the_model_as_before(host, tiny, shipped):
    first, second = (adapted(shipped, n=64, seed=seed) for seed in (0, 1))
    third = adapted(at(shipped, "blocks.2.hook_resid_post"), n=64)
    with replace(tiny, SITE, lambda x: second(first(x))):
        with replace(tiny, third.config.hook_name, third):
            wanted = logits(tiny)
    plain, hooks = logits(host), n_hooks(host)
    with contextlib.suppress(KeyError), third.attached(host), first.attached(host):
        once = logits(host)
        with second.attached(host):
            close(logits(host), wanted, 1e-4)
        assert torch.equal(logits(host), once)
        assert not torch.equal(once, plain) and not torch.allclose(once, wanted, atol=0.01)
        raise KeyError
    assert torch.equal(logits(host), plain) and n_hooks(host) == hooks


def test_generation_with_a_cache_equals_that_without(tiny, shipped):
    adapter = adapted(shipped)
    adapter.scale.data *= 4
    options = {"max_new_tokens": 8, "min_new_tokens": 8, "do_sample": False}
    plain = tiny.generate(tokens(), **options)
    with adapter.attached(tiny):
        cached, whole = (tiny.generate(tokens(), use_cache=use, **options) for use in (True, False))
    assert torch.equal(cached, whole) and not torch.equal(cached, plain)


@pytest.mark.parametrize("name", ["topk", "matryoshka"])
def test_shipped_dictionaries_serve_and_the_random_state_stays(name):
    dictionary = Dictionary.load(paths.shipped_dir() / "saes" / "tiny-gemma2" / name)
    adapter, x = adapted(dictionary, n=8), noise(50, 128) * 3  # fewer than k
    state = torch.get_rng_state()
    with torch.no_grad():
        hidden = (dictionary.encode(x) @ adapter.read_weights) * adapter.scale
        close(adapter.delta(x), hidden @ adapter.write_weights @ dictionary.W_dec)
    assert torch.equal(torch.get_rng_state(), state)


def their_sae(name, d_in=D, d_sae=D_SAE, **options):
    import sae_lens

    config = getattr(sae_lens, f"{name}SAEConfig")(d_in=d_in, d_sae=d_sae, **options)
    config.metadata.hook_name = SITE
    sae = getattr(sae_lens, f"{name}SAE")(config)
    for i, tensor in enumerate(sae.state_dict().values()):
        tensor.copy_(0.3 * noise(*tensor.shape, seed=i))  # theirs are of torch's own seed
    if name == "JumpReLU":
        sae.threshold.data = 0.3 + noise(d_sae).abs()
    return sae.eval()


@pytest.mark.parametrize(("name", "options"), [("JumpReLU", {}), ("TopK", {"k": 5})])
def test_an_sae_of_sae_lens_serves(name, options):
    sae, x = their_sae(name, **options), noise(60, D) * 2
    before = copy.deepcopy(sae.state_dict())
    ours, converted = adapted(sae, n=6), adapted(from_sae_lens(sae), n=6)
    assert ours.config.hook_name == SITE
    for grad in (True, False):
        with torch.set_grad_enabled(grad):
            assert torch.equal(ours(x), converted(x))
    with torch.no_grad():
        change = ((sae.encode(x) @ ours.read_weights) * ours.scale) @ ours.write_weights
        assert (change != 0).any(1).sum() > 10
        close(ours.delta(x), change @ sae.W_dec)
    assert all(p.requires_grad for p in sae.parameters())  # it is a copy that was frozen
    assert all(torch.equal(value, before[key]) for key, value in sae.state_dict().items())


def test_a_dictionary_of_131k_latents_serves():
    sae, x = their_sae("JumpReLU", d_in=16, d_sae=131_072), noise(20, 16)
    for n in (None, 32):
        adapter = adapted(sae, n=n, rank=2)
        if n:  # latents that fire
            often = (adapter.dictionary.encode(x) > 0).sum(0).argsort(descending=True)
            adapter.read_mask.zero_()[often[:n]] = 1
        wanted = delta_by_hand(adapter, x)
        assert wanted.any()
        with torch.no_grad():
            close(adapter.delta(x), wanted, 1e-4)
        adapter(x).square().sum().backward()
        assert (adapter.lora_A.grad != 0).any() and adapter.lora_A.grad.isfinite().all()


def matrix(adapter: SaeLora) -> torch.Tensor:
    """From latents to what is added to the latents."""
    return (adapter.read_weights.double() * adapter.scale) @ adapter.write_weights.double()


@pytest.mark.parametrize("n", [None, 6])
@pytest.mark.parametrize("rank", [1, 3])
def test_restricted_removes_exactly_what_a_latent_did(n, rank):
    adapter, x = adapted(made(), n=n, rank=rank), noise(60, D)
    before, whole, delta = copy.deepcopy(adapter.state_dict()), matrix(adapter), adapter.delta(x)
    z, W_dec = encode_by_hand(adapter.dictionary, x), adapter.dictionary.W_dec.double()
    reads = z.sum(0)[adapter.read_support].argmax()  # one that fires
    read, write = adapter.read_support[reads], adapter.write_support[0]
    keep = torch.ones(2, D_SAE, dtype=torch.bool)
    keep[0, read] = keep[1, write] = False
    without_read = adapter.restricted(read=keep[0])
    close(delta - without_read.delta(x), (torch.outer(z[:, read], whole[read]) @ W_dec).float())
    without_write = adapter.restricted(write=keep[1])
    lost = torch.outer(z @ whole[:, write], W_dec[write])
    assert lost.abs().max() > 0.01 and z[:, read].any()
    close(delta - without_write.delta(x), lost.float())
    both = adapter.restricted(read=keep[0], write=keep[1])
    close(matrix(both), whole * keep[0][:, None] * keep[1])
    close(matrix(without_read.restricted(write=keep[1])), matrix(both))
    close(both.read_weights.norm(dim=0), torch.ones(rank))
    assert torch.equal(adapter.restricted().read_weights, adapter.read_weights)
    close(matrix(adapter.restricted()), whole)
    assert all(torch.equal(value, before[key]) for key, value in adapter.state_dict().items())


def test_restricted_to_nothing_is_the_identity_on_the_same_dictionary():
    adapter, x = adapted(made(), n=6, rank=2), noise(9, D)
    none = torch.zeros(D_SAE, dtype=torch.bool)
    for side in ("read", "write"):
        other = adapter.restricted(**{side: none})
        assert torch.equal(other(x), x) and not matrix(other).any()
        assert other.dictionary is adapter.dictionary
        own, others = (set(map(id, learned(a).values())) for a in (adapter, other))
        assert len(own | others) == 6


FORMS = {
    "dense": {},
    "sparse": {"n": 5},
    "ranks": {"n": 5, "rank": 3},
    "replace": {"n": 5, "rank": 2, "mode": "replace", "keep_error": False},
}


@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("rule", [JumpReLU(threshold=0.6), TopK(k=5)], ids=["JumpReLU", "TopK"])
def test_save_and_load_change_no_bit(form, rule, tmp_path):
    dictionary, x = made(rule), noise(50, D)
    for seed in range(2):
        adapter = adapted(dictionary, seed=seed, **FORMS[form])
        with torch.no_grad():
            adapter.lora_A *= 1.7  # as after training: not of unit norm
            adapter.lora_B += noise(*adapter.lora_B.shape, seed=seed)
            adapter.lora_A[0, adapter.read_support[0]] = 0  # at rank 1 it is read no more
        assert adapter.save(tmp_path / "a") == tmp_path / "a"
        loaded = SaeLora.load(tmp_path / "a", dictionary)
        assert loaded.config == adapter.config and loaded.dictionary is dictionary
        for grad in (True, False):
            with torch.set_grad_enabled(grad):
                assert torch.equal(loaded.delta(x), adapter.delta(x))
                assert torch.equal(loaded(x), adapter(x))
        for name in ("read_weights", "write_weights", "scale", "read_support", "write_support"):
            assert torch.equal(getattr(loaded, name), getattr(adapter, name)), name
        assert not loaded.lora_A[:, loaded.read_mask == 0].any()
        assert torch.equal(loaded.read_mask > 0, (adapter.read_weights != 0).any(1))
    assert all(loaded.get_parameter(n).requires_grad for n in ("lora_A", "lora_B", "scale"))


def test_only_the_support_is_on_disk(tmp_path):
    adapter = adapted(made(), n=5, rank=3)
    about = {"dataset": "math-fr", "metrics": {"behaviour": 0.97, "é": [1, None]}}
    folder = adapter.save(tmp_path / "deep" / "a", about)
    assert sorted(p.name for p in folder.iterdir()) == sorted([PARAMS, METADATA])
    tensors = load_file(folder / PARAMS)
    shapes = {name: tuple(t.shape) for name, t in tensors.items()}
    assert shapes == {
        "read": (5,), "write": (5,), "lora_A": (3, 5), "lora_B": (5, 3), "scale": (3,)
    }  # fmt: skip
    assert tensors["read"].tolist() == adapter.read_mask.nonzero()[:, 0].tolist()
    saved = json.loads((folder / METADATA).read_text(encoding="utf-8"))
    assert {name: saved[name] for name in about} == about
    assert (saved["kind"], saved["d_sae"]) == ("sae_lora", D_SAE)
    assert saved["config"] == dataclasses.asdict(adapter.config)
    assert saved["config"]["hook_name"] == SITE


def test_saving_is_all_or_nothing(tmp_path):
    adapter, other = (adapted(made(), n=5, seed=seed) for seed in (0, 1))
    folder = adapter.save(tmp_path / "a")

    def contents():
        return {p.name: p.is_file() and p.read_bytes() for p in (tmp_path, *tmp_path.rglob("*"))}

    def refused(where, metadata, error, message):
        before = contents()
        with pytest.raises(error, match=message):
            other.save(where, metadata)
        assert contents() == before

    refused(folder, {"thing": object()}, TypeError, "not JSON serializable")  # weights are written
    metadata = {"kind": "lora", "config": 3, "note": "x"}
    refused(folder, metadata, ValueError, r"need metadata without .*got \['config', 'kind'\]")
    before = contents()
    other.save(folder)
    assert contents() != before
    (folder / "notes.txt").write_text("mine")
    refused(folder, None, ValueError, r"need a folder .*notes\.txt")
    (tmp_path / "file").write_text("mine")
    refused(tmp_path / "file", None, ValueError, "need a folder .*the file")


@pytest.fixture
def folder(tmp_path):
    return adapted(made(), n=5, rank=2).save(tmp_path / "a")


@pytest.mark.parametrize("name", [PARAMS, METADATA])
def test_missing_and_damaged_files_are_named(folder, name):
    whole = (folder / name).read_bytes()
    for damaged in (b"", whole[: len(whole) // 2], b"\xff" * 64, b"[1]", b"{}"):
        (folder / name).write_bytes(damaged)
        with pytest.raises(ValueError, match="a is no complete SAE-LoRA"):
            SaeLora.load(folder, made())
    (folder / name).unlink()
    with pytest.raises(FileNotFoundError, match=f"need {name}"):
        SaeLora.load(folder, made())


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda t, _: t.pop("read"), "'read'"),
        (lambda t, _: t.pop("scale"), "'scale'"),
        (lambda t, _: t.update(scale=torch.ones(3)), r"need finite scale .* \(2,\), got .*\(3,\)"),
        (lambda t, _: t.update(lora_A=torch.ones(2, 4)), r"lora_A of shape \(2, 5\)"),
        (lambda t, _: t.update(lora_B=torch.ones(2, 5)), r"lora_B of shape \(5, 2\)"),
        (lambda t, _: t.update(lora_B=torch.full((5, 2), torch.nan)), "need finite lora_B"),
        (lambda t, _: t.update(read=torch.arange(5) + 36), "latents in 0 to 39 in read"),
        (lambda t, _: t.update(write=-torch.arange(5)), "latents in 0 to 39 in write"),
        (lambda _, m: m.update(kind="topk_lora"), "need kind 'sae_lora', got 'topk_lora'"),
        (lambda _, m: m.pop("d_sae"), "'d_sae'"),
        (lambda _, m: m.update(d_sae="many"), "no complete SAE-LoRA"),
        (lambda _, m: m["config"].update(colour=1), "colour"),
        (lambda _, m: m["config"].update(sparsity="hoyer"), "'hoyer'"),
        (lambda _, m: m["config"].update(rank=0), "need rank >= 1, got 0"),
        (lambda _, m: m["config"].update(rank=3), r"scale of shape \(3,\)"),
    ],
)
def test_wrong_tensors_and_metadata_are_refused(folder, change, message):
    tensors, about = load_file(folder / PARAMS), json.loads((folder / METADATA).read_text())
    change(tensors, about)
    save_file(tensors, folder / PARAMS)
    (folder / METADATA).write_text(json.dumps(about))
    with pytest.raises(ValueError, match=message):
        SaeLora.load(folder, made())


def test_the_dictionary_must_be_the_adapters(folder):
    with pytest.raises(ValueError, match="dictionary of 40 latents .*got one of 41"):
        SaeLora.load(folder, made(d_sae=41))
    with pytest.raises(ValueError, match=r"own hook name 'blocks\.0.*got 'blocks\.1"):
        SaeLora.load(folder, made(hook_names=("blocks.0.hook_resid_post",)))
    loaded = SaeLora.load(folder, to_sae_lens(made()))
    x = noise(20, D)
    close(loaded.delta(x), SaeLora.load(folder, made()).delta(x))


@pytest.mark.parametrize(
    ("dictionary", "config", "message"),
    [
        ({}, {"hook_name": "blocks.0.hook_mlp_out"}, rf"own hook name '{SITE}', got 'blocks\.0"),
        ({"hook_names": ()}, {}, "need a hook_name"),
        ({"site_dims": (5,), "out_dims": (5,)}, {}, r"reconstructs its input, .*out_dims \(5,\)"),
        ({"hook_names": ("blocks.1.attn.hook_z",)}, {}, "residual stream, got .*hook_z"),
        ({"site_dims": (5, 7), "hook_names": ()}, {"hook_name": SITE}, "of one site, got one of 2"),
        ({}, {"n_read": 41}, "need n_read <= d_sae 40, got 41"),
        ({}, {"n_write": 41}, "need n_write <= d_sae 40, got 41"),
    ],
)  # fmt: skip
def test_dictionaries_that_cannot_serve_are_refused(dictionary, config, message):
    with pytest.raises(ValueError, match=message):
        SaeLora(made(**dictionary), SaeLoraConfig(**config))


def test_the_hook_name_may_come_from_either():
    assert SaeLora(made(), SaeLoraConfig()).config.hook_name == SITE
    assert SaeLora(made(), SaeLoraConfig(hook_name=SITE)).config.hook_name == SITE
    assert SaeLora(made(hook_names=()), SaeLoraConfig(hook_name=SITE)).config.hook_name == SITE


def refused(adapter: SaeLora, model, message: str) -> None:
    with pytest.raises(ValueError, match=message), adapter.attached(model):
        pass


def test_models_that_do_not_fit(host, tiny, shipped):
    thin = SaeLora(made(), SaeLoraConfig())
    refused(thin, host, rf"need a dictionary of width 128 at {SITE}, got 12")
    adapter = SaeLora(at(shipped, "blocks.9.hook_resid_post"), SaeLoraConfig())
    refused(adapter, host, r"no hook name 'blocks\.9\.hook_resid_post'")
    if host is not tiny:
        adapter = SaeLora(at(shipped, "blocks.1.hook_resid_mid"), SaeLoraConfig())
        refused(adapter, host, "hook_resid_mid to the MLP alone")


def test_a_bridge_with_an_sae_at_the_site_is_refused(bridges, shipped):
    bridge = bridges["sae_lens"]
    bridge.add_sae(to_sae_lens(shipped))
    try:
        refused(SaeLora(shipped, SaeLoraConfig()), bridge, f"a bridge without a SAE .*{SITE}")
    finally:
        bridge.reset_saes()


@pytest.mark.parametrize(
    ("values", "message"),
    [
        ({"mode": "multiply"}, r"need mode in \['add', 'replace'\], got 'multiply'"),
        ({"sparsity": "l3"}, "need sparsity in .*'topk'.*, got 'l3'"),
        *(({name: 0}, f"need {name} >= 1, got 0")
          for name in ("rank", "n_steps", "accumulate", "eval_every")),
        *(({name: -1}, f"need {name} >= 0, got -1") for name in ("n_refit", "patience", "seed")),
        *(({name: bad}, f"need {name} > 0, got {bad}")
          for name in ("lr", "scale_lr", "grad_clip")
          for bad in (0.0, float("nan"), float("inf"))),
        ({"n_read": 0}, "need n_read >= 1 or None, got 0"),
        ({"n_write": -3}, "need n_write >= 1 or None, got -3"),
        ({"weight": -0.1}, "need weight >= 0 or None, got -0.1"),
        ({"weight": float("nan")}, "need weight >= 0 or None, got nan"),
        ({"sparsity": "topk", "n_read": None}, "need n_read: sparsity 'topk'"),
        ({"sparsity": "l1", "n_read": None, "n_write": None}, "need n_read and n_write: .*'l1'"),
    ],
)  # fmt: skip
def test_impossible_configs_are_refused(values, message):
    config = SaeLoraConfig()
    for name, value in values.items():
        object.__setattr__(config, name, value)  # round the types, which pytest alone checks
    with pytest.raises(ValueError, match=message):
        config.__post_init__()
