"""SPALF against its target and against swept recipes: `python -m tests.bench_spalf`.

    python -m tests.bench_spalf targets     # r2 targets, lr x 1/3 and x 3, over seeds
    python -m tests.bench_spalf frontier    # beside TopK, BatchTopK and JumpReLU on the same tokens
    python -m tests.bench_spalf ablations   # each part switched off
    python -m tests.bench_spalf anchors     # what anchored latents cost
    python -m tests.bench_spalf step        # milliseconds of a step against JumpReLU's

Seconds depend on the machine; the rest holds everywhere up to rounding.
"""

import argparse
import statistics
import time
import warnings
from dataclasses import replace

import torch

from lib import paths
from lib.activations.harvest import HarvestConfig, Harvester
from lib.activations.source import Block
from lib.analysis.frontier import frontier_points, interpolated
from lib.analysis.truth import score_record
from lib.data.corpus import frequent_tokens, load_split
from lib.dictionaries import FitConfig, fit
from lib.dictionaries.recipes import grid
from lib.latents import collect
from lib.models import load_model
from lib.models.patched import PatchedKL
from lib.models.unembed import unembedding
from lib.spalf import ABLATIONS, Anchors, SpalfConfig, SpalfFit, train_spalf
from tests.bench_truth import shuffled, spread


