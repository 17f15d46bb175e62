"""Chats: every schema and kind of file, bad input, mixing, splits, and masks against an oracle."""

import collections
import itertools
import json
import re
import tracemalloc
from pathlib import Path

import datasets
import pyarrow as pa
import pytest
import torch
from datasets import Dataset, DatasetDict, IterableDataset
from tokenizers import AddedToken, Tokenizer, decoders, pre_tokenizers, processors, trainers
from tokenizers.models import BPE, WordLevel
from transformers import ByT5Tokenizer, PreTrainedTokenizerFast
from trl.data_utils import is_conversational

from lib.data import sources
from lib.data.chats import load_chats
from lib.data.mixing import mix, split_by_prompt
from lib.data.tokens import IGNORED, collate, tokenize_chats

U, A, S = "user", "assistant", "system"


@pytest.fixture(autouse=True)
def _cache(tmp_path, monkeypatch):
    monkeypatch.setenv("LATENT_BENCH_DATA", str(tmp_path / "cached"))


def turns(*pairs):
    return [{"role": role, "content": content} for role, content in pairs]


def jsonl(path, rows):
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return path


def plain(n, **extra):
    return [{"prompt": f"p{i}", "response": f"r{i}", **extra} for i in range(n)]


def left_behind(tmp_path):
    return [file for file in (tmp_path / "cached").rglob("*") if file.is_file()]


HELLO = turns((U, "hi"), (A, "yo"))
SCHEMAS = {
    "prompt/response": ({"prompt": "hi", "response": "yo"}, HELLO),
    "prompt/completion": ({"prompt": "hi", "completion": "yo"}, HELLO),
    "prompt/completion lists": ({"prompt": HELLO[:1], "completion": HELLO[1:]}, HELLO),
    "messages": ({"messages": turns((S, "s")) + HELLO}, turns((S, "s")) + HELLO),
    "ShareGPT": (
        {"conversations": [{"from": "human", "value": "hi"}, {"from": "gpt", "value": "yo"}]},
        HELLO,
    ),
    "Alpaca": ({"instruction": "hi", "input": "", "output": "yo"}, HELLO),
    "Alpaca input": (
        {"instruction": "add", "input": "1 2", "output": "3"},
        turns((U, "add\n\n1 2"), (A, "3")),
    ),
    "HelpSteer turns": (
        {"prompt": "a\n<extra_id_1>Assistant\nb\n<extra_id_1>User\nc", "response": "d"}
        | {"helpfulness": 4},
        turns((U, "a"), (A, "b"), (U, "c"), (A, "d")),
    ),
}


@pytest.mark.parametrize("name", SCHEMAS)
def test_every_schema_gives_the_same_chat(name, tmp_path):
    row, messages = SCHEMAS[name]
    path = jsonl(tmp_path / "x.jsonl", [row])
    for got in (load_chats(path)[0], next(iter(load_chats(path, streaming=True)))):
        assert got["messages"] == messages
        assert (got["prompt"], got["response"]) == tuple(t["content"] for t in messages[-2:])
    assert is_conversational(load_chats(path).select_columns("messages")[0])


PREFERENCES = {
    "strings": {"prompt": "hi", "chosen": "yo", "rejected": "no"},
    "lists": {"prompt": HELLO[:1], "chosen": HELLO[1:], "rejected": turns((A, "no"))},
    "whole chats": {"prompt": "hi", "chosen": HELLO, "rejected": [HELLO[0], *turns((A, "no"))]},
    "HH": {
        "chosen": "\n\nHuman: hi\n\nAssistant: yo",
        "rejected": "\n\nHuman: hi\n\nAssistant: no",
    },
}


@pytest.mark.parametrize("name", PREFERENCES)
def test_preferences_are_what_trl_takes(name, tmp_path):
    row = load_chats(jsonl(tmp_path / "x.jsonl", [PREFERENCES[name]]))[0]
    assert row.pop("id")
    assert row == {"prompt": HELLO[:1], "chosen": HELLO[1:], "rejected": turns((A, "no"))}
    assert is_conversational(row)


