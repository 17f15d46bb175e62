"""The one dictionary module: every rule, any number of sites, SAE or transcoder.

Its input is the concatenation of its sites' activations, so a crosscoder is a dictionary with
several sites. `pre = (x - b_dec) @ W_enc + b_enc`, `acts = rule(pre)`, `x_hat = acts @ W_dec +
b_dec`.
"""

import copy
import math
from dataclasses import replace
from pathlib import Path

import torch
from jaxtyping import Float, Int
from torch import Tensor, nn

from lib.dictionaries.config import DictionaryConfig
from lib.dictionaries.kernels import SparseActs, active_pre_acts, sparse_decode
from lib.dictionaries.memory import Memory, rows_in_cache
from lib.dictionaries.search import Search, tokens_at_once
from lib.dictionaries.selection import dots_of_rows
from lib.dictionaries.sparsity import BatchTopK, Gated, JumpReLU, TopK

Acts = SparseActs | Float[Tensor, "n d_sae"]


class Dictionary(nn.Module):
    """A sparse dictionary. Rows of `encoder` and `W_dec` belong to latents.

    Random unit rows, encoder equal to decoder, biases 0; torch's seed decides them.
    """

    def __init__(self, config: DictionaryConfig) -> None:
        super().__init__()
        self.config = config
        rows = torch.randn(config.d_sae, config.d_out)
        self.W_dec = nn.Parameter(rows / rows.norm(dim=1, keepdim=True))
        if config.tied:
            self.encoder = None
        elif config.d_in == config.d_out:
            self.encoder = nn.Parameter(self.W_dec.detach().clone())
        else:
            start = torch.randn(config.d_sae, config.d_in) / math.sqrt(config.d_in)
            self.encoder = nn.Parameter(start)
        self.b_enc = nn.Parameter(torch.zeros(config.d_sae))
        self.b_dec = nn.Parameter(torch.zeros(config.d_out))
        config.rule.init(self)

    @property
    def d_in(self) -> int:
        return self.config.d_in

    @property
    def d_out(self) -> int:
        return self.config.d_out

    @property
    def d_sae(self) -> int:
        return self.config.d_sae

    @property
    def W_enc(self) -> Float[Tensor, "d_in d_sae"]:
        return self.encoder_rows.T

    @property
    def encoder_rows(self) -> Float[Tensor, "d_sae d_in"]:
        return self.W_dec if self.encoder is None else self.encoder

    @property
    def b_in(self) -> Float[Tensor, "d_in"]:
        """What is subtracted from the input."""
        applied = self.config.apply_b_dec_to_input
        return self.b_dec if applied else self.b_dec.new_zeros(self.d_in)

    def code_norms(self) -> Float[Tensor, "d_sae"]:
        """See `DictionaryConfig.code_norm`."""
        kind, dims = self.config.code_norm, self.config.out_dims or self.config.site_dims
        single = len(dims) == 1 or kind == "decoder"
        if kind == "none" or (single and self.config.unit_norm_decoder):
            return self.W_dec.new_ones(self.d_sae)
        parts = (self.W_dec,) if kind == "decoder" else self.W_dec.split(dims, dim=1)
        return torch.stack([part.norm(dim=1) for part in parts]).sum(0)

    def pre_acts(self, x: Float[Tensor, "n d_in"]) -> Float[Tensor, "n d_sae"]:
        """`(x - b_dec) @ W_enc + b_enc`: a Gated dictionary's gate, every other rule's input."""
        if self.config.apply_b_dec_to_input:
            x = x - self.b_dec
        return torch.addmm(self.b_enc, x, self.W_enc)

    def encode(self, x: Float[Tensor, "*batch d_in"]) -> Float[Tensor, "*batch d_sae"]:
        """Latents of every activation, each on its own.

        Raises:
            ValueError: `x` has another width.
        """
        flat = self._flat(x)
        return self.config.rule.acts(self.pre_acts(flat), self).reshape(*x.shape[:-1], self.d_sae)

    @torch.no_grad()
    def encode_sparse(self, x: Float[Tensor, "n d_in"]) -> SparseActs:
        """The non-zero latents of `encode`, as pairs."""
        x, rule = self._flat(x), self.config.rule
        if isinstance(rule, TopK):
            with Search(self, x) as scan:
                active = rule.select(self, len(x), scan)
            return active.with_values(active.values.relu()).nonzero()
        blocks = x.split(tokens_at_once(x, self.d_sae))
        return SparseActs.joined([SparseActs.of(rule.acts(self.pre_acts(b), self)) for b in blocks])

    def decode(self, acts: Float[Tensor, "*batch d_sae"]) -> Float[Tensor, "*batch d_out"]:
        return acts @ self.W_dec + self.b_dec

    def decode_sparse(
        self, acts: SparseActs, memory: Memory | None = None
    ) -> Float[Tensor, "n d_out"]:
        return sparse_decode(acts.values, acts, self.W_dec, memory) + self.b_dec

    def forward(self, x: Float[Tensor, "*batch d_in"]) -> Float[Tensor, "*batch d_out"]:
        """The reconstruction."""
        return self.decode(self.encode(x))

    def training_acts(
        self, x: Float[Tensor, "n d_in"], *, whole: bool = False, memory: Memory | None = None
    ) -> tuple[Acts, Float[Tensor, "n"] | None, Float[Tensor, "n d_sae"] | None]:
        """Latents as they are trained, what the rule says of their number, and pre-activations.

        A sparse rule gives pairs with a graph, and no pre-activations; it may look at the whole
        batch. The others, and all that are asked for the `whole` matrix, give dense matrices with
        a graph. Gradients of weights, where only pairs have one, lie in matrices of `memory`.
        """
        rule = self.config.rule
        if rule.sparse and not whole:
            with torch.no_grad(), Search(self, x, memory) as scan:
                active = rule.select(self, len(x), scan)
            if active is not None:
                weights = (self.encoder_rows, self.b_enc, self.b_in)
                values = active_pre_acts(x, *weights, active, memory)
                return *rule.paired(values, active, self), None
        pre = self.pre_acts(x)
        return *rule.whole(pre, self), pre

    @torch.no_grad()
    def normalize_decoder_(self) -> None:
        """Divide every decoder row by its norm, if the config asks for unit rows."""
        if self.config.unit_norm_decoder:
            for rows in self.W_dec.split(rows_in_cache(self.W_dec)):
                rows /= rows.norm(dim=1, keepdim=True).clamp(min=1e-12)

    @torch.no_grad()
    def project_decoder_grad_(self) -> Float[Tensor, ""]:
        """Remove from each decoder row's gradient what would change only the row's norm, if rows
        are kept at norm 1; the norm of the gradient that is left."""
        grad = self.W_dec.grad
        if grad is None:
            return self.W_dec.new_zeros(())
        norms, size = [], rows_in_cache(grad)
        for part, rows in zip(grad.split(size), self.W_dec.split(size), strict=True):
            if self.config.unit_norm_decoder:
                part.addcmul_(dots_of_rows(part, rows)[:, None], rows, value=-1)
            norms.append(torch.linalg.vector_norm(part, dim=1))  # the whole would be one thread's
        return torch.linalg.vector_norm(torch.cat(norms))

    @torch.no_grad()
    def folded(self, mean: Float[Tensor, "d_in"], scale: Float[Tensor, "d_in"]) -> "Dictionary":
        """The dictionary of raw activations that does what this one does on `(x - mean) * scale`.

        Under a uniform scale decoder rows stay as they are and latents take the raw unit. Under
        any other scale rows lose their unit norm, and latents keep the normalised unit.

        Raises:
            ValueError: a transcoder, whose output would need a normaliser of its own.
        """
        if self.config.out_dims is not None:
            raise ValueError("cannot fold a normaliser into a transcoder; fit it without one")
        uniform = bool((scale == scale[0]).all())
        config = replace(
            self.config,
            unit_norm_decoder=self.config.unit_norm_decoder and uniform,
            tied=self.config.tied and uniform,
            code_norm=self.config.code_norm if uniform else "none",
        )
        other = copy.deepcopy(self)
        other.config = config
        if other.encoder is None and not config.tied:
            other.encoder = nn.Parameter(self.W_dec.clone())
        if not uniform and isinstance(config.rule, BatchTopK):
            _take_code_norms_(other, self.code_norms())
        other.b_dec.copy_(mean + self.b_dec / scale)
        if not config.apply_b_dec_to_input:
            shift = other.encoder_rows @ (mean * scale)
            other.b_enc -= shift
            if isinstance(config.rule, Gated):
                other.b_mag -= shift * self.r_mag.exp()
        if uniform:
            _divide_latents_(other, scale[0])
        else:
            other.encoder *= scale
            other.W_dec /= scale
        return other

    @torch.no_grad()
    def narrowed(self, latents: Int[Tensor, " few"]) -> "Dictionary":
        """A dictionary of these latents alone, with the same activations.

        Raises:
            ValueError: a TopK dictionary, where a latent's activation depends on all the others.
        """
        rule = self.config.rule
        if isinstance(rule, TopK):
            raise ValueError("cannot narrow a TopK dictionary: which latents fire depends on all")
        if isinstance(rule, BatchTopK):  # its k counts in training only, and must not exceed d_sae
            rule = replace(rule, k=min(rule.k, len(latents)))
        parts = {}
        for name, tensor in (*self.named_parameters(), *self.named_buffers()):
            shared = name == "b_dec" or tensor.ndim == 0
            part = tensor.data if shared else tensor.data[latents]
            is_buffer = not isinstance(tensor, nn.Parameter)
            parts[id(tensor)] = part if is_buffer else nn.Parameter(part, requires_grad=False)
        other = copy.deepcopy(self, parts)  # which draws no random weights
        other.config = replace(self.config, d_sae=len(latents), rule=rule)
        return other.eval()

    def save(self, folder: str | Path) -> Path:
        """Write `cfg.json` and `sae_weights.safetensors`, which sae-lens reads (one site)."""
        from lib.dictionaries.store import save

        return save(self, Path(folder))

    @staticmethod
    def load(folder: str | Path, device: str | torch.device = "cpu") -> "Dictionary":
        """Read a folder that `save` or sae-lens wrote; in eval mode.

        Raises:
            FileNotFoundError: a file is missing.
            ValueError: an architecture or an option that `Dictionary` does not have.
        """
        from lib.dictionaries.store import load

        return load(Path(folder)).to(device)

    def _flat(self, x: Float[Tensor, "*batch d"]) -> Float[Tensor, "n d"]:
        if x.shape[-1] != self.d_in:
            raise ValueError(f"need activations of width {self.d_in}, got {tuple(x.shape)}")
        return x.reshape(-1, self.d_in).to(self.W_dec)


def _take_code_norms_(dictionary: Dictionary, norms: Float[Tensor, "d_sae"]) -> None:
    """Multiply latents by their code norms and decoder rows by the inverse: ranks are kept."""
    dictionary.encoder *= norms[:, None]
    dictionary.b_enc *= norms
    dictionary.W_dec /= norms[:, None]


def _divide_latents_(dictionary: Dictionary, scale: Float[Tensor, ""]) -> None:
    """Latents in the unit of raw activations: under a uniform scale only offsets change."""
    rule = dictionary.config.rule
    dictionary.b_enc /= scale
    if isinstance(rule, Gated):
        dictionary.b_mag /= scale
    if isinstance(rule, JumpReLU):
        dictionary.log_threshold -= scale.log()
        unit = scale.item()
        tuned = replace(rule, threshold=rule.threshold / unit, bandwidth=rule.bandwidth / unit)
        dictionary.config = replace(dictionary.config, rule=tuned)
    if isinstance(rule, BatchTopK):
        dictionary.threshold /= scale
