"""What an SAE-LoRA reads, or writes, as a `LatentSource`."""

import contextlib
from collections.abc import Iterator, Mapping

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor, nn

from lib.adapters.sae_lora.adapter import SaeLora
from lib.latents.source import Edit, acts_at, moved, require_latents, require_width
from lib.models.sites import read, replace, require_eval, site_dim
from lib.sparse import SparseActs

SIDES = ("read", "write")


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
            ValueError: another side; a model that `DictionarySource` refuses.
        """
        if side not in SIDES:
            raise ValueError(f"need a side in {SIDES}, got {side!r}")
        self.hook_name = adapter.config.hook_name
        require_width(adapter.dictionary, self.hook_name, site_dim(model, self.hook_name))
        require_eval(model)
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
            acts_at(self.model, self.hook_name, tokens, mask)
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
                return moved(x, self._values(plain[site])[..., chosen], edits, directions)

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
