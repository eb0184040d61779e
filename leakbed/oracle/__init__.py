"""The oracle: the only code that knows the private truth. It scores guesses; attacks never see it.

A run is scored in four steps: :class:`Truth` from the answer key, :func:`baselines` of that truth,
:func:`score` of the guess beside them, and :func:`control_verdict` on the same guess scored against
unrelated truth (``truth.deranged()``). Stolen models go to :func:`score_clones`.
"""

from leakbed.oracle.baselines import baselines
from leakbed.oracle.clones import CloneScores, score_clones
from leakbed.oracle.control import ControlVerdict, control_verdict
from leakbed.oracle.matching import match_images, match_labels
from leakbed.oracle.probe import linear_probe
from leakbed.oracle.ranking import leak_auc, ranked, unranked
from leakbed.oracle.scores import (
    NEEDS_TRUTH,
    Scores,
    Summary,
    best_evidence_free,
    summarise,
)
from leakbed.oracle.scoring import score, with_skill
from leakbed.oracle.truth import GuessShapeError, Truth, TruthError, derange

__all__ = [
    "NEEDS_TRUTH",
    "CloneScores",
    "ControlVerdict",
    "GuessShapeError",
    "Scores",
    "Summary",
    "Truth",
    "TruthError",
    "baselines",
    "best_evidence_free",
    "control_verdict",
    "derange",
    "leak_auc",
    "linear_probe",
    "match_images",
    "match_labels",
    "ranked",
    "score",
    "score_clones",
    "summarise",
    "unranked",
    "with_skill",
]
