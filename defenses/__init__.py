"""The defences, one published method per file. Listing one in ``DEFENSES`` puts it under test."""

from defenses.adversarial_training import AdversarialTraining
from defenses.dp_cut_gradient import DPCutGradient
from defenses.dp_sgd import DPSGD
from defenses.gradient_compression import GradientCompression
from defenses.gradients_scrutinizer import GradientsScrutinizer
from defenses.iso_noise import IsoNoise
from defenses.label_dp import LabelDP
from defenses.local_dp import LocalDP
from defenses.marvell import Marvell
from defenses.max_norm import MaxNorm
from defenses.nopeek import NoPeek
from defenses.smashed_noise import SmashedNoise
from defenses.splitguard import SplitGuard
from defenses.splitout import SplitOut
from defenses.weight_noise import WeightNoise
from defenses.weight_sparsification import WeightSparsification
from leakbed.contracts import Defense

DEFENSES: dict[str, type[Defense]] = {
    "adversarial-training": AdversarialTraining,
    "dp-cut-gradient": DPCutGradient,
    "dp-sgd": DPSGD,
    "gradient-compression": GradientCompression,
    "gradients-scrutinizer": GradientsScrutinizer,
    "iso-noise": IsoNoise,
    "label-dp": LabelDP,
    "local-dp": LocalDP,
    "marvell": Marvell,
    "max-norm": MaxNorm,
    "nopeek": NoPeek,
    "smashed-noise": SmashedNoise,
    "splitguard": SplitGuard,
    "splitout": SplitOut,
    "weight-noise": WeightNoise,
    "weight-sparsification": WeightSparsification,
}

__all__ = [
    "DEFENSES",
    "DPSGD",
    "AdversarialTraining",
    "DPCutGradient",
    "GradientCompression",
    "GradientsScrutinizer",
    "IsoNoise",
    "LabelDP",
    "LocalDP",
    "Marvell",
    "MaxNorm",
    "NoPeek",
    "SmashedNoise",
    "SplitGuard",
    "SplitOut",
    "WeightNoise",
    "WeightSparsification",
]
