"""Two models as one source: differences, tokenizers of their own, an adapter beside its base."""

import copy

import pytest
import torch
from peft import LoraConfig, get_peft_model
from tokenizers import Regex, Tokenizer, models, pre_tokenizers
from transformers import PreTrainedTokenizerFast

from lib.activations.harvest import HarvestConfig, Harvester
from lib.activations.pair import AlignedHarvester, Pair, WithoutAdapter, paired
from lib.analysis.diffing.trained import plans
from lib.data.corpus import load_corpus, of_rows
from lib.models.tiny import TinyConfig, build_model
from lib.world import build_tokenizer

SITE = "blocks.1.hook_resid_post"


@pytest.fixture(scope="module")
def tokenizer(world):
    return build_tokenizer(world)


def small(tokenizer, seed: int, d_model: int = 32):
    torch.manual_seed(seed)
    config = TinyConfig(architecture="llama", d_model=d_model, n_layers=2, d_mlp=48)
    return build_model(config, tokenizer).eval()


@pytest.fixture(scope="module")
def corpus(tokenizer):
    return load_corpus("world", tokenizer, n_tokens=1_000, seq_len=64, split="test")


def source(model, corpus, **options):
    options = {"batch_rows": 8, "skip_special": False} | options
    return Harvester([model], corpus, HarvestConfig(hook_names=(SITE,), **options))


def test_a_pair_holds_both_and_their_difference(tokenizer, corpus):
    a, b = small(tokenizer, 0), small(tokenizer, 1)
    pair = Pair(source(a, corpus), source(b, corpus), keep=True)
    together = HarvestConfig(hook_names=(SITE,), batch_rows=8, skip_special=False)
    one = Pair(Harvester([a, b], corpus, together))
    assert pair.sites == one.sites == {"a": 32, "b": 32, "b - a": 32}
    for i in range(pair.n_blocks):
        x, y = pair.block(i), one.block(i)
        torch.testing.assert_close(x.acts, y.acts)
        left, right, apart = (x.acts[:, c] for c in pair.columns(("a", "b", "b - a")))
        torch.testing.assert_close(apart, right - left)
        assert pair.block(i) is x
    assert pair.fingerprint != Pair(source(b, corpus), source(a, corpus)).fingerprint


def test_one_model_twice_is_warned_about_and_has_no_difference(tokenizer, corpus):
    a = small(tokenizer, 0)
    with pytest.warns(UserWarning, match="equal at every token"):
        pair = Pair(source(a, corpus), source(copy.deepcopy(a), corpus))
    with pytest.raises(ValueError, match="need two models that differ"):
        plans(["difference"], pair, d_sae=64, k=4)


def test_other_tokens_are_refused(tokenizer, corpus):
    a, b = small(tokenizer, 0), small(tokenizer, 1)
    n = len(corpus.ids) // 2 // 8 * 8
    first, second = corpus.rows(0, n), corpus.rows(n, 2 * n)
    with pytest.raises(ValueError, match="need the same tokens of both models"):
        Pair(source(a, first), source(b, second))
    with pytest.raises(ValueError, match="need sources of the same tokens"):
        Pair(source(a, corpus), source(b, first))
    with pytest.raises(ValueError, match="need two sites, got 1"):
        Pair(source(a, corpus))


def test_an_adapter_stands_beside_its_base_without_a_second_copy(tokenizer, corpus):
    base = small(tokenizer, 0)
    before = source(base, corpus).block(0).acts
    adapter = LoraConfig(r=4, target_modules=["q_proj"], init_lora_weights=False)
    tuned = get_peft_model(base, adapter).eval()
    plain = WithoutAdapter(tuned)
    pair = Pair(source(plain, corpus), source(tuned, corpus))
    a, b, apart = pair.block(0).acts.split(32, dim=1)
    torch.testing.assert_close(a, before)
    assert apart.norm() > 0.01 * a.norm()
    tuned.requires_grad_(False)
    source(plain, corpus).block(0)  # peft makes an adapter trainable when it switches it on
    assert not any(p.requires_grad for p in tuned.parameters())
    own = {p.data_ptr() for p in tuned.parameters()}
    assert {p.data_ptr() for p in plain.parameters()} == own
    torch.testing.assert_close(source(tuned, corpus).block(0).acts, b)  # on again
    with pytest.raises(ValueError, match="need a PEFT model"):
        WithoutAdapter(torch.nn.Linear(2, 2))


def test_tokens_that_end_together_are_paired(tokenizer):
    characters = sorted(set("abcdefghijklmnopqrstuvwxyz ?."))
    vocabulary = {c: i for i, c in enumerate(["<unk>", *characters])}
    by_character = Tokenizer(models.WordLevel(vocabulary, unk_token="<unk>"))
    by_character.pre_tokenizer = pre_tokenizers.Split(Regex("."), "isolated")
    other = PreTrainedTokenizerFast(tokenizer_object=by_character, unk_token="<unk>")
    a, b = small(tokenizer, 0), small(other, 1, d_model=16)
    texts = ["what is the colour of a cow ?", "how many eggs ?", "a cow"]
    options = {"seq_len": 40, "batch_rows": 2}
    joined = AlignedHarvester([a, b], [tokenizer, other], texts, [SITE, SITE], **options)
    pair = Pair(joined)
    assert pair.sites == {"a": 32, "b": 16}
    assert joined.share == sum(len(t.split()) for t in texts) / sum(map(len, texts))
    seen = 0
    for i, part in enumerate((texts[:2], texts[2:])):
        block = joined.block(i)
        right = []
        for row, text in enumerate(part):
            ends = [j for j, c in enumerate(text + " ") if c == " "]
            right += [(2 * i + row, end - 1) for end in ends]
        whole = source(b, joined.corpora[1].rows(2 * i, 2 * i + 2)).block(0)
        place = {(2 * i + r, p): x for r, p, x in zip(
            whole.rows.tolist(), whole.positions.tolist(), whole.acts, strict=True
        )}  # fmt: skip
        rows = block.rows.tolist()
        assert rows == [row for row, _ in right]
        for x, key in zip(block.acts[:, 32:], right, strict=True):
            torch.testing.assert_close(x, place[key], rtol=1e-4, atol=1e-5)
        words = tokenizer.convert_ids_to_tokens(block.ids.tolist())
        assert words == [word for text in part for word in text.split()]
        seen += len(words)
    assert seen == sum(len(text.split()) for text in texts)
    rows = [tokenizer(text)["input_ids"] for text in texts]
    again, words = paired(
        (a, b), (tokenizer, other), (SITE, SITE), of_rows(rows, tokenizer, "texts"), batch_rows=2
    )
    assert words.ids[words.mask].tolist() == [i for row in rows for i in row]
    for i in range(2):
        torch.testing.assert_close(again.block(i).acts, joined.block(i).acts)


def test_paired_finds_out_whether_the_tokenizer_is_shared(tokenizer, corpus):
    a, b = small(tokenizer, 0), small(tokenizer, 1)
    pair, same = paired((a, b), (tokenizer, tokenizer), (SITE, "blocks.0.hook_resid_mid"), corpus)
    assert same is corpus and pair.equal_width
    with pytest.raises(ValueError, match="no hook name"):
        paired((a, b), (tokenizer, tokenizer), (SITE, "blocks.7.hook_resid_mid"), corpus)
