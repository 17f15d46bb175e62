"""The client against a real server on loopback."""

import asyncio
import json
import logging
import multiprocessing
import threading
import traceback
from collections.abc import Iterable
from pathlib import Path

import pytest
from pydantic import BaseModel, ConfigDict

from lib.data.llm import STOP_AFTER, BudgetExceeded, EndpointError, Failure, Llm, LlmConfig, Request
from tests.loopback import KEY, Loopback, first, isolate, question


class Echo(BaseModel):
    model_config = ConfigDict(extra="forbid")
    word: str


def echo(body: dict) -> dict:
    return {"word": question(body)["word"]}


def ask(llm: Llm, words: Iterable[object]) -> list[str | Failure]:
    contents = (f"Say the word.\n{json.dumps({'word': str(word)})}" for word in words)
    answers = llm.ask_sync(
        [Request(messages=({"role": "user", "content": c},), answer=Echo) for c in contents]
    )
    return [answer.word if isinstance(answer, Echo) else answer for answer in answers]


@pytest.fixture(autouse=True)
def clean_environment(tmp_path, monkeypatch):
    isolate(monkeypatch, tmp_path)


@pytest.fixture
def server():
    with Loopback(answer=echo) as server:
        yield server


def client(server: Loopback, tmp_path: Path, **settings) -> Llm:
    settings = {"max_retries": 2, "max_concurrency": 4, "timeout": 5.0} | settings
    cache = str(tmp_path / "cache")
    return Llm(LlmConfig(model="m", base_url=server.url, cache_dir=cache, **settings))


def test_answers_in_order_and_equal_requests_are_asked_once(server, tmp_path):
    llm, asked = client(server, tmp_path), ["a", "b", "a", "c", "b"]
    assert ask(llm, asked) == asked
    assert len(server.bodies) == llm.usage.requests == 3
    assert llm.usage.input_tokens == 300
    again = client(server, tmp_path)
    assert ask(again, asked) == asked
    assert len(server.bodies) == 3
    assert (again.usage.cached, again.usage.requests) == (3, 0)
    assert again.ask_sync([]) == []


def test_what_is_sent_states_schema_limit_and_temperature(server, tmp_path):
    ask(client(server, tmp_path, extra_output_tokens=100), "a")
    (body,) = server.bodies
    assert body["max_tokens"] == 612
    assert body["temperature"] == 0
    assert body["response_format"]["json_schema"]["schema"] == Echo.model_json_schema()
    assert json.dumps(Echo.model_json_schema()) in body["messages"][-1]["content"]


@pytest.mark.parametrize("fault", ["429", "500", "503", "drop", "broken", "schema", "html"])
def test_a_fault_is_asked_again(server, tmp_path, fault):
    server.fault = first(2, fault)
    assert ask(client(server, tmp_path), "a") == ["a"]
    assert len(server.bodies) == 3
    if fault == "schema":
        wrong, told = server.bodies[1]["messages"][1:]
        assert wrong == {"role": "assistant", "content": '{"unknown": 1}'}
        assert "word: Field required" in told["content"]


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
def test_a_fault_that_stays_fails_its_item_only(server, tmp_path, fault, n_requests, reason):
    settings = {"timeout": 0.3} if fault.startswith("slow") else {}
    server.fault = lambda number, body: fault if question(body)["word"] == "b" else None
    a, failure, c = ask(client(server, tmp_path, **settings), "abc")
    assert len(server.bodies) == 2 + n_requests
    assert (a, c) == ("a", "c")
    assert isinstance(failure, Failure)
    assert reason in failure.reason
    assert ask(client(server, tmp_path, **settings), "b") == [failure]
    kept = fault in ("broken", "schema", "refusal")  # answered, if badly: not asked again
    assert len(server.bodies) == 2 + n_requests * (1 if kept else 2)


def test_fences_thoughts_and_missing_usage_are_taken(server, tmp_path):
    server.fault = lambda number, body: {1: "fenced", 2: "no usage"}[number]
    llm = client(server, tmp_path)
    assert ask(llm, "ab") == ["a", "b"]
    assert llm.usage.input_tokens > 100
    assert llm.usage.output_tokens > 10


