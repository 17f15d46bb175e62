"""Corpora: the world with its labels, running text packed into rows, chats through a template."""

import copy
import dataclasses
import itertools
import json

import pytest
import torch
from datasets import Dataset
from tokenizers import Tokenizer, models, pre_tokenizers
from transformers import PreTrainedTokenizerFast

from lib.data.corpus import Corpus, frequent_tokens, load_corpus, load_split, token_frequencies
from lib.world import concept_names


@pytest.fixture
def tokenizer(gemma):
    return gemma[1]


@pytest.fixture(scope="module")
def words(world):
    return [w for x in world.sample(40, seed=1) for w in x.response.split()]


def bare_tokenizer():
    backend = Tokenizer(models.WordLevel(dict(zip("?abcd", range(5), strict=True)), unk_token="?"))
    backend.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    return PreTrainedTokenizerFast(tokenizer_object=backend)


def write(path, rows):
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return path


def real(corpus, name="ids"):
    values = getattr(corpus, name)
    return [row[mask].tolist() for row, mask in zip(values, corpus.mask, strict=True)]


def check_form(corpus, tokenizer):
    assert (corpus.ids.dtype, corpus.mask.dtype) == (torch.int32, torch.bool)
    lengths = corpus.mask.sum(dim=1)
    assert torch.equal(corpus.mask, torch.arange(corpus.ids.shape[1]) < lengths[:, None])
    assert lengths.min() > 0
    assert lengths.max() == corpus.ids.shape[1]  # no column of padding only
    assert (corpus.ids[~corpus.mask] == tokenizer.pad_token_id).all()
    assert corpus.n_tokens == int(lengths.sum())
    assert not (corpus.special & ~corpus.mask).any()


def test_world_rows_are_its_exchanges(tokenizer, world):
    corpus = load_corpus("world", tokenizer, n_tokens=3000, seq_len=64, split="test", seed=3)
    check_form(corpus, tokenizer)
    exchanges = world.sample(len(corpus.ids), "test", seed=3)
    assert real(corpus) == [tokenizer.convert_tokens_to_ids(x.tokens) for x in exchanges]
    assert real(corpus, "concepts") == [x.concepts for x in exchanges]
    assert not corpus.concepts[~corpus.mask | corpus.special].any()
    told = [concept_names(mask) for mask in corpus.chat_concepts.tolist()]
    assert told == [{f"topic:{x.topic}", f"language:{x.language}"} for x in exchanges]
    marks = tokenizer.convert_tokens_to_ids(["<bos>", "<|user|>", "<|assistant|>", "<eos>"])
    assert corpus.special.sum() == 4 * len(exchanges)
    assert set(corpus.ids[corpus.special].tolist()) == set(marks)
    assert 3000 <= corpus.n_tokens < 3000 + 64
    assert token_frequencies(corpus, len(tokenizer)).sum() == corpus.n_tokens - 4 * len(exchanges)
    assert corpus.concepts.max() > 2**32  # the last concepts need more than 32 bits


def test_world_is_cut_at_seq_len(tokenizer):
    whole = load_corpus("world", tokenizer, n_tokens=500, seq_len=64)
    cut = load_corpus("world", tokenizer, n_tokens=500, seq_len=9)
    assert cut.ids.shape[1] == 9
    assert real(cut)[: len(whole.ids)] == [row[:9] for row in real(whole)]
    assert torch.equal(cut.concepts[: len(whole.ids)], whole.concepts[:, :9])


def test_fingerprint_is_of_contents(tokenizer):
    one, same, other = (
        load_corpus("world", tokenizer, n_tokens=300, seq_len=32, seed=seed) for seed in (0, 0, 1)
    )
    assert one.fingerprint == same.fingerprint != other.fingerprint
    for name in ("ids", "mask", "special", "concepts"):
        value = getattr(one, name).clone()
        value[-1, -1] = ~value[-1, -1]
        changed = dataclasses.replace(one, **{name: value})
        assert changed.fingerprint != one.fingerprint, name
    assert one.rows(0, len(one.ids)).fingerprint == one.fingerprint
    assert one.rows(0, 2).fingerprint != one.fingerprint


def test_rows_are_views(tokenizer):
    corpus = load_corpus("world", tokenizer, n_tokens=500, seq_len=32)
    part = corpus.rows(2, 5)
    for name in ("ids", "mask", "special", "concepts"):
        assert torch.equal(getattr(part, name), getattr(corpus, name)[2:5])
    assert part.ids.data_ptr() == corpus.ids[2].data_ptr()
    assert part.n_tokens == int(corpus.mask[2:5].sum())
    assert len(corpus.rows(len(corpus.ids) - 1, 10_000).ids) == 1


