"""Coloured text as HTML. Text is data: it is escaped before it meets HTML.

Every token is isolated from the text direction of its neighbours, so that a right-to-left token,
or one that is a direction mark, reorders itself at most.
"""

import functools
import json
import uuid
from collections.abc import Iterable, Mapping, Sequence
from html import escape
from importlib import resources

from transformers import PreTrainedTokenizerBase

PALETTE = (
    "#aec7e8", "#ffbb78", "#98df8a", "#ff9896", "#c5b0d5", "#c49c94", "#f7b6d2", "#dbdb8d",
    "#9edae5", "#c7c7c7",
)  # fmt: skip


MAX_CHARS = 200
"""Longer tokens are cut, with a sign."""

SIGNS = {"\n": "↵", "\r": "␍", "\t": "⇥"}
POSITIVE, NEGATIVE = (255, 127, 14), (31, 119, 180)
"""Red, green, blue of a value's shade; orange and blue."""


def readable_tokens(tokenizer: PreTrainedTokenizerBase, ids: Iterable[int]) -> list[str]:
    """Tokens as a person reads them: the tokenizer's marks for spaces and bytes become text.

    A line break shows as `↵`, a tab as `⇥`. A piece of a character keeps the tokenizer's own
    spelling, and an id that the tokenizer does not know (padding of the vocabulary) is `[id]`.
    """
    ids = list(ids)
    names = dict(zip(ids, tokenizer.convert_ids_to_tokens(ids), strict=True))
    texts = {i: _readable(tokenizer, i, name) for i, name in names.items()}
    return [texts[i] for i in ids]


def _readable(tokenizer: PreTrainedTokenizerBase, i: int, name: str | None) -> str:
    if name is None:
        return f"[{i}]"
    marked = "▁" in name  # some decoders strip it from a first token
    text = name.replace("▁", " ") if marked else tokenizer.convert_tokens_to_string([name])
    text = name if not text or "\ufffd" in text else text
    return "".join(SIGNS.get(c, c) for c in text)


def cut(text: str, max_chars: int = MAX_CHARS) -> str:
    """`text`, or its beginning and the sign that it was cut."""
    return text if len(text) <= max_chars else f"{text[:max_chars]}…"


def shade(value: float, top: float) -> str:
    """CSS colour of a value: clear at 0, full orange at `top`, full blue at `-top`."""
    colour = ",".join(map(str, POSITIVE if value >= 0 else NEGATIVE))
    return f"rgba({colour},{min(abs(value) / top, 1):.2f})"


def colored_tokens(
    tokens: Sequence[str], values: Sequence[float], *, max_chars: int = MAX_CHARS
) -> str:
    """One text through circuitsvis's ColoredTokens: hovering a token shows its value.

    For pages and notebook outputs that may run scripts, with `IPython.display.HTML`. It holds
    circuitsvis's whole script (1.3 MB), which circuitsvis itself fetches from a server where it
    can; here nothing is fetched. Where scripts do not run, as in `ipywidgets.HTML`, or where many
    texts stand on a page, take `latent_text`. The value's box spells `<` as `&lt;`.

    Args:
        values: negative ones are blue, positive ones orange; the largest size has full colour.

    Raises:
        ValueError: another number of values than of tokens.
    """
    if len(tokens) != len(values):
        raise ValueError(f"need a value for each of {len(tokens)} tokens, got {len(values)}")
    top = max(map(abs, values), default=0.0) or 1.0
    props = {
        # circuitsvis sets them as inner HTML
        "tokens": [escape(cut(token, max_chars), quote=False) for token in tokens],
        "values": list(values),
        "minValue": -top,
        "maxValue": top,
        "negativeColor": "rgb({},{},{})".format(*NEGATIVE),
        "positiveColor": "rgb({},{},{})".format(*POSITIVE),
    }
    data = json.dumps(props).replace("<", "\\u003c")  # neither </script> nor <!-- in a script
    name = f"tokens-{uuid.uuid4().hex}"
    return (
        f"<style>#{name} {{background:#fff;color:#000}} #{name} span "
        f"{{unicode-bidi:isolate;max-width:100%;overflow-wrap:anywhere}}"
        f"</style><div id='{name}' class='mathjax_ignore'></div>"
        f"<script type='module'>{_circuitsvis()}\n"
        f"CircuitsVis.render('{name}', CircuitsVis.ColoredTokens, {data})</script>"
    )


@functools.cache
def _circuitsvis() -> str:
    """circuitsvis's script, made fit to stand in a page: it holds `</script` in a string."""
    script = resources.files("circuitsvis").joinpath("dist/cdn/iife.js").read_text("utf-8")
    script = script.partition("//# sourceMappingURL=")[0]
    return script.replace("</script", "<\\/script")


def concept_text(
    chats: Sequence[Sequence[tuple[str, set[str]]]],
    shown: Sequence[str],
    max_chars: int = MAX_CHARS,
) -> str:
    """Chats with each token coloured by the first of the `shown` concepts that it carries.

    Args:
        chats: for every chat its tokens with their concepts; hovering shows all of them.
        shown: concepts with a colour, at most ten, in order of precedence.
        max_chars: longer tokens are cut, with a sign.

    Raises:
        ValueError: more concepts than colours.
    """
    if len(shown) > len(PALETTE):
        raise ValueError(f"need at most {len(PALETTE)} concepts to colour, got {len(shown)}")
    colours = dict(zip(shown, PALETTE, strict=False))
    legend = " ".join(_span(concept, colour, "") for concept, colour in colours.items())
    rows = "".join(
        f"<div style='margin:.4em 0'>{' '.join(_token(*pair, colours, max_chars) for pair in chat)}"
        "</div>"
        for chat in chats
    )
    return _box(f"<p>{legend}</p>{rows}")


def latent_text(
    chats: Sequence[Sequence[tuple[str, float]]], title: str = "", max_chars: int = MAX_CHARS
) -> str:
    """Texts with each token shaded by the latent's activation there; hovering shows the number.

    It needs no script, so it shows everywhere; `colored_tokens` is circuitsvis's view.

    Args:
        chats: for every text its tokens with their activations, 0 where the latent is silent;
            negative ones are blue, positive ones orange.
    """
    top = max((abs(value) for chat in chats for _, value in chat), default=0.0) or 1.0
    rows = []
    for chat in chats:
        spans = [
            _span(cut(token, max_chars), shade(value, top), f"{value:.3g}") for token, value in chat
        ]
        rows.append(f"<div style='margin:.2em 0'>{' '.join(spans)}</div>")
    heading = f"<p><b>{escape(title)}</b></p>" if title else ""
    return _box(heading + "".join(rows))


def _box(content: str) -> str:
    """JupyterLab would typeset what stands between dollar signs."""
    style = "font-family:monospace;line-height:1.8"
    return f"<div class='mathjax_ignore' style='{style}'>{content}</div>"


def _token(token: str, concepts: set[str], colours: Mapping[str, str], max_chars: int) -> str:
    colour = next((colours[concept] for concept in colours if concept in concepts), "transparent")
    return _span(cut(token, max_chars), colour, ", ".join(sorted(concepts)))


def _span(text: str, colour: str, title: str) -> str:
    return (
        f"<span title='{escape(title, quote=True)}' style='background:{colour};color:#000;"
        f"padding:1px 3px;border-radius:3px;unicode-bidi:isolate'>{escape(text)}</span>"
    )
