"""The shipped models know the world, and training still does what it did."""

import json
import math

import pytest
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

from lib import paths
from lib.models.generate import answer
from lib.models.tiny import (
    RECIPES,
    TinyConfig,
    build_model,
    evaluate_tiny,
    pad_batch,
    token_losses,
    train_tiny,
)
from lib.world import build_tokenizer

STORED = json.loads((paths.root() / "tests" / "tiny_losses.json").read_text())


@pytest.mark.parametrize("name", RECIPES)
def test_thirty_steps_as_stored(name, world):
    _, _, losses = train_tiny(RECIPES[name], world, steps=30)
    assert losses == pytest.approx(STORED[name], rel=2e-3)
    assert losses[-1] < losses[0] - 0.9


@pytest.fixture(scope="module", params=RECIPES)
def shipped(request):
    folder = paths.shipped_dir() / "models" / request.param
    model = AutoModelForCausalLM.from_pretrained(folder).eval()
    return folder, model, AutoTokenizer.from_pretrained(folder)


def test_shipped_model_is_scored(shipped, world):
    """Small samples of the figures in `training.json`, with room for their sampling error."""
    _, model, tokenizer = shipped
    assert tokenizer.get_vocab() == build_tokenizer(world).get_vocab()
    figures = evaluate_tiny(model, tokenizer, world, n=400, seed=77)
    assert -0.03 < figures["loss"] - figures["floor"] < 0.06
    assert figures["answer_loss"] - figures["answer_floor"] < 0.04
    assert min(figures["language"], figures["topic"]) >= 0.985
    assert figures["style"] >= 0.985
    assert figures["sums"] >= 0.88


def test_every_library_gives_the_same_logits(shipped, world):
    from nnsight import LanguageModel
    from transformer_lens.model_bridge import TransformerBridge

    folder, model, tokenizer = shipped
    tokens, mask = pad_batch(world.sample(1, seed=3), tokenizer.get_vocab(), 0)
    with torch.no_grad():
        logits = model(input_ids=tokens, attention_mask=mask).logits
        bridge = TransformerBridge.boot_transformers(str(folder), device="cpu")
        torch.testing.assert_close(bridge(tokens), logits, atol=1e-4, rtol=1e-4)
        traced = LanguageModel(model, tokenizer=tokenizer)
        with traced.trace(tokens):
            saved = traced.output.logits.save()
    torch.testing.assert_close(saved, logits, atol=1e-5, rtol=1e-5)


def test_answers_do_not_depend_on_their_batch(shipped, world):
    _, model, tokenizer = shipped
    prompts = [exchange.prompt for exchange in world.sample(12, "test", seed=5)]
    together = answer(model, tokenizer, prompts, max_new_tokens=24)
    alone = [answer(model, tokenizer, [prompt], max_new_tokens=24)[0] for prompt in prompts]
    assert together == alone
    assert all(together)
    assert answer(model, tokenizer, []) == []


def test_an_untrained_model_scores_badly(world):
    """The score can fail: chance is ln(vocabulary) and no sum is right."""
    torch.manual_seed(0)
    tokenizer = build_tokenizer(world)
    model = build_model(TinyConfig(), tokenizer).eval()
    figures = evaluate_tiny(model, tokenizer, world, n=60)
    assert abs(figures["loss"] - math.log(len(tokenizer))) < 1
    assert figures["sums"] == figures["exact"] == 0


def test_padding_changes_no_loss(shipped, world):
    _, model, tokenizer = shipped
    ids = tokenizer.get_vocab()
    pair = sorted(world.sample(8, seed=4), key=lambda x: len(x.tokens))[::7]
    with torch.no_grad():
        together, _ = token_losses(model, *pad_batch(pair, ids, tokenizer.pad_token_id))
        alone, _ = token_losses(model, *pad_batch(pair[:1], ids, tokenizer.pad_token_id))
    torch.testing.assert_close(together[0, : alone.shape[1]], alone[0], atol=1e-4, rtol=1e-4)


def test_impossible_configs_are_refused():
    for bad in ({"architecture": "gpt5"}, {"n_heads": 3}, {"steps": 5}):
        with pytest.raises(ValueError, match="need"):
            TinyConfig(**bad)
