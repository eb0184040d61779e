"""DLM+: images and labels from the weights of two rounds, whatever the learning rate.

Both the weight difference and the dummy gradient are divided by the mean norm of their tensors, so
that the unknown step size drops out; dummy images and labels are optimised until the two agree.

Source: Zhao, Luo, Ding, *Deep Leakage from Model in Federated Learning*, CPAL 2024, PMLR 234,
https://arxiv.org/abs/2206.04887, and its code, https://github.com/Zihao-Kevin/DLM.

Departures, beside those of :mod:`attacks.gradient_matching`:
- Labels are inferred with the images; the authors' main script is given the true ones
  (``labels = "given"``).
- The published PSNR is 11.485 dB too high and the published SSIM near 1 for any image (wrong ranges
  in the authors' code), so their "success at 20 dB" is a mean squared error of 0.141.
"""

from dataclasses import dataclass
from typing import ClassVar

import torch
from jaxtyping import Float
from torch import Tensor

from attacks.dummy_gradients import Weights
from attacks.gradient_matching import GradientMatching


@dataclass(frozen=True, kw_only=True)
class DeepLeakageFromModelPlus(GradientMatching):
    """Gradient matching up to scale, between 0 and about 4 for a network of several tensors."""

    name: ClassVar[str] = "dlm-plus"
    source: ClassVar[str] = "Zhao, Luo, Ding, CPAL 2024, https://arxiv.org/abs/2206.04887"

    def objective(
        self, gradient: Weights, update: Weights, *, unknowns: Float[Tensor, " unknowns"]
    ) -> Float[Tensor, ""]:
        """Return the squared distance of the two, each divided by its tensors' mean norm.

        Args:
            gradient: Of the dummy images and labels.
            update: The weights the victim started from less those it sent.
            unknowns: None.

        Returns:
            0 where they are parallel.
        """
        del unknowns
        own, seen = _mean_norm(gradient), _mean_norm(update)
        return sum(
            ((gradient[name] / own - update[name] / seen).square().sum() for name in gradient),
            start=own.new_zeros(()),
        )


def _mean_norm(weights: Weights) -> Float[Tensor, ""]:
    """Return the mean over tensors of the tensor's Euclidean norm."""
    return torch.stack([torch.linalg.vector_norm(tensor) for tensor in weights.values()]).mean()