def test_every_kind_of_file_gives_the_same_rows(tmp_path, monkeypatch):
    same = {"response": 'r "x"' + "b" * 200_000, "topic": "t"}
    rows = [{"id": str(i), "prompt": f"p,\n{i} é", **same} for i in range(3)]
    raw = Dataset.from_list(rows)
    jsonl(tmp_path / "a.jsonl", rows)
    (tmp_path / "a.json").write_text("\ufeff" + json.dumps(rows))
    raw.to_csv(tmp_path / "a.csv")
    raw.to_parquet(tmp_path / "a.parquet")
    raw.save_to_disk(tmp_path / "disk")
    DatasetDict(train=raw, test=raw.select([0])).save_to_disk(tmp_path / "splits")
    (tmp_path / "folder").mkdir()
    jsonl(tmp_path / "folder" / "train-0.jsonl", rows[:2])
    jsonl(tmp_path / "folder" / "train-1.jsonl", rows[2:])
    jsonl(tmp_path / "folder" / "test.jsonl", rows[:1])
    want = load_chats(tmp_path / "a.jsonl").to_list()
    assert [row["topic"] for row in want] == ["t"] * 3
    assert want[1]["prompt"] == "p,\n1 é"
    for name in ("a.jsonl", "a.json", "a.csv", "a.parquet", "disk", "splits", "folder"):
        assert load_chats(tmp_path / name).to_list() == want, name
        assert list(load_chats(str(tmp_path / name), streaming=True)) == want, name
    for name in ("splits", "folder"):
        assert load_chats(tmp_path / name, split="test")["id"][:] == ["0"]
        with pytest.raises(ValueError, match="no split 'dev'; it has 'test', 'train'"):
            load_chats(tmp_path / name, split="dev")
    assert len(load_chats(tmp_path / "a.csv", limit=2)) == 2
    monkeypatch.setenv("LATENT_BENCH_ROOT", str(tmp_path))
    assert load_chats("a.jsonl").to_list() == want


def test_a_hub_id_goes_to_the_hub_and_scores_come_along(monkeypatch):
    rows = [{"prompt": "hi", "response": f"r{i}", "helpfulness": i} for i in range(2)]
    asked = []

    def load_dataset(*args, **kwargs):
        asked.append((args, kwargs))
        return Dataset.from_list(rows)

    monkeypatch.setattr(datasets, "load_dataset", load_dataset)
    assert load_chats("nvidia/HelpSteer2", split="validation")["helpfulness"][:] == [0.0, 1.0]
    assert asked == [(("nvidia/HelpSteer2",), {"split": "validation", "streaming": False})]


def test_missing_ids_are_stable_and_unique(tmp_path):
    rows = [*plain(2), plain(1)[0]]
    one = load_chats(jsonl(tmp_path / "a.jsonl", rows))["id"][:]
    two = load_chats(jsonl(tmp_path / "b.jsonl", rows[::-1]))["id"][:]
    assert len(set(one)) == 3
    assert set(one) == set(two)
    assert one[2] == f"{one[0]}-2"


def test_a_changed_file_is_read_again(tmp_path):
    loaded = []
    for word in ("one", "two", "two"):
        path = jsonl(tmp_path / "a.jsonl", [{"prompt": "p", "response": word}])
        loaded.append(load_chats(path))
        assert loaded[-1][0]["response"] == word
    assert len({chats.cache_files[0]["filename"] for chats in loaded}) == 2


