"""What methods of diffing find, and how it is scored against what was planted."""

import copy
import itertools
import math

import pandas as pd
import plotly.graph_objects as go
import pytest
import torch

from lib import paths
from lib.activations.harvest import HarvestConfig, Harvester
from lib.activations.pair import Pair
from lib.analysis.diffing import (
    Finding,
    Truth,
    amplified,
    answer_difference,
    behaviour_mass,
    causal,
    delta_attribution,
    false_alarms,
    gap_closed,
    output_difference,
    what,
    where,
)
from lib.analysis.diffing import findings as of
from lib.analysis.diffing.answers import mined_topics, nonnegative_factors
from lib.analysis.diffing.methods import SIMPLE, simple
from lib.analysis.diffing.planted import named_by_chance
from lib.analysis.diffing.trained import plans, ranked, trained
from lib.dictionaries import Dictionary, FitConfig, fit, recipes
from lib.display import gap_bars, relative_norms, scaling_plane, token_scores, write_report
from lib.display.figures.diffing import DIFFING_COLOURS
from lib.latents import collect
from lib.models import load_model
from lib.models.generate import answer
from lib.world.differences import planted_chats, take

SITE = "blocks.2.hook_resid_post"
PLANTED = ("invented", "badge", "french", "shouting")


@pytest.fixture(scope="module")
def tuned():
    return load_model(paths.shipped_dir() / "models" / "tiny-gemma2-planted", device="cpu")[0]


@pytest.fixture(scope="module")
def truth(rewriter, gemma):
    chats = take(planted_chats(rewriter, PLANTED, split="test", seed=3), 150)
    return Truth.of(chats, PLANTED, gemma[1])


def pair_of(a, b, corpus):
    config = HarvestConfig(hook_names=(SITE,), batch_rows=64, skip_special=False)
    return Pair(Harvester([a, b], corpus, config), keep=True)


def test_factors_of_a_sum_of_two_patterns():
    generator = torch.Generator().manual_seed(0)
    topics = torch.zeros(2, 12)
    topics[0, :4], topics[1, 6:9] = 1.0, 2.0
    weights = torch.rand(40, 2, generator=generator)
    weights[:20, 1] = weights[20:, 0] = 0
    loadings, found = nonnegative_factors(weights @ topics, 2, n_iterations=300)
    torch.testing.assert_close(loadings @ found, weights @ topics, atol=1e-2, rtol=1e-2)
    assert (loadings[:20, 1] < 1e-2).all() or (loadings[:20, 0] < 1e-2).all()
    excess = torch.zeros(40, 50)
    excess[:, 10:22] = weights @ topics
    _, words = mined_topics(excess, 2, n_words=3)
    assert {*words[0].tolist()} == {16, 17, 18} and {*words[1].tolist()} < {10, 11, 12, 13}
    for x, k in ((weights, 0), (-weights, 1), (torch.zeros(2, 2), 1)):
        with pytest.raises(ValueError, match="to factor"):
            nonnegative_factors(x, k)


def test_the_word_that_only_b_says_comes_first(gemma):
    tokenizer = gemma[1]
    before, after = ["the cow is black ."] * 50, ["the cow is black . !"] * 40 + ["no ."] * 10
    found = answer_difference(tokenizer, before, after)
    bang, cow = tokenizer.convert_tokens_to_ids(["!", "cow"])
    assert found[0][0] == bang and found[0][1] > 4
    scores = dict(found)
    assert scores[cow] < 0 and scores[tokenizer.convert_tokens_to_ids(".")] == 0
    p, q = 0.5 / 51, 40.5 / 51
    pooled = (p + q) / 2
    assert math.isclose(scores[bang], (q - p) / math.sqrt(2 * pooled * (1 - pooled) / 51))
    with pytest.raises(ValueError, match="as many answers of both"):
        answer_difference(tokenizer, before, after[:3])


def test_amplified_answers_do_not_depend_on_who_else_is_asked(gemma, tuned, truth):
    a, tokenizer = gemma
    prompts = truth.prompts(12)
    assert amplified(a, tuned, tokenizer, prompts, alpha=0.0) == answer(
        tuned, tokenizer, prompts, max_new_tokens=32
    )
    together = amplified(a, tuned, tokenizer, prompts, alpha=2.0)
    alone = [amplified(a, tuned, tokenizer, [prompt], alpha=2.0)[0] for prompt in prompts]
    assert together == alone
    loud = [prompt for prompt, row in zip(truth.prompts(150), truth.rows, strict=True) if row == 4]

    def shouted(alpha: float) -> int:
        texts = amplified(a, tuned, tokenizer, loud, alpha=alpha)
        return sum(text.isupper() for text in texts)

    assert shouted(2.0) >= shouted(0.0) > shouted(-1.0)


