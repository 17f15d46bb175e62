"""Latents over a corpus: collected in one pass, read by token, by latent and in their text."""

import dataclasses
import random

import pytest
import torch
from safetensors.torch import load_file, save_file

from lib.activations.source import Block
from lib.data.corpus import Corpus
from lib.dictionaries import Dictionary, DictionaryConfig, SparseActs, recipes
from lib.latents import LatentRecord, collect

N_LATENTS, SEQ = 7, 9
DEAD = 3


@pytest.fixture(scope="module")
def corpus() -> Corpus:
    generator = torch.Generator().manual_seed(0)
    lengths = torch.randint(2, SEQ + 1, (12,), generator=generator)
    mask = torch.arange(SEQ) < lengths[:, None]
    ids = torch.randint(4, 100, mask.shape, generator=generator).int() * mask
    special = (torch.arange(SEQ) == 0) & mask
    concepts = torch.randint(2**40, mask.shape, generator=generator) * mask
    return Corpus(ids, mask, special, concepts, "made up")


@pytest.fixture(scope="module")
def blocks(corpus) -> list[Block]:
    """Activations that are the latents themselves; rows out of order, special tokens left out."""
    rows, positions = (corpus.mask & ~corpus.special).nonzero(as_tuple=True)
    generator = torch.Generator().manual_seed(1)
    x = torch.rand(len(rows), N_LATENTS, generator=generator)
    x = (x * 10).round() / 10 * (torch.rand(x.shape, generator=generator) < 0.5)
    x[:, DEAD] = 0
    order = torch.randperm(len(rows), generator=generator).split(11)
    return [
        Block(x[part], corpus.ids[rows[part], positions[part]], rows[part], positions[part])
        for part in order
    ]


@pytest.fixture(scope="module")
def record(corpus, blocks) -> LatentRecord:
    return collect(SparseActs.of, iter(blocks), corpus)


@pytest.fixture(scope="module")
def dense(blocks) -> torch.Tensor:
    return torch.cat([block.acts for block in blocks])


def test_collect_keeps_every_latent_and_its_token(record, corpus, blocks, dense):
    assert torch.equal(record.acts.dense(), dense)
    assert (record.values != 0).all()
    assert len(record) == len(dense) == int((corpus.mask & ~corpus.special).sum())
    rows, positions = record.rows.long(), record.positions.long()
    assert torch.equal(record.ids, corpus.ids[rows, positions])
    assert torch.equal(record.concepts, corpus.concepts[rows, positions])
    assert torch.equal(rows, torch.cat([block.rows for block in blocks]))
    kinds = {record.indices.dtype, record.ids.dtype, record.rows.dtype, record.positions.dtype}
    assert kinds == {torch.int32}


def test_blocks_do_not_matter(record, corpus, blocks):
    merged = Block(*(torch.cat([getattr(b, f.name) for b in blocks]) for f in fields()))
    empty = Block(*(getattr(merged, f.name)[:0] for f in fields()))
    other = collect(SparseActs.of, [empty, merged, empty], corpus)
    for field in dataclasses.fields(LatentRecord):
        same_as(getattr(record, field.name), getattr(other, field.name))


def fields():
    return dataclasses.fields(Block)


def same_as(a, b):
    assert torch.equal(a, b) if isinstance(a, torch.Tensor) else a == b


@pytest.mark.parametrize("recipe", [recipes.topk(k=3), recipes.standard()], ids=["topk", "relu"])
def test_a_dictionary_is_recorded_as_it_encodes(recipe, corpus, blocks):
    torch.manual_seed(0)
    dictionary = Dictionary(recipe.dictionary(site_dims=(N_LATENTS,), d_sae=20)).eval()
    record = collect(dictionary.encode_sparse, blocks, corpus)
    with torch.no_grad():
        expected = torch.cat([dictionary.encode(block.acts) for block in blocks])
    assert record.n_latents == 20
    torch.testing.assert_close(record.acts.dense(), expected)
    assert not record.values.requires_grad


