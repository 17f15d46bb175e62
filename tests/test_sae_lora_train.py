"""Training a SAE-LoRA: sparse as asked, right on planted truth, the same bit for bit on resume."""

import json
import math
import random
import shutil
from dataclasses import replace
from functools import partial

import numpy as np
import pytest
import torch
from torch.nn.functional import pad
from torch.testing import assert_close

from lib.adapters import (
    Chats,
    SaeLora,
    SaeLoraConfig,
    assistant_loss,
    held_out_loss,
    sparsity_path,
    train_sae_lora,
)
from lib.adapters.sae_lora.sparsify import Regularizer
from lib.data.corpus import load_corpus
from lib.data.tokens import collate
from lib.dictionaries import Dictionary, DictionaryConfig
from lib.dictionaries.rules import TopK
from lib.models import read
from tests.sae_lora_worker import (
    D_SAE,
    SITE,
    chats,
    config,
    random_dictionary,
    random_model,
    rows,
    train,
)

TINY_SITE = "blocks.1.hook_resid_post"
FREE = {"n_read": None, "n_write": None}
MEASURED = "lib.adapters.sae_lora.trainer.held_out_loss"
same = partial(assert_close, rtol=0, atol=0)


@pytest.fixture(scope="module")
def model():
    return random_model()


@pytest.fixture(scope="module")
def dictionary():
    return random_dictionary()


def weights(adapter: SaeLora) -> dict[str, torch.Tensor]:
    return {name: value.clone() for name, value in adapter.state_dict().items()}


def timeless(history: list[dict]) -> list[dict]:
    return [{k: v for k, v in entry.items() if k != "seconds"} for entry in history]


def n_nonzero(adapter: SaeLora) -> tuple[int, int]:
    """Latents with a weight that is not exactly zero, read and written."""
    reads, writes = adapter.read_weights, adapter.write_weights
    return int((reads != 0).any(1).sum()), int((writes != 0).any(0).sum())


@pytest.mark.slow
@pytest.mark.parametrize(("method", "rank"), [("topk", 1), ("topk", 2), ("l1", 2), ("none", 2)])
def test_each_method_learns_and_leaves_the_latents_asked_for(method, rank, model, dictionary):
    settings = config(sparsity=method, rank=rank, n_steps=40, eval_every=100)
    adapter = SaeLora(dictionary, settings)
    start = held_out_loss(model, chats(16, seed=1))
    fit = train(adapter, model=model)
    n = (D_SAE, D_SAE) if method == "none" else (6, 5)
    assert fit.adapter is adapter and n_nonzero(adapter) == n
    assert (len(adapter.read_support), len(adapter.write_support)) == n
    with adapter.attached(model):
        end = held_out_loss(model, chats(16, seed=1))
    assert end == pytest.approx(fit.history[-1]["held_out"], abs=1e-5)
    assert end < start - 0.15
    assert_close(adapter.read_weights.norm(dim=0), torch.ones(rank))
    assert_close(adapter.write_weights.norm(dim=1), torch.ones(rank))


@pytest.mark.slow
def test_under_l1_the_weight_adapts_but_no_latent_goes_before_the_pruning(model, dictionary):
    """The normalisation gives back what the penalty takes, however much its weight grows."""
    settings = config(sparsity="l1", n_read=16, n_write=12, n_steps=220, n_refit=0, lr=0.01)
    adapter = SaeLora(dictionary, replace(settings, eval_every=70))
    first, _, before, after = train(adapter, model=model).history
    assert before["step"] == 210 and (after["n_read"], after["n_write"]) == (16, 12)
    assert min(before["n_read"], before["n_write"]) > 0.8 * D_SAE
    assert before["weight_read"] > 100 * first["weight_read"]


