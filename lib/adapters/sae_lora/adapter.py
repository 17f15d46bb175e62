"""SAE-LoRA: a low-rank adapter in the latent space of a dictionary.

At one site of a frozen model, with `acts = encode(x)` of a frozen dictionary,

    delta_acts = ((acts @ read_weights) * scale) @ write_weights

is what the adapter changes in the latents: each rank reads some latents and writes others. `add`
mode gives the activation `x + delta_acts @ W_dec`; `replace` mode gives
`decode(acts + delta_acts)`, and with the dictionary's error added back that is `add` mode again.

Columns of `read_weights` and rows of `write_weights` have norm 1, so that all of a rank's strength
is in `scale`; where latents are masked the weights are exactly zero. Weights off the support cost
nothing: the product is computed from active latents that are read, and the latents written are
folded into one direction a rank.
"""

import contextlib
import copy
from collections.abc import Iterator
from dataclasses import asdict, replace
from pathlib import Path

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor, nn

from lib.adapters.sae_lora import format
from lib.adapters.sae_lora.config import SaeLoraConfig
from lib.dictionaries import Dictionary
from lib.dictionaries.interop import from_sae_lens
from lib.dictionaries.rules import TopK
from lib.latents.source import require_width, site
from lib.models.bridge import is_bridge, name_in_bridge
from lib.models.sites import replace as replace_at
from lib.models.sites import site_dim
from lib.sparse import SparseActs, sparse_decode

_EPS = 1e-12


