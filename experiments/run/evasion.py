"""Altered inputs on a card: the attack's own, and those of adversaries that know less, and more.

Beside an attack stand three rivals that read no message: random signs of the same budget, the same
attack through a shadow that was fitted to nothing, and through a substitute, a whole network of the
same layers trained on the adversary's own images and labels. Three bounds know what it does not: a
shadow told what the node's images send, the node's own layers, and the whole network with the true
labels. The control is the attack on smashed data of another bottom, of fresh weights: it has
what the attack has but for this node's layers. It is judged against the rivals, which it may beat:
another bottom's data are of the node's images all the same, and a shadow fitted to them suits the
server's part better than a fresh one (2026-11-29; an earlier version said that it should fare as
the untrained shadow does).
"""

from __future__ import annotations

from copy import deepcopy
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Protocol, runtime_checkable

import torch
from torch import Tensor, nn

from experiments.run.targets import MisfitError
from experiments.run.view import architecture_of
from leakbed.contracts import Guess
from leakbed.models import halves, sequence
from leakbed.oracle.rivals import (
    ORACLE_SHADOW,
    RANDOM_SIGNS,
    SUBSTITUTE,
    TRUE_FEATURES,
    UNTRAINED_SHADOW,
    WHITE_BOX,
)
from leakbed.perturbation import against_labels, ascend, random_signs
from leakbed.seeds import derive, generator, scoped
from leakbed.tensors import load

if TYPE_CHECKING:
    from collections.abc import Callable, Sequence

    from jaxtyping import Float, Int

    from leakbed.contracts import View
    from leakbed.events import Arrays, Target
    from leakbed.models import Architecture
    from leakbed.oracle.truth import AnswerKey
    from leakbed.tap.trace import Trace

_PASSES, _RATE, _BATCH = 20, 1e-3, 64
"""How the substitute is trained: by Adam, each public image 20 times."""
_STEPS = 20
"""Steps of the white box, each an eighth of the budget."""


@runtime_checkable
class Shadowing(Protocol):
    """An attack that alters inputs through a shadow of the node's layers, taken apart."""

    def untrained(self, view: View, *, seed: int) -> nn.Module:
        """Return a shadow that was fitted to nothing."""
        ...

    def taught(
        self,
        view: View,
        images: Float[Tensor, " pairs channels height width"],
        smashed: Float[Tensor, " pairs *cut"],
        *,
        seed: int,
    ) -> nn.Module:
        """Return a shadow that was told what images send."""
        ...

    def crafted(self, bottom: nn.Module, view: View, *, seed: int) -> Guess:
        """Return the view's natural images, altered through a bottom and the server's part."""
        ...


@dataclass(frozen=True, kw_only=True, eq=False)
class Victim:
    """The node's whole trained network, and what the oracle knows beside it.

    Attributes:
        bottom: The node's first layers.
        network: All of it, in evaluation mode.
        architecture: Its layers.
        answers: The run's.
    """

    bottom: nn.Module
    network: nn.Module
    architecture: Architecture
    answers: AnswerKey

    def on(self, device: torch.device | None) -> Victim:
        """Return a copy whose layers lie on a device: where the view's images lie."""
        bottom, network = deepcopy((self.bottom, self.network))
        return replace(self, bottom=bottom.to(device), network=network.to(device))


def beside(
    attack: object,
    view: View,
    victim: Victim,
    *,
    budgets: tuple[float, ...],
    labels: Int[Tensor, " targets"],
    stream: int,
) -> dict[str, Tensor]:
    """Return the altered images of rivals and bounds, by their names.

    Args:
        attack: Whose they stand beside; one that has no shadow gets random signs and the white box.
        view: What it read.
        victim: The oracle's.
        budgets: Those of the attack.
        labels: Of the natural images.
        stream: Of everything that is drawn.

    Returns:
        Images by target and budget, on the CPU.

    Raises:
        ValueError: If the view has no natural images.
    """
    images = view.natural_images
    if images is None:
        raise ValueError("the view has no natural images")
    drawn = generator(derive(stream, RANDOM_SIGNS))
    start = generator(derive(stream, WHITE_BOX))
    victim = victim.on(view.device)
    climbed = against_labels(victim.network, labels.to(images.device))
    found = {
        RANDOM_SIGNS: _each(budgets, lambda b: random_signs(images, budget=b, generator=drawn)),
        WHITE_BOX: _each(
            budgets,
            lambda b: ascend(climbed, images, budget=b, step=b / 8, steps=_STEPS, generator=start),
        ),
    }
    if isinstance(attack, Shadowing):
        bottoms = _bottoms(attack, view, victim, stream=derive(stream, "shadows"))
        for name, bottom in bottoms.items():
            found[name] = _altered(attack.crafted(bottom.eval(), view, seed=derive(stream, name)))
        lower, middle = _substitute(view, victim, stream=derive(stream, SUBSTITUTE))
        theirs = replace(view, server_part=middle)
        found[SUBSTITUTE] = _altered(attack.crafted(lower, theirs, seed=derive(stream, SUBSTITUTE)))
    return found


