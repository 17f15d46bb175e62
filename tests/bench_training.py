"""Speed of training beside its peers and its floor: `make bench`, or `make bench-gpu`.

All libraries train on the same batches, each in a process of its own, a step of each in turn, so
that the machine's drift hits all alike. Reported: median and least ms a step, fvu on held-out
batches after equal tokens, peak memory. On a CPU speed is measured again with two threads. Before
that, a small training checks that all begin alike and learn. Writes `figures/bench.json`, `.html`
and `.png`.
"""

import argparse
import json
import os
import platform
import statistics
import sys
import time
import traceback
from collections.abc import Callable, Iterator
from dataclasses import asdict, replace
from functools import partial
from pathlib import Path

import torch

from lib import paths
from lib.runtime import atomic_file, require_writable
from tests import bench_harvest, bench_peers
from tests.bench_measure import (
    HELD_OUT,
    WARM_UP,
    Floor,
    Racer,
    Setup,
    Start,
    cpu_setups,
    gpu_setups,
    planted,
    predicted_mb,
    seconds,
    watch_memory,
)
from tests.bench_peers import LIBRARIES, racing
from tests.speed import training_speed

SPEED_BARS = {"TopK": 2.5, "BatchTopK": 5.0, "JumpReLU": 5.0, "crosscoder": 4.0}
"""How many times as fast as the fastest peer on a CPU; keys are the first words of setups."""
GPU_BAR, FLOOR_BAR = 2.3, 1.5
FVU_EQUAL, L0_EQUAL = 1.005, 0.1
"""Up to here rounding and the order of sums make the difference; a JumpReLU aims at k."""
SMALL = {"site_dims": (16,), "d_sae": 64, "k": 4, "batch": 32, "steps": 2, "dead_after": 64}


def small_setups() -> list[Setup]:
    return [
        Setup(name="TopK 16", rule="topk", **SMALL),
        Setup(name="BatchTopK 16", rule="batchtopk", **SMALL),
        Setup(name="JumpReLU 16", rule="jumprelu", lr=1e-4, **SMALL),
        Setup(name="crosscoder 8", rule="batchtopk", **SMALL | {"site_dims": (8, 8)}),
    ]


def check(library: str, setup: Setup) -> None:
    """Raise AssertionError unless a library begins as the others do, at an l0 of k, and learns."""
    batches = planted(setup, 12)
    start = Start.of(setup, batches[0])
    with LIBRARIES["lib"].context(), torch.no_grad():
        ours = LIBRARIES["lib"](setup, start)
        ours.dictionary.b_dec.copy_(start.mean)
        first, l0 = ours.reconstruct(batches[0])
    assert abs(l0 - setup.k) < 0.05, (setup.name, l0)
    with LIBRARIES[library].context():
        runner = LIBRARIES[library](setup, start)
        if len(setup.site_dims) == 1 and not library.startswith("lib"):
            with torch.no_grad():  # a crosscoder ranks by code norms, unknown to peers
                x_hat, _ = runner.reconstruct(batches[0])
            torch.testing.assert_close(x_hat, first, atol=1e-4, rtol=1e-4, msg=library)
        before = held_out(runner, batches[-2:])["fvu"]
        for x in batches[:10]:
            runner.step(x)
        after = held_out(runner, batches[-2:])
    assert after["fvu"] < 0.998 * before, (library, setup.name, before, after)
    if library.startswith("lib"):
        off = 0.5 if setup.rule == "jumprelu" else 1e-6
        assert abs(after["l0"] / setup.k - 1) <= off, (setup.name, after)


def race(setup: Setup) -> dict:
    """All libraries and the floor beside each other."""
    x = planted(setup, 1)[0]
    floor = Floor(setup, x, Start.of(setup, x).rows)
    rows = trained(racing(setup), setup, floor.sample)
    result = {**asdict(setup), "floor": floor.result(), "libraries": rows}
    for key, stand_ins in (("ratio", False), ("ratio_with_stand_ins", True)):
        fastest = best_peer(result, "ms", stand_ins)
        result[key] = fastest / rows["lib"]["ms"] if fastest else None
    return result | {"predicted_mb": predicted_mb(setup)}


