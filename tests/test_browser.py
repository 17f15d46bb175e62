"""The feature browser: what it shows is the record's, and text from data does nothing but show."""

import contextlib
import json
import re
from dataclasses import dataclass, field
from html.parser import HTMLParser
from types import SimpleNamespace

import pytest
import torch
from tokenizers import Tokenizer, decoders, pre_tokenizers
from tokenizers.models import BPE, WordLevel
from transformers import PreTrainedTokenizerFast

from lib.data.corpus import Corpus, load_corpus
from lib.dictionaries import SparseActs
from lib.display import FeatureBrowser, colored_tokens, readable_tokens
from lib.display.browser.cards import N_TOP, Cards
from lib.display.browser.prompt import PromptBox
from lib.display.tokens import MAX_CHARS
from lib.latents import DictionarySource, LatentRecord, record_of
from lib.latents.record import Part, assemble
from lib.latents.steering import ablate, clamp
from lib.models.generate import answer
from lib.models.unembed import unembedding

HOSTILE = [
    "<script>window.pwned=1</script>",
    "</script><img/src=x/onerror=window.pwned=1>",
    "\"'><svg/onload=window.pwned=1>",
    "<!--<script>",
    "\u202eשלום",
    "🙂",
    "x" * 10_000,
    "&lt;b&gt;",
]
ELEMENTS = set(
    "html head meta title style body script nav main section h3 h4 p input ol li button div span "
    "bdi table tr th td svg rect line text i".split()
)
VOID = {"meta", "input"}


@pytest.fixture(scope="module")
def tiny(gemma, shipped_sae):
    """The shipped model and dictionary, and the record of some rows of the world."""
    model, tokenizer = gemma
    source = DictionarySource(model, shipped_sae)
    corpus = load_corpus("world", tokenizer, n_tokens=4_000, seq_len=64, split="test")
    return SimpleNamespace(tokenizer=tokenizer, source=source, record=record_of(source, corpus))


@pytest.fixture(scope="module")
def browser(tiny) -> FeatureBrowser:
    return FeatureBrowser(
        tiny.record, tiny.tokenizer, source=tiny.source, labels={3: "Red fruit", 7: "fruit, green"}
    )


def words(*tokens: str) -> PreTrainedTokenizerFast:
    vocabulary = {token: i for i, token in enumerate(tokens)}
    words = Tokenizer(WordLevel(vocabulary, unk_token=tokens[0]))
    words.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    return PreTrainedTokenizerFast(tokenizer_object=words)


def record_from(dense: torch.Tensor, ids: torch.Tensor) -> LatentRecord:
    """A record of rows of tokens with these latents, `[n_rows seq n_latents]`."""
    mask = torch.ones_like(ids, dtype=torch.bool)
    corpus = Corpus(ids.int(), mask, ~mask, None, "made up")
    rows, positions = mask.nonzero(as_tuple=True)
    part = Part(SparseActs.of(dense.flatten(0, 1)), ids.int().flatten(), rows, positions)
    return assemble([part], corpus)


@pytest.fixture(scope="module")
def signed() -> LatentRecord:
    """Six latents over 5 rows of 8 tokens; 2 is negative only, 4 is dead, 5 has both signs."""
    generator = torch.Generator().manual_seed(0)
    dense = torch.rand(5, 8, 6, generator=generator)
    dense *= torch.rand(dense.shape, generator=generator) < 0.6
    dense[..., 2] *= -1
    dense[..., 4] = 0
    dense[::2, ..., 5] *= -1
    dense[:, ::3, 5] *= -1
    return record_from(dense, torch.arange(40).view(5, 8) % len(HOSTILE))


@dataclass
class Element:
    tag: str
    attributes: dict[str, str]
    data: list[str] = field(default_factory=list)

    @property
    def text(self) -> str:
        return "".join(self.data)


class Page(HTMLParser):
    """The elements of a page, each with its class and text; every one must be closed."""

    def __init__(self, html: str) -> None:
        super().__init__()
        self.open, self.elements, self.handlers = [], [], []
        self.feed(html)
        self.close()
        assert not self.open

    def handle_starttag(self, tag, attributes):
        element = Element(tag, dict(attributes))
        self.handlers += [name for name, _ in attributes if name.startswith("on")]
        self.elements.append(element)
        if tag not in VOID:
            self.open.append(element)

    def handle_endtag(self, tag):
        assert self.open.pop().tag == tag

    def handle_data(self, data):
        for element in self.open:
            element.data.append(data)

    def of(self, tag: str, name: str | None = None) -> list[Element]:
        found = [e for e in self.elements if e.tag == tag]
        return [e for e in found if name in (None, e.attributes.get("class"))]

    def texts(self, tag: str, name: str | None = None) -> list[str]:
        return [element.text for element in self.of(tag, name)]


