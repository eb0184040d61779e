"""Isotropic noise: normal noise of one size on every row of a cut gradient.

The size is a multiple of the batch's largest row norm, spread over all entries of a row.

Source: Li, Sun, Yang, Gao, Zhang, Xie, Smith, Wang. "Label Leakage and Protection in
Two-party Split Learning", ICLR 2022, https://arxiv.org/abs/2102.08504, where it is the baseline
"iso". Departures from the source: none known.
"""

from dataclasses import dataclass
from math import sqrt
from typing import ClassVar

import torch
from jaxtyping import Float
from torch import Tensor

from leakbed.contracts import Defense, DefenseState, Protects


@dataclass(frozen=True, kw_only=True)
class IsoNoise(Defense):
    """Add normal noise to a cut gradient.

    Nothing is clipped and the noise follows the data, so it claims no differential privacy;
    ``dp-cut-gradient`` is the form that does.

    Attributes:
        ratio: Expected norm of a row's noise over the batch's largest row norm, above 0.
    """

    name: ClassVar[str] = "iso-noise"
    source: ClassVar[str] = "Li et al., ICLR 2022, https://arxiv.org/abs/2102.08504"
    protects: ClassVar[frozenset[Protects]] = frozenset({Protects.CUT_GRADIENT})

    ratio: float = 1.0

    def __post_init__(self) -> None:
        """Check the settings.

        Raises:
            ValueError: If the ratio is not above 0.
        """
        if self.ratio <= 0:
            raise ValueError(f"iso-noise needs ratio > 0, got {self.ratio}")

    def protect_cut_gradient(
        self, state: DefenseState, gradient: Float[Tensor, " batch *cut"]
    ) -> tuple[DefenseState, Float[Tensor, " batch *cut"]]:
        """Return the gradient with noise.

        Args:
            state: Fixes the noise of this message.
            gradient: The gradient the label holder would send.

        Returns:
            The same state, and the gradient to send.
        """
        rows = gradient.flatten(1)
        largest = torch.linalg.vector_norm(rows, dim=1).max()
        noise = torch.randn(gradient.shape, generator=state.generator()).to(gradient)
        return state, gradient + self.ratio * largest / sqrt(rows.shape[1]) * noise
