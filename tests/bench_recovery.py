"""Planted features: our TopK and BatchTopK beside sae-lens's own trainer, same l0 and tokens.

`python -m tests.bench_recovery` prints the scores of each seed and learning rate, and MCC over
seeds at every learning rate: compare the best of each.
"""

import argparse
import contextlib
import logging
import os
import tempfile
import time
from collections.abc import Iterator
from dataclasses import fields

import torch

from lib.dictionaries import FitConfig, fit, recipes
from tests.recovery import RecoveryScores, SyntheticStream, recovery_scores

SHOWN = [field.name for field in fields(RecoveryScores)]


def benchmark(n_features: int, d_in: int, seed: int):
    """sae-lens's synthetic model: Zipf's frequencies, varied magnitudes, a bias, correlations."""
    from sae_lens.synthetic import (
        LowRankCorrelationConfig,
        OrthogonalizationConfig,
        SyntheticModel,
        SyntheticModelConfig,
        ZipfianFiringProbabilityConfig,
    )

    return SyntheticModel(
        SyntheticModelConfig(
            num_features=n_features,
            hidden_dim=d_in,
            firing_probability=ZipfianFiringProbabilityConfig(max_prob=0.3, min_prob=0.01),
            orthogonalization=OrthogonalizationConfig(),
            correlation=LowRankCorrelationConfig(rank=8),
            std_firing_magnitudes=0.3,
            seed=seed,
        )
    )


@contextlib.contextmanager
def quiet() -> Iterator[None]:
    """Without others' progress bars."""
    with open(os.devnull, "w") as nowhere, contextlib.redirect_stderr(nowhere):
        yield


def ours(
    model, k: int, lr: float, args: argparse.Namespace, seed: int
) -> dict[str, torch.nn.Module]:
    shape = {"site_dims": (args.d_in,), "d_sae": args.d_sae, "hook_names": ("synthetic",)}
    named = {"topk": recipes.topk(k=k), "batchtopk": recipes.batchtopk(k=k)}
    plans = {name: (recipe.dictionary(**shape), recipe) for name, recipe in named.items()}
    stream = SyntheticStream(model, batch_size=args.batch_size, seed=seed)
    settings = {"n_steps": args.n_tokens // args.batch_size, "dead_after": args.n_tokens // 10}
    config = FitConfig(**settings, lr=lr, seed=seed)
    fitted = fit(plans, stream, config, progress=False)
    return {f"ours {name}": result.dictionary for name, result in fitted.items()}


def sae_lens(
    model, k: int, lr: float, args: argparse.Namespace, seed: int
) -> dict[str, torch.nn.Module]:
    from sae_lens import (
        BatchTopKTrainingSAE,
        BatchTopKTrainingSAEConfig,
        TopKTrainingSAE,
        TopKTrainingSAEConfig,
    )
    from sae_lens.saes.sae import SAE
    from sae_lens.synthetic import train_toy_sae

    trained = {}
    for name, kind, config in (
        ("topk", TopKTrainingSAE, TopKTrainingSAEConfig),
        ("batchtopk", BatchTopKTrainingSAE, BatchTopKTrainingSAEConfig),
    ):
        with torch.random.fork_rng(devices=[]), quiet():
            torch.manual_seed(seed)
            sae = kind(config(d_in=args.d_in, d_sae=args.d_sae, k=k))
            n_steps = args.n_tokens // args.batch_size
            train_toy_sae(
                sae,
                model.feature_dict,
                model.activation_generator,
                training_samples=args.n_tokens,
                batch_size=args.batch_size,
                lr=lr,
                lr_warm_up_steps=n_steps // 50,
                lr_decay_steps=3 * n_steps // 10,
            )
        trained[f"sae-lens {name}"] = as_exported(SAE, sae)
    return trained


def as_exported(SAE, sae: torch.nn.Module) -> torch.nn.Module:
    """What sae-lens's users load: BatchTopK becomes JumpReLU, decoder rows get norm 1."""
    with tempfile.TemporaryDirectory() as folder:
        sae.save_inference_model(folder)
        return SAE.load_from_disk(folder)


def main(args: argparse.Namespace) -> None:
    logging.getLogger("sae_lens").setLevel(logging.ERROR)
    rows: dict[tuple[str, float], list[RecoveryScores]] = {}
    print(f"{'':<28}" + " ".join(f"{name:>10}" for name in [*SHOWN, "seconds"]))
    for seed in range(args.seeds):
        with quiet():
            model = benchmark(args.n_features, args.d_in, seed)
        k = args.k or round(true_l0(model, seed))
        for lr in args.lr:
            for train in (ours, sae_lens):
                began = time.perf_counter()
                dictionaries = train(model, k, lr, args, seed)
                seconds = (time.perf_counter() - began) / len(dictionaries)
                for name, dictionary in dictionaries.items():
                    scores = recovery_scores(dictionary, model, n_tokens=args.n_eval)
                    rows.setdefault((name, lr), []).append(scores)
                    numbers = [*(getattr(scores, field) for field in SHOWN), seconds]
                    line = " ".join(f"{number:>10.4f}" for number in numbers)
                    print(f"{name:<18} {lr:<7g} {seed} {line}", flush=True)
    print(f"\nMCC over {args.seeds} seeds, mean (range):")
    for (name, lr), scores in sorted(rows.items()):
        mcc = [score.mcc for score in scores]
        mean = sum(mcc) / len(mcc)
        print(f"{name:<18} lr {lr:<7g} {mean:.4f} ({min(mcc):.4f} to {max(mcc):.4f})")


def true_l0(model, seed: int) -> float:
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        return float((model.activation_generator.sample(10_000) > 0).sum(1).float().mean())


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--n_features", type=int, default=512)
    parser.add_argument("--d_in", type=int, default=128)
    parser.add_argument("--d_sae", type=int, default=512)
    parser.add_argument("--k", type=int, default=0, help="0: the true l0, rounded")
    parser.add_argument("--n_tokens", type=int, default=1_000_000)
    parser.add_argument("--n_eval", type=int, default=100_000)
    parser.add_argument("--batch_size", type=int, default=1024)
    parser.add_argument("--lr", type=float, nargs="+", default=[3e-4, 1e-3, 3e-3])
    parser.add_argument("--seeds", type=int, default=3)
    main(parser.parse_args())
