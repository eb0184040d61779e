"""Plug-ins outside the catalogue that take part in training steps, and a step to show them."""

from collections.abc import Mapping
from dataclasses import dataclass, replace
from math import prod
from typing import ClassVar

import torch
from torch import Tensor, nn
from torch.nn import functional

from leakbed.contracts import Defense, DefenseState, Holdings, Protects, TrainingStep

HERE = "tests.support.stepping"


def step(images: Tensor, output: Tensor, labels: Tensor | None = None) -> TrainingStep:
    """A step around tensors, of a module that is not looked at."""
    return TrainingStep(
        round=1,
        step=0,
        rows=torch.arange(len(images)),
        images=images,
        shown=images,
        labels=labels,
        module=nn.Identity(),
        output=output,
        output_gradient=torch.zeros_like(output),
        gradients={},
    )


class Training(Defense):
    """What all of them say of themselves."""

    source: ClassVar[str] = "nowhere"
    protects: ClassVar[frozenset[Protects]] = frozenset({Protects.TRAINING})


@dataclass(frozen=True, kw_only=True)
class Proximal(Training):
    """FedProx: stay near the weights that the round began with."""

    name: ClassVar[str] = "proximal"
    mu: float = 1.0

    def prepare(self, state: DefenseState, holdings: Holdings) -> DefenseState:
        return replace(state, tensors=holdings.bottom)

    def train_step(self, state: DefenseState, step: TrainingStep) -> tuple[DefenseState, Tensor]:
        begun = {name: state.tensors[name].to(w) for name, w in step.weights.items()}
        far = [(w - begun[name]).square().sum() for name, w in step.weights.items()]
        return state, self.mu / 2 * torch.stack(far).sum()


@dataclass(frozen=True, kw_only=True)
class RowClipping(Training):
    """Client-side DP-SGD: the sum of clipped gradients of rows, with noise, over their number."""

    name: ClassVar[str] = "row-clipping"
    claims: ClassVar[str] = "what a test says it does"
    clip: float = 0.5
    noise: float = 0.1

    def train_step(
        self, state: DefenseState, step: TrainingStep
    ) -> tuple[DefenseState, Mapping[str, Tensor]]:
        weights, count = step.weights, len(step.output)
        sums = {name: torch.zeros_like(w) for name, w in weights.items()}
        for row in range(count):
            behind = step.output_gradient[row] * count
            made = torch.autograd.grad(
                step.output[row], list(weights.values()), behind, retain_graph=True
            )
            norm = torch.cat([each.flatten() for each in made]).norm()
            for name, each in zip(weights, made, strict=True):
                sums[name] += each * (self.clip / norm).clamp_max(1.0)
        generator = state.generator()
        for each in sums.values():
            drawn = torch.randn(each.shape, generator=generator, dtype=each.dtype)
            each.add_(self.noise * self.clip * drawn.to(each))
        return state, {name: each / count for name, each in sums.items()}


@dataclass(frozen=True, kw_only=True)
class AuxiliaryHead(Training):
    """A linear head on the smashed data that learns the labels beside the task."""

    name: ClassVar[str] = "auxiliary-head"
    exchanges: ClassVar[frozenset[str]] = frozenset({"split"})
    labels: ClassVar[frozenset[str]] = frozenset({"shared", "client"})
    weight: float = 0.5

    def prepare(self, state: DefenseState, holdings: Holdings) -> DefenseState:
        if state.trained:
            return state
        shape = holdings.architecture.num_classes, prod(holdings.architecture.smashed_shape)
        drawn = torch.randn(shape, generator=state.generator()) / shape[1] ** 0.5
        return replace(state, trained={"weight": drawn, "bias": torch.zeros(shape[0])})

    def train_step(self, state: DefenseState, step: TrainingStep) -> tuple[DefenseState, Tensor]:
        assert step.labels is not None
        logits = functional.linear(step.output.flatten(1).float(), **state.trained)
        return state, self.weight * functional.cross_entropy(logits, step.labels)


@dataclass(frozen=True, kw_only=True)
class Mixup(Training):
    """Mixes every image, and its label's loss, with another of the batch."""

    name: ClassVar[str] = "mixup"
    exchanges: ClassVar[frozenset[str]] = frozenset({"weights"})
    share: float = 0.3

    def alter_images(self, state: DefenseState, images: Tensor, rows: Tensor) -> Tensor:
        return images.lerp(images[self._others(state, len(rows))], self.share)

    def train_step(
        self, state: DefenseState, step: TrainingStep
    ) -> tuple[DefenseState, Mapping[str, Tensor]]:
        assert step.labels is not None
        others = step.labels[self._others(state, len(step.labels))]
        loss = (1 - self.share) * functional.cross_entropy(step.output, step.labels)
        loss = loss + self.share * functional.cross_entropy(step.output, others)
        weights = step.weights
        made = torch.autograd.grad(loss, list(weights.values()), retain_graph=True)
        return state, dict(zip(weights, made, strict=True))

    def _others(self, state: DefenseState, count: int) -> Tensor:
        return torch.randperm(count, generator=state.generator())
