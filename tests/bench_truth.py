"""How many concepts each recipe finds, over seeds: `python -m tests.bench_truth`.

Seconds depend on the machine; the scores hold everywhere up to rounding.
"""

import argparse

import torch

from lib import paths
from lib.activations.harvest import HarvestConfig, Harvester
from lib.analysis.metrics import reconstruction
from lib.analysis.truth import baselines, score_record
from lib.data.corpus import Corpus, load_split
from lib.dictionaries import FitConfig, fit
from lib.dictionaries.recipes import grid
from lib.latents import collect
from lib.models import load_model
from lib.world import concept_matrix


def shuffled(acts: torch.Tensor, batch_size: int, seed: int):
    """Endless batches; the activations fit in memory, so each epoch is one permutation."""
    generator = torch.Generator().manual_seed(seed)
    while True:
        order = torch.randperm(len(acts), generator=generator)
        yield from (acts[part] for part in order.split(batch_size)[:-1])


def spread(values: list[float]) -> str:
    mean = sum(values) / len(values)
    return f"{mean:.3f} [{min(values):.3f}, {max(values):.3f}]"


def main(args: argparse.Namespace) -> None:
    model, tokenizer = load_model(paths.shipped_dir() / "models" / args.model, device="cpu")
    data = {"n_tokens": args.n_corpus, "n_eval": args.n_eval, "seq_len": 64}
    train, held = load_split("world", tokenizer, **data)

    def harvested(corpus: Corpus) -> Harvester:
        return Harvester(
            [model], corpus, HarvestConfig(hook_names=(args.hook_name,), batch_rows=256)
        )

    source, reader = harvested(train), harvested(held)
    acts = torch.cat([source.block(i).acts for i in range(source.n_blocks)])
    blocks = [reader.block(i) for i in range(reader.n_blocks)]
    results: dict[str, list[tuple[float, ...]]] = {}
    for seed in range(args.seeds):
        shape = {"site_dims": source.site_dims, "hook_names": source.hook_names}
        plans = grid(args.recipes, d_sae=args.d_sae, k=args.k, **shape)
        config = FitConfig(n_steps=args.n_steps, lr=args.lr, dead_after=100_000, seed=seed)
        for name, result in fit(plans, shuffled(acts, 1024, seed), config, progress=False).items():
            record = collect(result.dictionary.encode_sparse, blocks, held)
            scores = score_record(record)
            broad = [f1 for c, f1 in scores["best"].by_concept().items() if ":" in c]
            quality = reconstruction(result.dictionary, blocks)
            means = (scores["best"].mean, scores["five"].mean, sum(broad) / len(broad))
            results.setdefault(name, []).append((*means, quality.fvu, quality.l0, result.seconds))
    places = torch.cat([b.rows for b in blocks])
    labels = torch.from_numpy(concept_matrix(record.concepts.tolist()))
    for name, scores in baselines(torch.cat([b.acts for b in blocks]), labels, places).items():
        print(f"{name:24}", *(f"{kind} {s.mean:.3f}" for kind, s in scores.items()))
    print(f"{args.hook_name}, {args.n_steps} steps of 1024 tokens, mean [least, most] of seeds")
    for name, rows in results.items():
        kinds = ("best", "five", "broad", "fvu", "l0", "seconds")
        columns = zip(kinds, map(list, zip(*rows, strict=True)), strict=True)
        print(f"{name:24}", *(f"{kind} {spread(values)}" for kind, values in columns))


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--model", default="tiny-gemma2")
    parser.add_argument("--hook_name", default="blocks.1.hook_resid_post")
    parser.add_argument("--recipes", nargs="+", default=["topk", "batchtopk", "matryoshka"])
    parser.add_argument("--d_sae", nargs="+", type=int, default=[1024])
    parser.add_argument("--k", nargs="+", type=int, default=[16])
    parser.add_argument("--n_steps", type=int, default=1500)
    parser.add_argument("--n_corpus", type=int, default=800_000)
    parser.add_argument("--n_eval", type=int, default=200_000)
    parser.add_argument("--lr", type=float, default=4e-3)
    parser.add_argument("--seeds", type=int, default=3)
    main(parser.parse_args())
