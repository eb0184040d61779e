"""UnSplit's label inference: which label explains the gradient that a private head produced.

The server runs a head of its own on the features it sent, computes the gradient for every label,
guesses the label whose gradient is nearest to the observed one, and trains its head on the guess.

Source: Erdogan, Kupcu, Cicek, *UnSplit: Data-Oblivious Model Inversion, Model Stealing, and Label
Inference Attacks Against Split Learning*, WPES 2022, https://arxiv.org/abs/2108.09033, and its
code, https://github.com/ege-erdogan/unsplit.

What is observed is declared, because it decides the result:
- ``"head-weight-gradient"`` is the published experiment, which gets every label right. The gradient
  of a linear head's weights carries the label in its rows; a server sees it only where heads are
  shipped after a step on one sample, as SplitFed does.
- ``"cut-gradient"`` is the message U-shaped split learning sends. It is the same error seen through
  the head's unknown weights, so nothing ties a guess to a label: accuracy is chance on average over
  heads, but one pair of heads may agree on some classes by luck (0 to 57 % on digits), so attack
  several.

Departures:
- All labels are tried in one batch.
- By default only directions are compared (``scale = "unknown"``, ours), since a head seen before
  and after a step gives its gradient up to a positive factor; ``"known"`` is as published.
"""

from dataclasses import dataclass
from typing import ClassVar

import torch
from jaxtyping import Float
from torch import Tensor, nn
from torch.nn.functional import cross_entropy
from torch.optim import Adam

from leakbed.contracts import (
    Evidence,
    Guess,
    Knowledge,
    MissingKnowledgeError,
    Seat,
    ThreatModel,
    UnfitViewError,
    View,
)
from leakbed.naming import unknown
from leakbed.seeds import derive

MODES = ("head-weight-gradient", "cut-gradient")
SCALES = ("known", "unknown")
SEATS = ("server", "client")


