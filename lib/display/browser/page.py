"""How the feature browser looks, and its stand-alone page: no kernel, no network."""

from collections.abc import Iterable
from html import escape

from lib.display.browser.cards import Cards
from lib.display.tokens import cut

STYLE = """
.fb { background: #fff; color: #202124; font: 13px/1.45 system-ui, sans-serif; padding: 10px;
  --jp-widgets-label-color: #202124; --jp-widgets-color: #202124; --jp-layout-color1: #fff;
  --jp-widgets-input-color: #202124; --jp-widgets-input-background-color: #fff;
  --jp-widgets-input-border-color: #9aa0a6; --jp-widgets-readout-color: #202124;
  --jp-ui-font-color0: #202124; --jp-ui-font-color1: #202124; --jp-layout-color2: #e8eaed;
  --jp-content-font-color1: #202124; --jp-border-color1: #9aa0a6; --jp-layout-color3: #dadce0; }
.fb .widget-html-content { line-height: 1.45; }
.fb .fb-examples .widget-html-content { padding: 0 10px; }
.fb h3, .fb h4, .fb p, .fb table { margin: 0; color: #202124; }
.fb h3 { font-size: 17px; margin-bottom: 8px; overflow-wrap: anywhere; }
.fb h3 bdi { font-weight: 400; color: #5f6368; margin-left: 8px; }
.fb h4 { font-size: 12px; color: #5f6368; margin: 8px 0 3px; font-weight: 600; }
.fb-panels { display: flex; flex-wrap: wrap; gap: 6px 18px; }
.fb-panel { min-width: 130px; max-width: 420px; }
.fb table { border-collapse: collapse; font-size: 12px; background: #fff; }
.fb tr, .fb tr:nth-child(even) { background: #fff; }
.fb th, .fb td { border: 0; padding: 1px 10px 1px 0; text-align: left; color: #202124;
  font-weight: 400; white-space: pre; line-height: 17px; }
.fb th { color: #5f6368; }
.fb td.fb-number { padding: 1px 4px; min-width: 54px; }
.fb svg text { font-size: 10px; fill: #5f6368; }
.fb-number { font-variant-numeric: tabular-nums; text-align: right; }
.fb-example { display: flex; align-items: baseline; gap: 10px; padding: 3px 0;
  border-top: 1px solid #f1f3f4; }
.fb-place p { line-height: 28px; }
.fb-example .fb-number { flex: 0 0 44px; color: #5f6368; }
.fb-text { font-family: ui-monospace, monospace; overflow-wrap: anywhere; line-height: 1.55; }
.fb-text bdi { white-space: pre-wrap; border-radius: 3px; padding: 1px; }
.fb-text bdi.fb-at { box-shadow: 0 0 0 1.5px #202124; }
.fb-error { color: #b3261e; }
.fb-answer p { white-space: pre-wrap; overflow-wrap: anywhere; }
"""

PAGE_STYLE = """
body { margin: 0; }
.fb-page { display: flex; gap: 20px; max-width: 1240px; margin: auto; }
.fb-page nav { flex: 0 0 270px; }
.fb-page main { flex: 1; min-width: 0; }
.fb-page input { box-sizing: border-box; width: 100%; padding: 5px; margin: 6px 0; }
.fb-page ol { list-style: none; margin: 0; padding: 0; overflow-y: auto; max-height: 80vh; }
.fb-page li button { all: unset; display: block; box-sizing: border-box; width: 100%;
  padding: 2px 6px; border-radius: 3px; overflow: hidden; text-overflow: ellipsis;
  white-space: nowrap; cursor: pointer; }
.fb-page li button:hover { background: #f1f3f4; }
.fb-page li button:focus-visible { outline: 2px solid #1f77b4; }
.fb-page li button[aria-current] { background: #fde3cf; }
.fb-page [data-latent].fb-link { color: #1f77b4; cursor: pointer; }
"""

SCRIPT = """
const items = [...document.querySelectorAll("nav li")];
const sections = new Map(items.map(li => {
  const latent = li.dataset.latent;
  return [latent, document.getElementById("latent-" + latent)];
}));
function show(latent) {
  for (const [other, section] of sections) section.hidden = other !== latent;
  for (const li of items) {
    const button = li.querySelector("button");
    if (li.dataset.latent === latent) button.setAttribute("aria-current", "true");
    else button.removeAttribute("aria-current");
  }
}
for (const li of items) li.querySelector("button").onclick = () => show(li.dataset.latent);
for (const name of document.querySelectorAll("td[data-latent]"))
  if (sections.has(name.dataset.latent)) {
    name.classList.add("fb-link");
    name.onclick = () => show(name.dataset.latent);
  }
document.querySelector("nav input").oninput = event => {
  const words = event.target.value.toLowerCase().split(/\\s+/);
  for (const li of items) {
    const text = li.textContent.toLowerCase();
    li.hidden = !words.every(word => text.includes(word));
  }
};
function step(by) {
  const shown = items.filter(li => !li.hidden);
  const at = shown.findIndex(li => li.querySelector("[aria-current]"));
  const next = shown[at + by];
  if (!next) return;
  show(next.dataset.latent);
  next.scrollIntoView({block: "nearest"});
}
document.onkeydown = event => {
  if (event.target.tagName === "INPUT") return;
  if (event.key === "ArrowDown" || event.key === "ArrowUp") {
    event.preventDefault();
    step(event.key === "ArrowDown" ? 1 : -1);
  }
};
if (items.length) show(items[0].dataset.latent);
"""


def page(title: str, cards: Cards, latents: Iterable[int]) -> str:
    """One HTML document with the cards and examples of `latents`, a list and a search box.

    Its script only shows and hides what stands there; without scripts everything is visible.
    """
    items, sections = [], []
    for latent in latents:
        label = escape(cut(cards.labels.get(latent, "")))
        items.append(
            f"<li data-latent='{latent}'><button type='button'>{latent} "
            f"<bdi>{label}</bdi></button></li>"
        )
        sections.append(
            f"<section id='latent-{latent}'>{cards.card(latent)}{cards.examples(latent)}</section>"
        )
    heading = escape(cut(title))
    return (
        f"<!doctype html><html lang='en'><head><meta charset='utf-8'><title>{heading}</title>"
        f"<style>{STYLE}{PAGE_STYLE}</style></head><body class='fb'><div class='fb-page'>"
        f"<nav><h3>{heading}</h3><p>{len(items)} latents; arrow keys walk along the list.</p>"
        "<input type='search' placeholder='label or number' aria-label='search'>"
        f"<ol>{''.join(items)}</ol></nav><main>{''.join(sections)}</main></div>"
        f"<script>{SCRIPT}</script></body></html>"
    )
