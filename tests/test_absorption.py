"""Absorption that is built into a record is counted, and nothing else is."""

import dataclasses

import pytest
import torch

from lib.analysis.absorption import absorption
from lib.dictionaries import SparseActs
from lib.latents import LatentRecord
from lib.world import CONCEPTS

N, WORDS, OTHERS = 4800, 40, 40  # tokens, children of `animal`, words of no class
PARENT, HOLE = 0, 7  # the parent's latent, and the word that it is silent on
D = 1 + WORDS + OTHERS
ANIMAL = 1 << CONCEPTS.index("animal")


def planted(
    *, children: int = WORDS, absorbs: bool = True, shared: bool = False, lead: float = 1.0
) -> tuple[LatentRecord, torch.Tensor, torch.Tensor]:
    """Record, activations and decoder. Each token is one word and its class.

    Latent 0 means the class; latent 1 + w means word w. Where `absorbs`, the hole's own latent
    writes the class too, `lead` of it, and latent 0 another `1 - lead` of it under a second name
    (the last latent). Where `shared`, the latents that write it also fire on half the tokens
    of four other words, so that a third of their firing is on the hole.
    """
    words = torch.arange(N) % (children + OTHERS)
    is_child = words < children
    x = torch.zeros(N, D)
    x[:, 0] = is_child.float()
    x[torch.arange(N), 1 + words] = 1.0
    W_dec = torch.cat([torch.eye(D), torch.eye(D)[:1]])
    acts = torch.cat([x, torch.zeros(N, 1)], 1)
    hole = words == HOLE
    if absorbs:
        acts[hole, PARENT] = 0.0
        acts[hole, -1] = 1 - lead
        W_dec[1 + HOLE, PARENT] = lead
    if shared:
        others = (words >= children) & (words < children + 4)
        others &= torch.rand(N, generator=torch.Generator().manual_seed(0)) < 0.5
        acts[others, 1 + HOLE] = 1.0
        acts[others, -1] = 1.0
    return record_of(acts, words, children), x, W_dec


