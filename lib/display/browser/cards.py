"""What is known of one latent, as numbers and as HTML that needs no script.

Text is data: labels and tokens are escaped before they meet HTML.
"""

from collections.abc import Mapping, Sequence
from html import escape
from typing import NamedTuple

import torch
from torch import Tensor
from transformers import PreTrainedTokenizerBase

from lib.display.tokens import cut, readable_tokens, shade
from lib.latents.record import LatentRecord
from lib.latents.source import LatentSource, require_latents
from lib.latents.steering import typical_activations
from lib.models.unembed import unembedding

BEFORE, AFTER = 20, 12
"""Tokens shown round the one that an example is about."""
N_TOP, PER_QUARTER = 8, 3
QUARTERS = ("Top quarter", "Second quarter", "Third quarter", "Lowest quarter")
N_OUTPUTS, N_NEAREST, BINS = 8, 8, 40

Scored = list[tuple[str, float]]


class Statistics(NamedTuple):
    """How a latent fires in a record."""

    n_tokens: int
    """Tokens of the record."""
    n_fired: int
    """Those on which it fires."""
    typical: float
    """Mean size of its values where it fires; 0 for a dead latent."""
    largest: float
    smallest: float

    @property
    def rate(self) -> float:
        """Share of tokens on which it fires."""
        return self.n_fired / max(self.n_tokens, 1)


class Cards:
    """The latents of a record, each described by numbers and by HTML."""

    def __init__(
        self,
        record: LatentRecord,
        tokenizer: PreTrainedTokenizerBase,
        source: LatentSource | None,
        labels: Mapping[int, str],
    ) -> None:
        """Sorts the record by latent and, with a source, takes its directions as they are now."""
        self.record, self.tokenizer, self.labels = record, tokenizer, labels
        self.typical = typical_activations(record)
        self._directions: Tensor | None = None
        if source is not None:
            self._directions = source.write_directions.detach().float()
            self._norms = self._directions.norm(dim=1)
            self._unembedding = unembedding(source.model).to(self._directions.device)

    def statistics(self, latent: int) -> Statistics:
        """Raises ValueError for a latent that the record does not have."""
        values = self.record.active(latent)[1]
        ends = (float(values.max()), float(values.min())) if len(values) else (0.0, 0.0)
        return Statistics(len(self.record), len(values), float(self.typical[latent]), *ends)

    def outputs(self, latent: int) -> tuple[Scored, Scored]:
        """Tokens that one unit of the latent promotes and suppresses most, strongest first.

        The numbers are logits before the division by the residual stream's rms and before
        softcap; see `lib.models.unembed.unembedding`. Both lists are empty without a source and
        for a latent that writes nothing.
        """
        if self._directions is None or not self._norms[latent]:
            return [], []
        logits = self._unembedding @ self._directions[latent]
        n = min(N_OUTPUTS, len(logits))
        promoted, suppressed = (logits.topk(n, largest=end) for end in (True, False))
        return self._scored(promoted), self._scored(suppressed)

    def nearest(self, latent: int, n: int = N_NEAREST) -> list[tuple[int, float]]:
        """Other latents whose write directions have the largest cosine with this one's.

        Raises:
            ValueError: no source, so that no direction is known; a latent that there is not.
        """
        require_latents([latent], self.record.n_latents)
        if self._directions is None:
            raise ValueError("need a source to find similar latents, got none")
        sizes = self._norms * self._norms[latent]
        cosines = (self._directions @ self._directions[latent] / sizes).nan_to_num(-torch.inf)
        cosines[latent] = -torch.inf
        best = cosines.topk(min(n, len(cosines)))
        pairs = zip(best.indices.tolist(), best.values.tolist(), strict=True)
        return [(other, cosine) for other, cosine in pairs if cosine > -torch.inf]

    def card(self, latent: int) -> str:
        """Label, statistics, histogram, output tokens and nearest latents."""
        numbers = self.statistics(latent)
        label = self.labels.get(latent, "")
        heading = f"Latent {latent}" + (f" <bdi>{escape(cut(label))}</bdi>" if label else "")
        panels = [_panel("Activations", _numbers(numbers) + self._histogram(latent, numbers))]
        if self._directions is not None:
            panels += self._written(latent)
        return f"<h3>{heading}</h3><div class='fb-panels'>{''.join(panels)}</div>"

    def examples(self, latent: int) -> str:
        """Texts round the tokens on which the latent fires, shaded by its values."""
        numbers = self.statistics(latent)
        if not numbers.n_fired:
            return "<p>No examples: this latent never fires in this record.</p>"
        parts = []
        if numbers.largest > 0:
            parts.append(("Largest values", self.record.top_examples(latent, N_TOP)))
        if numbers.smallest < 0:
            lowest = self.record.top_examples(latent, N_TOP, lowest=True)
            parts.append(("Most negative values", lowest))
        quarters = self.record.quantile_examples(latent, len(QUARTERS), PER_QUARTER)
        parts += [(f"{q} of values", part) for q, part in zip(QUARTERS, quarters, strict=True)]
        top = max(numbers.largest, -numbers.smallest) or 1.0
        return "".join(
            f"<h4>{heading}</h4>{''.join(self._example(latent, t, top) for t in tokens.tolist())}"
            for heading, tokens in parts
            if len(tokens)
        )

    def _example(self, latent: int, token: int, top: float) -> str:
        row, position = int(self.record.rows[token]), int(self.record.positions[token])
        ids, at = self.record.context(token, BEFORE, AFTER)
        values = self.record.row_values(latent, row)[position - at :][: len(ids)].tolist()
        texts = readable_tokens(self.tokenizer, ids.tolist())
        return (
            f"<div class='fb-example'><span class='fb-number'>{values[at]:.3g}</span>"
            f"<span class='fb-text'>{shaded(texts, values, top, at)}</span></div>"
        )

    def _histogram(self, latent: int, numbers: Statistics) -> str:
        if not numbers.n_fired:
            return ""
        counts, edges = self.record.histogram(latent, BINS)
        return _bars(counts.tolist(), edges.tolist())

    def _written(self, latent: int) -> list[str]:
        promoted, suppressed = self.outputs(latent)
        near = [
            (f"{other} {self.labels.get(other, '')}".strip(), cosine, other)
            for other, cosine in self.nearest(latent)
        ]
        return [
            _panel("Promotes (logit)", _table([(*pair, None) for pair in promoted])),
            _panel("Suppresses (logit)", _table([(*pair, None) for pair in suppressed])),
            _panel("Nearest (cosine)", _table(near)),
        ]

    def _scored(self, best: "torch.return_types.topk") -> Scored:
        texts = readable_tokens(self.tokenizer, best.indices.tolist())
        return list(zip(texts, best.values.tolist(), strict=True))


