"""Views that every attack of the catalogue can be run on, small and quick."""

from typing import Any

from attacks import ATTACKS
from leakbed.contract_trials import small_view
from leakbed.contracts import Attack, View

TWO_CLASSES = {"cosine-score", "exploit", "model-completion", "norm-score"}
"""Attacks that tell two labels apart, or that must know a sample of every class."""
QUICK: dict[str, dict[str, Any]] = {
    "dlm": {"iterations": 3, "restarts": 1},
    "dlm-plus": {"iterations": 3, "restarts": 1},
    "similarity-clustering": {"partial": True},
    "similarity-distance": {"partial": True},
    "similarity-transfer": {"partial": True, "epochs": 1},
    "exploit": {"steps": 3},
    "model-completion": {"steps": 3},
    "spadv": {"steps": 3, "batch": 4, "ascent": 2},
    "fora": {"steps": 2},
    "sdar": {"steps": 2},
    "unsplit": {"outer_steps": 2, "input_steps": 2, "model_steps": 2},
}


def quick_attack(name: str) -> Attack:
    """Return an attack of the catalogue with a budget for a test."""
    return ATTACKS[name](**QUICK.get(name, {}))


def view_for(attack: Attack) -> View:
    """Return a view that grants what an attack's threat model names, from a small victim."""
    return small_view(attack.threat, classes=2 if attack.name in TWO_CLASSES else 4)
