"""Label DP: training labels are flipped at random, once, before the first step.

Randomised response keeps a label with probability e^epsilon / (e^epsilon + K - 1) and otherwise
draws one of the others; with a prior, only the k classes that promise the most right labels are
answered, and k is chosen by the prior.

Source: Ghazi, Golowich, Kumar, Manurangsi, Zhang. "Deep Learning with Label Differential Privacy",
NeurIPS 2021, https://arxiv.org/abs/2102.06062, algorithms 1 to 3 with one stage; randomised
response is Warner's, 1965.
Departures from the source:
- ``form = "published"`` is what the code of Liu, Lyu, Cui, Tao (TIFS 2024,
  https://arxiv.org/abs/2203.05222) does: a label outside the top k becomes any of *all* classes. A
  class outside the top k is then answered for such labels alone, so no epsilon holds.
- Without ``prior`` the frequencies of the labels at hand are taken, as in that code; they are not
  learnt privately, so that epsilon holds for a prior known beforehand alone.
- That code also mixes noisy labels pairwise (mixup); not here.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from math import exp, inf, isclose
from typing import ClassVar

import torch
from jaxtyping import Float, Int, Shaped
from torch import Tensor

from leakbed.contracts import Defense, IllegalCombinationError, Protects
from leakbed.defending import Run
from leakbed.naming import unknown
from leakbed.seeds import generator

_LEGAL = {
    "mechanism": ("randomised-response", "rr-with-prior"),
    "form": ("corrected", "published"),
}


@dataclass(frozen=True, kw_only=True)
class LabelDP(Defense):
    """Train with noisy labels.

    A sample's label is drawn once and stays in all rounds, so training longer reveals no more. It
    protects training labels alone: what the trained model says of a sample, or what its smashed
    data look like, may still follow the true class.

    Attributes:
        epsilon: Of each label, above 0; smaller keeps fewer.
        mechanism: ``"randomised-response"`` or ``"rr-with-prior"``.
        form: ``"corrected"``, or ``"published"``, which rr-with-prior alone has.
        prior: Share of each class, for rr-with-prior; empty for the frequencies of the labels.
    """

    name: ClassVar[str] = "label-dp"
    source: ClassVar[str] = "Ghazi et al., NeurIPS 2021, https://arxiv.org/abs/2102.06062"
    protects: ClassVar[frozenset[Protects]] = frozenset({Protects.LABELS})
    claims: ClassVar[str] = (
        "(epsilon, 0) of each training label, nothing clipped, over any number of rounds"
    )

    epsilon: float = 1.0
    mechanism: str = "randomised-response"
    form: str = "corrected"
    prior: Sequence[float] = ()

    def __post_init__(self) -> None:
        """Check the settings.

        Raises:
            ValueError: If one is out of its range, has no such name, or would be ignored.
        """
        for setting, legal in _LEGAL.items():
            if (value := getattr(self, setting)) not in legal:
                raise ValueError(unknown(setting, value, legal))
        if not 0 < self.epsilon < inf:
            raise ValueError(
                f"label-dp needs a finite epsilon > 0, got {self.epsilon}; leave the defence out "
                "to keep every label"
            )
        if self.mechanism != "rr-with-prior" and (self.prior or self.form == "published"):
            raise ValueError("label-dp: prior and form = 'published' are rr-with-prior's alone")
        if self.prior and (min(self.prior) < 0 or not isclose(sum(self.prior), 1, abs_tol=1e-6)):
            raise ValueError(f"label-dp needs a prior of shares that add up to 1, got {self.prior}")

    def check_run(self, run: Run) -> None:
        """Refuse a prior of other classes.

        Args:
            run: Its number of classes is looked at.

        Raises:
            IllegalCombinationError: If the prior has another.
        """
        if self.prior and len(self.prior) != run.classes:
            raise IllegalCombinationError(
                f"label-dp has a prior of {len(self.prior)} classes, this task has {run.classes}; "
                "give each a share"
            )

    def noised_labels(
        self, stream: int, labels: Shaped[Tensor, " rows"], *, classes: int
    ) -> Int[Tensor, " rows"]:
        """Return the labels to train with.

        Args:
            stream: Fixes the noise of every row.
            labels: The true ones.
            classes: Labels are 0 to ``classes - 1``.

        Returns:
            As many.

        Raises:
            IllegalCombinationError: If labels are no classes, as in regression.
        """
        if labels.is_floating_point():
            raise IllegalCombinationError(
                f"label-dp noises classes, these labels are numbers of {labels.dtype}; use "
                "'dp-cut-gradient', which does not look at them"
            )
        order, kept = self._answered(labels, classes)
        ranks = order.argsort()[labels]
        keep, other, anywhere = torch.rand(
            3, len(labels), generator=generator(stream), dtype=torch.float64
        )
        others = (other * (kept - 1)).long()
        others += others >= ranks  # any but the label itself
        inside = torch.where(keep < self.keep_rate(kept), ranks, others)
        outside = (anywhere * (kept if self.form == "corrected" else classes)).long()
        return order[torch.where(ranks < kept, inside, outside)].to(labels)

    def keep_rate(self, classes: int) -> float:
        """Return how likely a label stays that is one of the classes answered.

        Args:
            classes: How many are answered.

        Returns:
            In (0, 1].
        """
        return 1 / (1 + (classes - 1) * exp(-self.epsilon))

    def answered(self, prior: Float[Tensor, " classes"]) -> int:
        """Return how many of the likeliest classes rr-with-prior answers with.

        Args:
            prior: Share of each class, in any order.

        Returns:
            The k that keeps the most labels right.
        """
        likeliest = prior.sort(descending=True).values.cumsum(0).tolist()
        kept = [self.keep_rate(k) * share for k, share in enumerate(likeliest, start=1)]
        return 1 + max(range(len(kept)), key=kept.__getitem__)

    def _answered(
        self, labels: Int[Tensor, " rows"], classes: int
    ) -> tuple[Int[Tensor, " classes"], int]:
        """Return the classes, likeliest first, and how many of them are answered."""
        if self.mechanism == "randomised-response":
            return torch.arange(classes), classes
        prior = torch.tensor(self.prior, dtype=torch.float64)
        if not self.prior:
            counts = torch.bincount(labels, minlength=classes).double()
            prior = counts / counts.sum()
        return prior.argsort(descending=True, stable=True), self.answered(prior)