def test_retry_after_is_honoured(server, tmp_path):
    server.fault = first(1, "429 after 0.3")
    ask(client(server, tmp_path), "a")
    assert server.times[1] - server.times[0] >= 0.3


def test_concurrency_reaches_its_limit_and_never_passes_it(server, tmp_path):
    full = threading.Event()

    def hold(number: int, body: dict) -> None:
        if server.in_flight == 5:
            full.set()
        if number > 1:  # the first is alone: it finds out what the server takes
            full.wait(60)

    server.latency, server.fault = 0.03, hold
    ask(client(server, tmp_path, max_concurrency=5, timeout=60.0), range(20))
    assert server.most_in_flight == 5
    assert len(server.bodies) == 20


@pytest.mark.parametrize("options", [("response_format",), ("temperature", "max_tokens")])
def test_an_option_that_the_server_refuses_is_left_out(server, tmp_path, options):
    server.refused_options = options
    assert ask(client(server, tmp_path), range(20)) == [str(i) for i in range(20)]
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
            ask(client(server, tmp_path), range(30))
        assert len(server.bodies) == 1
    assert "sk-wrong-key" not in "".join(traceback.format_exception(caught.value))
    assert caught.value.__context__ is None


def test_a_key_that_stops_working_midway_stops_at_once(server, tmp_path, monkeypatch):
    monkeypatch.setenv("OPENAI_API_KEY", KEY)
    server.latency = 0.01

    def revoke(number: int, body: dict) -> None:
        server.key = KEY if number < 10 else "another"

    server.fault = revoke
    with pytest.raises(EndpointError, match="wrong key"):
        ask(client(server, tmp_path), range(60))
    assert len(server.bodies) < 10 + 2 * 4


def test_a_dead_server_stops_the_job(server, tmp_path):
    server.fault = lambda number, body: "500"
    with pytest.raises(EndpointError, match="in a row"):
        ask(client(server, tmp_path, max_retries=0), range(60))
    assert STOP_AFTER <= len(server.bodies) <= STOP_AFTER + 4


def test_failures_that_are_not_in_a_row_do_not_stop_the_job(server, tmp_path):
    server.fault = lambda number, body: "400" if number % 2 else None
    answers = ask(client(server, tmp_path), range(2 * STOP_AFTER + 2))
    assert sum(isinstance(answer, Failure) for answer in answers) == STOP_AFTER + 1


def test_estimate_over_budget_is_refused_before_any_request(server, tmp_path):
    prices = {"usd_per_million_input": 10.0, "usd_per_million_output": 1000.0}
    llm = client(server, tmp_path, budget_usd=1.0, **prices)
    with pytest.raises(BudgetExceeded, match=r"2 requests .*1\.0\d+ USD.*budget is 1\.0000"):
        ask(llm, "aba")
    assert server.bodies == []
    ask(llm, "a")
    assert llm.usage.usd == pytest.approx((100 * 10 + 10 * 1000) / 1e6)
    free = client(server, tmp_path, budget_usd=0.0, **prices)
    assert ask(free, "a") == ["a"]  # the cache costs nothing
    assert free.usage.usd_cached == llm.usage.usd


def test_the_job_stops_when_usage_would_pass_the_budget(server, tmp_path):
    server.completion_tokens, server.latency = 2000, 0.02
    prices = {"usd_per_million_input": 0.0, "usd_per_million_output": 1000.0}
    llm = client(server, tmp_path, budget_usd=16.0, **prices)
    with pytest.raises(BudgetExceeded, match="what was answered is in the cache"):
        ask(llm, range(30))
    n_sent = len(server.bodies)
    assert 5 <= n_sent <= 8  # 2 USD each, where the estimate said about 0.5
    assert llm.usage.usd == pytest.approx(2.0 * n_sent)
    assert llm.usage.usd <= 16
    assert len((tmp_path / "cache" / "answers.jsonl").read_text().splitlines()) == n_sent


def test_works_inside_a_running_event_loop(server, tmp_path):
    async def notebook_cell() -> list:
        return ask(client(server, tmp_path), "a")

    assert asyncio.run(notebook_cell()) == ["a"]


