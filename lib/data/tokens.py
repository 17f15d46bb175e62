"""Chats to tokens, with a mask of what the model itself must produce.

The mask covers the content of every assistant turn and the end of turn right after it. It is found
in the rendered *text*, never by comparing token prefixes (a tokenizer may merge over the border):
each chat is rendered twice by its template, plain and with marks around the assistant contents. If
the second, marks removed, is the first to the letter, the marks stood at the right characters
whatever the template says; if not, the template strips or cuts the content, and marks move inward
until they agree. `{% generation %}` blocks are rendered like any other: what they enclose differs
between templates (some count the newline after the end of turn), and transformers finds their
place wrongly inside a macro, so they are not relied on.
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
from transformers import PreTrainedTokenizerBase

from lib.data.chats import write_dataset

Message = Mapping[str, str]
Span = tuple[int, int]

IGNORED = -100
"""The label that a loss leaves out."""

_BATCH = 256
_TAG = re.compile(r"<[^<>\s]{1,40}>|\[/?[A-Z_]{2,40}\]")
"""What templates cut an answer at, such as `</think>`."""


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


def tokenize_chats(
    chats: Dataset | IterableDataset, tokenizer: PreTrainedTokenizerBase, *, max_len: int
) -> tuple[Dataset | IterableDataset, Truncation]:
    """`input_ids` and `assistant_mask` of each chat, cut on the right to `max_len` tokens.

    The mask is 1 on tokens with a character of an assistant's content or of the end of turn after
    it, so also on one that merges the border; whitespace that a template puts between the two has
    to be produced to get to the end and counts. The mask is 0 on everything else, and on a turn
    that the template leaves out. A `Dataset` gives a memory-mapped `Dataset`; a stream gives a
    stream. `id`, `topic` and `source` are kept.

    Returns:
        The tokenised chats, and what was cut. Of a stream, that is what was cut in the pass that
        is under way or came last, in this process: workers of a `DataLoader` count for themselves.

    Raises:
        ValueError: a tokenizer without chat template or without offsets, `max_len` below 1, rows
            without `messages`; a chat that the template refuses, or whose content it rewrites
            past recognition. The message names the chat.
    """
    if max_len < 1:
        raise ValueError(f"need max_len >= 1, got {max_len}")
    if not tokenizer.is_fast:
        raise ValueError(f"{type(tokenizer).__name__} gives no character offsets; need a fast one")
    if not tokenizer.chat_template:
        raise ValueError("the tokenizer has no chat template; set tokenizer.chat_template")
    columns = chats.column_names or []
    if "messages" not in columns:
        raise ValueError(f"need a column messages, got {columns}")
    carried = [name for name in ("id", "topic", "source") if name in columns]
    features = Features(
        {name: Value("string") for name in carried}
        | {"input_ids": List(Value("int32")), "assistant_mask": List(Value("int8"))}
    )
    truncation = Truncation()

    def rows() -> Iterator[dict[str, Any]]:
        vars(truncation).update(vars(Truncation()))  # each pass counts from zero
        for batch in chats.select_columns([*carried, "messages"]).iter(_BATCH):
            first = truncation.n_chats + 1
            n = len(batch["messages"])
            names = batch.get("id") or [f"in row {first + i}" for i in range(n)]
            texts, spans = _render(batch["messages"], names, tokenizer)
            for index, (ids, mask) in enumerate(_encode(texts, spans, tokenizer)):
                if _count(mask, max_len, truncation):
                    kept = {name: batch[name][index] for name in carried}
                    yield kept | {"input_ids": ids[:max_len], "assistant_mask": mask[:max_len]}

    if isinstance(chats, IterableDataset):
        return IterableDataset.from_generator(rows, features=features), truncation
    return write_dataset(rows(), features, "tokenized"), truncation


def collate(rows: Sequence[Mapping[str, Any]], pad_id: int) -> dict[str, Tensor]:
    """Pad tokenised chats on the right: `input_ids`, `attention_mask`, `labels`, each `[n seq]`.

    Labels are the ids where the assistant mask is 1, `IGNORED` elsewhere. Attention follows from
    lengths, not from ids, so `pad_id` may well be the end of turn's.
    """
    if not rows:
        raise ValueError("need at least one row to collate")
    shape = (len(rows), max(len(row["input_ids"]) for row in rows))
    input_ids = torch.full(shape, pad_id)
    attention_mask = torch.zeros(shape, dtype=torch.long)
    labels = torch.full(shape, IGNORED)
    for i, row in enumerate(rows):
        ids = torch.as_tensor(row["input_ids"], dtype=torch.long)
        mask = torch.as_tensor(row["assistant_mask"], dtype=torch.bool)
        input_ids[i, : len(ids)] = ids
        attention_mask[i, : len(ids)] = 1
        labels[i, : len(ids)] = ids.masked_fill(~mask, IGNORED)
    return {"input_ids": input_ids, "attention_mask": attention_mask, "labels": labels}


def _count(mask: np.ndarray, max_len: int, truncation: Truncation) -> bool:
    """Add one chat to the counts; whether anything to produce is left of it."""
    n_cut = max(0, len(mask) - max_len)
    kept = bool(mask[:max_len].any())
    truncation.n_chats += 1
    truncation.n_tokens += len(mask)
    truncation.n_chats_cut += n_cut > 0
    truncation.n_tokens_cut += n_cut
    truncation.n_assistant_tokens_cut += int(mask[max_len:].sum())
    truncation.n_dropped += not kept
    return kept


def _encode(
    texts: list[str], spans: list[list[Span]], tokenizer: PreTrainedTokenizerBase
) -> Iterator[tuple[list[int], np.ndarray]]:
    encoded = tokenizer(
        texts,
        add_special_tokens=False,  # the template has written them
        return_offsets_mapping=True,
        return_attention_mask=False,
        verbose=False,
    )
    for ids, offsets, wanted in zip(
        encoded["input_ids"], encoded["offset_mapping"], spans, strict=True
    ):
        starts, ends = np.asarray(offsets, dtype=np.int64).reshape(-1, 2).T.copy()
        before = np.maximum.accumulate(np.concatenate(([0], ends)))[:-1]
        # Byte-level tokenizers may trim spaces off offsets, a token of spaces down to nothing.
        starts = np.where(starts == ends, np.minimum(starts, before), starts)
        mask = np.zeros(len(ids), dtype=np.int8)
        for start, end in wanted:
            mask[(starts < end) & (ends > start)] = 1
        yield ids, mask


def _render(
    chats: Sequence[Sequence[Message]], names: Sequence[str], tokenizer: PreTrainedTokenizerBase
) -> tuple[list[str], list[list[Span]]]:
    """Each chat's text, and where in it stands what the assistant must produce."""
    texts = _apply(chats, names, tokenizer)
    used = set().union(*texts)
    opening, closing = [c for c in map(chr, range(0xE000, 0xF900)) if c not in used][:2]
    marked = _apply(
        [[_replace(turn, opening + turn["content"] + closing) for turn in chat] for chat in chats],
        names,
        tokenizer,
    )
    ending = _ending(tokenizer)
    spans = []
    for chat, name, text, with_marks in zip(chats, names, texts, marked, strict=True):
        turns = [i for i, turn in enumerate(chat) if turn["role"] == "assistant"]
        if not turns or turns[-1] != len(chat) - 1:
            raise ValueError(f"chat {name}: need an assistant turn at the end")
        contents = _between(with_marks, text, opening, closing, len(turns))
        if contents is None:
            contents = [_search(chat, turn, name, text, opening, tokenizer) for turn in turns]
        spans.append(_with_ends(text, contents, ending))
    return texts, spans


