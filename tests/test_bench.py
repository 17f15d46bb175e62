"""The training benchmark's own arithmetic, and that it runs; its figures are no test."""

import json
from argparse import Namespace
from dataclasses import replace

import plotly.graph_objects as go
import pytest
import torch

from tests import bench_measure, bench_training
from tests.bench_peers import LIBRARIES
from tests.speed import training_speed

SETUPS = bench_training.small_setups()


def made_up(changed=None, **changes):
    """A setup's result in which every bar holds just so, but for the changes (of `lib`'s row)."""
    ours = {"ms": 100.0, "fvu": 0.3, "peak_mb": 99.0, "l0": 4.0, "ms_min": 90.0, "note": ""}
    libraries = {
        "lib": ours | (changed or {}),
        "lib, float32": ours | {"ms": 1.0, "fvu": 0.1, "peak_mb": 1.0},  # no peer
        "sparsify": ours | {"ms": 250.0, "fvu": 0.299, "peak_mb": 100.0},
        "overcomplete": ours | {"ms": 500.0, "fvu": 0.31, "peak_mb": 200.0},
        "sae-lens": {"error": "RuntimeError: broken", "note": ""},
    }
    result = {"name": "TopK 16", "rule": "topk", "k": 4, "device": "cpu", "floor": {"ms": 70.0}}
    return result | {"ratio": 2.5, "libraries": libraries} | changes


@pytest.mark.parametrize(
    ("result", "missed"),
    [
        (made_up(), []),
        (made_up(ratio=2.49), [0]),
        (made_up(name="crosscoder 8", rule="batchtopk", ratio=5.0), []),
        (made_up(ratio=2.4, device="cuda"), []),  # 2.3 is enough there
        (made_up(floor={"ms": 66.0}), [3]),
        (made_up({"fvu": 0.301, "peak_mb": 100.0}), [1, 2, 4]),
        (made_up(libraries={"lib": made_up()["libraries"]["lib"]}, ratio=None), [0, 2]),
        *[(made_up({"l0": l0}, name="JumpReLU", rule="jumprelu", ratio=5.0), missed)
          for l0, missed in ((3.59, [3]), (3.61, []), (4.39, []), (4.41, [3]))],
    ],
)  # fmt: skip
def test_bars_hold_and_are_missed(result, missed):
    bars = bench_training.judge(result)
    assert [i for i, bar in enumerate(bars) if not bar["holds"]] == missed
    if result["rule"] == "batchtopk":  # sparsify's is another rule: it counts for memory only
        assert (bars[0]["need"], bars[1]["need"], bars[-1]["need"]) == (4.0, 0.31, 100.0)


@pytest.mark.parametrize("amx", [True, False])
def test_floor_and_memory_count_bytes(amx, monkeypatch):
    setup = SETUPS[0]
    monkeypatch.setitem(bench_measure.COPIED, "cpu", 2**16)
    monkeypatch.setattr(bench_measure, "has_amx", lambda: amx)
    monkeypatch.setattr(bench_measure, "worth_a_screen", lambda *_: amx)
    adam, gathered = 7 * 4 * 2 * 16 * 64, 3 * 2 * 32 * 4 * 16
    assert bench_measure.traffic(replace(setup, device="cuda")) == adam + gathered
    x = bench_measure.planted(setup, 1)[0]
    floor = bench_measure.Floor(setup, x, x.new_zeros(64, 16))
    floor.sample()
    assert [len(spent) for spent in floor.seconds.values()] == [1] * (2 + amx)
    spent = {"gemm": [0.001, 0.002, 0.003], "copy": [1, 2, 3], "low_gemm": [1e-4, 3e-4, 5e-4]}
    floor.seconds = {name: [9, 9, 9, *spent[name]] for name in floor.seconds}  # 3 to warm up
    rest, found = 1000 * adam / 2**16, floor.result()
    assert found["ms"] == pytest.approx(2 + rest)
    assert found.get("low_ms") == (pytest.approx(0.3 + rest) if amx else None)
    expected = 16 * (2 * 16 * 64 + 16 + 64) + 4 * 32 * 64 + amx * 2 * 16 * 64
    assert bench_measure.predicted_mb(setup) == pytest.approx(expected / 1e6)


def test_memory_is_that_of_the_peak():
    peak_mb = bench_measure.watch_memory(cuda=False)
    kept = torch.ones(16 * 10**6)  # 64 MB that stay and 128 MB that go
    torch.ones(32 * 10**6).sum()
    assert peak_mb() == pytest.approx(192, abs=15), len(kept)


@pytest.mark.parametrize("setup", SETUPS, ids=lambda setup: setup.name)
def test_ours_starts_at_k_and_trains(setup):
    bench_training.check("lib, float32", setup)
    bench_training.check("lib", setup)


def test_everything_is_written_unless_ours_fails(monkeypatch, tmp_path):
    def racer_here(library, setup, threads):
        turns = bench_training.turns(library, setup)
        return Namespace(turn=turns.__next__, close=turns.close)

    for name in LIBRARIES.keys() - {"lib"}:
        monkeypatch.delitem(LIBRARIES, name)
    monkeypatch.setitem(LIBRARIES, "broken", None)
    monkeypatch.setitem(bench_measure.COPIED, "cpu", 2**16)
    monkeypatch.setattr(bench_training, "Racer", racer_here)
    monkeypatch.setattr(torch, "set_num_threads", lambda n: None)
    monkeypatch.setattr(go.Figure, "write_image", lambda *_, **__: None)  # without a browser
    monkeypatch.setenv("LATENT_BENCH_FIGURES", str(tmp_path))
    bench_training.report(SETUPS[1:3], Namespace(device="cpu", threads=[1, 2], quick=True))
    found = json.loads((tmp_path / "bench.json").read_text())
    results = found["setups"] + found["more_threads"]
    names = [setup.name + end for end in ("", ", 2 threads") for setup in SETUPS[1:3]]
    assert [result["name"] for result in results] == names
    assert len(found["bars"]) == 2 * (3 + 4)
    for result in results:
        ours = result["libraries"]["lib"]
        assert 0 < ours["ms_min"] <= ours["ms"] and ours["fvu"] > 0 and "peak_mb" in ours
        assert "AttributeError: 'NoneType'" in result["libraries"]["broken"]["error"]
        assert result["floor"]["ms"] > 0 and result["ratio"] is None
    points = [{"value": 2048, "ms": 40.0, "peak_mb": 90.0}, {"value": 4096, "error": "died"}]
    drawn = training_speed(found | {"growth": {"d_sae": points, "k": points[:1]}}).data
    traces = {(trace.name, trace.xaxis): list(trace.y) for trace in drawn}
    assert len(traces) == 3 + 2 * 2
    assert traces["floor", "x"] == [result["floor"]["ms"] for result in found["setups"]]
    assert traces["lib: ms a step", "x2"] == [40.0, None]
    monkeypatch.setitem(LIBRARIES, "lib", None)
    with pytest.raises(RuntimeError, match="AttributeError: 'NoneType'"):
        bench_training.race(SETUPS[1])
