"""What ways of diffing find of planted differences: `python -m tests.bench_diffing`.

A is `tiny-gemma2`, B a full fine-tune of it on several behaviours, anchored or not, or on A's own
answers (`--plant null`). One JSON line for each method.
"""

import argparse
import json
import time

import torch
from datasets import Dataset

from lib import paths
from lib.activations.buffer import Buffer
from lib.activations.harvest import HarvestConfig, Harvester
from lib.adapters import Chats, fine_tune
from lib.analysis.behaviour import BehaviourCheck
from lib.analysis.diffing import (
    auc,
    compare_sites,
    concept_ranking,
    gap_closed,
    output_difference,
    precision_at,
    stream_difference,
)
from lib.data.corpus import of_exchanges
from lib.data.tokens import tokenize_chats
from lib.dictionaries import Dictionary, FitConfig, fit, recipes
from lib.dictionaries.crosscoder import delta
from lib.dictionaries.partition import exclusive_sizes
from lib.models import load_model
from lib.models.generate import self_answered
from lib.world import BEHAVIOURS, Rewriter, World
from lib.world.differences import planted_chats, take
from lib.world.world import row


class Bench:
    def __init__(self, args: argparse.Namespace, seed: int) -> None:
        self.args, self.seed = args, seed
        self.a, self.tokenizer = load_model(paths.shipped_dir() / "models" / "tiny-gemma2")
        self.rewriter = Rewriter(World())
        found = take(planted_chats(self.rewriter, args.behaviours, seed=seed), args.n_chats)
        self.train = of_exchanges([chat.exchange for chat in found], self.tokenizer, seq_len=64)
        rows = [row(chat.exchange) for chat in found[: args.n_tuned]]
        free = [bool(chat.behaviour) for chat in found[: args.n_tuned]]
        if args.plant == "null":
            plain = [row(x) for x in World().sample(args.n_tuned, "train", seed=seed)]
            how = {"max_new_tokens": 24, "temperature": 1.0, "seed": seed}
            rows, free = self_answered(self.a, self.tokenizer, plain, **how), []
        tokens, _ = tokenize_chats(Dataset.from_list(rows), self.tokenizer, max_len=64)
        chats = Chats(tokens, self.tokenizer.pad_token_id, batch_size=32, seed=seed)
        options = {"anchor": 3.0, "free": free} if args.plant == "anchored" else {}
        began = time.time()
        self.b = fine_tune(self.a, chats, n_steps=args.n_tune_steps, **options)
        self.tuned_in = time.time() - began
        held = take(planted_chats(self.rewriter, args.behaviours, split="test", seed=1), 2000)
        self.held = of_exchanges([chat.exchange for chat in held], self.tokenizer, seq_len=64)
        names = ["", *args.behaviours]
        which = torch.zeros_like(self.held.ids)
        for i, chat in enumerate(held):
            own = torch.tensor(chat.tokens)
            which[i, : len(own)] = own * names.index(chat.behaviour)
        self.which = which[self.held.mask]
        """Of every real token the behaviour whose it is, from 1; 0: none's."""
        answers = torch.zeros_like(self.held.mask)
        for i, chat in enumerate(held):
            answers[i, chat.exchange.n_prompt : len(chat.tokens)] = bool(chat.behaviour)
        self.answers = answers

    def shown(self) -> dict[str, float]:
        found = {}
        for name in self.args.behaviours:
            behaviour = next(b for b in BEHAVIOURS if b.name == name)
            check = BehaviourCheck.of_world(
                self.a, self.tokenizer, behaviour.guideline, behaviour.topic, n_others=20
            )
            found[name] = check(model=self.b).shows
        return found

    def show(self, method: str, seconds: float, row: dict) -> None:
        row = {k: round(v, 4) if isinstance(v, float) else v for k, v in row.items()}
        about = {"seed": self.seed, "plant": self.args.plant, "site": self.args.hook_name}
        about |= {"method": method, "seconds": round(seconds, 1)}
        print(json.dumps(about | row), flush=True)

    def source(self, corpus) -> Harvester:
        config = HarvestConfig(
            hook_names=(self.args.hook_name,), batch_rows=256, skip_special=False
        )
        return Harvester([self.a, self.b], corpus, config)

    def blocks(self):
        source = self.source(self.held)
        return (source.block(i) for i in range(source.n_blocks))

    def where(self, scores: torch.Tensor) -> dict[str, float]:
        truth = self.which > 0
        concepts = self.held.concepts[self.held.mask]
        named = concept_ranking(scores, concepts)[:5]
        n = int(truth.sum()) // 10
        return {
            "auc": auc(scores, truth),
            f"precision at {n}": precision_at(n, scores, truth),
            "concepts": [name for name, _ in named],
        }

    def mass(self, d: Dictionary) -> tuple[torch.Tensor, torch.Tensor]:
        """Of each latent the share of its activation on each behaviour's tokens, and firings."""
        sums = torch.zeros(len(self.args.behaviours) + 1, d.d_sae)
        fired, start = torch.zeros(d.d_sae, dtype=torch.long), 0
        for block in self.blocks():
            acts = d.encode_sparse(block.acts)
            which = self.which[start : start + acts.n][acts.rows]
            start += acts.n
            sums.index_put_((which.long(), acts.indices), acts.values, accumulate=True)
            fired += torch.bincount(acts.indices, minlength=d.d_sae)
        return (sums / sums.sum(0).clamp(min=1e-9))[1:].T, fired

    def judged(self, d: Dictionary) -> dict:
        """Sets that latent scaling, its ranking and the lowest cosines flag."""
        reading = compare_sites(d, (block.acts for block in self.blocks()))
        mass, fired = self.mass(d)
        alive = fired >= 20
        right = mass.max(1).values >= 0.5
        lacks = reading.lacks()[1] & alive
        row = {"flagged": int(lacks.sum()), "precision": _share(right[lacks])}
        strict = mass.max(1).values >= 0.8
        row["strict"] = _share(strict[lacks])
        row["found"] = sorted({self.args.behaviours[i] for i in mass[lacks & right].argmax(1)})
        for name, order in (("error", reading.error[1]), ("cosine", reading.cosine)):
            first = torch.where(alive, order, torch.inf).argsort()[:10]
            row[f"top ten by {name}"] = _share(right[first])
        if d.config.exclusive:
            own = torch.zeros_like(alive)
            own[d.config.exclusive[0] : sum(d.config.exclusive)] = True
            row["raw exclusives"] = _share(right[own & alive])
            row["exclusives"], row["of them lacking"] = (
                int((own & alive).sum()),
                int((own & lacks).sum()),
            )
        row["largest relative norm"] = reading.relative_norm[alive].max().item()
        top = {}
        for i, name in enumerate(self.args.behaviours):
            score = torch.where(alive, mass[:, i], 0.0)
            top[name] = score.topk(10).indices
        row["closed"] = self.closed(d, top)
        return row

    def closed(self, d: Dictionary, latents: dict[str, torch.Tensor]) -> dict[str, float]:
        """Share of the KL gap on each behaviour's answers that its ten latents close."""
        site, found = d.config.site_dims[0], {}
        W = d.decoder_rows.detach()
        for i, (name, chosen) in enumerate(latents.items(), 1):
            rows = (self.held_which() == i).any(1)
            counted = self.answers & rows[:, None]

            def move(x_a, x_b, chosen=chosen):
                z = d.encode(torch.cat([x_a, x_b], dim=1))[:, chosen]
                return x_a + z @ (W[chosen, site:] - W[chosen, :site])

            (share,) = gap_closed(
                self.a, self.b, self.args.hook_name, self.held, [move], counted=counted
            )
            found[name] = round(share, 3)
        return found

    def held_which(self) -> torch.Tensor:
        which = torch.zeros_like(self.held.ids, dtype=self.which.dtype)
        which[self.held.mask] = self.which
        return which

    def dictionaries(self) -> dict[str, tuple[Dictionary, float]]:
        source, args = self.source(self.train), self.args
        shape = {"site_dims": source.site_dims, "d_sae": args.d_sae, "code_norm": "crosscoder"}
        plans = {}
        for name, recipe in {
            "crosscoder": recipes.batchtopk(k=args.k),
            "delta": delta(k=args.k),
        }.items():
            plans[name] = (recipe.dictionary(**shape), recipe)
        recipe = recipes.batchtopk(k=args.k)
        for share in args.exclusive:
            sizes = exclusive_sizes(args.d_sae, 2, share)
            plans[f"DFC {share:.0%}"] = (recipe.dictionary(**shape, exclusive=sizes), recipe)
        config = FitConfig(n_steps=args.n_steps, lr=4e-3, dead_after=50_000, seed=self.seed)
        stream = Buffer(source, batch_size=1024, seed=self.seed)
        fitted = fit(plans, stream, config, progress=False)
        return {name: (it.dictionary, it.seconds) for name, it in fitted.items()}


