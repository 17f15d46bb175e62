"""A feature browser: pick a latent, read what it fires on and writes, change it in a prompt."""

from collections.abc import Mapping, Sequence
from html import escape
from pathlib import Path
from typing import Any

import ipywidgets as widgets
import torch
from jaxtyping import Float
from torch import Tensor
from transformers import PreTrainedTokenizerBase

from lib.display.browser.cards import Cards
from lib.display.browser.page import STYLE, page
from lib.display.browser.prompt import PromptBox
from lib.display.tokens import cut
from lib.latents.record import LatentRecord
from lib.latents.source import LatentSource, require_latents
from lib.runtime import atomic_file

N_SHOWN = 200
"""Results listed, and latents in a page, unless told."""
BUILT_IN = ("frequency", "label")


class FeatureBrowser:
    """Latents of a record in a notebook; `to_html` makes a page of them that needs no kernel.

    Building it sorts the record by latent, which takes seconds for tens of millions of active
    pairs; a click after that reads only what its latent needs.
    """

    def __init__(
        self,
        record: LatentRecord,
        tokenizer: PreTrainedTokenizerBase,
        *,
        source: LatentSource | None = None,
        labels: Mapping[int, str] = {},
        orders: Mapping[str, Float[Tensor, " _"]] = {},
        title: str = "",
    ) -> None:
        """
        Args:
            source: what the record's latents come from; gives output tokens, nearest latents and
                the prompt box. Its directions are read once, here.
            labels: names of latents, for the search box.
            orders: scores of all latents to rank by, largest first, NaN last; "frequency" and
                "label" are built in.

        Raises:
            ValueError: a source with another number of latents; labels of latents that there are
                not; an order of another length or with a name that is built in; token ids that
                the tokenizer does not have.
        """
        _require_consistent(record, tokenizer, source, labels, orders)
        self.title, self.latent = title, -1
        self.cards = Cards(record, tokenizer, source, dict(labels))
        self._orders = _rankings(record, self.cards.labels, orders)
        self._prompt = source and PromptBox(source, tokenizer, self.cards.typical)
        self._build()
        self._rank()
        self.select(self._ranking[0])
        self._connect()

    def select(self, latent: int) -> None:
        """Show a latent. Raises ValueError for one that there is not."""
        require_latents([latent], self.cards.record.n_latents)
        self.latent = latent
        self._card.value = self.cards.card(latent)
        self._examples.value = self.cards.examples(latent)
        self._index.value = latent
        self._show_place()
        if self._prompt is not None:
            self._prompt.select(latent)

    def search(self, text: str) -> list[int]:
        """Latents whose label has all words of `text`, in the current order.

        Case does not matter. A number also finds the latent of that number, first; `~12` gives
        the latents most similar to latent 12; nothing gives all.

        Raises:
            ValueError: `~` without a latent's number, or without a source.
        """
        text = text.strip()
        if text.startswith("~"):
            if not text[1:].strip().isdecimal():
                raise ValueError(f"need a latent's number after ~, got {text!r}")
            return [other for other, _ in self.cards.nearest(int(text[1:]), N_SHOWN)]
        if not text:
            return list(self._ranking)
        words = text.casefold().split()
        found = {
            latent
            for latent, label in self.cards.labels.items()
            if all(word in label.casefold() for word in words)
        }
        number = int(text) if text.isdecimal() else -1
        first = [number] if 0 <= number < self.cards.record.n_latents else []
        return first + sorted(found - set(first), key=self._places.__getitem__)

    def to_html(self, path: str | Path, latents: Sequence[int] | None = None) -> Path:
        """Write a page with these latents; by default the first 200 of the current order.

        It stands alone: no kernel, no network. Returns the path.

        Raises:
            ValueError: latents that there are not.
        """
        chosen = self._ranking[:N_SHOWN] if latents is None else list(dict.fromkeys(latents))
        require_latents(chosen, self.cards.record.n_latents)
        with atomic_file(path) as temporary:
            temporary.write_text(page(self.title or "Latents", self.cards, chosen), "utf-8")
        return Path(path)

    def _repr_mimebundle_(self, **kwargs: Any) -> dict[str, Any]:
        return self.widget._repr_mimebundle_(**kwargs)

    def _build(self) -> None:
        last = self.cards.record.n_latents - 1
        narrow, wide = {"width": "36px"}, {"width": "250px"}
        self._index = widgets.BoundedIntText(
            min=0, max=last, description="latent", layout={"width": "170px"}
        )
        self._search = widgets.Text(placeholder="label, number or ~number", layout=wide)
        self._results = widgets.Select(options=[], layout={**wide, "height": "250px"})
        self._order = widgets.Dropdown(
            options=list(self._orders), description="order", layout={"width": "250px"}
        )
        self._previous = widgets.Button(description="◀", tooltip="previous", layout=narrow)
        self._next = widgets.Button(description="▶", tooltip="next", layout=narrow)
        self._similar = widgets.Button(
            description="similar", disabled=self._prompt is None, layout={"width": "80px"}
        )
        self._place, self._message = widgets.HTML(), widgets.HTML()
        self._card = widgets.HTML(layout={"flex": "1 1 0", "min_width": "0"})
        self._examples = widgets.HTML(
            layout={"height": "380px", "overflow": "auto", "border": "1px solid #dadce0"}
        )
        for part, name in (
            (self._index, "index"), (self._search, "search"), (self._results, "results"),
            (self._order, "order"), (self._previous, "prev"), (self._next, "next"),
            (self._similar, "similar"), (self._place, "place"), (self._message, "message"),
            (self._card, "card"), (self._examples, "examples"),
        ):  # fmt: skip
            part.add_class(f"fb-{name}")
        heading = f"<h3><bdi>{escape(cut(self.title))}</bdi></h3>" if self.title else ""
        walk = [self._index, self._previous, self._next, self._similar, self._place]
        find = widgets.VBox([self._order, self._search, self._results, self._message])
        find.layout.flex = "0 0 262px"
        self.widget = widgets.VBox(
            [
                widgets.HTML(f"<style>{STYLE}</style>{heading}"),
                widgets.HBox(walk),
                widgets.HBox([find, self._card]),
                self._examples,
            ]
            + ([] if self._prompt is None else [self._prompt.widget])
        )
        self.widget.add_class("fb")

    def _connect(self) -> None:
        self._index.observe(lambda change: self._pick(change["new"]), names="value")
        self._results.observe(lambda change: self._pick(change["new"]), names="value")
        self._search.observe(lambda _: self._find(), names="value")
        self._order.observe(lambda _: self._rank(), names="value")
        self._previous.on_click(lambda _: self._walk(-1))
        self._next.on_click(lambda _: self._walk(1))
        self._similar.on_click(lambda _: setattr(self._search, "value", f"~{self.latent}"))

    def _pick(self, latent: int | None) -> None:
        if latent is not None and latent != self.latent:
            self.select(latent)

    def _walk(self, by: int) -> None:
        place = self._places[self.latent] + by
        if 0 <= place < len(self._ranking):
            self.select(self._ranking[place])

    def _rank(self) -> None:
        """Take the order that is chosen."""
        self._ranking = self._orders[self._order.value]
        self._places = {latent: place for place, latent in enumerate(self._ranking)}
        self._find()
        self._show_place()

    def _find(self) -> None:
        """List what the search box asks for; none of it is picked yet."""
        try:
            found = self.search(self._search.value)
            more = f"the first {N_SHOWN} of " if len(found) > N_SHOWN else ""
            self._message.value = f"<p>{more}{len(found):,} latents</p>"
        except ValueError as error:
            found = []
            self._message.value = f"<p class='fb-error'>{escape(str(error))}</p>"
        with self._results.hold_trait_notifications():
            self._results.options = [(self._named(latent), latent) for latent in found[:N_SHOWN]]
            self._results.index = None

    def _named(self, latent: int) -> str:
        """An option's text; the label is isolated, by characters, from the text's direction."""
        label = self.cards.labels.get(latent)
        return f"{latent} · \u2068{cut(label, 80)}\u2069" if label else str(latent)

    def _show_place(self) -> None:
        if self.latent < 0:
            return
        place = self._places[self.latent]
        self._place.value = f"<p>rank {place + 1:,} of {len(self._ranking):,}</p>"
        self._previous.disabled = place == 0
        self._next.disabled = place == len(self._ranking) - 1


