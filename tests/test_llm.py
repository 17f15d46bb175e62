"""The client against a real server on loopback."""

import asyncio
import json
import logging
import multiprocessing
import time
import traceback
from pathlib import Path

import pytest
from pydantic import BaseModel, ConfigDict

from lib.data.llm import (
    STOP_AFTER,
    BudgetExceeded,
    EndpointError,
    Failure,
    Llm,
    LlmConfig,
    Request,
)
from tests.kills import kill
from tests.loopback import Loopback, first, isolate, question

KEY = "sk-loopback-0123456789-secret"


class Echo(BaseModel):
    model_config = ConfigDict(extra="forbid")
    word: str


def echo(body: dict) -> dict:
    return {"word": question(body)["word"]}


def ask_for(word: object) -> Request:
    content = f"Say the word.\n{json.dumps({'word': str(word)})}"
    return Request(messages=({"role": "user", "content": content},), answer=Echo)


def words(answers: list) -> list:
    return [answer.word if isinstance(answer, Echo) else answer for answer in answers]


@pytest.fixture(autouse=True)
def clean_environment(tmp_path, monkeypatch):
    isolate(monkeypatch, tmp_path)


def client(server: Loopback, tmp_path: Path, **settings) -> Llm:
    settings = {"max_retries": 2, "max_concurrency": 4, "timeout": 5.0} | settings
    cache = str(tmp_path / "cache")
    return Llm(LlmConfig(model="m", base_url=server.url, cache_dir=cache, **settings))


def test_answers_in_order_and_equal_requests_are_asked_once(tmp_path):
    with Loopback(answer=echo) as server:
        llm = client(server, tmp_path)
        asked = ["a", "b", "a", "c", "b"]
        assert words(llm.ask_sync([ask_for(w) for w in asked])) == asked
        assert len(server.bodies) == llm.usage.requests == 3
        assert llm.usage.input_tokens == 300
        again = client(server, tmp_path)
        assert words(again.ask_sync([ask_for(w) for w in asked])) == asked
        assert len(server.bodies) == 3
        assert (again.usage.cached, again.usage.requests) == (3, 0)
        assert again.ask_sync([]) == []


def test_what_is_sent_states_schema_limit_and_temperature(tmp_path):
    with Loopback(answer=echo) as server:
        client(server, tmp_path, extra_output_tokens=100).ask_sync([ask_for("a")])
        (body,) = server.bodies
    assert body["max_tokens"] == 612
    assert body["temperature"] == 0
    assert body["response_format"]["json_schema"]["schema"] == Echo.model_json_schema()
    assert json.dumps(Echo.model_json_schema()) in body["messages"][-1]["content"]


@pytest.mark.parametrize("fault", ["429", "500", "503", "drop", "broken", "schema", "html"])
def test_a_fault_is_asked_again(tmp_path, fault):
    with Loopback(answer=echo, fault=first(2, fault)) as server:
        assert words(client(server, tmp_path).ask_sync([ask_for("a")])) == ["a"]
        assert len(server.bodies) == 3


@pytest.mark.parametrize(
    ("fault", "n_requests", "reason"),
    [
        ("429", 3, "asked to fail with 429"),
        ("500", 3, "asked to fail with 500"),
        ("drop", 3, "Connection error"),
        ("slow 1", 3, "timed out"),
        ("broken", 3, "not valid"),
        ("schema", 3, "word: Field required"),
        ("html", 3, "not valid"),
        ("400", 1, "asked to fail with 400"),
        ("refusal", 1, "refused: I will not."),
        ("cut", 1, "cut at 512 tokens"),
    ],
)
def test_a_fault_that_stays_fails_its_item_only(tmp_path, fault, n_requests, reason):
    def only_b(number: int, body: dict) -> str | None:
        return fault if question(body)["word"] == "b" else None

    settings = {"timeout": 0.3} if fault.startswith("slow") else {}
    with Loopback(answer=echo, fault=only_b) as server:
        llm = client(server, tmp_path, **settings)
        answers = llm.ask_sync([ask_for(w) for w in "abc"])
        assert len(server.bodies) == 2 + n_requests
        a, failure, c = words(answers)
        assert (a, c) == ("a", "c")
        assert isinstance(failure, Failure)
        assert reason in failure.reason
        # what was answered, even badly, is not asked again; what was not answered is
        again = client(server, tmp_path, **settings).ask_sync([ask_for("b")])
        kept = fault in ("broken", "schema", "refusal")
        assert len(server.bodies) == 2 + n_requests * (1 if kept else 2)
        assert again == [failure]


