"""Speed of training beside its peers and its floor: `make bench`, or `make bench-gpu`.

All libraries train on the same batches, each in a process of its own, a step of each in turn, so
that the machine's drift hits all alike. Reported: median and least ms a step, fvu on held-out
batches after equal tokens, peak memory. On a CPU speed is measured again with two threads. Writes
`figures/bench.json`, `.html` and `.png`.
"""

import argparse
import gc
import json
import os
import platform
import statistics
import sys
import time
import traceback
from collections.abc import Iterator
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
    growth_setups,
    in_its_own_process,
    peak_mb,
    planted,
    predicted_mb,
    seconds,
)
from tests.bench_peers import LIBRARIES, racing
from tests.speed import training_speed

INSTALL = "make peers"
SPEED_BARS = {"TopK": 2.5, "BatchTopK": 5.0, "JumpReLU": 5.0, "crosscoder": 4.0}
"""How many times as fast as the fastest peer on a CPU; keys are the first words of setups."""
GPU_BAR, FLOOR_BAR = 2.3, 1.5
HARVEST_BAR = 1.15
"""Time of harvesting over that of the bare forward pass."""
FVU_EQUAL, L0_EQUAL = 1.005, 0.1
"""Up to here rounding and the order of sums make the difference; a JumpReLU aims at k."""


def race(setup: Setup) -> dict:
    """Train all libraries in turn on the same batches; one that fails leaves with its error.

    Raises:
        RuntimeError: it is ours that fails.
    """
    x = planted(setup, 1)[0]
    floor = Floor(setup, x, Start.of(setup, x).rows)
    rows = {name: {"seconds": []} for name in racing(setup)}
    racers = {name: Racer(name, setup, torch.get_num_threads()) for name in rows}
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
            floor.sample()
    finally:
        for racer in racers.values():
            racer.close()
    for row in rows.values():
        timed = [1000 * s for s in row.pop("seconds")[WARM_UP:]]
        if "error" not in row:
            row |= {"ms": statistics.median(timed), "ms_min": min(timed)}
    result = {**asdict(setup), "floor": floor.result(), "libraries": rows}
    for key, stand_ins in (("ratio", False), ("ratio_with_stand_ins", True)):
        fastest = best_peer(result, "ms", stand_ins)
        result[key] = fastest / rows["lib"]["ms"] if fastest else None
    return result


def turns(library: str, setup: Setup) -> Iterator[dict]:
    """What one library has to say: its note, the seconds of each step, fvu and l0 at the end; or
    its error."""
    try:
        batches = planted(setup, WARM_UP + setup.steps + HELD_OUT)
        runner = LIBRARIES[library](setup, Start.of(setup, batches[0]))
        yield {"note": runner.note}
        for x in batches[:-HELD_OUT]:
            yield {"seconds": seconds(partial(runner.step, x), setup.cuda)}
        yield held_out(runner, batches[-HELD_OUT:])
    except Exception as error:
        traceback.print_exception(error, file=sys.stderr)
        first = next(iter(str(error).splitlines()), "")
        yield {"error": f"{type(error).__name__}: {first}"}


@torch.no_grad()
def held_out(runner, batches: list[torch.Tensor]) -> dict[str, float]:
    """fvu and l0 with the selection of training: BatchTopK's is the n·k largest of a batch."""
    unexplained, variance, l0 = 0.0, 0.0, []
    for x in batches:
        x_hat, active = runner.reconstruct(x)
        unexplained += (x - x_hat).square().sum().item()
        variance += (x - x.mean(0)).square().sum().item()
        l0.append(active)
    return {"fvu": unexplained / variance, "l0": statistics.mean(l0)}


def alone(library: str, setup: Setup) -> dict[str, float]:
    """ms a step and peak MB of one library in this process, imports and thread pools aside."""

    def train(some: Setup, start: Start, batches: list[torch.Tensor]) -> list[float]:
        runner = LIBRARIES[library](some, start)
        return [seconds(partial(runner.step, x), some.cuda) for x in batches]

    tiny = replace(setup, site_dims=(16,) * len(setup.site_dims), d_sae=256, k=4, batch=64)
    batches = planted(tiny, 2)
    train(tiny, Start.of(tiny, batches[0]), batches)
    batches = planted(setup, 1 + setup.steps)
    start = Start.of(setup, batches[0])
    taken: list[float] = []
    gc.collect()
    peak = peak_mb(lambda: lambda: taken.extend(train(setup, start, batches)), setup.cuda)
    return {"ms": 1000 * statistics.median(taken[1:]), "peak_mb": peak}