def _rankings(
    record: LatentRecord, labels: Mapping[int, str], orders: Mapping[str, Tensor]
) -> dict[str, list[int]]:
    """Latents in each order, the first first."""
    scores = {"frequency": record.firing_rate(), **orders}
    ranked = {
        name: score.nan_to_num(-torch.inf).argsort(descending=True, stable=True).tolist()
        for name, score in scores.items()
    }
    without = [latent for latent in range(record.n_latents) if latent not in labels]
    ranked["label"] = sorted(labels, key=lambda j: (labels[j].casefold(), j)) + without
    return ranked


def _require_consistent(
    record: LatentRecord,
    tokenizer: PreTrainedTokenizerBase,
    source: LatentSource | None,
    labels: Mapping[int, str],
    orders: Mapping[str, Tensor],
) -> None:
    """Raises ValueError; see `FeatureBrowser`."""
    n = record.n_latents
    if source is not None and source.n_latents != n:
        raise ValueError(f"need a source of {n} latents, as the record, got {source.n_latents}")
    bad = [latent for latent in labels if not 0 <= latent < n]
    if bad:
        raise ValueError(f"need labels of latents in 0 to {n - 1}, got {bad[:5]}")
    for name, score in orders.items():
        if name in BUILT_IN:
            raise ValueError(f"need other names of orders than {BUILT_IN}, got {name!r}")
        if len(score) != n:
            raise ValueError(f"need {n} scores in the order {name!r}, got {len(score)}")
    largest = int(record.texts.max()) if len(record.texts) else -1
    known = max(tokenizer.get_vocab().values(), default=-1)
    if largest > known:
        raise ValueError(
            f"need a tokenizer that knows the record's token id {largest}, got one up to {known}"
        )
