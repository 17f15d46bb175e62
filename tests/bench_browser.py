"""Milliseconds of a click in the feature browser: `python -m tests.bench_browser`.

The record is made up: 1 M tokens, 16 k latents, 32 active on every token, four of them always and
the others with frequencies that fall as one over their rank. The directions are random.
"""

import argparse
import resource
import statistics
import time
from functools import partial

import torch
from tokenizers import Tokenizer
from tokenizers.models import WordLevel
from transformers import PreTrainedTokenizerFast

from lib import paths
from lib.display import FeatureBrowser
from lib.latents import LatentRecord
from lib.models import load_model
from tests.bench_measure import seconds

ALWAYS, VOCABULARY = 4, 500


class Directions:
    """As much of a `LatentSource` as a click needs: random directions, and no model that runs."""

    hook_name = "blocks.1.hook_resid_post"

    def __init__(self, model: torch.nn.Module, n_latents: int) -> None:
        self.model, self.n_latents = model, n_latents
        self.write_directions = torch.randn(n_latents, model.config.hidden_size)


def made_up(n: int, n_latents: int, l0: int, seq: int) -> LatentRecord:
    """Each of a token's latents comes from its own group, so that none is drawn twice."""
    columns = [torch.full((n,), latent, dtype=torch.int32) for latent in range(ALWAYS)]
    for start in range(ALWAYS, l0):
        group = torch.arange(start, n_latents, l0 - ALWAYS, dtype=torch.int32)
        shares = (1 / torch.arange(1, len(group) + 1)).cumsum(0)
        columns.append(group[torch.searchsorted(shares, torch.rand(n) * shares[-1])])
    tokens = torch.arange(n, dtype=torch.int32)
    ids = torch.randint(VOCABULARY, (n,), dtype=torch.int32)
    return LatentRecord(
        indices=torch.stack(columns, 1).flatten(),
        values=torch.rand(n * l0),
        offsets=torch.arange(n + 1) * l0,
        n_latents=n_latents,
        ids=ids,
        rows=tokens // seq,
        positions=tokens % seq,
        texts=ids,
        text_offsets=torch.arange(0, n + seq, seq).clamp(max=n),
    )


def main(args: argparse.Namespace) -> None:
    torch.manual_seed(0)
    torch.set_num_threads(args.threads)
    record = made_up(args.n_tokens, args.n_latents, args.l0, args.seq)
    words = Tokenizer(WordLevel({f"w{i}": i for i in range(VOCABULARY)}, unk_token="w0"))
    model, _ = load_model(paths.shipped_dir() / "models" / "tiny-gemma2", device="cpu")
    start = time.perf_counter()
    browser = FeatureBrowser(
        record,
        PreTrainedTokenizerFast(tokenizer_object=words),
        source=Directions(model, args.n_latents),
        labels={latent: f"latent number {latent}" for latent in range(args.n_latents)},
    )
    spent = time.perf_counter() - start
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 2**20
    print(f"{len(record.indices):,} pairs: {spent:.1f} s to build, peak {peak:.1f} GiB")
    for name, latents in (
        ("random latents", torch.randint(args.n_latents, (50,)).tolist()),
        ("most frequent latents", record.firing_rate().argsort(descending=True)[:20].tolist()),
    ):
        times = [1000 * seconds(partial(browser.select, n), cuda=False) for n in latents]
        print(f"{name}: median {statistics.median(times):.0f} ms, max {max(times):.0f} ms")
    print(f"search: {1000 * seconds(partial(browser.search, 'number 12'), cuda=False):.0f} ms")


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__)
    sizes = {"n-tokens": 1_000_000, "n-latents": 16_384, "l0": 32, "seq": 128, "threads": 1}
    for name, value in sizes.items():
        parser.add_argument(f"--{name}", type=int, default=value)
    main(parser.parse_args())
