"""The pairs that may be active, found without the whole matrix of pre-activations.

Of that matrix a block of tokens exists at a time. On a CPU whose matrix unit multiplies bfloat16
seven times as fast as float32 (AMX) the block is a *screen*: an upper bound of every
pre-activation, from rounded activations and weights. What exceeds its bound on the screen, half as
much again as what is kept, is computed in float32. So nothing is lost by the rounding: the pairs
are those, with the values, of a product in float32.
"""

from collections.abc import Callable, Iterator
from typing import TYPE_CHECKING

import torch
from jaxtyping import BFloat16, Float, Int
from torch import Tensor

from lib.dictionaries.kernels.eager import dots_at
from lib.dictionaries.memory import BLOCK, Memory, product_dtype, rows_in_cache
from lib.dictionaries.pairs import SparseActs, starts_of
from lib.dictionaries.selection import dots_of_rows

if TYPE_CHECKING:
    from lib.dictionaries.dictionary import Dictionary

Slack = Float[Tensor, "n 1"] | None
Find = Callable[[Float[Tensor, "n d_sae"], Slack], Int[Tensor, "nnz"] | None]
Keep = Callable[[SparseActs], SparseActs]
TOKENS, SCREENED_TOKENS = 256, 512
"""Encoded at a time at least, in float32 and on a screen; with fewer the product is slower."""
SCREENED = 2**27
"""From here on a screen is made: `d_in (n - 192) (d_sae - 1024)`, as rounding all weights takes as
long as 192 tokens are faster, and the candidates of a token as long as 1,024 latents."""
CANDIDATES = 1 / 32
"""Share of a block from which on a product in float32 is faster than one for each candidate."""
ROUNDING, TINY = 2.0**-8, 1e-30
"""What rounding to bfloat16 takes at most, as a share; far above what counts as zero in it."""


class Search:
    """Looks through the pre-activations of `x`, any number of times; a context."""

    def __init__(
        self, dictionary: "Dictionary", x: Float[Tensor, "n d_in"], memory: Memory | None = None
    ) -> None:
        self.rows, self.b_enc = dictionary.encoder_rows.detach(), dictionary.b_enc.detach()
        self.x, self.low = (x - dictionary.b_in).detach(), product_dtype(x)
        self.memory, self.room = memory or Memory(), None
        gain = x.shape[1] * (len(x) - 192) * (len(self.rows) - 1024)
        fast = self.low == self.rows.dtype == torch.float32 and x.device.type == "cpu"
        fast = fast and gain >= SCREENED and has_amx()
        self.screen = Screen(self.x, self.rows, self.b_enc, self.memory) if fast else None
        if self.screen and not self.screen.slack.isfinite().all():
            self.screen = self.screen.close()

    def __enter__(self) -> "Search":
        return self

    def __exit__(self, *_: object) -> None:
        self.memory.give(self.room)
        if self.screen:
            self.screen.close()

    @torch.no_grad()
    def __call__(self, find: Find, keep: Keep) -> SparseActs | None:
        """What `keep` leaves of the candidates that `find` finds in each block of tokens.

        `find` is given pre-activations, or upper bounds of them and by how much, at most, each
        token's are too high; it gives places along the rows, ascending, with all that `keep` may
        want among them, or None, which ends the search. `keep` is given exact values.
        """
        if self.screen:
            candidates = self._candidates(find)
            if candidates is not None:
                return keep(candidates)
            self.screen = self.screen.close()  # for good: too many have much the same size
        if self.room is None:
            self.rows, self.b_enc = self.rows.to(self.low), self.b_enc.to(self.low)
            size = min(len(self.x), tokens_at_once(self.x, len(self.rows)))
            self.room = self.memory.take(size, len(self.rows), self.low, self.x.device)
        found = []
        with torch.autocast(self.x.device.type, enabled=False):
            for x in self.x.to(self.low).split(max(1, len(self.room))):
                pre = torch.addmm(self.b_enc, x, self.rows.T, out=self.room[: len(x)])
                places = find(pre, None)
                if places is None:
                    return None
                found.append(keep(_pairs(places, len(x), len(self.rows), pre.take(places))))
        return SparseActs.joined(found)

    def _candidates(self, find: Find) -> SparseActs | None:
        """With exact values; None if too many."""
        found, d_sae = [], len(self.rows)
        for bounds, slack in self.screen.blocks():
            places = find(bounds, slack)
            if places is None or len(places) > CANDIDATES * bounds.numel():
                return None
            found.append(places + len(found) * len(self.screen.room) * d_sae)
        places = torch.cat(found)
        pairs = _pairs(places, len(self.x), d_sae, self.x.new_empty(len(places)))
        values = dots_at(pairs, self.x, self.rows)
        return pairs.with_values(values.add_(self.b_enc[pairs.indices]))


