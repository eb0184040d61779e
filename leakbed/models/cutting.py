"""Cut a network into the part a node keeps and the part the server holds, and join them again.

Both parts keep the layers' own names, so the whole network's ``state_dict`` is the bottom's entries
plus the top's, and weights move between the three without renaming.
"""

from collections import OrderedDict
from copy import deepcopy
from dataclasses import dataclass

import torch
from torch import nn

from leakbed.models.networks import ACTIVATIONS


class IllegalCutError(ValueError):
    """A cut where the network cannot be parted; the message names the legal ones."""


@dataclass(frozen=True, kw_only=True, eq=False)
class Parts:
    """A network in two.

    Attributes:
        bottom: Layers up to and including the cut; the node's part.
        top: The layers after it.
        smashed_shape: Shape of one row of the bottom's output.
    """

    bottom: nn.Sequential
    top: nn.Sequential
    smashed_shape: tuple[int, ...]


def linear_above(layers: nn.Sequential, at: int | None) -> nn.Sequential:
    """Return a network whose activations above a cut pass everything on unchanged.

    Args:
        layers: Of the whole network, which are shared.
        at: Index of the last layer of the bottom.

    Returns:
        As many layers, under the same names.

    Raises:
        IllegalCutError: If the network is not cut.
    """
    if at is None:
        raise IllegalCutError(
            "linear_top leaves out the activations above the cut, and there is none; set model.cut"
        )
    kinds = set(ACTIVATIONS.values())
    named = [
        (name, nn.Identity() if index > at and type(layer) in kinds else layer)
        for index, (name, layer) in enumerate(layers.named_children())
    ]
    return nn.Sequential(OrderedDict(named))


def sequence(model: nn.Module) -> nn.Sequential:
    """Return the layers of a network as a plain sequence that shares its modules and their names.

    Args:
        model: An ``nn.Sequential``, or a module whose attribute ``stages`` lists the names of its
            direct submodules in the order its ``forward`` runs them.

    Returns:
        One layer per stage.

    Raises:
        IllegalCutError: It is neither, names a stage it does not have, or keeps parameters or
            buffers outside its stages.
    """
    children = _children(model)
    stages = getattr(model, "stages", None)
    if stages is None and isinstance(model, nn.Sequential):
        stages = list(children)
    if not isinstance(stages, list | tuple) or not all(isinstance(name, str) for name in stages):
        raise IllegalCutError(
            f"{type(model).__name__} cannot be cut: make it an nn.Sequential, or give it an "
            "attribute `stages` that lists the names of its submodules in the order they run"
        )
    if missing := [name for name in stages if name not in children]:
        raise IllegalCutError(
            f"{type(model).__name__}.stages names {missing[0]!r}, which is none of its direct "
            f"submodules: {', '.join(children) or 'it has none'}"
        )
    if len(set(stages)) < len(stages):
        raise IllegalCutError(f"{type(model).__name__}.stages names a submodule twice: {stages}")
    layers = nn.Sequential(OrderedDict((name, children[name]) for name in stages))
    if left_out := sorted(set(model.state_dict()) - set(layers.state_dict())):
        raise IllegalCutError(
            f"{type(model).__name__} keeps {left_out[0]!r} outside its stages, so no cut can say "
            "which part it belongs to; move it into a stage"
        )
    return layers


def shape_after(layers: nn.Sequential, image_shape: tuple[int, int, int]) -> tuple[int, ...]:
    """Return the shape of one output row for one image, without touching the layers' state.

    Args:
        layers: The layers to apply.
        image_shape: Channels, height, width of the input.

    Returns:
        The shape without the batch axis.
    """
    still = deepcopy(layers).eval()  # eval: no dropout draw, no BatchNorm count
    reference = next(still.parameters(), torch.empty(0))
    with torch.no_grad():
        row = still(torch.zeros(1, *image_shape, device=reference.device, dtype=reference.dtype))
    return tuple(row.shape[1:])


def check_stages(
    model: nn.Module, layers: nn.Sequential, *, image_shape: tuple[int, int, int]
) -> None:
    """Refuse a model that computes something else than its stages in order.

    Args:
        model: The network as its author wrote it.
        layers: Its stages in order.
        image_shape: Channels, height, width of the input.

    Raises:
        IllegalCutError: The two outputs for one image of noise differ.
    """
    if type(model).forward is nn.Sequential.forward:
        return  # by definition the same; the usual case, and free
    written, staged = deepcopy((model, layers))
    reference = next(staged.parameters(), torch.empty(0))
    noise = torch.rand(1, *image_shape, generator=torch.Generator().manual_seed(0))
    noise = noise.to(reference)
    with torch.no_grad():
        same = torch.equal(written.eval()(noise), staged.eval()(noise))
    if not same:
        raise IllegalCutError(
            f"{type(model).__name__}.forward returns something else than its stages run in order; "
            "move what it does between them into a stage of its own (for a reshape: nn.Flatten)"
        )


def check_cut(layers: nn.Sequential, at: int) -> None:
    """Refuse a cut that leaves a part empty or a parameter in both.

    Args:
        layers: The whole network.
        at: Index of the last layer of the bottom.

    Raises:
        IllegalCutError: The cut is illegal; the message names the legal ones.
    """
    listed = list(layers)
    legal = range(len(listed) - 1)
    if at not in legal:
        names = ", ".join(f"{index} ({type(listed[index]).__name__})" for index in legal)
        raise IllegalCutError(
            f"cannot cut after layer {at} of {len(listed)}, counted from 0; legal cuts: "
            f"{names or 'none, the network has too few layers'}"
        )
    below = {id(parameter) for parameter in layers[: at + 1].parameters()}
    if any(id(parameter) in below for parameter in layers[at + 1 :].parameters()):
        raise IllegalCutError(
            f"cutting after layer {at} would leave one shared parameter on both sides; cut where "
            "both layers that share it stay together"
        )


def cut(model: nn.Module, at: int, *, image_shape: tuple[int, int, int]) -> Parts:
    """Part a network after one of its layers; the parts share the model's modules.

    Where that is impossible, an :class:`IllegalCutError` names the legal cuts.

    Args:
        model: An ``nn.Sequential``, or a module that names its ``stages`` (see :func:`sequence`).
        at: Index of the last layer of the bottom, from 0; the last layer of all is no cut.
        image_shape: Channels, height, width of the input.

    Returns:
        The two parts and the shape of what crosses the cut.
    """
    layers = sequence(model)
    check_cut(layers, at)
    check_stages(model, layers, image_shape=image_shape)
    pairs = list(_children(layers).items())
    bottom = nn.Sequential(OrderedDict(pairs[: at + 1]))
    top = nn.Sequential(OrderedDict(pairs[at + 1 :]))
    return Parts(bottom=bottom, top=top, smashed_shape=shape_after(bottom, image_shape))


def join(bottom: nn.Sequential, top: nn.Sequential) -> nn.Sequential:
    """Return the whole network of two parts, sharing their modules and keeping their names.

    Args:
        bottom: The first part.
        top: The second; shares no layer name with the first.

    Returns:
        What was cut.
    """
    return nn.Sequential(OrderedDict((*_children(bottom).items(), *_children(top).items())))


def _children(model: nn.Module) -> dict[str, nn.Module]:
    """Return direct submodules by name; unlike named_children, one used twice is there twice."""
    named = model.named_modules(remove_duplicate=False)
    return {name: module for name, module in named if name and "." not in name}