def trained(
    names: list[str], setup: Setup, after_turn: Callable[[], None] = lambda: None
) -> dict[str, dict]:
    """Train libraries in turn on the same batches; one that fails leaves with its error.

    Raises:
        RuntimeError: it is ours that fails.
    """
    rows = {name: {"seconds": []} for name in names}
    racers = {name: Racer(name, setup, torch.get_num_threads()) for name in names}
    try:
        for _ in range(1 + WARM_UP + setup.steps + 1):  # made, each step, judged
            for name in list(racers):
                answer, row = racers[name].turn(), rows[name]
                if "seconds" in answer:
                    row["seconds"].append(answer["seconds"])
                else:
                    row |= answer
                if "error" in answer:
                    racers.pop(name).close()
                    if name.startswith("lib"):
                        raise RuntimeError(answer["error"])
            after_turn()
    finally:
        for racer in racers.values():
            racer.close()
    for row in rows.values():
        timed = [1000 * s for s in row.pop("seconds")[WARM_UP:]]
        if "error" not in row:
            row |= {"ms": statistics.median(timed), "ms_min": min(timed)}
    return rows


def turns(library: str, setup: Setup) -> Iterator[dict]:
    """A library's note, the seconds of each step, at the end fvu, l0 and peak MB; or its error."""
    tiny = replace(setup, site_dims=(16,) * len(setup.site_dims), d_sae=256, k=4, batch=64)
    try:
        with LIBRARIES[library].context():
            first = planted(tiny, 1)[0]  # imports and thread pools, which do not count
            LIBRARIES[library](tiny, Start.of(tiny, first)).step(first)
            batches = planted(setup, WARM_UP + setup.steps + HELD_OUT)
            start = Start.of(setup, batches[0])
            peak_mb = watch_memory(setup.cuda)
            runner = LIBRARIES[library](setup, start)
            yield {"note": runner.note}
            for x in batches[:-HELD_OUT]:
                yield {"seconds": seconds(partial(runner.step, x), setup.cuda)}
            peak = peak_mb()
            yield held_out(runner, batches[-HELD_OUT:]) | {"peak_mb": peak}
    except Exception as error:
        traceback.print_exception(error, file=sys.stderr)
        first = next(iter(str(error).splitlines()), "")
        yield {"error": f"{type(error).__name__}: {first}"}


@torch.no_grad()
def held_out(runner: bench_peers.Library, batches: list[torch.Tensor]) -> dict[str, float]:
    """fvu and l0 with the selection of training: BatchTopK's is the n·k largest of a batch."""
    unexplained, variance, l0 = 0.0, 0.0, []
    for x in batches:
        x_hat, active = runner.reconstruct(x)
        unexplained += (x - x_hat).square().sum().item()
        variance += (x - x.mean(0)).square().sum().item()
        l0.append(active)
    return {"fvu": unexplained / variance, "l0": statistics.mean(l0)}


def child(request: str) -> None:
    """Answer a `Racer`: one line for each that it sends."""
    library, shape, threads = json.loads(request)
    torch.set_num_threads(threads)
    answers = os.fdopen(os.dup(1), "w")
    os.dup2(2, 1)  # for what libraries print
    for answer in turns(library, Setup(**shape | {"site_dims": tuple(shape["site_dims"])})):
        print(json.dumps(answer), file=answers, flush=True)
        sys.stdin.readline()


def best_peer(result: dict, key: str, stand_ins: bool = False) -> float | None:
    """The least of the peers' values; stand-ins (another rule) count only where asked."""
    values = [
        row[key]
        for name, row in result["libraries"].items()
        if not name.startswith("lib") and row.get(key) is not None
        and (stand_ins or not (name == "sparsify" and result["rule"] != "topk"))
    ]  # fmt: skip
    return min(values, default=None)


def bar(setup: str, name: str, value: float, need: float, holds: bool) -> dict:
    return {"setup": setup, "bar": name, "value": value, "need": need, "holds": holds}


