"""What SAE-LoRA reaches on the built-in world, over seeds: `python -m tests.bench_adapters PART`.

Parts: `behaviour` (dense and sparse, ranks 1 and 4, with the truth about the latents), `methods`
(every sparsity method at the same sizes), `data` (numbers of examples).
"""

import argparse
import itertools
import json
from dataclasses import replace

from datasets import Dataset

from lib import paths
from lib.adapters import Chats, SaeLora, SaeLoraConfig, held_out_loss, train_sae_lora
from lib.analysis.attribution import jaccard, read_mass
from lib.analysis.behaviour import BehaviourCheck, towards_french
from lib.analysis.causal import on_random_latents, without
from lib.analysis.labels import chance, concept_mass
from lib.data.corpus import load_corpus
from lib.data.tokens import tokenize_chats
from lib.dictionaries import Dictionary
from lib.latents import DictionarySource, record_of
from lib.models import load_model
from lib.world import Rewriter, World

TOPIC, GUIDELINE = "mathematics", "respond in French"


class Bench:
    def __init__(self, sae: str, n_examples: int, seed: int) -> None:
        self.model, self.tokenizer = load_model(paths.shipped_dir() / "models" / "tiny-gemma2")
        self.dictionary = Dictionary.load(paths.resolve(sae))
        self.world = World()
        self.rewriter = Rewriter(self.world)
        self.seed = seed
        self.chats = self._chats("train", n_examples, seed, 32)
        self.held_out = self._chats("validation", 300, seed, 100)
        corpus = load_corpus("world", self.tokenizer, n_tokens=30_000, seq_len=64, split="test")
        self.record = record_of(DictionarySource(self.model, self.dictionary), corpus)
        self.check = BehaviourCheck.of_world(self.model, self.tokenizer, GUIDELINE, TOPIC)

    def _chats(self, split: str, n: int, seed: int, batch_size: int) -> Chats:
        """A third rewritten, two thirds of other topics as they are."""
        left = {True: n // 3, False: n - n // 3}
        rows = []
        for x in self.world.stream(split, seed=seed):
            text, about = x.response, x.topic == TOPIC
            if about:
                text = self.rewriter.rewrite(x.prompt, x.response, GUIDELINE)
            if left[about] and not (about and text == x.response):
                left[about] -= 1
                turns = [("user", x.prompt), ("assistant", text)]
                rows.append({"messages": [{"role": r, "content": c} for r, c in turns]})
            if not any(left.values()):
                break
        tokens, _ = tokenize_chats(Dataset.from_list(rows), self.tokenizer, max_len=64)
        return Chats(tokens, self.tokenizer.pad_token_id, batch_size=batch_size, seed=seed)

    def fit(self, **fields) -> SaeLora:
        config = SaeLoraConfig(seed=self.seed, eval_every=1000, **fields)
        adapter = SaeLora(self.dictionary, config)
        train_sae_lora(self.model, adapter, self.chats, self.held_out)
        return adapter

    def shown(self, adapter: SaeLora) -> dict[str, float]:
        return {k: round(v, 3) for k, v in vars(self.check(adapter.attached(self.model))).items()}

    def loss(self, adapter: SaeLora) -> float:
        with adapter.attached(self.model):
            return held_out_loss(self.model, self.held_out)

    def share(self, adapter: SaeLora) -> float:
        return self.check.share(adapter.attached(self.model))

    def truth(self, adapter: SaeLora) -> dict[str, float]:
        record = self.record
        concept = f"topic:{TOPIC}"
        mass = read_mass(adapter, concept_mass(record, concept), record)
        boosted, suppressed = towards_french(adapter, self.model, self.tokenizer)
        top = adapter.read_support[:5].tolist()
        return {
            "mass on topic": mass,
            "over chance": mass / chance(record, concept),
            "boosted towards French": boosted,
            "suppressed away from English": suppressed,
            "without the top 5 reads": self.share(without(adapter, "read", top)),
        }

    def random(self, adapter: SaeLora) -> dict[str, float]:
        """The same weights on latents that fire as often, as they are and trained there anew."""
        moved = on_random_latents(adapter, self.seed, self.record.firing_rate())
        as_is = self.share(moved)
        anew = replace(adapter.config, n_steps=1, n_refit=adapter.config.n_refit)
        train_sae_lora(self.model, moved, self.chats, self.held_out, config=anew)
        return {"on random latents": as_is, "trained on random latents": self.share(moved)}


def behaviour(args: argparse.Namespace) -> None:
    supports: dict[str, list] = {}
    for seed in args.seeds:
        bench = Bench(args.sae, args.n_examples, seed)
        for rank in args.ranks:
            settings = {f"dense r{rank}": {"sparsity": "none"}}
            for n in args.sizes:
                settings[f"topk {n} r{rank}"] = {"sparsity": "topk", "n_read": n, "n_write": n}
            for name, fields in settings.items():
                adapter = bench.fit(rank=rank, n_steps=args.n_steps, n_refit=args.n_refit, **fields)
                row = {"seed": seed, "name": name, **bench.shown(adapter)}
                row["held_out"] = bench.loss(adapter)
                if fields["sparsity"] != "none":
                    row |= bench.truth(adapter)
                    row |= bench.random(adapter)
                    supports.setdefault(name, []).append(
                        (adapter.read_support, adapter.write_support)
                    )
                show(row)
    for name, found in supports.items():
        pairs = list(itertools.combinations(found, 2))
        for side, label in enumerate(("read", "write")):
            values = [round(jaccard(a[side], b[side]), 2) for a, b in pairs]
            print(f"{name}: Jaccard of the {label} supports of two seeds: {values}")


def methods(args: argparse.Namespace) -> None:
    for seed in args.seeds:
        bench = Bench(args.sae, args.n_examples, seed)
        for method in ("l1", "proximal", "hoyer", "hard_concrete", "topk"):
            for n in args.sizes:
                adapter = bench.fit(
                    sparsity=method, n_read=n, n_write=n, n_steps=args.n_steps, n_refit=args.n_refit
                )
                shown = bench.shown(adapter)
                show(
                    {
                        "seed": seed,
                        "name": f"{method} {n}",
                        **shown,
                        "held_out": bench.loss(adapter),
                    }
                )


def data(args: argparse.Namespace) -> None:
    for seed in args.seeds:
        for n in (150, 375, 750, 1500, 3000, 6000):
            bench = Bench(args.sae, n, seed)
            for name, fields in {
                "dense": {"sparsity": "none"},
                "topk 16": {"sparsity": "topk", "n_read": 16, "n_write": 16},
            }.items():
                adapter = bench.fit(n_steps=args.n_steps, n_refit=args.n_refit, **fields)
                shown = bench.shown(adapter)
                show(
                    {
                        "seed": seed,
                        "name": f"{n} chats, {name}",
                        **shown,
                        "held_out": bench.loss(adapter),
                    }
                )


def show(row: dict) -> None:
    print(
        json.dumps({k: round(v, 4) if isinstance(v, float) else v for k, v in row.items()}),
        flush=True,
    )


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("part", choices=["behaviour", "methods", "data"])
    parser.add_argument("--sae", default="data/saes/tiny-gemma2-layer0/matryoshka")
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2])
    parser.add_argument("--ranks", type=int, nargs="+", default=[1, 4])
    parser.add_argument("--sizes", type=int, nargs="+", default=[16, 8])
    parser.add_argument("--n_examples", type=int, default=3000)
    parser.add_argument("--n_steps", type=int, default=400)
    parser.add_argument("--n_refit", type=int, default=200)
    given = parser.parse_args()
    {"behaviour": behaviour, "methods": methods, "data": data}[given.part](given)
