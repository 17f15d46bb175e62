"""The feature browser in a real JupyterLab, in a real browser: it works, and text stays text.

`figures/01_browser.png` is taken where it is missing: delete it to have a new one.
"""

import contextlib
import json
from pathlib import Path

import pytest
import torch
from playwright.sync_api import Page, expect
from tokenizers import Tokenizer, models, pre_tokenizers
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

from lib import paths
from lib.dictionaries import Dictionary, DictionaryConfig
from lib.dictionaries.rules import TopK
from lib.latents.source import DictionarySource
from lib.latents.steering import scale
from lib.models.generate import answer
from tests import lab

pytestmark = [
    pytest.mark.slow,
    pytest.mark.skipif(lab.CHROMIUM is None, reason="needs chromium: apt-get install chromium"),
]
MODEL = paths.shipped_dir() / "models" / "tiny-gemma2"
DICTIONARY = paths.shipped_dir() / "saes" / "tiny-gemma2" / "topk"

LOAD = """
from IPython.display import HTML, display
from lib.data.corpus import load_corpus
from lib.dictionaries import Dictionary
from lib.display import FeatureBrowser, colored_tokens, concept_text, latent_text
from lib.latents import DictionarySource, record_of
from lib.models import load_model
model, tokenizer = load_model({model!r}, device="cpu")
source = DictionarySource(model, Dictionary.load({dictionary!r}))
record = record_of(source, load_corpus({dataset!r}, tokenizer, n_tokens=20_000, seq_len=64))
labels = {{}}
for latent in range(record.n_latents):
    for token in record.ids[record.top_examples(latent, 1)].tolist():
        labels[latent] = "fires on " + tokenizer.convert_ids_to_tokens(token)
"""
BROWSE = "FeatureBrowser(record, tokenizer, source=source, labels=labels, title='tiny-gemma2')"

ADAPTER = """
import torch
from lib.adapters import SaeLora, SaeLoraConfig
from lib.adapters.sae_lora.source import SaeLoraSource
from lib.data.corpus import load_corpus
from lib.dictionaries import Dictionary
from lib.display import FeatureBrowser
from lib.latents import record_of
from lib.models import load_model
model, tokenizer = load_model({!r}, device="cpu")
adapter = SaeLora(Dictionary.load({!r}), SaeLoraConfig())
adapter.scale.data.fill_(0.1)
source = SaeLoraSource(model, adapter, "write")
record = record_of(source, load_corpus("world", tokenizer, n_tokens=5_000, seq_len=64))
labels = {{latent: f"writes-{{latent}}." for latent in range(record.n_latents)}}
FeatureBrowser(record, tokenizer, source=source, labels=labels)
"""

RUNS = (
    "<script>window.pwned=1</script>",
    '</script><img src=x onerror="window.pwned=1">',
    "\"'><svg onload=window.pwned=1>",
    "<!--<script>--><img src=http://outside.invalid/x onerror=window.pwned=1>",
    "</option></select></textarea></style><iframe srcdoc='<script>parent.pwned=1</script>'>",
)
"""Each would set `window.pwned` in a page that holds it unescaped."""
HOSTILE = (
    *RUNS,
    "$\\href{javascript:window.pwned=1}{x^2}$",  # JupyterLab typesets mathematics
    "costs $5 or $6",
    "&lt;b&gt;&amp;amp;",
    "%s {0} ${1} \\u003c \\",
    "\u202eשלום",
    "👩‍👩‍👧 🏴‍☠️ é",
    "long" * 2_500,
)


FOREIGN = "script, img, iframe, input, a, [onload], [onerror], mjx-container"
"""What only hostile text could bring into a card, examples or an answer."""

# Everything else of lib.display that shows tokens in a notebook.
COLOURED = """
tokens = tokenizer.convert_ids_to_tokens(range(2, len(tokenizer)))
display(HTML(colored_tokens(tokens, [1.0] * len(tokens))))
display(HTML(latent_text([[(token, 1.0) for token in tokens]], tokens[0])))
display(HTML(concept_text([[(token, {tokens[1]}) for token in tokens]], [tokens[1]])))
"""


@pytest.fixture(scope="module")
def folder(tmp_path_factory) -> Path:
    """Where the notebooks stand."""
    return tmp_path_factory.mktemp("notebooks")


@pytest.fixture(scope="module")
def server(folder, tmp_path_factory):
    with contextlib.ExitStack() as stack:
        with pytest.MonkeyPatch.context() as patch:
            for name in ("DATA", "LORAS", "FIGURES", "RUNS"):  # what notebooks write
                written = tmp_path_factory.mktemp(name.lower())
                patch.setenv(f"LATENT_BENCH_{name}", str(written))
            home = tmp_path_factory.mktemp("jupyter")
            server = stack.enter_context(lab.jupyter_lab(folder, home))
        yield server


