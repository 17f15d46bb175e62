"""Scans of the pre-activations: the pairs that may be active, without the whole matrix.

Of that matrix a block of tokens exists at a time. On a CPU whose matrix unit multiplies bfloat16
five to seven times as fast as float32 (AMX) the block is a *screen*: an upper bound of every
pre-activation, from rounded activations and weights. Candidates whose bound passes (about 2k per
token) are recomputed in float32. So nothing is lost by the rounding: what is found is what a
product in float32 would have shown, but for the order of its sums.
"""

from collections.abc import Callable, Iterator

import torch
from jaxtyping import BFloat16, Float, Int
from torch import Tensor

from lib.sparse.acts import SparseActs
from lib.sparse.ops import BLOCK, borrow, dots_at, product_dtype, release, rows_in_cache
from lib.sparse.select import bound_of_largest, largest_of_rows, largest_of_runs, places_above

Places = Int[Tensor, "nnz"]
TOKENS = 512
"""Encoded at a time at least; with fewer the product is slower."""
SCREENED = 2**27
"""Gain from which a screen is made, see `worth_a_screen`."""
CANDIDATES = 1 / 32
"""Share of a block from which a product in float32 is faster than one for each candidate."""
DENSE = 1 / 14
"""Share of active pairs from which dense products are faster than sparse ones, on a CPU."""
ROUNDING = 2.0**-8
"""What rounding to bfloat16 takes at most, as a share."""
TINY = 2e-19
"""What is smaller has a square that float32 may call 0."""


class Scan:
    """Looks through the pre-activations `x @ rows.T + b_enc`, any number of times; a context.

    `topk` and `above` give pairs with their values and without a graph.
    """

    def __init__(
        self,
        x: Float[Tensor, "n d_in"],
        rows: Float[Tensor, "d_sae d_in"],
        b_enc: Float[Tensor, "d_sae"],
    ) -> None:
        self.x, self.rows, self.b_enc = x.detach(), rows.detach(), b_enc.detach()
        self._low, self._room = product_dtype(x), None
        self._screen: Screen | None = None
        float32 = self._low == rows.dtype == torch.float32 and x.device.type == "cpu"
        self._screened = float32 and worth_a_screen(*x.shape, len(rows))

    @property
    def n(self) -> int:
        """Tokens."""
        return len(self.x)

    def __enter__(self) -> "Scan":
        return self

    def __exit__(self, *_: object) -> None:
        release(self._room)
        if self._screen:
            self._screen.close()

    @torch.no_grad()
    def topk(self, k: int) -> SparseActs:
        """The k largest of each token; where a screen is used, only those above 0."""

        def find(bounds: Tensor, slack: Tensor) -> Places:
            return places_above(bounds, (bound_of_largest(bounds, k)[:, None] - slack).clamp(min=0))

        def exact(pre: Tensor) -> Places:
            tokens = torch.arange(len(pre), device=pre.device)[:, None]
            return (tokens * pre.shape[1] + largest_of_rows(pre, k)).flatten()

        candidates = self._candidates(find, k)
        if candidates is None:
            return self._all(exact)
        return candidates.at(largest_of_runs(candidates.values, candidates.offsets, k))

    @torch.no_grad()
    def above(
        self, bound: Float[Tensor, "d_sae"], *, k: int = 0, most: float = 1.0
    ) -> SparseActs | None:
        """All that exceed the bound of their latent; None if they are too many.

        Args:
            k: about how many a token has, if known.
            most: share of a block of tokens above which they are too many.
        """

        def exact(pre: Tensor) -> Places | None:
            places = places_above(pre, bound)
            return places if len(places) <= most * pre.numel() else None

        candidates = self._candidates(lambda bounds, _: places_above(bounds, bound), k, most)
        if candidates is None:
            return self._all(exact)
        return candidates.where(candidates.values > bound[candidates.indices])

    def _all(self, find: Callable[[Tensor], Places | None]) -> SparseActs | None:
        """What `find` finds in blocks of pre-activations; None as soon as it gives None."""
        if self._room is None:
            self.rows, self.b_enc = self.rows.to(self._low), self.b_enc.to(self._low)
            size = min(self.n, tokens_at_once(self.x, len(self.rows)))
            self._room = borrow(size, len(self.rows), self._low, self.x.device)
        found = []
        with torch.autocast(self.x.device.type, enabled=False):
            for x in self.x.to(self._low).split(max(1, len(self._room))):
                pre = torch.addmm(self.b_enc, x, self.rows.T, out=self._room[: len(x)])
                places = find(pre)
                if places is None:
                    return None
                found.append(_pairs(places, len(x), len(self.rows), pre.take(places)))
        return SparseActs.joined(found)

    def _candidates(
        self, find: Callable[[Tensor, Tensor], Places], k: int, most: float = 1.0
    ) -> SparseActs | None:
        """What `find` finds on the screen, with values in float32; None if a screen does not pay.

        It is given upper bounds and, for each token, by how much they may be too high.
        """
        self._screened = self._screened and 3 * k <= CANDIDATES * len(self.rows)
        if self._screened and self._screen is None:
            self._screen = Screen(self.x, self.rows, self.b_enc)
            self._screened = bool(self._screen.slack.isfinite().all())
        if not self._screened:
            return None
        found, d_sae = [], len(self.rows)
        for bounds, slack in self._screen.blocks():
            places = find(bounds, slack)
            if len(places) > min(most, CANDIDATES) * bounds.numel():
                self._screened = False  # for this batch: too many have much the same size
                return None
            found.append(places + len(found) * len(self._screen.room) * d_sae)
        places = torch.cat(found)
        pairs = _pairs(places, self.n, d_sae, self.x.new_empty(len(places)))
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
    ) -> None:
        (n, d), d_sae, low = x.shape, len(rows), torch.bfloat16
        at_once = min(n, max(TOKENS, BLOCK[0] // d_sae))
        self.room = borrow(at_once, d_sae, low, x.device)
        self.x, self.rows = (borrow(m, d + 3, low, x.device) for m in (n, d_sae))
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
            release(matrix)


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
    return torch.linalg.vecdot(rows, rows).sqrt() + TINY * rows.shape[1] ** 0.5


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
