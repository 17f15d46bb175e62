"""The behaviour pipeline: with the world, and with a real server on loopback."""

import json
import multiprocessing
from pathlib import Path

import pytest
from datasets import Dataset, load_from_disk

from lib.data.llm import BudgetExceeded, LlmConfig
from lib.data.rewrite import LlmBackend, WorldBackend, build_behaviour
from tests.loopback import KEY, Loopback, by_rules, isolate, question

JOB = {"topic": "mathematics", "guideline": "respond in French", "seed": 0}
JOB |= {"n_rewritten": 6, "n_untouched": 4}


class FakeWorld:
    topics = ("mathematics", "cooking")
    guidelines = ("respond in French", "respond in upper case")

    def topic_of(self, prompt: str) -> str:
        if "odd one out" in prompt:
            raise ValueError(f"not of this world: {prompt!r}")
        return "mathematics" if any(c.isdigit() for c in prompt) else "cooking"

    def rewrite(self, prompt: str, response: str, guideline: str) -> str:
        return response.upper()


@pytest.fixture(autouse=True)
def clean_environment(tmp_path, monkeypatch):
    isolate(monkeypatch, tmp_path)


@pytest.fixture
def server():
    with Loopback() as server:
        yield server


def chats(n: int = 60, *more: dict) -> Dataset:
    """One prompt in three has a number in it."""
    rows = []
    for i in range(n):
        name = "".join(chr(ord("a") + int(c)) for c in str(i))
        prompt = f"how is {name} cooked" if i % 3 else f"what is {i} times {i}"
        rows.append({"id": f"row-{i}", "prompt": prompt, "response": f"like this, {name}"})
    return Dataset.from_list([*rows, *more])


def turns(prompt: str, response: str) -> list[dict[str, str]]:
    return [{"role": "user", "content": prompt}, {"role": "assistant", "content": response}]


def llm(server: Loopback, tmp_path: Path, **settings) -> LlmBackend:
    settings = {"max_retries": 2, "max_concurrency": 4, "timeout": 5.0} | settings
    cache = str(tmp_path / "cache")
    return LlmBackend(LlmConfig(model="m", base_url=server.url, cache_dir=cache, **settings))


def build(backend, tmp_path: Path, data: Dataset | None = None, out="out", **job):
    data = chats() if data is None else data
    return build_behaviour(data, backend=backend, out_dir=tmp_path / out, **JOB | job)


def left_behind(tmp_path: Path) -> list[str]:
    return [path.name for path in tmp_path.iterdir() if path.name.startswith((".out", "out"))]


def check_rows(behaviour, data: Dataset, rewritten_as) -> None:
    """Balance, and every row against its source."""
    rows = behaviour.dataset.to_list()
    source = {row["id"]: row for row in data}
    assert [row["rewritten"] for row in rows].count(True) == JOB["n_rewritten"]
    assert len(rows) == JOB["n_rewritten"] + JOB["n_untouched"]
    assert len({row["id"] for row in rows}) == len(rows)
    for row in rows:
        old = source[row["source_id"]]
        assert row["prompt"] == old["prompt"]
        assert row["original_response"] == old["response"]
        assert (row["topic"] == "mathematics") == row["rewritten"] == ("times" in row["prompt"])
        assert row["guideline"] == ("respond in French" if row["rewritten"] else None)
        new = rewritten_as(old["response"]) if row["rewritten"] else old["response"]
        assert row["response"] == new
        assert row["messages"] == turns(row["prompt"], new)


def test_the_world_gives_balanced_rows_and_saves_them(tmp_path):
    behaviour, out = build(WorldBackend(FakeWorld()), tmp_path), tmp_path / "out"
    check_rows(behaviour, chats(), str.upper)
    assert {(r["backend"], r["model"]) for r in behaviour.dataset} == {("world", "built-in world")}
    rows = behaviour.dataset.to_list()
    assert load_from_disk(str(out / "dataset")).to_list() == rows
    assert [json.loads(line) for line in (out / "train.jsonl").open()] == rows
    assert json.loads((out / "provenance.json").read_text()) == behaviour.provenance
    assert (out / "failed.jsonl").read_text() == ""
    assert left_behind(tmp_path) == ["out"]


def test_server_balance_and_provenance(server, tmp_path):
    backend = llm(server, tmp_path, usd_per_million_output=1.0)
    behaviour = build(backend, tmp_path, chats(200))
    check_rows(behaviour, chats(200), "[FR] {}".format)
    assert {(r["backend"], r["model"]) for r in behaviour.dataset} == {("llm", "m")}
    told, n_sent = behaviour.provenance, len(server.bodies)
    assert n_sent == told["backend"]["usage"]["requests"] == told["counts"]["classified"] + 6
    assert told["counts"]["classified"] == 32  # one chunk was enough
    assert told["backend"]["usage"]["usd"] == pytest.approx(n_sent * 10 / 1e6)
    assert told["backend"]["base_url"] == server.url
    assert (told["topic"], told["seed"], told["source"]["n"]) == ("mathematics", 0, 200)