def measure_memory(result: dict, setup: Setup, threads: int, steps: int = 1) -> None:
    """Peak memory of every library that trained, into its row."""
    for name, row in result["libraries"].items():
        if "error" not in row:
            found = in_its_own_process(name, replace(setup, steps=steps), threads)
            row["peak_mb"] = found.get("peak_mb")
            if "error" in found:
                row["memory_error"] = found["error"]
    result["predicted_mb"] = predicted_mb(setup)


def best_peer(result: dict, key: str, stand_ins: bool = False) -> float | None:
    """The least of the peers' values; stand-ins (another rule) count only where asked."""
    values = [
        row[key]
        for name, row in result["libraries"].items()
        if not name.startswith("lib") and row.get(key) is not None
        and (stand_ins or not (name == "sparsify" and result["rule"] != "topk"))
    ]  # fmt: skip
    return min(values, default=None)


def judge(result: dict, memory: bool = True) -> list[dict]:
    """Each bar of this setup: `bar`, `value`, `need`, `holds`; without numbers it is missed."""
    ours, bars = result["libraries"]["lib"], []

    def add(bar: str, value: float, need: float, holds: bool) -> None:
        bars.append({"setup": result["name"], "bar": bar, "value": value, "need": need,
                     "holds": holds})  # fmt: skip

    on_cpu = SPEED_BARS[result["name"].split(" ")[0]]
    need = GPU_BAR if result["device"] == "cuda" else on_cpu
    ratio = result["ratio"] or 0.0  # no peer, no win
    add("times as fast as the fastest peer", ratio, need, ratio >= need)
    fastest, best = best_peer(result, "ms"), best_peer(result, "fvu")
    for row in result["libraries"].values():
        if fastest is not None and row.get("ms") == fastest:
            for whose, fvu in (("fastest", row["fvu"]), ("best", best)):
                holds = ours["fvu"] <= fvu * FVU_EQUAL
                bar = f"fvu at most the {whose} peer's (equal: within 0.5 %)"
                add(bar, ours["fvu"], fvu, holds)
    if result["rule"] == "jumprelu":
        near = abs(ours["l0"] / result["k"] - 1) <= L0_EQUAL
        add("l0 that fvu was reached with, within 10 % of k", ours["l0"], result["k"], near)
    over = ours["ms"] / result["floor"]["ms"]
    add("times the floor", over, FLOOR_BAR, over <= FLOOR_BAR)
    if not memory:
        return bars
    mine, least = ours.get("peak_mb"), best_peer(result, "peak_mb", stand_ins=True)
    known = mine is not None and least is not None
    bar = "MB at the peak, below every peer's"
    add(bar, mine or 0.0, least or 0.0, known and mine < least)
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
        memory = f"{row['peak_mb']:8.0f}" if row.get("peak_mb") else f"{'–':>8}"
        lines.append(
            f"{name:22}{row['ms']:9.1f}{row['ms_min']:9.1f}{row['ms'] / ours['ms']:7.2f}{memory}"
            f"{row['fvu']:8.3f}{row['l0']:7.1f}  {row['note']}"
        )
    if result["ratio"] and result["ratio"] != result["ratio_with_stand_ins"]:
        lines.append(f"fastest peer / lib: {result['ratio']:.2f}; with a TopK standing in for "
                     f"BatchTopK: {result['ratio_with_stand_ins']:.2f}")  # fmt: skip
    lines.append(f"{'floor':22}{floor['ms']:9.1f}  product {floor['gemm_ms']:.1f} ms, the rest at "
                 f"{floor['bandwidth_gb_s']:.1f} GB/s")  # fmt: skip
    if "low_ms" in floor:
        lines.append(f"{'floor with a screen':22}{floor['low_ms']:9.1f}  product in bfloat16 "
                     f"{floor['low_gemm_ms']:.1f} ms")  # fmt: skip
    if "predicted_mb" in result:
        lines.append(f"{'lib, predicted':22}{result['predicted_mb']:33.0f}  16 bytes a parameter, "
                     "a block of pre-activations, W_enc rounded; O(n·k + n·d)")  # fmt: skip
    return "\n".join(lines)


def growth(base: Setup, threads: int) -> dict[str, list[dict]]:
    """Ours alone at other widths and other k."""
    return {
        axis: [
            {"value": s.d_sae if axis == "d_sae" else s.k, "predicted_mb": predicted_mb(s),
             **in_its_own_process("lib", s, threads)}
            for s in setups
        ]
        for axis, setups in growth_setups(base).items()
    }  # fmt: skip


