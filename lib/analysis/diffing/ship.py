"""Fine-tunes whose differences are known: `python -m lib.analysis.diffing.ship` trains the shipped.

`tiny-gemma2-planted` has four behaviours, two of them new, and is anchored to `tiny-gemma2`
elsewhere; `tiny-gemma2-null` was trained the same way on the answers of the model it began as, and
has nothing to be found.
"""

import argparse
import json
from collections.abc import Sequence

from datasets import Dataset
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from lib import paths
from lib.adapters import Chats, fine_tune, train_lora
from lib.analysis.behaviour import BehaviourCheck
from lib.data.tokens import tokenize_chats
from lib.models import load_model
from lib.models.generate import self_answered
from lib.runtime import atomic_folder
from lib.world import BEHAVIOURS, Rewriter, World
from lib.world.differences import planted_chats, take
from lib.world.world import row

KINDS = ("anchored", "plain", "lora", "null", "anchored null")
SHIPPED = ("invented", "badge", "french", "shouting")


def plant(
    a: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    behaviours: Sequence[str],
    kind: str = "anchored",
    *,
    n_chats: int = 6000,
    n_steps: int = 400,
    lr: float = 1e-3,
    seed: int = 0,
) -> PreTrainedModel:
    """A fine-tune of a tiny model on chats of the world under several behaviours.

    Args:
        kind: `anchored` (kept as it was elsewhere), `plain`, `lora` (rank 64, merged), `null` or
            `anchored null`: on a's own answers, which show no behaviour.

    Raises:
        ValueError: an unknown kind or behaviour.
    """
    if kind not in KINDS:
        raise ValueError(f"need kind in {KINDS}, got {kind!r}")
    world = World()
    if kind.endswith("null"):
        topics = {x.topic for x in BEHAVIOURS if x.name in behaviours}
        plain = world.sample(n_chats, "train", seed=seed)
        how = {"max_new_tokens": 24, "temperature": 1.0, "seed": seed}
        rows = self_answered(a, tokenizer, [row(x) for x in plain], **how)
        free = [x.topic in topics for x in plain]
    else:
        found = take(planted_chats(Rewriter(world), behaviours, seed=seed), n_chats)
        rows = [row(chat.exchange) for chat in found]
        free = [bool(chat.behaviour) for chat in found]
    tokens, _ = tokenize_chats(Dataset.from_list(rows), tokenizer, max_len=64)
    chats = Chats(tokens, tokenizer.pad_token_id, batch_size=32, seed=seed)
    if kind == "lora":
        tuned = train_lora(a, chats, rank=64, lr=lr, n_steps=n_steps, seed=seed)
        return tuned.merge_and_unload(safe_merge=True).eval()
    options = {"anchor": 3.0, "free": free} if kind.startswith("anchored") else {}
    return fine_tune(a, chats, n_steps=n_steps, lr=lr, **options)


def shown(
    a: PreTrainedModel,
    b: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    behaviours: Sequence[str],
    split: str = "test",
) -> dict[str, dict[str, float]]:
    """Of each behaviour the share of asking prompts that show it, and of others `unchanged`."""
    found, topics = {}, {x.topic for x in BEHAVIOURS if x.name in behaviours}
    for known in (x for x in BEHAVIOURS if x.name in behaviours):
        asked = {"n_others": 200, "split": split, "changed_topics": topics}
        check = BehaviourCheck.of_world(a, tokenizer, known.guideline, known.topic, **asked)
        result = check(model=b)
        found[known.name] = {"shows": result.shows, "unchanged": result.unchanged}
    return found


def build(base: str = "tiny-gemma2", names: Sequence[str] = ("planted", "null")) -> None:
    """Train and save the shipped fine-tunes, with what they show."""
    kinds = {"planted": "anchored", "null": "anchored null"}
    for name in names:
        kind = kinds[name]
        a, tokenizer = load_model(paths.shipped_dir() / "models" / base)
        b = plant(a, tokenizer, SHIPPED, kind)
        record = {"base": base, "kind": kind, "behaviours": SHIPPED}
        record["figures"] = shown(a, b, tokenizer, SHIPPED)
        with atomic_folder(paths.shipped_dir() / "models" / f"{base}-{name}") as new:
            b.save_pretrained(new)
            tokenizer.save_pretrained(new)
            (new / "training.json").write_text(json.dumps(record, indent=1) + "\n")
        print(name, json.dumps(record["figures"]))


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("names", nargs="*", default=["planted", "null"], help="models to train")
    build(names=parser.parse_args().names)
