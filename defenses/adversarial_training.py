"""Adversarial training at a node: its bottom is shown images that the whole network finds harder.

Every private image has a perturbation of its own, within a budget. The gradient that comes back for
a batch reaches the node's images as well; its sign moves the perturbations of these rows, which the
bottom is shown when the rows come again. So it costs the server nothing and changes no message: the
network is trained on inputs perturbed against itself by one step a pass. In FedAvg the gradient is
that of the node's own loss.

Source: Zheng, Zhang, Gu, Lee, Prakash. "Efficient Adversarial Training with Transferable
Adversarial Examples", CVPR 2020, https://arxiv.org/abs/1912.11969 (perturbations kept from epoch to
epoch), after Madry, Makelov, Schmidt, Tsipras, Vladu, ICLR 2018, https://arxiv.org/abs/1706.06083.
Departures from the source:
- The step follows the batch, with the gradient that trains the weights, as in Shafahi et al.,
  "Adversarial Training for Free!", NeurIPS 2019, https://arxiv.org/abs/1904.12843; the source takes
  it before, with a pass of its own, which split learning would pay with messages.
- Perturbations are never drawn anew, and images are not augmented.
"""

from dataclasses import dataclass, replace
from typing import ClassVar

import torch
from jaxtyping import Float, Int
from torch import Tensor

from leakbed.contracts import Defense, DefenseState, Protects
from leakbed.contracts.defense import Holdings
from leakbed.perturbation import check_budget

_MOVED = "moved"


@dataclass(frozen=True, kw_only=True)
class AdversarialTraining(Defense):
    """Train on images perturbed against the network; against evasion, not against reading images.

    What is sent in training is of the perturbed images; attacks that reconstruct images are scored
    against the node's own.

    Attributes:
        budget: The most by which a pixel differs from the node's own, in [0, 1].
        stride: How far a pass moves a pixel, as a share of the budget.
    """

    name: ClassVar[str] = "adversarial-training"
    source: ClassVar[str] = "Zheng et al., CVPR 2020, https://arxiv.org/abs/1912.11969"
    protects: ClassVar[frozenset[Protects]] = frozenset({Protects.TRAINING})

    budget: float = 0.2
    stride: float = 0.5

    def __post_init__(self) -> None:
        """Check the settings.

        Raises:
            ValueError: If the budget is no share of a pixel's range, or the stride is not positive.
        """
        check_budget(self.budget)
        if not self.stride > 0:
            raise ValueError(f"adversarial-training needs a stride above 0, got {self.stride}")

    @property
    def row_wise(self) -> bool:
        """Every image moves by a perturbation of its own."""
        return True

    def prepare(self, state: DefenseState, holdings: Holdings) -> DefenseState:
        """Draw a first perturbation of every row, uniform within the budget; once."""
        if _MOVED in state.tensors:
            return state
        drawn = torch.empty(holdings.images.shape, dtype=holdings.images.dtype)
        drawn.uniform_(-self.budget, self.budget, generator=state.generator())
        return replace(state, tensors={_MOVED: drawn})

    def alter_images(
        self,
        state: DefenseState,
        images: Float[Tensor, " batch *image"],
        rows: Int[Tensor, " batch"],
    ) -> Float[Tensor, " batch *image"]:
        """Return the batch with its perturbations."""
        return (images + state.tensors[_MOVED][rows].to(images)).clamp(0, 1)

    def follow_gradient(
        self,
        state: DefenseState,
        gradient: Float[Tensor, " batch *image"],
        rows: Int[Tensor, " batch"],
    ) -> DefenseState:
        """Move the perturbations of a batch up the sign of its loss's gradient.

        Args:
            state: From ``prepare``.
            gradient: Of the task's loss, with respect to the altered images.
            rows: Which of the node's they are.

        Returns:
            With the moved ones.
        """
        moved = state.tensors[_MOVED].clone()
        stepped = moved[rows] + self.stride * self.budget * gradient.sign().to(moved)
        moved[rows] = stepped.clamp(-self.budget, self.budget)
        return replace(state, tensors={_MOVED: moved})