def test_an_invalid_answer_is_told_what_was_wrong(tmp_path):
    with Loopback(answer=echo, fault=first(1, "schema")) as server:
        client(server, tmp_path).ask_sync([ask_for("a")])
        wrong, told = server.bodies[1]["messages"][1:]
    assert wrong == {"role": "assistant", "content": '{"unknown": 1}'}
    assert "word: Field required" in told["content"]


def test_fences_thoughts_and_missing_usage_are_taken(tmp_path):
    faults = {1: "fenced", 2: "no usage"}
    with Loopback(answer=echo, fault=lambda number, body: faults.get(number)) as server:
        llm = client(server, tmp_path)
        assert words(llm.ask_sync([ask_for("a"), ask_for("b")])) == ["a", "b"]
        assert len(server.bodies) == 2
    assert llm.usage.input_tokens > 100
    assert llm.usage.output_tokens > 10


def test_retry_after_is_honoured(tmp_path):
    with Loopback(answer=echo, fault=first(1, "429 after 0.3")) as server:
        client(server, tmp_path).ask_sync([ask_for("a")])
        assert 0.3 <= server.times[1] - server.times[0] < 2


def test_concurrency_reaches_its_limit_and_never_passes_it(tmp_path):
    with Loopback(answer=echo, latency=0.03) as server:
        client(server, tmp_path, max_concurrency=5).ask_sync([ask_for(i) for i in range(20)])
        assert server.most_in_flight == 5
        assert len(server.bodies) == 20


@pytest.mark.parametrize("options", [("response_format",), ("temperature", "max_tokens")])
def test_an_option_that_the_server_refuses_is_left_out(tmp_path, options):
    with Loopback(answer=echo, refused_options=options) as server:
        llm = client(server, tmp_path)
        assert words(llm.ask_sync([ask_for(i) for i in range(20)])) == [str(i) for i in range(20)]
        assert len(server.bodies) == 20 + len(options)  # each refused once, not once a worker
        last = server.bodies[-1]
    assert last.keys().isdisjoint(options)
    assert {last.get("max_tokens"), last.get("max_completion_tokens")} == {None, 512}


@pytest.mark.parametrize(
    ("settings", "says"), [({"key": KEY}, "401|wrong key"), ({"model": "other"}, "no such model")]
)
def test_wrong_key_or_model_stops_at_once(tmp_path, monkeypatch, settings, says):
    monkeypatch.setenv("OPENAI_API_KEY", "sk-wrong-key-9876543210")
    with Loopback(answer=echo, **settings) as server:
        with pytest.raises(EndpointError, match=says) as caught:
            client(server, tmp_path).ask_sync([ask_for(i) for i in range(30)])
        assert len(server.bodies) == 1
    assert "sk-wrong-key" not in "".join(traceback.format_exception(caught.value))
    assert caught.value.__context__ is None


def test_a_key_that_stops_working_midway_stops_at_once(tmp_path, monkeypatch):
    monkeypatch.setenv("OPENAI_API_KEY", KEY)
    with Loopback(answer=echo, key=KEY, latency=0.01) as server:

        def revoke(number: int, body: dict) -> None:
            server.key = KEY if number < 10 else "another"

        server.fault = revoke
        with pytest.raises(EndpointError, match="wrong key"):
            client(server, tmp_path).ask_sync([ask_for(i) for i in range(60)])
        assert len(server.bodies) < 10 + 2 * 4


def test_a_dead_server_stops_the_job(tmp_path):
    with Loopback(answer=echo, fault=lambda number, body: "500") as server:
        llm = client(server, tmp_path, max_retries=0)
        with pytest.raises(EndpointError, match="in a row"):
            llm.ask_sync([ask_for(i) for i in range(60)])
        assert STOP_AFTER <= len(server.bodies) <= STOP_AFTER + 4


