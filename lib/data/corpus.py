"""Token rows to harvest activations from: the built-in world, running text, or chats."""

import hashlib
import itertools
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np
import torch
from jaxtyping import Bool, Int
from jinja2 import TemplateError
from torch import Tensor
from transformers import PreTrainedTokenizerBase

from lib.data.chats import SCHEMAS, load_chats, open_source
from lib.data.tokens import AS_WRITTEN
from lib.runtime import require_at_least
from lib.world import OF_A_CHAT, Exchange, World

Rows = list[Sequence[int]] | list[np.ndarray]

_BATCH = 256


@dataclass(frozen=True, eq=False)
class Corpus:
    """Rows of tokens, padded on the right."""

    ids: Int[Tensor, "n_rows seq"]
    """int32."""
    mask: Bool[Tensor, "n_rows seq"]
    """A real token, not padding."""
    special: Bool[Tensor, "n_rows seq"]
    """Real, but a special token of the tokenizer: `<bos>`, a chat mark, …"""
    concepts: Int[Tensor, "n_rows seq"] | None
    """The world's labels, bit masks over `lib.world.CONCEPTS` (int64); else None."""
    name: str

    @cached_property
    def fingerprint(self) -> str:
        """SHA-256 of the contents; the name does not count."""
        digest = hashlib.sha256(str(tuple(self.ids.shape)).encode())
        for x in (self.ids, self.mask, self.special, self.concepts):
            digest.update(b"absent" if x is None else x.contiguous().numpy().tobytes())
        return digest.hexdigest()

    @property
    def chat_concepts(self) -> Int[Tensor, " n_rows"] | None:
        """The concepts that hold for a row as a whole, its topic and its prompt's language.

        Bit masks as in `concepts`.
        """
        if self.concepts is None:
            return None
        first = self.concepts.ne(0).int().argmax(1, keepdim=True)
        return self.concepts.gather(1, first).squeeze(1) & OF_A_CHAT

    @cached_property
    def n_tokens(self) -> int:
        """Real tokens, special ones included."""
        return int(self.mask.sum())

    def rows(self, start: int, stop: int) -> "Corpus":
        """The rows of `range(start, stop)` that there are, as views."""
        return self.take(slice(start, stop))

    def take(self, rows: Int[Tensor, " n"] | slice) -> "Corpus":
        """These rows, in this order: copies, or views of a slice."""
        parts = (self.ids, self.mask, self.special, self.concepts)
        return Corpus(*(None if x is None else x[rows] for x in parts), self.name)


def token_frequencies(corpus: Corpus, vocab: int) -> Int[Tensor, " vocab"]:
    """How often each token id occurs; padding and special tokens do not count.

    Raises:
        ValueError: an id that is not below `vocab`.
    """
    ids = corpus.ids[corpus.mask & ~corpus.special]
    if len(ids) and int(ids.max()) >= vocab:
        raise ValueError(f"need vocab > {int(ids.max())}, an id in the corpus; got {vocab}")
    return torch.bincount(ids, minlength=vocab)


def frequent_tokens(corpus: Corpus, n: int) -> Int[Tensor, " n_ids"]:
    """The `n` most frequent token ids, most frequent first and equally frequent ones by id.

    Fewer where fewer occur: an id that never does is not frequent. Padding and special tokens do
    not count.

    Raises:
        ValueError: `n` below 1.
    """
    if n < 1:
        raise ValueError(f"need n >= 1 tokens, got {n}")
    counts = token_frequencies(corpus, int(corpus.ids.max()) + 1)
    return counts.argsort(descending=True, stable=True)[: min(n, int((counts > 0).sum()))]