@dataclass(frozen=True, kw_only=True)
class UnSplitLabels:
    """Label inference by matching the gradient of a private head.

    Attributes:
        mode: What is observed, as the module says.
        rate: Adam step size of the clone head, which learns from each guess; 0 never trains it.
        scale: ``"unknown"`` compares directions only, ``"known"`` (published) gradients.
        seat: The ``"server"`` where nodes keep a head to themselves (published); the ``"client"``
            where the server holds the labels and the top is the head.
    """

    mode: str = "head-weight-gradient"
    rate: float = 1e-3
    scale: str = "unknown"
    seat: str = "server"

    name: ClassVar[str] = "unsplit-labels"
    source: ClassVar[str] = "Erdogan, Kupcu, Cicek, WPES 2022, https://arxiv.org/abs/2108.09033"

    def __post_init__(self) -> None:
        """Check the settings.

        Raises:
            ValueError: A setting is none of its legal values.
        """
        if self.mode not in MODES:
            raise ValueError(unknown("mode", self.mode, MODES))
        if self.scale not in SCALES:
            raise ValueError(unknown("scale", self.scale, SCALES))
        if self.seat not in SEATS:
            raise ValueError(unknown("seat", self.seat, SEATS))
        if self.rate < 0:
            raise ValueError(f"rate is {self.rate}; it must not be negative")

    @property
    def threat(self) -> ThreatModel:
        """A party that knows the layers of the head the other one keeps to itself."""
        return ThreatModel(
            seat=Seat(self.seat),
            evidence=frozenset({Evidence.SMASHED, Evidence(self.mode)}),
            needs=frozenset({Knowledge.ARCHITECTURE}),
        )

    def run(self, view: View, *, seed: int) -> Guess:
        """Guess the label behind every gradient, in the order they were sent.

        Args:
            view: With ``smashed`` (the features the private head reads), the gradient of the mode
                and an ``architecture`` whose top is that head.
            seed: Draws the clone head's first weights.

        Returns:
            Labels, and the distance of the nearest gradient as objective.
        """
        features, observed, head = self._granted(view, seed)
        adam = Adam(head.parameters(), lr=self.rate, amsgrad=True)
        nearest = features.new_full((view.targets,), torch.inf)
        labels = torch.zeros(view.targets, dtype=torch.int64, device=features.device)
        for target in range(view.targets):
            row = features[target : target + 1]
            distances = self._distances(head, row, observed[target], view.num_classes)
            if not distances.isfinite().all():
                continue
            nearest[target], labels[target] = distances.min(0)
            adam.zero_grad()
            cross_entropy(head(row), labels[target : target + 1]).backward()
            adam.step()
        return Guess(labels=labels.unsqueeze(1), objective=nearest, failed=nearest.isinf())

    def _granted(self, view: View, seed: int) -> tuple[Tensor, Tensor, nn.Sequential]:
        """Return the features, the gradients and a fresh clone head, or say what does not fit."""
        head_mode = self.mode == "head-weight-gradient"
        observed = view.head_gradient if head_mode else view.cut_gradient
        if view.smashed is None or observed is None or view.architecture is None:
            raise MissingKnowledgeError(
                f"unsplit-labels in mode {self.mode!r} reads the features before a private head "
                "and its gradient, and needs the head's architecture; the view lacks one of them. "
                "Use a protocol whose nodes keep their head, or the other mode"
            )
        if view.rows != 1:
            raise UnfitViewError(
                f"{view.rows} samples stand behind each gradient; unsplit-labels matches the "
                "gradient of one sample, so run the protocol with batch size 1 and one local step"
            )
        features = view.smashed.detach()
        head = view.architecture.top(derive(seed, "clone-head")).to(features)
        expected = (*_first_linear(head).weight.shape,) if head_mode else features.shape[1:]
        if tuple(observed.shape[1:]) != tuple(expected):
            raise UnfitViewError(
                f"gradients have shape {tuple(observed.shape[1:])}, but in mode {self.mode!r} the "
                f"clone head's have {tuple(expected)}; cut the architecture where its top is the "
                "private head"
            )
        return features, observed.detach(), head

    def _distances(
        self, head: nn.Sequential, row: Tensor, observed: Tensor, num_classes: int
    ) -> Float[Tensor, " classes"]:
        """Return the mean squared distance of each label's gradient to the observed one."""
        if self.mode == "cut-gradient":
            candidates = _cut_gradients(head, row, num_classes).flatten(1)
        else:
            candidates = _weight_gradients(head, row, num_classes).flatten(1)
        observed = observed.flatten()
        if self.scale == "unknown":
            candidates = nn.functional.normalize(candidates, dim=1)
            observed = nn.functional.normalize(observed, dim=0)
        return (candidates - observed).square().mean(1)


def _cut_gradients(
    head: nn.Sequential, row: Tensor, num_classes: int
) -> Float[Tensor, " classes *cut"]:
    """Return the loss gradient with respect to the features, for every label."""
    rows = row.expand(num_classes, *row.shape[1:]).clone().requires_grad_()
    every = torch.arange(num_classes, device=row.device)
    loss = cross_entropy(head(rows), every, reduction="sum")
    (gradients,) = torch.autograd.grad(loss, rows)
    return gradients


def _weight_gradients(
    head: nn.Sequential, row: Tensor, num_classes: int
) -> Float[Tensor, " classes outputs features"]:
    """Return the loss gradient with respect to the first linear layer's weights, for every label.

    It is the outer product of the gradient at the layer's output and the features.
    """
    first = _first_linear(head)
    outputs = first(row.flatten(1)).detach().expand(num_classes, -1).clone().requires_grad_()
    rest = head[list(head).index(first) + 1 :]
    every = torch.arange(num_classes, device=row.device)
    loss = cross_entropy(rest(outputs), every, reduction="sum")
    (gradients,) = torch.autograd.grad(loss, outputs)
    return torch.einsum("co,f->cof", gradients, row.flatten())


def _first_linear(head: nn.Sequential) -> nn.Linear:
    """Return the linear layer that reads the features."""
    layers = [layer for layer in head if not isinstance(layer, nn.Flatten)]
    if not layers or not isinstance(layers[0], nn.Linear):
        first = type(layers[0]).__name__ if layers else "nothing"
        raise UnfitViewError(
            f"the private head starts with {first}; the weight gradient is matched for a linear "
            "layer: cut just before one, or use mode 'cut-gradient'"
        )
    return layers[0]