def everything(widget) -> list:
    return [widget, *(x for child in getattr(widget, "children", ()) for x in everything(child))]


def part(browser: FeatureBrowser, name: str):
    """The widget of this class."""
    (found,) = (x for x in everything(browser.widget) if f"fb-{name}" in x._dom_classes)
    return found


def test_the_card_shows_the_records_numbers(tiny, browser):
    record = tiny.record
    latent = int(record.firing_rate().argmax())
    browser.select(latent)
    tokens, values = record.active(latent)
    assert browser.cards.statistics(latent).rate == len(tokens) / len(record)
    page = Page(part(browser, "card").value)
    assert dict(zip(page.texts("th"), page.texts("td"), strict=False)) == {
        "fires on": f"{100 * len(tokens) / len(record):.3g} % of tokens",
        "tokens": f"{len(tokens):,} of {len(record):,}",
        "typical value": f"{values.abs().mean():.3g}",
        "largest value": f"{values.max():.3g}",
    }
    drawn = [int(text.split(": ")[1].split()[0].replace(",", "")) for text in page.texts("title")]
    counts = [count for count in record.histogram(latent, 40)[0].tolist() if count]
    assert drawn == counts and sum(drawn) == len(tokens)


def test_output_tokens_and_nearest_latents(tiny, browser):
    directions, tokenizer = tiny.source.write_directions, tiny.tokenizer
    logits = unembedding(tiny.source.model) @ directions[3]
    promoted, suppressed = browser.cards.outputs(3)
    order = logits.argsort(descending=True)
    names = tokenizer.convert_ids_to_tokens(order.tolist())
    assert [text for text, _ in promoted] == names[:8]
    assert [text for text, _ in suppressed] == names[::-1][:8]
    assert [value for _, value in promoted] == pytest.approx(logits[order[:8]].tolist())
    cosines = torch.cosine_similarity(directions, directions[3:4])
    best = cosines.argsort(descending=True)[1:9]
    assert browser.search("~3")[:8] == best.tolist()
    assert [c for _, c in browser.cards.nearest(3)] == pytest.approx(cosines[best].tolist())
    browser.select(3)
    shown = Page(part(browser, "card").value).texts("bdi")
    assert shown[1:17] == [text for text, _ in promoted + suppressed]
    assert shown[17].split()[0] == str(int(best[0]))


def test_examples_show_the_token_that_fires(tiny, browser):
    record, latent = tiny.record, int(tiny.record.firing_rate().argmax())
    page = Page(browser.cards.examples(latent))
    marked, numbers = page.of("bdi", "fb-at"), page.texts("span", "fb-number")
    quarters = torch.cat(record.quantile_examples(latent, 4, 3))
    tokens = [*record.top_examples(latent, N_TOP).tolist(), *quarters.tolist()]
    values = dict(zip(*(x.tolist() for x in record.active(latent)), strict=True))
    words = tiny.tokenizer.convert_ids_to_tokens(record.ids[tokens].tolist())
    assert [e.text for e in marked] == words
    assert numbers == [e.attributes["title"] for e in marked]
    assert numbers == [f"{values[token]:.3g}" for token in tokens]
    row = record.row_text(int(record.rows[tokens[0]])).tolist()
    text = page.texts("span", "fb-text")[0]
    assert text in " ".join(tiny.tokenizer.convert_ids_to_tokens(row))


def test_negative_and_dead_latents(signed):
    browser = FeatureBrowser(signed, words(*HOSTILE))
    headings = [Page(browser.cards.examples(j)).texts("h4") for j in range(6)]
    assert headings[0][0] == "Largest values" and "Most negative values" not in headings[0]
    assert headings[2][0] == "Most negative values" and "Largest values" not in headings[2]
    assert headings[5][:2] == ["Largest values", "Most negative values"]
    tokens, values = signed.active(2)
    first = Page(browser.cards.examples(2)).of("bdi", "fb-at")[0]
    assert first.attributes["title"] == f"{values.min():.3g}"
    assert first.attributes["style"] == "background:rgba(31,119,180,1.00)"
    assert signed.ids[tokens[values.argmin()]] == HOSTILE.index(first.text)
    browser.select(4)
    assert "Dead: it fires on none of the record's 40 tokens" in part(browser, "card").value
    assert "never fires" in part(browser, "examples").value and not headings[4]


