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
from lib.adapters.sae_lora.adapter import SaeLora
from lib.dictionaries import Dictionary, SparseActs
from lib.models.families import hugging_face
from lib.models.modes import require_eval
from lib.models.sites import read, replace, site_dim

Edit = Callable[[Float[Tensor, " n"]], Float[Tensor, " n"]]
"""From a latent's values at all tokens of a forward pass, row by row, to its new values."""

SIDES = ("read", "write")


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
        self.hook_name = _site(model, dictionary, hook_name)
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
        return self.dictionary.encode_sparse(_acts_at(self.model, self.hook_name, tokens, mask))

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
            return _moved(x, self.dictionary.encode(x)[..., chosen], edits, directions)

        with replace(self.model, self.hook_name, edit) if edits else contextlib.nullcontext():
            yield


class SaeLoraSource:
    """What an SAE-LoRA reads, or what it writes; latents keep the dictionary's numbers.

    | side | a latent's value | `write_directions` |
    |---|---|---|
    | `read` | `z_j` where a read weight is not zero, else silent | `Σ_r Â_jr s_r (B̂_r W_dec)` |
    | `write` | `Δz_j`, which may be negative | `W_dec[j]` |

    Values are those of the plain model's activations: it comes without the adapter, which
    `edited` attaches. An edit on the read side changes the `z_j` that the adapter reads, and no
    other; on the write side it changes `Δz_j`. A read latent without weight moves nothing.
    """

    def __init__(self, model: nn.Module, adapter: SaeLora, side: str) -> None:
        """
        Args:
            model: without the adapter attached.
            side: `read` or `write`.

        Raises:
            ValueError: another side; what `DictionarySource` refuses.
        """
        if side not in SIDES:
            raise ValueError(f"need a side in {SIDES}, got {side!r}")
        self.hook_name = _site(model, adapter.dictionary, adapter.config.hook_name)
        self.model, self.adapter, self.side = model, adapter, side
        self.n_latents = adapter.d_sae

    @property
    def write_directions(self) -> Float[Tensor, "n_latents d_model"]:
        """See the table; computed anew for the adapter's weights of now."""
        return self._directions(slice(None)).detach()

    @torch.no_grad()
    def latents(
        self, tokens: Int[Tensor, "batch seq"], mask: Bool[Tensor, "batch seq"]
    ) -> SparseActs:
        """See `LatentSource`. Raises ValueError for a model in training mode."""
        acts = self.adapter.dictionary.encode_sparse(
            _acts_at(self.model, self.hook_name, tokens, mask)
        )
        if self.side == "read":
            return acts.where(self._reads()[acts.indices])
        return SparseActs.of(self.adapter.latent_delta(acts))

    @contextlib.contextmanager
    def edited(self, edits: Mapping[int, Edit]) -> Iterator[None]:
        """The model with the adapter attached and these latents changed; none is the adapter alone.

        Raises:
            ValueError: as `DictionarySource.edited`.
        """
        require_latents(edits, self.n_latents)
        require_eval(self.model)
        chosen, site = list(edits), self.hook_name
        directions = self._directions(chosen)
        with read(self.model, [site]) as plain, self.adapter.attached(self.model):

            def edit(x: Tensor) -> Tensor:  # x is what the adapter made of plain[site]
                return _moved(x, self._values(plain[site])[..., chosen], edits, directions)

            with replace(self.model, site, edit) if edits else contextlib.nullcontext():
                yield

    def _values(self, x: Float[Tensor, "batch seq d"]) -> Float[Tensor, "batch seq d_sae"]:
        """Every latent's value at the plain activation."""
        acts = self.adapter.dictionary.encode(x)
        if self.side == "read":
            return acts * self._reads()
        return self.adapter.latent_delta(SparseActs.of(acts.flatten(0, 1))).view_as(acts)

    def _reads(self) -> Bool[Tensor, " d_sae"]:
        return (self.adapter.read_weights != 0).any(1)

    def _directions(self, latents: list[int] | slice) -> Float[Tensor, "n d"]:
        a = self.adapter
        if self.side == "write":
            return a.dictionary.W_dec[latents]
        return (a.read_weights[latents] * a.scale) @ a.write_directions


def require_latents(latents: Collection[int], n_latents: int) -> None:
    """Raises ValueError for latents that are not in 0 to `n_latents - 1`."""
    bad = [latent for latent in latents if not 0 <= latent < n_latents]
    if bad:
        raise ValueError(f"need latents in 0 to {n_latents - 1}, got {bad}")


def _acts_at(
    model: nn.Module, hook_name: str, tokens: Int[Tensor, "batch seq"], mask: Tensor
) -> Float[Tensor, "n d"]:
    """Activations of the real tokens; the model stops at the site."""
    require_eval(model)
    device = hugging_face(model).device
    x = hf(model, [hook_name])(tokens.to(device), mask.to(device))[hook_name]
    return x[mask.to(x.device)]


def _moved(
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


def _site(model: nn.Module, dictionary: Dictionary, hook_name: str) -> str:
    """The hook name of a dictionary that can be edited in `model`."""
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
    width = site_dim(model, name)
    if dictionary.d_in != width:
        raise ValueError(f"need a dictionary of width {width} at {name}, got {dictionary.d_in}")
    require_eval(model)
    return name