class Screen:
    """Upper bounds of the pre-activations `x @ rows.T + b_enc`, by a product in bfloat16.

    With x' and w' rounded, `|x·w - x'·w'| <= |x - x'| |w'| + |x| |w - w'|`, where rounding takes
    at most 1 / 256 of the latter. So the error is at most a token's number times the latent's norm,
    one dimension more of the product itself; the bias, in two parts, is two more. The order of sums
    in float32 changes at most a share of each, which is added to it.
    """

    def __init__(
        self,
        x: Float[Tensor, "n d"],
        rows: Float[Tensor, "d_sae d"],
        b_enc: Float[Tensor, "d_sae"],
        memory: Memory,
    ) -> None:
        (n, d), d_sae, low = x.shape, len(rows), torch.bfloat16
        at_once = min(n, max(SCREENED_TOKENS, BLOCK[0] // d_sae))
        self.memory, self.room = memory, memory.take(at_once, d_sae, low, x.device)
        self.x, self.rows = (memory.take(m, d + 3, low, x.device) for m in (n, d_sae))
        sums = 2 * (d + 3) * torch.finfo(x.dtype).eps
        self.x[:, :d], self.x[:, d + 1 :] = x, 1
        lost = torch.linalg.vector_norm(self.x[:, :d].to(x.dtype).sub_(x), dim=1)
        self.x[:, d] = _up(lost + (ROUNDING + sums) * torch.linalg.vector_norm(x, dim=1))
        norms, size = [], rows_in_cache(rows)
        for exact, rounded in zip(rows.split(size), self.rows.split(size), strict=True):
            rounded[:, :d] = exact
            norms.append(dots_of_rows(exact, exact).sqrt())
        high = b_enc.to(low)
        rest = _up(b_enc - high + sums * b_enc.abs() + TINY)
        torch.stack([_up(torch.cat(norms)), high, rest], 1, out=self.rows[:, d:])
        widest, excess = self.rows[:, d].max(), (high + rest.to(x.dtype) - b_enc).max()
        self.slack = 2 * (self.x[:, d].to(x.dtype) * widest + excess)[:, None]

    def blocks(self) -> Iterator[tuple[Float[Tensor, "few d_sae"], Float[Tensor, "few 1"]]]:
        """Bounds, rounded to the nearest, and what of them is too much, at most, before that."""
        for x, slack in zip(
            self.x.split(len(self.room)), self.slack.split(len(self.room)), strict=True
        ):
            yield torch.mm(x, self.rows.T, out=self.room[: len(x)]), slack

    def close(self) -> None:
        for matrix in (self.x, self.rows, self.room):
            self.memory.give(matrix)


def tokens_at_once(x: Float[Tensor, "n d"], d_sae: int) -> int:
    """How many are encoded in one product."""
    return max(TOKENS, BLOCK[x.is_cuda] // d_sae)


def has_amx() -> bool:
    """Whether products in bfloat16 are those of the CPU's matrix unit."""
    known = getattr(torch.cpu, "get_capabilities", dict)()  # of a recent torch
    return torch.backends.mkldnn.is_available() and known.get("amx_bf16", False)


def _up(numbers: Float[Tensor, "m"]) -> BFloat16[Tensor, "m"]:
    """In bfloat16, not below what they were."""
    return (numbers + 2 * ROUNDING * numbers.abs()).bfloat16()


def _pairs(
    places: Int[Tensor, "nnz"], n: int, d_sae: int, values: Float[Tensor, "nnz"]
) -> SparseActs:
    """At `places` along the rows of n tokens, which ascend from row to row."""
    offsets = starts_of(torch.bincount(places // d_sae, minlength=n))
    return SparseActs(places % d_sae, values, offsets, d_sae)
