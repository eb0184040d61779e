"""What attacks and defenses are: tensors in, tensors out; no Flower, no files, no truth.

An attack declares its :class:`ThreatModel`; the harness grants it exactly that as a
:class:`View`; the attack answers with a :class:`Guess`. An :class:`Adversary` rewrites messages
besides; a :class:`Watcher` sees them as they come and rewrites none. A defense overrides the hooks
of :class:`Defense` that its source describes. Importing this package needs neither torch nor
Flower.
"""

from leakbed.contracts.attack import (
    IN_WORDS,
    Adversary,
    Attack,
    BrokenPluginError,
    Evidence,
    Guess,
    Knowledge,
    Metric,
    MissingKnowledgeError,
    Seat,
    State,
    ThreatModel,
    UnfitViewError,
    View,
    Watcher,
)
from leakbed.contracts.defense import (
    Defense,
    DefenseState,
    IllegalCombinationError,
    Protects,
    select,
)

__all__ = [
    "IN_WORDS",
    "Adversary",
    "Attack",
    "BrokenPluginError",
    "Defense",
    "DefenseState",
    "Evidence",
    "Guess",
    "IllegalCombinationError",
    "Knowledge",
    "Metric",
    "MissingKnowledgeError",
    "Protects",
    "Seat",
    "State",
    "ThreatModel",
    "UnfitViewError",
    "View",
    "Watcher",
    "select",
]