class SaeLora(nn.Module):
    """The adapter; its only parameters are `lora_A`, `lora_B` and `scale`.

    `scale` starts at 0, so a new adapter in `add` mode changes nothing, to the last bit. Random
    weights, by the config's seed. Gradients reach `x` past the dictionary, not through it: latents
    are constants.
    """

    def __init__(self, dictionary: Dictionary | nn.Module, config: SaeLoraConfig) -> None:
        """
        Args:
            dictionary: of one site; a sae-lens SAE is converted. It is frozen in place.

        Raises:
            ValueError: a dictionary of several sites or a transcoder; a hook name other than the
                dictionary's own, none in either, or `hook_z`; more latents to read or write than
                it has.
        """
        super().__init__()
        if not isinstance(dictionary, Dictionary):
            dictionary = from_sae_lens(dictionary)
        config.require_within(dictionary.d_sae)
        self.config = replace(config, hook_name=site(dictionary, config.hook_name))
        self.dictionary = dictionary.requires_grad_(False).eval()
        generator = torch.Generator().manual_seed(config.seed)
        shape, device = (config.rank, dictionary.d_sae), dictionary.W_dec.device
        reads, writes = (
            nn.functional.normalize(torch.randn(shape, generator=generator), dim=1).to(device)
            for _ in range(2)
        )
        self.lora_A, self.lora_B = nn.Parameter(reads), nn.Parameter(writes.T.contiguous())
        self.scale = nn.Parameter(torch.zeros(config.rank, device=device))
        self.register_buffer("read_mask", torch.ones(dictionary.d_sae, device=device))
        self.register_buffer("write_mask", torch.ones(dictionary.d_sae, device=device))

    @property
    def d_sae(self) -> int:
        return self.dictionary.d_sae

    @property
    def rank(self) -> int:
        return self.config.rank

    @property
    def read_weights(self) -> Float[Tensor, "d_sae r"]:
        """Effective: unit columns, exactly zero for latents that are not read."""
        return _unit(self.lora_A * self.read_mask).T

    @property
    def write_weights(self) -> Float[Tensor, "r d_sae"]:
        """Effective: unit rows, exactly zero for latents that are not written."""
        return _unit(self.lora_B.T * self.write_mask)

    @property
    def read_support(self) -> Int[Tensor, " n_read"]:
        """Latents that any rank reads, the largest weight (norm over ranks) first."""
        return _support(self.read_weights.detach())

    @property
    def write_support(self) -> Int[Tensor, " n_write"]:
        """Latents that any rank writes, the largest weight (norm over ranks) first."""
        return _support(self.write_weights.detach().T)

    @property
    def write_directions(self) -> Float[Tensor, "r d_model"]:
        """What one unit of each rank adds to the activation."""
        weights = self.write_weights
        if torch.is_grad_enabled():
            return weights @ self.dictionary.W_dec
        written = weights.abs().sum(0).nonzero().flatten()
        return weights[:, written] @ self.dictionary.W_dec[written]

    def hidden(self, acts: SparseActs) -> Float[Tensor, "n r"]:
        """How strongly each rank fires: `(acts @ read_weights) * scale`."""
        return sparse_decode(acts, self.read_weights.contiguous()) * self.scale

    def latent_delta(self, acts: SparseActs) -> Float[Tensor, "n d_sae"]:
        """What the adapter adds to the latents; dense, so for looking rather than for running."""
        return self.hidden(acts) @ self.write_weights

    def delta(self, x: Float[Tensor, "*batch d"]) -> Float[Tensor, "*batch d"]:
        """What is added to the activation in `add` mode: float32, or the dictionary's dtype."""
        flat = x.reshape(-1, x.shape[-1])
        return (self.hidden(self._acts(flat)) @ self.write_directions).view(x.shape)

    def forward(self, x: Float[Tensor, "*batch d"]) -> Float[Tensor, "*batch d"]:
        """The adapted activation, in the dtype of `x`."""
        if self.config.mode == "add" or self.config.keep_error:
            return (x + self.delta(x)).to(x)
        flat = x.reshape(-1, x.shape[-1])
        acts = self.dictionary.encode_sparse(flat)
        x_hat = self.dictionary.decode(acts)
        return (x_hat + self.hidden(acts) @ self.write_directions).view(x.shape).to(x)

    @contextlib.contextmanager
    def attached(self, model: nn.Module) -> Iterator[None]:
        """Adapt `model` while the context is open: a Hugging Face model or a TransformerBridge
        (TransformerLens's, or sae-lens's, which is one). The model itself is not changed.

        Raises:
            ValueError: the site has another width, or the model no such site; on a bridge, at
                `hook_resid_mid`, or at a site where sae-lens has attached a SAE.
        """
        bridge, hook_name = is_bridge(model), self.config.hook_name
        width = model.cfg.d_model if bridge else site_dim(model, hook_name)
        require_width(self.dictionary, hook_name, width)
        if bridge:
            edit = (name_in_bridge(model, hook_name), lambda x, hook: self(x))
            attached = model.hooks(fwd_hooks=[edit])
        else:
            attached = replace_at(model, hook_name, self)
        with attached:
            yield

    @torch.no_grad()
    def restricted(
        self,
        *,
        read: Bool[Tensor, " d_sae"] | None = None,
        write: Bool[Tensor, " d_sae"] | None = None,
    ) -> "SaeLora":
        """A copy that reads and writes only these of the latents, each as strongly as before.

        The dictionary is shared.
        """
        other = copy.deepcopy(self, {id(self.dictionary): self.dictionary})
        if read is not None:
            other.read_mask *= read
        if write is not None:
            other.write_mask *= write
        reads = (self.read_weights * other.read_mask[:, None]).norm(dim=0)
        writes = (self.write_weights * other.write_mask).norm(dim=1)
        other.scale *= reads * writes  # unit norms are restored; their loss goes to the scale
        return other

    def save(self, folder: str | Path, metadata: dict | None = None) -> Path:
        """Write `params.safetensors` and `metadata.json`, both or neither.

        Only weights of latents on the support are stored, before they are divided by their norm,
        so that what is loaded gives the same numbers to the last bit. `metadata` is anything of
        JSON: data, seed, metrics.

        Raises:
            ValueError: `folder` is a file or holds other files, or `metadata` has a field that
                the adapter writes itself.
        """
        read, write = self.read_support.sort().values, self.write_support.sort().values
        tensors = {
            "read": read,
            "write": write,
            "lora_A": self.lora_A.detach()[:, read],
            "lora_B": self.lora_B.detach()[write],
            "scale": self.scale.detach(),
        }
        about = {"d_sae": self.d_sae, "config": asdict(self.config)}
        return format.write(Path(folder), tensors, about, metadata or {})

    @classmethod
    @torch.no_grad()
    def load(cls, folder: str | Path, dictionary: Dictionary | nn.Module) -> "SaeLora":
        """An adapter that `save` wrote, on the dictionary that it was trained with.

        Raises:
            FileNotFoundError: a file is missing.
            ValueError: damaged files, another kind of adapter, or a dictionary of another size.
        """
        d_sae, config, tensors = format.read(Path(folder))
        adapter = cls(dictionary, config)
        if d_sae != adapter.d_sae:
            raise ValueError(
                f"need the dictionary of {d_sae} latents that {folder} was trained on, "
                f"got one of {adapter.d_sae}"
            )
        for weights, mask, kept in (
            (adapter.lora_A, adapter.read_mask, tensors["read"]),
            (adapter.lora_B.T, adapter.write_mask, tensors["write"]),
        ):
            weights.zero_()
            mask.zero_()[kept] = 1.0
        adapter.lora_A[:, tensors["read"]] = tensors["lora_A"].to(adapter.lora_A)
        adapter.lora_B[tensors["write"]] = tensors["lora_B"].to(adapter.lora_B)
        adapter.scale.copy_(tensors["scale"])
        return adapter

    def _acts(self, x: Float[Tensor, "n d"]) -> SparseActs:
        """Active latents, of a narrow support only those that are read.

        TopK must see every latent to know which are active, and so must training; under the other
        rules each latent is decided on its own, and few of them cost little.
        """
        if torch.is_grad_enabled() or isinstance(self.dictionary.config.rule, TopK):
            return self.dictionary.encode_sparse(x)
        read = self.read_weights.any(dim=1).nonzero().flatten()
        if not 0 < len(read) <= self.d_sae // 4:
            return self.dictionary.encode_sparse(x)
        few = self.dictionary.narrowed(read).encode_sparse(x)
        return SparseActs(read[few.indices], few.values, few.offsets, self.d_sae)


def _unit(rows: Float[Tensor, "r d_sae"]) -> Float[Tensor, "r d_sae"]:
    return rows / rows.norm(dim=1, keepdim=True).clamp(min=_EPS)


def _support(weights: Float[Tensor, "d_sae r"]) -> Int[Tensor, " n"]:
    norms = weights.norm(dim=1)
    return norms.argsort(descending=True, stable=True)[: int((norms > 0).sum())]
