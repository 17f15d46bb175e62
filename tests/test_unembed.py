"""The unembedding with the final norm folded in, and the KL of a patched model as a loss."""

import pytest
import torch
from peft import LNTuningConfig, LoraConfig, get_peft_model
from torch.nn import functional as F

from lib.analysis.metrics import patched_losses
from lib.data.corpus import Corpus
from lib.dictionaries import Dictionary, DictionaryConfig
from lib.dictionaries.rules import TopK
from lib.models import read, site_dim
from lib.models.patched import PatchedKL
from lib.models.sites import sites
from lib.models.unembed import unembedding
from tests.test_models import ARCHITECTURES, IDS, D, build, n_hooks, noise, opt, with_vision

SITE, LAST = "blocks.1.hook_resid_post", "blocks.2.hook_resid_post"


@pytest.mark.parametrize("name", [*ARCHITECTURES, "gemma3"])
def test_rows_times_normalised_stream_are_the_logits(name):
    model = with_vision() if name == "gemma3" else build(name)
    seen = []  # the unembedding's output, before any softcap
    model.get_output_embeddings().register_forward_hook(lambda _, args, output: seen.append(output))
    with torch.no_grad(), read(model, [LAST]) as acts:
        model(IDS)
    x, logits, rows = acts[LAST].flatten(0, 1), seen[0].flatten(0, 1), unembedding(model)
    if name.startswith("gpt"):
        found = rows @ F.layer_norm(x, (D,)).T
        uncentred = rows @ (x / x.std(1, correction=0, keepdim=True)).T
        torch.testing.assert_close(uncentred, found, atol=1e-3, rtol=1e-3)  # rows are centred
        offset = logits.T - found  # the norm's bias: one value for each token of the vocabulary
        assert offset.mean(1).abs().max() > 0.1
        found = found + offset.mean(1, keepdim=True)
    else:
        found = rows @ F.rms_norm(x, (D,), eps=1e-6).T
    torch.testing.assert_close(found.T, logits, atol=1e-4, rtol=1e-4)


def test_a_copy_in_float32_of_tied_and_untied_weights():
    for name, tied in (("gemma2", True), ("llama", False)):
        model = build(name).bfloat16()
        assert (model.lm_head.weight is model.model.embed_tokens.weight) == tied
        before = model.lm_head.weight.clone()
        rows = unembedding(model)
        assert rows.dtype == torch.float32 and not rows.requires_grad
        scale = model.model.norm.weight.float() + (name == "gemma2")
        assert torch.equal(rows, model.lm_head.weight.float() * scale)
        rows.zero_()
        assert torch.equal(model.lm_head.weight, before)
    model = build("llama")
    model.model.norm.weight.data.fill_(1)
    unembedding(model).zero_()  # no scale to multiply by is no view either
    assert model.lm_head.weight.abs().min() > 0


def test_adapters_count_where_they_reach_the_unembedding():
    plain = unembedding(build("llama"))
    below = LoraConfig(r=2, target_modules=["o_proj"], init_lora_weights=False)
    assert torch.equal(unembedding(get_peft_model(build("llama"), below)), plain)

    at_head = LoraConfig(r=2, target_modules=["lm_head"], init_lora_weights=False, lora_dropout=0.5)
    model = get_peft_model(build("llama"), at_head)
    with pytest.raises(ValueError, match="need a model in eval mode to read Linear"):
        unembedding(model)
    rows = unembedding(model.eval())
    merged = unembedding(model.merge_and_unload())
    assert (rows - plain).abs().max() > 0.1
    torch.testing.assert_close(rows, merged, atol=1e-5, rtol=1e-5)

    saved = LoraConfig(r=2, target_modules=["o_proj"], modules_to_save=["lm_head"])
    model = get_peft_model(build("llama"), saved).eval()
    model.get_output_embeddings().modules_to_save["default"].weight.data.mul_(2)
    torch.testing.assert_close(unembedding(model), 2 * plain)


def test_inside_ddp():
    store = torch.distributed.HashStore()
    torch.distributed.init_process_group("gloo", store=store, rank=0, world_size=1)
    try:
        model = torch.nn.parallel.DistributedDataParallel(build("gpt2"))
        assert torch.equal(unembedding(model), unembedding(build("gpt2")))
    finally:
        torch.distributed.destroy_process_group()