def test_top_examples_of_few_rows_and_many_ties():
    """More candidates are looked at until the rows suffice; ties keep the order of the tokens."""
    dense = torch.ones(4, 500, 1)
    dense[0] += 1
    dense[2, 499] = 3
    record = record_from(dense, torch.zeros(4, 500))
    assert record.top_examples(0, 3).tolist() == [1499, 0, 500]
    assert record.top_examples(0, 9).tolist() == [1499, 0, 500, 1500]
    assert record.quantile_examples(0, 2, 2)[1].tolist() == [999, 1500]  # of 999, 1000, 1500


def test_search(tiny, browser):
    assert set(browser.search("FRUIT")) == {3, 7} and browser.search("fruit red") == [3]
    assert browser.search("7") == [7]
    assert browser.search("fruit plum") == browser.search("1024") == []
    frequency = tiny.record.firing_rate().argsort(descending=True, stable=True).tolist()
    assert browser.search(" ") == frequency
    part(browser, "order").value = "label"
    assert browser.search("fruit") == [7, 3] and browser.search("")[:3] == [7, 3, 0]
    part(browser, "order").value = "frequency"
    for text, message in (
        ("~", "need a latent's number after ~"),
        ("~x", "need a latent's number after ~"),
        ("~1024", r"need latents in 0 to 1023, got \[1024\]"),
    ):
        with pytest.raises(ValueError, match=message):
            browser.search(text)


def test_widgets_pick_a_latent(browser):
    names = "index search results similar order prev next card examples message "
    names += "prompt slider mode run answer"
    parts = SimpleNamespace(**{name: part(browser, name) for name in names.split()})

    def listed() -> list[int]:
        return [latent for _, latent in parts.results.options]

    browser.select(12)
    parts.search.value = "green"
    assert listed() == [7] and browser.latent == 12 and parts.results.value is None
    parts.results.value = 7
    assert browser.latent == parts.index.value == 7 and "green" in parts.card.value
    parts.similar.click()
    assert listed() == browser.search("~7") and parts.search.value == "~7"
    assert parts.results.index is None and browser.latent == 7
    parts.search.value = "~"
    assert not listed() and "need a latent" in parts.message.value
    parts.search.value = ""
    assert len(listed()) == 200 and "of 1,024" in parts.message.value
    parts.index.value = 9
    assert browser.latent == 9 and "Latent 9" in parts.card.value
    assert "application/vnd.jupyter.widget-view+json" in browser._repr_mimebundle_()


def test_walking_along_an_order(signed):
    score = torch.tensor([0.1, 0.5, float("nan"), 0.9, 0.5, 0.2])
    browser = FeatureBrowser(signed, words(*HOSTILE), orders={"F1": score})
    rates, ranked = signed.firing_rate(), browser.search("")
    names = ("prev", "next", "order", "place")
    back, forth, order, place = (part(browser, name) for name in names)
    assert browser.latent == int(rates.argmax()) and back.disabled
    assert rates[ranked].diff().max() <= 0 and ranked[-1] == 4
    order.value = "F1"
    browser.select(3)
    walked = [browser.latent]
    while not forth.disabled:
        forth.click()
        walked.append(browser.latent)
    assert walked == [3, 1, 4, 5, 0, 2] and "rank 6 of 6" in place.value
    back.click()
    assert browser.latent == 0 and not forth.disabled


@pytest.fixture(scope="module")
def box(tiny, browser) -> PromptBox:
    return PromptBox(tiny.source, tiny.tokenizer, browser.cards.typical)


def test_factor_one_is_the_unchanged_answer_and_zero_is_ablation(tiny, box):
    (model, tokenizer), changed = (tiny.source.model, tiny.tokenizer), 0
    prompt = "what is the color of snow ?"
    plain = answer(model, tokenizer, [prompt])[0]
    ids = tokenizer(f"<bos> <|user|> {prompt}", return_tensors="pt", add_special_tokens=False)
    ids = ids["input_ids"]
    acts = tiny.source.latents(ids, torch.ones_like(ids, dtype=torch.bool))
    for i in acts.values.argsort(descending=True)[:12:2].tolist():
        latent = int(acts.indices[i])
        box.select(latent)
        box.factor.value = 1.0
        assert box.answers(prompt) == (plain, plain)
        box.factor.value = 0.0
        with tiny.source.edited({latent: ablate()}):
            expected = answer(model, tokenizer, [prompt])[0]
        assert box.answers(prompt) == (plain, expected)
        changed += expected != plain
    assert plain and changed


def test_adding_clamps_to_the_typical_value(tiny, browser, box):
    latent, x = int(browser.cards.typical.argmax()), torch.tensor([0.0, 2.0])
    box.select(latent)
    typical = float(tiny.record.active(latent)[1].abs().mean())
    box.mode.value, box.factor.value = "add", 3.0
    torch.testing.assert_close(box.edit()(x), clamp(3 * typical)(x))
    box.mode.value = "scale"
    assert box.edit()(x).tolist() == [0.0, 6.0]


