"""Chats: every schema and kind of file, bad input, mixing and splits."""

import json
from collections import Counter
from pathlib import Path

import datasets
import pytest
from datasets import Dataset, DatasetDict
from trl.data_utils import is_conversational

from lib.data.chats import load_chats
from lib.data.mixing import mix, split_by_prompt

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


# ---------------------------------------------------------------- loading

HELLO, NO = turns((U, "hi"), (A, "yo")), turns((A, "no"))
HELPSTEER = "hi\n<extra_id_1>Assistant\nyo\n<extra_id_1>User\nhi"
SHAREGPT = [{"from": "human", "value": "hi"}, {"from": "gpt", "value": "yo"}]
HH = "\n\nHuman: hi\n\nAssistant:"
SCHEMAS = {
    "prompt/response": ({"prompt": "hi", "response": "yo"}, HELLO),
    "prompt/completion": ({"prompt": "hi", "completion": "yo"}, HELLO),
    "completion lists": ({"prompt": HELLO[:1], "completion": HELLO[1:]}, HELLO),
    "messages": ({"messages": turns((S, "s")) + HELLO}, turns((S, "s")) + HELLO),
    "ShareGPT": ({"conversations": SHAREGPT}, HELLO),
    "Alpaca": ({"instruction": "hi", "input": "", "output": "yo"}, HELLO),
    "Alpaca input": (
        {"instruction": "a", "input": "b", "output": "c"},
        turns((U, "a\n\nb"), (A, "c")),
    ),
    "HelpSteer": ({"prompt": HELPSTEER, "response": "yo", "helpfulness": 4}, HELLO * 2),
    "date": ({"prompt": "hi", "response": "2024-01-01"}, turns((U, "hi"), (A, "2024-01-01"))),
}
PREFERENCES = {
    "strings": {"prompt": "hi", "chosen": "yo", "rejected": "no"},
    "lists": {"prompt": HELLO[:1], "chosen": HELLO[1:], "rejected": NO},
    "whole chats": {"prompt": "hi", "chosen": HELLO, "rejected": HELLO[:1] + NO},
    "HH": {"chosen": f"{HH} yo", "rejected": f"{HH} no\n"},
}


@pytest.mark.parametrize("name", SCHEMAS)
def test_every_schema_gives_the_same_chat(name, tmp_path):
    row, messages = SCHEMAS[name]
    path = jsonl(tmp_path / "x.jsonl", [row])
    for got in (load_chats(path)[0], next(iter(load_chats(path, streaming=True)))):
        assert got["messages"] == messages
        assert (got["prompt"], got["response"]) == tuple(t["content"] for t in messages[-2:])
    assert is_conversational(load_chats(path).select_columns("messages")[0])


@pytest.mark.parametrize("name", PREFERENCES)
def test_preferences_are_what_trl_takes(name, tmp_path):
    row = load_chats(jsonl(tmp_path / "x.jsonl", [PREFERENCES[name]]))[0]
    assert list(row) == ["id", "prompt", "chosen", "rejected"]
    assert (row["prompt"], row["chosen"], row["rejected"]) == (HELLO[:1], HELLO[1:], NO)
    assert is_conversational(row)


