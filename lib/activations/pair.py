"""Two models as one source: their difference as a site, two tokenizers, an adapter and its base."""

import contextlib
import hashlib
import itertools
import warnings
from collections.abc import Iterator, Sequence

import torch
from jaxtyping import Int
from torch import Tensor, nn
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from lib.activations.harvest import HarvestConfig, Harvester
from lib.activations.source import Block, Source
from lib.data.corpus import Corpus, of_rows
from lib.models.families import hugging_face
from lib.runtime import require_at_least


class WithoutAdapter(nn.Module):
    """A PEFT model's base: each call switches the adapter off. No weight is held twice."""

    def __init__(self, tuned: nn.Module) -> None:
        """
        Raises:
            ValueError: a model without an adapter to switch off.
        """
        super().__init__()
        if not callable(getattr(tuned, "disable_adapter", None)):
            raise ValueError(f"need a PEFT model, got {type(tuned).__name__}")
        self.tuned = tuned
        self.train(tuned.training)

    @property
    def device(self) -> torch.device:
        return hugging_face(self.tuned).device

    def forward(self, *args, **kwargs):
        with self._off():
            return self.tuned(*args, **kwargs)

    def generate(self, *args, **kwargs):
        with self._off():
            return self.tuned.generate(*args, **kwargs)

    @contextlib.contextmanager
    def _off(self) -> Iterator[None]:
        trainable = {p: p.requires_grad for p in self.tuned.parameters()}
        try:
            with self.tuned.disable_adapter():
                yield
        finally:  # peft makes an adapter trainable when it switches it on
            for parameter, before in trainable.items():
                parameter.requires_grad_(before)


class Pair:
    """A source of two models' activations at one site each, under names of their own.

    The columns of a, then of b; where both are as wide, then `b - a`. So that crosscoders, SAEs of
    one model and SAEs of the difference train on one stream: `fit(plans, Buffer(pair),
    sites=pair.sites)`. Models that are equal at every token of the first block are warned about.
    """

    A, B, DIFFERENCE = "a", "b", "b - a"

    def __init__(self, *sources: Source, keep: bool = False) -> None:
        """
        Args:
            sources: one of two sites, or one for each model, which must hold the same tokens.
            keep: hold every block in memory once it was read, for small models read many times.

        Raises:
            ValueError: another number of sites than two, sources with other numbers of blocks, or
                (also when a block is read) with other tokens.
        """
        dims = tuple(dim for source in sources for dim in source.site_dims)
        if len(dims) != 2:
            raise ValueError(f"need two sites, got {len(dims)}")
        if len({source.n_blocks for source in sources}) > 1:
            raise ValueError(
                f"need sources of the same tokens, got {[s.n_blocks for s in sources]} blocks"
            )
        self.sources, self.n_blocks = sources, sources[0].n_blocks
        self._kept: dict[int, Block] | None = {} if keep else None
        names, self.equal_width = (self.A, self.B), dims[0] == dims[1]
        if self.equal_width:
            names, dims = (*names, self.DIFFERENCE), (*dims, dims[0])
        self.hook_names, self.site_dims = names, dims
        first = self.block(0).acts
        self.identical = self.equal_width and not first[:, 2 * dims[0] :].any()
        if self.identical:
            warnings.warn(
                "the two models are equal at every token of the first block", stacklevel=2
            )

    @property
    def sites(self) -> dict[str, int]:
        return dict(zip(self.hook_names, self.site_dims, strict=True))

    @property
    def fingerprint(self) -> str:
        parts = " ".join(source.fingerprint for source in self.sources)
        return hashlib.sha256(f"pair {parts}".encode()).hexdigest()

    def columns(self, hook_names: Sequence[str]) -> list[slice]:
        """Where each of these sites stands in a block."""
        ends = dict(zip(self.hook_names, itertools.accumulate(self.site_dims), strict=True))
        return [slice(ends[name] - self.sites[name], ends[name]) for name in hook_names]

    def blocks(self) -> Iterator[Block]:
        return (self.block(i) for i in range(self.n_blocks))

    def block(self, i: int) -> Block:
        if self._kept is None:
            return self._block(i)
        if i not in self._kept:
            self._kept[i] = self._block(i)
        return self._kept[i]

    def _block(self, i: int) -> Block:
        blocks = [source.block(i) for source in self.sources]
        block, parts = blocks[0], [block.acts for block in blocks]
        for other in blocks[1:]:
            if not (
                torch.equal(other.rows, block.rows)
                and torch.equal(other.positions, block.positions)
                and torch.equal(other.ids, block.ids)
            ):
                raise ValueError(f"block {i}: need the same tokens of both models, got others")
        if len(parts) == 1 and self.equal_width:
            parts = list(parts[0].chunk(2, dim=1))
        if self.equal_width:
            parts.append(parts[1].to(parts[0]) - parts[0])
        acts = torch.cat([part.to(parts[0]) for part in parts], dim=1)
        return Block(acts, block.ids, block.rows, block.positions)


