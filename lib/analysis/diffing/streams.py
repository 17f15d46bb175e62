"""How the residual streams of two models differ at one site, without a dictionary."""

from collections.abc import Iterable
from dataclasses import dataclass

import torch
from jaxtyping import Float, Int
from torch import Tensor

from lib.activations.source import Block
from lib.runtime import require_at_least


@dataclass(frozen=True, eq=False)
class StreamDifference:
    """Of `x_b - x_a` at every token that was harvested, in order."""

    rows: Int[Tensor, " n"]
    positions: Int[Tensor, " n"]
    """Where in the corpus each token stands."""
    size: Float[Tensor, " n"]
    """`‖x_b - x_a‖ / ‖x_a‖`."""
    mean: Float[Tensor, " d"]
    by_position: Float[Tensor, "n_positions d"]
    """Mean over the tokens at each of the first places of a row, NaN where none was harvested. A
    narrow fine-tune shows there, whatever the text says. Source: Minder et al. 2025, Activation
    Difference Lens."""
    components: Float[Tensor, "k d"]
    """Principal components of the difference about 0, of norm 1, the strongest first; signed so
    that the mean coordinate is positive."""
    energy: Float[Tensor, " k"]
    """Share of `Σ ‖x_b - x_a‖²` along each."""


def stream_difference(
    blocks: Iterable[Block], *, n_positions: int = 5, n_components: int = 10
) -> StreamDifference:
    """From activations of two sites of one width, a's columns first.

    Differences are held in memory: n · d numbers.

    Raises:
        ValueError: no token, an odd width, or two sites that are equal at every token.
    """
    require_at_least(1, n_positions=n_positions, n_components=n_components)
    found, before, rows, positions = [], [], [], []
    for block in blocks:
        if block.acts.shape[1] % 2:
            raise ValueError(f"need two sites of one width, got {block.acts.shape[1]} columns")
        a, b = block.acts.float().cpu().chunk(2, dim=1)
        found.append(b - a)
        before.append(a.norm(dim=1))
        rows.append(block.rows)
        positions.append(block.positions)
    if not sum(map(len, found)):
        raise ValueError("need a token, got none")
    difference, at = torch.cat(found), torch.cat(positions)
    total = difference.double().square().sum()
    if not total:
        raise ValueError("need two models that differ, got equal activations at every token")
    moments = difference.double().T @ difference.double()
    values, vectors = torch.linalg.eigh(moments)
    k = min(n_components, len(values))
    components = vectors.flip(1)[:, :k].T.float()
    signs = torch.where(components @ difference.mean(0) < 0, -1.0, 1.0)
    by_position = [difference[at == i].mean(0) for i in range(n_positions)]  # NaN of none
    return StreamDifference(
        torch.cat(rows),
        at,
        difference.norm(dim=1) / torch.cat(before).clamp(min=1e-12),
        difference.mean(0),
        torch.stack(by_position),
        components * signs[:, None],
        (values.flip(0)[:k] / total).float(),
    )


def lens(
    direction: Float[Tensor, " d"], unembedding: Float[Tensor, "vocab d"], n: int
) -> Int[Tensor, " n"]:
    """The token ids that a direction of the residual stream raises most, most first."""
    return (unembedding @ direction.to(unembedding)).topk(n).indices.cpu()