def test_every_kind_of_file_gives_the_same_rows(tmp_path, monkeypatch):
    texts = ["p,\n1 é", "007", "NA"]
    long = {"response": 'r "x"' * 50_000, "topic": "t"}
    rows = [{"id": str(i), "prompt": text, **long} for i, text in enumerate(texts)]
    raw = Dataset.from_list(rows)
    jsonl(tmp_path / "a.jsonl", rows)
    (tmp_path / "a.json").write_text("\ufeff" + json.dumps(rows))
    raw.to_csv(tmp_path / "a.csv")
    raw.to_parquet(tmp_path / "a.parquet")
    raw.save_to_disk(tmp_path / "disk")
    DatasetDict(train=raw, test=raw.select([0])).save_to_disk(tmp_path / "splits")
    (tmp_path / "folder").mkdir()
    for name, some in {"train-0": rows[:2], "train-1": rows[2:], "test": rows[:1]}.items():
        jsonl(tmp_path / "folder" / f"{name}.jsonl", some)
    monkeypatch.setenv("LATENT_BENCH_ROOT", str(tmp_path))  # where relative paths start
    want = load_chats("a.jsonl").to_list()
    assert [(row["prompt"], row["topic"]) for row in want] == [(text, "t") for text in texts]
    for name in ["a.jsonl", "a.json", "a.csv", "a.parquet", "disk", "splits", "folder"]:
        assert load_chats(tmp_path / name).to_list() == want, name
        assert list(load_chats(str(tmp_path / name), streaming=True)) == want, name
    for name in ("splits", "folder"):
        assert load_chats(tmp_path / name, split="test")["id"][:] == ["0"]
        with pytest.raises(ValueError, match=r"no split 'dev' among \['test', 'train'\]"):
            load_chats(tmp_path / name, split="dev")
    assert len(load_chats(tmp_path / "a.csv", limit=2)) == 2
    for limit in (0, -1):
        with pytest.raises(ValueError, match=r"no rows|must be"):
            load_chats(tmp_path / "a.csv", limit=limit, streaming=True)


def test_a_hub_id_goes_to_the_hub_and_scores_come_along(monkeypatch):
    hub = Dataset.from_list([{**row, "helpfulness": i} for i, row in enumerate(plain(2))])
    asked = []
    monkeypatch.setattr(datasets, "load_dataset", lambda *a, **k: asked.append((a, k)) or hub)
    assert load_chats("nvidia/HelpSteer2", split="validation")["helpfulness"][:] == [0.0, 1.0]
    assert asked == [(("nvidia/HelpSteer2",), {"split": "validation", "streaming": False})]


def test_missing_ids_are_stable_and_unique(tmp_path):
    rows = [*plain(2), {**plain(1)[0], "topic": "a column that comes late"}]
    one = load_chats(jsonl(tmp_path / "a.jsonl", rows))
    two = load_chats(jsonl(tmp_path / "b.jsonl", rows[::-1]))
    assert set(one["id"]) == set(two["id"])
    assert one["id"][2] == f"{one['id'][0]}-2"
    assert one["topic"][:] == [None, None, "a column that comes late"]


def test_a_changed_file_is_read_again(tmp_path):
    for word, n_files in (("one", 1), ("two", 2), ("two", 2)):
        path = jsonl(tmp_path / "a.jsonl", [{"prompt": "p", "response": word}])
        assert load_chats(path)["response"][:] == [word]
        assert len(left_behind(tmp_path)) == n_files


GOOD = b'{"prompt": "a", "response": "b"}\n'
PAIR = b'{"prompt": "a", "chosen": "b", "rejected": "c"}\n'
BAD = {  # name: (what the file holds, what the error says); the suffix is the name's
    "schema.jsonl": (b'{"text": "x"}\n', r"schema.jsonl row 1: .*columns.*Alpaca.*got \['text'\]"),
    "json.jsonl": (GOOD + b'{"prompt"\n', "json.jsonl row 2: Expecting ':'"),
    "object.jsonl": (b"[1]\n", "row 1: need an object.*got 1"),
    "utf8.jsonl": (GOOD + b'{"prompt": "\xff"}\n', "utf8.jsonl row 2: 'utf-8' .* 0xff"),
    "empty.jsonl": (b"", "empty.jsonl has no rows"),
    "blank.jsonl": (b"\n\n", "has no rows"),
    "half.jsonl": (b'{"prompt": "\\ud800", "response": "b"}\n', "row 1: prompt: need text, got"),
    "id.jsonl": (b'{"id": "\\ud800", "prompt": "a", "response": "b"}\n', "row 1: id: need text"),
    "topic.jsonl": (b'{"topic": ["x"], "prompt": "a", "response": "b"}\n', "topic: need text"),
    "score.jsonl": (
        GOOD[:-2] + b', "complexity": "x"}',
        "row 1: complexity: need a number, got 'x'",
    ),
    "digits.jsonl": (b'{"id": ' + b"1" * 5000 + b"}\n", "row 1: Exceeds the limit"),
    "deep.jsonl": (b'{"prompt": ' + b"[" * 100_000, "row 1: maximum recursion depth"),
    "twice.jsonl": (b'{"id": 7, "prompt": "a", "response": "b"}\n' * 2, "row 2: id '7' is an ear"),
    "null.jsonl": (GOOD + b'{"prompt": "a", "response": null}\n', "row 2: response: need text"),
    "kinds.jsonl": (GOOD + PAIR, "row 2: response: need text, got None"),
    "same.jsonl": (PAIR + PAIR.replace(b'"c"', b'"b"'), "row 2: chosen and rejected must differ"),
    "alone.jsonl": (b'{"chosen": "b", "rejected": "c"}\n', "row 1: prompt: need text, got None"),
    "quote.csv": (b'prompt,response\na,b\nc,"d\n', "quote.csv row 2: unexpected end of data"),
    "fields.csv": (b"prompt,response\na,b,c\n", "fields.csv row 1: need an object, each field"),
    "a.parquet": (b"nothing", "a.parquet row 1: Parquet file size is 7 bytes"),
    "a.txt": (b"x", r"a.txt: no split 'train' among \[\], of kinds \('.csv', '.json'"),
}


