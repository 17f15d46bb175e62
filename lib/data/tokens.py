"""Chats to tokens, with a mask of what the model itself must produce.

Templates say it with `{% generation %}` blocks. One without them is exchanged for TRL's training
twin, where TRL has one. Of any other, each answer is what the text has from the generation prompt
to the end of its turn. Tokens are compared with characters by their offsets, never with tokens of
the prompt alone: a tokenizer may merge over the border.
"""

import re
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from datasets import Dataset, Features, IterableDataset, List, Value
from jinja2 import TemplateError
from torch import Tensor
from torch.nn.utils.rnn import pad_sequence
from transformers import PreTrainedTokenizerBase
from transformers.utils.chat_template_utils import render_jinja_template
from trl.chat_template_utils import get_training_chat_template

from lib.data.chats import write_dataset
from lib.runtime import require_at_least

Message = Mapping[str, str]
Span = tuple[int, int]

IGNORED = -100
"""The label that a loss leaves out."""
AS_WRITTEN = {"add_special_tokens": False, "return_attention_mask": False, "verbose": False}
"""For a tokenizer: the text has its special tokens already."""


@dataclass
class Truncation:
    """What a maximum length cost; filled while the chats go by."""

    n_chats: int = 0
    """Chats seen."""
    n_tokens: int = 0
    """Their tokens before any cut."""
    n_chats_cut: int = 0
    """Chats longer than the limit."""
    n_tokens_cut: int = 0
    """Tokens beyond the limit."""
    n_assistant_tokens_cut: int = 0
    """Those of them that the model would have had to produce."""
    n_dropped: int = 0
    """Chats left without any token to produce, and so left out."""

    def __str__(self) -> str:
        return (
            f"cut {self.n_chats_cut} of {self.n_chats} chats, {self.n_tokens_cut} of "
            f"{self.n_tokens} tokens ({self.n_assistant_tokens_cut} of assistants); "
            f"dropped {self.n_dropped} chats left without an assistant token"
        )

    def count(self, mask: np.ndarray, max_len: int) -> bool:
        """Add one chat; whether anything to produce is left of it."""
        n_cut, kept = max(0, len(mask) - max_len), bool(mask[:max_len].any())
        self.n_chats += 1
        self.n_tokens += len(mask)
        self.n_chats_cut += n_cut > 0
        self.n_tokens_cut += n_cut
        self.n_assistant_tokens_cut += int(mask[max_len:].sum())
        self.n_dropped += not kept
        return kept


def tokenize_chats(
    chats: Dataset | IterableDataset, tokenizer: PreTrainedTokenizerBase, *, max_len: int
) -> tuple[Dataset | IterableDataset, Truncation]:
    """`input_ids` and `assistant_mask` of each chat, cut on the right to `max_len` tokens.

    The mask is 1 on tokens with a character of an answer or of the end of turn after it, so also
    on one that merges the border, and 0 on everything else, such as the line break after an end of
    turn. A `Dataset` gives a memory-mapped `Dataset`; a stream gives a stream. `id`, `topic` and
    `source` are kept.

    Returns:
        The tokenised chats, and what was cut. Of a stream, that is what was cut in the pass that
        is under way or came last, in this process: workers of a `DataLoader` count for themselves.

    Raises:
        ValueError: a tokenizer without chat template or without offsets, `max_len` below 1, rows
            without `messages`; a chat that the template refuses, or, where the template has no
            `{% generation %}` and TRL no twin of it, whose answers it rewrites. The message names
            the chat.
    """
    require_at_least(1, max_len=max_len)
    if not tokenizer.is_fast:
        raise ValueError(f"{type(tokenizer).__name__} gives no character offsets; need a fast one")
    if not tokenizer.chat_template:
        raise ValueError("the tokenizer has no chat template; set tokenizer.chat_template")
    columns = chats.column_names or []
    if "messages" not in columns:
        raise ValueError(f"need a column messages, got {columns}")
    carried = [name for name in ("id", "topic", "source") if name in columns]
    lists = {"input_ids": List(Value("int32")), "assistant_mask": List(Value("int8"))}
    features = Features(dict.fromkeys(carried, Value("string")) | lists)
    template, truncation = _marked_template(tokenizer), Truncation()

    def rows() -> Iterator[dict[str, Any]]:
        vars(truncation).update(vars(Truncation()))  # each pass counts from zero
        for number, row in enumerate(chats.select_columns([*carried, "messages"]), start=1):
            name = row.get("id") or f"in row {number}"
            text, spans = _render(row.pop("messages"), name, template, tokenizer)
            ids, mask = _encode(text, spans, tokenizer)
            if truncation.count(mask, max_len):
                yield row | {"input_ids": ids[:max_len], "assistant_mask": mask[:max_len]}

    if isinstance(chats, IterableDataset):
        return IterableDataset.from_generator(rows, features=features), truncation
    return write_dataset(rows(), features, "tokenized"), truncation


