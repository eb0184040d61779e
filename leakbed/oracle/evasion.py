"""Score altered inputs: how often does the node's whole trained network err on them?

Only the oracle has the whole network: its ends lie at the node. An input counts as misclassified
where the answer is not its true label, so the network's own errors on natural images are part of
the rate; over the images that it had right, they are not. An altered image that is not finite
counts as the natural one: an attack that broke down has evaded nothing.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor, nn

from leakbed.oracle.metrics import binomial_interval
from leakbed.oracle.scoring import Summary, summarise
from leakbed.oracle.truth import GuessShapeError
from leakbed.perturbation import refuse_beyond
from leakbed.tensors import predicted

if TYPE_CHECKING:
    from collections.abc import Sequence

_BATCH = 256  # images in one forward pass; bounds memory at the widest layer


@dataclass(frozen=True, kw_only=True, eq=False)
class Evasion:
    """What a network says of natural images and of altered ones.

    Attributes:
        labels: The true ones.
        natural: What the network says of the natural images; -1 where nothing is finite.
        altered: What it says of those altered within each budget.
        budgets: The most by which a pixel differs.
        failures: Images without a usable alteration within the first budget.
    """

    labels: Int[Tensor, " targets"]
    natural: Int[Tensor, " targets"]
    altered: Int[Tensor, " targets budgets"]
    budgets: tuple[float, ...]
    failures: int

    @property
    def clean_accuracy(self) -> float:
        """Share of the natural images that the network has right."""
        return float((self.natural == self.labels).double().mean())

    def misclassification(self, place: int = 0) -> Summary:
        """Return the share of all altered images on which the network errs.

        Args:
            place: Of the budget; the first leads.

        Returns:
            One value per image, with the exact interval of the rate.
        """
        wrong = self.altered[:, place] != self.labels
        interval = binomial_interval(int(wrong.sum()), len(wrong))
        return summarise(wrong.double(), interval=interval)

    def fooled(self, place: int = 0) -> float | None:
        """Return the same over the images that were right before; ``None`` if none was."""
        right = self.natural == self.labels
        if not bool(right.any()):
            return None
        return float((self.altered[right, place] != self.labels[right]).double().mean())

    def as_list(self) -> list[dict[str, Any]]:
        """Return both rates by budget, as plain JSON values for a card."""
        return [
            {
                "budget": budget,
                "misclassification": self.misclassification(place).mean,
                "fooled": self.fooled(place),
            }
            for place, budget in enumerate(self.budgets)
        ]


def score_evasion(
    adversarial: Float[Tensor, " altered budgets channels height width"],
    *,
    budgets: Sequence[float],
    network: nn.Module,
    images: Float[Tensor, " targets channels height width"],
    labels: Int[Tensor, " targets"],
    failed: Bool[Tensor, " targets"] | None = None,
) -> Evasion:
    """Ask the whole network about natural and altered images.

    An image that breaks its budget is a :class:`~leakbed.perturbation.BudgetError`.

    Args:
        adversarial: The altered images.
        budgets: Of each, as the attack states them.
        network: The node's whole network, in evaluation mode.
        images: The natural images.
        labels: Theirs.
        failed: On which the attack says that it broke down.

    Returns:
        The answers.

    Raises:
        GuessShapeError: If there are other images or budgets than those.
    """
    wanted = (len(images), len(budgets), *images.shape[1:])
    if tuple(adversarial.shape) != wanted or not budgets:
        raise GuessShapeError(
            f"altered images have shape {tuple(adversarial.shape)}, but {len(images)} images and "
            f"budgets {list(budgets)} make {wanted}; alter every image within every budget"
        )
    usable = adversarial.isfinite().flatten(2).all(2)
    if failed is not None:
        usable = usable & ~failed[:, None].to(usable.device)
    natural = images[:, None].expand_as(adversarial)
    kept = torch.where(usable[:, :, None, None, None], adversarial, natural)
    for place, budget in enumerate(budgets):
        refuse_beyond(kept[:, place], images, budget=budget)
    return Evasion(
        labels=labels,
        natural=answers(network, images),
        altered=torch.stack([answers(network, kept[:, k]) for k in range(len(budgets))], dim=1),
        budgets=tuple(budgets),
        failures=int((~usable[:, 0]).sum()),
    )


def answers(
    network: nn.Module, images: Float[Tensor, " images channels height width"]
) -> Int[Tensor, " images"]:
    """Return a network's class for each image; -1 where its outputs are not finite.

    Args:
        network: In evaluation mode.
        images: Any number of them.

    Returns:
        Class indices, or -1.
    """
    with torch.no_grad():
        return torch.cat([predicted(network(chunk)) for chunk in torch.split(images, _BATCH)])
