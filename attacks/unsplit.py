"""UnSplit: invert smashed data and steal the bottom that made it, knowing only its layers.

The server fits an input and a clone of the bottom to one smashed row, in turn: blocks of Adam steps
on the input, then on the clone's weights, both towards the same activations.

Source: Erdogan, Kupcu, Cicek, *UnSplit: Data-Oblivious Model Inversion, Model Stealing, and Label
Inference Attacks Against Split Learning*, WPES 2022, https://arxiv.org/abs/2108.09033, and its
code, https://github.com/ege-erdogan/unsplit.

Departures:
- Targets are one stacked optimisation; weights are frozen in input blocks and inputs in weight
  blocks, where the published code computes gradients it throws away.
- Each target gets a clone of its own (``clone = "fresh"``). The published loop hands one clone from
  target to target (``"warm"``), so its later images profit from the earlier ones; ``"shared"`` fits
  one clone to all targets at once and is ours.
- The published stolen model is scored as victim bottom + clone top, which was never fitted; the
  clone bottoms returned here belong under the victim's top.
- Images are not stretched to [0, 1] for scoring, as the published code does on CIFAR-10.
"""

from dataclasses import dataclass
from functools import reduce
from math import prod
from typing import ClassVar, NamedTuple

import torch
from jaxtyping import Bool, Float, Shaped
from torch import Tensor
from torch.optim import Adam

from attacks.stacked_network import Network, Weights, stack_weights, stacked
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
from leakbed.models import Architecture
from leakbed.naming import unknown
from leakbed.seeds import derive

CLONES = ("fresh", "warm", "shared")


class _Fit(NamedTuple):
    """One attempt at every target.

    Attributes:
        images: The inputs.
        finite: Targets that have not broken down.
        clones: The bottoms; one per target, or one for all.
        objective: Per target, infinite for one that broke down.
    """

    images: Float[Tensor, " targets channels height width"]
    finite: Bool[Tensor, " targets"]
    clones: Weights
    objective: Tensor