GOOD = b'{"prompt": "a", "response": "b"}\n'
BAD = {
    "schema": (b'{"text": "x"}\n', r"a.jsonl line 1: unknown schema. Columns seen: text. .*Alpaca"),
    "json": (GOOD + b'{"prompt"\n', "a.jsonl line 2 column .* not JSON"),
    "object": (b"[1]\n", "line 1: need a JSON object, got list"),
    "utf8": (GOOD + b'{"prompt": "\xff"}\n', r"a.jsonl line 2: byte 45 \(0xff\)"),
    "empty file": (b"", "a.jsonl is empty"),
    "blank": (b"\n\n", "has no rows"),
    "surrogate": (GOOD.replace(b"a", rb"\ud800"), "prompt: character 0 is half"),
    "surrogate id": (rb'{"id": "\ud800", ' + GOOD[1:], "line 1.* id: character 0 is half"),
    "list topic": (b'{"topic": ["x"], ' + GOOD[1:], "topic: need text or a number, got list"),
    "long number": (b'{"id": ' + b"1" * 5000 + b"}\n", "line 1 is not JSON that can be"),
    "twice": ((b'{"id": 7, ' + GOOD[1:]) * 3, r"2 rows repeat .* '7' \(a.jsonl"),
    "null": (GOOD.replace(b'"b"', b"null"), "response: need text, got NoneType"),
    "kinds": (
        GOOD + b'{"prompt": "a", "chosen": "b", "rejected": "c"}\n',
        "line 2: chats and preferences cannot share",
    ),
    "quote.csv": (b'prompt,response\na,b\nc,"d\n', "quote.csv line 3 is not CSV"),
    "wide.csv": (b"prompt,response\na,b,c\n", "wide.csv line 2: more fields"),
    "a.parquet": (b"nothing", "a.parquet is not Parquet"),
    "a.txt": (b"x", "cannot read '.txt'; need .csv, .json"),
}


@pytest.mark.parametrize("name", BAD)
def test_bad_files_are_refused_and_leave_nothing(name, tmp_path):
    data, message = BAD[name]
    path = tmp_path / (name if "." in name else "a.jsonl")
    path.write_bytes(data)
    with pytest.raises(ValueError, match=message):
        load_chats(path)
    assert left_behind(tmp_path) == []


BAD_TURNS = {
    "empty": (turns((U, "a"), (A, "  ")), "messages turn 2 is empty"),
    "role": (turns((U, "a"), ("tool", "b")), "unknown role 'tool'"),
    "assistant first": (turns((A, "a"), (U, "b")), "turn 1 has role 'assistant'; need 'user'"),
    "no assistant": (turns((S, "s"), (U, "a")), "no assistant turn"),
    "two users": (turns((U, "a"), (U, "b"), (A, "c")), "turn 2 has role 'user'"),
    "late system": (turns((U, "a"), (S, "b"), (A, "c")), "turn 2 has role 'system'"),
    "user last": (turns((U, "a"), (A, "b"), (U, "c")), "ends with a user turn"),
    "nothing": ([], "no user and assistant turns"),
}


@pytest.mark.parametrize("name", BAD_TURNS)
def test_turns_that_are_no_chat_are_refused(name, tmp_path):
    messages, message = BAD_TURNS[name]
    path = jsonl(tmp_path / "a.jsonl", [{"messages": HELLO}, {"messages": messages}])
    with pytest.raises(ValueError, match=f"1 rows .*a.jsonl line 2: .*{message}"):
        load_chats(path)
    with pytest.raises(ValueError, match=f"a.jsonl line 2: .*{message}"):
        list(load_chats(path, streaming=True))
    assert left_behind(tmp_path) == []
    assert len(load_chats(path, skip_bad=True)) == 1


def test_empty_responses_are_counted_and_the_first_are_named(tmp_path):
    rows = [row | {"response": ""} if i % 2 else row for i, row in enumerate(plain(20))]
    with pytest.raises(ValueError, match=r"10 rows .*line 2: response is empty; .*line 10: .*…"):
        load_chats(jsonl(tmp_path / "a.jsonl", rows))


