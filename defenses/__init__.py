"""The defences, one published method per file. Listing one in ``DEFENSES`` puts it under test."""

from defenses.smashed_noise import SmashedNoise
from defenses.weight_noise import WeightNoise
from defenses.weight_sparsification import WeightSparsification
from leakbed.contracts import Defense

DEFENSES: dict[str, type[Defense]] = {
    "smashed-noise": SmashedNoise,
    "weight-noise": WeightNoise,
    "weight-sparsification": WeightSparsification,
}

__all__ = ["DEFENSES", "SmashedNoise", "WeightNoise", "WeightSparsification"]
