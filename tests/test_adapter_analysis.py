"""What an adapter reads and writes is found where it was planted."""

import dataclasses
from contextlib import nullcontext

import pytest
import torch
from tokenizers import Tokenizer
from tokenizers.models import WordLevel
from transformers import PreTrainedTokenizerFast

from lib.adapters.sae_lora.adapter import SaeLora
from lib.adapters.sae_lora.config import SaeLoraConfig
from lib.analysis.attribution import (
    concentration,
    logit_attribution,
    pathways,
    promoted,
    read,
    sentence,
    suppressed,
    written,
)
from lib.analysis.causal import causal_check, on_random_latents, without
from lib.analysis.labels import Label, chance, concept_labels, concept_mass, token_text
from lib.dictionaries import Dictionary, SparseActs, recipes
from lib.latents import LatentRecord
from lib.world import CONCEPTS

D, D_SAE, SITE = 128, 60, "blocks.1.hook_resid_post"
NUMBER, FRENCH = CONCEPTS.index("number"), CONCEPTS.index("language:french")
ON_NUMBERS, EVERYWHERE, ON_ONE_TOKEN, DEAD, HALF_OF_FRENCH = range(5)


def random(*shape: int, seed: int = 0) -> torch.Tensor:
    return torch.rand(shape, generator=torch.Generator().manual_seed(seed))


def recorded(dense, concepts=None, ids=None, length: int = 10) -> LatentRecord:
    n, acts = len(dense), SparseActs.of(dense)
    rows, positions = torch.arange(n).int() // length, torch.arange(n).int() % length
    ids = (torch.arange(n) % 50 if ids is None else ids).int()
    text = (rows, positions, ids, torch.arange(0, n + 1, length))
    pairs = (acts.indices.int(), acts.values, acts.offsets, acts.n_latents)
    return LatentRecord(*pairs, ids, *text, concepts)


@pytest.fixture(scope="module")
def table() -> torch.Tensor:
    """Concepts of 1,000 tokens: numbers are rare, half is French, the others are noise."""
    table = random(1000, len(CONCEPTS)) < 0.05
    table[:, NUMBER] = torch.arange(1000) % 50 < 4
    table[:, FRENCH] = random(1000, seed=1) < 0.5
    return table


@pytest.fixture(scope="module")
def dense(table) -> torch.Tensor:
    x = torch.zeros(1000, 9)
    x[:, ON_NUMBERS] = table[:, NUMBER] * (1 + random(1000, seed=2))
    x[:, EVERYWHERE] = random(1000, seed=3) * (random(1000, seed=4) < 0.9)
    x[:, ON_ONE_TOKEN] = 1.0 * (torch.arange(1000) % 50 == 30)
    x[:, HALF_OF_FRENCH] = table[:, FRENCH] * (random(1000, seed=5) - 0.5).clamp(min=0)
    x[:, 5:] = (random(1000, 4, seed=6) - 0.5) * (random(1000, 4, seed=7) < 0.1)
    return x


@pytest.fixture(scope="module")
def record(dense, table) -> LatentRecord:
    bits = 2 ** torch.arange(len(CONCEPTS))
    return recorded(dense, (table.long() * bits).sum(1))


def test_planted_concepts_are_found(record):
    labels = concept_labels(record)
    assert sorted(labels) == [0, 1, 2, 4, 5, 6, 7, 8]  # all but the dead one
    assert labels[ON_NUMBERS].concept == "number" and labels[ON_NUMBERS].f1 == 1
    assert labels[HALF_OF_FRENCH].concept == "language:french"
    assert labels[EVERYWHERE].concept == ""  # its F1 for French is 0.65 by chance alone
    assert (labels[ON_ONE_TOKEN].concept, labels[ON_ONE_TOKEN].tokens) == ("", (30,))
    assert concept_labels(record, min_f1=1.0)[HALF_OF_FRENCH].concept == ""
    assert all(label.latent == latent for latent, label in labels.items())


def test_concepts_by_brute_force(record, dense, table):
    """Cohen's kappa of every latent and concept, from the four counts."""
    for latent, label in concept_labels(record, min_f1=0.0).items():
        fires, kappas, f1 = dense[:, latent] != 0, [], []
        for c in range(len(CONCEPTS)):
            agree = (fires == table[:, c]).double().mean()
            p, q = fires.double().mean(), table[:, c].double().mean()
            by_chance = p * q + (1 - p) * (1 - q)
            kappas.append(float((agree - by_chance) / (1 - by_chance)))
            both = (fires & table[:, c]).sum()
            f1.append(float(2 * both / (fires.sum() + table[:, c].sum())))
        best = max(range(len(CONCEPTS)), key=kappas.__getitem__)
        assert (label.concept, label.f1) == (CONCEPTS[best], pytest.approx(f1[best]))


