"""Latents over a corpus: collected in one pass, read by token, by latent and in their text."""

import dataclasses

import pytest
import torch
from safetensors.torch import load_file, save_file

from lib.activations.source import Block
from lib.data.corpus import Corpus
from lib.dictionaries import Dictionary, SparseActs, recipes
from lib.latents import LatentRecord, collect

N_LATENTS, SEQ = 7, 9
DEAD = 3
ALIVE = [0, 1, 2, 4, 5, 6]


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


def assert_same(a: LatentRecord, b: LatentRecord) -> None:
    for field in dataclasses.fields(LatentRecord):
        left, right = getattr(a, field.name), getattr(b, field.name)
        same = torch.equal(left, right) if isinstance(left, torch.Tensor) else left == right
        assert same, field.name


def test_collect_keeps_every_latent_and_its_token(record, corpus, blocks, dense):
    assert torch.equal(record.acts.dense(), dense) and (record.values != 0).all()
    assert len(record) == len(dense) == int((corpus.mask & ~corpus.special).sum())
    rows, positions = record.rows.long(), record.positions.long()
    assert torch.equal(record.ids, corpus.ids[rows, positions])
    assert torch.equal(record.concepts, corpus.concepts[rows, positions])
    assert torch.equal(rows, torch.cat([block.rows for block in blocks]))
    kinds = {record.indices.dtype, record.ids.dtype, record.rows.dtype, record.positions.dtype}
    assert kinds == {torch.int32}

    names = [field.name for field in dataclasses.fields(Block)]
    merged = Block(*(torch.cat([getattr(block, name) for block in blocks]) for name in names))
    empty = Block(*(getattr(merged, name)[:0] for name in names))
    assert_same(record, collect(SparseActs.of, [empty, merged, empty], corpus))


@pytest.mark.parametrize("recipe", [recipes.topk(k=3), recipes.standard()], ids=["topk", "relu"])
def test_a_dictionary_is_recorded_as_it_encodes(recipe, corpus, blocks):
    torch.manual_seed(0)
    dictionary = Dictionary(recipe.dictionary(site_dims=(N_LATENTS,), d_sae=200)).eval()
    record = collect(dictionary.encode_sparse, blocks, dataclasses.replace(corpus, concepts=None))
    with torch.no_grad():
        expected = torch.cat([dictionary.encode(block.acts) for block in blocks])
    assert record.n_latents == 200 and record.concepts is None
    assert not record.values.requires_grad
    torch.testing.assert_close(record.acts.dense(), expected)
    assert_views_by_latent(record, record.acts.dense())


def assert_views_by_latent(record: LatentRecord, dense: torch.Tensor) -> None:
    torch.testing.assert_close(record.firing_rate(), (dense != 0).float().mean(0))
    for latent, column in enumerate(dense.T):
        tokens, values = record.active(latent)
        assert torch.equal(tokens, column.nonzero()[:, 0])
        assert torch.equal(values, column[tokens])


def test_views_by_latent(record, dense):
    assert_views_by_latent(record, dense)
    for latent in (-1, N_LATENTS):
        with pytest.raises(ValueError, match=f"need a latent in 0..6, got {latent}"):
            record.active(latent)


def test_top_examples_are_the_largest_of_each_row(record, dense):
    for latent in ALIVE:
        best = {}
        for token, value in enumerate(dense[:, latent].tolist()):
            row = int(record.rows[token])
            best[row] = max(value, best.get(row, 0))
        wanted = sorted((value for value in best.values() if value), reverse=True)
        top = record.top_examples(latent, 4)
        assert dense[top, latent].tolist() == wanted[:4]
        assert len(set(record.rows[top].tolist())) == 4
        assert len(record.top_examples(latent, 1000)) == len(wanted)
        negative = dataclasses.replace(record, values=-record.values)
        assert torch.equal(negative.top_examples(latent, 4, lowest=True), top)


