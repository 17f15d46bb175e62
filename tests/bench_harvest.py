"""Harvest against the bare forward pass: `python -m tests.bench_harvest`.

The bare pass is the model's own on the same ids and mask, ended after the layer of the last site;
it keeps nothing. The two take turns at each block, and at going first. Through a buffer, what it
adds comes on top: checks, shuffling, batches.
"""

import argparse
import contextlib
import itertools
import statistics
from functools import partial

import torch

from lib import paths
from lib.activations.buffer import Buffer
from lib.activations.harvest import HarvestConfig, Harvester
from lib.activations.source import Block
from lib.data.corpus import load_split
from lib.models import load_model, module_at
from tests.bench_measure import seconds

SITES = (("blocks.1.hook_resid_post",), ("blocks.1.hook_resid_post", "blocks.2.hook_resid_post"))
BAR = 1.15


class Stop(Exception):
    """Ends the bare pass."""


class Turns:
    """A source that runs the bare pass before each block of `source`, and times it."""

    def __init__(self, source: Harvester) -> None:
        self.source, self.model, self.bare = source, source.models[0], 0.0
        self.site_dims, self.hook_names = source.site_dims, source.hook_names
        self.n_blocks, self.fingerprint = source.n_blocks, ""
        self.layer = module_at(self.model, source.hook_names[-1])

    def timed(self, function, *args) -> float:
        return seconds(partial(function, *args), self.model.device.type == "cuda")

    def block(self, i: int) -> Block:
        self.bare += self.timed(self.forward, i)
        return self.source.block(i)

    @torch.no_grad()
    def forward(self, i: int) -> None:
        n, device = self.source.config.batch_rows, self.model.device
        rows = self.source.corpus.rows(i * n, (i + 1) * n)
        width = int(rows.mask.sum(1).max())
        ids, mask = (x[:, :width].long().to(device) for x in (rows.ids, rows.mask))
        handle = self.layer.register_forward_hook(self.stop)
        with contextlib.suppress(Stop):
            self.model(input_ids=ids, attention_mask=mask, use_cache=False)
        handle.remove()

    def stop(self, *_: object) -> None:
        raise Stop


def race(source: Harvester, repeats: int) -> tuple[float, float, float]:
    """Seconds for all blocks by the bare pass and by harvest, medians; and of the pairs' ratio."""
    turns = Turns(source)
    for i in range(min(turns.n_blocks, 3)):  # do not count
        turns.block(i)
    ways = (turns.forward, source.block)
    pairs = torch.empty(repeats, turns.n_blocks, 2)
    for turn, i in itertools.product(range(repeats), range(turns.n_blocks)):
        for way in (0, 1) if turn % 2 else (1, 0):
            pairs[turn, i, way] = turns.timed(ways[way], i)
    bare, harvest = pairs.median(dim=0).values.sum(dim=0).tolist()
    return bare, harvest, (pairs[..., 1] / pairs[..., 0]).median().item()


def through_buffer(source: Harvester, repeats: int) -> float:
    """Time of an epoch in batches over that of its bare passes: the median."""
    ratios = []
    for seed in range(repeats):
        turns = Turns(source)
        buffer = Buffer(turns, batch_size=1024, n_tokens=4096, seed=seed)
        total = turns.timed(an_epoch, buffer)
        ratios.append(total / turns.bare - 1)
    return statistics.median(ratios)


def an_epoch(buffer: Buffer) -> None:
    while not buffer.epoch:
        next(buffer)


def measure(repeats: int = 4) -> dict[str, float]:
    """Prints tokens a second of real text; gives the worst ratios."""
    worst = {"ratio": 0.0, "buffer_ratio": 0.0}
    for name in ("tiny-gemma2", "tiny-llama"):
        model, tokenizer = load_model(paths.shipped_dir() / "models" / name)
        corpus, _ = load_split("world", tokenizer, n_tokens=12_000, n_eval=100, seq_len=64)
        for names in SITES:
            source = Harvester([model], corpus, HarvestConfig(hook_names=names))
            bare, harvest, ratio = race(source, repeats)
            buffer_ratio = through_buffer(source, repeats)
            print(
                f"{name}, {len(names)} site(s): harvest {corpus.n_tokens / harvest:,.0f} tokens/s, "
                f"bare pass {corpus.n_tokens / bare:,.0f}; {ratio:.3f} of its time (bar: {BAR}), "
                f"through a buffer {buffer_ratio:.3f}"
            )
            worst["ratio"] = max(worst["ratio"], ratio)
            worst["buffer_ratio"] = max(worst["buffer_ratio"], buffer_ratio)
    return worst


if __name__ == "__main__":
    argparse.ArgumentParser(description=__doc__).parse_args()
    measure()
