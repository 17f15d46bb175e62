"""Coloured text as HTML. Text is data: it is escaped before it meets HTML."""

from collections.abc import Mapping, Sequence
from html import escape

PALETTE = (
    "#aec7e8", "#ffbb78", "#98df8a", "#ff9896", "#c5b0d5", "#c49c94", "#f7b6d2", "#dbdb8d",
    "#9edae5", "#c7c7c7",
)  # fmt: skip


def concept_text(
    chats: Sequence[Sequence[tuple[str, set[str]]]], shown: Sequence[str], max_chars: int = 200
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
    return f"<div style='font-family:monospace;line-height:1.9'><p>{legend}</p>{rows}</div>"


def latent_text(
    chats: Sequence[Sequence[tuple[str, float]]], title: str = "", max_chars: int = 200
) -> str:
    """Texts with each token shaded by the latent's activation there; hovering shows the number.

    Args:
        chats: for every text its tokens with their activations, 0 where the latent is silent.
    """
    top = max((value for chat in chats for _, value in chat), default=0.0) or 1.0
    rows = []
    for chat in chats:
        spans = [
            _span(
                token if len(token) <= max_chars else f"{token[:max_chars]}…",
                f"rgba(255,127,14,{max(value, 0) / top:.2f})",
                f"{value:.3g}",
            )
            for token, value in chat
        ]
        rows.append(f"<div style='margin:.2em 0'>{' '.join(spans)}</div>")
    heading = f"<p><b>{escape(title)}</b></p>" if title else ""
    return f"<div style='font-family:monospace;line-height:1.7'>{heading}{''.join(rows)}</div>"


def _token(token: str, concepts: set[str], colours: Mapping[str, str], max_chars: int) -> str:
    text = token if len(token) <= max_chars else f"{token[:max_chars]}…"
    colour = next((colours[concept] for concept in colours if concept in concepts), "transparent")
    return _span(text, colour, ", ".join(sorted(concepts)))


def _span(text: str, colour: str, title: str) -> str:
    return (
        f"<span title='{escape(title, quote=True)}' style='background:{colour};color:#000;"
        f"padding:1px 3px;border-radius:3px'>{escape(text)}</span>"
    )