def test_attribution_is_the_derivative_of_the_gap(gemma, tuned, truth):
    a, corpus = gemma[0], truth.corpus.rows(0, 20)
    torch.manual_seed(0)
    recipe = recipes.topk(k=8)
    d = Dictionary(recipe.dictionary(d_sae=64, site_dims=(128, 128))).eval()
    scores = delta_attribution(d, a, tuned, SITE, corpus, batch_rows=7)
    n = int((corpus.mask[:, 1:] & corpus.mask[:, :-1]).sum())
    size = output_gap(a, tuned, corpus)
    for latent in (scores.argmax().item(), scores.argmin().item()):
        eps = 0.02

        def nudged(x_a, x_b, latent=latent, sign=1.0, eps=eps):
            z = d.encode(torch.cat([x_a, x_b], 1))[:, [latent]]
            apart = d.W_dec[latent, 128:] - d.W_dec[latent, :128]
            return x_a + sign * eps * z * apart

        moves = [nudged, lambda x_a, x_b, f=nudged: f(x_a, x_b, sign=-1.0)]
        up, down = gap_closed(a, tuned, SITE, corpus, moves)
        slope = (up - down) * size / (2 * eps) / n
        assert scores[latent].item() == pytest.approx(slope, rel=0.05, abs=1e-6)
    with pytest.raises(ValueError, match="two sites of one width"):
        delta_attribution(
            Dictionary(recipe.dictionary(d_sae=64, site_dims=(128,))), a, tuned, SITE, corpus
        )


@torch.no_grad()
def output_gap(a, b, corpus) -> float:
    """Nats that b's upper layers lose on a's activations, all predictions together."""
    total = []

    mixed = copy.deepcopy(a)
    for i in range(3, len(b.model.layers)):
        mixed.model.layers[i] = b.model.layers[i]
    mixed.model.norm, mixed.lm_head = b.model.norm, b.lm_head
    for row, mask in zip(corpus.ids, corpus.mask, strict=True):
        ids = row[mask][None].long()
        p = b(input_ids=ids).logits[0, :-1].double().log_softmax(1)
        q = mixed(input_ids=ids).logits[0, :-1].double().log_softmax(1)
        total.append((p.exp() * (p - q)).sum().item())
    return sum(total)


def test_all_of_the_difference_closes_the_gap_both_ways(gemma, tuned, truth):
    def all_of_it(x_a, x_b):
        return x_b

    def nothing(x_a, x_b):
        return x_a

    corpus, counted = truth.only(1, 20)
    for back in (False, True):
        shares = gap_closed(
            gemma[0], tuned, SITE, corpus, [all_of_it, nothing], counted=counted, back=back
        )
        assert shares == pytest.approx([1.0, 0.0], abs=1e-4)


def test_truth_knows_the_tokens_words_and_concepts(gemma, truth):
    tokenizer = gemma[1]
    assert truth.concepts("french") == {"topic:mathematics", "language:french"}
    assert truth.concepts("shouting") == {"topic:cooking", "style:shouting", "upper_case"}
    assert truth.concepts("invented") == {"topic:music"}
    words = {name: tokenizer.convert_ids_to_tokens(sorted(truth.words(name))) for name in PLANTED}
    assert {"AND", "APPLES"} <= set(words["shouting"]) and "!" not in words["shouting"]
    assert all(w != "." for name in PLANTED for w in words[name])
    own = truth.of_token > 0
    finding = Finding(method="", access="", scores=own.float() + torch.rand(len(own)) / 2)
    assert where(finding, truth) == {"auc": 1.0, "precision": 1.0}
    assert where(Finding(method="", access=""), truth) == {}
    loud = tokenizer.convert_tokens_to_ids(["APPLES"])
    named = Finding(method="", access="", words=loud, concepts=["food", "language:french"])
    assert 0 < named_by_chance(truth) < 2
    assert what(named, truth) == ["french", "shouting"]
    assert what(named, truth, n_concepts=1) == ["shouting"]