def test_the_slider_runs_the_model(tiny, browser):
    names = ("prompt", "slider", "run", "answer")
    prompt, slider, run, shown = (part(browser, name) for name in names)
    prompt.value = told = "what is the color of snow ?"
    browser.select(5)
    assert shown.value == ""
    slider.value = 2.5
    assert "latent 5 × 2.5" in shown.value and "unchanged" in shown.value
    slider.value = -1.0
    assert "latent 5 × -1" in shown.value
    prompt.value = "  "
    slider.value = 4.0
    assert "latent 5 × -1" in shown.value
    prompt.value = told
    tiny.source.model.train()
    run.click()
    tiny.source.model.eval()
    assert "fb-error" in shown.value and "eval mode" in shown.value


class Scripted:
    """A source whose model says what it is told; no chat template is needed."""

    hook_name = "nowhere"

    def __init__(self, model, tokenizer, record: LatentRecord) -> None:
        self.n_latents, self.model, self.opened = record.n_latents, model, []
        self.write_directions = torch.randn(record.n_latents, 128)

    def latents(self, tokens, mask):
        dense = torch.zeros(int(mask.sum()), self.n_latents)
        dense[-1, 0] = -2.0
        return SparseActs.of(dense)

    def edited(self, edits):
        self.opened.append(dict(edits))
        return contextlib.nullcontext()


def test_the_prompt_box_of_any_source(tiny, signed):
    """A tokenizer without a chat template: the prompt is continued as it stands."""
    tokenizer = words(*HOSTILE, "what")
    tokenizer.pad_token = HOSTILE[0]
    source = Scripted(tiny.source.model, tokenizer, signed)
    box = PromptBox(source, tokenizer, torch.ones(6))
    box.prompt.value = " ".join(HOSTILE[:4])
    box.button.click()
    assert [list(edits) for edits in source.opened] == [[], [0]]
    page = Page(box.answer.value)
    assert {e.tag for e in page.elements} <= ELEMENTS and not page.handlers
    assert page.texts("bdi") == HOSTILE[:4]
    *others, style = (e.attributes.get("style") for e in page.of("bdi"))
    assert others == [None] * 3 and style == "background:rgba(31,119,180,1.00)"
    box.select(1)
    box.factor.value = 2.0
    assert "silent on this prompt" in box.answer.value
    assert [list(edits) for edits in source.opened] == [[], [0], [1]]


def test_hostile_text_only_shows(signed, tmp_path):
    browser = FeatureBrowser(
        signed, words(*HOSTILE), labels=dict(enumerate(HOSTILE[:6])), title=HOSTILE[1]
    )
    path = browser.to_html(tmp_path / "page.html")
    whole = path.read_text("utf-8")
    browser.select(3)
    for html in (whole, part(browser, "card").value, part(browser, "examples").value):
        page = Page(html)
        assert {e.tag for e in page.elements} <= ELEMENTS and not page.handlers
        assert all(e.tag not in ("script", "style") or html is whole for e in page.elements)
    page = Page(whole)
    shown = set(page.texts("bdi"))
    assert {token for token in HOSTILE if len(token) < MAX_CHARS} <= shown
    assert "x" * MAX_CHARS + "…" in shown and "x" * (MAX_CHARS + 1) not in whole
    (script,) = page.texts("script")
    assert "pwned" not in script and page.texts("title")[0] == HOSTILE[1]
    named = {j: text for text, j in part(browser, "results").options}
    assert named[4] == f"4 · \u2068{HOSTILE[4]}\u2069"


def test_the_page_stands_alone(tiny, browser, tmp_path):
    path = browser.to_html(tmp_path / "new" / "page.html", [7, 3, 7])
    html = path.read_text("utf-8")
    assert not re.search(r"https?:|//\w|src=|url\(|@import|fetch|import\(", html)
    page = Page(html)
    assert [e.attributes["id"] for e in page.of("section")] == ["latent-7", "latent-3"]
    assert page.texts("section")[0].startswith("Latent 7 fruit, green")
    assert browser.cards.card(3) in html and browser.cards.examples(3) in html
    dense = torch.rand(1, 8, 250, generator=torch.Generator().manual_seed(0)).round()
    many = FeatureBrowser(record_from(dense, torch.arange(8).view(1, 8)), words(*HOSTILE))
    default = Page(many.to_html(tmp_path / "page.html").read_text("utf-8"))
    listed = [int(e.attributes["data-latent"]) for e in default.of("li")]
    assert listed == many.search("")[:200]
    with pytest.raises(ValueError, match=r"need latents in 0 to 1023, got \[1024\]"):
        browser.to_html(tmp_path / "no.html", [1024])
    assert sorted(file.name for file in tmp_path.iterdir()) == ["new", "page.html"]