def test_failures_that_are_not_in_a_row_do_not_stop_the_job(tmp_path):
    with Loopback(answer=echo, fault=lambda number, body: "400" if number % 2 else None) as server:
        answers = client(server, tmp_path).ask_sync([ask_for(i) for i in range(2 * STOP_AFTER + 2)])
    assert sum(isinstance(answer, Failure) for answer in answers) == STOP_AFTER + 1


def test_estimate_over_budget_is_refused_before_any_request(tmp_path):
    prices = {"usd_per_million_input": 10.0, "usd_per_million_output": 1000.0}
    with Loopback(answer=echo) as server:
        llm = client(server, tmp_path, budget_usd=1.0, **prices)
        with pytest.raises(BudgetExceeded, match=r"2 requests .*1\.0\d+ USD.*budget is 1\.0000"):
            llm.ask_sync([ask_for("a"), ask_for("b"), ask_for("a")])
        assert server.bodies == []
        llm.ask_sync([ask_for("a")])
        assert llm.usage.usd == pytest.approx((100 * 10 + 10 * 1000) / 1e6)
        free = client(server, tmp_path, budget_usd=0.0, **prices)
        assert words(free.ask_sync([ask_for("a")])) == ["a"]  # the cache costs nothing
        assert free.usage.usd_cached == llm.usage.usd


def test_the_job_stops_when_usage_would_pass_the_budget(tmp_path):
    prices = {"usd_per_million_input": 0.0, "usd_per_million_output": 1000.0}
    with Loopback(answer=echo, completion_tokens=2000, latency=0.02) as server:
        llm = client(server, tmp_path, budget_usd=16.0, **prices)
        with pytest.raises(BudgetExceeded, match="what was answered is in the cache"):
            llm.ask_sync([ask_for(i) for i in range(30)])
        n_sent = len(server.bodies)
        assert 5 <= n_sent <= 8  # 2 USD each, where the estimate said about 0.5
        assert llm.usage.usd == pytest.approx(2.0 * n_sent)
        assert llm.usage.usd <= 16
        lines = (tmp_path / "cache" / "answers.jsonl").read_text().splitlines()
        assert len(lines) == n_sent


def test_works_inside_a_running_event_loop(tmp_path):
    async def notebook_cell() -> list:
        return client(server, tmp_path).ask_sync([ask_for("a")])

    with Loopback(answer=echo) as server:
        assert words(asyncio.run(notebook_cell())) == ["a"]


def test_the_key_appears_nowhere(tmp_path, monkeypatch, caplog, capfd):
    """Not even where the server sends it back in answers, refusals and errors."""
    monkeypatch.setenv("OPENAI_API_KEY", KEY)
    caplog.set_level(logging.DEBUG)
    faults = {2: "400", 3: "schema", 4: "broken"}

    def leak(body: dict) -> dict:
        return {"word": f"{question(body)['word']} {KEY}"}

    with Loopback(answer=leak, key=KEY, fault=lambda n, body: faults.get(n)) as server:
        llm = client(server, tmp_path)
        answers = llm.ask_sync([ask_for(i) for i in range(8)])
    seen = [repr(answers), repr(llm), repr(vars(llm)), caplog.text, *capfd.readouterr()]
    seen += [path.read_text() for path in tmp_path.rglob("*") if path.is_file()]
    assert words(answers)[0] == "0 <key>"
    assert not [text for text in seen if KEY in text]


def test_a_short_placeholder_key_does_not_garble_answers(tmp_path, monkeypatch):
    monkeypatch.setenv("OPENAI_API_KEY", "none")
    with Loopback(answer=echo) as server:
        assert words(client(server, tmp_path).ask_sync([ask_for("none")])) == ["none"]