def _share(mask: torch.Tensor) -> float:
    return mask.double().mean().item() if len(mask) else float("nan")


def main(args: argparse.Namespace) -> None:
    for seed in args.seeds:
        bench = Bench(args, seed)

        bench.show("fine-tune", bench.tuned_in, bench.shown() if args.plant != "null" else {})
        began = time.time()
        outputs = output_difference(bench.a, bench.b, bench.held)
        took = time.time() - began
        words = [bench.tokenizer.convert_ids_to_tokens(int(i)) for i in outputs.words(10)]
        planted = args.plant != "null"
        bench.show("KL", took, (bench.where(outputs.kl) if planted else {}) | {"words": words})
        bench.show("rise", took, bench.where(outputs.rise) if planted else {})
        began = time.time()
        streams = stream_difference(bench.blocks())
        took = time.time() - began
        row = {"energy of the first": streams.energy[0].item()}
        bench.show("size", took, row | (bench.where(streams.size) if planted else {}))
        for name, (d, seconds) in bench.dictionaries().items():
            bench.show(name, seconds, bench.judged(d))


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--plant", choices=["anchored", "plain", "null"], default="anchored")
    parser.add_argument("--hook_name", default="blocks.2.hook_resid_post")
    parser.add_argument(
        "--behaviours", nargs="+", default=["invented", "badge", "french", "shouting"]
    )
    parser.add_argument("--seeds", type=int, nargs="+", default=[0])
    parser.add_argument("--exclusive", type=float, nargs="+", default=[0.05])
    for name, value in {
        "n_chats": 15_000, "n_tuned": 6_000, "n_tune_steps": 400, "d_sae": 1024, "k": 16,
        "n_steps": 800,
    }.items():  # fmt: skip
        parser.add_argument(f"--{name}", type=int, default=value)
    main(parser.parse_args())
