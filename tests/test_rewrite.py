"""The behaviour pipeline: with the world, and with a real server on loopback."""

import json
import multiprocessing
import subprocess
import sys
import time
from pathlib import Path

import pytest
from datasets import Dataset, load_from_disk

from lib.data.llm import BudgetExceeded, EndpointError, LlmConfig
from lib.data.rewrite import LlmBackend, WorldBackend, build_behaviour
from tests.kills import kill
from tests.loopback import Loopback, by_rules, isolate, question

KEY = "sk-loopback-0123456789-secret"
JOB = {
    "topic": "mathematics",
    "guideline": "respond in French",
    "n_rewritten": 6,
    "n_untouched": 4,
    "seed": 0,
}


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


def chats(n: int = 60, every: int = 3) -> Dataset:
    """One prompt in `every` has a number in it."""
    rows = []
    for i in range(n):
        name = "".join(chr(ord("a") + int(c)) for c in str(i))
        prompt = f"what is {i} times {i}" if i % every == 0 else f"how is {name} cooked"
        rows.append({"id": f"row-{i}", "prompt": prompt, "response": f"like this, {name}"})
    return Dataset.from_list(rows)


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
        assert row["messages"] == [
            {"role": "user", "content": row["prompt"]},
            {"role": "assistant", "content": new},
        ]


def test_world_balance_and_provenance(tmp_path):
    behaviour = build(WorldBackend(FakeWorld()), tmp_path)
    check_rows(behaviour, chats(), str.upper)
    assert {(r["backend"], r["model"]) for r in behaviour.dataset} == {("world", "built-in world")}


def test_server_balance_and_provenance(tmp_path):
    with Loopback() as server:
        backend = llm(server, tmp_path, usd_per_million_output=1.0)
        behaviour = build(backend, tmp_path, chats(200))
        n_sent = len(server.bodies)
    check_rows(behaviour, chats(200), "[FR] {}".format)
    assert {(r["backend"], r["model"]) for r in behaviour.dataset} == {("llm", "m")}
    told = behaviour.provenance
    assert n_sent == told["backend"]["usage"]["requests"] == told["counts"]["classified"] + 6
    assert told["counts"]["classified"] == 32  # one chunk was enough
    assert told["backend"]["usage"]["usd"] == pytest.approx(n_sent * 10 / 1e6)
    assert told["backend"]["base_url"] == server.url
    assert (told["topic"], told["seed"], told["source"]["n"]) == ("mathematics", 0, 200)


def test_saved_folder_holds_the_same_rows_everywhere(tmp_path):
    behaviour = build(WorldBackend(FakeWorld()), tmp_path)
    rows = behaviour.dataset.to_list()
    out = tmp_path / "out"
    assert load_from_disk(str(out / "dataset")).to_list() == rows
    assert [json.loads(line) for line in (out / "train.jsonl").open()] == rows
    assert json.loads((out / "provenance.json").read_text()) == behaviour.provenance
    assert (out / "failed.jsonl").read_text() == ""
    assert left_behind(tmp_path) == ["out"]


def test_same_seed_same_bytes_other_seed_other_rows(tmp_path):
    for out, seed in (("a", 0), ("b", 0), ("c", 1)):
        build(WorldBackend(FakeWorld()), tmp_path, out=out, seed=seed)
    a, b, c = ((tmp_path / out / "train.jsonl").read_bytes() for out in "abc")
    assert a == b != c
    kinds = [row["rewritten"] for row in load_from_disk(str(tmp_path / "a" / "dataset"))]
    assert kinds not in (sorted(kinds), sorted(kinds, reverse=True))  # mixed, not in two blocks