def test_a_huge_line_is_refused_without_being_read(tmp_path):
    path = tmp_path / "a.jsonl"
    with path.open("wb") as stream:
        stream.write(b'{"prompt": "a", "response": "')
        stream.truncate(100 * 2**20)
    tracemalloc.start()
    with pytest.raises(ValueError, match=f"line 1 is longer than {sources.MAX_LINE} bytes"):
        load_chats(path)
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert peak < 4 * sources.MAX_LINE


@pytest.mark.parametrize("name", ["./none", "data/none.jsonl", "a/b/c", "/none", Path("none")])
def test_a_path_without_a_file_is_not_a_hub_id(name):
    with pytest.raises(FileNotFoundError, match=r"none|a/b/c"):
        load_chats(name)


def numbered(tmp_path, name, n, **extra):
    rows = [{"id": i, **row} for i, row in enumerate(plain(n, source=name, **extra))]
    return load_chats(jsonl(tmp_path / f"{name}.jsonl", rows))


def test_mix_is_exact_seeded_and_without_repeats(tmp_path):
    parts = [numbered(tmp_path, name, 50, topic="t") for name in "ab"]
    parts.append(numbered(tmp_path, "c", 50))  # has no topic
    mixed = mix(parts, [1, 1, 1], n=100, seed=1)
    assert sorted(collections.Counter(mixed["source"]).values()) == [33, 33, 34]
    assert len(set(mixed["id"])) == 100
    assert len(set(zip(mixed["source"], mixed["prompt"], strict=True))) == 100
    assert mixed.to_list() == mix(parts, [1, 1, 1], n=100, seed=1).to_list()
    assert mixed["prompt"][:] != mix(parts, [1, 1, 1], n=100, seed=2)["prompt"][:]
    assert mixed["source"][:] != sorted(mixed["source"])
    assert collections.Counter(mix(parts, [3, 1, 1])["source"]) == {"a": 50, "b": 17, "c": 16}


def test_mix_refuses_what_it_cannot_do(tmp_path):
    parts = [numbered(tmp_path, name, 10) for name in "ab"]
    with pytest.raises(ValueError, match="part 1 has 10 rows, 5 too few for its 15"):
        mix(parts, [1, 3], n=20)
    for weights in ([1], [1, 0], [1, -1], [1, float("nan")]):
        with pytest.raises(ValueError, match="weight"):
            mix(parts, weights)
    pairs = load_chats(jsonl(tmp_path / "p.jsonl", [PREFERENCES["strings"]]))
    with pytest.raises(ValueError, match="cannot be mixed"):
        mix([parts[0], pairs], [1, 1])


def test_a_prompt_stays_in_one_split_and_topics_keep_their_shares(tmp_path):
    named = [
        (f"{topic}{i % (n * 2 // 3)}", topic)
        for topic, n in (("math", 300), ("food", 150), ("rare", 6))
        for i in range(n)
    ] + [(f"one{i}", f"alone{i}") for i in range(100)]
    rows = [{"prompt": p, "response": f"{i}", "topic": t} for i, (p, t) in enumerate(named)]
    chats = load_chats(jsonl(tmp_path / "a.jsonl", rows))
    fractions = {"train": 0.8, "dev": 0.1, "test": 0.1}
    parts = split_by_prompt(chats, fractions, stratify_by="topic", seed=3)
    prompts = [set(part["prompt"]) for part in parts.values()]
    assert sum(map(len, prompts)) == len(set.union(*prompts))
    assert sorted(i for part in parts.values() for i in part["id"]) == sorted(chats["id"])
    for name, fraction in fractions.items():
        assert abs(len(parts[name]) - fraction * len(chats)) <= 2
        counts = collections.Counter(parts[name]["topic"])
        for topic, n in (("math", 300), ("food", 150)):
            assert abs(counts[topic] - fraction * n) <= 4
    for seed in (3, 4):
        again = split_by_prompt(chats, fractions, stratify_by="topic", seed=seed)
        assert (again["test"]["id"][:] == parts["test"]["id"][:]) == (seed == 3)


