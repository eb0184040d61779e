"""The server's own part of a split network, as the server itself may read it.

Whoever attacks gets a copy: frozen, in evaluation mode, and never the module that is trained. A
trace holds the part once a round, as it stood at the round's end; beside a training,
:class:`Mirror` brings a copy up to date at every batch.

**U-shaped**: the server reads the features and the gradient it gets back. There the server does not
make the first gradient it sees: the node's head does, from labels it keeps. To an attack on that
head the upper cut is the cut, and features are the smashed data, in training and of test rows.
"""

from collections.abc import Callable, Mapping
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor, nn

from experiments.run.targets import Evidences, MisfitError
from leakbed.contracts import Evidence, Knowledge, Seat, ThreatModel
from leakbed.events import CutGradientDown, FeaturesDown, Phase, SmashedUp, UpperGradientUp
from leakbed.models import Architecture
from leakbed.tap.trace import Trace
from leakbed.tensors import load


def layers(architecture: Architecture, *, stream: int = 0) -> nn.Sequential:
    """Return the server's part of a network, frozen and in evaluation mode.

    Args:
        architecture: The whole network, cut.
        stream: From which its weights are drawn.

    Returns:
        What follows the cut; in a U-shape up to and including the upper cut.
    """
    if architecture.upper_cut is None:
        part = architecture.top(stream)
    else:
        part = architecture.middle(stream)
    return part.eval().requires_grad_(requires_grad=False)


def refuse_seat(seat: Seat) -> None:
    """Refuse the server's part to whoever is not the server.

    Args:
        seat: Of the threat model that names it.

    Raises:
        MisfitError: If it is another.
    """
    if seat != Seat.SERVER:
        raise MisfitError(
            f"the server's part is the server's alone: a {seat} has none; use seat = 'server'"
        )


def refuse_more_than_middle(protocol: str, upper_cut: int | None) -> None:
    """Refuse an attack that makes do with the middle where the server holds first or last layers.

    Args:
        protocol: Its catalogue key.
        upper_cut: Of the network; None where nodes hold no head.

    Raises:
        MisfitError: If nodes hold no head.
    """
    if upper_cut is None:
        raise MisfitError(
            f"the server of {protocol} holds the last layers of the network, or all of them: it "
            "needs no features to alter inputs by, since it can climb the loss itself; use "
            "'u-shaped' with model.upper_cut, where it holds the middle alone"
        )


def held_part(
    trace: Trace, architecture: Architecture, *, round_: int, device: torch.device
) -> nn.Sequential:
    """Return the server's part as a trace holds it.

    Args:
        trace: Of a split run.
        architecture: The whole network, cut.
        round_: At the end of which.
        device: Where it is wanted.

    Returns:
        It, frozen and in evaluation mode.

    Raises:
        MisfitError: If the trace does not hold it, or parties share one.
    """
    about: Mapping[str, Any] = trace.about
    if about.get("divides") == "features":
        raise MisfitError(
            "where parties hold strips of the same images the server's part reads what all of them "
            "send, and cannot be asked about one party's; use an attack without the server's part, "
            "or 'vanilla-split'"
        )
    held = trace.holding("server", f"model/round-{round_}")
    part = layers(architecture)
    missing = [name for name in part.state_dict() if held is None or name not in held]
    if held is None or missing:
        what = "nothing" if held is None else f"no {', '.join(missing)}"
        raise MisfitError(
            f"the trace holds {what} of the server's part at the end of round {round_}; in a "
            f"tapped app, recorder.hold('server', 'model/round-{round_}', <its state_dict as "
            "arrays>) at every round's end"
        )
    load(part, {name: torch.from_numpy(held[name]) for name in part.state_dict()})
    return part.to(device)


class Mirror:
    """A frozen copy of a part that is being trained, brought up to date on demand."""

    def __init__(
        self,
        architecture: Architecture,
        source: Callable[[int], nn.Module],
        *,
        device: torch.device,
    ) -> None:
        """Copy nothing yet.

        Args:
            architecture: The whole network, cut.
            source: Returns the part that is trained with a node, by partition.
            device: Where the copy is wanted.
        """
        self._copy, self._source = layers(architecture).to(device), source

    def __call__(self, node: int) -> nn.Sequential:
        """Return the copy with the weights and buffers of now; it is the same module every time.

        Args:
            node: Whose batch the part was trained on, by partition.

        Returns:
            The copy.
        """
        now: Mapping[str, Tensor] = self._source(node).state_dict()
        with torch.no_grad():
            for name, value in self._copy.state_dict().items():
                value.copy_(now[name])
        return self._copy


def attack_is_on_head(threat: ThreatModel, architecture: Architecture, phase: Phase) -> bool:
    """Say whether an attack is one of the server on what a node's head does.

    Args:
        threat: The attack's.
        architecture: What was trained.
        phase: Of the attacked rows.

    Returns:
        Whether it reads the gradient that a head makes, or infers labels of test rows, of which the
        features under the head say more than the smashed data below.
    """
    if threat.seat != Seat.SERVER:
        return False
    infers = phase == Phase.EVALUATE and Knowledge.KNOWN_LABELS in threat.needs
    return Evidence.CUT_GRADIENT in threat.evidence or (
        infers and architecture.upper_cut is not None
    )


def at_upper_cut(
    trace: Trace, evidences: Evidences, architecture: Architecture
) -> tuple[Architecture, Evidences]:
    """Return a round as the server's attack on the node's head sees it.

    Args:
        trace: Of the round.
        evidences: The attacked round.
        architecture: What was trained.

    Returns:
        The network cut where the head begins, and what crossed there.

    Raises:
        MisfitError: If nodes have no head, so that the server makes the gradient itself.
    """
    if architecture.upper_cut is None:
        raise MisfitError(
            "here the server makes the cut gradient itself, from labels it has; the party that "
            "receives it is the node: seat = 'client' with protocol.labels = 'server'. A server "
            "receives one where nodes hold the head: protocol.name = 'u-shaped'"
        )
    number = max((event.round for event in evidences.smashed.values()), default=0)
    smashed, gradients, evaluated = {}, {}, []
    for event in trace.events(FeaturesDown, UpperGradientUp, round_=number):
        node, step = event.node, event.step
        if isinstance(event, UpperGradientUp):
            gradients[node, step] = CutGradientDown(
                node=node, round=number, step=step, gradient=event.gradient
            )
        elif isinstance(event, FeaturesDown):
            features = SmashedUp(
                node=node, round=number, step=step, smashed=event.features, phase=event.phase
            )
            if event.phase == Phase.TRAIN:
                smashed[node, step] = features
            else:
                evaluated.append(features)
    found = replace(evidences, smashed=smashed, gradients=gradients, evaluated=evaluated)
    return replace(architecture, cut=architecture.upper_cut, upper_cut=None), found