def of_another(view: View, victim: Victim, *, stream: int) -> View:
    """Return a view whose smashed data are those of a bottom of fresh weights, on the same images.

    Args:
        view: What an attack read.
        victim: The oracle's.
        stream: Of the other weights.

    Returns:
        The view with another ``round_smashed`` of as many rows.
    """
    rows = 0 if view.round_smashed is None else len(view.round_smashed)
    other = victim.architecture.bottom(derive(stream, "other")).to(view.device).eval()
    images = victim.answers.images[:rows].to(view.device)
    with torch.no_grad():
        smashed = torch.cat([other(chunk) for chunk in torch.split(images, 256)])
    return replace(view, round_smashed=smashed)


def _bottoms(attack: Shadowing, view: View, victim: Victim, *, stream: int) -> dict[str, nn.Module]:
    """Return what stands in the shadow's place; the oracle has as many pairs as public images."""
    count = 0 if view.public_images is None else len(view.public_images)
    images = victim.answers.images[:count].to(view.device)
    with torch.no_grad():
        smashed = torch.cat([victim.bottom(chunk) for chunk in torch.split(images, 256)])
    return {
        UNTRAINED_SHADOW: attack.untrained(view, seed=derive(stream, UNTRAINED_SHADOW)),
        ORACLE_SHADOW: attack.taught(view, images, smashed, seed=derive(stream, ORACLE_SHADOW)),
        TRUE_FEATURES: victim.bottom,
    }


def _substitute(view: View, victim: Victim, *, stream: int) -> tuple[nn.Module, nn.Module]:
    """Return bottom and middle of a network that knows the adversary's own images alone."""
    images = victim.answers.public_images.to(view.device)
    labels = victim.answers.public_labels.to(view.device).long()
    classes = max(int(labels.max()) + 1, 2)
    layers = replace(victim.architecture, num_classes=classes)
    network = layers.build(derive(stream, "weights")).to(view.device)
    adam = torch.optim.Adam(network.parameters(), _RATE)
    drawn = generator(derive(stream, "order"))
    with scoped(derive(stream, "layers")):
        for _ in range(_PASSES):
            for chosen in torch.randperm(len(images), generator=drawn).split(_BATCH):
                if len(chosen) > 1:  # BatchNorm has no spread of one image
                    adam.zero_grad()
                    nn.functional.cross_entropy(network(images[chosen]), labels[chosen]).backward()
                    adam.step()
    network.eval().requires_grad_(requires_grad=False)
    bottom, top = halves(sequence(network), layers.cut or 0)
    return bottom, top if layers.upper_cut is None else top[: layers.upper_cut + 1 - len(bottom)]


def _each(budgets: tuple[float, ...], made: Callable[[float], Tensor]) -> Tensor:
    return torch.stack([made(budget) for budget in budgets], dim=1).cpu()


def _altered(guess: Guess) -> Tensor:
    if guess.adversarial is None:
        raise ValueError("an attack that alters inputs returned none")
    return guess.adversarial.cpu()


def victim_of(answers: AnswerKey, trace: Trace, targets: Sequence[Target]) -> Victim:
    """Return the network that altered inputs are for.

    Args:
        answers: The run's.
        trace: The run's.
        targets: Which inputs were altered.

    Returns:
        The whole network as the last round left it.

    Raises:
        MisfitError: The answer key has no such network.
    """
    if answers.bottom is None or not at_the_end(targets, trace):
        raise MisfitError(
            "altered inputs are scored on the whole network as the last round left it, which the "
            "answer key has of a split run that ended; use collect = 'last'"
        )
    bottom, top, architecture = whole_network(answers, trace)
    return Victim(
        bottom=bottom.eval(),
        network=nn.Sequential(bottom, top).eval().requires_grad_(requires_grad=False),
        architecture=architecture,
        answers=answers,
    )


def at_the_end(targets: Sequence[Target], trace: Trace) -> bool:
    """Say whether the last round was attacked: the oracle keeps no bottom of an earlier one."""
    number = targets[0].round
    return bool(number == trace.about.get("rounds", number))


def whole_network(
    answers: AnswerKey, trace: Trace
) -> tuple[nn.Sequential, nn.Sequential, Architecture]:
    """Return the network as the last round left it, in two parts, and its layers."""
    architecture = architecture_of(trace.about)
    bottom, top = architecture.bottom(0), architecture.top(0)
    held = trace.holding("server", f"model/round-{trace.about['rounds']}")
    # Of a U-shaped model the server lacks the head, which the answer key has beside the bottom.
    whole = {**_tensors(answers.bottom or {}), **_tensors(held or {})}
    for part in (bottom, top):
        load(part, {name: whole[name] for name in part.state_dict()})
    return bottom, top, architecture


def _tensors(arrays: Arrays) -> dict[str, Tensor]:
    return {name: torch.from_numpy(value) for name, value in arrays.items()}