def test_views_by_latent(record, dense):
    torch.testing.assert_close(record.firing_rate(), (dense != 0).float().mean(0))
    for latent in range(N_LATENTS):
        tokens, values = record.active(latent)
        assert torch.equal(tokens, dense[:, latent].nonzero()[:, 0])
        assert torch.equal(values, dense[tokens, latent])


def test_top_examples_are_the_largest_of_each_row(record, dense):
    for latent in (0, 5):
        best = {}
        for token, value in enumerate(dense[:, latent].tolist()):
            row = int(record.rows[token])
            if value > best.get(row, (0, 0))[0]:
                best[row] = (value, token)
        top = record.top_examples(latent, 4)
        values = dense[top, latent].tolist()
        assert values == sorted((value for value, _ in best.values()), reverse=True)[:4]
        assert len(set(record.rows[top].tolist())) == 4
    assert len(record.top_examples(0, 1000)) == len(set(record.rows[record.active(0)[0]].tolist()))


def test_quantile_examples(record, dense):
    values = dense[:, 2][dense[:, 2] != 0].sort(descending=True).values
    parts = values.tensor_split(3)
    found = record.quantile_examples(2, 3, 3)
    assert len(found) == 3
    for tokens, part in zip(found, parts, strict=True):
        assert 0 < len(tokens) <= 3
        assert len(set(record.rows[tokens].tolist())) == len(tokens)
        here = dense[tokens, 2]
        assert here[0] == part[0]
        assert part[-1] <= here.min() and here.max() <= part[0]
        assert (here.diff() <= 0).all()
    assert len(found[0]) == 3


def test_histogram(record, dense):
    counts, edges = record.histogram(1, 5)
    assert counts.sum() == (dense[:, 1] != 0).sum()
    assert edges[0] == 0 and torch.isclose(edges[-1].float(), dense[:, 1].max())
    last = (dense[:, 1] >= edges[-2]).sum()
    assert counts[-1] == last


def test_dead_latent(record):
    assert record.firing_rate()[DEAD] == 0
    assert len(record.top_examples(DEAD, 3)) == 0
    assert [len(part) for part in record.quantile_examples(DEAD, 4, 3)] == [0] * 4
    counts, edges = record.histogram(DEAD, 4)
    assert counts.tolist() == [0] * 4 and len(edges) == 5
    assert not record.row_values(DEAD, 0).any()


@pytest.mark.parametrize("latent", [-1, N_LATENTS])
def test_no_such_latent(record, latent):
    with pytest.raises(ValueError, match=f"need a latent in 0..6, got {latent}"):
        record.active(latent)


def test_context_shows_the_whole_text(record, corpus):
    for token in range(len(record)):
        row, place = int(record.rows[token]), int(record.positions[token])
        text = corpus.ids[row][corpus.mask[row]]
        assert torch.equal(record.row_text(row), text)
        ids, at = record.context(token, 2, 3)
        assert torch.equal(ids, text[max(place - 2, 0) : place + 4])
        assert ids[at] == record.ids[token]
    first = int((record.positions == 1).nonzero()[0, 0])
    assert record.context(first, 5, 0).at == 1  # <bos> gave no latents, and is shown


def test_row_values_lie_over_the_text(record, corpus, dense):
    for row in range(len(corpus.ids)):
        expected = torch.zeros(SEQ)
        here = (record.rows == row).nonzero()[:, 0]
        expected[record.positions[here].long()] = dense[here, 4]
        assert torch.equal(record.row_values(4, row), expected[corpus.mask[row]])


@pytest.mark.parametrize("concepts", [True, False])
def test_save_and_load(record, concepts, tmp_path):
    record = record if concepts else dataclasses.replace(record, concepts=None)
    record.save(tmp_path / "record.safetensors")
    loaded = LatentRecord.load(tmp_path / "record.safetensors")
    for field in dataclasses.fields(record):
        same_as(getattr(record, field.name), getattr(loaded, field.name))
    assert [path.name for path in tmp_path.iterdir()] == ["record.safetensors"]