def test_the_key_appears_nowhere(server, tmp_path, monkeypatch, caplog, capfd):
    """Not even where the server sends it back in answers, refusals and errors."""
    monkeypatch.setenv("OPENAI_API_KEY", KEY)
    caplog.set_level(logging.DEBUG)
    server.key, server.fault = KEY, lambda n, body: {2: "400", 3: "schema", 4: "broken"}.get(n)
    server.answer = lambda body: {"word": f"{question(body)['word']} {KEY}"}
    answers = ask(llm := client(server, tmp_path), range(8))
    seen = [repr(answers), repr(llm), repr(vars(llm)), caplog.text, *capfd.readouterr()]
    seen += [path.read_text() for path in tmp_path.rglob("*") if path.is_file()]
    assert answers[0] == "0 <key>"
    assert not [text for text in seen if KEY in text]


def test_a_short_placeholder_key_does_not_garble_answers(server, tmp_path, monkeypatch):
    monkeypatch.setenv("OPENAI_API_KEY", "none")
    assert ask(client(server, tmp_path), ["none"]) == ["none"]


def test_key_and_address_come_from_dotenv_and_environment_wins(server, tmp_path, monkeypatch):
    config = LlmConfig(model="m", usd_per_million_input=0.0, usd_per_million_output=0.0)
    with pytest.raises(ValueError, match=r"no key for https://api\.openai\.com/v1"):
        Llm(config)
    server.key = KEY
    (tmp_path / ".env").write_text(f"OPENAI_API_KEY={KEY}\nOPENAI_BASE_URL={server.url}\n")
    assert ask(Llm(config), "a") == ["a"]
    assert (tmp_path / "data" / "llm_cache" / "answers.jsonl").exists()
    monkeypatch.setenv("OPENAI_BASE_URL", "http://127.0.0.2:1/v1/")
    assert Llm(config).base_url == "http://127.0.0.2:1/v1"


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


@pytest.mark.parametrize(
    ("key", "url", "says"),
    [
        (KEY, None, "usd_per_million_input"),  # a remote server needs prices
        (KEY, "localhost:8000", "need base_url like"),
        (KEY, "ftp://x/v1", "need base_url like"),
        (KEY, f"https://u:{KEY}@x/v1", "need base_url like"),
        (KEY, "//x", "need base_url like"),
        (f"{KEY}\nX", "http://127.0.0.1:1/v1", "characters that no key has"),
    ],
)
def test_an_impossible_server_or_key_is_refused_and_not_repeated(monkeypatch, key, url, says):
    monkeypatch.setenv("OPENAI_API_KEY", key)
    with pytest.raises(ValueError, match=says) as caught:
        Llm(LlmConfig(model="m", base_url=url, usd_per_million_output=1.0))
    assert KEY not in str(caught.value)


def test_a_torn_last_line_is_tolerated(server, tmp_path):
    ask(client(server, tmp_path), "ab")
    path = tmp_path / "cache" / "answers.jsonl"
    path.write_bytes(path.read_bytes()[:-20])
    for _ in range(2):
        assert ask(client(server, tmp_path), "abc") == [*"abc"]
        assert len(server.bodies) == 4


def test_an_unwritable_cache_is_refused(server, tmp_path):
    (tmp_path / "cache").write_text("a file")
    with pytest.raises(OSError, match="cannot write in"):
        client(server, tmp_path)


@pytest.mark.slow
def test_resume_after_kill_asks_nothing_twice(tmp_path):
    server = Loopback(answer=echo, latency=0.05)

    def job() -> list:
        return ask(client(server, tmp_path), range(40))

    process = multiprocessing.get_context("fork").Process(target=job)
    process.start()  # forked: nothing is imported again; before the server has threads
    with server:
        n_sent = server.kill_after(15, process)
        n_kept = (tmp_path / "cache" / "answers.jsonl").read_bytes().count(b"\n")
        assert 10 <= n_kept <= n_sent <= n_kept + 4  # lost: at most what was in flight
        assert job() == [str(i) for i in range(40)]
        assert len(server.bodies) - n_sent == 40 - n_kept