def _apply(
    chats: Sequence[Sequence[Message]], names: Sequence[str], tokenizer: PreTrainedTokenizerBase
) -> list[str]:
    try:
        return tokenizer.apply_chat_template(list(chats), tokenize=False)
    except TemplateError as error:
        if len(chats) == 1:
            raise ValueError(f"the chat template refuses chat {names[0]}: {error}") from error
    return [_apply([chat], [name], tokenizer)[0] for chat, name in zip(chats, names, strict=False)]


def _replace(turn: Message, content: str) -> dict[str, str]:
    return {**turn, "content": content} if turn["role"] == "assistant" else dict(turn)


def _between(marked: str, text: str, opening: str, closing: str, n: int) -> list[Span] | None:
    """Spans between marks, or None unless the marks changed nothing and all came through."""
    pieces = re.split(f"([{opening}{closing}])", marked)
    if pieces[1::2] != [opening, closing] * n or "".join(pieces[::2]) != text:
        return None
    places = np.cumsum([len(piece) for piece in pieces[:-1:2]]).tolist()
    return list(zip(places[::2], places[1::2], strict=True))


def _search(
    chat: Sequence[Message],
    turn: int,
    name: str,
    text: str,
    mark: str,
    tokenizer: PreTrainedTokenizerBase,
) -> Span | None:
    """Where the part of one content that the template keeps stands; None if it keeps nothing."""

    def place(content: str) -> int | None:
        trial = [_replace(t, content) if i == turn else t for i, t in enumerate(chat)]
        (marked,) = _apply([trial], [name], tokenizer)
        at = marked.find(mark)
        return at if marked.replace(mark, "", 1) == text and at >= 0 else None

    content = chat[turn]["content"]
    alone = [_replace(t, mark) if i == turn else t for i, t in enumerate(chat)]
    if mark not in _apply([alone], [name], tokenizer)[0]:
        return None
    outcomes = []
    for cuts in (_starts(content), _stops(content)):
        tried = ((cut, place(content[:cut] + mark + content[cut:])) for cut in cuts)
        outcomes.append(next(((cut, at) for cut, at in tried if at is not None), None))
    if None in outcomes:
        raise ValueError(
            f"chat {name}, turn {turn + 1}: cannot tell which text is the assistant's, because the "
            f"chat template rewrites it; need a template that keeps the content or a part of it"
        )
    (head, start), (tail, end) = outcomes
    # A template may take `<think>` off and put it back.
    head, tail = content[:head].lstrip(), content[tail:].rstrip()
    start -= len(head) * text[:start].endswith(head)
    end += len(tail) * text[end:].startswith(tail)
    return start, end


