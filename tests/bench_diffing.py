"""What ways of diffing find of planted differences: `python -m tests.bench_diffing`.

A is `tiny-gemma2`, B a fine-tune of it on several behaviours: `anchored`, `plain`, a LoRA of rank
64 (`lora`), or on A's own answers (`null`, `anchored null`). One JSON line for each method; with
`--null` false alarms are counted on a fine-tune of A on its own answers.
"""

import argparse
import json
import time

from lib import paths
from lib.activations.harvest import HarvestConfig, Harvester
from lib.activations.pair import Pair
from lib.analysis.diffing import findings, methods, planted, trained
from lib.analysis.diffing.ship import KINDS, plant, shown
from lib.dictionaries import FitConfig
from lib.models import load_model
from lib.world import Rewriter, World
from lib.world.differences import planted_chats, take

BASE = "tiny-gemma2"


class Bench:
    def __init__(self, args: argparse.Namespace, seed: int) -> None:
        self.args, self.seed = args, seed
        self.a, self.tokenizer = load_model(paths.shipped_dir() / "models" / args.base)
        self.rewriter = Rewriter(World())
        chats = take(planted_chats(self.rewriter, args.behaviours, seed=seed), args.n_chats)
        self.train = planted.Truth.of(chats, args.behaviours, self.tokenizer).corpus
        held = take(planted_chats(self.rewriter, args.behaviours, split=args.split, seed=1), 2000)
        self.truth = planted.Truth.of(held, args.behaviours, self.tokenizer)
        self.prompts = self.truth.prompts(args.n_prompts)

    def tuned(self, plant_kind: str):
        """B, kept on disk."""
        args = self.args
        name = "-".join(
            [args.base, plant_kind, *args.behaviours, str(self.seed), str(args.n_tune_steps)]
        )
        folder = paths.data_dir() / "cache" / "diffing" / name
        if (folder / "config.json").exists():
            return load_model(folder)[0]
        base, _ = load_model(paths.shipped_dir() / "models" / args.base)
        options = {"n_steps": args.n_tune_steps, "lr": args.lr_tune, "seed": self.seed}
        b = plant(base, self.tokenizer, args.behaviours, plant_kind, **options)
        b.save_pretrained(folder)
        self.tokenizer.save_pretrained(folder)
        return b

    def pair(self, b, corpus) -> Pair:
        config = HarvestConfig(
            hook_names=(self.args.hook_name,), batch_rows=256, skip_special=False
        )
        return Pair(Harvester([self.a, b], corpus, config), keep=True)

    def found(self, b) -> dict[str, findings.Found]:
        args, held = self.args, self.truth.corpus
        train, of_held = self.pair(b, self.train), self.pair(b, held)
        options = (self.a, b, self.tokenizer, of_held, held, self.prompts)
        found = methods.simple([m for m in args.methods if m in methods.SIMPLE], *options)
        shape = {"d_sae": args.d_sae, "k": args.k, "k_difference": args.k_difference}
        wanted = [m for m in args.methods if m in trained.TRAINED]
        plans = trained.plans(wanted, train, exclusive=args.exclusive, **shape)
        config = FitConfig(n_steps=args.n_steps, lr=args.lr, dead_after=50_000, seed=self.seed)
        three = (self.a, b, args.hook_name)
        if plans:
            found |= trained.trained(
                plans, train, of_held, held, config, models=three, progress=False
            )
        return found

    def show(self, row: dict) -> None:
        about = {"seed": self.seed, "plant": self.args.plant, "site": self.args.hook_name}
        row = {k: round(v, 3) if isinstance(v, float) else v for k, v in row.items()}
        print(json.dumps(about | row, ensure_ascii=False), flush=True)


def main(args: argparse.Namespace) -> None:
    for seed in args.seeds:
        bench = Bench(args, seed)
        began = time.time()
        b = bench.tuned(args.plant)
        took = time.time() - began
        figures = shown(bench.a, b, bench.tokenizer, args.behaviours, args.split)
        bench.show({"method": "fine-tune", "seconds": took} | figures)
        found = bench.found(b)
        null = {"anchored": "anchored null"}.get(args.plant, "null")
        nulls = bench.found(bench.tuned(null)) if args.null else {}
        truth = bench.truth
        pairs = [(it.finding, it.record) for it in found.values()]
        closed = planted.causal(pairs, truth, bench.a, b, args.hook_name)
        removed = planted.causal(pairs, truth, bench.a, b, args.hook_name, n_rows=40, back=True)
        for i, (name, it) in enumerate(found.items()):
            finding = it.finding
            row = {"method": name, "seconds": it.seconds} | planted.where(finding, truth)
            row["named"] = planted.what(finding, truth)
            row["words"] = bench.tokenizer.convert_ids_to_tokens(finding.words)
            row["concepts"] = finding.concepts[:5]
            if it.record is not None:
                row |= planted.flagged(finding, truth, it.record)
                first = finding.order.topk(10).indices
                top = planted.flagged(finding, truth, it.record, first)
                row["top ten right"] = top["right"]
            if it.reading is not None:
                alive = findings.firings(it.record) >= findings.MIN_FIRINGS
                by_cosine = it.reading.cosine.where(alive, 2.0).argsort()[:10]
                top = planted.flagged(finding, truth, it.record, by_cosine)
                row["top ten right by cosine"] = top["right"]
                row["largest norm"] = it.reading.relative_norm[alive].max().item()
                if sizes := it.dictionary.config.exclusive:
                    own = alive.nonzero()[:, 0]
                    own = own[(own >= sizes[0]) & (own < sum(sizes))]
                    raw = planted.flagged(finding, truth, it.record, own)
                    row |= {"exclusives": raw["flagged"], "exclusives right": raw["right"]}
                    row["exclusives lacking"] = int(sum((finding.latents == j).any() for j in own))
            row["closed"] = {k: round(v, 3) for k, v in closed[i].items()}
            row["removed"] = {k: round(v, 3) for k, v in removed[i].items()}
            if name in nulls:
                row["false alarms"] = planted.false_alarms(finding, nulls[name].finding)
            bench.show(row)


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--base", default=BASE)
    parser.add_argument("--plant", choices=KINDS, default="anchored")
    parser.add_argument("--null", action="store_true", help="count false alarms too")
    parser.add_argument("--split", default="test")
    parser.add_argument("--hook_name", default="blocks.2.hook_resid_post")
    parser.add_argument(
        "--behaviours", nargs="+", default=["invented", "badge", "french", "shouting"]
    )
    parser.add_argument("--methods", nargs="+", default=[*methods.SIMPLE, *trained.TRAINED])
    parser.add_argument("--seeds", type=int, nargs="+", default=[0])
    for name, value in {"exclusive": 0.05, "lr": 4e-3, "lr_tune": 1e-3}.items():
        parser.add_argument(f"--{name}", type=float, default=value)
    for name, value in {
        "n_chats": 15_000, "n_tune_steps": 400, "d_sae": 1024, "k": 16,
        "k_difference": 4, "n_steps": 800, "n_prompts": 400,
    }.items():  # fmt: skip
        parser.add_argument(f"--{name}", type=int, default=value)
    main(parser.parse_args())
