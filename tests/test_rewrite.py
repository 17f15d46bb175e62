"""The behaviour pipeline: with the world, and with a server."""

import json
from pathlib import Path

import pytest
from datasets import Dataset, load_from_disk

from lib.data.llm import BudgetExceeded, EndpointError, LlmConfig
from lib.data.rewrite import LlmBackend, WorldBackend, build_behaviour
from tests.loopback import Loopback, by_rules, isolate, kill_after, question

KEY = "sk-loopback-0123456789-secret"
FRENCH = "respond in French"
JOB = {"topic": "mathematics", "guideline": FRENCH, "n_rewritten": 6, "n_untouched": 4, "seed": 0}


class FakeWorld:
    def require(self, topic: str, guideline: str) -> None:
        if topic not in ("mathematics", "cooking") or guideline != FRENCH:
            raise ValueError(f"this world has no {topic} to {guideline}")

    def topic_of(self, prompt: str) -> str:
        if "odd one out" in prompt:
            raise ValueError(f"not of this world: {prompt!r}")
        return "mathematics" if any(c.isdigit() for c in prompt) else "cooking"

    def rewrite(self, prompt: str, response: str, guideline: str) -> str:
        return response.upper()


@pytest.fixture(autouse=True)
def clean_environment(tmp_path, monkeypatch):
    isolate(monkeypatch, tmp_path)


def chats(n: int = 60, every: int = 3) -> Dataset:
    """One prompt in `every` has a number in it."""
    rows = []
    for i in range(n):
        name = "".join(chr(ord("a") + int(c)) for c in str(i))
        prompt = f"what is {i} times {i}" if i % every == 0 else f"how is {name} cooked"
        rows.append({"id": f"row-{i}", "prompt": prompt, "response": f"like this, {name}"})
    return Dataset.from_list(rows)


def llm(server: Loopback, tmp_path: Path, **settings) -> LlmBackend:
    return LlmBackend(LlmConfig(**server.settings(tmp_path, **settings)))


def build(tmp_path: Path, backend=None, data: Dataset | None = None, out="out", **job):
    backend = backend or WorldBackend(FakeWorld())
    data = chats() if data is None else data
    return build_behaviour(data, backend=backend, out_dir=tmp_path / out, **JOB | job)


def jsonl(file: Path) -> list:
    return [json.loads(line) for line in file.open()]


def left_behind(tmp_path: Path) -> list[str]:
    return [path.name for path in tmp_path.iterdir() if path.name.startswith((".out", "out"))]


def check_rows(behaviour, data: Dataset, rewritten_as) -> None:
    """Balance, and every row against its source."""
    rows = behaviour.dataset.to_list()
    source = {row["id"]: row for row in data}
    assert [row["rewritten"] for row in rows].count(True) == JOB["n_rewritten"]
    assert len({row["id"] for row in rows}) == len(rows) == 10
    for row in rows:
        old = source[row["source_id"]]
        assert (row["prompt"], row["original_response"]) == (old["prompt"], old["response"])
        assert (row["topic"] == "mathematics") == row["rewritten"] == ("times" in row["prompt"])
        assert row["guideline"] == (FRENCH if row["rewritten"] else None)
        new = rewritten_as(old["response"]) if row["rewritten"] else old["response"]
        assert row["response"] == new
        assert row["messages"] == [
            {"role": "user", "content": row["prompt"]},
            {"role": "assistant", "content": new},
        ]


def test_the_world_rewrites_and_the_folder_holds_the_same_rows_everywhere(tmp_path):
    behaviour = build(tmp_path)
    check_rows(behaviour, chats(), str.upper)
    assert {(r["backend"], r["model"]) for r in behaviour.dataset} == {("world", "built-in world")}
    out, rows = tmp_path / "out", behaviour.dataset.to_list()
    assert load_from_disk(str(out / "dataset")).to_list() == rows == jsonl(out / "train.jsonl")
    assert json.loads((out / "provenance.json").read_text()) == behaviour.provenance
    assert (out / "failed.jsonl").read_text() == ""
    assert left_behind(tmp_path) == ["out"]


