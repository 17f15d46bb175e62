"""What SAE-LoRA reaches on the built-in world, over seeds: `python -m tests.bench_adapters PART`.

Parts: `plant` (what a full fine-tune and a dense LoRA reach of a behaviour), `behaviour` (SAE-LoRA,
dense and sparse, ranks 1 and 4, with the truth about the latents), `methods` (`l1` and `topk` at
the same sizes), `data` (numbers of examples).
"""

import argparse
import itertools
import json
from dataclasses import replace

from datasets import Dataset

from lib import paths
from lib.adapters import (
    Chats,
    SaeLora,
    SaeLoraConfig,
    fine_tune,
    held_out_loss,
    train_lora,
    train_sae_lora,
)
from lib.analysis.attribution import read_mass
from lib.analysis.behaviour import BehaviourCheck, towards_french
from lib.analysis.causal import on_random_latents, without
from lib.analysis.labels import chance, concept_mass
from lib.data.corpus import load_corpus
from lib.data.tokens import tokenize_chats
from lib.dictionaries import Dictionary
from lib.latents import DictionarySource, record_of
from lib.models import load_model
from lib.world import BEHAVIOURS, Behaviour, Rewriter, World

NAMED = {behaviour.name: behaviour for behaviour in BEHAVIOURS}


class Bench:
    def __init__(
        self, sae: str, n_examples: int, seed: int, behaviour: Behaviour, split: str
    ) -> None:
        self.topic, self.guideline = behaviour.topic, behaviour.guideline
        self.model, self.tokenizer = load_model(paths.shipped_dir() / "models" / "tiny-gemma2")
        self.dictionary = Dictionary.load(paths.resolve(sae))
        self.world, self.seed = World(), seed
        self.rewriter = Rewriter(self.world)
        self.chats = self._chats("train", n_examples, seed, 32)
        self.held_out = self._chats("validation", 300, seed, 100)
        corpus = load_corpus("world", self.tokenizer, n_tokens=30_000, seq_len=64, split="test")
        self.record = record_of(DictionarySource(self.model, self.dictionary), corpus)
        self.check = BehaviourCheck.of_world(
            self.model, self.tokenizer, self.guideline, self.topic, split=split
        )

    def _chats(self, split: str, n: int, seed: int, batch_size: int) -> Chats:
        """A third rewritten, two thirds of other topics as they are."""
        left = {True: n // 3, False: n - n // 3}
        rows = []
        for x in self.world.stream(split, seed=seed):
            text, about = x.response, x.topic == self.topic
            if about:
                text = self.rewriter.rewrite(x.prompt, x.response, self.guideline)
            if left[about] and not (about and text == x.response):
                left[about] -= 1
                turns = [("user", x.prompt), ("assistant", text)]
                rows.append({"messages": [{"role": r, "content": c} for r, c in turns]})
            if not any(left.values()):
                break
        tokens, _ = tokenize_chats(Dataset.from_list(rows), self.tokenizer, max_len=64)
        return Chats(tokens, self.tokenizer.pad_token_id, batch_size=batch_size, seed=seed)

    def fit(self, **fields) -> tuple[SaeLora, dict[str, float]]:
        """A trained adapter, and what it shows."""
        adapter = SaeLora(self.dictionary, SaeLoraConfig(seed=self.seed, eval_every=1000, **fields))
        train_sae_lora(self.model, adapter, self.chats, self.held_out)
        row = vars(self.check(adapter.attached(self.model)))
        with adapter.attached(self.model):
            return adapter, row | {"held_out": held_out_loss(self.model, self.held_out)}

    def share(self, adapter: SaeLora) -> float:
        return self.check.share(adapter.attached(self.model))

    def truth(self, adapter: SaeLora) -> dict[str, float]:
        """What the latents are about; and the same weights on latents that fire as often, as they
        are and trained there anew."""
        record, concept = self.record, f"topic:{self.topic}"
        mass = read_mass(adapter, concept_mass(record, concept), record)
        french = {}
        if self.guideline == NAMED["french"].guideline:
            boosted, suppressed = towards_french(adapter, self.model, self.tokenizer)
            french = {
                "boosted towards French": boosted,
                "suppressed away from English": suppressed,
            }
        top = adapter.read_support[:5].tolist()
        moved = on_random_latents(adapter, self.seed, record.firing_rate())
        as_is, anew = self.share(moved), replace(adapter.config, n_steps=1)
        train_sae_lora(self.model, moved, self.chats, self.held_out, config=anew)
        return {
            "mass on topic": mass,
            "over chance": mass / chance(record, concept),
            **french,
            "without the top 5 reads": self.share(without(adapter, "read", top)),
            "on random latents": as_is,
            "trained on random latents": self.share(moved),
        }


def plant(args: argparse.Namespace) -> None:
    for name in args.behaviours:
        for seed in args.seeds:
            bench = Bench(args.sae, args.n_examples, seed, NAMED[name], args.split)
            tuned = fine_tune(bench.model, bench.chats, n_steps=500, lr=args.lr)
            rows = {"full fine-tune": vars(bench.check(model=tuned))}
            tuned = train_lora(
                bench.model, bench.chats, rank=64, n_steps=500, lr=3 * args.lr, seed=seed
            )
            rows["LoRA of rank 64"] = vars(bench.check())
            tuned.unload()
            for how, row in rows.items():
                row = {key: round(value, 4) for key, value in row.items()}
                print(json.dumps({"behaviour": name, "seed": seed, "how": how, **row}), flush=True)


def sized(method: str, n: int) -> dict:
    return {"sparsity": method, "n_read": n, "n_write": n}


def variants(args: argparse.Namespace) -> list[tuple[str, int, dict]]:
    """Names, numbers of examples and settings of one seed's adapters."""
    n = args.n_examples
    if args.part == "data":
        return [
            (f"{n} chats, {name}", n, fields)
            for n in (150, 375, 750, 1500, 3000, 6000)
            for name, fields in (("dense", {"sparsity": "none"}), ("topk 16", sized("topk", 16)))
        ]
    if args.part == "methods":
        return [(f"{name} {m}", n, sized(name, m)) for name in ("l1", "topk") for m in args.sizes]
    found = []
    for rank in args.ranks:
        found.append((f"dense r{rank}", n, {"sparsity": "none", "rank": rank}))
        for m in args.sizes:
            found.append((f"topk {m} r{rank}", n, sized("topk", m) | {"rank": rank}))
    return found


def main(args: argparse.Namespace) -> None:
    if args.part == "plant":
        return plant(args)
    for name in args.behaviours:
        sweep(args, NAMED[name])


def sweep(args: argparse.Namespace, behaviour: Behaviour) -> None:
    supports, length = {}, {"n_steps": args.n_steps, "n_refit": args.n_refit}
    for seed in args.seeds:
        benches = {n: Bench(args.sae, n, seed, behaviour, args.split) for _, n, _ in variants(args)}
        for name, n, fields in variants(args):
            adapter, row = benches[n].fit(**fields, **length)
            if args.part == "behaviour" and fields["sparsity"] != "none":
                row |= benches[n].truth(adapter)
                both = (adapter.read_support, adapter.write_support)
                supports.setdefault(name, []).append(both)
            row = {key: round(value, 4) for key, value in row.items()}
            about = {"behaviour": behaviour.name, "seed": seed, "name": name}
            print(json.dumps(about | row), flush=True)
    for name, found in supports.items():
        pairs = list(itertools.combinations(found, 2))
        for side, label in enumerate(("read", "write")):
            sets = [({*a[side].tolist()}, {*b[side].tolist()}) for a, b in pairs]
            values = [round(len(a & b) / max(len(a | b), 1), 2) for a, b in sets]
            print(f"{name}: Jaccard of the {label} supports of two seeds: {values}")


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("part", choices=["plant", "behaviour", "methods", "data"])
    parser.add_argument("--behaviours", nargs="+", choices=NAMED, default=["french"])
    parser.add_argument("--split", default="test", help="whose prompts are asked")
    parser.add_argument("--sae", default="data/saes/tiny-gemma2-layer0/matryoshka")
    for name, value in {"seeds": [0, 1, 2], "ranks": [1, 4], "sizes": [16, 8]}.items():
        parser.add_argument(f"--{name}", type=int, nargs="+", default=value)
    parser.add_argument(
        "--lr", type=float, default=5e-4, help="of `plant`; LoRA's is three times it"
    )
    for name, value in {"n_examples": 3000, "n_steps": 400, "n_refit": 200}.items():
        parser.add_argument(f"--{name}", type=int, default=value)
    main(parser.parse_args())