def judge(result: dict) -> list[dict]:
    """Each bar of this setup; without numbers it is missed."""
    ours, bars = result["libraries"]["lib"], []

    def add(*of_bar) -> None:
        bars.append(bar(result["name"], *of_bar))

    kind, ratio = result["name"].split(" ")[0], result["ratio"] or 0.0  # no peer, no win
    need = GPU_BAR if result["device"] == "cuda" else SPEED_BARS[kind]
    add("times as fast as the fastest peer", ratio, need, ratio >= need)
    fastest, best = best_peer(result, "ms"), best_peer(result, "fvu")
    for row in result["libraries"].values():
        if fastest is not None and row.get("ms") == fastest:
            for whose, fvu in (("fastest", row["fvu"]), ("best", best)):
                name = f"fvu at most the {whose} peer's (equal: within 0.5 %)"
                add(name, ours["fvu"], fvu, ours["fvu"] <= fvu * FVU_EQUAL)
    if result["rule"] == "jumprelu":
        near = abs(ours["l0"] / result["k"] - 1) <= L0_EQUAL
        add("l0 that fvu was reached with, within 10 % of k", ours["l0"], result["k"], near)
    over = ours["ms"] / result["floor"]["ms"]
    add("times the floor", over, FLOOR_BAR, over <= FLOOR_BAR)
    mine, least = ours["peak_mb"], best_peer(result, "peak_mb", stand_ins=True) or 0.0
    add("MB at the peak, below every peer's", mine, least, mine < least)
    return bars


def table(result: dict) -> str:
    """One setup's rows, readable."""
    floor, sites = result["floor"], "+".join(map(str, result["site_dims"]))
    lines = [
        f"\n{result['name']}: d {sites}, d_sae {result['d_sae']}, k {result['k']}, "
        f"batch {result['batch']}, {result['steps']} steps, {result['dtype']}",
        f"{'':22}{'ms/step':>9}{'least':>9}{'× lib':>7}{'MB':>8}{'fvu':>8}{'l0':>7}",
    ]
    ours = result["libraries"]["lib"]
    for name, row in result["libraries"].items():
        if "error" in row:
            lines.append(f"{name:22}  {row['error']}")
            continue
        lines.append(
            f"{name:22}{row['ms']:9.1f}{row['ms_min']:9.1f}{row['ms'] / ours['ms']:7.2f}"
            f"{row['peak_mb']:8.0f}{row['fvu']:8.3f}{row['l0']:7.1f}  {row['note']}"
        )
    for key in ("ratio", "ratio_with_stand_ins"):  # a TopK may stand in for BatchTopK
        if result[key]:
            lines.append(f"fastest peer / lib, {key}: {result[key]:.2f}")
    for low, name in (("", "floor"), ("low_", "floor with a screen")):
        if f"{low}ms" in floor:
            lines.append(f"{name:22}{floor[f'{low}ms']:9.1f}  product {floor[f'{low}gemm_ms']:.1f} "
                         f"ms, the rest at {floor['bandwidth_gb_s']:.1f} GB/s")  # fmt: skip
    lines.append(f"{'lib, predicted':22}{result['predicted_mb']:33.0f}  16 bytes a parameter, "
                 "a block of pre-activations, W_enc rounded; O(n·k + n·d)")  # fmt: skip
    return "\n".join(lines)


def growth(base: Setup) -> dict[str, list[dict]]:
    """Ours alone at other widths, and at other k."""
    found = {"d_sae": [2048, 4096, 8192, 16384, 32768, 65536], "k": [8, 16, 32, 64, 128]}
    for axis, values in found.items():
        for i, value in enumerate(values):
            setup = replace(base, **{axis: value})
            row = trained(["lib"], setup)["lib"]
            values[i] = {"value": value, "predicted_mb": predicted_mb(setup), **row}
    return found