@pytest.mark.filterwarnings("ignore:Unsupported layer type")
def test_models_without_a_plain_unembedding():
    tuned = get_peft_model(build("llama"), LNTuningConfig(target_modules=["model.norm"]))
    for match, model in {
        "need a model with an unembedding, got Gemma2Model": build("gemma2").model,
        "need model.norm without an adapter, got LNTuningLayer": tuned,
        "need an architecture in .*got 'opt'": opt(),
    }.items():
        with pytest.raises(ValueError, match=match):
            unembedding(model)


def corpus(lengths=(1, 9, 4, 2, 7, 9, 3, 1, 6, 8, 5, 5)):
    """Rows that start with a special token; those of one token have nothing to predict."""
    mask = torch.arange(max(lengths)) < torch.tensor(lengths)[:, None]
    generator = torch.Generator().manual_seed(0)
    ids = torch.randint(3, 24, mask.shape, generator=generator, dtype=torch.int32)
    special = mask & (torch.arange(mask.shape[1]) == 0)
    ids[special], ids[~mask] = 1, 0
    return Corpus(ids, mask, special, None, "made")


@pytest.fixture(scope="module")
def models():
    return {name: build(name) for name in ("gemma2", "gpt2", "gpt_neox")}


def damage(x):
    return 0.5 * x + 0.3


@pytest.mark.parametrize("skip_special", [True, False])
@pytest.mark.parametrize("name", ["gemma2", "gpt2", "gpt_neox"])
def test_agrees_with_the_metric(models, name, skip_special):
    torch.manual_seed(0)
    data = corpus()
    where = {SITE, "blocks.0.attn.hook_z", "blocks.1.hook_resid_mid", "blocks.2.hook_mlp_out"}
    for hook_name in sorted(where & set(sites(models[name]))):
        width = site_dim(models[name], hook_name)
        config = DictionaryConfig(site_dims=(width,), d_sae=32, rule=TopK(k=4))
        dictionary = Dictionary(config).eval()
        dictionary.b_dec.data.normal_(0, 5)  # far enough off to matter at every site
        loss = PatchedKL(models[name], data, hook_name, batch_rows=5, skip_special=skip_special)
        assert loss.width == width
        for step in (0, 3):
            found = loss(dictionary, step)
            part = data.take(loss.rows(step))
            options = {"skip_special": skip_special, "batch_rows": 2}
            wanted = patched_losses(models[name], dictionary, part, hook_name, **options).kl
            assert wanted > 1e-2
            assert found.item() == pytest.approx(wanted, abs=1e-6, rel=1e-5)


def test_nothing_changed_is_zero(models):
    scale = torch.ones((), requires_grad=True)
    loss = PatchedKL(models["gemma2"], corpus(), SITE)
    same = loss(lambda x: x * scale, 0)
    assert abs(same.item()) < 1e-6
    (gradient,) = torch.autograd.grad(same, scale)
    assert abs(gradient.item()) < 1e-5  # a minimum
    changed = loss(lambda x: damage(x) * scale, 0)
    assert torch.autograd.grad(changed, scale)[0].abs() > 1e-3 < changed


@pytest.mark.parametrize("hook_name", [SITE, "blocks.1.attn.hook_z", "blocks.1.hook_resid_mid"])
def test_gradient_matches_finite_differences(hook_name):
    loss = PatchedKL(build("gpt2").double(), corpus(), hook_name)
    weight = (torch.eye(D) + 0.3 * noise(D, D)).double().requires_grad_()

    def value(weight):
        return loss(lambda x: x.double() @ weight, 5)

    (gradient,) = torch.autograd.grad(value(weight), weight)
    for seed in range(3):
        direction = gradient / gradient.norm() + noise(D, D, seed=seed) / D
        with torch.no_grad():
            slope = (value(weight + 1e-2 * direction) - value(weight - 1e-2 * direction)) / 2e-2
        assert slope > 1e-3
        torch.testing.assert_close((gradient * direction).sum().float(), slope, rtol=1e-2, atol=0)


