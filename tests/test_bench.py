"""The training benchmark's own arithmetic, and that it runs; its figures are no test."""

import importlib.util
import json
import signal
import sys
from dataclasses import replace
from functools import partial
from typing import ClassVar

import plotly.graph_objects as go
import pytest
import torch

from tests import bench_measure, bench_peers, bench_training
from tests.bench_measure import Floor, Racer, Setup, Start, adam_bytes, gather_bytes, planted
from tests.bench_peers import LIBRARIES, Ours, OursInFloat32
from tests.small_fits import screening
from tests.speed import training_speed

FASTER, FLOOR = "times as fast as the fastest peer", "times the floor"
MEMORY = "MB at the peak, below every peer's"
L0 = "l0 that fvu was reached with, within 10 % of k"
SETUP = Setup(
    name="TopK 16", rule="topk", site_dims=(16,), d_sae=64, k=4, batch=32, steps=2, dead_after=64
)
SETUPS = {
    "topk": SETUP,
    "batchtopk": replace(SETUP, name="BatchTopK 16", rule="batchtopk"),
    "jumprelu": replace(SETUP, name="JumpReLU 16", rule="jumprelu", lr=1e-4),
    "crosscoder": replace(SETUP, name="crosscoder 8", rule="batchtopk", site_dims=(8, 8)),
}


def made_up(**changes):
    """A setup's result in which every bar holds just so, but for `changes`."""
    ours = {"ms": 100.0, "fvu": 0.3, "peak_mb": 99.0, "l0": 4.0, "ms_min": 90.0, "note": ""}
    peers = {
        "sparsify": ours | {"ms": 250.0, "fvu": 0.299, "peak_mb": 100.0},
        "overcomplete": ours | {"ms": 500.0, "fvu": 0.31, "peak_mb": 200.0},
        "sae-lens": {"error": "RuntimeError: broken", "note": ""},
    }
    result = {
        "name": "TopK 16", "rule": "topk", "k": 4, "device": "cpu", "floor": {"ms": 70.0},
        "ratio": 2.5,
        "libraries": {"lib": ours, **peers},
    }  # fmt: skip
    return result | changes


def verdicts(result):
    return [bar["holds"] for bar in bench_training.judge(result)]


def test_bars_hold_and_are_missed():
    assert verdicts(made_up()) == [True] * 5
    assert verdicts(made_up(ratio=2.49)) == [False, True, True, True, True]
    assert verdicts(made_up(floor={"ms": 66.0}))[3] is False
    libraries = made_up()["libraries"]
    worse = {"lib": libraries["lib"] | {"fvu": 0.301, "peak_mb": 100.0}}
    assert verdicts(made_up(libraries=libraries | worse)) == [True, False, False, True, False]
    assert verdicts(made_up(ratio=2.4, device="cuda"))[0] is True  # 2.3 is enough there


def test_bars_without_numbers_are_missed():
    libraries = made_up()["libraries"]
    alone = made_up(libraries={"lib": libraries["lib"]}, ratio=None)
    assert [bar["bar"] for bar in bench_training.judge(alone)] == [FASTER, FLOOR, MEMORY]
    assert verdicts(alone) == [False, True, False]
    unknown = {"lib": libraries["lib"] | {"peak_mb": None}}
    assert verdicts(made_up(libraries=libraries | unknown)) == [True] * 4 + [False]
    rows = {name: row | {"peak_mb": None} for name, row in libraries.items() if name != "lib"}
    assert verdicts(made_up(libraries=libraries | rows)) == [True] * 4 + [False]


@pytest.mark.parametrize(
    ("l0", "holds"), [(3.59, False), (3.61, True), (4.39, True), (4.41, False)]
)
def test_a_jumprelu_is_judged_at_its_l0(l0, holds):
    libraries = made_up()["libraries"]
    ours = {"lib": libraries["lib"] | {"l0": l0, "fvu": 0.3}}
    result = made_up(name="JumpReLU 16", rule="jumprelu", ratio=5.0, libraries=libraries | ours)
    (bar,) = [bar for bar in bench_training.judge(result) if bar["bar"] == L0]
    assert bar["holds"] is holds and (bar["value"], bar["need"]) == (l0, 4)