def test_tokens_are_those_with_most_mass(record, dense):
    for latent, label in concept_labels(record).items():
        mass = torch.zeros(50).index_add_(0, record.ids.long(), dense[:, latent].abs())
        order = mass.argsort(descending=True)[:3]
        expected = [int(i) for i in order if mass[i] >= 0.1 * mass[order[0]]]
        assert list(label.tokens) == expected, latent
    uneven = torch.tensor([[5.0], [-9.0], [0.4], [4.0], [3.0], [-0.5]])
    ids = torch.tensor([7, 8, 9, 7, 6, 9])
    (label,) = concept_labels(recorded(uneven, ids=ids, length=6)).values()
    assert label.tokens == (7, 8, 6) and (label.concept, label.f1) == ("", 0)
    faint = recorded(torch.tensor([[5.0], [0.4]]), ids=torch.tensor([3, 4]), length=2)
    assert concept_labels(faint)[0].tokens == (3,)
    assert concept_labels(recorded(torch.zeros(4, 3), length=2)) == {}


def test_texts_of_labels_and_tokens(gemma):
    _, tokenizer = gemma
    plus, minus = tokenizer.convert_tokens_to_ids(["plus", "minus"])
    label = Label(3, "operator", 0.9, (plus, minus))
    assert label.text(tokenizer) == "operator · plus, minus"
    assert label.name(tokenizer) == "operator"
    plain = Label(3, "", 0.1, (minus,))
    assert plain.text(tokenizer) == plain.name(tokenizer) == "minus"
    vocabulary = {" le": 0, "\n\n": 1, " ": 2, "": 3, "a b": 4}
    words = PreTrainedTokenizerFast(tokenizer_object=Tokenizer(WordLevel(vocabulary, "")))
    assert [token_text(words, i) for i in range(5)] == ["le", "↵↵", "␣", "", "a b"]


def test_mass_on_a_concept(record, dense, table):
    mass = dense.abs()
    for c in (NUMBER, FRENCH):
        expected = (mass * table[:, [c]]).sum(0) / mass.sum(0)
        found = concept_mass(record, CONCEPTS[c])
        torch.testing.assert_close(found, expected.nan_to_num(0))
        assert chance(record, CONCEPTS[c]) == pytest.approx(float(table[:, c].float().mean()))
    assert found[DEAD] == 0 and concept_mass(record, "number")[ON_NUMBERS] == 1
    with pytest.raises(ValueError, match="need a concept of .*CONCEPTS, got 'numbers'"):
        concept_mass(record, "numbers")
    plain = dataclasses.replace(record, concepts=None)
    for function in (concept_mass, chance):
        with pytest.raises(ValueError, match="need a record with concepts"):
            function(plain, "number")


@pytest.fixture(scope="module")
def dictionary() -> Dictionary:
    torch.manual_seed(0)
    recipe = recipes.standard()
    return Dictionary(recipe.dictionary(site_dims=(D,), d_sae=D_SAE, hook_names=(SITE,)))


def planted(
    dictionary: Dictionary, reads: list[dict[int, float]], writes: list[dict[int, float]], scale
) -> SaeLora:
    """An adapter of these weights, which are normalised; a dict for each rank."""
    adapter = SaeLora(dictionary, SaeLoraConfig(hook_name=SITE, rank=len(reads)))
    sides = (
        (adapter.lora_A, adapter.read_mask, reads),
        (adapter.lora_B.T, adapter.write_mask, writes),
    )
    with torch.no_grad():
        for raw, mask, weights in sides:
            raw.zero_(), mask.zero_()
            for rank, by_latent in enumerate(weights):
                for latent, weight in by_latent.items():
                    raw[rank, latent], mask[latent] = weight, 1
        adapter.scale.copy_(torch.tensor(scale))
    return adapter


@pytest.fixture(scope="module")
def adapter(dictionary) -> SaeLora:
    """Reads 3 and 5, writes 7 up and 9 down."""
    return planted(dictionary, [{3: 4.0, 5: 3.0}], [{7: 0.6, 9: -0.8}], [20.0])


def test_concentration():
    one = torch.zeros(50, 1)
    one[7] = -2.0
    found = concentration(one)
    assert found.participation == found.n_nonzero == found.n_over_1_percent == found.top_10 == 1
    even = concentration(torch.ones(50, 2))
    assert even.participation == pytest.approx(50) and even.top_10 == pytest.approx(0.2)
    assert (even.n_nonzero, even.n_over_1_percent) == (50, 50)
    faint = torch.tensor([[1.0, 0.0], [0.0, 0.011], [0.009, 0.0], [0.0, 0.0]])
    found = concentration(faint)
    assert (found.n_nonzero, found.n_over_1_percent) == (3, 2)
    ranks = torch.tensor([[3.0, 4.0], [5.0, 0.0]])  # of equal norm over ranks
    assert concentration(ranks).participation == pytest.approx(2)
    for bad in (torch.zeros(4, 1), torch.full((4, 1), torch.nan)):
        with pytest.raises(ValueError, match="need finite weights that are not all zero"):
            concentration(bad)


