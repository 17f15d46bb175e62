"""Mix chat datasets by weight, and split them by prompt."""

from collections import defaultdict
from collections.abc import Mapping, Sequence

import numpy as np
from datasets import Dataset, DatasetDict, concatenate_datasets


def mix(
    parts: Sequence[Dataset], weights: Sequence[float], *, n: int | None = None, seed: int = 0
) -> Dataset:
    """Draw rows from each part in proportion to its weight, to within one row and without repeats,
    and shuffle them; `n` rows, or as many as the scarcest part allows. Where parts share an id, the
    later part's gets `+<part number>` after it.

    Raises:
        ValueError: not one positive weight for each part, chats mixed with preferences, or a part
            with too few rows.
    """
    if len(parts) != len(weights) or not all(0 < weight < np.inf for weight in weights):
        raise ValueError(f"need a positive weight for each of {len(parts)} parts, got {weights}")
    if len({tuple({"messages", "chosen"} & {*part.column_names}) for part in parts}) != 1:
        raise ValueError("need parts that are all chats or all preferences; others cannot be mixed")
    ends = np.cumsum([0.0, *weights]) / sum(weights)
    sizes = np.array([len(part) for part in parts])
    n = int((sizes / np.diff(ends)).min() + 1e-9) if n is None else n
    counts = np.diff(np.floor(ends * n + 1e-6)).astype(int)  # of a sum of n, whatever is rounded
    if n < 1 or (counts > sizes).any():
        raise ValueError(f"cannot mix {n} rows: need {counts} of the parts, which have {sizes}")
    rng, ids = np.random.default_rng(seed), {}
    drawn = [p.select(rng.permutation(len(p))[:c]) for p, c in zip(parts, counts, strict=True)]
    for number, part in enumerate(drawn):
        for name in part["id"]:
            while name in ids:
                name += f"+{number}"
            ids[name] = None
    rows = concatenate_datasets(drawn)
    if [*ids] != rows["id"][:]:
        rows = rows.remove_columns("id").add_column("id", [*ids]).select_columns(rows.column_names)
    return rows.select(rng.permutation(n))


def split_by_prompt(
    chats: Dataset, fractions: Mapping[str, float], *, stratify_by: str | None = None, seed: int = 0
) -> DatasetDict:
    """Split so that rows with the same prompt (the last user turn) stay together. Sizes are off by
    less than one prompt's rows, and rows keep their order.

    Args:
        fractions: share of the rows for each split; they sum to 1.
        stratify_by: a column, such as `topic`, whose values get the same shares in each split;
            a prompt that has several values counts as the one of its first row.

    Raises:
        ValueError: fractions that are not positive or do not sum to 1, no such column, or so few
            prompts that a split stays empty.
    """
    shares = np.array([*fractions.values()])
    if not (shares > 0).all() or abs(shares.sum() - 1) > 1e-6:
        raise ValueError(f"need positive fractions that sum to 1, got {dict(fractions)}")
    if stratify_by is not None and stratify_by not in chats.column_names:
        raise ValueError(f"no column {stratify_by!r} to stratify by, got {chats.column_names}")
    groups, strata = defaultdict(list), defaultdict(list)
    for index, prompt in enumerate(chats["prompt"]):
        groups[prompt if isinstance(prompt, str) else prompt[-1]["content"]].append(index)
    values = chats[stratify_by][:] if stratify_by else [None] * len(chats)
    for rows in groups.values():
        strata[values[rows[0]]].append(rows)
    rng, taken = np.random.default_rng(seed), {name: [] for name in fractions}
    owed = np.zeros(len(shares))  # rows; carried on, so that small strata do not all round alike
    for stratum in sorted(strata, key=str):
        members = [strata[stratum][i] for i in rng.permutation(len(strata[stratum]))]
        owed += shares * sum(map(len, members))
        for rows in sorted(members, key=len, reverse=True):
            poorest = int(owed.argmax())
            taken[[*fractions][poorest]] += rows
            owed[poorest] -= len(rows)
    if empty := [name for name, rows in taken.items() if not rows]:
        raise ValueError(f"{len(groups)} prompts are too few: nothing for {', '.join(empty)}")
    return DatasetDict({name: chats.select(sorted(rows)) for name, rows in taken.items()})
