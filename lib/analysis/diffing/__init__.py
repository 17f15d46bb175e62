"""What differs between two models, by several methods on one scale.

Each method reads the same held-out corpus and says where the models differ (a score for every real
token), what differs (names, most first), and along which direction or latents.
"""

from lib.analysis.diffing.outputs import OutputDifference, output_difference
from lib.analysis.diffing.scores import auc, concept_ranking, gap_closed, precision_at
from lib.analysis.diffing.sites import SiteReading, compare_sites
from lib.analysis.diffing.streams import StreamDifference, stream_difference

__all__ = [
    "OutputDifference",
    "SiteReading",
    "StreamDifference",
    "auc",
    "compare_sites",
    "concept_ranking",
    "gap_closed",
    "output_difference",
    "precision_at",
    "stream_difference",
]
