"""How many concepts each recipe finds, over seeds: `python -m tests.bench_truth`.

Seconds depend on the machine; the scores hold everywhere up to rounding.
"""

import argparse

import torch

from lib import paths
from lib.activations.harvest import HarvestConfig, Harvester
from lib.activations.source import Block
from lib.analysis.metrics import reconstruction
from lib.analysis.truth import baselines, score_record
from lib.data.corpus import Corpus, load_split
from lib.dictionaries import FitConfig, Fitted, fit
from lib.dictionaries.recipes import grid
from lib.latents import LatentRecord, collect
from lib.models import load_model
from lib.world import concept_matrix


class Site:
    """One model's activations at one site, in memory, to train on and held out."""

    def __init__(self, args: argparse.Namespace) -> None:
        self.args, folder = args, paths.shipped_dir() / "models" / args.model
        self.model, tokenizer = load_model(folder, device="cpu")
        sizes = {"n_tokens": args.n_corpus, "n_eval": args.n_eval, "seq_len": 64}
        self.train, self.held = load_split("world", tokenizer, **sizes)
        self.acts = torch.cat([block.acts for block in self._blocks(self.train)])
        self.blocks = self._blocks(self.held)

    def _blocks(self, corpus: Corpus) -> list[Block]:
        config = HarvestConfig(hook_names=(self.args.hook_name,), batch_rows=256)
        source = Harvester([self.model], corpus, config)
        return [source.block(i) for i in range(source.n_blocks)]

    def batches(self, seed: int):
        """Endless; the activations fit in memory, so each epoch is one permutation."""
        generator = torch.Generator().manual_seed(seed)
        while True:
            order = torch.randperm(len(self.acts), generator=generator)
            yield from (self.acts[part] for part in order.split(self.args.batch_size)[:-1])

    def fit(self, recipes: list[str], k: list[int], seed: int, **config) -> dict[str, Fitted]:
        shape = {"site_dims": (self.acts.shape[1],), "hook_names": (self.args.hook_name,)}
        plans = grid(recipes, d_sae=self.args.d_sae, k=k, **shape)
        return fit(plans, self.batches(seed), FitConfig(seed=seed, **config), progress=False)

    def record(self, dictionary) -> LatentRecord:
        return collect(dictionary.encode_sparse, self.blocks, self.held)


def arguments(doc: str) -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(description=doc.splitlines()[0])
    parser.add_argument("--model", default="tiny-gemma2")
    parser.add_argument("--hook_name", default="blocks.1.hook_resid_post")
    parser.add_argument("--d_sae", nargs="+", type=int, default=[1024])
    parser.add_argument("--n_corpus", type=int, default=800_000)
    parser.add_argument("--n_eval", type=int, default=200_000)
    parser.add_argument("--batch_size", type=int, default=1024)
    parser.add_argument("--seeds", type=int, default=3)
    return parser


def spread(values: list[float]) -> str:
    mean = sum(values) / len(values)
    return f"{mean:.3f} [{min(values):.3f}, {max(values):.3f}]"


def main(args: argparse.Namespace) -> None:
    site, results = Site(args), {}
    settings = {"n_steps": args.n_steps, "lr": args.lr, "dead_after": 100_000}
    for seed in range(args.seeds):
        for name, found in site.fit(args.recipes, args.k, seed, **settings).items():
            record = site.record(found.dictionary)
            scores = score_record(record)
            broad = [f1 for c, f1 in scores["best"].by_concept().items() if ":" in c]
            quality = reconstruction(found.dictionary, site.blocks)
            means = (scores["best"].mean, scores["five"].mean, sum(broad) / len(broad))
            results.setdefault(name, []).append((*means, quality.fvu, quality.l0, found.seconds))
    acts, rows = (torch.cat([getattr(b, name) for b in site.blocks]) for name in ("acts", "rows"))
    labels = torch.from_numpy(concept_matrix(record.concepts.tolist()))
    for name, scores in baselines(acts, labels, rows).items():
        print(f"{name:24}", *(f"{kind} {s.mean:.3f}" for kind, s in scores.items()))
    print(f"{args.hook_name}, {args.n_steps} steps, mean [least, most] of seeds")
    for name, found in results.items():
        kinds = ("best", "five", "broad", "fvu", "l0", "seconds")
        columns = zip(kinds, map(list, zip(*found, strict=True)), strict=True)
        print(f"{name:24}", *(f"{kind} {spread(values)}" for kind, values in columns))


if __name__ == "__main__":
    parser = arguments(__doc__)
    parser.add_argument("--recipes", nargs="+", default=["topk", "batchtopk", "matryoshka"])
    parser.add_argument("--k", nargs="+", type=int, default=[16])
    parser.add_argument("--n_steps", type=int, default=1500)
    parser.add_argument("--lr", type=float, default=4e-3)
    main(parser.parse_args())