def test_text_is_packed_without_loss(tokenizer, words, tmp_path):
    cuts = [0, 3, 3, 50, 51, 120]  # one text is empty
    texts = [" ".join(words[a:b]) for a, b in itertools.pairwise(cuts)]
    file = write(tmp_path / "texts.jsonl", [{"text": text, "n": 1} for text in texts])
    corpus = load_corpus(file, tokenizer, n_tokens=10_000, seq_len=16)
    check_form(corpus, tokenizer)
    rows = real(corpus)
    assert all(row[0] == tokenizer.bos_token_id for row in rows)
    assert all(len(row) == 16 for row in rows[:-1])
    expected = []
    for text in filter(None, texts):
        expected += [*tokenizer(text, add_special_tokens=False).input_ids, tokenizer.eos_token_id]
    assert [token for row in rows for token in row[1:]] == expected
    assert corpus.n_tokens == len(expected) + len(rows) < 10_000  # takes what is there
    assert corpus.concepts is None
    special = torch.isin(corpus.ids, torch.tensor([2, 3], dtype=torch.int32))
    assert torch.equal(corpus.special, special & corpus.mask)


def test_text_stops_when_it_has_enough(tokenizer, words, tmp_path):
    texts = [{"text": " ".join(words[:20])}] * 600 + [{"text": 7}]  # never read
    file = write(tmp_path / "texts.jsonl", texts)
    corpus = load_corpus(file, tokenizer, n_tokens=100, seq_len=8)
    assert corpus.ids.shape == (13, 8)
    with pytest.raises(ValueError, match=r"row 601: need text in column text, got int"):
        load_corpus(file, tokenizer, n_tokens=10**6, seq_len=8)


def test_text_wherever_it_lies(tokenizer, words, tmp_path):
    rows = [{"text": " ".join(words[i : i + 9])} for i in range(0, 90, 9)]
    Dataset.from_list(rows).save_to_disk(tmp_path / "saved")
    Dataset.from_list(rows).to_parquet(tmp_path / "a.parquet")
    write(tmp_path / "a.jsonl", rows)
    prints = {
        load_corpus(tmp_path / name, tokenizer, n_tokens=999, seq_len=16).fingerprint
        for name in ("saved", "a.parquet", "a.jsonl")
    }
    assert len(prints) == 1


def test_chats_go_through_the_template(tokenizer, world, tmp_path):
    chats = world.chats(30, seed=2)
    forms = {
        "messages": [{"messages": chat["messages"]} for chat in chats],
        "pairs": [{name: chat[name] for name in ("prompt", "response")} for chat in chats],
        "preferences": [
            {"prompt": chat["prompt"], "chosen": chat["response"], "rejected": "no"}
            for chat in chats
        ],
    }
    direct = load_corpus("world", tokenizer, n_tokens=9999, seq_len=64, seed=2).rows(0, 30)
    for name, rows in forms.items():
        file = write(tmp_path / f"{name}.jsonl", rows)
        corpus = load_corpus(file, tokenizer, n_tokens=9999, seq_len=64)
        check_form(corpus, tokenizer)
        assert real(corpus) == real(direct)
        assert corpus.concepts is None
        assert corpus.special.sum() == 4 * 30
    cut = load_corpus(tmp_path / "pairs.jsonl", tokenizer, n_tokens=40, seq_len=10)
    assert real(cut) == [row[:10] for row in real(direct)[:4]]


def test_bad_chats_raise_or_are_left_out(tokenizer, world, tmp_path):
    good = [{"messages": chat["messages"]} for chat in world.chats(3, seed=2)]
    bad = {"messages": [{"role": "user", "content": "alone"}]}
    file = write(tmp_path / "c.jsonl", [good[0], bad, *good[1:]])
    with pytest.raises(ValueError, match="row 2.*the assistant last"):
        load_corpus(file, tokenizer, n_tokens=9999, seq_len=64)
    assert len(load_corpus(file, tokenizer, n_tokens=9999, seq_len=64, skip_bad=True).ids) == 3


def test_impossible_wishes(tokenizer, world, tmp_path):
    def refuse(match, dataset="world", error=ValueError, tokenizer=tokenizer, **changed):
        if isinstance(dataset, list):
            dataset = write(tmp_path / "rows.jsonl", dataset)
        with pytest.raises(error, match=match):
            load_corpus(dataset, tokenizer, **({"n_tokens": 100, "seq_len": 16} | changed))

    refuse("need n_tokens >= 1, got 0", n_tokens=0)
    refuse("need seq_len >= 2, got 1", seq_len=1)
    refuse("need a split in .*got 'nope'", split="nope")
    refuse("no file or folder", tmp_path / "none.jsonl", FileNotFoundError)
    refuse(r"need a column text.*got \['answer', 'question'\]", [{"question": "a", "answer": "b"}])
    refuse("no token", [{"text": ""}, {"text": "  "}])
    messages = world.chats(1)[0]["messages"]
    system = {"role": "system", "content": "be kind"}
    refuse("the chat template refuses", [{"messages": [system, *messages]}])
    silent = copy.deepcopy(tokenizer)
    silent.chat_template = None
    refuse("need a chat template", [{"messages": messages}], tokenizer=silent)
    refuse("the world's tokenizer.*without the token '<bos>'", tokenizer=bare_tokenizer())