@torch.no_grad()
@pytest.mark.parametrize(("method", "weight"), [("l1", 0.5), ("topk", None), ("none", 0.5)])
def test_the_penalty_is_of_the_raw_weights(method, weight):
    adapter = SaeLora(random_dictionary(), config(sparsity=method, rank=2, weight=weight))
    norms = [w.abs().sum().item() for w in (adapter.lora_A, adapter.lora_B)]
    penalty = float(Regularizer(adapter, adapter.config).penalty())
    assert penalty == pytest.approx({"l1": 0.5, "topk": 3e-3, "none": 0.0}[method] * sum(norms))


def test_sizes_fall_geometrically_to_the_targets():
    adapter = SaeLora(random_dictionary(), config(n_read=4, n_write=16))
    regularizer = Regularizer(adapter, adapter.config)
    shares = np.linspace(0, 1, 61)
    reads, writes = np.array([regularizer.sizes(float(s)) for s in shares]).T
    for sizes, target in ((reads, 4), (writes, 16)):
        assert sizes[0] == D_SAE and sizes[-1] == target and (np.diff(sizes) <= 0).all()
        fallen = np.maximum(0, (shares - 1 / 3) / (2 / 3))  # nothing goes in the first third
        np.testing.assert_allclose(sizes, D_SAE * (target / D_SAE) ** fallen, atol=0.5)
    for share in (0.2, 0.5, 0.8):
        regularizer.after_step(share)
        assert n_nonzero(adapter) == tuple(regularizer.sizes(share))
    adapter.write_mask[:] = torch.arange(D_SAE) < 7
    assert Regularizer(adapter, adapter.config).sizes(1.0) == [4, 7]


class Told(Chats):
    """What a teacher says after every token is what is to be learned."""

    def __init__(self, ids: torch.Tensor, teacher: SaeLora, model, batch_size: int) -> None:
        all_tokens = [{"input_ids": row.tolist(), "assistant_mask": [1] * len(row)} for row in ids]
        super().__init__(all_tokens, 0, batch_size=batch_size)
        with torch.no_grad(), teacher.attached(model):
            said = model(input_ids=ids).logits[:, :-1].argmax(-1)
        self.said = {tuple(row.tolist()): answer for row, answer in zip(ids, said, strict=True)}

    def told(self, batch: dict) -> dict:
        labels = batch["labels"].clone()
        for label, row in zip(labels, batch["input_ids"], strict=True):
            label[1:] = self.said[tuple(row.tolist())]
        return batch | {"labels": labels}

    def batch(self, step: int) -> dict:
        return self.told(super().batch(step))

    def all(self):
        return map(self.told, super().all())


def orthonormal(x: torch.Tensor) -> Dictionary:
    """128 orthonormal latents in 128 dimensions: none can stand in for another."""
    shape = DictionaryConfig(site_dims=(128,), d_sae=128, rule=TopK(k=24), hook_names=(TINY_SITE,))
    basis = torch.linalg.qr(torch.randn(128, 128, generator=torch.Generator().manual_seed(0)))[0]
    return Dictionary.of(shape, {"W_dec": basis, "W_enc": basis.T, "b_dec": x.mean(0)})