@pytest.fixture(scope="module")
def chromium():
    with lab.chromium() as browser:
        yield browser


@pytest.fixture
def page(chromium):
    """A page that must ask nothing of other machines, open no dialog and run no hostile text."""
    with lab.visit(chromium, height=1340) as (page, seen):
        yield page
        assert page.evaluate("typeof window.pwned") == "undefined"
    assert (seen.outside, seen.dialogs) == ([], [])
    assert seen.urls


def choose(page: Page, words: str) -> int:
    """Type into the search box, choose the first result, wait for its card; gives the latent."""
    page.locator(".fb-search input").fill(words)
    options = page.locator(".fb-results option")
    expect(options.filter(has_not_text=words[:70])).to_have_count(0)  # long labels are cut
    text = options.filter(has_text=words[:70]).first.inner_text()
    page.locator(".fb-results select").select_option(text)
    latent = text.split()[0]
    expect(page.locator(".fb-index input")).to_have_value(latent)
    expect(page.locator(".fb-card")).to_contain_text(f"Latent {latent}")
    return int(latent)


def test_the_browser_in_jupyterlab(server, folder, page, tmp_path, gemma, shipped_sae):
    about = {"model": str(MODEL), "dictionary": str(DICTIONARY), "dataset": "world"}
    lab.write_notebook(folder / "browser.ipynb", [LOAD.format(**about), BROWSE])
    lab.open_notebook(page, server, "browser.ipynb")
    lab.run_all(page)
    card, examples, reply = (page.locator(f".fb-{name}") for name in ("card", "examples", "answer"))
    first = examples.inner_text()

    latent = choose(page, "plus")
    expect(card).to_contain_text("fires on plus")
    expect(examples).to_contain_text("plus")
    assert examples.inner_text() != first and "plus" not in first

    chosen = card.inner_text()
    page.locator(".fb-next").click()
    expect(card).not_to_have_text(chosen, use_inner_text=True)
    page.locator(".fb-prev").click()
    expect(card).to_have_text(chosen, use_inner_text=True)

    prompt = "what is 2 plus 6 ?"
    page.locator(".fb-prompt textarea").fill(prompt)
    page.locator(".fb-run").click()
    (plain,) = answer(*gemma, [prompt])
    assert "8" in plain
    expect(reply).to_contain_text(plain)
    answers = {}
    for factor in (-5.0, 10.0):
        with DictionarySource(gemma[0], shipped_sae).edited({latent: scale(factor)}):
            (answers[factor],) = answer(*gemma, [prompt])
    assert len({plain, *answers.values()}) >= 2
    for share, factor in ((0.0, -5.0), (1.0, 10.0)):
        lab.click_slider(page.locator(".fb-slider"), share)
        expect(reply).to_contain_text(answers[factor])
        expect(reply).to_contain_text(plain)

    page.locator(".fb").evaluate("browser => browser.scrollIntoView()")
    picture = paths.figures_dir() / "01_browser.png"
    page.screenshot(path=tmp_path / "01_browser.png" if picture.exists() else picture)


def test_the_browser_of_an_adapter_in_jupyterlab(server, folder, page):
    """What a sparse adapter writes, in the prompt box too: the adapter stays attached."""
    lab.write_notebook(folder / "adapter.ipynb", [ADAPTER.format(str(MODEL), str(DICTIONARY))])
    lab.open_notebook(page, server, "adapter.ipynb")
    lab.run_all(page)
    examples, reply = (page.locator(f".fb-{name}") for name in ("examples", "answer"))
    first = examples.inner_text()
    choose(page, "writes-7.")
    expect(examples).not_to_have_text(first, use_inner_text=True)
    page.locator(".fb-prompt textarea").fill("what is 3 plus 4 ?")
    page.locator(".fb-run").click()
    expect(reply).to_contain_text("3 plus 4 is 7 .")
    before = reply.inner_text()
    lab.click_slider(page.locator(".fb-slider"), 1.0)
    expect(reply).not_to_have_text(before, use_inner_text=True)