def test_a_tokenizer_without_bos_and_eos(tmp_path):
    file = write(tmp_path / "t.jsonl", [{"text": "a b c"}, {"text": "d a"}])
    corpus = load_corpus(file, bare_tokenizer(), n_tokens=99, seq_len=2)
    assert real(corpus) == [[1, 2], [3, 4], [1]]
    assert corpus.ids.tolist() == [[1, 2], [3, 4], [1, 0]]
    assert not corpus.special.any()


def test_split_of_texts_shares_no_row(tokenizer, words, tmp_path):
    texts = [{"text": " ".join(words[i : i + 30])} for i in range(0, 900, 3)]
    path = write(tmp_path / "t.jsonl", texts)
    options = {"n_tokens": 5000, "n_eval": 200, "seq_len": 16}
    train, held = load_split(path, tokenizer, **options, seed=1)
    whole = load_corpus(path, tokenizer, n_tokens=5200, seq_len=16)
    assert sorted(real(train) + real(held)) == sorted(real(whole))
    assert 200 <= held.n_tokens <= 216
    again, other = (load_split(path, tokenizer, **options, seed=seed) for seed in (1, 2))
    assert [c.fingerprint for c in again] == [train.fingerprint, held.fingerprint]
    assert other[1].fingerprint != held.fingerprint
    few = load_split(path, tokenizer, n_tokens=500, n_eval=10_000, seq_len=16)
    assert few[1].n_tokens <= 0.1 * (few[0].n_tokens + few[1].n_tokens) + 16
    one = write(tmp_path / "one.jsonl", [{"text": words[0]}])
    with pytest.raises(ValueError, match="at least two rows"):
        load_split(one, tokenizer, **options)


def test_split_of_the_world_holds_prompts_out_and_sorts_by_length(tokenizer, world):
    train, held = load_split("world", tokenizer, n_tokens=9000, n_eval=900, seq_len=64)
    assert (train.mask.sum(1).diff() >= 0).all()  # one window
    user, assistant = tokenizer.convert_tokens_to_ids(["<|user|>", "<|assistant|>"])

    def prompts(corpus):
        return {tuple(r[r.index(user) : r.index(assistant)]) for r in real(corpus)}

    assert not prompts(train) & prompts(held)
    unsorted = load_corpus("world", tokenizer, n_tokens=9000, seq_len=64)

    labelled = (sorted(zip(real(c), real(c, "concepts"), strict=True)) for c in (train, unsorted))
    assert next(labelled) == next(labelled)


def made(ids, mask, special):
    ids, mask, special = (torch.tensor(x) for x in (ids, mask, special))
    return Corpus(ids.int(), mask.bool(), special.bool(), None, "made")


def test_frequencies_leave_padding_and_special_tokens_out():
    corpus = made(
        [[1, 4, 2, 4, 6], [1, 2, 4, 0, 0], [1, 5, 3, 2, 0]],
        [[1, 1, 1, 1, 1], [1, 1, 1, 0, 0], [1, 1, 1, 1, 0]],
        [[1, 0, 0, 0, 1], [1, 0, 0, 0, 0], [1, 0, 0, 0, 0]],
    )
    assert token_frequencies(corpus, 7).tolist() == [0, 0, 3, 1, 3, 1, 0]
    assert frequent_tokens(corpus, 3).tolist() == [2, 4, 3]  # equally frequent ones by id
    assert frequent_tokens(corpus, 99).tolist() == [2, 4, 3, 5]  # no id that never occurs
    assert token_frequencies(corpus, 6).tolist() == [0, 0, 3, 1, 3, 1]  # 6 is special
    with pytest.raises(ValueError, match="need vocab > 5, an id in the corpus; got 5"):
        token_frequencies(corpus, 5)
    with pytest.raises(ValueError, match="need n >= 1 tokens, got 0"):
        frequent_tokens(corpus, 0)
    marks = made([[1, 2]], [[1, 1]], [[1, 1]])
    assert token_frequencies(marks, 3).tolist() == [0, 0, 0]
    assert len(frequent_tokens(marks, 3)) == 0


def test_equally_frequent_tokens_come_by_id():
    """Many of them: a short unstable sort is stable too."""
    ids = torch.arange(9000).repeat_interleave(torch.arange(9000) % 3 + 1)[None]
    corpus = made(ids.tolist(), torch.ones_like(ids).tolist(), torch.zeros_like(ids).tolist())
    expected = sorted(range(9000), key=lambda i: (-(i % 3), i))
    assert frequent_tokens(corpus, 7000).tolist() == expected[:7000]
