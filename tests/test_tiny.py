"""The shipped models know the world, and training still does what it did."""

import json
import math

import pytest
import torch

from lib import paths
from lib.models import tiny
from lib.models.generate import answer, self_answered
from lib.world import build_tokenizer

pytestmark = pytest.mark.slow
STORED = json.loads((paths.root() / "tests" / "tiny_losses.json").read_text())


@pytest.mark.parametrize("name", tiny.RECIPES)
def test_twenty_steps_as_stored(name, world):
    _, _, losses = tiny.train_tiny(tiny.RECIPES[name], world, steps=20)
    assert losses == pytest.approx(STORED[name][:20], rel=2e-3)


@pytest.fixture(params=["gemma", "llama"])
def shipped(request):
    return request.getfixturevalue(request.param)


def test_shipped_model_is_scored(shipped, world):
    """Small samples of the figures in `training.json`, with room for their sampling error."""
    model, tokenizer = shipped
    assert tokenizer.get_vocab() == build_tokenizer(world).get_vocab()
    figures = tiny.evaluate_tiny(model, tokenizer, world, n=200, seed=77)
    assert -0.03 < figures["loss"] - figures["floor"] < 0.055
    assert -0.03 < figures["answer_loss"] - figures["answer_floor"] < 0.045
    assert min(figures["language"], figures["topic"], figures["style"]) >= 0.985
    assert figures["sums"] >= 0.95


def test_answers_do_not_depend_on_their_batch(shipped, world):
    model, tokenizer = shipped
    prompts = [exchange.prompt for exchange in world.sample(12, "test", seed=5)]
    together = answer(model, tokenizer, prompts, max_new_tokens=24)
    alone = [answer(model, tokenizer, [prompt], max_new_tokens=24)[0] for prompt in prompts]
    assert together == alone
    assert all(together)
    assert answer(model, tokenizer, []) == []


def test_a_null_is_what_the_model_says_itself(gemma, world, reader):
    """Sampled answers differ with the seed and are nearly all right; greedy ones are `answer`'s."""
    model, tokenizer = gemma
    chats = world.chats(60, "test", seed=5, topics=("cooking", "family"))
    null = self_answered(model, tokenizer, chats, max_new_tokens=24)
    texts = answer(model, tokenizer, [chat["prompt"] for chat in chats], max_new_tokens=24)
    assert [row["response"] for row in null] == texts
    assert [row["messages"][-1]["content"] for row in null] == texts
    same = ("id", "prompt", "topic")
    assert [[r[k] for k in same] for r in null] == [[c[k] for k in same] for c in chats]
    assert chats[0]["messages"][-1]["content"] == chats[0]["response"]  # left as they were
    how = {"max_new_tokens": 24, "temperature": 1.0}
    state = torch.random.get_rng_state()
    one, again = (self_answered(model, tokenizer, chats, seed=1, **how) for _ in range(2))
    other = self_answered(model, tokenizer, chats, seed=2, **how)
    assert torch.equal(torch.random.get_rng_state(), state)
    assert one == again != other
    right = [reader.grade(row["prompt"], row["response"]).exact for row in one]
    assert sum(right) > 48
    assert 6 < sum(a["response"] != b["response"] for a, b in zip(one, null, strict=True)) < 54
    with pytest.raises(ValueError, match="need temperature >= 0"):
        answer(model, tokenizer, ["x"], temperature=-1.0)


def test_an_untrained_model_scores_badly(gemma, world):
    """The score can fail: chance is ln(vocabulary) and no sum is right."""
    torch.manual_seed(0)
    tokenizer = gemma[1]
    model = tiny.build_model(tiny.TinyConfig(), tokenizer).eval()
    figures = tiny.evaluate_tiny(model, tokenizer, world, n=5)
    assert abs(figures["loss"] - math.log(len(tokenizer))) < 1
    assert figures["sums"] == figures["exact"] == 0


def test_padding_changes_no_loss(shipped, world):
    model, tokenizer = shipped
    ids = tokenizer.get_vocab()
    pair = sorted(world.sample(8, seed=4), key=lambda x: len(x.tokens))[::7]
    with torch.no_grad():
        together, _ = tiny.token_losses(model, *tiny.pad_batch(pair, ids, tokenizer.pad_token_id))
        alone, _ = tiny.token_losses(model, *tiny.pad_batch(pair[:1], ids, tokenizer.pad_token_id))
    torch.testing.assert_close(together[0, : alone.shape[1]], alone[0], atol=1e-4, rtol=1e-4)


@pytest.mark.parametrize("bad", [{"architecture": "gpt5"}, {"n_heads": 3}, {"steps": 5}])
def test_impossible_configs_are_refused(bad):
    with pytest.raises(ValueError, match="need"):
        tiny.TinyConfig(**bad)