def _starts(content: str) -> Iterator[int]:
    """Where what is kept may begin: first, after each tag, and after any spaces there."""
    for begin in (0, *(tag.end() for tag in _TAG.finditer(content))):
        yield from range(begin, len(content) - len(content[begin:].lstrip()) + 1)


def _stops(content: str) -> Iterator[int]:
    """Where what is kept may stop: last, before each tag, and before any spaces there."""
    for end in (len(content), *(tag.start() for tag in reversed([*_TAG.finditer(content)]))):
        yield from range(end, len(content[:end].rstrip()) - 1, -1)


def _ending(tokenizer: PreTrainedTokenizerBase) -> re.Pattern[str]:
    """An added token, or else the rest of the line, and any spaces before it."""
    added = {token.content for token in tokenizer.added_tokens_decoder.values()}
    tokens = sorted((re.escape(t) for t in added if t.strip()), key=len, reverse=True)
    return re.compile(rf"\s*(?:{'|'.join(tokens) or '(?!)'})|\s*\S(?:[^\n]*\S)?")


def _with_ends(text: str, contents: list[Span | None], ending: re.Pattern[str]) -> list[Span]:
    """Add to each content the end of turn, which is what the last one is followed by."""
    last = contents[-1]
    found = ending.match(text, last[1]) if last else None
    end_of_turn = found.group() if found else ""
    return [
        (start, end + len(end_of_turn) * text.startswith(end_of_turn, end))
        for start, end in filter(None, contents)
    ]