@pytest.mark.slow
def test_topk_finds_the_planted_support(gemma):
    """A teacher reads 3 latents of 128 and writes 3; 4 at random would hit 0.1 of the 3."""
    model, tokenizer = gemma
    corpus = load_corpus("world", tokenizer, n_tokens=5_000, seq_len=32)
    prompts = corpus.ids[corpus.mask[:, :12].all(1)][:, :12].long().unique(dim=0)
    rng = torch.Generator().manual_seed(0)
    prompts = prompts[torch.randperm(len(prompts), generator=rng)]
    rng.manual_seed(1)
    reads, writes = (torch.randperm(128, generator=rng)[:3] for _ in range(2))
    with torch.no_grad(), read(model, [TINY_SITE]) as acts:
        model(input_ids=prompts)
    nothing = SaeLoraConfig(sparsity="none", **FREE)  # needs no targets
    teacher = SaeLora(orthonormal(acts[TINY_SITE].flatten(0, 1)), nothing)
    with torch.no_grad():
        teacher.lora_A.zero_()[0, reads] = 1.0
        teacher.lora_B.zero_()[writes, 0] = torch.tensor([1.0, -1.0, 1.0])
        teacher.scale.fill_(10.0)
    held_out = Told(prompts[:32], teacher, model, 32)
    lessons = Told(prompts[32:], teacher, model, 16)
    settings = SaeLoraConfig(n_read=4, n_write=4, n_steps=60, n_refit=15, eval_every=60, lr=0.03)
    adapter = SaeLora(teacher.dictionary, settings)
    before = held_out_loss(model, held_out)
    with teacher.attached(model):
        best = held_out_loss(model, held_out)
    dense = replace(settings, sparsity="none", n_steps=40, n_refit=0)
    train_sae_lora(model, adapter, lessons, held_out, config=dense)
    after = train_sae_lora(model, adapter, lessons, held_out, config=settings).history[-1]
    for found, planted in (
        (adapter.read_support, teacher.read_support),
        (adapter.write_support, teacher.write_support),
    ):
        assert len(found) == 4
        assert len({*found.tolist()} & {*planted.tolist()}) >= 2, (found, planted)
    assert before - after["held_out"] > 0.6 * (before - best)


def test_the_loss_is_transformers_own(gemma, model):
    first = {"input_ids": [4, 5, 6], "assistant_mask": [1, 0, 1]}  # which is never asked for
    conversations = [*rows(12), first]
    for which in (gemma[0], model):
        batch = collate(conversations, 0)
        total, n = assistant_loss(which, batch)
        with torch.no_grad():
            theirs = which(**batch)
        assert n == sum(sum(row["assistant_mask"][1:]) for row in conversations)
        assert (total / n).item() == pytest.approx(theirs.loss.item(), abs=1e-5)
        by_hand = 0.0
        for row, logits in zip(conversations, theirs.logits, strict=True):
            for at, (token, counts) in enumerate(zip(*row.values(), strict=True)):
                if at and counts:
                    by_hand -= logits[at - 1].double().log_softmax(0)[token].item()
        assert total.item() == pytest.approx(by_hand, rel=1e-5)
    assert not model.lm_head._forward_pre_hooks


def test_the_held_out_loss_pools_tokens_not_batches(model):
    conversations = rows(13, seed=2)
    apart = [assistant_loss(model, collate([row], 0)) for row in conversations]
    pooled = sum(loss.item() for loss, _ in apart) / sum(n for _, n in apart)
    of_means = sum(loss.item() / n for loss, n in apart) / len(apart)
    assert abs(pooled - of_means) > 1e-2
    for batch_size in (1, 5, 13):
        value = held_out_loss(model, Chats(conversations, 0, batch_size=batch_size))
        assert value == pytest.approx(pooled, abs=1e-5)


def seen(batch: dict) -> list[tuple]:
    kept = batch["attention_mask"].bool()
    return [tuple(row[m].tolist()) for row, m in zip(batch["input_ids"], kept, strict=True)]


def test_each_chat_comes_at_most_once_an_epoch():
    conversations = [{"input_ids": [i, 1, 2, *[3] * (i % 9)], "assistant_mask": [0, 1, 1]
                      + [1] * (i % 9)} for i in range(150)]  # fmt: skip
    data = Chats(conversations, 0, batch_size=8, seed=4)
    per_epoch, orders, met = 150 // 8, [], set()
    for epoch in range(3):
        batches = [seen(data.batch(epoch * per_epoch + i)) for i in range(per_epoch)]
        assert {len(batch) for batch in batches} == {8}
        flat = [row for batch in batches for row in batch]
        assert len(set(flat)) == len(flat) == per_epoch * 8
        orders.append(flat)
        met |= {*flat}
    assert orders[0] != orders[1] != orders[2] and len(met) == 150
    again = Chats(conversations, 0, batch_size=8, seed=4)
    for step in (40, 3, 17, 54, 0, 3):  # whatever came before
        for name, value in again.batch(step).items():
            assert torch.equal(value, data.batch(step)[name])
    other = Chats(conversations, 0, batch_size=8, seed=5)
    assert seen(other.batch(0)) != seen(data.batch(0))
    assert [row for batch in data.all() for row in seen(batch)] == [
        tuple(row["input_ids"]) for row in conversations
    ]
    assert len(data) == 150