def test_graph_starts_at_the_site_and_the_model_stays_as_it_was():
    model = build("gemma2")
    flags = {name: i % 3 > 0 for i, (name, _) in enumerate(model.named_parameters())}
    for name, parameter in model.named_parameters():
        parameter.requires_grad_(flags[name])
    state = {name: x.clone() for name, x in model.state_dict().items()}
    hooks, graphs = n_hooks(model), []
    handles = [
        layer.mlp.register_forward_hook(lambda module, args, out: graphs.append(out.requires_grad))
        for layer in model.model.layers
    ]
    weight = torch.eye(D, requires_grad=True)
    PatchedKL(model, corpus(), SITE)(lambda x: damage(x) @ weight, 0).backward()
    for handle in handles:
        handle.remove()
    assert graphs == [False] * 3 + [False, False, True]  # clean, then patched
    assert weight.grad.abs().max() > 1e-3

    def fail(x):
        assert not any(p.requires_grad for p in model.parameters())
        raise KeyError("on purpose")

    with pytest.raises(KeyError, match="on purpose"):
        PatchedKL(model, corpus(), SITE)(fail, 0)
    assert all(p.grad is None for p in model.parameters())
    assert {name: p.requires_grad for name, p in model.named_parameters()} == flags
    assert all(torch.equal(x, state[name]) for name, x in model.state_dict().items())
    assert n_hooks(model) == hooks and not model.training


def test_rebuild_gets_the_patched_tokens_in_float32():
    model, data, given = build("llama").bfloat16(), corpus(), []
    model.enable_input_require_grads()  # as training adapters with checkpointing does
    weight = torch.eye(D, requires_grad=True)

    def rebuild(x):
        given.append(x)
        return damage(x) @ weight

    for skip_special in (True, False):
        loss = PatchedKL(model, data, SITE, skip_special=skip_special)
        with read(model, [SITE]) as acts:  # entered before the edit
            value = loss(rebuild, 1)
        part, x = data.take(loss.rows(1)), given.pop()
        patched = part.mask & ~part.special if skip_special else part.mask
        assert x.shape == (int(patched.sum()), D)
        width = acts[SITE].shape[1]
        assert torch.equal(acts[SITE][patched[:, :width]].float(), x)  # not written over
        assert x.dtype == value.dtype == torch.float32 and not x.requires_grad
        assert torch.autograd.grad(value, weight)[0].abs().max() > 1e-3


def test_rows_depend_on_seed_and_step_alone(models):
    def loss(**options):
        return PatchedKL(models["gemma2"], corpus(), SITE, **{"batch_rows": 4} | options)

    usable = [i for i, n in enumerate(corpus().mask.sum(1).tolist()) if n > 1]
    first, again = loss(), loss()
    drawn = [first.rows(step).tolist() for step in range(40)]
    assert [again.rows(step).tolist() for step in reversed(range(40))] == drawn[::-1]
    assert [loss(seed=1).rows(step).tolist() for step in range(40)] != drawn
    assert all(len(set(rows)) == 4 for rows in drawn)
    assert len({tuple(rows) for rows in drawn}) > 30
    assert {row for rows in drawn for row in rows} == set(usable)
    assert sorted(loss(batch_rows=99).rows(3).tolist()) == usable
    with pytest.raises(ValueError, match="need step >= 0, got -1"):
        first.rows(-1)


def test_bad_input(models):
    model = models["gemma2"]

    def refuse(match, data=None, hook_name=SITE, **options):
        with pytest.raises(ValueError, match=match):
            PatchedKL(model, data or corpus(), hook_name, **options)

    refuse("need batch_rows >= 1, got 0", batch_rows=0)
    refuse("need seed >= 0, got -1", seed=-1)
    refuse("no hook name 'blocks.9.hook_resid_post'", hook_name="blocks.9.hook_resid_post")
    refuse("need a corpus with a token to predict, got none", corpus((1, 1)))
    marks = corpus((3, 4))
    marks.special.copy_(marks.mask)
    refuse("need a corpus with a token to patch, got special tokens only", marks)
    assert PatchedKL(model, marks, SITE, skip_special=False)(damage, 0) > 0

    model = build("gemma2")
    loss = PatchedKL(model, corpus(), SITE)
    shape = r"need a rebuilt activation \(\d+, 16\) at blocks.1.*, 8\)"
    with pytest.raises(ValueError, match=shape):
        loss(lambda x: x[:, :8], 0)
    model.train()
    refuse("need a model in eval mode")
    with pytest.raises(ValueError, match="need a model in eval mode"):
        loss(damage, 0)