def shaded(texts: Sequence[str], values: Sequence[float], top: float, at: int | None = None) -> str:
    """Tokens shaded by value, each isolated from its neighbours' direction; `at` is framed.

    Words get a space between them unless the tokens bring their own.
    """
    marks = []
    for i, (text, value) in enumerate(zip(texts, values, strict=True)):
        name = " class='fb-at'" if i == at else ""
        colour = f" title='{value:.3g}' style='background:{shade(value, top)}'" if value else ""
        marks.append(f"<bdi{name}{colour}>{escape(cut(text))}</bdi>")
    return ("" if any(" " in text for text in texts) else " ").join(marks)


def _panel(heading: str, body: str) -> str:
    return f"<div class='fb-panel'><h4>{heading}</h4>{body or '<p>nothing</p>'}</div>"


def _numbers(numbers: Statistics) -> str:
    if not numbers.n_fired:
        return f"<p>Dead: it fires on none of the record's {numbers.n_tokens:,} tokens.</p>"
    rows = [
        ("fires on", f"{100 * numbers.rate:.3g} % of tokens"),
        ("tokens", f"{numbers.n_fired:,} of {numbers.n_tokens:,}"),
        ("typical value", f"{numbers.typical:.3g}"),
        ("largest value", f"{numbers.largest:.3g}"),
    ]
    if numbers.smallest < 0:
        rows.append(("smallest value", f"{numbers.smallest:.3g}"))
    cells = "".join(f"<tr><th>{name}</th><td>{value}</td></tr>" for name, value in rows)
    return f"<table>{cells}</table>"


def _table(rows: Sequence[tuple[str, float, int | None]]) -> str:
    """Names with a number each and a bar behind it; the latents among them are marked as such."""
    top = max((abs(value) for _, value, _ in rows), default=0.0) or 1.0
    cells = []
    for name, value, latent in rows:
        colour, width = shade(0.45 * value, abs(value) or 1.0), 100 * abs(value) / top
        bar = f"linear-gradient(to right,{colour} {width:.0f}%,transparent 0)"
        own = "" if latent is None else f" data-latent='{latent}'"
        cells.append(
            f"<tr><td{own}><bdi>{escape(cut(name, 40))}</bdi></td>"
            f"<td class='fb-number' style='background:{bar}'>{value:+.2f}</td></tr>"
        )
    return f"<table>{''.join(cells)}</table>" if cells else ""


def _bars(counts: Sequence[int], edges: Sequence[float]) -> str:
    """A histogram as SVG; heights are logarithmic, so that rare large values can be seen."""
    heights = torch.tensor(counts).double().log1p()
    heights = (70 * heights / heights.max()).tolist()
    width = 240 / len(counts)
    bars = "".join(
        f"<rect x='{i * width:.1f}' y='{80 - height:.1f}' width='{width - 0.7:.1f}' "
        f"height='{height:.1f}' fill='{'#ff7f0e' if edges[i + 1] > 0 else '#1f77b4'}'>"
        f"<title>{edges[i]:.3g} to {edges[i + 1]:.3g}: {counts[i]:,} tokens</title></rect>"
        for i, height in enumerate(heights)
        if counts[i]
    )
    return (
        "<svg viewBox='0 0 240 96' width='240' height='96' role='img'>"
        f"{bars}<line x1='0' y1='80' x2='240' y2='80' stroke='#9aa0a6'></line>"
        f"<text x='0' y='93'>{edges[0]:.3g}</text>"
        "<text x='120' y='93' text-anchor='middle'>value (tokens, log)</text>"
        f"<text x='240' y='93' text-anchor='end'>{edges[-1]:.3g}</text></svg>"
    )