@pytest.mark.parametrize("name", BAD)
def test_bad_files_are_refused_and_leave_nothing(name, tmp_path):
    data, message = BAD[name]
    (tmp_path / name).write_bytes(data)
    with pytest.raises(ValueError, match=message):
        load_chats(tmp_path / name)
    assert left_behind(tmp_path) == []


BAD_TURNS = {
    "empty": (turns((U, "a"), (A, "  ")), "messages turn 2: need text, got '  '"),
    "role": (turns((U, "a"), ("tool", "b")), "turn 2: need a role system, user or assistant"),
    "no turn": (["a"], "turn 1: need a role"),
    "assistant first": (turns((A, "a"), (U, "b")), r"in turn.*\['assistant', 'user'\]"),
    "no assistant": (turns((S, "s"), (U, "a")), "the assistant last"),
    "two users": (turns((U, "a"), (U, "b"), (A, "c")), "in turn"),
    "late system": (turns((U, "a"), (S, "b"), (A, "c")), "in turn"),
    "user last": (turns((U, "a"), (A, "b"), (U, "c")), "the assistant last"),
    "nothing": ([], r"the assistant last; got \[\]"),
}


@pytest.mark.parametrize("name", BAD_TURNS)
def test_turns_that_are_no_chat_are_refused(name, tmp_path, caplog):
    messages, message = BAD_TURNS[name]
    path = jsonl(tmp_path / "a.jsonl", [{"messages": HELLO}, {"messages": messages}])
    for streaming in (False, True):
        with pytest.raises(ValueError, match=f"a.jsonl row 2: .*{message}"):
            list(load_chats(path, streaming=streaming))
        assert left_behind(tmp_path) == []
    assert len(load_chats(path, skip_bad=True)) == 1
    assert "left out 1 rows" in caplog.text


@pytest.mark.parametrize("name", ["./none", "data/none.jsonl", "a/b/c", "/none", Path("none")])
def test_a_path_without_a_file_is_not_a_hub_id(name):
    with pytest.raises(FileNotFoundError, match=r"none|a/b/c"):
        load_chats(name)


# ---------------------------------------------------------------- mixing, splitting


def numbered(tmp_path, name, n, **extra):
    rows = [{"id": i, **row} for i, row in enumerate(plain(n, source=name, **extra))]
    return load_chats(jsonl(tmp_path / f"{name}.jsonl", rows))