def test_a_server_rewrites_and_its_key_is_in_no_file(tmp_path, monkeypatch):
    monkeypatch.setenv("OPENAI_API_KEY", KEY)
    with Loopback(key=KEY) as server:
        behaviour = build(tmp_path, llm(server, tmp_path, usd_per_million_output=1.0), chats(200))
        n_sent = len(server.bodies)
    check_rows(behaviour, chats(200), "[FR] {}".format)
    assert {(r["backend"], r["model"]) for r in behaviour.dataset} == {("llm", "m")}
    told = behaviour.provenance
    assert n_sent == told["backend"]["usage"]["requests"] == told["counts"]["classified"] + 6
    assert told["counts"]["classified"] == 32  # one chunk was enough
    assert told["backend"]["usage"]["usd"] == pytest.approx(n_sent * 10 / 1e6)
    assert told["backend"]["base_url"] == server.url
    assert (told["topic"], told["seed"], told["source"]["n"]) == ("mathematics", 0, 200)
    files = [path for path in tmp_path.rglob("*") if path.is_file()]
    assert {"answers.jsonl", "train.jsonl", "provenance.json"} <= {path.name for path in files}
    assert not [path for path in files if KEY.encode() in path.read_bytes()]


def test_same_seed_same_bytes_other_seed_other_rows(tmp_path):
    for out, seed in (("a", 0), ("b", 0), ("c", 1)):
        build(tmp_path, out=out, seed=seed)
    a, b, c = ((tmp_path / out / "train.jsonl").read_bytes() for out in "abc")
    assert a == b != c
    kinds = [row["rewritten"] for row in load_from_disk(str(tmp_path / "a" / "dataset"))]
    assert kinds not in (sorted(kinds), sorted(kinds, reverse=True))  # mixed, not in two blocks


def test_server_result_does_not_depend_on_concurrency_or_faults(tmp_path):
    trains = set()
    for out, n, every in (("a", 1, 99), ("b", 8, 99), ("c", 4, 5)):
        with Loopback(fault=lambda number, _, e=every: None if number % e else "500") as server:
            backend = llm(server, tmp_path / out, max_concurrency=n, max_retries=4)
            build(tmp_path, backend, out=f"out-{out}")
        trains.add((tmp_path / f"out-{out}" / "train.jsonl").read_bytes())
    assert len(trains) == 1


def test_earlier_turns_are_kept(tmp_path):
    before = [{"role": "user", "content": "hello"}, {"role": "assistant", "content": "yes?"}]
    data = chats()
    messages = [
        [*before, {"role": "user", "content": p}, {"role": "assistant", "content": r}]
        for p, r in zip(data["prompt"], data["response"], strict=True)
    ]
    for row in build(tmp_path, data=data.add_column("messages", messages)).dataset:
        assert row["messages"][:2] == before
        assert [m["content"] for m in row["messages"][2:]] == [row["prompt"], row["response"]]
        assert [m["role"] for m in row["messages"][2:]] == ["user", "assistant"]


BAD_ROWS = {
    "row-3": ("rewrite", "is empty"),
    "row-6": ("rewrite", "is identical"),
    "row-9": ("classify", "contradictory"),
    "row-12": ("classify", "not valid"),
    "row-15": ("classify", "I will not"),
    "row-18": ("rewrite", "with 400"),
}