def test_key_and_address_come_from_dotenv_and_environment_wins(tmp_path, monkeypatch):
    config = LlmConfig(model="m", usd_per_million_input=0.0, usd_per_million_output=0.0)
    with pytest.raises(ValueError, match=r"no key for https://api\.openai\.com/v1"):
        Llm(config)
    with Loopback(answer=echo, key=KEY) as server:
        (tmp_path / ".env").write_text(f"OPENAI_API_KEY={KEY}\nOPENAI_BASE_URL={server.url}\n")
        assert words(Llm(config).ask_sync([ask_for("a")])) == ["a"]
        assert (tmp_path / "data" / "llm_cache" / "answers.jsonl").exists()
    monkeypatch.setenv("OPENAI_BASE_URL", "http://127.0.0.2:1/v1/")
    assert Llm(config).base_url == "http://127.0.0.2:1/v1"


def test_a_remote_server_needs_prices(monkeypatch):
    monkeypatch.setenv("OPENAI_API_KEY", KEY)
    with pytest.raises(ValueError, match="usd_per_million_input"):
        Llm(LlmConfig(model="m", usd_per_million_output=1.0))


@pytest.mark.parametrize(
    "settings",
    [
        {"model": " "},
        {"max_concurrency": 0},
        {"max_retries": -1},
        {"budget_usd": float("nan")},
        {"budget_usd": -1.0},
        {"usd_per_million_input": float("inf")},
        {"timeout": 0.0},
    ],
)
def test_impossible_configs(settings):
    with pytest.raises(ValueError, match=f"need .*{next(iter(settings)).split('_')[0]}"):
        LlmConfig(**{"model": "m"} | settings)


@pytest.mark.parametrize("url", ["localhost:8000", "ftp://x/v1", f"https://u:{KEY}@x/v1", "//x"])
def test_impossible_addresses_are_not_repeated(url):
    with pytest.raises(ValueError, match="need base_url like") as caught:
        Llm(LlmConfig(model="m", base_url=url))
    assert KEY not in str(caught.value)


def test_a_key_with_a_line_break_is_not_repeated(monkeypatch):
    monkeypatch.setenv("OPENAI_API_KEY", f"{KEY}\nX")
    with pytest.raises(ValueError, match="characters that no key has") as caught:
        Llm(LlmConfig(model="m", base_url="http://127.0.0.1:1/v1"))
    assert KEY not in str(caught.value)


def test_a_torn_last_line_is_tolerated(tmp_path):
    with Loopback(answer=echo) as server:
        client(server, tmp_path).ask_sync([ask_for("a"), ask_for("b")])
        path = tmp_path / "cache" / "answers.jsonl"
        path.write_bytes(path.read_bytes()[:-20])
        assert words(client(server, tmp_path).ask_sync([ask_for(w) for w in "abc"])) == [*"abc"]
        assert len(server.bodies) == 4
        client(server, tmp_path).ask_sync([ask_for(w) for w in "abc"])
        assert len(server.bodies) == 4


def test_an_unwritable_cache_is_refused_before_any_request(tmp_path):
    (tmp_path / "cache").write_text("a file")
    with Loopback(answer=echo) as server:
        with pytest.raises(OSError, match="cannot write in"):
            client(server, tmp_path)
        assert server.bodies == []


def test_resume_after_kill_asks_nothing_twice(tmp_path):
    server = Loopback(answer=echo, latency=0.05)

    def job() -> None:
        client(server, tmp_path).ask_sync([ask_for(i) for i in range(40)])

    process = multiprocessing.get_context("fork").Process(target=job)
    process.start()  # forked: nothing is imported again; before the server has threads
    with server:
        deadline = time.monotonic() + 60
        while sum(server.answered.values()) < 15 and time.monotonic() < deadline:
            time.sleep(0.005)
        kill(process)
        time.sleep(0.2)  # what was in flight ends
        n_sent = len(server.bodies)
        n_kept = (tmp_path / "cache" / "answers.jsonl").read_bytes().count(b"\n")
        assert 10 <= n_kept <= n_sent <= n_kept + 4  # lost: at most what was in flight
        answers = client(server, tmp_path).ask_sync([ask_for(i) for i in range(40)])
        assert words(answers) == [str(i) for i in range(40)]
        assert len(server.bodies) - n_sent == 40 - n_kept
