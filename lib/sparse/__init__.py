"""Sparse products at full speed: active pairs, their products, and scans that find them."""

from lib.sparse.acts import SparseActs
from lib.sparse.jumprelu import dense_jumprelu, sparse_jumprelu
from lib.sparse.ops import active_pre_acts, release, reused_buffers, sparse_decode
from lib.sparse.screen import DENSE, Scan

__all__ = [
    "DENSE",
    "Scan",
    "SparseActs",
    "active_pre_acts",
    "dense_jumprelu",
    "release",
    "reused_buffers",
    "sparse_decode",
    "sparse_jumprelu",
]
