"""Networks, and where they may be cut: everything an adversary who knows the layers knows."""

from leakbed.models.architecture import Architecture, ModelMismatchError, UnknownModelError
from leakbed.models.cutting import IllegalCutError, Parts, cut, join
from leakbed.models.device import UnavailableDeviceError, resolve_device
from leakbed.models.networks import ACTIVATIONS, MODELS

__all__ = [
    "ACTIVATIONS",
    "MODELS",
    "Architecture",
    "IllegalCutError",
    "ModelMismatchError",
    "Parts",
    "UnavailableDeviceError",
    "UnknownModelError",
    "cut",
    "join",
    "resolve_device",
]