@pytest.mark.parametrize("flips", [(1, 1, 1), (-1, -1, 1), (-1, 1, -1), (1, -1, -1)])
def test_signs_do_not_depend_on_how_they_are_spread(dictionary, flips):
    a, b, s = flips
    one = planted(dictionary, [{3: a * 4.0, 5: a * 3.0}], [{7: b * 0.6, 9: -b * 0.8}], [s * 20.0])
    (path,) = pathways(one)
    assert path.scale == 20 and path.read[[3, 5]].tolist() == pytest.approx([0.8, 0.6])
    assert path.write[[7, 9]].tolist() == pytest.approx([0.6, -0.8])
    assert read(one)[[3, 5, 7]].tolist() == pytest.approx([16, 12, 0])
    assert written(one)[[7, 9, 3]].tolist() == pytest.approx([12, -16, 0])
    assert [x.count_nonzero() for x in (read(one), written(one))] == [2, 2]


def test_strength_over_ranks(dictionary):
    writes = [{4: 1.0}, {4: -0.8, 6: 0.6}]
    two = planted(dictionary, [{1: 1.0}, {1: -0.6, 2: 0.8}], writes, [1.0, -10.0])
    assert read(two)[[1, 2]].tolist() == pytest.approx([-7, 8])
    assert written(two)[[4, 6]].tolist() == pytest.approx([9, -6])


def test_pathways_say_what_the_adapter_does(dictionary, adapter):
    acts = random(20, D_SAE, seed=3)
    writes = [{1: 1.0}, {1: 1.0, 2: -3.0}]
    two = planted(dictionary, [{3: -1.0}, {3: 2.0, 8: -1.0}], writes, [2.0, -3.0])
    for one in (adapter, two):
        parts = (p.scale * (acts @ p.read)[:, None] * p.write for p in pathways(one))
        torch.testing.assert_close(one.latent_delta(SparseActs.of(acts)), sum(parts))


def test_attribution_is_what_the_models_own_head_says(gemma, adapter):
    """The decoder rows through the model's own norm and head, with the norm's division undone."""
    model, tokenizer = gemma
    found = logit_attribution(adapter, model)
    assert adapter.write_support.tolist() == [9, 7]
    rows = torch.stack([-adapter.dictionary.W_dec[9], adapter.dictionary.W_dec[7]])
    with torch.no_grad():
        normed = model.model.norm(1000 * rows)  # far above the norm's epsilon
        expected = model.lm_head(normed) * rows.square().mean(1, keepdim=True).sqrt()
    torch.testing.assert_close(found, expected, atol=1e-5, rtol=1e-4)
    (only,) = logit_attribution(adapter, model, torch.tensor([7]))
    torch.testing.assert_close(only, found[1])
    with pytest.raises(ValueError, match=r"need latents that are written, got \[8\]"):
        logit_attribution(adapter, model, torch.tensor([7, 8]))
    best = promoted(found[0], tokenizer, 3)
    assert best[0][0] == token_text(tokenizer, int(found[0].argmax()))
    assert [value for _, value in best] == pytest.approx(found[0].topk(3).values.tolist())


def test_promoted_and_suppressed(gemma):
    _, tokenizer = gemma
    plus, minus = tokenizer.convert_tokens_to_ids(["plus", "minus"])
    logits = torch.zeros(len(tokenizer) + 8)
    logits[plus], logits[minus], logits[-1], logits[-2] = 2.0, -3.0, 9.0, -9.0  # the last: padding
    assert promoted(logits, tokenizer, 1) == [("plus", 2.0)]
    assert suppressed(logits, tokenizer, 1) == [("minus", -3.0)]
    assert len(promoted(logits, tokenizer, 10**6)) == len(tokenizer)


def test_sentence(dictionary, adapter):
    labels = {3: "operator", 5: "number", 7: "french", 9: "english"}
    assert sentence(adapter, labels) == [
        "when ⟨operator⟩ 64 % or ⟨number⟩ 36 % then more ⟨french⟩ 36 %, less ⟨english⟩ 64 %"
    ]
    same = {3: "maths", 5: "maths", 7: "french"}
    assert sentence(adapter, same) == [
        "when ⟨maths⟩ 100 % then more ⟨french⟩ 36 %, less ⟨latent 9⟩ 64 %"
    ]
    assert sentence(adapter, labels, n=1)[0].startswith("when ⟨operator⟩ 64 % then")
    two = planted(dictionary, [{3: 2.0, 5: -1.0}, {5: 1.0}], [{7: -1.0}, {7: 1.0}], [-1.0, 0.0])
    assert sentence(two, labels) == [
        "when ⟨operator⟩ 80 %, and not ⟨number⟩ 20 %, then more ⟨french⟩ 100 %",
        "never changes anything",
    ]