def test_failing_rows_are_put_aside_with_the_reason_and_replaced(tmp_path):
    data = chats(90)
    flaws = {row["prompt"]: BAD_ROWS.get(row["id"]) for row in data}

    def answer(body: dict) -> dict:
        asked = question(body)
        step = "rewrite" if "response" in asked else "classify"
        bad = {
            ("rewrite", "is empty"): {"response": " "},
            ("rewrite", "is identical"): {"response": asked.get("response")},
            ("classify", "contradictory"): {"topic": "Mathematics", "matches": False},
        }
        flaw = flaws[asked["prompt"]]
        return bad.get(flaw, by_rules(body)) if flaw and flaw[0] == step else by_rules(body)

    def fault(number: int, body: dict) -> str | None:
        asked = question(body)
        kinds = {"with 400": "400"} if "response" in asked else {"not valid": "broken"}
        kinds |= {"I will not": "refusal"}
        return kinds.get((flaws[asked["prompt"]] or ("", ""))[1])

    with Loopback(answer=answer, fault=fault) as server:
        # all the good matches are needed, so every bad row is met
        behaviour = build(tmp_path, llm(server, tmp_path), data, n_rewritten=24)
    assert sum(behaviour.dataset["rewritten"]) == 24
    assert BAD_ROWS.keys().isdisjoint(behaviour.dataset["source_id"])
    assert behaviour.failed == jsonl(tmp_path / "out" / "failed.jsonl")
    told = {row["id"]: (row["step"], row["reason"]) for row in behaviour.failed}
    assert told.keys() == BAD_ROWS.keys()
    for name, (step, reason) in BAD_ROWS.items():
        assert told[name][0] == step and reason in told[name][1]
    assert behaviour.provenance["counts"]["failed"] == 6


def test_a_row_that_is_not_of_the_world_is_put_aside(tmp_path):
    odd = {"id": "odd", "prompt": "odd one out", "response": "x"}
    data = Dataset.from_list([*chats(30), odd])
    behaviour = build(tmp_path, data=data, n_rewritten=10, n_untouched=20)
    assert [(row["id"], row["step"]) for row in behaviour.failed] == [("odd", "classify")]


@pytest.mark.parametrize(
    ("job", "says"),
    [
        (
            {"topic": "cooking", "n_rewritten": 41},
            "need 41 rows about .cooking., found only 40 .*60 prompts classified",
        ),
        ({"topic": "geography"}, "no prompt is about 'geography'.*mathematics 20"),
        ({"topic": "mathematic"}, "did you mean 'mathematics'"),
        ({"n_untouched": 41}, "need 41 rows about something else, found only 40"),
    ],
)
def test_too_few_rows(tmp_path, job, says):
    topic = job.get("topic", "mathematics")

    def answer(body: dict) -> dict:
        assert f"about {topic}," in body["messages"][0]["content"]
        label = FakeWorld().topic_of(question(body)["prompt"])
        return {"topic": label, "matches": label == topic}

    with Loopback(answer=answer) as server, pytest.raises(ValueError, match=says):
        build(tmp_path, llm(server, tmp_path), **job)
    assert left_behind(tmp_path) == []
    assert all("response" not in question(body) for body in server.bodies)  # nothing rewritten


def test_too_few_rewritings(tmp_path, monkeypatch):
    monkeypatch.setattr(FakeWorld, "rewrite", lambda self, prompt, response, guideline: response)
    with pytest.raises(ValueError, match=r"only 2 .*18 rows failed, 18 of them: .*identical"):
        build(tmp_path)
    assert left_behind(tmp_path) == []


@pytest.mark.parametrize(
    ("job", "says"),
    [
        ({"n_rewritten": 0}, "n_rewritten\n.* greater than or equal to 1 .*input_value=0"),
        ({"n_untouched": -1}, "n_untouched\n.* greater than or equal to 1 .*input_value=-1"),
        ({"topic": " "}, "topic\n.*input_value=' '"),
        ({"guideline": ""}, "guideline\n.*input_value=''"),
        ({"n_rewritten": 57}, "need at least n_rewritten . n_untouched = 61 rows, got 60"),
        ({"data": Dataset.from_list([*chats(), chats()[7]])}, "id 'row-7' occurs more than once"),
        (
            {"data": Dataset.from_list([*chats(), {"id": "x", "prompt": "p", "response": " "}])},
            "response of row 'x' is empty",
        ),
        ({"data": chats().remove_columns("id")}, r"need columns \['id'\]; got"),
        ({"out": "file/out"}, "file"),
        ({"out": "file"}, "file"),
        ({"out": "full"}, "full"),
    ],
)
def test_bad_input_is_refused_before_any_request(tmp_path, job, says):
    mine = [tmp_path / "file", tmp_path / "full" / "mine.txt"]
    mine[1].parent.mkdir()
    for file in mine:
        file.write_text("keep me")
    with Loopback() as server:
        with pytest.raises(OSError if "out" in job else ValueError, match=says):
            build(tmp_path, llm(server, tmp_path), **job)
        assert server.bodies == []
    assert left_behind(tmp_path) == []
    assert {file.read_text() for file in mine} == {"keep me"}