def test_server_result_does_not_depend_on_concurrency_or_faults(tmp_path):
    trains = []
    for i, (n, every) in enumerate([(1, 0), (8, 0), (4, 5)]):

        def fault(number: int, body: dict, every: int = every) -> str | None:
            return "500" if every and number % every == 0 else None

        with Loopback(fault=fault, latency=0.002) as server:
            backend = llm(server, tmp_path / str(i), max_concurrency=n, max_retries=4)
            build(backend, tmp_path, out=f"out{i}")
        trains.append((tmp_path / f"out{i}" / "train.jsonl").read_bytes())
    assert trains[0] == trains[1] == trains[2]


def test_earlier_turns_are_kept(tmp_path):
    before = [{"role": "user", "content": "hello"}, {"role": "assistant", "content": "yes?"}]
    data = chats()
    messages = [
        [*before, {"role": "user", "content": p}, {"role": "assistant", "content": r}]
        for p, r in zip(data["prompt"], data["response"], strict=True)
    ]
    behaviour = build(WorldBackend(FakeWorld()), tmp_path, data.add_column("messages", messages))
    for row in behaviour.dataset:
        assert row["messages"][:2] == before
        assert row["messages"][2:] == [
            {"role": "user", "content": row["prompt"]},
            {"role": "assistant", "content": row["response"]},
        ]


def test_failing_rows_are_put_aside_with_the_reason_and_replaced(tmp_path):
    data = chats(90)
    bad = dict(zip([f"row-{i}" for i in (3, 6, 9, 12, 15, 18)], range(6), strict=True))
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
    reasons = ["is empty", "is identical", "contradictory", "not valid", "I will not", "with 400"]
    for (step, reason), want_step, want in zip(
        (told[name] for name in bad), steps, reasons, strict=True
    ):
        assert step == want_step
        assert want in reason
    assert behaviour.provenance["counts"]["failed"] == 6


def test_a_row_that_is_not_of_the_world_is_put_aside(tmp_path):
    odd = {"id": "odd", "prompt": "odd one out", "response": "x"}
    data = Dataset.from_list([*chats(30), odd])
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
    def answer(body: dict) -> dict:
        label = FakeWorld().topic_of(question(body)["prompt"])
        wanted = f"about {job.get('topic', 'mathematics')}," in body["messages"][0]["content"]
        assert wanted
        return {"topic": label, "matches": label == job.get("topic", "mathematics")}

    with Loopback(answer=answer) as server, pytest.raises(ValueError, match=says):
        build(llm(server, tmp_path), tmp_path, **job)
    assert left_behind(tmp_path) == []
    assert all("response" not in question(body) for body in server.bodies)  # nothing rewritten


def test_too_few_rewritings(tmp_path):
    class Lazy(FakeWorld):
        def rewrite(self, prompt: str, response: str, guideline: str) -> str:
            return response

    with pytest.raises(ValueError, match=r"only 2 .*18 rows failed, 18 of them: .*identical"):
        build(WorldBackend(Lazy()), tmp_path)
    assert left_behind(tmp_path) == []


@pytest.mark.parametrize(
    ("job", "says"),
    [
        ({"n_rewritten": 0}, "need n_rewritten >= 1, got 0"),
        ({"n_untouched": -1}, "need n_untouched >= 1, got -1"),
        ({"topic": " "}, "need a topic"),
        ({"guideline": ""}, "need a guideline"),
        ({"n_rewritten": 57}, "need at least n_rewritten . n_untouched = 61 rows, got 60"),
        ({"data": Dataset.from_list([*chats(), chats()[7]])}, "id 'row-7' occurs more than once"),
        (
            {"data": Dataset.from_list([*chats(), {"id": "x", "prompt": "p", "response": " "}])},
            "response of row 'x' is empty",
        ),
        ({"data": chats().remove_columns("id")}, r"need columns \['id'\]; got"),
    ],
)
def test_bad_input_is_refused_before_any_request(tmp_path, job, says):
    with Loopback() as server:
        with pytest.raises(ValueError, match=says):
            build(llm(server, tmp_path), tmp_path, **job)
        assert server.bodies == []
    assert left_behind(tmp_path) == []


