"""Harvest against the bare forward pass: `python -m tests.bench_harvest`.

The bare pass is the model's own on the same ids and mask, ended after the layer of the last site;
it keeps nothing. The two take turns at each block, and at going first. Through a buffer, what it
adds comes on top: checks, shuffling, batches.
"""

import argparse
import itertools
import statistics
import time

import torch

from lib import paths
from lib.activations.buffer import Buffer
from lib.activations.harvest import HarvestConfig, Harvester
from lib.activations.source import Block
from lib.data.corpus import load_split
from lib.models import load_model, module_at

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

    def block(self, i: int) -> Block:
        self.bare += seconds(self.forward, i)
        return self.source.block(i)

    @torch.no_grad()
    def forward(self, i: int) -> None:
        n, device = self.source.config.batch_rows, self.model.device
        rows = self.source.corpus.rows(i * n, (i + 1) * n)
        width = int(rows.mask.sum(1).max())
        ids, mask = rows.ids[:, :width].long().to(device), rows.mask[:, :width].long().to(device)
        handle = self.layer.register_forward_hook(self.stop)
        try:
            self.model(input_ids=ids, attention_mask=mask, use_cache=False)
        except Stop:
            pass
        finally:
            handle.remove()

    def stop(self, *_: object) -> None:
        raise Stop


def seconds(function, *args) -> float:
    wait = torch.cuda.synchronize if torch.cuda.is_available() else lambda: None
    wait()
    start = time.perf_counter()
    function(*args)
    wait()
    return time.perf_counter() - start


def race(source: Harvester, repeats: int) -> tuple[float, float, float]:
    """Seconds for all blocks by the bare pass and by harvest, medians; and of the pairs' ratio."""
    turns = Turns(source)
    for i in range(min(turns.n_blocks, 3)):  # do not count
        turns.block(i)
    ways = (turns.forward, source.block)
    pairs = torch.empty(repeats, turns.n_blocks, 2)
    for turn, i in itertools.product(range(repeats), range(turns.n_blocks)):
        for way in (0, 1) if turn % 2 else (1, 0):
            pairs[turn, i, way] = seconds(ways[way], i)
    bare, harvest = pairs.median(dim=0).values.sum(dim=0).tolist()
    return bare, harvest, (pairs[..., 1] / pairs[..., 0]).median().item()


def through_buffer(source: Harvester, repeats: int) -> float:
    """Time of an epoch in batches over that of its bare passes: the median."""
    ratios = []
    for seed in range(repeats):
        turns = Turns(source)
        total = seconds(an_epoch, Buffer(turns, batch_size=1024, n_tokens=4096, seed=seed))
        ratios.append(total / turns.bare - 1)
    return statistics.median(ratios)


def an_epoch(buffer: Buffer) -> None:
    while not buffer.epoch:
        next(buffer)


def measure(repeats: int = 4, device: str = "auto") -> dict:
    """Tokens a second of real text to one site; the ratios are the worst of all lines of `text`."""
    rows, lines = [], []
    for name in ("tiny-gemma2", "tiny-llama"):
        model, tokenizer = load_model(paths.shipped_dir() / "models" / name, device=device)
        corpus, _ = load_split("world", tokenizer, n_tokens=12_000, n_eval=100, seq_len=64)
        for names in SITES:
            source = Harvester([model], corpus, HarvestConfig(hook_names=names))
            bare, harvest, ratio = race(source, repeats)
            row = (corpus.n_tokens / harvest, corpus.n_tokens / bare, ratio)
            rows.append((*row, through_buffer(source, repeats)))
            lines.append(
                f"{name}, {len(names)} site(s): harvest {rows[-1][0]:,.0f} tokens/s, bare pass "
                f"{rows[-1][1]:,.0f}; {ratio:.3f} of its time (bar: {BAR}), through a buffer "
                f"{rows[-1][3]:.3f}"
            )
    return {
        "tokens_per_s": rows[0][0],
        "bare_tokens_per_s": rows[0][1],
        "ratio": max(row[2] for row in rows),
        "buffer_ratio": max(row[3] for row in rows),
        "text": "\n".join(lines),
    }


if __name__ == "__main__":
    argparse.ArgumentParser(description=__doc__).parse_args()
    print(measure()["text"])