class Bench:
    """One model's activations at one site, in memory."""

    def __init__(self, args: argparse.Namespace) -> None:
        self.args = args
        self.model, tokenizer = load_model(
            paths.shipped_dir() / "models" / args.model, device="cpu"
        )
        sizes = {"n_tokens": args.n_corpus, "n_eval": args.n_eval, "seq_len": 64}
        self.train, self.held = load_split("world", tokenizer, **sizes)
        self.acts = torch.cat([b.acts for b in self.blocks(self.train)])
        self.held_blocks = self.blocks(self.held)
        self.kl = PatchedKL(self.model, self.train, args.hook_name, batch_rows=16)

    def blocks(self, corpus) -> list[Block]:
        config = HarvestConfig(hook_names=(self.args.hook_name,), batch_rows=256)
        source = Harvester([self.model], corpus, config)
        return [source.block(i) for i in range(source.n_blocks)]

    def config(self, **changes) -> SpalfConfig:
        args = self.args
        return SpalfConfig(
            **{"n_steps": args.n_tokens // args.batch_size, "d_sae": args.d_sae}
            | {"phase_2": not args.phase_1_only}
            | changes
        )

    def spalf(self, n_anchored: int = 0, **changes) -> tuple[SpalfFit, float]:
        config = self.config(**changes)
        anchors = None
        if n_anchored:
            ids = frequent_tokens(self.train, n_anchored)
            anchors = Anchors(ids, unembedding(self.model)[ids])
        began = time.perf_counter()
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            found = train_spalf(
                config,
                shuffled(self.acts, self.args.batch_size, config.seed),
                d_in=self.acts.shape[1],
                anchors=anchors,
                patched_kl=self.kl,
                hook_name=self.args.hook_name,
                progress=False,
            )
        return found, time.perf_counter() - began

    def peers(self, seed: int, k: list[int], lr: float) -> tuple[dict, dict]:
        args = self.args
        plans = grid(
            ["topk", "batchtopk", "jumprelu_target"],
            d_sae=args.d_sae,
            k=k,
            site_dims=(self.acts.shape[1],),
            hook_names=(args.hook_name,),
        )
        config = FitConfig(
            n_steps=args.n_tokens // args.batch_size,
            lr=lr,
            dead_after=args.n_tokens // 25,
            seed=seed,
        )
        fitted = fit(plans, shuffled(self.acts, args.batch_size, seed), config, progress=False)
        return {n: f.dictionary for n, f in fitted.items()}, {
            n: f.seconds for n, f in fitted.items()
        }

    def points(self, dictionaries: dict) -> list[dict]:
        sample = self.held.rows(0, 400)
        points = frontier_points(
            dictionaries, self.model, sample, self.args.hook_name, self.held_blocks
        )
        for point, dictionary in zip(points, dictionaries.values(), strict=True):
            record = collect(dictionary.encode_sparse, self.held_blocks, self.held)
            point["f1"] = score_record(record)["best"].mean
        return points


def show(name: str, point: dict, found: SpalfFit | None, seconds: float) -> None:
    keys = ("r2", "l0", "loss_recovered", "kl", "dead", "f1")
    text = " ".join(f"{key} {point[key]:.4f}" for key in keys)
    if found is not None:
        slack = {n: round(g, 2) for n, g in found.history[-1]["violations"].items()}
        text += f" phase 2 at {found.phase_2_at} reached {found.reached} {slack}"
    print(f"{name:34} {text} {seconds:.0f} s", flush=True)


def targets(bench: Bench) -> None:
    settings = [{"r2_target": r} for r in bench.args.r2_target]
    settings += [] if bench.args.only_targets else [{"lr": 1e-4}, {"lr": 9e-4}]
    for setting in settings:
        rows = []
        for seed in range(bench.args.seeds):
            found, seconds = bench.spalf(seed=seed, **setting)
            (point,) = bench.points({"spalf": found.dictionary})
            show(f"{setting} seed {seed}", point, found, seconds)
            rows.append(point)
        columns = {key: [row[key] for row in rows] for key in ("r2", "l0", "loss_recovered", "f1")}
        print(f"{setting}", *(f"{k} {spread(v)}" for k, v in columns.items()), flush=True)


def frontier(bench: Bench) -> None:
    for seed in range(bench.args.seeds):
        swept: list[dict] = []
        for lr in bench.args.peer_lr:
            dictionaries, seconds = bench.peers(seed, bench.args.k, lr)
            points = bench.points(dictionaries)
            for point in points:
                show(f"seed {seed} lr {lr} {point['name']}", point, None, seconds[point["name"]])
                swept.append({**point, "curve": f"{point['recipe']} lr {lr}"})
        for target in bench.args.r2_target:
            found, seconds = bench.spalf(seed=seed, r2_target=target)
            (own,) = bench.points({"spalf": found.dictionary})
            show(f"seed {seed} spalf {target}", own, found, seconds)
            for curve in dict.fromkeys(point["curve"] for point in swept):
                others = [point for point in swept if point["curve"] == curve]
                same = {
                    key: round(interpolated(others, own["l0"], "l0", key), 4)
                    for key in ("loss_recovered", "kl", "f1")
                }
                at_r2 = interpolated(others, own["r2"])
                print(f"   {curve}: l0 {at_r2:.2f} at the same r2; at the same l0 {same}")


def ablations(bench: Bench) -> None:
    for name, change in {"full": {}, **ABLATIONS}.items():
        for seed in range(bench.args.seeds):
            found, seconds = bench.spalf(seed=seed, **change)
            (point,) = bench.points({"spalf": found.dictionary})
            show(f"{name} seed {seed}", point, found, seconds)


def anchors(bench: Bench) -> None:
    for n in (0, bench.args.d_sae // 32, bench.args.d_sae // 16, bench.args.d_sae // 4):
        for seed in range(bench.args.seeds):
            found, seconds = bench.spalf(n_anchored=n, seed=seed)
            (point,) = bench.points({"spalf": found.dictionary})
            show(f"{n} anchors seed {seed}", point, found, seconds)


def step(bench: Bench) -> None:
    """Both trained in turn, a few hundred steps each time, so that noise of the machine hits both;
    phase 1 alone, and with phase 2."""
    ratios: dict[str, list[float]] = {"phase 1": [], "with phase 2": []}
    args, width = bench.args, bench.acts.shape[1]
    for round_ in range(3):
        plain = grid(["jumprelu_target"], d_sae=args.d_sae, k=16, site_dims=(width,))
        config = FitConfig(n_steps=400, lr=5e-3, dead_after=20_000)
        stream = shuffled(bench.acts, args.batch_size, round_)
        (result,) = fit(plain, stream, config, progress=False).values()
        other = 1000 * result.seconds / config.n_steps
        for name, phase_2 in (("phase 1", False), ("with phase 2", True)):
            own = replace(bench.config(), n_steps=400, phase_2=phase_2, r2_target=0.8)
            times: list[float] = []

            def clock(history, at, times=times) -> None:
                times.append(time.perf_counter())

            found = train_spalf(
                own,
                stream,
                d_in=width,
                patched_kl=bench.kl,
                progress=False,
                on_log=clock,
            )
            if phase_2 and found.phase_2_at is None:
                print(f"round {round_} {name}: never entered, so not timed", flush=True)
                continue
            ms = 1000 * (times[-1] - times[0]) / (own.n_steps - own.log_every)
            ratios[name].append(ms / other)
            print(f"round {round_} {name}: {ms:.2f} ms a step, JumpReLU {other:.2f}", flush=True)
    for name, values in ratios.items():
        print(f"{name}: median ratio {statistics.median(values):.2f}")


COMMANDS = {f.__name__: f for f in (targets, frontier, ablations, anchors, step)}

if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("what", choices=COMMANDS)
    parser.add_argument("--model", default="tiny-gemma2")
    parser.add_argument("--hook_name", default="blocks.1.hook_resid_post")
    parser.add_argument("--r2_target", nargs="+", type=float, default=[0.9, 0.93, 0.95])
    parser.add_argument("--k", nargs="+", type=int, default=[4, 8, 12, 16, 24])
    parser.add_argument("--peer_lr", nargs="+", type=float, default=[5e-3])
    parser.add_argument("--d_sae", type=int, default=1024)
    parser.add_argument("--batch_size", type=int, default=512)
    parser.add_argument("--n_tokens", type=int, default=500_000)
    parser.add_argument("--n_corpus", type=int, default=800_000)
    parser.add_argument("--n_eval", type=int, default=100_000)
    parser.add_argument("--only_targets", action="store_true", help="not lr x 1/3 and x 3")
    parser.add_argument("--phase_1_only", action="store_true")
    parser.add_argument("--seeds", type=int, default=3)
    args = parser.parse_args()
    COMMANDS[args.what](Bench(args))
