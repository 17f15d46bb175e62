"""Run a source of latents over a corpus and keep what fired."""

import torch

from lib.data.corpus import Corpus
from lib.dictionaries import SparseActs
from lib.latents.record import LatentRecord, Part, assemble
from lib.latents.source import LatentSource
from lib.models.families import hugging_face
from lib.sparse.acts import starts_of


@torch.no_grad()
def record_of(
    source: LatentSource, corpus: Corpus, *, batch_rows: int = 64, skip_special: bool = True
) -> LatentRecord:
    """The latents of `source` over `corpus`, on the CPU.

    Args:
        batch_rows: rows of the corpus in a forward pass; memory grows with it.
        skip_special: leave special tokens out, as harvesting does; the model reads them.

    Raises:
        ValueError: `batch_rows` below 1; a token id that the model does not have; no token to
            record; a model in training mode.
    """
    if batch_rows < 1:
        raise ValueError(f"need batch_rows >= 1, got {batch_rows}")
    n_ids = hugging_face(source.model).get_input_embeddings().num_embeddings
    largest = int(corpus.ids.max())
    if largest >= n_ids:
        raise ValueError(
            f"the model has {n_ids} token ids, but the corpus holds id {largest}; "
            "need the model's own tokenizer"
        )
    starts = range(0, len(corpus.ids), batch_rows)
    parts = (_part(source, corpus, start, start + batch_rows, skip_special) for start in starts)
    return assemble(parts, corpus)


def _part(source: LatentSource, corpus: Corpus, start: int, stop: int, skip_special: bool) -> Part:
    """The latents of some rows of `corpus`."""
    rows = corpus.rows(start, stop)
    width = int(rows.mask.any(0).sum())  # no need to run columns of padding
    mask = rows.mask[:, :width]
    acts = source.latents(rows.ids[:, :width].long(), mask)
    kept = ~rows.special[:, :width][mask] if skip_special else mask[mask]
    at, positions = (x[kept] for x in mask.nonzero(as_tuple=True))
    pairs = kept.to(acts.rows.device)[acts.rows]
    offsets = starts_of(acts.offsets.diff()[kept.to(acts.offsets.device)])
    acts = SparseActs(acts.indices[pairs], acts.values[pairs], offsets, acts.n_latents)
    return Part(acts, rows.ids[at, positions], at + start, positions)