def machine(device: str, threads: int) -> dict[str, str | int]:
    info = Path("/proc/cpuinfo").read_text().splitlines()
    names = [line.split(":")[1].strip() for line in info if line.startswith("model name")]
    gpu = torch.cuda.get_device_name() if device == "cuda" else ""
    return {"cpu": names[0] if names else platform.processor(), "gpu": gpu, "threads": threads,
            "torch": torch.__version__, "date": time.strftime("%Y-%m-%d")}  # fmt: skip


def write(found: dict) -> None:
    """`bench.json` first: a picture needs a browser, and numbers should not wait for it."""
    folder = paths.figures_dir()
    with atomic_file(folder / "bench.json") as file:
        file.write_text(json.dumps(found, indent=1))
    figure = training_speed(found)
    figure.write_html(folder / "bench.html", include_plotlyjs="directory")
    try:
        figure.write_image(folder / "bench.png", width=1100, scale=2)
    except RuntimeError as error:
        print(f"no {folder / 'bench.png'}: {error}", file=sys.stderr)


def arguments(words: list[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--device", choices=("cpu", "cuda"), default="cpu")
    add = partial(parser.add_argument, type=int)
    add("--threads", nargs="+", help="then those of more races (1 2; on one core or a GPU 1)")
    add("--steps", help="timed steps of a setup (30; with --quick 2); of d_sae 24576 on a CPU a "
        "seventh, with more threads a third")  # fmt: skip
    parser.add_argument("--quick", action="store_true", help="few steps, no growth, no harvest")
    parser.add_argument("--only", nargs="*", help="names of setups, like 'TopK 512'")
    parser.add_argument("--child", help=argparse.SUPPRESS)  # a library in a process of its own
    return parser.parse_args(words)


def main(words: list[str] | None = None) -> int:
    args = arguments(words)
    if args.child:
        child(args.child)
        return 0
    if absent := bench_peers.missing():
        print(f"the training benchmark needs {', '.join(absent)}; install with: make peers",
              file=sys.stderr)  # fmt: skip
        return 2
    require_writable(paths.figures_dir())
    steps, cuda = args.steps or (2 if args.quick else 30), args.device == "cuda"
    args.threads = args.threads or ([1] if cuda or len(os.sched_getaffinity(0)) == 1 else [1, 2])
    setups = gpu_setups(steps) if cuda else cpu_setups(steps)
    chosen = [s for s in setups if not args.only or s.name in args.only]
    if not chosen:
        print(f"need --only from {[s.name for s in setups]}, got {args.only}", file=sys.stderr)
        return 2
    for small in small_setups():
        for library in racing(small):
            check(library, small)
    report(chosen, args)
    return 0


def report(setups: list[Setup], args: argparse.Namespace) -> None:
    """Run everything, printing as it goes, and write it."""
    found = {"machine": machine(args.device, args.threads[0]), "setups": [], "more_threads": [],
             "growth": {}, "harvest": None, "bars": []}  # fmt: skip
    print(found["machine"])
    for i, threads in enumerate(args.threads):
        torch.set_num_threads(threads)
        for setup in setups:
            if i:
                fewer = max(2, setup.steps // 3)
                setup = replace(setup, name=f"{setup.name}, {threads} threads", steps=fewer)
            result = race(setup)
            found["more_threads" if i else "setups"].append(result)
            found["bars"] += judge(result)
            print(table(result), flush=True)
    torch.set_num_threads(args.threads[0])
    if not args.quick:
        found["growth"] = growth(replace(setups[0], steps=4))
        found["harvest"] = bench_harvest.measure()
        ratio, need = found["harvest"]["ratio"], bench_harvest.BAR
        found["bars"].append(
            bar("harvest", "times the bare forward pass", ratio, need, ratio <= need)
        )
        print("\ngrowth:", json.dumps(found["growth"], indent=1), "\nharvest:", found["harvest"])
    write(found)
    print()
    for b in found["bars"]:
        verdict = "holds " if b["holds"] else "missed"
        print(f"{verdict} {b['setup']:27} {b['value']:8.3f}  (need {b['need']:.3f})  {b['bar']}")


if __name__ == "__main__":
    sys.exit(main())