def test_without_a_source(signed, tmp_path):
    browser = FeatureBrowser(signed, words(*HOSTILE))
    assert part(browser, "similar").disabled
    assert not any("fb-prompt" in x._dom_classes for x in everything(browser.widget))
    assert "Promotes" not in part(browser, "card").value
    with pytest.raises(ValueError, match="need a source to find similar latents"):
        browser.search("~1")
    with pytest.raises(ValueError, match=r"need latents in 0 to 5, got \[6\]"):
        browser.select(6)
    assert len(Page(browser.to_html(tmp_path / "a.html").read_text("utf-8")).of("section")) == 6


def test_bad_input(tiny, signed):
    few, all_of = words(*HOSTILE[:5]), words(*HOSTILE)
    for tokenizer, given, message in (
        (all_of, {"source": tiny.source}, "a source of 6 latents, as the record, got 1024"),
        (all_of, {"labels": {6: "a"}}, r"need labels of latents in 0 to 5, got \[6\]"),
        (all_of, {"labels": {-1: "a"}}, r"got \[-1\]"),
        (all_of, {"orders": {"F1": torch.zeros(7)}}, "need 6 scores in the order 'F1', got 7"),
        (all_of, {"orders": {"label": torch.zeros(6)}}, "other names of orders .* got 'label'"),
        (few, {}, "need a tokenizer that knows .* token id 7, got one up to 4"),
    ):
        with pytest.raises(ValueError, match=message):
            FeatureBrowser(signed, tokenizer, **given)


def test_a_latent_that_writes_nothing(tiny, signed):
    source = Scripted(tiny.source.model, None, signed)
    source.write_directions[2] = 0
    cards = Cards(signed, words(*HOSTILE), source, {})
    assert cards.outputs(2) == ([], []) and cards.nearest(2) == []
    assert 2 not in dict(cards.nearest(0)) and len(cards.nearest(0)) == 4
    assert cards.card(2).count("<p>nothing</p>") == 3


def test_tokens_read_as_a_person_would():
    marks = words("<s>", "▁the", "Ġthe", "a\n", "\t", "\ufffd", "é")
    assert readable_tokens(marks, [1, 2, 3, 4, 5, 6, 999, 1]) == [
        " the", "Ġthe", "a↵", "⇥", "\ufffd", "é", "[999]", " the",
    ]  # fmt: skip
    pieces = ["Ġthe", "Ã©tÃ©", "Ċ", "Ã"]
    inner = Tokenizer(BPE({piece: i for i, piece in enumerate(pieces)}, [], unk_token="Ã"))
    inner.decoder = decoders.ByteLevel()
    byte_level = PreTrainedTokenizerFast(tokenizer_object=inner)
    assert readable_tokens(byte_level, range(4)) == [" the", "été", "↵", "Ã"]


def test_colored_tokens_offline_and_escaped():
    values = [0.5, -2.0, 0.0, 0.0, 0.0, 0.0, 1.0, 0.0, 0.25]
    html = colored_tokens([*HOSTILE, " a"], values)
    page = Page(html)
    assert [e.tag for e in page.elements] == ["style", "div", "script"]
    call = page.texts("script")[0].rsplit("CircuitsVis.render(", 1)[1]
    name, component, data = call.rstrip(")").split(", ", 2)
    assert name == f"'{page.of('div')[0].attributes['id']}'" and "ColoredTokens" in component
    assert "<" not in data
    props = json.loads(data)
    assert props["values"] == values
    assert (props["minValue"], props["maxValue"]) == (-2.0, 2.0)
    for token, shown in zip(HOSTILE, props["tokens"], strict=False):
        inside = Page(f"<p>{shown}</p>")  # circuitsvis sets each as inner HTML
        assert [e.tag for e in inside.elements] == ["p"]
        expected = token if len(token) <= MAX_CHARS else f"{token[:MAX_CHARS]}…"
        assert inside.elements[0].text == expected
    assert "sourceMappingURL" not in html and not re.search(r"<script[^>]*src|unpkg", html)
    assert colored_tokens(["a"], [1.0]) != colored_tokens(["a"], [1.0])  # each in its own place
    with pytest.raises(ValueError, match="need a value for each of 2 tokens, got 1"):
        colored_tokens(["a", "b"], [1.0])
