"""Figures that depend on the machine: `make bench` prints them, no test holds them.

`python -m tests.bench_data --chats 1000000` streams a million tokenised chats.
"""

import argparse
import json
import tempfile
import time
from pathlib import Path

import psutil

from lib.data.chats import load_chats
from lib.data.tokens import tokenize_chats
from lib.world import Reader, World, build_tokenizer
from lib.world.world import row
from tests.bench_measure import seconds


def megabytes() -> float:
    """Memory of this process that no file backs."""
    return psutil.Process().memory_full_info().uss / 2**20


def main(n_chats: int) -> None:
    world, sample = World(), []
    spent = seconds(lambda: sample.extend(world.sample(100_000)), cuda=False)
    print(f"100,000 exchanges of the world: {spent:.1f} s (bar: 10)")
    reader = Reader(world)
    for name, function, n in (
        ("parse a prompt", lambda x: reader.parse(x.prompt), 5000),
        ("exact surprisal of a chat", reader.surprisal, 500),
    ):
        spent = seconds(lambda f=function, n=n: [f(x) for x in sample[:n]], cuda=False)
        print(f"{name}: {1000 * spent / n:.2f} ms")
    del sample
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "chats.jsonl"
        stream = world.stream(seed=1)
        with path.open("w", encoding="utf-8") as file:
            for i in range(n_chats):
                line = {"id": str(i), **row(next(stream))}
                file.write(json.dumps(line, ensure_ascii=False) + "\n")
        began = time.perf_counter()
        chats = load_chats(path, streaming=True)
        rows, truncation = tokenize_chats(chats, build_tokenizer(world), max_len=64)
        for i, _ in enumerate(rows, start=1):
            if i in (n_chats // 100, n_chats // 10, n_chats // 2, n_chats):
                spent = time.perf_counter() - began
                print(f"{i:>9,} chats streamed, {megabytes():.0f} MB, {spent:.0f} s", flush=True)
        print(truncation)


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--chats", type=int, default=100_000, help="chats to stream")
    main(parser.parse_args().chats)