def machine(device: str, threads: int) -> dict[str, str | int]:
    cpu = platform.processor()
    info = Path("/proc/cpuinfo")
    if info.exists():
        names = [x for x in info.read_text().splitlines() if x.startswith("model name")]
        cpu = names[0].split(":")[1].strip() if names else cpu
    gpu = torch.cuda.get_device_name() if device == "cuda" else ""
    return {"cpu": cpu, "gpu": gpu, "threads": threads, "torch": torch.__version__,
            "date": time.strftime("%Y-%m-%d")}  # fmt: skip


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
    parser.add_argument("--threads", type=int, nargs="+",
                        help="of the benchmark, then of more races for speed (1 2; on one core or "
                        "a GPU 1)")  # fmt: skip
    parser.add_argument("--steps", type=int, help="timed steps of a setup (30; with --quick 2); "
                        "with more threads a third, at least 2")  # fmt: skip
    parser.add_argument("--big-steps", type=int, help="of d_sae 24576, on a CPU (4; 2)")
    parser.add_argument("--quick", action="store_true", help="few steps, no growth, no harvest")
    parser.add_argument("--only", nargs="*", help="names of setups, like 'TopK 512'")
    for mode in ("--alone", "--turns"):  # in processes of their own
        parser.add_argument(mode, help=argparse.SUPPRESS)
    return parser.parse_args(words)


def main(words: list[str] | None = None) -> int:
    args = arguments(words)
    if args.alone or args.turns:
        request = json.loads(args.alone or args.turns)
        torch.set_num_threads(request["threads"])
        shape = request["setup"]
        setup = Setup(**{**shape, "site_dims": tuple(shape["site_dims"])})
        if args.alone:
            print(json.dumps(alone(request["library"], setup)))
            return 0
        answers = os.fdopen(os.dup(1), "w")
        os.dup2(2, 1)  # for what libraries print
        for answer in turns(request["library"], setup):
            print(json.dumps(answer), file=answers, flush=True)
            sys.stdin.readline()
        return 0
    if absent := bench_peers.missing():
        print(f"the training benchmark needs {', '.join(absent)}; install with: {INSTALL}",
              file=sys.stderr)  # fmt: skip
        return 2
    require_writable(paths.figures_dir())
    steps = args.steps or (2 if args.quick else 30)
    big_steps = args.big_steps or (2 if args.quick else 4)
    cuda = args.device == "cuda"
    args.threads = args.threads or ([1] if cuda or len(os.sched_getaffinity(0)) == 1 else [1, 2])
    setups = gpu_setups(steps) if cuda else cpu_setups(steps, big_steps)
    chosen = [s for s in setups if not args.only or s.name in args.only]
    if not chosen:
        print(f"need --only from {[s.name for s in setups]}, got {args.only}", file=sys.stderr)
        return 2
    report(chosen, args)
    return 0


def report(setups: list[Setup], args: argparse.Namespace) -> None:
    """Run everything, printing as it goes, and write it."""
    threads, *others = args.threads
    found = {"machine": machine(args.device, threads), "setups": [], "more_threads": [],
             "growth": {}, "harvest": None, "bars": []}  # fmt: skip
    print(found["machine"])
    torch.set_num_threads(threads)
    for setup in setups:
        result = race(setup)
        measure_memory(result, setup, threads)
        found["setups"].append(result)
        found["bars"] += judge(result)
        print(table(result), flush=True)
    for many in others:
        torch.set_num_threads(many)
        for setup in setups:
            fewer = {"name": f"{setup.name}, {many} threads", "steps": max(2, setup.steps // 3)}
            result = race(replace(setup, **fewer))
            found["more_threads"].append(result)
            found["bars"] += judge(result, memory=False)
            print(table(result), flush=True)
    torch.set_num_threads(threads)
    if not args.quick:
        found["growth"] = growth(replace(setups[0], steps=4), threads)
        found["harvest"] = bench_harvest.measure()
        ratio = found["harvest"]["ratio"]
        found["bars"].append({"setup": "harvest", "bar": "times the bare forward pass",
                              "value": ratio, "need": HARVEST_BAR,
                              "holds": ratio <= HARVEST_BAR})  # fmt: skip
        print("\ngrowth:", json.dumps(found["growth"], indent=1), "\nharvest:", found["harvest"])
    write(found)
    print()
    for bar in found["bars"]:
        verdict = "holds " if bar["holds"] else "missed"
        print(f"{verdict} {bar['setup']:27} {bar['value']:8.3f}  (need {bar['need']:.3f})  "
              f"{bar['bar']}")  # fmt: skip


if __name__ == "__main__":
    sys.exit(main())
