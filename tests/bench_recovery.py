"""Planted features: our TopK and BatchTopK beside sae-lens's own trainer, same l0 and tokens.

`python -m tests.bench_recovery` prints the scores of each seed and learning rate, and MCC over
seeds at every learning rate: compare the best of each.
"""

import argparse
import contextlib
import io
import logging
import tempfile
import time
from dataclasses import fields

import sae_lens
import torch
from sae_lens import synthetic

from lib.dictionaries import FitConfig, fit, recipes
from tests.bench_truth import spread
from tests.recovery import RecoveryScores, SyntheticStream, recovery_scores

SHOWN = [field.name for field in fields(RecoveryScores)]


def benchmark(n_features: int, d_in: int, seed: int) -> synthetic.SyntheticModel:
    """sae-lens's synthetic model: Zipf's frequencies, varied magnitudes, a bias, correlations."""
    config = synthetic.SyntheticModelConfig(
        num_features=n_features,
        hidden_dim=d_in,
        firing_probability=synthetic.ZipfianFiringProbabilityConfig(max_prob=0.3, min_prob=0.01),
        orthogonalization=synthetic.OrthogonalizationConfig(),
        correlation=synthetic.LowRankCorrelationConfig(rank=8),
        std_firing_magnitudes=0.3,
        seed=seed,
    )
    return synthetic.SyntheticModel(config)


def ours(model, k: int, lr: float, args: argparse.Namespace, seed: int) -> dict:
    shape = {"site_dims": (args.d_in,), "hook_names": ("synthetic",)}
    plans = recipes.grid(["topk", "batchtopk"], d_sae=args.d_sae, k=k, **shape)
    stream = SyntheticStream(model, batch_size=args.batch_size, seed=seed)
    settings = {"n_steps": args.n_tokens // args.batch_size, "dead_after": args.n_tokens // 10}
    fitted = fit(plans, stream, FitConfig(**settings, lr=lr, seed=seed), progress=False)
    return {f"ours {name}": result.dictionary for name, result in fitted.items()}


def theirs(model, k: int, lr: float, args: argparse.Namespace, seed: int) -> dict:
    """As sae-lens's users load them: BatchTopK becomes JumpReLU, decoder rows get norm 1."""
    trained, n_steps = {}, args.n_tokens // args.batch_size
    for name in ("TopK", "BatchTopK"):
        make, config = (getattr(sae_lens, f"{name}TrainingSAE{end}") for end in ("", "Config"))
        with torch.random.fork_rng(devices=[]), tempfile.TemporaryDirectory() as folder:
            torch.manual_seed(seed)
            sae = make(config(d_in=args.d_in, d_sae=args.d_sae, k=k))
            synthetic.train_toy_sae(
                sae,
                model.feature_dict,
                model.activation_generator,
                training_samples=args.n_tokens,
                batch_size=args.batch_size,
                lr=lr,
                lr_warm_up_steps=n_steps // 50,
                lr_decay_steps=3 * n_steps // 10,
            )
            sae.save_inference_model(folder)
            trained[f"sae-lens {name.lower()}"] = sae_lens.SAE.load_from_disk(folder)
    return trained


def true_l0(model: synthetic.SyntheticModel, seed: int) -> float:
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        return float((model.activation_generator.sample(10_000) > 0).sum(1).float().mean())


def main(args: argparse.Namespace) -> None:
    logging.getLogger("sae_lens").setLevel(logging.ERROR)
    rows: dict[tuple[str, float], list[RecoveryScores]] = {}
    print(f"{'':<28}" + " ".join(f"{name:>10}" for name in [*SHOWN, "seconds"]))
    for seed in range(args.seeds):
        model = benchmark(args.n_features, args.d_in, seed)
        k = args.k or round(true_l0(model, seed))
        for lr in args.lr:
            for train in (ours, theirs):
                began = time.perf_counter()
                dictionaries = train(model, k, lr, args, seed)
                seconds = (time.perf_counter() - began) / len(dictionaries)
                for name, dictionary in dictionaries.items():
                    scores = recovery_scores(dictionary, model, n_tokens=args.n_eval)
                    rows.setdefault((name, lr), []).append(scores)
                    numbers = [*(getattr(scores, field) for field in SHOWN), seconds]
                    line = " ".join(f"{number:>10.4f}" for number in numbers)
                    print(f"{name:<18} {lr:<7g} {seed} {line}", flush=True)
    print(f"\nMCC over {args.seeds} seeds, mean [least, most]:")
    for (name, lr), scores in sorted(rows.items()):
        print(f"{name:<18} lr {lr:<7g} {spread([score.mcc for score in scores])}")


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--k", type=int, default=0, help="0: the true l0, rounded")
    sizes = {"n_features": 512, "d_in": 128, "d_sae": 512, "n_tokens": 1_000_000}
    sizes |= {"n_eval": 100_000, "batch_size": 1024, "seeds": 3}
    for name, value in sizes.items():
        parser.add_argument(f"--{name}", type=int, default=value)
    parser.add_argument("--lr", type=float, nargs="+", default=[3e-4, 1e-3, 3e-3])
    with contextlib.redirect_stderr(io.StringIO()):  # others' progress bars
        main(parser.parse_args())