@dataclass(frozen=True, kw_only=True)
class UnSplit:
    """Model inversion and stealing from smashed data.

    Attributes:
        outer_steps: Rounds of one input block and one weight block.
        input_steps: Adam steps in an input block.
        model_steps: Adam steps in a weight block.
        input_rate: Step size on the input.
        model_rate: Step size on the clone's weights.
        tv: Weight of the total variation (mean squared difference of neighbours) of the input.
        l2: Weight of the mean squared pixel, which the paper's equation lacks and its code has.
        clone: ``"fresh"`` (one each), ``"warm"`` (published: one, handed from target to target) or
            ``"shared"`` (one, fitted to all targets together).
        restarts: Clones tried per target; the one with the lowest objective is kept.
    """

    outer_steps: int = 1000
    input_steps: int = 100
    model_steps: int = 100
    input_rate: float = 1e-3
    model_rate: float = 1e-3
    tv: float = 0.1
    l2: float = 1.0
    clone: str = "fresh"
    restarts: int = 1

    name: ClassVar[str] = "unsplit"
    source: ClassVar[str] = "Erdogan, Kupcu, Cicek, WPES 2022, https://arxiv.org/abs/2108.09033"

    def __post_init__(self) -> None:
        """Check the settings.

        Raises:
            ValueError: A setting is out of range.
        """
        if self.clone not in CLONES:
            raise ValueError(unknown("clone", self.clone, CLONES))
        for setting in ("outer_steps", "input_steps", "model_steps", "restarts"):
            if getattr(self, setting) < 1:
                raise ValueError(f"{setting} is {getattr(self, setting)}; it must be at least 1")

    @property
    def threat(self) -> ThreatModel:
        """A server that follows the protocol and knows the layers of the bottom."""
        return ThreatModel(
            seat=Seat.SERVER,
            evidence=frozenset({Evidence.SMASHED}),
            needs=frozenset({Knowledge.ARCHITECTURE}),
        )

    def run(self, view: View, *, seed: int) -> Guess:
        """Invert every smashed row and return the clones that explain them.

        Args:
            view: With ``smashed`` and ``architecture``.
            seed: Draws the clones' first weights.

        Returns:
            Images, clones and the objective (activation error plus image priors) per target.
        """
        smashed, architecture = _granted(view)
        streams = [derive(seed, f"restart/{restart}") for restart in range(self.restarts)]
        best = reduce(_better, [self._attempt(smashed, architecture, each) for each in streams])
        return Guess(
            images=best.images.unsqueeze(1),
            objective=best.objective,
            failed=~best.finite,
            clones=best.clones,
        )

    def _attempt(self, smashed: Tensor, architecture: Architecture, seed: int) -> _Fit:
        """Fit every target once, with the clones this setting asks for."""
        run = stacked(architecture.bottom(seed).to(smashed))
        clones = len(smashed) if self.clone == "fresh" else 1
        weights = stack_weights(
            [architecture.bottom(derive(seed, f"clone/{index}")) for index in range(clones)]
        )
        weights = {name: each.to(smashed) for name, each in weights.items()}
        if self.clone != "warm":
            return self._fit(run, weights, smashed, architecture.image_shape)
        fits = []
        for target in range(len(smashed)):
            row = smashed[target : target + 1]
            fits.append(self._fit(run, weights, row, architecture.image_shape))
            weights = dict(fits[-1].clones)
        return _joined(fits)

    def _fit(
        self,
        run: Network,
        start: Weights,
        smashed: Float[Tensor, " targets *cut"],
        image_shape: tuple[int, int, int],
    ) -> _Fit:
        """Alternate between the inputs and the weights of all targets, as published."""
        readable = _finite_rows(smashed)
        smashed = torch.where(_along(readable, smashed), smashed, 0)
        images = smashed.new_full((len(smashed), *image_shape), 0.5).requires_grad_()
        weights = {name: each.clone().requires_grad_() for name, each in start.items()}
        fixed = {name: each.detach() for name, each in weights.items()}  # the same memory
        input_adam = Adam([images], lr=self.input_rate, amsgrad=True, fused=True)
        model_adam = Adam(weights.values(), lr=self.model_rate, amsgrad=True, fused=True)
        objective = smashed.new_full((len(smashed),), torch.inf)
        kept = _Fit(images.detach().clone(), readable, start, objective)
        for _ in range(self.outer_steps):
            for _ in range(self.input_steps):
                images.grad = self._input_gradient(run, fixed, images, smashed)
                input_adam.step()
            for _ in range(self.model_steps):
                _set_gradients(run, weights, images.detach(), smashed, readable)
                model_adam.step()
            kept = _last_finite(kept, images.detach(), fixed)
        return self._judged(kept, run, smashed)

    def _input_gradient(
        self, run: Network, weights: Weights, images: Tensor, smashed: Tensor
    ) -> Float[Tensor, " targets channels height width"]:
        """Return the gradient of each target's objective with respect to its own image.

        The objective is not computed: the residual is the gradient with respect to the activations.
        """
        fitted = run(_for_each(weights, len(images)), images)
        (pulled,) = torch.autograd.grad(fitted, images, fitted.detach() - smashed)
        pixels = images.detach()
        gradient = pulled.mul(2 / prod(smashed.shape[1:]))
        gradient.add_(pixels, alpha=2 * self.l2 / prod(pixels.shape[1:]))
        for axis in (-2, -1):
            step = pixels.diff(dim=axis)
            step.mul_(2 * self.tv / max(prod(step.shape[1:]), 1))
            gradient.narrow(axis, 1, step.shape[axis]).add_(step)
            gradient.narrow(axis, 0, step.shape[axis]).sub_(step)
        return gradient

    def _judged(self, fit: _Fit, run: Network, smashed: Tensor) -> _Fit:
        """Return the fit with its objective: activation error, variation and squared pixels."""
        with torch.no_grad():
            error = run(_for_each(fit.clones, len(smashed)), fit.images) - smashed
        objective = _mean_square(error) + self.l2 * _mean_square(fit.images)
        for axis in (-2, -1):
            objective = objective + self.tv * _mean_square(fit.images.diff(dim=axis))
        finite = fit.finite & objective.isfinite()
        objective = torch.where(finite, objective, torch.inf)
        return _Fit(fit.images, finite, _for_each(fit.clones, len(smashed)), objective)


