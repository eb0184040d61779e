"""What the server of a U-shaped round reads of the head: features, and the gradient it gets back.

There the server does not make the first gradient it sees: the node's head does, from labels it
keeps. To an attack on that head the upper cut is the cut, and features are the smashed data.
"""

from dataclasses import replace

from leakbed.events import CutGradientDown, FeaturesDown, Phase, SmashedUp, UpperGradientUp
from leakbed.models import Architecture
from leakbed.targets import Evidences, MisfitError
from leakbed.trace import Trace


def at_upper_cut(
    trace: Trace, evidences: Evidences, architecture: Architecture
) -> tuple[Architecture, Evidences]:
    """Return a round as the server's attack on the node's head sees it.

    Args:
        trace: Of the round.
        evidences: The attacked round.
        architecture: What was trained.

    Returns:
        The network cut where the head begins, and what crossed there in training.

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
    smashed, gradients = {}, {}
    for event in trace.events(FeaturesDown, UpperGradientUp, round_=number):
        node, step = event.node, event.step
        if isinstance(event, UpperGradientUp):
            gradients[node, step] = CutGradientDown(
                node=node, round=number, step=step, gradient=event.gradient
            )
        elif isinstance(event, FeaturesDown) and event.phase == Phase.TRAIN:
            smashed[node, step] = SmashedUp(
                node=node, round=number, step=step, smashed=event.features
            )
    found = replace(evidences, smashed=smashed, gradients=gradients)
    return replace(architecture, cut=architecture.upper_cut, upper_cut=None), found