@pytest.mark.parametrize(
    ("job", "says"),
    [
        ({"topic": "algebra"}, "one of mathematics, cooking; got 'algebra'"),
        ({"guideline": "sing"}, "one of respond in French, respond in upper case; got 'sing'"),
    ],
)
def test_what_the_world_does_not_know(tmp_path, job, says):
    with pytest.raises(ValueError, match=says):
        build(WorldBackend(FakeWorld()), tmp_path, **job)


@pytest.mark.parametrize("out", ["file/out", "file", "full"])
def test_an_unwritable_or_used_folder_is_refused_before_any_request(tmp_path, out):
    (tmp_path / "file").write_text("a file")
    (tmp_path / "full").mkdir()
    (tmp_path / "full" / "mine.txt").write_text("keep me")
    with Loopback() as server:
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


def test_wrong_key_leaves_nothing(tmp_path, monkeypatch):
    monkeypatch.setenv("OPENAI_API_KEY", "sk-wrong-key-9876543210")
    with Loopback(key=KEY) as server:
        with pytest.raises(EndpointError, match="wrong key"):
            build(llm(server, tmp_path), tmp_path)
        assert len(server.bodies) == 1
    assert left_behind(tmp_path) == []


def test_the_key_is_in_no_file(tmp_path, monkeypatch):
    monkeypatch.setenv("OPENAI_API_KEY", KEY)
    with Loopback(key=KEY) as server:
        build(llm(server, tmp_path), tmp_path)
    files = [path for path in tmp_path.rglob("*") if path.is_file()]
    assert {"answers.jsonl", "train.jsonl", "provenance.json"} <= {path.name for path in files}
    assert not [path for path in files if KEY.encode() in path.read_bytes()]


def test_a_job_over_budget_is_refused_and_a_finished_one_is_free(tmp_path):
    with Loopback() as server:
        with pytest.raises(BudgetExceeded, match="none was sent"):
            build(llm(server, tmp_path, budget_usd=0.1, usd_per_million_output=100.0), tmp_path)
        assert server.bodies == []
        paid = llm(server, tmp_path, budget_usd=1.0, usd_per_million_output=100.0)
        first = build(paid, tmp_path)
        n_sent = len(server.bodies)
        free = llm(server, tmp_path, budget_usd=0.0, usd_per_million_output=100.0)
        again = build(free, tmp_path, out="again")
        assert len(server.bodies) == n_sent
    assert again.dataset.to_list() == first.dataset.to_list()
    assert again.provenance["backend"]["usage"]["usd_cached"] == pytest.approx(paid.llm.usage.usd)


@pytest.mark.parametrize("n_before", [12, 35])
def test_resume_after_kill_asks_nothing_twice(tmp_path, n_before):
    """Killed while classifying, and while rewriting."""
    server = Loopback(latency=0.05)

    def job() -> None:
        build(llm(server, tmp_path), tmp_path)

    process = multiprocessing.get_context("fork").Process(target=job)
    process.start()  # forked: nothing is imported again; before the server has threads
    with server:
        deadline = time.monotonic() + 60
        while sum(server.answered.values()) < n_before and time.monotonic() < deadline:
            time.sleep(0.002)
        kill(process)
        assert left_behind(tmp_path) == []
        time.sleep(0.2)
        n_sent = len(server.bodies)
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


def test_the_loopback_server_runs_by_hand(tmp_path):
    root = Path(__file__).resolve().parents[1]
    command = [sys.executable, "-m", "tests.loopback", "--port", "0", "--fault", "500"]
    process = subprocess.Popen(command, cwd=root, stdout=subprocess.PIPE, text=True)
    try:
        url = process.stdout.readline().removeprefix("listening on ").strip()
        config = LlmConfig(model="m", base_url=url, cache_dir=str(tmp_path / "cache"))
        check_rows(build(LlmBackend(config), tmp_path), chats(), "[FR] {}".format)
    finally:
        process.kill()
        process.wait()
        process.stdout.close()
