"""What several sites cost: steps of an SAE, a crosscoder and a DFC of as many weights, in turn.

`python -m tests.bench_sites`: median milliseconds, and ratios of medians. Depends on the machine.
"""

import argparse
import statistics
import time

import torch

from lib.dictionaries import FitConfig, recipes
from lib.dictionaries.partition import exclusive_sizes
from lib.dictionaries.trainer import DictionaryTrainer
from lib.sparse.ops import reused_buffers


def main(args: argparse.Namespace) -> None:
    torch.set_num_threads(args.threads)
    torch.manual_seed(0)
    base = torch.randn(args.batch, 64) @ torch.randn(64, 2 * args.d_site)
    x = base + torch.randn(args.batch, 2 * args.d_site)
    recipe = recipes.batchtopk(k=args.k)
    two = {"d_sae": args.d_sae, "site_dims": (args.d_site, args.d_site), "code_norm": "crosscoder"}
    configs = {
        "SAE": recipe.dictionary(d_sae=args.d_sae, site_dims=(2 * args.d_site,)),
        "crosscoder": recipe.dictionary(**two),
        "DFC": recipe.dictionary(**two, exclusive=exclusive_sizes(args.d_sae, 2, 0.05)),
    }
    fit = FitConfig(n_steps=10**6, dead_after=10**9)
    trainers = {name: DictionaryTrainer(config, recipe, fit) for name, config in configs.items()}
    times = {name: [] for name in trainers}
    with reused_buffers():
        for step in range(args.steps):
            for name, trainer in trainers.items():
                began = time.perf_counter()
                trainer.step(step, x)
                if step >= 3:  # buffers and thresholds settle
                    times[name].append(time.perf_counter() - began)
    medians = {name: 1000 * statistics.median(values) for name, values in times.items()}
    print({name: round(value, 1) for name, value in medians.items()}, "ms")
    print(f"crosscoder / SAE {medians['crosscoder'] / medians['SAE']:.3f}", end=", ")
    print(f"DFC / crosscoder {medians['DFC'] / medians['crosscoder']:.3f}")


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__)
    for name, value in {
        "d_site": 512, "d_sae": 8192, "k": 64, "batch": 512, "steps": 33, "threads": 1,
    }.items():  # fmt: skip
        parser.add_argument(f"--{name}", type=int, default=value)
    main(parser.parse_args())