def _granted(view: View) -> tuple[Tensor, Architecture]:
    """Return what the attack reads, or say what is missing."""
    if view.smashed is None or view.architecture is None:
        raise MissingKnowledgeError(
            "unsplit reads smashed data and needs the bottom's architecture; the view lacks "
            f"{'smashed' if view.smashed is None else 'architecture'}: attack a split protocol"
        )
    if not list(view.architecture.bottom(0).parameters()):
        raise UnfitViewError(
            "the bottom has no weights to steal, so smashed data are the images themselves; cut "
            "after a layer with weights, or use smashed-as-image"
        )
    sent, made = tuple(view.smashed.shape[1:]), view.architecture.smashed_shape
    if sent != made:
        raise UnfitViewError(
            f"smashed rows have shape {sent}, but the architecture's bottom makes {made}; give the "
            "architecture and the cut that made them"
        )
    return view.smashed.detach(), view.architecture


def _set_gradients(
    run: Network, weights: Weights, images: Tensor, smashed: Tensor, readable: Tensor
) -> None:
    """Set the gradient of the activation error on the weights, averaged over a clone's targets."""
    fitted = run(_for_each(weights, len(images)), images)
    residual = fitted.detach() - smashed
    clones = len(next(iter(weights.values())))
    if clones < len(images):
        residual = torch.where(_along(readable, residual), residual, 0)
    scale = 2 / prod(smashed.shape[1:]) * clones / len(images)
    gradients = torch.autograd.grad(fitted, list(weights.values()), residual)
    for weight, gradient in zip(weights.values(), gradients, strict=True):
        weight.grad = gradient.mul(scale).contiguous()  # the fused step reads memory in order


def _for_each(weights: Weights, targets: int) -> Weights:
    """Return one set of weights per target, for a shared clone the same one."""
    return {name: each.expand(targets, *each.shape[1:]) for name, each in weights.items()}


def _finite_rows(tensor: Float[Tensor, " rows *shape"]) -> Bool[Tensor, " rows"]:
    return tensor.isfinite().flatten(1).all(1)


def _along(rows: Bool[Tensor, " rows"], tensor: Shaped[Tensor, " rows *shape"]) -> Tensor:
    """Return a value per row in a shape that broadcasts against a tensor."""
    return rows.reshape(-1, *[1] * (tensor.ndim - 1))


def _mean_square(tensor: Float[Tensor, " rows *shape"]) -> Float[Tensor, " rows"]:
    return tensor.square().flatten(1).mean(1)


def _last_finite(kept: _Fit, images: Tensor, weights: Weights) -> _Fit:
    """Return the new state where it is finite; a target that broke down stays where it was."""
    sound = torch.stack([_finite_rows(each) for each in weights.values()]).all(0)
    finite = kept.finite & _finite_rows(images) & sound
    moved = finite if len(sound) == len(finite) else sound  # a shared clone is nobody's own
    clones = {
        name: torch.where(_along(moved, each), each, kept.clones[name])
        for name, each in weights.items()
    }
    images = torch.where(_along(finite, images), images, kept.images)
    return _Fit(images, finite, clones, kept.objective)


def _better(first: _Fit, second: _Fit) -> _Fit:
    """Return per target the fit with the lower objective."""
    take = second.objective < first.objective

    def pick(one: Tensor, other: Tensor) -> Tensor:
        return torch.where(_along(take, one), other, one)

    return _Fit(
        pick(first.images, second.images),
        pick(first.finite, second.finite),
        {name: pick(each, second.clones[name]) for name, each in first.clones.items()},
        pick(first.objective, second.objective),
    )


def _joined(fits: list[_Fit]) -> _Fit:
    """Return fits of single targets as one."""
    return _Fit(
        torch.cat([fit.images for fit in fits]),
        torch.cat([fit.finite for fit in fits]),
        {name: torch.cat([fit.clones[name] for fit in fits]) for name in fits[0].clones},
        torch.cat([fit.objective for fit in fits]),
    )