@pytest.fixture(scope="module")
def hostile(tmp_path_factory) -> dict[str, str]:
    """A model that speaks only hostile tokens, a dictionary and a corpus, as files."""
    here = tmp_path_factory.mktemp("hostile")
    words = Tokenizer(models.WordLevel({w: i for i, w in enumerate(("<unk>", "<eos>", *HOSTILE))}))
    words.pre_tokenizer = pre_tokenizers.Split("\n", "removed")
    tokenizer = PreTrainedTokenizerFast(
        tokenizer_object=words, unk_token="<unk>", eos_token="<eos>"
    )
    torch.manual_seed(0)
    shape = {"hidden_size": 32, "intermediate_size": 64, "num_attention_heads": 2}
    config = LlamaConfig(**shape, vocab_size=len(tokenizer), num_hidden_layers=2)
    model = LlamaForCausalLM(config)
    model.generation_config.suppress_tokens = [0, 1]  # so that the answer is hostile too
    model.save_pretrained(here)
    tokenizer.save_pretrained(here)
    site = {"site_dims": (32,), "hook_names": ("blocks.0.hook_resid_post",)}
    Dictionary(DictionaryConfig(**site, d_sae=256, rule=TopK(k=4))).save(here / "dictionary")
    rows = [[HOSTILE[i] for i in torch.randperm(len(HOSTILE))] for _ in range(50)]
    lines = [json.dumps({"text": "\n".join(row)}) for row in rows]
    (here / "corpus.jsonl").write_text("\n".join(lines))
    files = {"model": here, "dictionary": here / "dictionary", "dataset": here / "corpus.jsonl"}
    return {name: str(path) for name, path in files.items()}


@pytest.mark.parametrize("text", RUNS)
def test_hostile_text_runs_where_it_is_not_escaped(chromium, tmp_path, text):
    """Or the tests below would prove nothing."""
    (tmp_path / "raw.html").write_text(f"<p>{text}</p>")
    with lab.visit(chromium) as (page, _):
        page.goto((tmp_path / "raw.html").as_uri())
        page.wait_for_function("window.pwned === 1")


def require_text(page: Page, name: str, tokens: tuple[str, ...]) -> None:
    """The part `name` of the browser shows these tokens to the letter, and no element of theirs."""
    part = page.locator(f".fb-{name}")
    for token in tokens:
        expect(part).to_contain_text(token[:150])  # longer ones are cut
    assert part.locator(FOREIGN).count() == 0


def test_hostile_text_in_jupyterlab(server, folder, page, hostile):
    """The page's fixture asserts that nothing ran and nothing was fetched."""
    named = f"FeatureBrowser(record, tokenizer, source=source, labels=labels, title={RUNS[0]!r}"
    orders = f", orders={{{RUNS[1]!r}: record.firing_rate()}})"
    cells = [LOAD.format(**hostile), named + orders, COLOURED, "HTML('<p id=typeset>$x^2$</p>')"]
    lab.write_notebook(folder / "hostile.ipynb", cells)
    lab.open_notebook(page, server, "hostile.ipynb")
    lab.run_all(page)
    require_text(page, "examples", HOSTILE)
    for token in HOSTILE:
        choose(page, token)
        require_text(page, "card", (token,))
    page.locator(".fb-order select").select_option(RUNS[1])

    page.locator(".fb-prompt textarea").fill("\n".join(HOSTILE))
    page.locator(".fb-run").click()
    expect(page.locator(".fb-answer")).to_contain_text("unchanged")
    require_text(page, "answer", HOSTILE)
    reply = page.locator(".fb-answer p").first.inner_text()
    assert any(token[:30] in reply for token in HOSTILE)

    page.locator(".fb-search input").fill(f"~{RUNS[0]}")
    expect(page.locator(".fb-message")).to_contain_text(RUNS[0])
    expect(page.locator("#typeset mjx-container")).to_be_attached()  # the last of all outputs
    assert page.locator(f":is(.fb-examples, .fb-card, .fb-answer) :is({FOREIGN})").count() == 0
    outputs = page.locator(".jp-CodeCell").nth(2).locator(".jp-RenderedHTMLCommon")
    expect(outputs).to_have_count(3)
    for output in outputs.all():
        for token in HOSTILE:
            expect(output).to_contain_text(token[:150])
        assert output.locator("img, iframe, input, a, mjx-container").count() == 0


def test_hostile_text_in_a_page_of_its_own(page, hostile, tmp_path):
    names = {}
    exec(LOAD.format(**hostile), names)
    parts = {name: names[name] for name in ("record", "tokenizer", "source", "labels")}
    browser = names["FeatureBrowser"](**parts, title=RUNS[1])
    page.goto(browser.to_html(tmp_path / "page.html").as_uri())
    assert page.title() == RUNS[1]
    for name in ("main", "nav"):
        for token in HOSTILE:
            expect(page.locator(name)).to_contain_text(token[:80])
