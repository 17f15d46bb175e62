"""What differs between two models, by many methods on one scale.

Each method reads the same held-out corpus and says where the models differ (a score for every real
token), what differs (names, most first), and along which direction or latents.
"""

from lib.analysis.diffing.answers import amplified, answer_difference
from lib.analysis.diffing.attribution import delta_attribution
from lib.analysis.diffing.findings import Finding
from lib.analysis.diffing.outputs import OutputDifference, output_difference
from lib.analysis.diffing.planted import (
    Truth,
    behaviour_mass,
    causal,
    false_alarms,
    flagged,
    what,
    where,
)
from lib.analysis.diffing.scores import auc, concept_ranking, gap_closed, precision_at
from lib.analysis.diffing.sites import SiteReading, compare_sites
from lib.analysis.diffing.streams import StreamDifference, stream_difference

__all__ = [
    "Finding",
    "OutputDifference",
    "SiteReading",
    "StreamDifference",
    "Truth",
    "amplified",
    "answer_difference",
    "auc",
    "behaviour_mass",
    "causal",
    "compare_sites",
    "concept_ranking",
    "delta_attribution",
    "false_alarms",
    "flagged",
    "gap_closed",
    "output_difference",
    "precision_at",
    "stream_difference",
    "what",
    "where",
]