def record_of(acts, words, children: int = WORDS) -> LatentRecord:
    pairs, rows = SparseActs.of(acts), torch.arange(N) // 20
    return LatentRecord(
        indices=pairs.indices,
        values=pairs.values,
        offsets=pairs.offsets,
        n_latents=acts.shape[1],
        ids=words,
        rows=rows,
        positions=torch.arange(N) % 20,
        texts=words,
        text_offsets=torch.arange(N // 20 + 1) * 20,
        concepts=(words < children).long() * ANIMAL,
    )


def test_an_absorbed_child_is_counted():
    found = absorption(*planted())
    assert found.parents == ("animal",) and found.main == ((PARENT,),)
    assert len(found.left_out) == 33 and "animal" not in found.left_out
    assert found.n_children.tolist() == [WORDS]
    assert int(found.n_tokens) == pytest.approx(N / 4, rel=0.1)  # of half the rows, half are words
    assert int(found.silent) == int(found.dominated) == int(found.absorbed)
    assert found.mean == pytest.approx(1 / WORDS, rel=0.15)
    assert torch.equal(found.loose_rate, found.rate)


def test_silence_that_no_latent_fills_is_not_absorption():
    honest = absorption(*planted(absorbs=False))
    assert honest.main == ((PARENT,),) and honest.mean == 0
    assert honest.silent.tolist() == honest.absorbed.tolist() == [0]
    record, x, W_dec = planted()
    W_dec[1 + HOLE, PARENT] = 0.0
    W_dec[1 + HOLE, 1 + HOLE] = 0.0  # the probe reads the word too, a little
    hole = absorption(record, x, W_dec)
    assert int(hole.silent) > 0
    assert hole.dominated.tolist() == hole.absorbed.tolist() == [0]


def test_the_absorbing_latent_must_belong_to_the_child():
    found = absorption(*planted(shared=True))
    assert int(found.silent) == int(found.dominated) > 0
    assert found.absorbed.tolist() == [0] and found.mean == 0
    assert float(found.loose_rate) == pytest.approx(1 / WORDS, rel=0.15)


def test_only_the_latent_that_adds_most_counts():
    """The word's own latent adds a fifth of the score and more, but one of many words the most."""
    own_leads = absorption(*planted(lead=0.8), share=0.2)
    assert int(own_leads.absorbed) == int(own_leads.silent) > 0
    record, x, W_dec = planted(lead=0.3, shared=True)
    pairs = record.acts.dense()
    pairs[:, 1 + HOLE] *= record.ids == HOLE  # this latent still belongs to the word
    other = absorption(record_of(pairs, record.ids), x, W_dec, share=0.2)
    assert int(other.dominated) == int(other.silent) > 0
    assert other.absorbed.tolist() == [0]


def test_a_parent_of_few_children_is_split_unless_k_is_one():
    """The hole is an eighth of the parent's tokens: its latent is worth having as a second one."""
    split = absorption(*(few := planted(children=8)))
    assert split.main == ((PARENT, 1 + HOLE),)
    assert split.silent.tolist() == split.absorbed.tolist() == [0]
    single = absorption(*few, k=1)
    assert single.main == ((PARENT,),)
    assert single.mean == pytest.approx(1 / 8, rel=0.2)


def test_the_share_decides_and_scales_of_latents_do_not_matter():
    """The word's latent adds about 0.6 of the probe's score, a second latent the rest.

    The same with values up and decoder rows down, for each latent by another factor.
    """
    record, x, W_dec = planted(lead=0.6)
    factors = torch.logspace(1, -1, len(W_dec))
    scaled = dataclasses.replace(record, values=record.values * factors[record.indices])
    for share, absorbs in ((0.4, True), (0.8, False)):
        found = absorption(record, x, W_dec, share=share)
        other = absorption(scaled, x, W_dec / factors[:, None], share=share)
        assert int(found.silent) > 0 and (int(found.absorbed) > 0) == absorbs
        for field in ("n_tokens", "silent", "dominated", "absorbed"):
            assert torch.equal(getattr(found, field), getattr(other, field)), field


def test_what_latents_take_from_the_score_does_not_count():
    """The word's latent writes the class three times over, another takes two of these away."""
    record, x, W_dec = planted()
    acts = record.acts.dense()
    acts[record.ids == HOLE, -1] = 2.0
    W_dec[-1] *= -1
    W_dec[1 + HOLE, PARENT] = 3.0
    found = absorption(record_of(acts, record.ids), x, W_dec, share=0.9)
    assert int(found.absorbed) == int(found.silent) > 0


def test_tokens_that_the_probe_misses_are_not_counted():
    """The hole's activations are those of four words of no class: the model cannot tell them."""
    record, x, W_dec = planted()
    x[(record.ids == HOLE) | ((record.ids >= WORDS) & (record.ids < WORDS + 4))] = 0.0
    found = absorption(record, x, W_dec)
    assert int(found.n_tokens) == pytest.approx(N / 4 * (WORDS - 1) / WORDS, rel=0.1)
    assert found.silent.tolist() == [0]


def test_a_latent_that_speaks_against_the_parent_is_no_main_latent():
    """One latent fires on all that is no animal, and none on a class: nothing can be silent."""
    record, x, W_dec = planted()
    acts = record.acts.dense()
    acts[:, PARENT] = 0.0
    acts[:, -1] = (record.ids >= WORDS).float()
    with pytest.raises(ValueError, match="need a parent with two children, a main latent"):
        absorption(record_of(acts, record.ids), x, W_dec, k=1)


def test_words_of_two_classes_are_no_children():
    record, x, W_dec = planted()
    concepts = record.concepts.clone()
    concepts[(record.ids == HOLE).nonzero()[0]] = 0
    found = absorption(dataclasses.replace(record, concepts=concepts), x, W_dec)
    assert found.n_children.tolist() == [WORDS - 1] and found.silent.tolist() == [0]


def test_bad_input():
    record, x, W_dec = planted()

    def refuse(match, record=record, x=x, W_dec=W_dec, **options):
        with pytest.raises(ValueError, match=match):
            absorption(record, x, W_dec, **options)

    refuse("need a record with concepts", dataclasses.replace(record, concepts=None))
    refuse("need latents of at least 0, got -1", dataclasses.replace(record, values=-record.values))
    refuse(f"need x of the record's {N} tokens, got 5", x=x[:5])
    refuse(rf"need W_dec of shape \({D + 1}, {D}\), got \({D}, {D}\)", W_dec=W_dec[:-1])
    refuse(f"need k in 1..{D + 1}, got 0", k=0)
    refuse(f"need k in 1..{D + 1}, got {D + 2}", k=D + 2)
    for share in (0.0, 1.5, float("nan")):
        refuse(r"need share in \(0, 1\]", share=share)
    nothing = dataclasses.replace(record, concepts=torch.zeros_like(record.concepts))
    refuse("need a concept on and off at least 20 tokens", nothing)
    one = dataclasses.replace(record, concepts=(record.ids == HOLE).long() * ANIMAL)
    silent = dataclasses.replace(record, values=torch.zeros_like(record.values))
    for given in (one, silent):
        refuse("need a parent with two children, a main latent and 20 tokens", given)
    refuse("need finite features", x=x * float("nan"))