@pytest.mark.parametrize("weights", [(1, 1, 1), (3, 1, 1), (0.25, 0.25, 0.5)])
@pytest.mark.parametrize("n", [83, 70, None])
def test_mix_keeps_shares_and_repeats_nothing(weights, n, tmp_path):
    parts = [numbered(tmp_path, name, 50, topic="t") for name in "ab"]
    parts.append(numbered(tmp_path, "c", 50))  # has no topic
    mixed = mix(parts, weights, n=n, seed=1)
    n_rows = n or int(50 * sum(weights) / max(weights))
    assert len(mixed) == len(set(mixed["id"])) == n_rows
    assert len(set(zip(mixed["source"], mixed["prompt"], strict=True))) == n_rows
    for name, weight in zip("abc", weights, strict=True):
        assert abs(Counter(mixed["source"])[name] - n_rows * weight / sum(weights)) < 1
    assert mixed.to_list() == mix(parts, weights, n=n, seed=1).to_list()
    assert mixed["prompt"][:] != mix(parts, weights, n=n, seed=2)["prompt"][:]
    assert mixed["source"][:] != sorted(mixed["source"])


def test_mix_refuses_what_it_cannot_do(tmp_path):
    parts = [numbered(tmp_path, name, 10) for name in "ab"]
    with pytest.raises(ValueError, match=r"mix 20 rows: need \[ 5 15\] of .* have \[10 10\]"):
        mix(parts, [1, 3], n=20)
    for weights in ([1], [1, 0], [1, -1], [1, float("nan")]):
        with pytest.raises(ValueError, match="weight"):
            mix(parts, weights)
    pairs = load_chats(jsonl(tmp_path / "p.jsonl", [PREFERENCES["strings"]]))
    for other in (pairs, parts[1].remove_columns("messages")):
        with pytest.raises(ValueError, match="cannot be mixed"):
            mix([parts[0], other], [1, 1])


def test_a_prompt_stays_in_one_split_and_topics_keep_their_shares(tmp_path):
    rows = [
        {"prompt": f"{topic}{i % (n * 2 // 3)}", "response": f"{i}", "topic": topic}
        for topic, n in (("math", 300), ("food", 150), ("rare", 6))
        for i in range(n)
    ] + [{"prompt": f"one{i}", "response": "r", "topic": f"alone{i}"} for i in range(100)]
    chats = load_chats(jsonl(tmp_path / "a.jsonl", rows))
    fractions = {"train": 0.8, "dev": 0.1, "test": 0.1}
    parts, again, other = (
        split_by_prompt(chats, fractions, stratify_by="topic", seed=seed) for seed in (3, 3, 4)
    )
    prompts = [set(part["prompt"]) for part in parts.values()]
    assert sum(map(len, prompts)) == len(set.union(*prompts))
    assert sorted(i for part in parts.values() for i in part["id"]) == sorted(chats["id"])
    for name, fraction in fractions.items():
        assert abs(len(parts[name]) - fraction * len(chats)) <= 2
        counts = Counter(parts[name]["topic"])
        for topic, n in (("math", 300), ("food", 150)):
            assert abs(counts[topic] - fraction * n) <= 4
    assert again["test"]["id"][:] == parts["test"]["id"][:] != other["test"]["id"][:]


def test_split_refuses_what_it_cannot_do(tmp_path):
    chats = numbered(tmp_path, "a", 10)
    for fractions in ({"a": 0.5, "b": 0.4}, {"a": 1.2, "b": -0.2}, {}):
        with pytest.raises(ValueError, match="fractions that sum to 1"):
            split_by_prompt(chats, fractions)
    with pytest.raises(ValueError, match="no column 'topic'"):
        split_by_prompt(chats, {"a": 0.5, "b": 0.5}, stratify_by="topic")
    with pytest.raises(ValueError, match="10 prompts are too few: nothing for b"):
        split_by_prompt(chats, {"a": 0.99, "b": 0.01})
    pairs = [PREFERENCES["strings"] | {"prompt": p} for p in "xxyy"]
    halves = split_by_prompt(load_chats(jsonl(tmp_path / "p.jsonl", pairs)), {"a": 0.5, "b": 0.5})
    for half in halves.values():
        assert len({row["prompt"][0]["content"] for row in half}) == 1