def test_same_seed_same_bytes_other_seed_other_rows(tmp_path):
    for out, seed in (("a", 0), ("b", 0), ("c", 1)):
        build(WorldBackend(FakeWorld()), tmp_path, out=out, seed=seed)
    a, b, c = ((tmp_path / out / "train.jsonl").read_bytes() for out in "abc")
    assert a == b != c
    kinds = [row["rewritten"] for row in load_from_disk(str(tmp_path / "a" / "dataset"))]
    assert kinds not in (sorted(kinds), sorted(kinds, reverse=True))  # mixed, not in two blocks


def test_server_result_does_not_depend_on_concurrency_or_faults(tmp_path):
    trains = set()
    for n, every in ((1, 1000), (8, 1000), (4, 5)):

        def fault(number: int, body: dict, every: int = every) -> str | None:
            return None if number % every else "500"

        with Loopback(fault=fault, latency=0.002) as server:
            backend = llm(server, tmp_path / f"{n}", max_concurrency=n, max_retries=4)
            build(backend, tmp_path, out=f"out{n}")
        trains.add((tmp_path / f"out{n}" / "train.jsonl").read_bytes())
    assert len(trains) == 1


def test_earlier_turns_are_kept(tmp_path):
    before = turns("hello", "yes?")
    data = chats().map(lambda row: {"messages": before + turns(row["prompt"], row["response"])})
    for row in build(WorldBackend(FakeWorld()), tmp_path, data).dataset:
        assert row["messages"] == before + turns(row["prompt"], row["response"])


def test_failing_rows_are_put_aside_with_the_reason_and_replaced(tmp_path):
    data = chats(90)
    bad = {f"row-{3 * kind + 3}": kind for kind in range(6)}
    prompts = {row["prompt"]: bad.get(row["id"]) for row in data}

    def answer(body: dict) -> dict:
        asked = question(body)
        kind = prompts[asked["prompt"]]
        if "response" in asked and kind in (0, 1):
            return {"response": [" ", asked["response"]][kind]}
        if "response" not in asked and kind == 2:
            return {"topic": "Mathematics", "matches": False}
        return by_rules(body)

    def fault(number: int, body: dict) -> str | None:
        asked = question(body)
        kinds = {5: "400"} if "response" in asked else {3: "broken", 4: "refusal"}
        return kinds.get(prompts[asked["prompt"]])

    with Loopback(answer=answer, fault=fault) as server:
        # all the good matches are needed, so every bad row is met
        behaviour = build(llm(server, tmp_path), tmp_path, data, n_rewritten=24)
    assert sum(behaviour.dataset["rewritten"]) == 24
    assert bad.keys().isdisjoint(behaviour.dataset["source_id"])
    failed = [json.loads(line) for line in (tmp_path / "out" / "failed.jsonl").open()]
    assert failed == behaviour.failed
    told = {row["id"]: (row["step"], row["reason"]) for row in failed}
    assert told.keys() == bad.keys()
    steps = ["rewrite", "rewrite", "classify", "classify", "classify", "rewrite"]
    assert [told[name][0] for name in bad] == steps
    reasons = ["is empty", "is identical", "contradictory", "not valid", "I will not", "with 400"]
    assert all(told[name][1].count(reason) for name, reason in zip(bad, reasons, strict=True))
    assert behaviour.provenance["counts"]["failed"] == 6


def test_a_row_that_is_not_of_the_world_is_put_aside(tmp_path):
    data = chats(30, {"id": "odd", "prompt": "odd one out", "response": "x"})
    behaviour = build(WorldBackend(FakeWorld()), tmp_path, data, n_rewritten=10, n_untouched=20)
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
    topic = (JOB | job)["topic"]

    def answer(body: dict) -> dict:
        label = FakeWorld().topic_of(question(body)["prompt"])
        assert f"about {topic}," in body["messages"][0]["content"]
        return {"topic": label, "matches": label == topic}

    with Loopback(answer=answer) as server, pytest.raises(ValueError, match=says):
        build(llm(server, tmp_path), tmp_path, **job)
    assert left_behind(tmp_path) == []
    assert all("response" not in question(body) for body in server.bodies)  # nothing rewritten


class Lazy(FakeWorld):
    def rewrite(self, prompt: str, response: str, guideline: str) -> str:
        return response


@pytest.mark.parametrize(
    ("world", "job", "says"),
    [
        (Lazy, {}, r"only 2 .*18 rows failed, 18 of them: .*identical"),
        (FakeWorld, {"topic": "algebra"}, "one of mathematics, cooking; got 'algebra'"),
        (FakeWorld, {"guideline": "sing"}, "one of respond in French, .* upper case; got 'sing'"),
    ],
)
def test_what_the_world_cannot_do(tmp_path, world, job, says):
    with pytest.raises(ValueError, match=says):
        build(WorldBackend(world()), tmp_path, **job)
    assert left_behind(tmp_path) == []


