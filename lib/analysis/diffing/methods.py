"""The ways to look for what differs between two models that train nothing."""

import time
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import replace
from functools import cache

from transformers import PreTrainedModel, PreTrainedTokenizerBase

from lib.activations.pair import Pair
from lib.activations.source import Block
from lib.analysis.diffing import findings
from lib.analysis.diffing.findings import Finding, Found, require_known
from lib.analysis.diffing.outputs import output_difference
from lib.analysis.diffing.streams import stream_difference
from lib.data.corpus import Corpus
from lib.models.unembed import unembedding

SIMPLE = ("answers", "amplified", "outputs", "topics", "streams", "positions")


def simple(
    methods: Iterable[str],
    a: PreTrainedModel,
    b: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    pair: Pair,
    held: Corpus,
    prompts: Sequence[str],
    *,
    alpha: float = 1.0,
    batch_rows: int = 64,
) -> dict[str, Found]:
    """Those of `SIMPLE`, which train nothing; models that are equal give empty findings.

    Args:
        pair: the activations of `held`.
        prompts: for the two that read answers.
        alpha: how much `amplified` amplifies.
        batch_rows: rows of `held` whose predictions are held at a time.

    Returns:
        Findings, with the seconds that each would take alone.

    Raises:
        ValueError: an unknown method.
    """
    require_known(methods := list(methods), SIMPLE)
    found: dict[str, Found] = {}
    vectors, passes = unembedding(b), {}

    @cache
    def outputs():
        return timed("outputs", lambda: output_difference(a, b, held, batch_rows=batch_rows))

    @cache
    def streams():
        if not pair.equal_width:
            raise ValueError(f"need sites of one width to take a difference, got {pair.site_dims}")
        return timed("streams", lambda: stream_difference(_two(pair)))

    def timed(name: str, work: Callable):
        began = time.perf_counter()
        done = work()
        passes[name] = time.perf_counter() - began
        return done

    ways = {
        "answers": lambda: findings.of_answers(tokenizer, a, b, prompts, held),
        "amplified": lambda: findings.of_answers(tokenizer, a, b, prompts, held, alpha=alpha),
        "outputs": lambda: findings.of_outputs(outputs(), held),
        "topics": lambda: findings.of_topics(outputs(), held),
        "streams": lambda: findings.of_streams(streams(), held, vectors),
        "positions": lambda: findings.of_positions(streams(), held, vectors),
    }
    shared = {"outputs": "outputs", "topics": "outputs", "streams": "streams"}
    shared["positions"] = "streams"
    for name in methods:
        if pair.identical and shared.get(name) == "streams":  # nothing to take apart
            found[name] = Found(Finding(method=name, access="activations"), 0.0)
            continue
        before, began = dict(passes), time.perf_counter()
        finding = ways[name]()
        seconds = time.perf_counter() - began
        if (source := shared.get(name)) in before:  # another method's pass over the data
            seconds += passes[source]
        found[name] = Found(finding, seconds)
    return found


def _two(pair: Pair) -> Iterator[Block]:
    for block in pair.blocks():
        yield replace(block, acts=block.acts[:, : sum(pair.site_dims[:2])])
