"""The attacks, one published method per file. Listing one in ``ATTACKS`` puts it under test."""

from typing import Any

from attacks.adversarial_regularization import AdversarialRegularization
from attacks.baselines import ConstantImage, MajorityLabel, MeanImage
from attacks.client_gan import ClientGan
from attacks.cosine_score import CosineScore
from attacks.deep_leakage_from_model import DeepLeakageFromModel
from attacks.deep_leakage_from_model_plus import DeepLeakageFromModelPlus
from attacks.exploit import Exploit
from attacks.feature_oriented_reconstruction import FeatureOrientedReconstruction
from attacks.feature_space_hijacking import FeatureSpaceHijacking
from attacks.feature_space_hijacking_property import FeatureSpaceHijackingProperty
from attacks.model_completion import ModelCompletion
from attacks.norm_score import NormScore
from attacks.similarity_clustering import SimilarityClustering
from attacks.similarity_distance import SimilarityDistance
from attacks.similarity_transfer import SimilarityTransfer
from attacks.smashed_as_image import SmashedAsImage
from attacks.split_adversarial import SplitAdversarial
from attacks.unsplit import UnSplit
from attacks.unsplit_labels import UnSplitLabels
from leakbed.contracts import Adversary, Attack
from leakbed.contracts.attack import MaliciousClient

ATTACKS: dict[str, type[Attack]] = {
    "constant-image": ConstantImage,
    "cosine-score": CosineScore,
    "dlm": DeepLeakageFromModel,
    "dlm-plus": DeepLeakageFromModelPlus,
    "exploit": Exploit,
    "fora": FeatureOrientedReconstruction,
    "majority-label": MajorityLabel,
    "mean-image": MeanImage,
    "model-completion": ModelCompletion,
    "norm-score": NormScore,
    "sdar": AdversarialRegularization,
    "similarity-clustering": SimilarityClustering,
    "similarity-distance": SimilarityDistance,
    "similarity-transfer": SimilarityTransfer,
    "smashed-as-image": SmashedAsImage,
    "spadv": SplitAdversarial,
    "unsplit": UnSplit,
    "unsplit-labels": UnSplitLabels,
}

ADVERSARIES: dict[str, type[Adversary[Any]]] = {
    "fsha": FeatureSpaceHijacking,
    "fsha-property": FeatureSpaceHijackingProperty,
}

INTRUDERS: dict[str, type[MaliciousClient]] = {
    "client-gan": ClientGan,
}

__all__ = [
    "ADVERSARIES",
    "ATTACKS",
    "INTRUDERS",
    "AdversarialRegularization",
    "ClientGan",
    "ConstantImage",
    "CosineScore",
    "DeepLeakageFromModel",
    "DeepLeakageFromModelPlus",
    "Exploit",
    "FeatureOrientedReconstruction",
    "FeatureSpaceHijacking",
    "FeatureSpaceHijackingProperty",
    "MajorityLabel",
    "MeanImage",
    "ModelCompletion",
    "NormScore",
    "SimilarityClustering",
    "SimilarityDistance",
    "SimilarityTransfer",
    "SmashedAsImage",
    "SplitAdversarial",
    "UnSplit",
    "UnSplitLabels",
]
