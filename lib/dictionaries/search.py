"""The pairs that may be active, found without the whole matrix of pre-activations.

Of that matrix a block of tokens exists at a time. On a CPU whose matrix unit multiplies bfloat16
five to seven times as fast as float32 (AMX) the block is a *screen*: an upper bound of every
pre-activation, from rounded activations and weights. What may be active by these bounds, about
twice as many pairs as are kept, is computed in float32. So nothing is lost by the rounding: what is
found is what a product in float32 would have shown, but for the order of its sums.
"""

from collections.abc import Callable, Iterator
from typing import TYPE_CHECKING

import torch
from jaxtyping import BFloat16, Float, Int
from torch import Tensor

from lib.dictionaries.kernels.eager import dots_at
from lib.dictionaries.memory import BLOCK, Memory, product_dtype, rows_in_cache
from lib.dictionaries.pairs import SparseActs
from lib.dictionaries.selection import dots_of_rows

if TYPE_CHECKING:
    from lib.dictionaries.dictionary import Dictionary

Places = Int[Tensor, "nnz"]
Slack = Float[Tensor, "n 1"] | None
Find = Callable[[Float[Tensor, "n d_sae"], Slack], Places | None]
Keep = Callable[[SparseActs], SparseActs]
TOKENS, SCREENED_TOKENS = 256, 512
"""Encoded at a time at least, in float32 and on a screen; with fewer the product is slower."""
SCREENED = 2**27
"""From how large a gain on a screen is made, see `worth_a_screen`."""
CANDIDATES = 1 / 32
"""Share of a block from which on a product in float32 is faster than one for each candidate."""
ROUNDING = 2.0**-8
"""What rounding to bfloat16 takes at most, as a share."""
TINY = 2e-19
"""What is smaller has a square that float32 may call 0."""


class Search:
    """Looks through the pre-activations of `x`, any number of times; a context."""

    def __init__(
        self, dictionary: "Dictionary", x: Float[Tensor, "n d_in"], memory: Memory | None = None
    ) -> None:
        self.rows, self.b_enc = dictionary.encoder_rows.detach(), dictionary.b_enc.detach()
        self.x, self.low = (x - dictionary.b_in).detach(), product_dtype(x)
        self.memory, self.room = memory or Memory(), None
        self.screen = None
        few = 3 * getattr(dictionary.config.rule, "k", 0) <= CANDIDATES * len(self.rows)
        float32 = self.low == self.rows.dtype == torch.float32 and x.device.type == "cpu"
        if float32 and few and worth_a_screen(*x.shape, len(self.rows)):
            screen = Screen(self.x, self.rows, self.b_enc, self.memory)
            if screen.slack.isfinite().all():
                self.screen = screen
            else:
                screen.close()

    def __enter__(self) -> "Search":
        return self

    def __exit__(self, *_: object) -> None:
        self.memory.give(self.room)
        if self.screen:
            self.screen.close()

    @torch.no_grad()
    def __call__(self, find: Find, keep: Keep) -> SparseActs | None:
        """What `find` finds in the pre-activations; None as soon as it gives None.

        It is given a block of them and no slack, and gives places along the rows, which ascend from
        row to row. Or, on a screen, it is given upper bounds and, for each token, by how much they
        may be too high; then it gives candidates, and `keep` what is left of all of them once their
        values are known.
        """
        if self.screen:
            candidates = self._candidates(find)
            if candidates is not None:
                return keep(candidates)
            self.screen.close()
            self.screen = None  # for this batch: too many have much the same size
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
                found.append(_pairs(places, len(x), len(self.rows), pre.take(places)))
        return SparseActs.joined(found)

    def _candidates(self, find: Find) -> SparseActs | None:
        """On the screen, with their values in float32; None if there are too many."""
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

    With x' and w' rounded, `|x·w - x'·w'| <= |x - x'| |w'| + |x| |w - w'|`, and rounding takes at
    most 1 / 256 of |w|. So the error is at most `|x - x'| + |x| / 256`, a number for each token,
    times the latent's norm: one column more of both factors. The bias, in two parts, is two more.
    What float32 may lose in sums, `sums` of each number, is added to them.
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
        lost = self.x[:, :d].to(x.dtype).sub_(x)
        self.x[:, d] = _up(_norms(lost) + (ROUNDING + sums) * _norms(x))
        norms, size = [], rows_in_cache(rows)
        for exact, rounded in zip(rows.split(size), self.rows.split(size), strict=True):
            norms.append(_norms(exact))
            rounded[:, :d] = exact  # from the cache
        high = b_enc.to(low)
        rest = _up(b_enc - high + sums * b_enc.abs() + TINY)
        torch.stack([_up(torch.cat(norms)), high, rest], 1, out=self.rows[:, d:])
        widest, excess = self.rows[:, d].max(), (high + rest.to(x.dtype) - b_enc).max()
        # what was added to the product, and what it may have been too high without that
        self.slack = 2 * (self.x[:, d].to(x.dtype) * widest + excess)[:, None]

    def blocks(self) -> Iterator[tuple[Float[Tensor, "few d_sae"], Float[Tensor, "few 1"]]]:
        """Bounds, rounded to the nearest, and by how much they may be too high before that."""
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


def worth_a_screen(n: int, d_in: int, d_sae: int) -> bool:
    """Whether it is faster: rounding the weights costs what it gains with 192 tokens, and a token's
    candidates cost what it gains with 1,024 latents (at k 32, on one thread of a Xeon)."""
    return d_in * max(0, n - 192) * max(0, d_sae - 1024) >= SCREENED and has_amx()


def has_amx() -> bool:
    """Whether products in bfloat16 are those of the CPU's matrix unit."""
    known = getattr(torch.cpu, "get_capabilities", dict)()  # of a recent torch
    return torch.backends.mkldnn.is_available() and known.get("amx_bf16", False)


def _norms(rows: Float[Tensor, "m d"]) -> Float[Tensor, "m"]:
    """Not below the true ones, but for rounding."""
    return dots_of_rows(rows, rows).sqrt() + TINY * rows.shape[1] ** 0.5


def _up(numbers: Float[Tensor, "m"]) -> BFloat16[Tensor, "m"]:
    """In bfloat16, not below what they were."""
    return (numbers + 2 * ROUNDING * numbers.abs()).bfloat16()


def _pairs(
    places: Int[Tensor, "nnz"], n: int, d_sae: int, values: Float[Tensor, "nnz"]
) -> SparseActs:
    """At `places` along the rows of n tokens, which ascend from row to row."""
    ends = d_sae * torch.arange(n + 1, device=places.device)
    offsets = torch.searchsorted(places, ends)
    starts = ends[:-1].repeat_interleave(offsets.diff(), output_size=len(places))
    return SparseActs(places - starts, values, offsets, d_sae)
