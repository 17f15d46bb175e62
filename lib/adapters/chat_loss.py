"""Next-token loss on what the assistant says, and batches of tokenised chats."""

import hashlib
import json
from collections.abc import Iterator, Mapping, Sequence
from functools import lru_cache
from typing import Any

import numpy as np
import torch
from jaxtyping import Float
from torch import Tensor, nn

from lib.data.tokens import IGNORED, collate
from lib.models.families import hugging_face
from lib.runtime import require_at_least

Row = Mapping[str, Any]
"""A tokenised chat: `input_ids`, `assistant_mask`, as from `lib.data.tokens.tokenize_chats`."""

_GROUP = 8  # batches that are sorted by length together, so that each holds little padding


class Chats:
    """Tokenised chats in memory, and which of them a step trains on.

    Batches are a function of the seed and the step: each chat once an epoch, chats of like length
    together.
    """

    def __init__(self, rows: Sequence[Row], pad_id: int, *, batch_size: int, seed: int = 0) -> None:
        """
        Raises:
            ValueError: no rows, fewer than a batch, a row without a token of the assistant, or a
                batch of none.
        """
        self.rows = [
            {name: [int(x) for x in row[name]] for name in ("input_ids", "assistant_mask")}
            for row in rows
        ]
        empty = [i for i, row in enumerate(self.rows) if not any(row["assistant_mask"][1:])]
        if not self.rows or empty:
            what = f"row {empty[0]} without" if empty else "no rows"
            raise ValueError(f"need chats with tokens of the assistant to learn, got {what}")
        require_at_least(1, batch_size=batch_size)
        if batch_size > len(self.rows):
            raise ValueError(f"need at least a batch of {batch_size} chats, got {len(self.rows)}")
        self.pad_id, self.batch_size, self.seed = pad_id, batch_size, seed
        self._epoch = lru_cache(maxsize=2)(self._shuffled)

    def __len__(self) -> int:
        return len(self.rows)

    @property
    def fingerprint(self) -> str:
        """SHA-256 of the chats."""
        return hashlib.sha256(json.dumps(self.rows).encode()).hexdigest()

    def chosen(self, step: int) -> list[int]:
        """Which of `rows` the batch of `step` holds."""
        per_epoch = len(self.rows) // self.batch_size
        return self._epoch(step // per_epoch)[step % per_epoch].tolist()

    def batch(self, step: int) -> dict[str, Tensor]:
        return collate([self.rows[i] for i in self.chosen(step)], self.pad_id)

    def all(self) -> Iterator[dict[str, Tensor]]:
        """Every chat once, in order."""
        for start in range(0, len(self.rows), self.batch_size):
            yield collate(self.rows[start : start + self.batch_size], self.pad_id)

    def _shuffled(self, epoch: int) -> list[np.ndarray]:
        rng = np.random.default_rng([self.seed, epoch])
        order, size = rng.permutation(len(self.rows)), self.batch_size
        lengths = np.array([len(row["input_ids"]) for row in self.rows])
        batches: list[np.ndarray] = []
        for start in range(0, len(order), size * _GROUP):
            group = order[start : start + size * _GROUP]
            group = group[lengths[group].argsort(kind="stable")]
            # of an incomplete batch, random chats are left out: not always the longest
            spare = len(group) % size
            group = np.delete(group, rng.choice(len(group), spare, replace=False))
            batches += list(group.reshape(-1, size))
        return [batches[i] for i in rng.permutation(len(batches))]


class ChatStream:
    """`accumulate` batches of chats for each step of a training; resumable, and without an end."""

    def __init__(self, chats: Chats, accumulate: int = 1) -> None:
        self.chats, self.accumulate, self.step = chats, accumulate, 0

    def __iter__(self) -> "ChatStream":
        return self

    def __next__(self) -> list[dict[str, Tensor]]:
        first = self.step * self.accumulate
        self.step += 1
        return [self.chats.batch(first + i) for i in range(self.accumulate)]

    def state_dict(self) -> dict[str, Tensor]:
        return {"step": torch.tensor(self.step)}

    def load_state_dict(self, state: dict[str, Tensor]) -> None:
        self.step = int(state["step"])


def assistant_loss(
    model: nn.Module, batch: Mapping[str, Tensor], hidden: list[Tensor] | None = None
) -> tuple[Float[Tensor, ""], int]:
    """Sum of nats over the labelled tokens, and how many they are.

    Only positions whose next token counts reach the unembedding, which in a small model with a
    large vocabulary is much of the cost.

    Args:
        hidden: to which the residual stream `[batch seq d]` before each block, and after the last
            block's norm, is appended.
    """
    device = hugging_face(model).get_input_embeddings().weight.device
    labels = batch["labels"][:, 1:]
    at = torch.zeros_like(batch["labels"], dtype=torch.bool)
    at[:, :-1] = labels != IGNORED
    head = hugging_face(model).get_output_embeddings()
    handle = head.register_forward_pre_hook(lambda _, args: (args[0][at.to(args[0].device)][None],))
    try:
        ids, mask = batch["input_ids"].to(device), batch["attention_mask"].to(device)
        wanted = {"use_cache": False, "output_hidden_states": hidden is not None}
        out = model(input_ids=ids, attention_mask=mask, **wanted)
    finally:
        handle.remove()
    if hidden is not None:
        hidden += out.hidden_states
    logits = out.logits[0]
    targets = labels[labels != IGNORED].to(logits.device)
    loss = nn.functional.cross_entropy(logits.float(), targets, reduction="sum")
    return loss, len(targets)


@torch.no_grad()
def held_out_loss(model: nn.Module, chats: Chats) -> float:
    """Nats per token of the assistant, over all chats."""
    sums = [assistant_loss(model, batch) for batch in chats.all()]
    return sum(loss.item() for loss, _ in sums) / sum(n for _, n in sums)