def test_false_alarms_are_findings_as_strong_as_the_last_one():
    usual = Finding(method="", access="", strength=[5.0, 3.0, 2.0])
    assert false_alarms(usual, Finding(method="", access="", strength=[4.0, 2.0, 1.0])) == 2
    null = Finding(method="", access="", decides=True, latents=torch.arange(4))
    assert false_alarms(usual, null) == 4


@pytest.mark.slow
def test_every_method_runs_and_finds_where(gemma, tuned, truth, tmp_path):
    a, tokenizer = gemma
    held = pair_of(a, tuned, truth.corpus)
    found = simple(SIMPLE, a, tuned, tokenizer, held, truth.corpus, truth.prompts(60))
    assert list(found) == list(SIMPLE)
    for name in ("outputs", "streams"):
        assert where(found[name].finding, truth)["auc"] > 0.9, name
    assert {"invented", "shouting"} <= set(what(found["answers"].finding, truth))
    shape = {"d_sae": 128, "k": 8, "exclusive": 0.1}
    made = plans(["crosscoder", "dfc", "difference", "stage"], held, **shape)
    config = FitConfig(n_steps=40, lr=4e-3, dead_after=20_000)
    models = (a, tuned, SITE)
    options = {"batch_size": 256, "models": models, "progress": False}
    found |= trained(made, held, held, truth.corpus, config, **options)
    assert set(found) == {*SIMPLE, *made, "attribution"}
    assert found["dfc"].dictionary.integrity() == 0
    record = found["difference"].record
    mass = behaviour_mass(record, truth)
    assert mass.min() >= 0 and mass.sum(1).max() <= 1.00001
    movable = [it for it in found.values() if it.record or it.finding.directions is not None]
    shares = causal([(it.finding, it.record) for it in movable], truth, *models, n_rows=8)
    for it, row in zip(movable, shares, strict=True):
        if it.finding.directions is not None and len(it.finding.directions) == 10:
            assert row["mean"] > 0.3
        if it.finding.method == "SAE of the difference":
            assert row["mean"] > 0.2 and row["mean"] > 4 * row["random"]
    readings = {"crosscoder": found["crosscoder"].reading}
    pictures = [
        relative_norms(readings),
        scaling_plane(readings["crosscoder"], {0: "<b>$x$"}, mass[:, 0] > 0.5),
        gap_bars({"<i>": shares[0]}, PLANTED, "title"),
        token_scores({"KL": found["outputs"].finding.scores}, truth.of_token > 0),
    ]
    assert all(isinstance(picture, go.Figure) for picture in pictures)
    drawn = {
        it.finding.method
        for it in found.values()
        if it.finding.move or it.finding.scores is not None
    }
    assert drawn <= set(DIFFING_COLOURS)  # a method keeps its colour


def test_nothing_is_found_between_equal_models(gemma, truth):
    a, tokenizer = gemma
    with pytest.warns(UserWarning, match="equal at every token"):
        held = pair_of(a, copy.deepcopy(a), truth.corpus)
    ways = ["answers", "outputs", "topics", "streams", "positions"]
    found = simple(ways, a, a, tokenizer, held, truth.corpus, truth.prompts(8))
    assert all(max(it.finding.strength, default=0.0) == 0 for it in found.values())
    assert all(it.finding.directions is None for it in found.values())


def test_unknown_methods_are_refused_before_work(gemma, tuned, truth):
    held = pair_of(gemma[0], tuned, truth.corpus)
    with pytest.raises(ValueError, match="need methods of answers, .*; got telepathy"):
        simple(["telepathy"], gemma[0], tuned, gemma[1], held, truth.corpus, ["a"])
    with pytest.raises(ValueError, match="need methods of crosscoder, .*; got sae"):
        plans(["sae"], held, d_sae=64, k=4)
    with pytest.raises(ValueError, match="shared"):
        plans(["dfc"], held, d_sae=64, k=4, exclusive=0.5)


def test_training_goes_on_from_a_dictionary():
    torch.manual_seed(0)
    x = torch.randn(2000, 12) * 3 + 1
    stream = list(x.split(100))
    recipe = recipes.topk(k=4)
    plan = {"d": (recipe.dictionary(d_sae=32, site_dims=(12,)), recipe)}
    first = fit(plan, itertools.cycle(stream), FitConfig(n_steps=60, lr=1e-2), progress=False)
    before = first["d"].dictionary
    still = FitConfig(n_steps=1, lr=1e-12)
    after = fit(plan, stream, still, begin={"d": before}, progress=False)["d"].dictionary
    torch.testing.assert_close(after(x), before(x), rtol=1e-4, atol=1e-4)
    with pytest.raises(ValueError, match="got none for \\['other'\\]"):
        fit(plan, stream, still, begin={"other": before}, progress=False)
    wider = recipe.dictionary(d_sae=64, site_dims=(12,))
    with pytest.raises(ValueError, match="d: need d_sae 32"):
        fit({"d": (wider, recipe)}, stream, still, begin={"d": before}, progress=False)


