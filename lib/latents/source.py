"""Who can say which latents fire on a token, and can change them while a model runs.

A dictionary at a site, and what an SAE-LoRA reads or writes there, look the same from above: the
browser, the analyses and steering take a `LatentSource` and do not ask which it is.
"""

import contextlib
from collections.abc import Callable, Collection, Iterator, Mapping
from contextlib import AbstractContextManager
from typing import Protocol, runtime_checkable

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor, nn

from lib.activations.backends import hf
from lib.data.corpus import Corpus
from lib.dictionaries import Dictionary, SparseActs
from lib.latents.record import LatentRecord, Part, assemble
from lib.models.families import hugging_face
from lib.models.sites import replace, require_eval, site_dim
from lib.runtime import require_at_least

Edit = Callable[[Float[Tensor, " n"]], Float[Tensor, " n"]]
"""From a latent's values at all tokens of a forward pass, row by row, to its new values."""


@runtime_checkable
class LatentSource(Protocol):
    """Latents at one site of a model."""

    n_latents: int
    hook_name: str
    model: nn.Module
    """In eval mode."""

    @property
    def write_directions(self) -> Float[Tensor, "n_latents d_model"]:
        """What one unit of each latent adds to the residual stream."""

    def latents(
        self, tokens: Int[Tensor, "batch seq"], mask: Bool[Tensor, "batch seq"]
    ) -> SparseActs:
        """The latents of every real token, row by row of the batch; no edit is open.

        Args:
            mask: the real tokens, special ones included; the others are padding.
        """

    def edited(self, edits: Mapping[int, Edit]) -> AbstractContextManager[None]:
        """While open, forward passes of the model run with these latents changed."""


class DictionarySource:
    """The latents of a dictionary at its site.

    An edit adds `Σ_j (edit_j(z_j) − z_j) · W_dec[j]` to the activation, so what the dictionary
    misses stays, and a token whose values stay is left as it is to the last bit.
    """

    def __init__(self, model: nn.Module, dictionary: Dictionary, hook_name: str = "") -> None:
        """
        Args:
            hook_name: the site; needed where the dictionary does not name its own.

        Raises:
            ValueError: a dictionary of several sites, a transcoder, no hook name or another than
                the dictionary's, a site that the model does not have, that has another width or
                that is `hook_z`; a model in training mode.
        """
        self.hook_name = site(dictionary, hook_name)
        require_width(dictionary, self.hook_name, site_dim(model, self.hook_name))
        require_eval(model)
        self.model, self.dictionary = model, dictionary
        self.n_latents = dictionary.d_sae

    @property
    def write_directions(self) -> Float[Tensor, "n_latents d_model"]:
        """Rows of the decoder."""
        return self.dictionary.W_dec.detach()

    @torch.no_grad()
    def latents(
        self, tokens: Int[Tensor, "batch seq"], mask: Bool[Tensor, "batch seq"]
    ) -> SparseActs:
        """See `LatentSource`. Raises ValueError for a model in training mode."""
        return self.dictionary.encode_sparse(acts_at(self.model, self.hook_name, tokens, mask))

    @contextlib.contextmanager
    def edited(self, edits: Mapping[int, Edit]) -> Iterator[None]:
        """See `LatentSource`; works in generation with a cache.

        Raises:
            ValueError: a latent that there is not, a model in training mode; in the forward pass,
                an edit that gave another number of values.
        """
        require_latents(edits, self.n_latents)
        require_eval(self.model)
        chosen = list(edits)
        directions = self.dictionary.W_dec[chosen]

        def edit(x: Tensor) -> Tensor:
            return moved(x, self.dictionary.encode(x)[..., chosen], edits, directions)

        with replace(self.model, self.hook_name, edit) if edits else contextlib.nullcontext():
            yield


def require_latents(latents: Collection[int], n_latents: int) -> None:
    """Raises ValueError for latents that are not in 0 to `n_latents - 1`."""
    bad = [latent for latent in latents if not 0 <= latent < n_latents]
    if bad:
        raise ValueError(f"need latents in 0 to {n_latents - 1}, got {bad}")