def test_every_setup_has_a_bar_and_its_own_name():
    setups = bench_measure.cpu_setups(30, 4), bench_measure.gpu_setups(30)
    for some in setups:
        assert len({setup.name for setup in some}) == len(some)
        assert {setup.name.split(" ")[0] for setup in some} <= bench_training.SPEED_BARS.keys()
    named = {setup.name: setup for setup in setups[0]}
    dead, alive = named["TopK 512 dead"], named["TopK 512"]
    assert replace(dead, name=alive.name, dead_after=alive.dead_after) == alive
    assert dead.batch < dead.dead_after <= bench_measure.WARM_UP * dead.batch  # in all timed steps
    assert alive.dead_after > (bench_measure.WARM_UP + 100) * alive.batch


def test_another_rule_is_no_peer_but_counts_for_memory():
    result = made_up(name="crosscoder 8", rule="batchtopk", ratio=5.0)
    speed, fastest, *_, memory = bench_training.judge(result)
    assert (speed["need"], fastest["need"]) == (4.0, 0.31)  # overcomplete's, not sparsify's
    assert memory["need"] == 100.0  # sparsify's
    assert bench_training.best_peer(result, "ms") == 500
    assert bench_training.best_peer(result, "ms", stand_ins=True) == 250


def test_ours_without_a_screen_is_no_peer_and_runs_where_there_would_be_one(monkeypatch):
    libraries = made_up()["libraries"]
    slow = libraries | {"lib, float32": libraries["lib"] | {"ms": 1.0, "fvu": 0.1, "peak_mb": 1.0}}
    assert verdicts(made_up(libraries=slow)) == [True] * 5
    for amx in (True, False):
        monkeypatch.setattr(bench_peers.search, "has_amx", lambda amx=amx: amx)
        assert ("lib, float32" in bench_peers.racing(SETUP)) == amx
        assert "lib, float32" not in bench_peers.racing(replace(SETUP, device="cuda"))
    batches = planted(SETUP, 3)
    both = [make(SETUP, Start.of(SETUP, batches[0])) for make in (Ours, OursInFloat32)]
    with screening() as scans:
        both[0].step(batches[0])
        assert scans == [True]
        both[1].step(batches[0])
        assert scans == [True]
    first, second = (runner.reconstruct(batches[2])[0] for runner in both)
    torch.testing.assert_close(first, second, rtol=1e-3, atol=1e-4)


@pytest.mark.parametrize("amx", [True, False])
def test_floor_counts_bytes(amx, monkeypatch):
    monkeypatch.setitem(bench_measure.COPIED, "cpu", 2**16)
    monkeypatch.setattr(bench_measure, "has_amx", lambda: amx)
    assert adam_bytes(SETUP) == 7 * 4 * 2 * 16 * 64
    assert gather_bytes(SETUP) == 0
    assert gather_bytes(replace(SETUP, device="cuda")) == 3 * 2 * 32 * 4 * 16
    x = planted(SETUP, 1)[0]
    floor = Floor(SETUP, x, Start.of(SETUP, x).rows)
    floor.sample()
    torch.testing.assert_close(floor.out, x @ floor.rows.T)
    floor.gemm_seconds = [9, 9, 9, 0.001, 0.002, 0.003]  # three to warm up
    floor.copy_seconds = [9, 9, 9, 1, 2, 3]
    bandwidth = 2 * floor.source.numel() / 2
    result = floor.result()
    assert result["gemm_ms"] == pytest.approx(2)
    rest = 1000 * adam_bytes(SETUP) / bandwidth
    assert result["ms"] == pytest.approx(2 + rest)
    assert len(floor.low_gemm_seconds) == amx
    if amx:
        floor.low_gemm_seconds = [9, 9, 9, 1e-4, 3e-4, 5e-4]
        assert floor.result()["low_ms"] == pytest.approx(0.3 + rest)


