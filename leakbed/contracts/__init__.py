"""What attacks and defenses are: tensors in, tensors out; no Flower, no files, no truth.

An attack declares its :class:`ThreatModel`; the harness grants it exactly that as a
:class:`View`; the attack answers with a :class:`Guess`. An :class:`Adversary` rewrites messages
besides; a :class:`Watcher` sees them as they come and rewrites none. A defense overrides the hooks
of :class:`Defense` that its source describes. Importing this package needs neither torch nor
Flower.
"""

from leakbed.contracts.attack import (
    Adversary,
    Attack,
    BrokenPluginError,
    Guess,
    Metric,
    State,
    UnfitViewError,
    View,
    Watcher,
)
from leakbed.contracts.defense import (
    Defense,
    DefenseState,
    Holdings,
    IllegalCombinationError,
    Protects,
    TrainingStep,
    select,
)
from leakbed.contracts.kinds import (
    BOTTOM,
    BOTTOM_GRADIENTS,
    BOTTOM_QUERIES,
    PAIRS,
    ROUND_BOTTOMS,
    ROUND_UPDATES,
)
from leakbed.contracts.threat import (
    IN_WORDS,
    Evidence,
    EvidenceKind,
    Knowledge,
    KnowledgeKind,
    MissingKnowledgeError,
    Seat,
    Secrets,
    Seen,
    ThreatModel,
    UnfitError,
)

__all__ = [
    "BOTTOM",
    "BOTTOM_GRADIENTS",
    "BOTTOM_QUERIES",
    "IN_WORDS",
    "PAIRS",
    "ROUND_BOTTOMS",
    "ROUND_UPDATES",
    "Adversary",
    "Attack",
    "BrokenPluginError",
    "Defense",
    "DefenseState",
    "Evidence",
    "EvidenceKind",
    "Guess",
    "Holdings",
    "IllegalCombinationError",
    "Knowledge",
    "KnowledgeKind",
    "Metric",
    "MissingKnowledgeError",
    "Protects",
    "Seat",
    "Secrets",
    "Seen",
    "State",
    "ThreatModel",
    "TrainingStep",
    "UnfitError",
    "UnfitViewError",
    "View",
    "Watcher",
    "select",
]
