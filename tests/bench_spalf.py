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

from lib.analysis.frontier import frontier_points, interpolated
from lib.analysis.truth import score_record
from lib.data.corpus import frequent_tokens
from lib.models.patched import PatchedKL
from lib.models.unembed import unembedding
from lib.spalf import ABLATIONS, Anchors, SpalfConfig, SpalfFit, train_spalf
from tests.bench_truth import Site, arguments, spread


class Bench(Site):
    def __init__(self, args: argparse.Namespace) -> None:
        super().__init__(args)
        self.kl = PatchedKL(self.model, self.train, args.hook_name, batch_rows=16)
        self.n_steps = args.n_tokens // args.batch_size

    def spalf(self, n_anchored: int = 0, on_log=None, **changes) -> SpalfFit:
        config = SpalfConfig(**{"n_steps": self.n_steps, "d_sae": self.args.d_sae[0]} | changes)
        anchors = None
        if n_anchored:
            ids = frequent_tokens(self.train, n_anchored)
            anchors = Anchors(ids, unembedding(self.model)[ids])
        with warnings.catch_warnings(action="ignore"):
            return train_spalf(
                config,
                self.batches(config.seed),
                d_in=self.acts.shape[1],
                anchors=anchors,
                patched_kl=self.kl,
                hook_name=self.args.hook_name,
                progress=False,
                on_log=on_log,
            )

    def points(self, dictionaries: dict) -> list[dict]:
        sample = self.held.rows(0, 400)
        points = frontier_points(dictionaries, self.model, sample, self.args.hook_name, self.blocks)
        for point, dictionary in zip(points, dictionaries.values(), strict=True):
            point["f1"] = score_record(self.record(dictionary))["best"].mean
        return points

    def shown(self, name: str, **settings) -> dict:
        """Train SPALF, print and return how good it is."""
        began = time.perf_counter()
        found = self.spalf(**settings)
        seconds = time.perf_counter() - began
        (point,) = self.points({"spalf": found.dictionary})
        show(f"{name} seed {settings['seed']}", point, seconds)
        slack = {n: round(g, 2) for n, g in found.history[-1]["violations"].items()}
        print(f"   phase 2 at {found.phase_2_at} reached {found.reached} {slack}", flush=True)
        return point


def show(name: str, point: dict, seconds: float) -> None:
    keys = ("r2", "l0", "loss_recovered", "kl", "dead", "f1")
    text = " ".join(f"{key} {point[key]:.4f}" for key in keys)
    print(f"{name:34} {text} {seconds:.0f} s", flush=True)


def targets(bench: Bench) -> None:
    for setting in [{"r2_target": r} for r in bench.args.r2_target] + [{"lr": 1e-4}, {"lr": 9e-4}]:
        rows = [bench.shown(f"{setting}", seed=s, **setting) for s in range(bench.args.seeds)]
        columns = {key: [row[key] for row in rows] for key in ("r2", "l0", "loss_recovered", "f1")}
        print(f"{setting}", *(f"{k} {spread(v)}" for k, v in columns.items()), flush=True)


def frontier(bench: Bench) -> None:
    recipes, args = ["topk", "batchtopk", "jumprelu_target"], bench.args
    for seed in range(args.seeds):
        curves: dict[str, list[dict]] = {}
        for lr in args.peer_lr:
            settings = {"n_steps": bench.n_steps, "lr": lr, "dead_after": args.n_tokens // 25}
            fitted = bench.fit(recipes, args.k, seed, **settings)
            for point in bench.points({name: f.dictionary for name, f in fitted.items()}):
                name, seconds = point["name"], fitted[point["name"]].seconds
                show(f"seed {seed} lr {lr} {name}", point, seconds)
                curves.setdefault(f"{point['recipe']} lr {lr}", []).append(point)
        for target in args.r2_target:
            own = bench.shown(f"spalf {target}", seed=seed, r2_target=target)
            for curve, others in curves.items():
                keys = ("loss_recovered", "kl", "f1")
                same = {key: round(interpolated(others, own["l0"], "l0", key), 4) for key in keys}
                at_r2 = interpolated(others, own["r2"])
                print(f"   {curve}: l0 {at_r2:.2f} at the same r2; at the same l0 {same}")


def ablations(bench: Bench) -> None:
    for name, change in {"full": {}, **ABLATIONS}.items():
        for seed in range(bench.args.seeds):
            bench.shown(name, seed=seed, **change)


def anchors(bench: Bench) -> None:
    d_sae = bench.args.d_sae[0]
    for n in (0, d_sae // 32, d_sae // 16, d_sae // 4):
        for seed in range(bench.args.seeds):
            bench.shown(f"{n} anchors", n_anchored=n, seed=seed)


def step(bench: Bench) -> None:
    """Both trained in turn, a few hundred steps each time, so that noise of the machine hits both;
    phase 1 alone, and with phase 2."""
    ratios: dict[str, list[float]] = {"phase 1": [], "with phase 2": []}
    n_steps = 400
    for seed in range(3):
        settings = {"n_steps": n_steps, "lr": 5e-3, "dead_after": 20_000}
        (plain,) = bench.fit(["jumprelu_target"], [16], seed, **settings).values()
        other = 1000 * plain.seconds / n_steps
        for name, phase_2 in (("phase 1", False), ("with phase 2", True)):
            settings = {"n_steps": n_steps, "phase_2": phase_2, "r2_target": 0.8, "seed": seed}
            times: list[float] = []
            clock = lambda *_, times=times: times.append(time.perf_counter())  # noqa: E731
            found = bench.spalf(on_log=clock, **settings)
            if phase_2 and found.phase_2_at is None:
                print(f"round {seed} {name}: never entered, so not timed", flush=True)
                continue
            ms = 1000 * (times[-1] - times[0]) / (n_steps - found.config.log_every)
            ratios[name].append(ms / other)
            print(f"round {seed} {name}: {ms:.2f} ms a step, JumpReLU {other:.2f}", flush=True)
    for name, values in ratios.items():
        print(f"{name}: median ratio {statistics.median(values or [float('nan')]):.2f}")


COMMANDS = {f.__name__: f for f in (targets, frontier, ablations, anchors, step)}

if __name__ == "__main__":
    parser = arguments(__doc__)
    parser.add_argument("what", choices=COMMANDS)
    parser.add_argument("--r2_target", nargs="+", type=float, default=[0.9, 0.93, 0.95])
    parser.add_argument("--k", nargs="+", type=int, default=[4, 8, 12, 16, 24])
    parser.add_argument("--peer_lr", nargs="+", type=float, default=[5e-3])
    parser.add_argument("--n_tokens", type=int, default=500_000)
    parser.set_defaults(batch_size=512, n_eval=100_000)
    args = parser.parse_args()
    COMMANDS[args.what](Bench(args))
