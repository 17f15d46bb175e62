"""Latents over a corpus and in a running model: which fire where, in which text, what they do."""

from lib.latents.record import Context, LatentRecord, assemble, collect
from lib.latents.source import DictionarySource, Edit, LatentSource, record_of
from lib.latents.steering import (
    DoseResponse,
    ablate,
    clamp,
    dose_response,
    scale,
    typical_activations,
)

__all__ = [
    "Context",
    "DictionarySource",
    "DoseResponse",
    "Edit",
    "LatentRecord",
    "LatentSource",
    "ablate",
    "assemble",
    "clamp",
    "collect",
    "dose_response",
    "record_of",
    "scale",
    "typical_activations",
]
