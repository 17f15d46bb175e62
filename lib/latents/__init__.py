"""Latents over a corpus: which fire where, how strongly, and in which text."""

from lib.latents.record import Context, LatentRecord, collect

__all__ = ["Context", "LatentRecord", "collect"]
