"""Methods and scores of model diffing, on two small random models that differ where we say."""

import copy

import pytest
import torch

from lib.activations.harvest import HarvestConfig, Harvester
from lib.activations.source import Block
from lib.analysis.diffing import (
    auc,
    concept_ranking,
    gap_closed,
    output_difference,
    precision_at,
    stream_difference,
)
from lib.analysis.diffing.streams import lens
from lib.data.corpus import load_corpus
from lib.models.tiny import TinyConfig, build_model
from lib.models.unembed import unembedding
from lib.world import CONCEPTS, build_tokenizer

SITE = "blocks.1.hook_resid_post"


@pytest.fixture(scope="module")
def pair(world):
    """b adds a direction to what block 1 writes, scaled by what the token is."""
    tokenizer = build_tokenizer(world)
    torch.manual_seed(0)
    a = build_model(TinyConfig(architecture="llama", d_model=32, n_layers=3, d_mlp=48), tokenizer)
    a.eval()
    b = copy.deepcopy(a)
    with torch.no_grad():
        b.model.layers[1].mlp.down_proj.weight.add_(
            torch.outer(torch.ones(32), torch.randn(48)), alpha=0.5
        )
    corpus = load_corpus("world", tokenizer, n_tokens=1_500, seq_len=64, split="test")
    return a, b, corpus


def blocks(models, corpus):
    config = HarvestConfig(hook_names=(SITE,), batch_rows=16, skip_special=False)
    source = Harvester(models, corpus, config)
    return [source.block(i) for i in range(source.n_blocks)]


def test_kl_and_its_split_are_those_of_the_logits(pair):
    a, b, corpus = pair
    found = output_difference(a, b, corpus, batch_rows=7)
    assert len(found.kl) == corpus.n_tokens
    row = corpus.ids[:1].long()[:, : int(corpus.mask[0].sum())]
    with torch.no_grad():
        p, q = (m(input_ids=row).logits[0].double().log_softmax(1) for m in (a, b))
    n = row.shape[1]
    right = (q.exp() * (q - p)).sum(1)[:-1]
    torch.testing.assert_close(found.kl[1:n].double(), right, rtol=1e-3, atol=1e-6)
    assert found.by_word.sum().item() == pytest.approx(found.kl.sum().item(), rel=1e-3)
    assert found.kl[0] == 0 and found.kl.min() > -1e-6
    assert output_difference(a, a, corpus).kl.abs().max() < 1e-6


def test_the_planted_direction_is_the_first_component(pair):
    a, b, corpus = pair
    found = stream_difference(blocks([a, b], corpus), n_components=4)
    planted = torch.full((32,), 32**-0.5)
    assert (found.components[0] @ planted).abs() > 0.999 and found.energy[0] > 0.99
    assert len(found.size) == corpus.n_tokens and (found.components @ found.mean > -1e-6).all()
    torch.testing.assert_close(
        found.components @ found.components.T, torch.eye(4), atol=1e-4, rtol=0
    )
    x = torch.cat([block.acts for block in blocks([a, b], corpus)])
    torch.testing.assert_close(found.mean, (x[:, 32:] - x[:, :32]).mean(0))
    first = x[torch.cat([block.positions for block in blocks([a, b], corpus)]) == 2]
    torch.testing.assert_close(found.by_position[2], (first[:, 32:] - first[:, :32]).mean(0))
    plain = HarvestConfig(hook_names=(SITE,), batch_rows=16)  # without special tokens
    source = Harvester([a, b], corpus, plain)
    left = stream_difference(source.block(i) for i in range(source.n_blocks)).by_position
    assert left.shape == (5, 32) and left[0].isnan().all() and not left[2].isnan().any()
    rows = unembedding(b)
    assert lens(rows[17], rows, 1).item() == (rows @ rows[17]).argmax().item()
    with pytest.raises(ValueError, match="models that differ"):
        stream_difference(blocks([a, a], corpus))
    none = torch.zeros(0, dtype=torch.long)
    with pytest.raises(ValueError, match="need a token"):
        stream_difference([Block(torch.zeros(0, 64), none, none, none)])


def test_the_gap_closes_with_what_is_handed_over(pair):
    a, b, corpus = pair
    direction = torch.full((32,), 32**-0.5)

    def along(x_a, x_b):
        return x_a + ((x_b - x_a) @ direction)[:, None] * direction

    moves = [
        lambda x_a, x_b: x_b,
        lambda x_a, x_b: x_a,
        along,
        lambda x_a, x_b: x_a - 2 * (x_b - x_a),
    ]
    everything, nothing, most, wrong = gap_closed(a, b, SITE, corpus, moves, batch_rows=9)
    assert everything == pytest.approx(1, abs=1e-6) and nothing == pytest.approx(0, abs=1e-6)
    assert 0.9 < most <= 1 and wrong < 0
    one = torch.zeros_like(corpus.mask)
    one[3, 5] = True
    (alone,) = gap_closed(a, b, SITE, corpus, [along], counted=one)
    assert alone != most
    with pytest.raises(ValueError, match="models differ"):
        gap_closed(a, a, SITE, corpus, [along])


def test_scores_against_counting():
    generator = torch.Generator().manual_seed(0)
    scores = torch.randint(0, 8, (200,), generator=generator).float()
    truth = torch.rand(200, generator=generator) < 0.3
    pairs = scores[truth][:, None] - scores[~truth]
    right = ((pairs > 0).double() + 0.5 * (pairs == 0)).mean().item()
    assert auc(scores, truth) == pytest.approx(right)
    assert auc(truth.float(), truth) == 1 and auc(torch.zeros(200), truth) == 0.5
    assert precision_at(5, truth.float(), truth) == 1
    with pytest.raises(ValueError, match="both kinds"):
        auc(scores, torch.ones(200, dtype=torch.bool))


def test_the_concept_under_the_score_comes_first(pair):
    corpus = pair[2]
    concepts = corpus.concepts[corpus.mask]
    bit = CONCEPTS.index("operator")
    on = (concepts >> bit & 1).bool()
    scores = on + 0.3 * torch.rand(len(on), generator=torch.Generator().manual_seed(0))
    (first, value), *_ = concept_ranking(scores, concepts)
    assert first == "operator" and value > 0.7
    away = dict(concept_ranking(1.5 - scores, concepts))
    assert away["operator"] == min(away.values()) < -0.7
