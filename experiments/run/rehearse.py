"""A step of training before training: networks that cannot take one are refused at once.

Each part that a protocol trains takes one step, forward and back, on a few rows of noise, as it
would at its party. So is found what a network does in training alone: a layer that needs more than
one row, a second output, weights that no gradient reaches. Else such a run would end at the first
such batch, perhaps after hours.
"""

from functools import lru_cache
from math import ceil
from typing import NamedTuple

import torch
from torch import Tensor, nn

from experiments.settings.cells import Training
from leakbed.data.partitioning import strip_architecture
from leakbed.lookup import format_error
from leakbed.models import Architecture, IllegalCutError, ModelMismatchError
from leakbed.seeds import generator, scoped
from strategies import find_protocol

_FEW = 2  # rows: the fewest that BatchNorm can take statistics of


class BatchOfOneError(ValueError):
    """A plan with a batch of one row, which a part of the network cannot train on."""


class Role(NamedTuple):
    """A part of the network as one party trains it.

    Attributes:
        part: ``"network"``, ``"bottom"``, ``"middle"``, ``"head"`` or ``"top"``.
        architecture: The whole network as that party sees it.
        reader: The part that reads what this one makes; None where the loss does.
    """

    part: str
    architecture: Architecture
    reader: str | None = None

    def built(self) -> nn.Module:
        """Return the part, with weights of no meaning."""
        whole = self.architecture
        if self.part == "network":
            return whole.build(0)
        module: nn.Module = getattr(whole, self.part)(0)
        return module

    @property
    def shapes(self) -> tuple[tuple[int, ...], tuple[int, ...]]:
        """What a row is that the part reads, and one that it makes."""
        whole = self.architecture
        reads: tuple[int, ...] = whole.image_shape
        if self.part in {"middle", "top"}:
            reads = whole.smashed_shape
        elif self.part == "head":
            reads = whole.features_shape
        makes: tuple[int, ...] = (whole.num_classes,)
        if self.reader is not None:
            makes = whole.features_shape if self.reader == "head" else whole.smashed_shape
        return reads, makes


def rehearse(training: Training, architecture: Architecture, *, rows: tuple[int, ...]) -> None:
    """Let every part take one step on noise, and refuse what cannot train.

    A part without a weight that is trained is an :class:`~leakbed.models.IllegalCutError`.

    Args:
        training: The run's settings.
        architecture: The network; cut, where the protocol cuts it.
        rows: How many each node has.

    Raises:
        ModelMismatchError: A part raises in training, returns something else than in evaluation, or
            leaves its weights without a gradient.
        BatchOfOneError: A batch of one row is to come that a part cannot train on.
    """
    size = training.protocol.batch_size
    for role in roles(training, architecture):
        _refuse_untrained(role)
        if (problem := _problem(role, _FEW)) is not None:
            raise ModelMismatchError(f"model {architecture.name!r}: {problem}")
        joint = role.part == "top" and training.protocol.name == "parallel-split"
        node = _of_one(training, rows, joint=joint)
        if node is None or (problem := _problem(role, 1)) is None:
            continue
        if size == 1:
            raise BatchOfOneError(
                f"protocol.batch_size is 1, and {problem}; set protocol.batch_size to 2 or more, "
                "or use a network without such a layer"
            )
        raise BatchOfOneError(
            f"node {node} has {rows[node]} rows, of which batch_size {size} leaves a batch of one, "
            f"and {problem}; set protocol.local_steps = {rows[node] // size} or another "
            "protocol.batch_size"
        )