def test_memory_formula_and_measure():
    start = Start.of(SETUP, planted(SETUP, 1)[0])
    parameters = sum(p.numel() for p in Ours(SETUP, start).trainee.dictionary.parameters())
    assert SETUP.n_parameters == parameters
    expected = 4 * 4 * parameters + 4 * 32 * 64
    assert bench_measure.predicted_mb(SETUP) == pytest.approx(expected / 1e6)
    with screening():
        assert bench_measure.predicted_mb(SETUP) == pytest.approx((expected + 2 * 16 * 64) / 1e6)
    if sys.platform == "linux":
        kept = []  # 64 MB that stay and 128 MB that go
        step = lambda: torch.ones(32 * 10**6).sum()  # noqa: E731
        build = lambda: kept.append(torch.ones(16 * 10**6)) or step  # noqa: E731
        assert bench_measure.peak_mb(build, cuda=False) == pytest.approx(192, abs=15)


@pytest.mark.parametrize("setup", SETUPS.values(), ids=SETUPS)
def test_planted_data(setup):
    first, second = planted(setup, 2)
    for site in first.split(setup.site_dims, dim=1):
        assert site.norm(dim=1).mean().item() == pytest.approx(site.shape[1] ** 0.5, rel=1e-4)
    assert first.mean(0).abs().max() < 1e-5 < (first - second).abs().max()
    assert torch.equal(planted(setup, 2)[1], second)
    assert not torch.equal(planted(replace(setup, seed=1), 2)[1], second)


@pytest.mark.parametrize("setup", SETUPS.values(), ids=SETUPS)
def test_ours_starts_at_k_and_trains(setup):
    batches = planted(setup, 12)
    runner = Ours(setup, Start.of(setup, batches[0]))
    with torch.no_grad():
        assert runner.reconstruct(batches[0])[1] == pytest.approx(setup.k, abs=0.05)
    before = bench_training.held_out(runner, batches[-2:])
    for x in batches[:10]:
        runner.step(x)
    after = bench_training.held_out(runner, batches[-2:])
    assert after["fvu"] < 0.998 * before["fvu"]
    assert after["l0"] == pytest.approx(setup.k, rel=0.5 if setup.rule == "jumprelu" else 1e-6)


def here(name):
    """Peers other than sae-lens are there only where `make bench` or `make peers` has run: their
    own pins do not fit ours, so that no extra can ask for all of them."""
    package = name.replace("-", "_")
    needs = ["sklearn", package] if name == "overcomplete" else [package]
    return all(importlib.util.find_spec(need) for need in needs)


@pytest.mark.parametrize(
    ("kind", "name"),
    [
        pytest.param(
            kind, name, marks=pytest.mark.skipif(not here(name), reason=f"no {name}: make peers")
        )
        for kind, setup in SETUPS.items()
        for name in bench_peers.racing(setup)
        if not name.startswith("lib")
    ],
)
def test_peers_start_where_we_do_and_train(kind, name):
    setup = SETUPS[kind]
    batches = planted(setup, 12)
    start = Start.of(setup, batches[0])
    ours, theirs = Ours(setup, start), LIBRARIES[name](setup, start)
    with torch.no_grad():
        ours.trainee.dictionary.b_dec.copy_(start.mean)
        mine, other = ours.reconstruct(batches[1]), theirs.reconstruct(batches[1])
    if not setup.crosscoder:  # which ranks by code norms, unknown to peers
        torch.testing.assert_close(other, mine, atol=1e-4, rtol=1e-4)
    before = bench_training.held_out(theirs, batches[-2:])
    for x in batches[:10]:
        theirs.step(x)
    assert bench_training.held_out(theirs, batches[-2:])["fvu"] < 0.998 * before["fvu"]


def test_missing_peers_stop_before_any_work(monkeypatch, capsys, tmp_path):
    monkeypatch.setenv("LATENT_BENCH_FIGURES", str(tmp_path / "figures"))
    monkeypatch.setattr(bench_peers, "PACKAGES", ("torch", "no_such_package"))
    assert bench_training.main([]) == 2
    said = capsys.readouterr().err
    assert "no_such_package" in said and "make peers" in said and "torch" not in said
    assert not (tmp_path / "figures").exists()