def test_batches_hold_little_padding():
    rng = random.Random(0)
    lengths = [rng.randint(5, 100) for _ in range(256)]
    conversations = [{"input_ids": [1] * n, "assistant_mask": [1] * n} for n in lengths]
    data = Chats(conversations, 0, batch_size=8)
    masks = [data.batch(step)["attention_mask"] for step in range(32)]
    padding = 1 - sum(m.sum().item() for m in masks) / sum(m.numel() for m in masks)
    unsorted = [collate(conversations[i : i + 8], 0)["attention_mask"] for i in range(0, 256, 8)]
    plain = 1 - sum(m.sum().item() for m in unsorted) / sum(m.numel() for m in unsorted)
    assert padding < 0.1 < 0.3 < plain
    assert len({m.shape[1] for m in masks[:10]}) > 5  # not the short ones first
    assert [m.shape[1] for m in masks[:10]] != sorted(m.shape[1] for m in masks[:10])


def test_chats_that_cannot_be_trained_on():
    silent = {"input_ids": [1, 2, 3], "assistant_mask": [1, 0, 0]}  # the first has no past
    for given, batch_size, said in (
        ([], 1, "need chats with tokens of the assistant.*got no rows"),
        ([*rows(2), silent], 1, "got row 2 without"),
        (rows(4), 5, "need at least a batch of 5 chats, got 4"),
        (rows(4), 0, "need batch_size >= 1, got 0"),
    ):
        with pytest.raises(ValueError, match=said):
            Chats(given, 0, batch_size=batch_size)


class Joined(Chats):
    """Two batches of another in one."""

    def batch(self, step: int) -> dict:
        pair = [super(Joined, self).batch(2 * step + i) for i in (0, 1)]
        longest = max(part["input_ids"].shape[1] for part in pair)
        fill = {"input_ids": 0, "attention_mask": 0, "labels": -100}
        widened = [
            {k: pad(v, (0, longest - v.shape[1]), value=fill[k]) for k, v in part.items()}
            for part in pair
        ]
        return {name: torch.cat([part[name] for part in widened]) for name in fill}


@pytest.mark.parametrize("method", ["none", "l1"])
def test_accumulated_batches_are_one_large_batch(method, model, dictionary):
    grads = []
    for n, data in ((2, chats()), (1, Joined(rows(40), 0, batch_size=8)), (1, chats())):
        settings = config(sparsity=method, accumulate=n, n_steps=1, n_refit=0, grad_clip=1e9)
        adapter = SaeLora(dictionary, settings)
        adapter.scale.data.fill_(2.0)
        fit = train(adapter, model=model, chats=data)
        found = {name: p.grad for name, p in adapter.named_parameters() if p.grad is not None}
        grads.append(found | {"loss": torch.tensor(fit.history[0]["loss"])})
    assert grads[0].keys() == {"lora_A", "lora_B", "scale", "loss"}
    for name, value in grads[0].items():
        assert_close(value, grads[1][name], rtol=1e-4, atol=1e-6)
        assert not torch.allclose(value, grads[2][name], rtol=1e-2)


class Enough(Exception):
    pass


def interrupted(adapter: SaeLora, step: int, **options) -> None:
    """Train until a measurement at `step` or later, which ends the run before its checkpoint."""

    def stop(history):
        if history[-1]["step"] >= step:
            raise Enough

    with pytest.raises(Enough):
        train(adapter, on_eval=stop, **options)


