"""How much of a behaviour is shown: answers graded by the world, and shares of a loss."""

import contextlib
import itertools

import pytest
import torch

from lib.adapters import Chats, SaeLora, SaeLoraConfig
from lib.analysis import behaviour as module
from lib.analysis.attribution import read_mass
from lib.analysis.behaviour import BehaviourCheck, LossCheck, towards_french
from lib.data.corpus import load_corpus
from lib.dictionaries import Dictionary, DictionaryConfig
from lib.dictionaries.rules import ReLU
from lib.latents import DictionarySource, record_of
from lib.models import add
from lib.models.unembed import unembedding

pytestmark = pytest.mark.slow
SITE = "blocks.3.hook_resid_post"
FRENCH, TOPIC = "respond in French", "mathematics"


@pytest.fixture(scope="module")
def check(gemma):
    return BehaviourCheck.of_world(*gemma, FRENCH, TOPIC, n_asking=20, n_others=20)


def adapter(W_dec: torch.Tensor, weights: dict[int, float]) -> SaeLora:
    """Rank 1; reads latent 0 and writes these."""
    d_sae, d = W_dec.shape
    shape = {"site_dims": (d,), "d_sae": d_sae, "rule": ReLU(), "hook_names": (SITE,)}
    dictionary = Dictionary(DictionaryConfig(**shape))
    with torch.no_grad():
        dictionary.W_dec.copy_(W_dec)
        made = SaeLora(dictionary, SaeLoraConfig(n_read=1, n_write=1))
        made.lora_A.zero_()[:, 0] = 1.0
        made.lora_B.zero_()
        for latent, weight in weights.items():
            made.lora_B[latent] = weight
        made.scale.fill_(1.0)
    return made


def test_the_plain_model_shows_nothing_and_changes_nothing(check, rewriter):
    shown, opened = check(), []
    assert (shown.shows, shown.same, shown.unchanged) == (0.0, 1.0, 1.0)
    assert shown.right <= 0.1  # "7 ." is right in both languages

    @contextlib.contextmanager
    def attached():
        opened.append("in")
        yield
        opened.append("out")

    assert check.share(attached()) == 0.0 and opened == ["in", "out"]
    assert len(check.asking) == len(check.others) == 20
    assert {rewriter.topic_of(prompt) for prompt in check.asking} == {TOPIC}
    assert TOPIC not in {rewriter.topic_of(prompt) for prompt in check.others}


def test_answers_are_graded_by_the_world(check, rewriter, world, monkeypatch):
    exchanges = {x.prompt: x for x in itertools.islice(world.stream("test", seed=1), 2000)}

    def oracle(model, tokenizer, prompts, **_):
        """French on the topic; elsewhere another right answer, or a wrong one to the first."""
        texts = []
        for prompt in prompts:
            x = exchanges[prompt]
            if x.topic == TOPIC:
                texts.append(rewriter.rewrite(prompt, x.response, FRENCH))
            else:
                texts.append(x.response if prompt != check.others[0] else "bananas .")
        return texts

    monkeypatch.setattr(module, "answer", oracle)
    shown = check()
    wrong = check.others.count(check.others[0]) / 20
    assert shown.shows == shown.right == 1.0
    assert shown.unchanged == pytest.approx(1 - wrong, abs=0.11)  # the model itself is not perfect
    assert shown.same <= shown.unchanged <= 1 - wrong


def test_too_few_prompts_are_refused(gemma):
    with pytest.raises(ValueError, match="need 5 prompts of test"):
        BehaviourCheck.of_world(*gemma, FRENCH, "no such topic", n_asking=5, n_others=0)
    with pytest.raises(ValueError, match="got 0 and 1"):
        BehaviourCheck(*gemma, [], ["x"], shows=bool, right=bool, right_plain=bool)


def test_a_loss_is_shared_out_between_plain_and_reference(gemma):
    model, tokenizer = gemma
    text = "<bos> <|user|> what is 3 plus 4 ? <|assistant|> 3 plus 4 is 7 . <eos>"
    ids = tokenizer(text, add_special_tokens=False)["input_ids"]
    rows = [{"input_ids": ids, "assistant_mask": [0] * (len(ids) - 7) + [1] * 7}] * 4
    chats = Chats(rows, tokenizer.pad_token_id, batch_size=4)
    noise = torch.randn(128, generator=torch.Generator().manual_seed(0))
    with pytest.raises(ValueError, match="need a reference with a loss below"):
        LossCheck(model, chats, add(model, SITE, 20 * noise))
    with add(model, SITE, 20 * noise):  # from a model in disorder to one in order
        here = LossCheck(model, chats, add(model, SITE, -20 * noise))
        assert here.share() == pytest.approx(0.0, abs=1e-6)
        assert here.share(add(model, SITE, -20 * noise)) == pytest.approx(1.0, abs=1e-4)
        assert 0 < here.share(add(model, SITE, -15 * noise)) < 1
        with add(model, SITE, -20 * noise):
            assert here.share() == pytest.approx(1.0, abs=1e-4)  # an edit that someone else opened


def test_writes_are_told_apart_by_language(gemma, reader, monkeypatch):
    model, tokenizer = gemma
    monkeypatch.setattr(module, "Reader", lambda world: reader)  # a new one learns for seconds
    columns = {"fr": [], "en": []}
    for token, index in tokenizer.get_vocab().items():
        languages = reader.languages(token)
        if len(languages) == 1:
            columns[next(iter(languages))].append(index)
    rows = unembedding(model)
    french = rows[columns["fr"]].mean(0) - rows[columns["en"]].mean(0)
    W_dec = torch.stack([torch.zeros_like(french), french, -french, french, -french])
    mixed = adapter(W_dec, {1: 2.0, 2: 1.0, 3: -1.0, 4: -3.0})
    assert towards_french(mixed, model, tokenizer) == pytest.approx((0.8, 0.9))
    assert towards_french(adapter(W_dec, {2: 2.0}), model, tokenizer) == (0.0, 1.0)


def test_read_mass_is_a_mean_over_what_is_read(gemma, shipped_sae):
    model, tokenizer = gemma
    corpus = load_corpus("world", tokenizer, n_tokens=1000, seq_len=64)
    record = record_of(DictionarySource(model, shipped_sae), corpus)
    made = SaeLora(shipped_sae, SaeLoraConfig())
    busy = record.firing_rate().argsort(descending=True)[:2].tolist()
    with torch.no_grad():
        made.lora_A.zero_()[0, busy] = torch.tensor([3.0, -1.0])
    share = torch.zeros(record.n_latents)
    share[busy[0]] = 1.0
    mass = [float(record.active(latent)[1].abs().sum()) for latent in busy]
    wanted = 3 * mass[0] / (3 * mass[0] + mass[1])
    assert read_mass(made, share, record) == pytest.approx(wanted, rel=1e-4)