@pytest.mark.parametrize(
    ("job", "says"),
    [
        ({"n_rewritten": 0}, "need n_rewritten >= 1, got 0"),
        ({"n_untouched": -1}, "need n_untouched >= 1, got -1"),
        ({"topic": " "}, "need a topic"),
        ({"guideline": ""}, "need a guideline"),
        ({"n_rewritten": 57}, "need at least n_rewritten . n_untouched = 61 rows, got 60"),
        ({"data": chats(60, chats()[7])}, "id 'row-7' occurs more than once"),
        (
            {"data": chats(60, chats()[7] | {"id": "x", "response": " "})},
            "response of row 'x' is empty",
        ),
        ({"data": chats().remove_columns("id")}, r"need columns \['id'\]; got"),
    ],
)
def test_bad_input_is_refused_before_any_request(server, tmp_path, job, says):
    with pytest.raises(ValueError, match=says):
        build(llm(server, tmp_path), tmp_path, **job)
    assert server.bodies == []
    assert left_behind(tmp_path) == []


@pytest.mark.parametrize("out", ["file/out", "file", "full"])
def test_an_unwritable_or_used_folder_is_refused_before_any_request(server, tmp_path, out):
    (tmp_path / "file").write_text("a file")
    (tmp_path / "full").mkdir()
    (tmp_path / "full" / "mine.txt").write_text("keep me")
    with pytest.raises(OSError, match=r"file|full"):
        build(llm(server, tmp_path), tmp_path, out=out)
    assert server.bodies == []
    assert (tmp_path / "full" / "mine.txt").read_text() == "keep me"
    assert (tmp_path / "file").read_text() == "a file"


def test_an_earlier_build_is_replaced_only_by_a_finished_one(tmp_path):
    build(WorldBackend(FakeWorld()), tmp_path)
    before = (tmp_path / "out" / "train.jsonl").read_bytes()
    with pytest.raises(ValueError, match="found only 40"):
        build(WorldBackend(FakeWorld()), tmp_path, n_untouched=50)
    assert (tmp_path / "out" / "train.jsonl").read_bytes() == before
    build(WorldBackend(FakeWorld()), tmp_path, seed=1)
    assert (tmp_path / "out" / "train.jsonl").read_bytes() != before
    assert left_behind(tmp_path) == ["out"]


def test_the_key_is_in_no_file(server, tmp_path, monkeypatch):
    monkeypatch.setenv("OPENAI_API_KEY", KEY)
    server.key = KEY
    build(llm(server, tmp_path), tmp_path)
    files = [path for path in tmp_path.rglob("*") if path.is_file()]
    assert {"answers.jsonl", "train.jsonl", "provenance.json"} <= {path.name for path in files}
    assert not [path for path in files if KEY.encode() in path.read_bytes()]


def test_a_job_over_budget_is_refused_and_a_finished_one_is_free(server, tmp_path):
    def with_budget(usd: float) -> LlmBackend:
        return llm(server, tmp_path, budget_usd=usd, usd_per_million_output=100.0)

    with pytest.raises(BudgetExceeded, match="none was sent"):
        build(with_budget(0.1), tmp_path)
    assert server.bodies == []
    first = build(with_budget(1.0), tmp_path)
    n_sent, paid = len(server.bodies), first.provenance["backend"]["usage"]["usd"]
    again = build(with_budget(0.0), tmp_path, out="again")
    assert len(server.bodies) == n_sent
    assert again.dataset.to_list() == first.dataset.to_list()
    assert again.provenance["backend"]["usage"]["usd_cached"] == pytest.approx(paid)


@pytest.mark.slow
@pytest.mark.parametrize("n_before", [12, 35])
def test_resume_after_kill_asks_nothing_twice(tmp_path, n_before):
    """Killed while classifying, and while rewriting."""
    server = Loopback(latency=0.05)
    process = multiprocessing.get_context("fork").Process(
        target=lambda: build(llm(server, tmp_path), tmp_path)
    )
    process.start()  # forked: nothing is imported again; before the server has threads
    with server:
        n_sent = server.kill_after(n_before, process)
        assert left_behind(tmp_path) == []
        n_kept = (tmp_path / "cache" / "answers.jsonl").read_bytes().count(b"\n")
        assert n_before - 4 <= n_kept <= n_sent <= n_kept + 4
        told = build(llm(server, tmp_path), tmp_path).provenance
        assert len(server.bodies) - n_sent == told["counts"]["classified"] + 6 - n_kept
        assert told["backend"]["usage"]["cached"] == n_kept


def test_the_real_world(tmp_path, world, rewriter):
    data = Dataset.from_list(world.chats(200, split="train", seed=0))
    behaviour = build(WorldBackend(rewriter), tmp_path, data)
    truth = {row["id"]: row for row in data}
    for row in behaviour.dataset:
        old = truth[row["source_id"]]
        assert row["topic"] == old["topic"]
        assert row["rewritten"] == (old["topic"] == "mathematics")
        assert (row["response"] != old["response"]) == row["rewritten"]
    assert sum(behaviour.dataset["rewritten"]) == JOB["n_rewritten"]