@pytest.mark.slow
@pytest.mark.parametrize(
    "changes",
    [{"patience": 3, "eval_every": 2}, {"sparsity": "l1", "accumulate": 2, "rank": 2}],
    ids=["topk, stopped early", "l1"],
)  # fmt: skip
def test_resume_from_any_checkpoint_is_bit_exact(changes, model, dictionary, tmp_path, monkeypatch):
    """Of the search, of the border itself and of the refit."""
    settings = config(n_steps=12, n_refit=8, **changes)
    if settings.patience:  # what falls rises
        monkeypatch.setattr(MEASURED, lambda *a: -held_out_loss(*a))

    def keep(history):
        for path in (tmp_path / "whole").glob("checkpoint-*"):
            shutil.copytree(path, tmp_path / path.name[11:] / path.name, dirs_exist_ok=True)

    bare, whole = (SaeLora(dictionary, settings) for _ in range(2))
    expected = timeless(train(bare, model=model).history)
    options = {"folder": tmp_path / "whole", "checkpoint_every": 4, "on_eval": keep}
    assert timeless(train(whole, model=model, **options).history) == expected
    same(weights(bare), weights(whole))  # checkpoints change nothing
    assert (expected[-1]["step"] < 20) == (settings.patience > 0)
    for step in (4, 8, 12, 16):
        assert (tmp_path / f"{step}" / f"checkpoint-{step}").is_dir()
        other = SaeLora(dictionary, settings)
        other.lora_A.data += 1  # whatever it was
        again = train(other, model=model, folder=tmp_path / f"{step}", resume=True)
        same(weights(whole), weights(other))
        assert timeless(again.history) == expected, step


@pytest.mark.slow
def test_an_adapter_that_was_interrupted_goes_on_itself(model, dictionary, tmp_path):
    settings = config(sparsity="l1", n_steps=12, n_refit=6)
    whole, cut = (SaeLora(dictionary, settings) for _ in range(2))
    options = {"folder": tmp_path, "model": model, "resume": True, "checkpoint_every": 3}
    for step in (5, 10, 15):
        interrupted(cut, step, **options)
        assert [p.name for p in tmp_path.iterdir()] == [f"checkpoint-{(step - 1) // 3 * 3}"]
    fit = train(cut, **options)
    assert timeless(fit.history) == timeless(train(whole, model=model).history)
    same(weights(whole), weights(cut))
    assert not list(tmp_path.iterdir())  # room for the adapter
    assert cut.save(tmp_path) == tmp_path


def test_resume_of_another_training_says_what_differs(model, dictionary, tmp_path):
    settings = config(seed=3)
    interrupted(SaeLora(dictionary, settings), 5, model=model, folder=tmp_path, checkpoint_every=2)
    adapter = SaeLora(dictionary, settings)
    before = weights(adapter)
    steps = "config.n_steps: then 24, now 30; SAE-LoRA.config.sparsity: then 'topk', now 'l1'"
    for options, named in (
        ({"chats": chats(41)}, "n_chats: then 40, now 41"),
        ({"held_out": chats(17)}, "n_held_out: then 16, now 17"),
        ({"chats": chats(batch_size=10)}, "batch_size: then 8, now 10"),
        ({"chats": chats(seed=5)}, "data_seed: then 0, now 5"),
        ({"config": replace(settings, lr=0.5)}, "config.lr: then 0.03, now 0.5"),
        ({"config": replace(settings, sparsity="l1", n_steps=30)}, steps),
    ):
        with pytest.raises(ValueError, match=f"cannot resume .*checkpoint-4.*{named}"):
            train(adapter, folder=tmp_path, resume=True, **{"model": model} | options)
    same(before, weights(adapter))


