"""A stand-alone page of findings: text, tables and figures, nothing fetched from a network."""

from collections.abc import Sequence
from html import escape
from pathlib import Path

import pandas as pd
import plotly.graph_objects as go
from plotly.offline import get_plotlyjs

from lib.runtime import atomic_file

Part = str | pd.DataFrame | go.Figure

STYLE = """
:root { color-scheme: light dark; }
body { font: 15px/1.5 system-ui, sans-serif; max-width: 1000px; margin: 24px auto; padding: 0 16px;
  background: Canvas; color: CanvasText; }
table { border-collapse: collapse; font-size: 13px; display: block; overflow-x: auto; }
th, td { border-bottom: 1px solid #8884; padding: 3px 10px 3px 0; text-align: right; }
th:first-child, td:first-child, tbody th { text-align: left; }
.plotly-graph-div { background: #fff; margin: 12px 0; }
"""


def write_report(path: Path, title: str, parts: Sequence[tuple[str, Part]]) -> Path:
    """Write the page.

    Args:
        parts: a heading (empty: none), and what stands below it. Text is escaped; a blank line in
            it begins a paragraph.
    """
    body = [f"<h1>{escape(title)}</h1>"]
    for heading, part in parts:
        if heading:
            body.append(f"<h2>{escape(heading)}</h2>")
        if isinstance(part, str):
            body += [f"<p>{escape(text)}</p>" for text in part.split("\n\n")]
        elif isinstance(part, pd.DataFrame):
            body.append(part.to_html(escape=True, border=0, na_rep="–"))
        else:
            body.append(part.to_html(full_html=False, include_plotlyjs=False))
    head = (
        '<meta charset="utf-8"><meta name="viewport" content="width=device-width">'
        f"<title>{escape(title)}</title><style>{STYLE}</style><script>{get_plotlyjs()}</script>"
    )
    text = f"<!doctype html><html lang='en'><head>{head}</head><body>{''.join(body)}</body></html>"
    with atomic_file(path) as temporary:
        temporary.write_text(text, encoding="utf-8")
    return path