def test_split_refuses_what_it_cannot_do(tmp_path):
    chats = numbered(tmp_path, "a", 10)
    for fractions in ({"a": 0.5, "b": 0.4}, {"a": 1.2, "b": -0.2}, {}):
        with pytest.raises(ValueError, match="fractions that sum to 1"):
            split_by_prompt(chats, fractions)
    with pytest.raises(ValueError, match="no column 'topic'"):
        split_by_prompt(chats, {"a": 0.5, "b": 0.5}, stratify_by="topic")
    with pytest.raises(ValueError, match="10 prompts are too few: nothing for b"):
        split_by_prompt(chats, {"a": 0.99, "b": 0.01})
    rows = [PREFERENCES["strings"] | {"prompt": prompt} for prompt in "xxyy"]
    halves = split_by_prompt(load_chats(jsonl(tmp_path / "p.jsonl", rows)), {"a": 0.5, "b": 0.5})
    for half in halves.values():
        assert len({row["prompt"][0]["content"] for row in half}) == 1


SPECIAL = [
    *("<pad>", "<s>", "</s>", "<|im_start|>", "<|im_end|>", "<|eot_id|>", "<|sep|>"),
    *("<|start_header_id|>", "<|end_header_id|>"),
    *("<start_of_turn>", "<end_of_turn>", "[INST]", "[/INST]"),
]


def after(text, marker):
    return text.split(marker)[-1].lstrip("\n")


def chatml(role, text, last):
    return [(f"<|im_start|>{role}\n", 0), (f"{text}<|im_end|>", role == A), ("\n", 0)]


def shouting(role, text, last):
    return chatml(role, text.upper(), last)


def llama3(role, text, last):
    head = f"<|start_header_id|>{role}<|end_header_id|>\n\n"
    return [(head, 0), (f"{text.strip()}<|eot_id|>", role == A)]


def gemma(role, text, last):
    head = f"<start_of_turn>{'model' if role == A else role}\n"
    return [(head, 0), (f"{text.strip()}<end_of_turn>", role == A), ("\n", 0)]


def mistral(role, text, last):
    return [(" ", 0), (f"{text}</s>", 1)] if role == A else [(f"[INST] {text} [/INST]", 0)]


def llama2(role, text, last):
    return mistral(role, text.strip() + " " * (role == A), last)


def aliased(role, text, last):
    return [(f"{role}: ", 0), (f"{text}<|sep|>", role == A)]


def thinking(role, text, last):
    return chatml(role, after(text, "</think>") if role == A and not last else text, last)


def rethinking(role, text, last):
    """Qwen 3's form: the thought is taken off and put back."""
    if role != A or "</think>" not in text or not last:
        return thinking(role, text, last)
    thought = text.split("</think>")[0].split("<think>")[-1].strip("\n")
    return chatml(role, f"<think>\n{thought}\n</think>\n\n{after(text, '</think>')}", last)


def endless(role, text, last):
    return [(f"\n\n### {role}:\n", 0), (text, role == A)] + [("</s>", 1)] * last


def each(body):
    """The template that writes `body` for every message `m` of content `c`."""
    return f"{{% for m in messages %}}{{% set c = m.content %}}{body}{{% endfor %}}"