@pytest.mark.parametrize(
    ("patience", "refit", "ends_at", "best_at"),
    [
        (2, [5, 3, 4, 3.5], 15, 9),
        (2, [5, 6, 4, 4.5, 2], 18, 18),
        (2, [5, 3, 4, 2, 6], 18, 15),
        (0, [1, 2, 3, 4, 5], 18, 18),
    ],
)
def test_patience_ends_a_refit_and_keeps_the_best(
    patience, refit, ends_at, best_at, model, dictionary, monkeypatch
):
    """Measured every third step; the low loss before 6 is of latents that are gone."""
    losses, seen_at = iter([0.1, *refit]), {}
    monkeypatch.setattr(MEASURED, lambda *_: float(next(losses)))
    settings = config(patience=patience, n_steps=6, n_refit=12, eval_every=3)
    adapter = SaeLora(dictionary, settings)

    def look(history):
        seen_at[history[-1]["step"]] = weights(adapter)

    train(adapter, model=model, on_eval=look)
    assert [*seen_at] == list(range(3, ends_at + 1, 3))
    same(weights(adapter), seen_at.pop(best_at))
    assert not any(torch.equal(seen["lora_A"], adapter.lora_A) for seen in seen_at.values())


def test_the_history_tells_what_it_says(model, dictionary):
    grown = []
    settings = config(sparsity="l1", weight=0.02, n_steps=10, n_refit=6, eval_every=4)
    adapter = SaeLora(dictionary, settings)
    fit = train(adapter, model=model, on_eval=lambda history: grown.append(len(history)))
    assert [e["step"] for e in fit.history] == [4, 8, 10, 12, 16]
    assert grown == list(range(1, 6))
    assert [e["phase"] for e in fit.history] == ["search"] * 3 + ["refit"] * 2
    fields = {"step", "phase", "loss", "held_out", "n_read", "n_write", "weight_read"}
    assert all(e.keys() == fields | {"weight_write", "seconds"} for e in fit.history)
    assert all(e["n_read"] > 6 for e in fit.history[:2])
    assert all((e["n_read"], e["n_write"]) == (6, 5) for e in fit.history[2:])
    assert {(e["weight_read"], e["weight_write"]) for e in fit.history} == {(0.02, 0.02)}
    seconds = [e["seconds"] for e in fit.history]
    assert seconds == sorted(seconds) and seconds[0] > 0 and fit.seconds == seconds[-1]
    json.dumps(fit.history)


def test_the_loss_in_the_history_is_without_the_penalty(model, dictionary):
    settings = config(sparsity="l1", weight=10.0, n_steps=1, n_refit=0)
    adapter, expected = SaeLora(dictionary, settings), assistant_loss(model, chats().batch(0))
    fit = train(adapter, model=model)
    assert fit.history[0]["loss"] == pytest.approx((expected[0] / expected[1]).item(), abs=1e-6)


def test_training_has_a_seed_of_its_own(model, dictionary):
    found = []
    for seed in (0, 0, 1):
        torch.rand(3)
        before = torch.get_rng_state()
        settings = config(n_steps=5, n_refit=2, seed=seed)
        adapter = SaeLora(dictionary, settings)
        train(adapter, model=model)
        assert torch.equal(before, torch.get_rng_state())
        found.append(weights(adapter))
    same(found[0], found[1])
    assert not torch.equal(found[1]["lora_A"], found[2]["lora_A"])


@pytest.mark.parametrize("fails", [False, True])
def test_model_and_dictionary_are_left_as_they_were(fails):
    model, dictionary = random_model(), random_dictionary()
    settings = config(n_steps=5, n_refit=2)
    adapter = SaeLora(dictionary, settings)
    model.lm_head.requires_grad_(False)
    flags = {name: p.requires_grad for name, p in model.named_parameters()}
    assert {*flags.values()} == {False, True}
    before = {k: v.clone() for k, v in (model.state_dict() | dictionary.state_dict()).items()}
    if fails:
        interrupted(adapter, 5, model=model)
    else:
        train(adapter, model=model)
    same(before, model.state_dict() | dictionary.state_dict())
    assert all(p.grad is None for p in (*model.parameters(), *dictionary.parameters()))
    assert flags == {name: p.requires_grad for name, p in model.named_parameters()}
    assert not any(p.requires_grad for p in dictionary.parameters())
    assert not any(m._forward_hooks or m._forward_pre_hooks for m in model.modules())


