"""Gradient compression: only the largest entries of a cut gradient are sent.

Entries are ranked by magnitude over the whole batch, as published, or within each sample's own row.

Source: Lin, Han, Mao, Wang, Dally. "Deep Gradient Compression: Reducing the Communication Bandwidth
for Distributed Training", ICLR 2018, https://arxiv.org/abs/1712.01887; as a defence of cut
gradients as in the code of Liu, Lyu, Cui, Tao. "Similarity-Based Label Inference Attack Against
Training and Inference of Split Learning", TIFS 2024, https://arxiv.org/abs/2203.05222.
Departures from the source:
- What is dropped is lost, as in the second source; the first adds it to a later gradient, which
  here would be that of other samples.
- ``per = "sample"`` is ours: ranked over the batch, samples of small loss may lose their whole row.
"""

from dataclasses import dataclass
from math import ceil
from typing import ClassVar

import torch
from jaxtyping import Float
from torch import Tensor

from leakbed.contracts import Defense, DefenseState, Protects
from leakbed.naming import unknown

_PER = ("batch", "sample")


@dataclass(frozen=True, kw_only=True)
class GradientCompression(Defense):
    """Send the largest entries of the cut gradient and zeros; claims no differential privacy.

    Attributes:
        ratio: Share of entries that is sent, in (0, 1], rounded up to whole entries.
        per: Ranked over the ``"batch"`` (published) or within each ``"sample"``.
    """

    name: ClassVar[str] = "gradient-compression"
    source: ClassVar[str] = "Lin et al., ICLR 2018, https://arxiv.org/abs/1712.01887"
    protects: ClassVar[frozenset[Protects]] = frozenset({Protects.CUT_GRADIENT})

    ratio: float = 0.1
    per: str = "batch"

    def __post_init__(self) -> None:
        """Check the settings.

        Raises:
            ValueError: If the ratio is not in (0, 1], or there is no such ranking.
        """
        if self.per not in _PER:
            raise ValueError(unknown("per", self.per, _PER))
        if not 0 < self.ratio <= 1:
            raise ValueError(
                f"gradient-compression needs 0 < ratio <= 1, the share that is sent; got "
                f"{self.ratio}"
            )

    def protect_cut_gradient(
        self, state: DefenseState, gradient: Float[Tensor, " batch *cut"]
    ) -> tuple[DefenseState, Float[Tensor, " batch *cut"]]:
        """Return the gradient with its smallest entries zero.

        Args:
            state: Passed through: there is nothing random here.
            gradient: The gradient the label holder would send.

        Returns:
            The same state, and the gradient to send.
        """
        ranked = gradient.reshape(1 if self.per == "batch" else len(gradient), -1)
        places = ranked.abs().topk(ceil(self.ratio * ranked.shape[1]), dim=1).indices
        sparse = torch.zeros_like(ranked).scatter(1, places, ranked.gather(1, places))
        return state, sparse.reshape(gradient.shape)