def collate(rows: Sequence[Mapping[str, Any]], pad_id: int) -> dict[str, Tensor]:
    """Pad tokenised chats on the right: `input_ids`, `attention_mask`, `labels`, each `[n seq]`.

    Labels are the ids where the assistant mask is 1, `IGNORED` elsewhere. Attention follows from
    lengths, not from ids, so `pad_id` may well be the end of turn's.
    """
    ids = [torch.as_tensor(row["input_ids"], dtype=torch.long) for row in rows]
    masks = [torch.as_tensor(row["assistant_mask"], dtype=torch.bool) for row in rows]
    labels = [x.masked_fill(~mask, IGNORED) for x, mask in zip(ids, masks, strict=True)]
    return {
        "input_ids": pad_sequence(ids, batch_first=True, padding_value=pad_id),
        "attention_mask": pad_sequence([torch.ones_like(x) for x in ids], batch_first=True),
        "labels": pad_sequence(labels, batch_first=True, padding_value=IGNORED),
    }


def _marked_template(tokenizer: PreTrainedTokenizerBase) -> str | None:
    """One with `{% generation %}`: the tokenizer's or TRL's twin of it, if there is either."""
    template = tokenizer.get_chat_template()
    if re.search(r"\{%-?\s*generation\s*-?%\}", template):
        return template
    try:
        return get_training_chat_template(tokenizer)
    except ValueError:  # TRL knows no twin
        return None


def _render(
    chat: Sequence[Message], name: str, template: str | None, tokenizer: PreTrainedTokenizerBase
) -> tuple[str, list[Span]]:
    """The chat's text, and where in it stands what the assistant must produce."""
    if not chat or chat[-1]["role"] != "assistant":
        raise ValueError(f"chat {name}: need an assistant turn at the end")
    try:
        if template is None:
            return _find(chat, name, tokenizer)
        # Not `apply_chat_template`: after a block that ends in a trimmed space, its mask runs on.
        options = {"chat_template": template, "return_assistant_tokens_mask": True}
        texts, spans = render_jinja_template([chat], **options, **tokenizer.special_tokens_map)
    except TemplateError as error:
        raise ValueError(f"the chat template refuses chat {name}: {error}") from error
    return texts[0], spans[0]


def _find(
    chat: Sequence[Message], name: str, tokenizer: PreTrainedTokenizerBase
) -> tuple[str, list[Span]]:
    """As `_render`, by the texts of the chat up to an answer and through it."""

    def apply(turns: Sequence[Message], **options: bool) -> str:
        return tokenizer.apply_chat_template(turns, tokenize=False, **options)

    text, spans = apply(chat), []
    for i, turn in enumerate(chat):
        if turn["role"] != "assistant":
            continue
        before, through = apply(chat[:i], add_generation_prompt=True), apply(chat[: i + 1])
        answer = through.removeprefix(before).lstrip()
        if not (text.startswith(through) and answer.startswith(turn["content"].strip())):
            raise ValueError(
                f"chat {name}, turn {i + 1}: cannot tell which text is the assistant's, because "
                "the chat template rewrites it; mark it with {% generation %} in the template"
            )
        spans.append((len(before), len(through)))
    return text, spans


def _encode(
    text: str, spans: list[Span], tokenizer: PreTrainedTokenizerBase
) -> tuple[list[int], np.ndarray]:
    encoded = tokenizer(text, return_offsets_mapping=True, **AS_WRITTEN)
    starts, ends = np.asarray(encoded["offset_mapping"], dtype=np.int64).reshape(-1, 2).T.copy()
    before = np.maximum.accumulate(np.concatenate(([0], ends)))[:-1]
    # Byte-level tokenizers may trim spaces off offsets, a token of spaces down to nothing.
    starts = np.where(starts == ends, np.minimum(starts, before), starts)
    mask = np.zeros(len(starts), dtype=np.int8)
    for start, end in spans:
        mask[(starts < len(text[:end].rstrip())) & (ends > start)] = 1
    return encoded["input_ids"], mask
