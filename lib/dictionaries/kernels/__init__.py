"""The sparse path: only active (token, latent) pairs are decoded and only they get gradients.

One interface, implemented eagerly in `eager`. Everything takes and gives `SparseActs`.
"""

from lib.dictionaries.kernels.eager import active_pre_acts, sparse_decode
from lib.dictionaries.kernels.sparse import SparseActs

__all__ = ["SparseActs", "active_pre_acts", "sparse_decode"]