class AlignedHarvester:
    """A source of two models with tokenizers of their own, reading the same texts.

    A token of one model is paired with the token of the other that ends on the same character of
    the text; tokens without a partner are left out, as are special ones. Ids and positions of a
    block are those of the first model's tokens.

    Args:
        hook_names: a site for each model.
        seq_len: tokens after which either model's text is cut; None: never.
        batch_rows: texts in a forward pass, and in a block.

    Raises:
        ValueError: a tokenizer that does not say which characters a token stands for (a slow one),
            another number of models, or no two tokens that end together.
    """

    def __init__(
        self,
        models: Sequence[PreTrainedModel],
        tokenizers: Sequence[PreTrainedTokenizerBase],
        texts: Sequence[str],
        hook_names: Sequence[str],
        *,
        seq_len: int | None = None,
        batch_rows: int = 32,
        dtype: str = "float32",
    ) -> None:
        require_at_least(1, batch_rows=batch_rows)
        if not len(models) == len(tokenizers) == len(hook_names) == 2:
            raise ValueError("need two models, two tokenizers and two hook names")
        self.corpora, self._ends = zip(
            *(_tokenized(tokenizer, texts, seq_len) for tokenizer in tokenizers), strict=True
        )
        self._harvesters = [
            Harvester(
                [model],
                corpus,
                HarvestConfig(hook_names=(hook,), batch_rows=batch_rows, dtype=dtype),
            )
            for model, corpus, hook in zip(models, self.corpora, hook_names, strict=True)
        ]
        self.hook_names = tuple(hook_names)
        self.site_dims = tuple(h.site_dims[0] for h in self._harvesters)
        self.n_blocks = self._harvesters[0].n_blocks
        paired = sum(len(pair[0]) for pair in map(self._pairs, range(self.n_blocks)))
        if not paired:
            raise ValueError("need texts whose tokens end together somewhere, got none")
        self.share = paired / max(int((c.mask & ~c.special).sum()) for c in self.corpora)
        """Tokens of the longer text that have a partner."""

    @property
    def fingerprint(self) -> str:
        parts = " ".join(h.fingerprint for h in self._harvesters)
        return hashlib.sha256(f"aligned {parts}".encode()).hexdigest()

    def block(self, i: int) -> Block:
        a, b = (h.block(i) for h in self._harvesters)
        left, right = self._pairs(i)
        acts = torch.cat([a.acts[left], b.acts[right].to(a.acts)], dim=1)
        return Block(acts, a.ids[left], a.rows[left], a.positions[left])

    def _pairs(self, i: int) -> tuple[Int[Tensor, " n"], Int[Tensor, " n"]]:
        """Places in both models' block of tokens that end together."""
        keys = []
        for harvester, ends in zip(self._harvesters, self._ends, strict=True):
            keep = harvester.keep(i)
            start = i * harvester.config.batch_rows
            rows = torch.arange(start, start + len(keep))[:, None].expand_as(keep)
            keys.append(torch.stack([rows[keep], ends[start : start + len(keep)][keep]], 1))
        place = {tuple(key): j for j, key in enumerate(keys[1].tolist())}
        pairs = [
            (j, place[key]) for j, key in enumerate(map(tuple, keys[0].tolist())) if key in place
        ]
        left, right = zip(*pairs, strict=True) if pairs else ((), ())
        return torch.tensor(left, dtype=torch.long), torch.tensor(right, dtype=torch.long)


def paired(
    models: tuple[PreTrainedModel, PreTrainedModel],
    tokenizers: tuple[PreTrainedTokenizerBase, PreTrainedTokenizerBase],
    hook_names: tuple[str, str],
    corpus: Corpus,
    *,
    skip_special: bool = False,
    dtype: str = "float32",
    batch_rows: int = 256,
    keep: bool = False,
) -> tuple[Pair, Corpus]:
    """Two models on one corpus of a's tokenizer, and the corpus whose tokens the pair holds.

    Where b has a tokenizer of its own, both read the corpus's text again, without special tokens,
    and tokens are paired that end on the same character.

    Args:
        keep: as of `Pair`.
    """
    reading = {"batch_rows": batch_rows, "skip_special": skip_special, "dtype": dtype}
    if tokenizers[0].get_vocab() == tokenizers[1].get_vocab():
        sources = [
            Harvester([model], corpus, HarvestConfig(hook_names=(hook,), **reading))
            for model, hook in zip(models, hook_names, strict=True)
        ]
        return Pair(*sources, keep=keep), corpus
    rows = [ids[mask].tolist() for ids, mask in zip(corpus.ids, corpus.mask, strict=True)]
    texts = tokenizers[0].batch_decode(rows, skip_special_tokens=True)
    options = {"batch_rows": batch_rows, "dtype": dtype}  # of b as many tokens as the text has
    source = AlignedHarvester(models, tokenizers, texts, hook_names, **options)
    return Pair(source, keep=keep), source.corpora[0]


def _tokenized(
    tokenizer: PreTrainedTokenizerBase, texts: Sequence[str], seq_len: int | None
) -> tuple[Corpus, Int[Tensor, "n_rows seq"]]:
    """The texts as a corpus, a row each, and the character after each token's last one."""
    if not tokenizer.is_fast:
        raise ValueError(f"need a fast tokenizer, got {type(tokenizer).__name__}")
    cut = {"truncation": seq_len is not None, "max_length": seq_len}
    found = tokenizer(list(texts), **cut, return_offsets_mapping=True)
    corpus = of_rows(found["input_ids"], tokenizer, "texts")
    ends = torch.zeros(corpus.mask.shape, dtype=torch.long)
    ends[corpus.mask] = torch.tensor(
        [end for row in found["offset_mapping"] for _, end in row], dtype=torch.long
    )
    return corpus, ends
