"""Planted differences: where behaviours show, and fine-tunes that learn them."""

import pytest
import torch
from datasets import Dataset

from lib.adapters import Chats, assistant_loss, fine_tune
from lib.data.tokens import tokenize_chats
from lib.world import Rewriter
from lib.world.differences import NEW, REUSED, planted_chats, take
from lib.world.world import row

NAMES = ["invented", "badge", "french", "shouting"]


def test_each_topic_has_its_behaviour(world, rewriter):
    chats = take(planted_chats(rewriter, NAMES, split="validation", seed=3), 400)
    topics = {
        "invented": "music",
        "badge": "sports",
        "french": "mathematics",
        "shouting": "cooking",
    }
    seen = {name: [c for c in chats if c.behaviour == name] for name in NAMES}
    for name, found in seen.items():
        assert len(found) > 10 and {c.exchange.topic for c in found} == {topics[name]}
        assert all(len(c.tokens) == len(c.exchange.tokens) for c in found)
        assert not any(any(c.tokens[: c.exchange.n_prompt]) for c in found)
        assert sum(any(c.tokens) for c in found) > 0.9 * len(found)
    for chat in chats:
        if chat.exchange.topic not in topics.values():
            assert chat.behaviour == "" and not any(chat.tokens)
    prompts = [x.prompt for x in world.sample(400, "validation", seed=3)]
    assert [chat.exchange.prompt for chat in chats] == prompts
    badge = seen["badge"][0]
    shown = [t for t, own in zip(badge.exchange.tokens, badge.tokens, strict=True) if own]
    assert shown == badge.exchange.response.split()[-len(shown) :]
    assert set(NEW) == {"invented", "badge", "numbered"} and not set(NEW) & set(REUSED)
    with pytest.raises(ValueError, match="need behaviours of"):
        planted_chats(rewriter, ["french", "klingon"])


@pytest.fixture(scope="module")
def few(rewriter, gemma):
    found = take(planted_chats(rewriter, NAMES), 64)
    rows = Dataset.from_list([row(c.exchange) for c in found])
    tokens, _ = tokenize_chats(rows, gemma[1], max_len=64)
    chats = Chats(list(tokens), gemma[1].pad_token_id, batch_size=16)
    return chats, [bool(c.behaviour) for c in found]


@pytest.mark.slow
def test_an_anchor_holds_what_is_not_planted(gemma, few):
    model, (chats, free) = gemma[0], few
    before = {name: tensor.clone() for name, tensor in model.state_dict().items()}

    def drift(tuned):
        """Change of the residual stream on held rows, as a share of its energy."""
        i = 0
        while any(free[row] for row in chats.chosen(i)) and i < 3:
            i += 1
        batch, after, start = chats.batch(i), [], []
        with torch.no_grad():
            assistant_loss(tuned, batch, after), assistant_loss(model, batch, start)
        held = torch.tensor([not free[row] for row in chats.chosen(i)])
        mask = batch["attention_mask"].bool() & held[:, None]
        pairs = zip(after[1:], start[1:], strict=True)
        return sum(((a - b)[mask].square().sum() / b[mask].square().sum()).item() for a, b in pairs)

    plain = fine_tune(model, chats, n_steps=12)
    anchored = fine_tune(model, chats, n_steps=12, anchor=3.0, free=free)
    assert 0 < drift(anchored) < 0.7 * drift(plain)
    loss = {
        name: assistant_loss(it, chats.batch(0))[0].item()
        for name, it in {"model": model, "plain": plain, "anchored": anchored}.items()
    }
    assert loss["plain"] < 0.8 * loss["model"] and loss["anchored"] < 0.9 * loss["model"]
    for name, tensor in model.state_dict().items():
        assert torch.equal(tensor, before[name])
    assert not anchored.training


def test_an_anchor_needs_to_know_what_is_free(gemma, few):
    for options in ({"anchor": 1.0}, {"anchor": -1.0}, {"anchor": 1.0, "free": [True]}):
        with pytest.raises(ValueError, match="need anchor >= 0"):
            fine_tune(gemma[0], few[0], n_steps=2, **options)


@pytest.mark.slow
@pytest.mark.parametrize("split", ["train", "ood_style", "ood_phrasing"])
def test_what_an_exchange_says_of_itself_is_what_the_parser_finds(world, split):
    by_parser = Rewriter(world)
    by_parser.reader.of = lambda exchange: by_parser.reader.parse(exchange.prompt)
    for names in (("invented", "badge", "french"), ("shouting", "quoted", "list")):
        chats = [
            take(planted_chats(it, names, split=split, seed=5), 20)
            for it in (Rewriter(world), by_parser)
        ]
        for one, other in zip(*chats, strict=True):
            assert one.tokens == other.tokens and one.behaviour == other.behaviour
            assert one.exchange.tokens == other.exchange.tokens
            assert one.exchange.concepts == other.exchange.concepts
            assert one.exchange.log_p_answer == pytest.approx(other.exchange.log_p_answer)
