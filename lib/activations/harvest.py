"""Activations straight from models: one pass over the corpus for each, up to the highest site."""

import hashlib
import json
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from functools import cached_property

import torch
from jaxtyping import Bool, Float
from torch import Tensor, nn

from lib.activations import backends
from lib.activations.source import Block
from lib.data.corpus import Corpus
from lib.models.families import hugging_face
from lib.models.load import weights_fingerprint
from lib.models.sites import split_head, width_at
from lib.runtime import require_at_least, resolve_dtype

BACKENDS = {
    "hf": backends.hf,
    "nnsight": backends.nnsight,
    "transformer_lens": backends.transformer_lens,
}


@dataclass(frozen=True, kw_only=True)
class HarvestConfig:
    """What to read, from which tokens."""

    hook_names: tuple[str, ...]
    """Sites, the same in every model. `blocks.2.attn.hook_z` is all heads side by side,
    `blocks.2.attn.hook_z.3` head 3 alone."""
    batch_rows: int = 32
    """Rows of the corpus in a forward pass, and in a block."""
    backend: str = "hf"
    """`hf`, `nnsight` or `transformer_lens`."""
    dtype: str = "float32"
    """Of the activations handed on: float32, bfloat16 or float16; models keep their own."""
    skip_special: bool = True
    """Leave special tokens out; the first token of a row has outlier activations in most models."""
    max_norm: float | None = None
    """Leave out tokens whose norm at any site is over so many times the median of the first block
    there; None leaves out none."""

    def __post_init__(self) -> None:
        if not self.hook_names:
            raise ValueError("need at least one hook name, got none")
        if len(set(self.hook_names)) < len(self.hook_names):
            raise ValueError(f"need each hook name once, got {self.hook_names}")
        require_at_least(1, batch_rows=self.batch_rows)
        if self.backend not in BACKENDS:
            raise ValueError(f"need backend in {sorted(BACKENDS)}, got {self.backend!r}")
        if self.max_norm is not None and self.max_norm <= 0:
            raise ValueError(f"need max_norm > 0 or None, got {self.max_norm}")
        resolve_dtype(self.dtype)


class Harvester:
    """A source whose block `i` is a forward pass of rows `i * batch_rows` and following.

    Several models must share the corpus's tokenizer; every model reads the same tokens, and a
    token left out because of one model's norm is left out for all.

    Raises:
        ValueError: no model, one in training mode or with fewer token ids than the corpus needs;
            a hook name that a model does not have (near ones are listed), or a head. With
            `max_norm`: no token in the corpus to fix it on.
    """

    def __init__(self, models: Sequence[nn.Module], corpus: Corpus, config: HarvestConfig) -> None:
        if not models:
            raise ValueError("need at least one model, got none")
        self.models, self.corpus, self.config = models, corpus, config
        self.n_blocks = -(-len(corpus.ids) // config.batch_rows)
        self.hook_names = config.hook_names * len(models)
        self.site_dims = tuple(width_at(m, name) for m in models for name in config.hook_names)
        for i, model in enumerate(models):
            _check_model(model, corpus, f"model {i}")
        names = list(dict.fromkeys(split_head(name)[0] for name in config.hook_names))
        self._forwards = [BACKENDS[config.backend](model, names) for model in models]
        self._limits = self._norm_limits()

    @cached_property
    def fingerprint(self) -> str:
        """SHA-256 of weights, corpus and config."""
        made_by = [weights_fingerprint(model) for model in self.models]
        made_by += [self.corpus.fingerprint, asdict(self.config)]
        return hashlib.sha256(json.dumps(made_by).encode()).hexdigest()

    def block(self, i: int) -> Block:
        keep, parts = self._harvest(i)
        positions = keep.nonzero()
        rows = positions[:, 0] + i * self.config.batch_rows
        acts = torch.cat(parts, dim=1) if len(parts) > 1 else parts[0]  # of one, cat is a copy
        acts = acts.to(resolve_dtype(self.config.dtype))
        return Block(acts, self.corpus.ids[rows, positions[:, 1]], rows, positions[:, 1])

    def keep(self, i: int) -> Bool[Tensor, "rows seq"]:
        """The tokens of block `i` that are not left out, in its rows of the corpus."""
        return self._candidates(i) if self._limits is None else self._harvest(i)[0]

    def _candidates(self, i: int) -> Bool[Tensor, "rows seq"]:
        """`keep` before norms are looked at."""
        if not 0 <= i < self.n_blocks:
            raise ValueError(f"need a block in 0 to {self.n_blocks - 1}, got {i}")
        rows = self._rows(i)
        return rows.mask & ~rows.special if self.config.skip_special else rows.mask.clone()

    def _rows(self, i: int) -> Corpus:
        return self.corpus.rows(i * self.config.batch_rows, (i + 1) * self.config.batch_rows)

    def _harvest(self, i: int) -> tuple[Bool[Tensor, "rows seq"], list[Float[Tensor, "n _"]]]:
        """The tokens kept of block `i`, and their activations at each site, in model dtype."""
        keep = self._candidates(i)
        parts = self._acts(i, keep)
        if self._limits is not None:
            norms = torch.stack([part.float().norm(dim=1) for part in parts])
            usual = (norms <= self._limits[:, None]).all(dim=0)
            keep[keep.clone()] = usual.cpu()
            parts = [part[usual] for part in parts]
        return keep, parts

    def _acts(self, i: int, keep: Bool[Tensor, "rows seq"]) -> list[Float[Tensor, "n _"]]:
        rows = self._rows(i)
        width = int(rows.mask.any(dim=0).sum())  # no need to run columns of padding
        kept = keep[:, :width].flatten().nonzero()[:, 0]  # by number: faster to take than by mask
        home, parts = _device(self.models[0]), []
        for model, forward in zip(self.models, self._forwards, strict=True):
            device = _device(model)
            chosen = kept.to(device)
            acts = forward(rows.ids[:, :width].long().to(device), rows.mask[:, :width].to(device))
            for name in self.config.hook_names:
                site, head = split_head(name)
                x = acts[site] if head is None else acts[site][:, :, head]
                tokens = x.flatten(2).flatten(0, 1)
                parts.append(tokens.index_select(0, chosen.to(x.device)).to(home))
        return parts

    def _norm_limits(self) -> Float[Tensor, " n_sites"] | None:
        """`max_norm` times the median norm of each site, in the first block with a token."""
        if self.config.max_norm is None:
            return None
        for i in range(self.n_blocks):
            keep = self._candidates(i)
            if keep.any():
                norms = [part.float().norm(dim=1) for part in self._acts(i, keep)]
                return self.config.max_norm * torch.stack(norms).median(dim=1).values
        raise ValueError("max_norm: need a token that is not left out, got a corpus without")


def _check_model(model: nn.Module, corpus: Corpus, which: str) -> None:
    if model.training:
        raise ValueError(f"{which} is in training mode, where dropout acts; call model.eval()")
    n_ids = hugging_face(model).get_input_embeddings().num_embeddings
    largest = int(corpus.ids.max())
    if largest >= n_ids:
        raise ValueError(
            f"{which} has {n_ids} token ids, but the corpus holds id {largest}; "
            "need the model's own tokenizer"
        )


def _device(model: nn.Module) -> torch.device:
    return hugging_face(model).get_input_embeddings().weight.device