TURN = "{{ '<|im_start|>' + m.role + '\n' + c + '<|im_end|>\n' }}"
ANSWER = "{% if m.role == 'assistant' %}"
CHATML = each(TURN)
MISTRAL = each(
    ANSWER + "{{ ' ' + c + eos_token }}{% else %}{{ '[INST] ' + c + ' [/INST]' }}{% endif %}"
)
TEMPLATES = {
    "chatml": (CHATML, chatml),
    "shouting": (CHATML.replace("m.content", "m.content | upper"), shouting),
    "llama3": (each(
        "{{ '<|start_header_id|>' + m.role + '<|end_header_id|>\n\n' + c | trim + '<|eot_id|>' }}"
    ), llama3),
    "gemma": (each(
        "{{ '<start_of_turn>' + ('model' if m.role == 'assistant' else m.role) + '\n' "
        "+ c | trim + '<end_of_turn>\n' }}"
    ), gemma),
    "mistral": (MISTRAL, mistral),
    "llama2": (each(
        ANSWER + "{{ ' ' + c | trim + ' ' + eos_token }}{% else %}"
        "{{ '[INST] ' + c | trim + ' [/INST]' }}{% endif %}"
    ), llama2),
    "aliased": (each("{{ m.role + ': ' + c + '<|sep|>' }}"), aliased),
    "thinking": (each(
        "{% if m.role == 'assistant' and not loop.last %}"
        "{% set c = c.split('</think>')[-1].lstrip('\n') %}{% endif %}" + TURN
    ), thinking),
    "rethinking": (each(
        ANSWER + "{% set c = m.content.split('</think>')[-1].lstrip('\n') %}"
        "{% if loop.last and '</think>' in m.content %}{% set t = "
        "m.content.split('</think>')[0].split('<think>')[-1].strip('\n') %}"
        "{% set c = '<think>\n' + t + '\n</think>\n\n' + c %}{% endif %}{% endif %}" + TURN
    ), rethinking),
    "generation": (each(
        ANSWER + "<|im_start|>assistant\n{% generation %}{{ c + '<|im_end|>\n' }}"
        "{% endgeneration %}{% else %}" + TURN + "{% endif %}"
    ), chatml),
    "endless": (each("{{ '\n\n### ' + m.role + ':\n' + c }}") + "</s>", endless),
}  # fmt: skip
THOUGHT = "<think>\n1 + 1\n</think>\n\nIt is 2."
CHATS = [
    HELLO,
    turns((U, "Say: yes."), (A, "yes."), (U, "yes."), (A, "yes."), (U, "no"), (A, "Say: yes.")),
    turns((U, "é 🙂 naïve"), (A, "çà 🙂\n\nva  bien\n"), (U, " sp "), (A, "  two  \n spaces  ")),
    turns((U, "user assistant"), (A, "assistant\nuser"), (U, "assistant"), (A, "model")),
    turns((U, "sum"), (A, THOUGHT), (U, "so"), (A, "It is 2.")),
    turns((U, "a"), (A, "b"), (U, "sum"), (A, THOUGHT)),
    turns((U, "x"), (A, "ends in a space "), (U, "y"), (A, "z ")),
    turns((U, "x"), (A, "\n\nassistant\n\n"), (U, "\n"), (A, " [a] <b> ] ")),
]


