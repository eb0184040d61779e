"""Hijacking: the one active hook, which puts an adversary's gradients in place of the server's.

The hook pairs the smashed batch of a node's reply with the gradient of its next message and sends
what the adversary makes of the two. The protocol goes on undisturbed: its server part trains as
ever (so a U-shaped node's loss keeps falling) and never learns that its gradients do not arrive.
:func:`rehearse` runs the same adversary on tensors alone, with the same bits and without Flower.
"""

import copy
from collections.abc import Callable, Iterable
from dataclasses import dataclass, replace
from typing import Any, Generic

import torch
from jaxtyping import Float
from torch import Tensor, nn

from leakbed.contracts import Adversary, Guess, State, View
from leakbed.events import CutGradientDown, Event, Phase, SmashedUp
from leakbed.seeds import guarded, scoped
from leakbed.tensors import finite


class HijackError(RuntimeError):
    """A gradient that cannot be forged, or a forged one that cannot be sent."""


class Hijack(Generic[State]):
    """The owner of an adversary's state, and as such the active hook of a ``Wiretap``.

    Attributes:
        adversary: Whom it serves.
        iteration: Gradients forged so far.
    """

    def __init__(self, adversary: Adversary[State], view: View, *, seed: int) -> None:
        """Let the adversary begin; what it refuses, it refuses here.

        Args:
            adversary: Its threat model is active.
            view: What that threat model grants before training.
            seed: The adversary's own stream.

        Raises:
            HijackError: If the adversary is a passive one.
        """
        if not adversary.threat.active:
            raise HijackError(
                f"{adversary.name} says that it rewrites nothing (threat.active is False); run it "
                "on the trace"
            )
        self.adversary, self.iteration = adversary, 0
        self._waiting: dict[tuple[int, int, int], Tensor] = {}
        with guarded():
            self._state = adversary.begin(view, seed=seed)

    def __call__(self, event: Event) -> Event | None:
        """Keep a smashed batch of training, or return its gradient's forgery.

        Args:
            event: From the wiretap.

        Returns:
            The forged event; None for what passes unchanged.
        """
        if isinstance(event, SmashedUp) and event.phase == Phase.TRAIN:
            place = event.node, event.round, event.step
            self._waiting[place] = torch.from_numpy(event.smashed)
        if not isinstance(event, CutGradientDown):
            return None
        forged = self.forge(self._paired(event), torch.from_numpy(event.gradient))
        return replace(event, gradient=forged.detach().cpu().numpy())

    @property
    def state(self) -> State:
        """The adversary's state as it stands; to be read, never changed."""
        return self._state

    def forge(
        self, smashed: Float[Tensor, " batch *cut"], cut_gradient: Float[Tensor, " batch *cut"]
    ) -> Float[Tensor, " batch *cut"]:
        """Return what the node is sent instead of the honest gradient.

        Args:
            smashed: What the node sent.
            cut_gradient: The honest answer.

        Returns:
            The forged answer.

        Raises:
            HijackError: If the adversary's gradient has another shape or type, or is not finite.
        """
        with guarded():
            self._state, forged = self.adversary.forge(self._state, smashed, cut_gradient)
        self.iteration += 1
        if (forged.shape, forged.dtype) != (cut_gradient.shape, cut_gradient.dtype):
            raise HijackError(
                f"{self.adversary.name} made a gradient of {tuple(forged.shape)} {forged.dtype} "
                f"for one of {tuple(cut_gradient.shape)} {cut_gradient.dtype}"
            )
        if not finite(forged):
            raise HijackError(
                f"{self.adversary.name} left the finite numbers at iteration {self.iteration}; "
                "lower its learning rates or its gradient scale"
            )
        return forged

    def guess(self, smashed: Float[Tensor, " batch *cut"]) -> Guess:
        """Return the adversary's reconstruction of a smashed batch, with its state as it stands."""
        with guarded():
            return self.adversary.guess(self._state, smashed)

    def _paired(self, event: CutGradientDown) -> Tensor:
        """Return the smashed batch that a gradient answers."""
        smashed = self._waiting.pop((event.node, event.round, event.step), None)
        if smashed is None or smashed.shape != event.gradient.shape:
            found = "none came" if smashed is None else f"one of {tuple(smashed.shape)} came"
            raise HijackError(
                f"a gradient of shape {event.gradient.shape} goes to node {event.node} for round "
                f"{event.round}, step {event.step}, but as its smashed batch {found}; hijack a "
                "split protocol whose replies pass this wiretap"
            )
        return smashed


@dataclass(frozen=True, kw_only=True, eq=False)
class Rehearsal(Generic[State]):
    """What a rehearsal leaves behind.

    Attributes:
        bottom: The client's part, trained on forged gradients.
        hijack: With the adversary's last state.
    """

    bottom: nn.Module
    hijack: Hijack[State]


def rehearse(
    bottom: nn.Module,
    adversary: Adversary[State],
    batches: Iterable[Float[Tensor, " batch *image"]],
    *,
    view: View,
    seed: int,
    optimiser: Callable[[Any], torch.optim.Optimizer],
    honest: Callable[[int, Tensor], Tensor] | None = None,
    forward_stream: Callable[[int], int] | None = None,
    watch: Callable[[int, nn.Module, Hijack[State]], object] | None = None,
) -> Rehearsal[State]:
    """Hijack one client's training in a plain loop, without Flower.

    Bit for bit the run of one node through ``LocalGrid``, given the same batches and one torch
    thread; any device.

    Args:
        bottom: The client's part with its first weights; a copy is trained.
        adversary: The attack.
        batches: The client's private batches in order, on the bottom's device.
        view: What the adversary's threat model grants before training.
        seed: The adversary's own stream.
        optimiser: Makes the client's optimiser over its parameters.
        honest: Given step and smashed batch, the gradient that an honest server would send; None
            gives the adversary zeros, which is enough for one that does not read them.
        forward_stream: The stream of each step's forward pass, for a bottom with dropout.
        watch: Called with the step, the client's part and the hijack after every step.

    Returns:
        The trained part and the adversary's state.
    """
    trained = copy.deepcopy(bottom).train()
    hijack = Hijack(adversary, view, seed=seed)
    adam = optimiser(trained.parameters())
    for step, images in enumerate(batches):
        if forward_stream is None:
            smashed = trained(images)
        else:
            with scoped(forward_stream(step)):
                smashed = trained(images)
        sent = smashed.detach()
        gradient = torch.zeros_like(sent) if honest is None else honest(step, sent)
        forged = hijack.forge(sent.clone(), gradient)
        adam.zero_grad()
        smashed.backward(forged.to(smashed.device))
        adam.step()
        if watch is not None:
            watch(step, trained, hijack)
    return Rehearsal(bottom=trained, hijack=hijack)