def test_quantile_examples(record, dense):
    values = dense[:, 2][dense[:, 2] != 0].sort(descending=True).values
    found = record.quantile_examples(2, 3, 3)
    assert len(found[0]) == 3
    for tokens, part in zip(found, values.tensor_split(3), strict=True):
        assert 0 < len(tokens) <= 3
        assert len(set(record.rows[tokens].tolist())) == len(tokens)
        here = dense[tokens, 2]
        assert here[0] == part[0]
        assert part[-1] <= here.min() and here.max() <= part[0]
        assert (here.diff() <= 0).all()


def test_histogram(record, dense):
    counts, edges = record.histogram(1, 5)
    assert counts.sum() == (dense[:, 1] != 0).sum()
    assert edges[0] == 0 and torch.isclose(edges[-1].float(), dense[:, 1].max())
    assert counts[-1] == (dense[:, 1] >= edges[-2]).sum()


def test_dead_latent(record):
    assert record.firing_rate()[DEAD] == 0
    assert len(record.top_examples(DEAD, 3)) == 0
    assert [len(part) for part in record.quantile_examples(DEAD, 4, 3)] == [0] * 4
    counts, edges = record.histogram(DEAD, 4)
    assert counts.tolist() == [0] * 4 and len(edges) == 5
    assert not record.row_values(DEAD, 0).any()


def test_a_token_is_shown_in_its_whole_text(record, corpus, dense):
    for token in range(len(record)):
        row, place = int(record.rows[token]), int(record.positions[token])
        text = corpus.ids[row][corpus.mask[row]]
        assert torch.equal(record.row_text(row), text)
        ids, at = record.context(token, 2, 3)
        assert torch.equal(ids, text[max(place - 2, 0) : place + 4])
        assert ids[at] == record.ids[token]
    first = int((record.positions == 1).nonzero()[0, 0])
    assert record.context(first, 5, 0).at == 1  # <bos> gave no latents, and is shown
    for row in range(len(corpus.ids)):
        expected = torch.zeros(SEQ, N_LATENTS)
        here = (record.rows == row).nonzero()[:, 0]
        expected[record.positions[here].long()] = dense[here]
        found = [record.row_values(latent, row) for latent in range(N_LATENTS)]
        assert torch.equal(torch.stack(found, 1), expected[corpus.mask[row]])


@pytest.mark.parametrize("concepts", [True, False])
def test_save_and_load(record, concepts, tmp_path):
    record = record if concepts else dataclasses.replace(record, concepts=None)
    record.save(tmp_path / "record.safetensors")
    assert_same(record, LatentRecord.load(tmp_path / "record.safetensors"))
    assert [path.name for path in tmp_path.iterdir()] == ["record.safetensors"]


def test_load_refuses_what_is_no_record(record, tmp_path):
    path = tmp_path / "record.safetensors"

    def refuse(message: str) -> None:
        with pytest.raises(ValueError, match=message):
            LatentRecord.load(path)

    record.save(path)
    whole, tensors = path.read_bytes(), load_file(path)
    for size in (0, 4, 200, len(whole) - 1):
        path.write_bytes(whole[:size])
        refuse("record.safetensors is no complete latent record")
    save_file(tensors, path)
    refuse("need a file of kind 'latent record 1', got None")
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
        refuse(message)
    with pytest.raises(FileNotFoundError):
        LatentRecord.load(tmp_path / "no")


def test_collect_refuses(corpus, blocks):
    widths = iter([7, 6])
    other = dataclasses.replace(corpus, ids=corpus.ids.flip(0))
    of = SparseActs.of
    for encode, given, against, message in (
        (of, [], corpus, "need at least one token to record, got none"),
        (of, blocks, other, "block 0: need tokens of the corpus 'made up'"),
        (of, blocks, corpus.rows(0, 3), "block 0: need tokens of the corpus 'made up'"),
        (lambda x: of(x[1:]), blocks, corpus, "block 0: need 11 tokens of 7.*got 10 of 7"),
        (lambda x: of(x[:, : next(widths)]), blocks, corpus, "block 1: need 11 tok.*got 11 of 6"),
    ):
        with pytest.raises(ValueError, match=message):
            collect(encode, given, against)