@pytest.fixture(scope="module", params=[420, 256], ids=["merging", "bytes"])
def bpe(request):
    """Byte-level BPE that merges over any border, or never; trims spaces off offsets as GPT-2's."""
    tokenizer = Tokenizer(BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    tokenizer.post_processor = processors.ByteLevel(trim_offsets=True)
    tokenizer.decoder = decoders.ByteLevel()
    said = [(turn["role"], turn["content"], False) for chat in CHATS for turn in chat]
    corpus = [by_hand(*turn) for _, by_hand in TEMPLATES.values() for turn in said]
    words = re.compile("|".join(map(re.escape, SPECIAL)))
    pieces = [piece for row in corpus for piece in words.split("".join(text for text, _ in row))]
    options = {"vocab_size": request.param, "show_progress": False}
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    trainer = trainers.BpeTrainer(initial_alphabet=alphabet, **options)
    tokenizer.train_from_iterator([p for p in pieces if p] * 3, trainer)
    tokenizer.add_special_tokens([AddedToken(token, special=True) for token in SPECIAL])
    return tokenizer


def wrapped(bpe, template, end="</s>"):
    names = {"bos_token": "<s>", "eos_token": end, "pad_token": end}
    return PreTrainedTokenizerFast(tokenizer_object=bpe, chat_template=template, **names)


def as_dataset(chats):
    return Dataset.from_list([{"id": str(i), "messages": chat} for i, chat in enumerate(chats)])


def masked_text(tokenizer, row):
    return tokenizer.decode([*itertools.compress(row["input_ids"], row["assistant_mask"])])


def expected_mask(tokenizer, ids, pieces):
    """Counts bytes of tokens and of pieces; knows nothing of offsets or of Jinja."""
    wanted = b"".join(bytes([flag]) * len(text.encode()) for text, flag in pieces)
    mask, at = [], 0
    for token in tokenizer.convert_ids_to_tokens(ids):
        length = len(token)  # in a byte-level vocabulary a character is a byte; specials are ASCII
        mask.append(int(1 in wanted[at : at + length]))
        at += length
    assert at == len(wanted)
    return mask


@pytest.mark.parametrize("name", TEMPLATES)
def test_the_mask_is_right_for_the_template(name, bpe):
    template, by_hand = TEMPLATES[name]
    tokenizer = wrapped(bpe, template, "<|sep|>" if name == "aliased" else "</s>")
    tokens, truncation = tokenize_chats(as_dataset(CHATS), tokenizer, max_len=10_000)
    crossed = 0
    for chat, row in zip(CHATS, tokens, strict=True):
        *earlier, (role, content) = [(turn["role"], turn["content"]) for turn in chat]
        pieces = [piece for turn in earlier for piece in by_hand(*turn, False)]
        pieces += by_hand(role, content, True)
        assert tokenizer.decode(row["input_ids"]) == "".join(text for text, _ in pieces)
        assert row["assistant_mask"] == expected_mask(tokenizer, row["input_ids"], pieces)
        exact = "".join(text for text, flag in pieces if flag)
        crossed += masked_text(tokenizer, row) != exact
        assert len(masked_text(tokenizer, row)) >= len(exact)
    assert truncation.n_tokens_cut == truncation.n_dropped == 0
    merging = bpe.get_vocab_size(with_added_tokens=False) > 256
    if name in ("chatml", "gemma", "endless"):  # else the borders are tested too little
        assert bool(crossed) == merging


def test_masked_text_is_the_answers_and_their_ends(bpe):
    chat = turns((S, "sys"), (U, "one"), (A, "uno"), (U, "uno"), (A, "1"))
    tokenizer = wrapped(bpe, TEMPLATES["aliased"][0], "<|sep|>")
    row = tokenize_chats(as_dataset([chat]), tokenizer, max_len=1000)[0][0]
    longer = {name: row[name] + [0] for name in ("input_ids", "assistant_mask")}
    batch = collate([row, longer], tokenizer.pad_token_id)
    labels = batch["labels"][0]
    assert tokenizer.decode(labels[labels != IGNORED]) == "uno<|sep|>1<|sep|>"
    assert batch["attention_mask"][0].tolist() == [1] * len(row["input_ids"]) + [0]
    assert batch["input_ids"][0, -1] == tokenizer.pad_token_id
    assert labels[-1] == IGNORED
    assert all(value.dtype == torch.long for value in batch.values())


def test_a_turn_that_the_template_drops_is_not_masked(bpe):
    tokenizer = wrapped(
        bpe, each("{% if m.role != 'assistant' or loop.last %}" + TURN + "{% endif %}")
    )
    chat = turns((U, "yes."), (A, "yes."), (U, "yes."), (A, "no"))
    row = tokenize_chats(as_dataset([chat]), tokenizer, max_len=1000)[0][0]
    assert masked_text(tokenizer, row) == "no<|im_end|>"


@pytest.mark.parametrize("streaming", [False, True])
def test_truncation_says_what_it_cut(bpe, streaming):
    tokenizer = wrapped(bpe, CHATML)
    chats = as_dataset([*CHATS, turns((U, "long " * 40), (A, "lost"))])
    full, _ = tokenize_chats(chats, tokenizer, max_len=10_000)
    max_len = sorted(len(ids) for ids in full["input_ids"])[3]
    n_longer = sum(len(ids) > max_len for ids in full["input_ids"])
    given = chats.to_iterable_dataset() if streaming else chats
    cut, truncation = tokenize_chats(given, tokenizer, max_len=max_len)
    assert isinstance(cut, IterableDataset if streaming else Dataset)
    for _ in range(2):  # a second pass counts afresh
        rows = list(cut)
        kept = [row for row in full if any(row["assistant_mask"][:max_len])]
        assert [row["id"] for row in rows] == [row["id"] for row in kept]
        assert [row["input_ids"] for row in rows] == [row["input_ids"][:max_len] for row in kept]
        assert truncation.n_chats == len(chats)
        assert truncation.n_chats_cut == n_longer
        assert truncation.n_tokens == sum(map(len, full["input_ids"]))
        assert truncation.n_tokens_cut == sum(len(row[max_len:]) for row in full["input_ids"])
        n_lost = sum(sum(mask[max_len:]) for mask in full["assistant_mask"])
        assert truncation.n_assistant_tokens_cut == n_lost
        assert truncation.n_dropped == len(chats) - len(kept) >= 1
    assert str(truncation).startswith(f"cut {n_longer} of {len(chats)} chats")


def test_the_same_chats_under_two_templates_are_not_confused(bpe):
    one, two = (
        tokenize_chats(as_dataset(CHATS), wrapped(bpe, template), max_len=99)[0]["input_ids"][:]
        for template in (CHATML, MISTRAL)
    )
    assert list(map(len, one)) != list(map(len, two))


def test_chats_without_ids_may_end_in_a_short_batch(bpe):
    for n in (1, 257):
        chats = Dataset.from_list([{"messages": HELLO}] * n)
        assert len(tokenize_chats(chats, wrapped(bpe, CHATML), max_len=100)[0]) == n


def test_tokenising_refuses_what_it_cannot_do(bpe, tmp_path):
    chats, system = as_dataset(CHATS), turns((S, "s")) + HELLO
    reversing = CHATML.replace("m.content", "(m.content | reverse) + m.content")
    refusing = "{{ raise_exception('no systems') if messages[0].role == 'system' }}x"
    slow = ByT5Tokenizer(chat_template=CHATML)
    for given, tokenizer, max_len, message in (
        (chats, wrapped(bpe, None), 8, "no chat template"),
        (chats, wrapped(bpe, CHATML), 0, "max_len >= 1, got 0"),
        (chats, slow, 8, "ByT5Tokenizer gives no character offsets"),
        (Dataset.from_list(plain(1)), wrapped(bpe, CHATML), 8, "need a column messages, got"),
        (as_dataset([HELLO]), wrapped(bpe, reversing), 8, "turn 2: cannot tell .* rewrites it"),
        (as_dataset([system]), wrapped(bpe, refusing), 8, "refuses chat 0: no systems"),
        (as_dataset([HELLO[:1]]), wrapped(bpe, CHATML), 8, "chat 0: need an assistant turn at the"),
    ):
        with pytest.raises(ValueError, match=message):
            tokenize_chats(given, tokenizer, max_len=max_len)
    assert left_behind(tmp_path) == []


def test_a_tokenised_stream_takes_constant_memory(tmp_path):
    words = Tokenizer(WordLevel({"<unk>": 0, "yes": 1}, unk_token="<unk>"))
    words.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    words.add_special_tokens(SPECIAL)
    rows = ({"prompt": f"{i} yes", "response": "yes " * 40} for i in range(4 * 256))
    chats = load_chats(jsonl(tmp_path / "many.jsonl", rows), streaming=True)
    tokens, _ = tokenize_chats(chats, wrapped(words, CHATML), max_len=512)
    tracemalloc.start()
    used = [
        tracemalloc.get_traced_memory()[0] + pa.total_allocated_bytes()
        for i, _ in enumerate(tokens)
        if i % 256 == 255  # as far into a batch each time
    ]
    tracemalloc.stop()
    assert len(used) == 4
    assert max(used) - used[1] < 5e4, used  # bytes, in 512 rows