def test_load_refuses_what_is_no_record(record, tmp_path):
    path = tmp_path / "record.safetensors"
    record.save(path)
    whole = path.read_bytes()
    for size in (0, 4, 200, len(whole) - 1):
        path.write_bytes(whole[:size])
        with pytest.raises(ValueError, match="record.safetensors is no complete latent record"):
            LatentRecord.load(path)
    path.write_bytes(whole)
    tensors = load_file(path)
    save_file(tensors, path)
    with pytest.raises(ValueError, match="need a file of kind 'latent record 1', got None"):
        LatentRecord.load(path)
    about, n = {"kind": "latent record 1", "n_latents": "7"}, len(record)
    assert record.offsets[1] < record.offsets[2]
    for name, broken, message in (
        ("indices", tensors["indices"] + 1, "need indices in 0..6, got 1 to 7"),
        ("rows", tensors["rows"] - 1, "need rows in 0..11, got -1"),
        ("offsets", tensors["offsets"][:-1], "need offsets of length"),
        ("offsets", tensors["offsets"].flip(0), "need offsets of length"),
        ("offsets", tensors["offsets"][[0, 2, 1, *range(3, n + 1)]], "offsets that never fall"),
        ("values", tensors["values"][:-1], "no complete latent record"),
        ("concepts", tensors["concepts"][:-1], "no complete latent record"),
    ):
        save_file(tensors | {name: broken.contiguous()}, path, about)
        with pytest.raises(ValueError, match=message):
            LatentRecord.load(path)
    with pytest.raises(FileNotFoundError):
        LatentRecord.load(tmp_path / "no")


def test_collect_refuses(corpus, blocks):
    with pytest.raises(ValueError, match="need at least one token to record, got none"):
        collect(SparseActs.of, [], corpus)
    other = dataclasses.replace(corpus, ids=corpus.ids.flip(0))
    with pytest.raises(ValueError, match="block 0: need tokens of the corpus 'made up'"):
        collect(SparseActs.of, blocks, other)
    with pytest.raises(ValueError, match="block 0: need tokens of the corpus 'made up'"):
        collect(SparseActs.of, blocks, corpus.rows(0, 3))
    with pytest.raises(ValueError, match="block 0: need 11 tokens of 7 latents.*got 10 of 7"):
        collect(lambda x: SparseActs.of(x[1:]), blocks, corpus)
    widths = iter([7, 6])
    with pytest.raises(ValueError, match="block 1: need 11 tokens of 7 latents.*got 11 of 6"):
        collect(lambda x: SparseActs.of(x[:, : next(widths)]), blocks, corpus)


def test_many_latents_by_brute_force():
    """A larger matrix, so that sorting is exercised: every view agrees with the dense one."""
    rng = random.Random(0)
    config = DictionaryConfig(site_dims=(16,), d_sae=200, rule=recipes.topk(k=5).rule)
    torch.manual_seed(1)
    dictionary, x = Dictionary(config), torch.randn(500, 16)
    ids = torch.arange(500, dtype=torch.int32).view(20, 25)
    mask = torch.ones(20, 25, dtype=torch.bool)
    corpus = Corpus(ids, mask, ~mask, None, "counting")
    rows, positions = mask.nonzero(as_tuple=True)
    record = collect(dictionary.encode_sparse, [Block(x, ids.flatten(), rows, positions)], corpus)
    dense = record.acts.dense()
    assert record.concepts is None
    for latent in rng.sample(range(200), 20):
        tokens, values = record.active(latent)
        assert torch.equal(dense[:, latent].nonzero()[:, 0], tokens)
        assert torch.equal(dense[tokens, latent], values)
        top = record.top_examples(latent, 1)
        if len(tokens):
            assert dense[top[0], latent] == dense[:, latent].max()
