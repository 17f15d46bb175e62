"""Mix chat datasets by weight, and split them by prompt."""

import math
from collections import defaultdict
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
from datasets import Dataset, DatasetDict, concatenate_datasets


def mix(
    parts: Sequence[Dataset], weights: Sequence[float], *, n: int | None = None, seed: int = 0
) -> Dataset:
    """Draw rows from each part in proportion to its weight, without repeats, and shuffle them.

    Counts are exact: each part's share of `n`, the remainders to the largest fractions. Where
    parts share an id, the later part's row gets `+<part number>` after it.

    Args:
        n: rows in all; None takes as many as the scarcest part allows.

    Raises:
        ValueError: weights that are not positive numbers, one for each part; chats mixed with
            preferences, or with rows without messages; a part with too few rows (the message
            says how many are missing).
    """
    if not parts or len(parts) != len(weights):
        raise ValueError(f"need a weight for each part, got {len(parts)} parts, {len(weights)}")
    if not all(math.isfinite(weight) and weight > 0 for weight in weights):
        raise ValueError(f"need positive weights, got {list(weights)}")
    if len({"chosen" in part.column_names for part in parts}) > 1:
        raise ValueError("chats and preferences cannot be mixed")
    if len({"messages" in part.column_names for part in parts}) > 1:
        raise ValueError("need messages in every part or in none; read them all with load_chats")
    shares = np.asarray(weights, dtype=float) / sum(weights)
    if n is None:
        n = int(min(math.floor(len(p) / s + 1e-9) for p, s in zip(parts, shares, strict=True)))
    if n < 1:
        raise ValueError(f"need n >= 1 rows, got {n}")
    counts = _largest_remainder(shares, n)
    short = [
        f"part {i} has {len(part)} rows, {count - len(part)} too few for its {count}"
        for i, (part, count) in enumerate(zip(parts, counts, strict=True))
        if count > len(part)
    ]
    if short:
        raise ValueError(f"cannot mix {n} rows without repeats: {'; '.join(short)}")
    rng = np.random.default_rng(seed)
    drawn = [
        part.select(rng.permutation(len(part))[:count])
        for part, count in zip(parts, counts, strict=True)
    ]
    mixed = _ids_apart(drawn)
    return mixed.select(rng.permutation(len(mixed)))


def _largest_remainder(shares: np.ndarray, n: int) -> list[int]:
    exact = shares * n
    counts = np.floor(exact + 1e-9).astype(int)
    for index in np.argsort(-(exact - counts), kind="stable")[: n - counts.sum()]:
        counts[index] += 1
    return counts.tolist()


def _ids_apart(parts: list[Dataset]) -> Dataset:
    seen: set[str] = set()
    ids: list[str] = []
    for number, part in enumerate(parts):
        for name in part["id"]:
            while name in seen:
                name += f"+{number}"
            seen.add(name)
            ids.append(name)
    together = concatenate_datasets(parts)
    if ids == list(together["id"]):
        return together
    order = together.column_names
    return together.remove_columns("id").add_column("id", ids).select_columns(order)


def split_by_prompt(
    chats: Dataset, fractions: Mapping[str, float], *, stratify_by: str | None = None, seed: int = 0
) -> DatasetDict:
    """Split so that rows with the same prompt (the last user turn) stay together.

    Args:
        fractions: share of the rows for each split; they sum to 1.
        stratify_by: a column, such as `topic`, whose values get the same shares in each split;
            a prompt that has several values counts as the one of its first row.

    Returns:
        Splits whose sizes are off by less than one prompt's rows, in the input's order.

    Raises:
        ValueError: fractions that are not positive or do not sum to 1, no such column, or so few
            prompts that a split stays empty.
    """
    if not fractions or min(fractions.values()) <= 0 or abs(sum(fractions.values()) - 1) > 1e-6:
        raise ValueError(f"need positive fractions that sum to 1, got {dict(fractions)}")
    if stratify_by is not None and stratify_by not in chats.column_names:
        raise ValueError(f"no column {stratify_by!r} to stratify by, got {chats.column_names}")
    groups: defaultdict[str, list[int]] = defaultdict(list)
    for index, prompt in enumerate(chats["prompt"]):
        groups[prompt if isinstance(prompt, str) else prompt[-1]["content"]].append(index)
    values = list(chats[stratify_by]) if stratify_by else [None] * len(chats)
    strata: defaultdict[Any, list[list[int]]] = defaultdict(list)
    for rows in groups.values():
        strata[values[rows[0]]].append(rows)
    rng = np.random.default_rng(seed)
    shares = np.array(list(fractions.values()))
    taken: list[list[int]] = [[] for _ in fractions]
    owed = np.zeros(len(fractions))  # rows; carried on, so that small strata do not all round alike
    for stratum in sorted(strata, key=str):
        members = [strata[stratum][i] for i in rng.permutation(len(strata[stratum]))]
        owed += shares * sum(map(len, members))
        for rows in sorted(members, key=len, reverse=True):
            poorest = int(owed.argmax())
            taken[poorest] += rows
            owed[poorest] -= len(rows)
    if empty := [name for name, rows in zip(fractions, taken, strict=True) if not rows]:
        raise ValueError(f"{len(groups)} prompts are too few: nothing for {', '.join(empty)}")
    return DatasetDict(
        {name: chats.select(sorted(rows)) for name, rows in zip(fractions, taken, strict=True)}
    )