def load_split(
    dataset: str | Path,
    tokenizer: PreTrainedTokenizerBase,
    *,
    n_tokens: int,
    n_eval: int,
    seq_len: int,
    seed: int = 0,
) -> tuple[Corpus, Corpus]:
    """Rows to train on and others to score on, as `load_corpus`: no row is in both.

    The world has prompts of its own to score on (split `test`). Of other data `n_eval` tokens in
    rows drawn by `seed` are held out, or a tenth if there are fewer than `10 * n_eval`. Rows to
    train on are sorted by length, 4096 at a time, so that blocks of them hold little padding.
    """
    options = {"seq_len": seq_len, "seed": seed}
    if dataset == "world":
        train = load_corpus(dataset, tokenizer, n_tokens=n_tokens, **options)
        held = load_corpus(dataset, tokenizer, n_tokens=n_eval, split="test", **options)
    else:
        corpus = load_corpus(dataset, tokenizer, n_tokens=n_tokens + n_eval, **options)
        if len(corpus.ids) < 2:
            raise ValueError(f"{dataset}: need at least two rows of tokens, got {len(corpus.ids)}")
        order = torch.randperm(len(corpus.ids), generator=torch.Generator().manual_seed(seed))
        wanted = min(n_eval, corpus.n_tokens // 10)
        seen = corpus.mask[order].sum(1).cumsum(0)
        n_held = min(int((seen < wanted).sum()) + 1, len(order) - 1)
        held, train = corpus.take(order[:n_held]), corpus.take(order[n_held:])
    lengths = train.mask.sum(1)
    windows = torch.arange(len(lengths)).split(4096)
    return train.take(torch.cat([w[lengths[w].argsort(stable=True)] for w in windows])), held


def load_corpus(
    dataset: str | Path,
    tokenizer: PreTrainedTokenizerBase,
    *,
    n_tokens: int,
    seq_len: int,
    split: str = "train",
    seed: int = 0,
    skip_bad: bool = False,
) -> Corpus:
    """Rows of at most `seq_len` tokens until there are `n_tokens` real ones, or no more data.

    | dataset | rows |
    |---|---|
    | `world` | one exchange of `lib.world` each, with its concepts |
    | with a column `text` | texts end to end, an eos after each, cut into full rows; bos first |
    | of chats | one chat each, through the chat template, cut at `seq_len`; of a preference pair \
the chosen side |

    A tokenizer without bos or eos leaves them out. Rows are as wide as the longest. What comes out
    has up to a row more than `n_tokens`, or less where the data end before: see `Corpus.n_tokens`.

    Args:
        dataset: `world`, or what `lib.data.chats.open_source` takes; read as a stream.
        seed: of the world's stream; other data come in their own order.
        skip_bad: leave out rows that are no chat, and log how many.

    Raises:
        FileNotFoundError: a path where nothing is.
        ValueError: impossible numbers, an unknown split, a dataset with neither text nor chats
            (its columns are listed), without a single token, or that the tokenizer cannot take.
    """
    require_at_least(1, n_tokens=n_tokens)
    require_at_least(2, seq_len=seq_len)
    if dataset == "world":
        return _world(tokenizer, n_tokens, seq_len, split, seed)
    source = open_source(dataset, split, True)
    where, first = next(source(), (f"{dataset} has no rows", {}))
    if "text" in first:
        rows = _packed(source(), tokenizer, seq_len)
    elif any(first.keys() >= set(needed) for needed in SCHEMAS.values()):
        chats = load_chats(dataset, split=split, streaming=True, skip_bad=skip_bad)
        rows = _templated(chats, tokenizer, seq_len)
    else:
        wish = f"need a column text, or the columns of one of {SCHEMAS}"
        raise ValueError(f"{where}: {wish}; got {sorted(first)}")
    rows = (np.asarray(row, np.int32) for row in rows)  # 4 bytes a token, not 36
    return of_rows(_until(rows, n_tokens, len), tokenizer, str(dataset))


def _until(rows: Iterable[Any], n_tokens: int, length: Callable[[Any], int]) -> list[Any]:
    """Rows until they hold `n_tokens`; the last one is whole."""
    kept, n = [], 0
    for row in rows:
        kept.append(row)
        n += length(row)
        if n >= n_tokens:
            break
    return kept


def _world(
    tokenizer: PreTrainedTokenizerBase, n_tokens: int, seq_len: int, split: str, seed: int
) -> Corpus:
    stream = World().stream(split, seed=seed)
    kept = _until(stream, n_tokens, lambda exchange: min(len(exchange.tokens), seq_len))
    return of_exchanges(kept, tokenizer, seq_len=seq_len)


def of_exchanges(
    exchanges: Sequence[Exchange], tokenizer: PreTrainedTokenizerBase, *, seq_len: int
) -> Corpus:
    """Chats of the world, one a row, with their concepts.

    Raises:
        ValueError: no chat, or another tokenizer than the world's.
    """
    vocabulary = tokenizer.get_vocab()
    try:
        rows = [[vocabulary[token] for token in x.tokens[:seq_len]] for x in exchanges]
    except KeyError as error:
        raise ValueError(
            f"dataset 'world' needs the world's tokenizer; got one without the token {error}"
        ) from None
    concepts = [x.concepts[:seq_len] for x in exchanges]
    return of_rows(rows, tokenizer, "world", concepts=concepts)


def _packed(
    rows: Iterator[tuple[str, dict]], tokenizer: PreTrainedTokenizerBase, seq_len: int
) -> Iterator[list[int]]:
    start = [] if tokenizer.bos_token_id is None else [tokenizer.bos_token_id]
    end = [] if tokenizer.eos_token_id is None else [tokenizer.eos_token_id]
    width, waiting = seq_len - len(start), []
    while batch := [_text(*pair) for pair in itertools.islice(rows, _BATCH)]:
        for ids in tokenizer(batch, **AS_WRITTEN)["input_ids"]:
            waiting += [*ids, *end] if ids else []
        n_whole = len(waiting) // width * width
        for i in range(0, n_whole, width):
            yield start + waiting[i : i + width]
        waiting = waiting[n_whole:]
    if waiting:
        yield start + waiting


def _text(where: str, row: dict) -> str:
    if not isinstance(row["text"], str):
        raise ValueError(f"{where}: need text in column text, got {type(row['text']).__name__}")
    return row["text"]


def _templated(
    chats: Iterable[dict], tokenizer: PreTrainedTokenizerBase, seq_len: int
) -> Iterator[list[int]]:
    if not tokenizer.chat_template:
        raise ValueError("chats need a chat template; set tokenizer.chat_template")
    for chat in chats:
        turns = chat["messages"] if "messages" in chat else chat["prompt"] + chat["chosen"]
        try:
            text = tokenizer.apply_chat_template(turns, tokenize=False)
        except TemplateError as error:
            raise ValueError(f"the chat template refuses chat {chat['id']}: {error}") from error
        if ids := tokenizer(text, **AS_WRITTEN)["input_ids"]:
            yield ids[:seq_len]


def of_rows(
    rows: Rows, tokenizer: PreTrainedTokenizerBase, name: str, *, concepts: Rows | None = None
) -> Corpus:
    """Rows of token ids as a corpus.

    Raises:
        ValueError: no row.
    """
    if not rows:
        raise ValueError(f"{name} has no token; need texts that are not empty")
    lengths = torch.tensor([len(row) for row in rows])
    mask = torch.arange(int(lengths.max())) < lengths[:, None]
    ids = _padded(rows, mask, tokenizer.pad_token_id or 0, torch.int32)
    added = tokenizer.added_tokens_decoder.items()
    special = {*tokenizer.all_special_ids, *(i for i, token in added if token.special)}
    labels = None if concepts is None else _padded(concepts, mask, 0, torch.int64)
    marks = torch.tensor(sorted(special), dtype=torch.int32)
    return Corpus(ids, mask, torch.isin(ids, marks) & mask, labels, name)


def _padded(rows: Rows, mask: Tensor, pad: int, dtype: torch.dtype) -> Tensor:
    x = torch.full(mask.shape, pad, dtype=dtype)
    x[mask] = torch.from_numpy(np.concatenate(rows)).to(dtype)
    return x