def roles(training: Training, architecture: Architecture) -> tuple[Role, ...]:
    """Return the parts that a run trains; an illegal cut raises the error of the cut.

    Args:
        training: Its settings.
        architecture: The whole network.

    Returns:
        From the images up. Of parties that hold strips, the bottoms for the widest and the
        narrowest.
    """
    entry = find_protocol(training.protocol.name)
    if entry.parts == 1:
        return (Role("network", architecture),)
    bottoms = [architecture]
    if entry.divides == "features" and training.data.nodes > 1:
        parties = training.data.nodes
        bottoms = [
            strip_architecture(architecture, party=party, parties=parties)
            for party in (0, parties - 1)
        ]
    if entry.parts == 2:  # noqa: PLR2004  bottom and top
        return (*(Role("bottom", seen, "top") for seen in bottoms), Role("top", architecture))
    middle, head = Role("middle", architecture, "head"), Role("head", architecture)
    return (*(Role("bottom", seen, "middle") for seen in bottoms), middle, head)


def _of_one(training: Training, rows: tuple[int, ...], *, joint: bool) -> int | None:
    """Return the first node with a batch of one row; None where no part trains on one.

    A part that trains on all nodes' rows at once has such a batch where a node may be alone in its
    last step, since all others that take part have fewer.
    """
    protocol = training.protocol
    size, steps = protocol.batch_size, protocol.local_steps
    counts = [ceil(each / size) if steps is None else steps for each in rows]
    taking_part = max(1, int(len(rows) * protocol.fraction))
    for node, each in enumerate(rows):
        if size > 1 and (steps is not None or each % size != 1):
            continue
        fewer = sum(count < counts[node] for count in counts)
        if not joint or fewer >= taking_part - 1:
            return node
    return None


def _refuse_untrained(role: Role) -> None:
    """Refuse a part without a weight that is trained."""
    weights = list(role.built().parameters())
    if any(weight.requires_grad for weight in weights):
        return
    why = ": its weights are frozen (requires_grad = False)" if weights else ""
    if role.part == "network":
        raise ModelMismatchError(
            f"model {role.architecture.name!r} has nothing to train{why}; let it have a layer with "
            "weights that are"
        )
    raise IllegalCutError(
        f"cut {role.architecture.cut} leaves the {role.part} nothing to train{why}; set model.cut "
        "(and model.upper_cut, where there is a head) so that every part has layers with weights "
        "that are trained"
    )


@lru_cache(maxsize=256)
def _problem(role: Role, rows: int) -> str | None:
    """Return why a part cannot train on a batch of so many rows; None if it can."""
    part = role.built().train()
    reads, makes = role.shapes
    first = next(part.parameters())
    batch = torch.rand(rows, *reads, generator=generator(0))
    if role.part not in {"network", "bottom"}:
        batch = batch.to(first.dtype)
    try:
        with scoped(0):
            made = part(batch.requires_grad_(role.part in {"middle", "head", "top"}))
        if (unlike := _unlike(role, made, (rows, *makes))) is not None:
            return unlike
        if made.requires_grad:
            made.square().mean().backward()
    except Exception as error:  # noqa: BLE001  whatever the user's layers raise
        why = " ".join(format_error(error).split())
        return f"the {role.part} cannot train on a batch of {rows}: {why}"
    if all(weight.grad is None for weight in part.parameters()):
        return (
            f"no gradient reaches a weight of the {role.part}; it is detached, or computed under "
            "torch.no_grad"
        )
    return None


def _unlike(role: Role, made: object, shape: tuple[int, ...]) -> str | None:
    """Return what is wrong with the output of a part in training; None if nothing is."""
    if not isinstance(made, Tensor):
        return (
            f"the {role.part} returns a {type(made).__name__} in training, not one tensor; return "
            "the same in training as in evaluation"
        )
    if tuple(made.shape) != shape:
        return (
            f"in training the {role.part} makes {tuple(made.shape)} of {shape[0]} rows, where "
            f"{shape} is expected"
        )
    if role.reader is None:
        return None
    reads = next(Role(role.reader, role.architecture).built().parameters(), made).dtype
    if made.dtype != reads:
        types = [str(each).removeprefix("torch.") for each in (made.dtype, reads)]
        return (
            f"the {role.part} makes {types[0]}, but the weights of the {role.reader} are "
            f"{types[1]}; what crosses a cut has the type of the weights above it, so cast below"
        )
    return None