class Broken:
    note = ""

    def __init__(self, setup, start):
        self.done = 0

    def step(self, x):
        self.done += 1
        if self.done > 2:
            raise RuntimeError("gave up\nsecond line")


class RacerHere:
    """A racer in this process."""

    threads: ClassVar[list[int]] = []

    def __init__(self, library, setup, threads):
        assert threads == torch.get_num_threads()
        self.threads.append(threads)
        self.turn = partial(next, bench_training.turns(library, setup))

    def close(self):
        pass


@pytest.fixture
def small_bench(monkeypatch, tmp_path):
    """The whole benchmark on tiny setups, its subprocesses as calls; without a browser."""
    monkeypatch.setenv("LATENT_BENCH_FIGURES", str(tmp_path))
    monkeypatch.setattr(bench_peers, "PACKAGES", ())
    monkeypatch.setitem(bench_measure.COPIED, "cpu", 2**16)
    for name in list(LIBRARIES):
        if name != "lib":
            monkeypatch.delitem(LIBRARIES, name)
    monkeypatch.setitem(LIBRARIES, "broken", Broken)
    monkeypatch.setattr(bench_training, "cpu_setups", lambda *_: list(SETUPS.values()))
    monkeypatch.setattr(
        bench_training, "growth_setups", lambda base: {"d_sae": [base], "k": [base]}
    )
    monkeypatch.setattr(
        bench_training,
        "in_its_own_process",
        lambda library, setup, threads: bench_training.alone(library, setup),
    )
    monkeypatch.setattr(bench_training, "Racer", RacerHere)
    RacerHere.threads.clear()
    monkeypatch.setattr(bench_training.bench_harvest, "measure", lambda: {"ratio": 1.1})
    drawn = []
    monkeypatch.setattr(go.Figure, "write_image", lambda self, path, **_: drawn.append(path))
    return tmp_path, drawn


def test_everything_is_written(small_bench, capsys):
    folder, drawn = small_bench
    threads = torch.get_num_threads()
    try:
        assert bench_training.main(["--threads", "1", "2"]) == 0
    finally:
        torch.set_num_threads(threads)
    found = json.loads((folder / "bench.json").read_text())
    assert (folder / "bench.html").exists() and drawn == [folder / "bench.png"]
    assert found["machine"]["threads"] == 1 and found["harvest"] == {"ratio": 1.1}
    assert [s["name"] for s in found["setups"]] == [s.name for s in SETUPS.values()]
    assert RacerHere.threads == [1] * 2 * len(SETUPS) + [2] * 2 * len(SETUPS)
    again = [f"{s.name}, 2 threads" for s in SETUPS.values()]
    assert [s["name"] for s in found["more_threads"]] == again
    for result in found["setups"] + found["more_threads"]:
        ours, broken = result["libraries"]["lib"], result["libraries"]["broken"]
        assert 0 < ours["ms_min"] <= ours["ms"] and ours["fvu"] > 0
        assert ("peak_mb" in ours) == (result in found["setups"])
        assert broken == {"note": "", "error": "RuntimeError: gave up"}
        assert result["floor"]["ms"] > 0 and result["ratio"] is None
    assert {axis: len(points) for axis, points in found["growth"].items()} == {"d_sae": 1, "k": 1}
    assert found["growth"]["k"][0]["ms"] > 0
    shared = [FASTER, FLOOR, MEMORY]
    bars = [(bar["setup"], bar["bar"]) for bar in found["bars"]]
    assert bars == [
        *[("TopK 16", bar) for bar in shared],
        *[("BatchTopK 16", bar) for bar in shared],
        *[("JumpReLU 16", bar) for bar in (FASTER, L0, FLOOR, MEMORY)],
        *[("crosscoder 8", bar) for bar in shared],
        *[("TopK 16, 2 threads", bar) for bar in shared[:-1]],
        *[("BatchTopK 16, 2 threads", bar) for bar in shared[:-1]],
        *[("JumpReLU 16, 2 threads", bar) for bar in (FASTER, L0, FLOOR)],
        *[("crosscoder 8, 2 threads", bar) for bar in shared[:-1]],
        ("harvest", "times the bare forward pass"),
    ]
    assert [bar["holds"] for bar in found["bars"] if bar["bar"] != L0] == 20 * [False] + [True]
    said = capsys.readouterr().out
    assert "RuntimeError: gave up" in said and ("missed" in said or "holds" in said)


