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
from jaxtyping import Bool, Float, Int
from torch import Tensor, nn

from lib.dictionaries import format
from lib.dictionaries.batchtopk import decode_by_site
from lib.dictionaries.config import DictionaryConfig, code_norms, site_norms
from lib.dictionaries.folding import fold_normalizer
from lib.dictionaries.partition import Block, forbidden, held, leak
from lib.dictionaries.rules import Codes
from lib.sparse import Scan, SparseActs, active_pre_acts, sparse_decode
from lib.sparse.ops import columns_of, rows_in_cache, rows_of
from lib.sparse.screen import tokens_at_once


class Dictionary(nn.Module):
    """A sparse dictionary. Columns of `W_enc` and rows of `W_dec` belong to latents.

    Random unit rows, encoder equal to decoder, biases 0; torch's seed decides them. In memory a
    column of `W_enc` is in one piece, like a row of `W_dec`. A tied dictionary's `W_enc` is
    `W_dec.T`, and no parameter of its own.
    """

    progress = 1.0
    """Share of the training that is done, for rules that anneal."""

    def __init__(self, config: DictionaryConfig) -> None:
        super().__init__()
        self.config = config
        rows = held(torch.randn(config.d_sae, config.d_out), self._forbidden)
        self.W_dec = nn.Parameter(rows / rows.norm(dim=1, keepdim=True))
        if not config.tied:
            rows = self.W_dec.detach().clone()
            if config.d_in != config.d_out:
                rows = torch.randn(config.d_sae, config.d_in) / math.sqrt(config.d_in)
            self.W_enc = nn.Parameter(rows.T)
        self.b_enc = nn.Parameter(torch.zeros(config.d_sae))
        self.b_dec = nn.Parameter(torch.zeros(config.d_out))
        for name, start in config.rule.parameters(config.d_sae).items():
            self.register_parameter(name, nn.Parameter(start))
        by_site = (len(config.site_dims),) if config.code_norm == "decoupled" else ()
        for name, start in config.rule.buffers().items():
            self.register_buffer(name, start.expand(by_site).clone())

    def __getattr__(self, name: str):
        if name == "W_enc" and self.config.tied:
            return self.W_dec.T
        return super().__getattr__(name)

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
    def encoder_rows(self) -> Float[Tensor, "d_sae d_in"]:
        """`W_enc.T`, contiguous."""
        if self.config.tied:
            return self.decoder_rows
        return held(rows_of(self.W_enc), self._forbidden)

    @property
    def decoder_rows(self) -> Float[Tensor, "d_sae d_out"]:
        """`W_dec`, with zeros where a partition forbids weights: what every product must use."""
        return held(self.W_dec, self._forbidden)

    @property
    def b_in(self) -> Float[Tensor, "d_in"]:
        """The part of `b_dec` that is subtracted from the input, or zeros."""
        applied = self.config.apply_b_dec_to_input
        return self.b_dec if applied else self.b_dec.new_zeros(self.d_in)

    def code_norms(self) -> Float[Tensor, "d_sae"]:
        """See `DictionaryConfig.code_norm`."""
        return code_norms(self.config, self.decoder_rows)

    def site_norms(self) -> Float[Tensor, "n_sites d_sae"]:
        """Norm of each latent's decoder row at each site, in the unit of training."""
        return site_norms(self.config, self.decoder_rows)

    def pre_acts(self, x: Float[Tensor, "n d_in"]) -> Float[Tensor, "n d_sae"]:
        """`(x - b_dec) @ W_enc + b_enc`: a Gated dictionary's gate, every other rule's input."""
        if self.config.apply_b_dec_to_input:
            x = x - self.b_dec
        return torch.addmm(self.b_enc, x, self.encoder_rows.T)

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
        with self._scan(x) as scan:
            found = rule.active(scan, self)
        if found is not None:
            return found
        blocks = x.split(tokens_at_once(x, self.d_sae))
        return SparseActs.joined([SparseActs.of(rule.acts(self.pre_acts(b), self)) for b in blocks])

    def encode_training(self, x: Float[Tensor, "n d_in"]) -> Codes:
        """Latents as they are trained, with a graph: pairs where the rule selects them, which may
        depend on the whole batch, otherwise a dense matrix."""
        rule = self.config.rule
        with torch.no_grad(), self._scan(x) as scan:
            active = rule.select(scan, self)
        rows = self.encoder_rows
        if active is None:
            codes = rule.dense(torch.addmm(self.b_enc, x - self.b_in, rows.T), self)
        else:
            pre = active_pre_acts(x, rows, self.b_enc, self.b_in, active)
            codes = rule.sparse(pre, self)
        codes.encoder_rows = rows
        if self.config.code_norm == "decoupled":
            codes.bounds = self.smallest.clone()
        return codes

    def decode(
        self,
        acts: SparseActs | Float[Tensor, "*batch d_sae"],
        bounds: Float[Tensor, "n_sites"] | None = None,
    ) -> Float[Tensor, "*batch d_out"]:
        """
        Args:
            bounds: in training with decoupled norms, those of `Codes`.
        """
        if self.config.code_norm == "decoupled":
            rows = columns_of(self.decoder_rows, self.config.site_dims)
            return decode_by_site(acts, rows, self, bounds) + self.b_dec
        if isinstance(acts, SparseActs):
            return sparse_decode(acts, self.decoder_rows) + self.b_dec
        return acts @ self.decoder_rows + self.b_dec

    def forward(self, x: Float[Tensor, "*batch d_in"]) -> Float[Tensor, "*batch d_out"]:
        """The reconstruction."""
        return self.decode(self.encode(x))

    @torch.no_grad()
    def normalize_decoder_(self) -> None:
        """Divide every decoder row by its norm, if the config asks for unit rows."""
        if self.config.unit_norm_decoder:
            for rows in self.decoder_rows.split(rows_in_cache(self.W_dec)):
                rows /= rows.norm(dim=1, keepdim=True).clamp(min=1e-12)

    @torch.no_grad()
    def project_decoder_grad_(self) -> Float[Tensor, ""]:
        """Remove from each decoder row's gradient what would change only the row's norm, if rows
        are kept at norm 1; returns the norm of the gradient that is left."""
        grad = self.W_dec.grad
        if grad is None:
            return self.W_dec.new_zeros(())
        norms, size = [], rows_in_cache(grad)
        for part, rows in zip(grad.split(size), self.W_dec.split(size), strict=True):
            if self.config.unit_norm_decoder:
                part.addcmul_(torch.linalg.vecdot(part, rows)[:, None], rows, value=-1)
            norms.append(torch.linalg.vector_norm(part, dim=1))  # the whole would be one thread's
        return torch.linalg.vector_norm(torch.cat(norms))

    def written_at(self, acts: SparseActs, site: int) -> Bool[Tensor, "nnz"]:
        """Which pairs a site writes: all, or with decoupled norms those that pass its bound."""
        if self.config.code_norm != "decoupled":
            return torch.ones_like(acts.indices, dtype=torch.bool)
        return acts.values * self.site_norms()[site][acts.indices] > self.threshold[site]

    @torch.no_grad()
    def integrity(self) -> float:
        """The most that a partition leaks, see `partition.leak`; exactly 0."""
        return leak(self)

    @torch.no_grad()
    def folded(self, mean: Float[Tensor, "d_in"], scale: Float[Tensor, "d_in"]) -> "Dictionary":
        """The dictionary of raw activations that does what this one does on `(x - mean) * scale`.

        Under a uniform scale decoder rows stay as they are and latents take the raw unit. Under
        any other rows lose their unit norm, and latents keep the normalised unit; so do the norms
        of rows where each site has one scale (`DictionaryConfig.site_scales`).

        Raises:
            ValueError: a transcoder, whose output would need a normaliser of its own; decoupled
                norms under a scale that differs within a site.
        """
        return fold_normalizer(self, mean, scale)

    @torch.no_grad()
    def narrowed(self, latents: Int[Tensor, " few"]) -> "Dictionary":
        """A dictionary of these latents alone, with the same activations.

        Raises:
            ValueError: a TopK dictionary, where a latent's activation depends on all the others.
        """
        rule, kept = self.config.rule.narrowed(len(latents)), {}
        self.held_state()
        for name, tensor in (*self.named_parameters(), *self.named_buffers()):
            part, is_buffer = tensor.data, not isinstance(tensor, nn.Parameter)
            if name == "W_enc":
                part = part.T[latents].T
            elif name != "b_dec" and not is_buffer:
                part = part[latents]
            kept[id(tensor)] = part if is_buffer else nn.Parameter(part, requires_grad=False)
        other = copy.deepcopy(self, kept)  # which draws no random weights
        other.config = replace(self.config, d_sae=len(latents), rule=rule, exclusive=())
        return other.eval()

    def held_state(self) -> dict[str, Tensor]:
        """Tensors by name, after a partition's zeros were written into the weights."""
        for rows in (self.W_dec, self.W_enc.T):
            held(rows.detach(), self._forbidden)
        return self.state_dict()

    def save(self, folder: str | Path) -> Path:
        """Write `cfg.json` and `sae_weights.safetensors`, which sae-lens reads (one site)."""
        return format.write(Path(folder), self.config, self.held_state())

    @classmethod
    def load(cls, folder: str | Path, device: str | torch.device = "cpu") -> "Dictionary":
        """Read a folder that `save` or sae-lens wrote; in eval mode.

        Raises:
            FileNotFoundError: a file is missing.
            ValueError: an architecture or an option that `Dictionary` does not have.
        """
        return cls.of(*format.read(Path(folder))).to(device)

    @classmethod
    def of(cls, config: DictionaryConfig, state: dict[str, Tensor]) -> "Dictionary":
        """A dictionary with these tensors, in eval mode."""
        dictionary = cls(config)
        dictionary.load_state_dict(dictionary.state_dict() | state)  # buffers of training may lack
        return dictionary.eval()

    @property
    def _forbidden(self) -> tuple[Block, ...]:
        return forbidden(self.config.exclusive, self.config.site_dims)

    def _scan(self, x: Float[Tensor, "n d_in"]) -> Scan:
        x = x - self.b_in if self.config.apply_b_dec_to_input else x
        return Scan(x, self.encoder_rows, self.b_enc)

    def _flat(self, x: Float[Tensor, "*batch d"]) -> Float[Tensor, "n d"]:
        if x.shape[-1] != self.d_in:
            raise ValueError(f"need activations of width {self.d_in}, got {tuple(x.shape)}")
        return x.reshape(-1, self.d_in).to(self.W_dec)


def load_dictionaries(
    folder: str | Path, device: str | torch.device = "cpu"
) -> dict[str, Dictionary]:
    """The dictionary in `folder`, or those in its folders, by name.

    Raises:
        FileNotFoundError: there is none.
    """
    found = format.folders(Path(folder))
    return {path.name: Dictionary.load(path, device) for path in found}