def test_a_loss_that_is_not_finite_is_named_and_changes_no_weight(model, dictionary):
    adapter, left = SaeLora(dictionary, config()), {}

    def spoil(history):
        adapter.scale.data.fill_(math.nan)
        left.update(weights(adapter))

    with pytest.raises(FloatingPointError, match="SAE-LoRA: the loss is nan at step 5; use a"):
        train(adapter, model=model, on_eval=spoil)
    assert_close(left, weights(adapter), rtol=0, atol=0, equal_nan=True)


def test_what_cannot_be_trained(model, dictionary):
    adapter = SaeLora(dictionary, config())
    with pytest.raises(ValueError, match="need a model in eval mode"):
        train(adapter, model=random_model().train())
    for changes, said in (
        ({"rank": 2}, "need a config of rank 1 and mode add.*got 2 and add"),
        ({"mode": "replace"}, "need a config of rank 1 and mode add.*got 1 and replace"),
        ({"n_read": 65}, "need n_read <= d_sae 64, got 65"),
        ({"n_write": 99}, "need n_write <= d_sae 64, got 99"),
    ):
        with pytest.raises(ValueError, match=said):
            train(adapter, model=model, config=config(**changes))
    wide = Dictionary(DictionaryConfig(site_dims=(20,), d_sae=64, rule=TopK(k=4)))
    other = SaeLora(wide, config(hook_name=SITE))
    with pytest.raises(ValueError, match="need a dictionary of width 16 .* got 20"):
        train(other, model=model)


@pytest.mark.slow
def test_a_path_has_nested_supports_and_leaves_the_adapter_alone(model, dictionary):
    adapter = SaeLora(dictionary, config(sparsity="none", n_steps=12, n_refit=0))
    train(adapter, model=model)
    settings = config(n_steps=10, n_refit=5, hook_name=SITE)
    before, data = weights(adapter), (chats(), chats(16, seed=1))
    fits = sparsity_path(model, adapter, *data, (20, 8, 3), settings)
    same(before, weights(adapter))
    assert list(fits) == [20, 8, 3] and n_nonzero(adapter) == (D_SAE, D_SAE)
    for size, fit in fits.items():
        assert n_nonzero(fit.adapter) == (size, size)
        assert fit.adapter.config == replace(settings, n_read=size, n_write=size)
        assert fit.adapter.dictionary is adapter.dictionary
    for large, small in ((20, 8), (8, 3)):
        for side in ("read_support", "write_support"):
            outer, inner = (getattr(fits[n].adapter, side).tolist() for n in (large, small))
            assert {*inner} < {*outer}
    ends = [fit.history[-1]["held_out"] for fit in fits.values()]
    assert ends[0] < ends[2]


def test_a_path_of_the_published_penalty_leaves_every_latent(model, dictionary):
    adapter = SaeLora(dictionary, config(sparsity="l1"))
    fits = sparsity_path(model, adapter, chats(), chats(16), (0.01, 0.1), adapter.config)
    assert list(fits) == [0.01, 0.1]
    for weight, fit in fits.items():
        assert fit.adapter.config == replace(adapter.config, weight=weight, **FREE)
        assert fit.adapter is not adapter and n_nonzero(fit.adapter) == (D_SAE, D_SAE)


def test_paths_that_are_none(model, dictionary):
    adapter, data = SaeLora(dictionary, config()), chats()
    for method, values, said in (
        *(("topk", sizes, "need values that fall, got") for sizes in ((), (4, 4), (16, 4, 8))),
        *(("l1", given, "need values that rise, got") for given in ((), (0.1, 0.1), (0.2, 0.1))),
        ("none", (4, 2), "need a sparsity method .* got 'none'"),
        ("topk", (0,), "need n_read >= 1 or None, got 0"),
    ):
        with pytest.raises(ValueError, match=said):
            sparsity_path(model, adapter, data, data, values, config(sparsity=method))