def test_our_own_errors_are_raised(small_bench, monkeypatch):
    monkeypatch.setitem(LIBRARIES, "lib", Broken)
    with pytest.raises(RuntimeError, match="gave up"):
        bench_training.race(SETUP)


def test_a_library_takes_its_turns_in_a_process_of_its_own():
    here, there = bench_training.turns("lib", SETUP), Racer("lib", SETUP, 1)
    assert there.turn() == next(here) == {"note": ""}
    for _ in range(bench_measure.WARM_UP + SETUP.steps):
        assert 0 < there.turn()["seconds"] < 60 and next(here)["seconds"] > 0
    assert there.turn() == pytest.approx(next(here), rel=1e-5)
    assert there.turn() == {"error": "exit code 0"}  # nobody should have asked for more
    there.close()
    stranger = Racer("nobody", SETUP, 1)
    assert stranger.turn() == {"error": "KeyError: 'nobody'"}
    stranger.close()


@pytest.mark.parametrize("answers", [0, 1])
def test_a_library_that_dies_says_so(monkeypatch, answers):
    code = f"import os; {'print(1, flush=True); ' * answers}os._exit(9)"
    monkeypatch.setattr(bench_measure, "_command", lambda *_: [sys.executable, "-c", code])
    racer = Racer("lib", SETUP, 1)
    racer.process.wait()
    assert [racer.turn() for _ in range(answers + 1)] == answers * [1] + [{"error": "exit code 9"}]
    racer.close()


def test_racers_are_ended_when_ours_fails(small_bench, monkeypatch):
    started = []

    def racer(library, setup, threads):
        code = "import time; " + ("" if library == "lib" else "time.sleep(600)")
        with monkeypatch.context() as patch:
            patch.setattr(bench_measure, "_command", lambda *_: [sys.executable, "-c", code])
            started.append(Racer(library, setup, threads))
        return started[-1]

    monkeypatch.setattr(bench_training, "Racer", racer)
    with pytest.raises(RuntimeError, match="exit code 0"):
        bench_training.race(SETUP)
    assert [racer.process.poll() for racer in started] == [0, -signal.SIGKILL]


def test_figure_shows_what_it_is_given():
    points = [{"value": 2048, "ms": 40.0, "peak_mb": 90.0}, {"value": 4096, "error": "died"}]
    found = {
        "machine": {"cpu": "a processor", "gpu": "", "threads": 2},
        "setups": [made_up(), made_up(name="BatchTopK 16")],
        "growth": {"d_sae": points, "k": [{"value": 8, "ms": 1.0, "peak_mb": 2.0}]},
    }
    figure = training_speed(found)
    bars = {trace.name: list(trace.y) for trace in figure.data if trace.type == "bar"}
    assert bars == {
        "lib": [100, 100], "sparsify": [250, 250], "overcomplete": [500, 500],
        "sae-lens": [None, None],
    }  # fmt: skip
    lines = [(t.name, list(t.x), list(t.y)) for t in figure.data if t.type == "scatter"]
    assert lines == [
        ("floor", ["TopK 16", "BatchTopK 16"], [70, 70]),
        ("lib: ms a step", [2048, 4096], [40, None]),
        ("lib: peak MB", [2048, 4096], [90, None]),
        ("lib: ms a step", [8], [1]),
        ("lib: peak MB", [8], [2]),
    ]
    legend = [t.name for t in figure.data if t.showlegend is not False]
    assert len(legend) == len(set(legend))
    assert "a processor" in figure.layout.title.text
    axes = [a for a in figure.layout if a.startswith("yaxis")]
    assert {figure.layout[axis].type for axis in axes} == {"log"}
    assert len(training_speed(found | {"growth": {}}).data) == 5  # four libraries and the floor