def test_latents_are_named_by_what_they_fire_on(gemma, tuned, truth):
    held = pair_of(gemma[0], tuned, truth.corpus)
    torch.manual_seed(0)
    recipe = recipes.topk(k=4)
    d = Dictionary(recipe.dictionary(d_sae=32, site_dims=(128,))).eval()
    blocks = list(held.blocks())
    for block in blocks:
        block.acts = block.acts[:, 256:]
    record = collect(d.encode_sparse, blocks, truth.corpus)
    order = torch.arange(32.0)
    finding = of.of_latents("m", record, truth.corpus, order, torch.tensor([31, 30]), None)
    dense = d.encode(torch.cat([b.acts for b in blocks]))
    torch.testing.assert_close(finding.scores, dense[:, [30, 31]].sum(1), rtol=1e-4, atol=1e-4)
    assert finding.strength == [31.0, 30.0]
    ids = truth.corpus.ids[truth.corpus.mask]
    mass = torch.zeros(int(ids.max()) + 1).index_add_(0, ids.long(), dense[:, 31].detach())
    assert finding.words[0] == mass.argmax()


def test_excess_is_of_the_tokens_with_most_kl(gemma, tuned, truth):
    found = output_difference(gemma[0], tuned, truth.corpus, n_top=20, batch_rows=32)
    assert found.top.tolist() == found.kl.topk(20).indices.tolist()
    assert (found.excess.sum(1) >= found.kl[found.top] - 1e-4).all()


def test_a_report_is_inert_and_fetches_nothing(tmp_path):
    table = pd.DataFrame({"<b>column": ["<script>alert(1)</script>"]})
    figure = go.Figure(go.Scatter(x=[1], y=[2]))
    parts = [("<i>head", "one\n\n<script>two"), ("", table), ("figure", figure)]
    text = write_report(tmp_path / "r.html", "</title><script>", parts).read_text()
    body = text[text.index("<body>") :]
    assert "<script>alert" not in body and "<script>two" not in body and "<i>head" not in body
    assert "<p>one</p>" in body and "<script src" not in text and "cdn.plot.ly" not in body
    assert "<title>&lt;/title&gt;" in text


def test_a_latent_that_b_alone_has_comes_first(gemma, tuned, truth):
    """Two hand-made latents: one is written at b and read there, the other at both."""
    held = pair_of(gemma[0], tuned, truth.corpus)
    recipe = recipes.standard()
    config = recipe.dictionary(
        d_sae=2, site_dims=(128, 128), hook_names=("a", "b"), unit_norm_decoder=False
    )
    d = Dictionary(config).eval()
    x = torch.cat([block.acts for block in held.blocks()])
    own, shared = (x[:, 128:256] - x[:, :128]).mean(0), x[:, :128].mean(0)
    own = own - (own @ shared) / (shared @ shared) * shared
    with torch.no_grad():
        d.W_dec.zero_(), d.W_enc.zero_()
        d.W_dec[0, 128:] = own / own.norm()
        d.W_enc[128:, 0] = own / own.norm()
        d.W_enc[:128, 0] = -own / own.norm()
        for site in (slice(0, 128), slice(128, 256)):
            d.W_dec[1, site] = shared / shared.norm()
            d.W_enc[site, 1] = shared / shared.norm() / 2
    found = ranked("crosscoder", d, held, truth.corpus)
    assert found.finding.order.argmax() == 0
    assert found.reading.relative_norm[0] == 1 and found.reading.relative_norm[1] == 0.5
    latents = torch.tensor([0])
    x_a, x_b = x[:, :128], x[:, 128:256]
    moved = found.finding.move(latents)(x_a, x_b) - x_a
    z = ((x_b - x_a) @ own / own.norm()).clamp(min=0)
    torch.testing.assert_close(moved, z[:, None] * own / own.norm(), rtol=1e-3, atol=1e-4)
