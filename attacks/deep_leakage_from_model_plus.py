"""DLM+: images and labels from the weights of two rounds, whatever the learning rate.

Both the weight difference and the dummy gradient are divided by the mean norm of their tensors, so
that the unknown step size drops out; dummy images and labels are optimised until the two agree.

Source: Zhao, Luo, Ding, *Deep Leakage from Model in Federated Learning*, CPAL 2024, PMLR 234,
https://arxiv.org/abs/2206.04887, and its code, https://github.com/Zihao-Kevin/DLM.

Departures, beside those of :mod:`attacks.gradient_matching`:
- Labels are inferred with the images; the authors' main script is given the true ones
  (``labels = "given"``).
- ``scaling = "each"`` divides every tensor by its own norm and is ours: with the mean norm the last
  layers outweigh the first, which hold the image, where initial weights are small.
- The published PSNR is 11.485 dB too high and the published SSIM near 1 for any image (wrong ranges
  in the authors' code), so their "success at 20 dB" is a mean squared error of 0.141.
"""

from dataclasses import dataclass
from typing import ClassVar, Literal

import torch
from jaxtyping import Float
from torch import Tensor

from attacks.dummy_gradients import Weights
from attacks.gradient_matching import GradientMatching
from leakbed.naming import unknown

SCALINGS = ("mean", "each")


@dataclass(frozen=True, kw_only=True)
class DeepLeakageFromModelPlus(GradientMatching):
    """Gradient matching up to scale.

    Attributes:
        scaling: Divide every tensor by the ``"mean"`` of the tensors' norms, or ``"each"`` by its
            own norm.
    """

    name: ClassVar[str] = "dlm-plus"
    source: ClassVar[str] = "Zhao, Luo, Ding, CPAL 2024, https://arxiv.org/abs/2206.04887"

    scaling: Literal["mean", "each"] = "mean"

    def __post_init__(self) -> None:
        """Check the settings.

        Raises:
            ValueError: One is outside the values it may take.
        """
        super().__post_init__()
        if self.scaling not in SCALINGS:
            raise ValueError(unknown("scaling", self.scaling, SCALINGS))

    def objective(
        self, gradient: Weights, update: Weights, *, unknowns: Float[Tensor, " unknowns"]
    ) -> Float[Tensor, ""]:
        """Return the squared distance of the two, brought to the same scale.

        Args:
            gradient: Of the dummy images and labels.
            update: The weights the victim started from less those it sent.
            unknowns: None.

        Returns:
            0 where they are parallel.
        """
        del unknowns
        own, seen = self._norms(gradient), self._norms(update)
        gaps = [
            (gradient[name] / own[name] - update[name] / seen[name]).square().sum()
            for name in gradient
        ]
        return torch.stack(gaps).sum()

    def _norms(self, weights: Weights) -> Weights:
        """Return what each tensor is divided by."""
        norms = {name: torch.linalg.vector_norm(tensor) for name, tensor in weights.items()}
        if self.scaling == "each":
            return norms
        return dict.fromkeys(norms, torch.stack(list(norms.values())).mean())