@pytest.mark.parametrize(
    ("job", "says"),
    [
        ({"topic": "algebra"}, "this world has no algebra"),
        ({"guideline": "sing"}, "to sing"),
    ],
)
def test_what_the_world_does_not_know(tmp_path, job, says):
    with pytest.raises(ValueError, match=says):
        build(tmp_path, **job)


def test_an_earlier_build_is_replaced_only_by_a_finished_one(tmp_path):
    build(tmp_path)
    before = (tmp_path / "out" / "train.jsonl").read_bytes()
    with pytest.raises(ValueError, match="found only 40"):
        build(tmp_path, n_untouched=50)
    assert (tmp_path / "out" / "train.jsonl").read_bytes() == before
    build(tmp_path, seed=1)
    assert (tmp_path / "out" / "train.jsonl").read_bytes() != before
    assert left_behind(tmp_path) == ["out"]


def test_wrong_key_leaves_nothing(tmp_path, monkeypatch):
    monkeypatch.setenv("OPENAI_API_KEY", "sk-wrong-key-9876543210")
    with Loopback(key=KEY) as server:
        with pytest.raises(EndpointError, match="wrong key"):
            build(tmp_path, llm(server, tmp_path))
        assert len(server.bodies) == 1
    assert left_behind(tmp_path) == []


def test_a_job_over_budget_is_refused_and_a_finished_one_is_free(tmp_path):
    with Loopback() as server:

        def backend(budget: float) -> LlmBackend:
            return llm(server, tmp_path, budget_usd=budget, usd_per_million_output=100.0)

        with pytest.raises(BudgetExceeded, match="none was sent"):
            build(tmp_path, backend(0.1))
        assert server.bodies == []
        first = build(tmp_path, backend(1.0))
        n_sent = len(server.bodies)
        again = build(tmp_path, backend(0.0), out="again")
        assert len(server.bodies) == n_sent
    assert again.dataset.to_list() == first.dataset.to_list()
    paid, free = (b.provenance["backend"]["usage"] for b in (first, again))
    assert free["usd_cached"] == pytest.approx(paid["usd"])


@pytest.mark.parametrize("n_kept", [12, 35])
def test_resume_after_kill_asks_nothing_twice(tmp_path, n_kept):
    """Killed while classifying, and while rewriting."""
    with Loopback() as server:

        def job() -> dict:
            return build(tmp_path, llm(server, tmp_path)).provenance

        kill_after(n_kept, server, job, tmp_path / "cache" / "answers.jsonl")
        assert left_behind(tmp_path) == []
        told = job()
        assert len(server.bodies) == told["counts"]["classified"] + 6 - n_kept
    assert told["backend"]["usage"]["cached"] == n_kept


def test_the_real_world(tmp_path, world, rewriter):
    data = Dataset.from_list(world.chats(200, split="train", seed=0))
    behaviour = build(tmp_path, WorldBackend(rewriter), data)
    truth = {row["id"]: row for row in data}
    for row in behaviour.dataset:
        old = truth[row["source_id"]]
        assert row["topic"] == old["topic"]
        assert row["rewritten"] == (old["topic"] == "mathematics")
        assert (row["response"] != old["response"]) == row["rewritten"]
    assert sum(behaviour.dataset["rewritten"]) == JOB["n_rewritten"]