def test_removal_of_the_only_latent_gives_back_the_model(gemma, dictionary):
    model, _ = gemma

    def logit(adapter: SaeLora | None = None) -> float:
        with torch.no_grad(), adapter.attached(model) if adapter else nullcontext():
            return float(model(input_ids=torch.arange(5, 17)[None]).logits[0, -1, 40])

    one = planted(dictionary, [{3: 1.0}], [{7: 1.0}], [1000.0])
    rows, base, whole = causal_check(one, logit, n=4), logit(), logit(one)
    assert abs(whole - base) > 0.01
    expected = [(-1, 0, False, whole), (3, 1, True, base), (3, 1, False, base)]
    expected += [(-1, 0, False, whole), (7, 1, True, base), (7, 1, False, base)]
    assert [tuple(row.values())[1:] for row in rows] == expected
    assert [row["side"] for row in rows] == ["read"] * 3 + ["write"] * 3


def test_removal_goes_from_the_strongest_on(adapter):
    seen = []

    def weights(adapter: SaeLora) -> float:
        seen.append((adapter.read_support.tolist(), adapter.write_support.tolist()))
        return float(read(adapter).sum())

    rows = causal_check(adapter, weights, n=2)
    assert seen == [
        ([3, 5], [9, 7]), ([5], [9, 7]), ([3], [9, 7]), ([], [9, 7]),
        ([3, 5], [7]), ([3, 5], [9]), ([3, 5], []),
    ]  # fmt: skip
    reads = [row for row in rows if row["side"] == "read"]
    assert [(r["latent"], r["n_removed"], r["alone"]) for r in reads] == [
        (-1, 0, False), (3, 1, True), (3, 1, False), (5, 1, True), (5, 2, False),
    ]  # fmt: skip
    assert [r["value"] for r in reads] == pytest.approx([28, 12, 12, 16, 0])
    assert read(without(adapter, "write", [9]))[3] == pytest.approx(0.6 * 16)


def test_random_latents_keep_weights_and_scale(dictionary):
    reads = [{i: 1.0 + i for i in range(10)}, {2: -3.0}]
    writes = [{i: 1.0 - i for i in range(20, 28)}, {50: 1.0}]
    wide = planted(dictionary, reads, writes, [2.0, -5.0])
    before = {name: value.clone() for name, value in wide.state_dict().items()}
    generator = torch.Generator().manual_seed(0)
    rate = torch.linspace(0, 1, D_SAE)[torch.randperm(D_SAE, generator=generator)]
    drawn = [on_random_latents(wide, seed) for seed in range(6)]
    first = [other.read_support.tolist() for other in drawn]
    assert len({tuple(support) for support in first}) > 2
    assert on_random_latents(wide, 1).read_support.tolist() == first[1]
    drawn += [on_random_latents(wide, seed, rate) for seed in range(6)]
    for other in drawn:
        assert other.dictionary is wide.dictionary
        torch.testing.assert_close(other.scale, wide.scale)
        for weights in ("read_weights", "write_weights"):
            old, new = getattr(wide, weights), getattr(other, weights)
            old, new = (w if len(w) == D_SAE else w.T for w in (old, new))
            assert not (old.any(1) & new.any(1)).any()
            pairs = [sorted(map(tuple, w[w.any(1)].tolist())) for w in (old, new)]
            torch.testing.assert_close(torch.tensor(pairs[0]), torch.tensor(pairs[1]))
    for name, value in wide.state_dict().items():
        assert torch.equal(value, before[name])


def test_random_latents_fire_as_often(dictionary):
    frequent, rate = range(30), torch.where(torch.arange(D_SAE) < 30, 0.5, 0.001)
    wide = planted(dictionary, [{0: 1.0, 1: 2.0}], [{40: 1.0}], [1.0])
    drawn = [on_random_latents(wide, seed, rate) for seed in range(30)]
    reads = {tuple(other.read_support.tolist()) for other in drawn}
    assert all(set(support) <= set(frequent) for support in reads) and len(reads) > 10
    assert all(set(other.write_support.tolist()).isdisjoint(frequent) for other in drawn)
    dense = planted(dictionary, [dict.fromkeys(range(31), 1.0)], [{40: 1.0}], [1.0])
    with pytest.raises(ValueError, match="need a support of at most 30 latents, got 31"):
        on_random_latents(dense, 0)
