"""The defences, one published method per file. Listing one in ``DEFENSES`` puts it under test."""

from defenses.gradients_scrutinizer import GradientsScrutinizer
from defenses.nopeek import NoPeek
from defenses.smashed_noise import SmashedNoise
from defenses.splitguard import SplitGuard
from defenses.splitout import SplitOut
from defenses.weight_noise import WeightNoise
from defenses.weight_sparsification import WeightSparsification
from leakbed.contracts import Defense

DEFENSES: dict[str, type[Defense]] = {
    "gradients-scrutinizer": GradientsScrutinizer,
    "nopeek": NoPeek,
    "smashed-noise": SmashedNoise,
    "splitguard": SplitGuard,
    "splitout": SplitOut,
    "weight-noise": WeightNoise,
    "weight-sparsification": WeightSparsification,
}

__all__ = [
    "DEFENSES",
    "GradientsScrutinizer",
    "NoPeek",
    "SmashedNoise",
    "SplitGuard",
    "SplitOut",
    "WeightNoise",
    "WeightSparsification",
]