def acts_at(
    model: nn.Module, hook_name: str, tokens: Int[Tensor, "batch seq"], mask: Tensor
) -> Float[Tensor, "n d"]:
    """Activations of the real tokens; the model stops at the site."""
    require_eval(model)
    device = hugging_face(model).device
    x = hf(model, [hook_name])(tokens.to(device), mask.to(device))[hook_name]
    return x[mask.to(x.device)]


def moved(
    x: Float[Tensor, "batch seq d"],
    values: Float[Tensor, "batch seq chosen"],
    edits: Mapping[int, Edit],
    directions: Float[Tensor, "chosen d"],
) -> Float[Tensor, "batch seq d"]:
    """`x` plus each latent's change along its direction, in at least the dictionary's precision.

    Only tokens with a change are touched: adding zeros would lose the sign of a zero.
    """
    changes = []
    for (latent, edit), old in zip(edits.items(), values.flatten(0, 1).T, strict=True):
        new = edit(old.clone())  # an edit in place must not hide its own change
        if new.shape != old.shape:
            raise ValueError(
                f"latent {latent}: need {len(old)} values from the edit, got {tuple(new.shape)}"
            )
        changes.append(new.to(old) - old)
    change = torch.stack(changes, dim=1)
    delta = (change @ directions).view_as(x).to(x.device)
    changed = (change != 0).any(1).view(*x.shape[:2], 1).to(x.device)
    return torch.where(changed, x + delta, x)


def site(dictionary: Dictionary, hook_name: str) -> str:
    """`hook_name`, or the dictionary's own: the one site, where its latents can be edited."""
    config = dictionary.config
    if len(config.site_dims) != 1:
        raise ValueError(f"need a dictionary of one site, got one of {len(config.site_dims)}")
    if config.out_dims is not None:
        raise ValueError(
            "need a dictionary that reconstructs its input, got a transcoder with "
            f"out_dims {config.out_dims}"
        )
    own = config.hook_names[0] if config.hook_names else ""
    if own and hook_name and own != hook_name:
        raise ValueError(f"need the dictionary's own hook name {own!r}, got {hook_name!r}")
    name = hook_name or own
    if not name:
        raise ValueError("need a hook_name: the dictionary does not name its own")
    if "hook_z" in name:
        raise ValueError(
            f"need a site whose latents add to the residual stream, got {name!r}: "
            "attention's output projection comes between"
        )
    return name


def require_width(dictionary: Dictionary, hook_name: str, width: int) -> None:
    """Raises ValueError where the site of a model has another width than the dictionary."""
    if dictionary.d_in != width:
        raise ValueError(
            f"need a dictionary of width {width} at {hook_name}, got {dictionary.d_in}"
        )


@torch.no_grad()
def record_of(
    source: LatentSource, corpus: Corpus, *, batch_rows: int = 64, skip_special: bool = True
) -> LatentRecord:
    """The latents of `source` over `corpus`, on the CPU.

    Args:
        batch_rows: rows of the corpus in a forward pass; memory grows with it.
        skip_special: leave special tokens out, as harvesting does; the model reads them.

    Raises:
        ValueError: `batch_rows` below 1; a token id that the model does not have; no token to
            record; a model in training mode.
    """
    require_at_least(1, batch_rows=batch_rows)
    n_ids = hugging_face(source.model).get_input_embeddings().num_embeddings
    largest = int(corpus.ids.max())
    if largest >= n_ids:
        raise ValueError(
            f"the model has {n_ids} token ids, but the corpus holds id {largest}; "
            "need the model's own tokenizer"
        )
    starts = range(0, len(corpus.ids), batch_rows)
    parts = (_part(source, corpus, start, start + batch_rows, skip_special) for start in starts)
    return assemble(parts, corpus)


def _part(source: LatentSource, corpus: Corpus, start: int, stop: int, skip_special: bool) -> Part:
    """The latents of some rows of `corpus`."""
    rows = corpus.rows(start, stop)
    width = int(rows.mask.any(0).sum())  # no need to run columns of padding
    mask = rows.mask[:, :width]
    acts = source.latents(rows.ids[:, :width].long(), mask)
    kept = ~rows.special[:, :width][mask] if skip_special else mask[mask]
    at, positions = (x[kept] for x in mask.nonzero(as_tuple=True))
    acts = acts.tokens(kept.to(acts.offsets.device))
    return Part(acts, rows.ids[at, positions], at + start, positions)
