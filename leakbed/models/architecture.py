"""A network's layers without its weights: what "knows the architecture" grants an adversary.

An :class:`Architecture` holds settings only; weights appear when it is built from a random stream,
so an adversary's copy is drawn from the adversary's own stream and starts nowhere near the victim.
"""

import inspect
from collections.abc import Callable
from dataclasses import dataclass
from functools import lru_cache
from typing import Any

import torch
from torch import nn
from torch.nn.parameter import UninitializedParameter

from leakbed.models.cutting import (
    IllegalCutError,
    Parts,
    check_stages,
    cut,
    sequence,
    shape_after,
)
from leakbed.models.networks import ACTIVATIONS, MODELS, ImageTooSmallError
from leakbed.naming import ImportPathError, imported, raised, unknown
from leakbed.seeds import scoped

INITIALISATIONS = {
    "default": "PyTorch's own, as each layer draws it",
    "uniform": "every weight and bias uniform in (-0.5, 0.5), as DLG and DLM do",
}


class UnknownModelError(ValueError):
    """A model, activation or initialisation that is not in its catalogue."""


class ModelMismatchError(ValueError):
    """A model that cannot be built for these images and classes."""


@dataclass(frozen=True, kw_only=True)
class Architecture:
    """A network's layers without weights; equal settings are equal architectures.

    Attributes:
        name: A key of ``MODELS``, or ``package.module:Class`` for one's own: an ``nn.Sequential``
            or a module that names its ``stages``, called with those of ``image_shape``,
            ``num_classes`` and ``activation`` (a class) for which it has keywords.
        image_shape: Channels, height, width of the input.
        num_classes: Size of the output.
        activation: A key of ``ACTIVATIONS`` that replaces the published one everywhere.
        initialisation: How fresh weights are drawn: ``"default"`` or ``"uniform"``.
        cut: Index of the last layer of the bottom, from 0.
        upper_cut: Index of the last layer of the middle, where the node holds the head too.
    """

    name: str
    image_shape: tuple[int, int, int]
    num_classes: int
    activation: str | None = None
    initialisation: str = "default"
    cut: int | None = None
    upper_cut: int | None = None

    def __post_init__(self) -> None:
        """Check every setting that can be checked without building.

        Raises:
            UnknownModelError: The name, activation or initialisation is in no catalogue.
            ModelMismatchError: The image or the number of classes is empty.
        """
        if self.name not in MODELS and ":" not in self.name:
            message = unknown("model", self.name, MODELS)
            raise UnknownModelError(f"{message}; or 'package.module:Class' for your own")
        if self.activation is not None and self.activation not in ACTIVATIONS:
            raise UnknownModelError(unknown("activation", self.activation, ACTIVATIONS))
        if self.initialisation not in INITIALISATIONS:
            raise UnknownModelError(unknown("initialisation", self.initialisation, INITIALISATIONS))
        if min(*self.image_shape, self.num_classes) < 1:
            raise ModelMismatchError(
                f"images of shape {self.image_shape} in {self.num_classes} classes are nothing a "
                "network could read; all four numbers must be positive"
            )

    def build(self, stream: int) -> nn.Sequential:
        """Return the whole network on the CPU with fresh weights, a pure function of the stream.

        A network that cannot read these images or return these classes is a
        :class:`ModelMismatchError`; a class that cannot be imported an :class:`UnknownModelError`.

        Args:
            stream: Seed of the weights' own random stream.

        Returns:
            One layer per index.
        """
        with scoped(stream), torch.device("cpu"):
            layers = _catalogued(self) if self.name in MODELS else _own(self)
            if self.initialisation == "uniform":
                for parameter in layers.parameters():
                    nn.init.uniform_(parameter, -0.5, 0.5)
        return layers

    def parts(self, stream: int) -> Parts:
        """Return both parts of one network with fresh weights.

        Args:
            stream: Seed of the weights' own random stream.

        Returns:
            The bottom, the top, and the shape between them.

        Raises:
            IllegalCutError: No cut is set, or the network cannot be cut there.
        """
        if self.cut is None:
            raise IllegalCutError(
                f"architecture {self.name!r} has no cut; set `cut` to the index of the last layer "
                f"of the bottom, 0 to {len(self.layer_names) - 2}"
            )
        return cut(self.build(stream), self.cut, image_shape=self.image_shape)

    def bottom(self, stream: int) -> nn.Sequential:
        """Return the node's part with fresh weights.

        Args:
            stream: Seed of the weights' own random stream.

        Returns:
            Layers up to and including the cut, with the weights ``build`` gives them.
        """
        return self.parts(stream).bottom

    def top(self, stream: int) -> nn.Sequential:
        """Return the server's part with fresh weights.

        Args:
            stream: Seed of the weights' own random stream.

        Returns:
            Layers after the cut, with the weights ``build`` gives them.
        """
        return self.parts(stream).top

    def middle(self, stream: int) -> nn.Sequential:
        """Return the server's part of a U-shaped network with fresh weights.

        Args:
            stream: Seed of the weights' own random stream.

        Returns:
            Layers after the cut, up to and including the upper cut.
        """
        lower = self._upper_parts(stream).bottom
        return cut(lower, int(self.cut or 0), image_shape=self.image_shape).top

    def head(self, stream: int) -> nn.Sequential:
        """Return the node's last layers of a U-shaped network with fresh weights.

        Args:
            stream: Seed of the weights' own random stream.

        Returns:
            Layers after the upper cut, with the weights ``build`` gives them.
        """
        return self._upper_parts(stream).top

    def _upper_parts(self, stream: int) -> Parts:
        last = len(self.layer_names) - 1
        if self.cut is None or self.upper_cut is None or not self.cut < self.upper_cut < last:
            raise IllegalCutError(
                f"a U-shaped network is cut twice, with cut < upper_cut < {last}; got cut = "
                f"{self.cut} and upper_cut = {self.upper_cut}"
            )
        return cut(self.build(stream), self.upper_cut, image_shape=self.image_shape)

    @property
    def smashed_shape(self) -> tuple[int, ...]:
        """Shape of one row of smashed data."""
        return _smashed_shape(self)

    @property
    def features_shape(self) -> tuple[int, ...]:
        """Shape of one row of what a U-shaped network's middle makes."""
        return _features_shape(self)

    @property
    def layer_names(self) -> tuple[str, ...]:
        """The class of each layer, by index."""
        return tuple(type(layer).__name__ for layer in self.build(0))


@lru_cache(maxsize=64)
def _smashed_shape(architecture: Architecture) -> tuple[int, ...]:
    return architecture.parts(0).smashed_shape


@lru_cache(maxsize=64)
def _features_shape(architecture: Architecture) -> tuple[int, ...]:
    return architecture._upper_parts(0).smashed_shape  # noqa: SLF001  of this module


def _catalogued(architecture: Architecture) -> nn.Sequential:
    """Return a network of the catalogue, or say which images it needs."""
    activation = ACTIVATIONS[architecture.activation] if architecture.activation else None
    try:
        return MODELS[architecture.name].build(
            architecture.image_shape, architecture.num_classes, activation=activation
        )
    except ImageTooSmallError as error:
        raise ModelMismatchError(f"model {architecture.name!r}: {error}") from error


def _own(architecture: Architecture) -> nn.Sequential:
    """Return a user's network as a plain sequence, checked against the images and classes."""
    try:
        factory = imported(architecture.name)
    except ImportPathError as error:
        raise UnknownModelError(f"model: {error}") from error
    if not callable(factory):
        raise UnknownModelError(
            f"model {architecture.name!r} is a {type(factory).__name__}, which"
            " cannot be called; name a class or a function"
        )
    accepted = _accepted(factory, architecture)
    try:
        model = factory(**accepted)
    except Exception as error:
        raise ModelMismatchError(f"model {architecture.name!r} raised {raised(error)}") from error
    if not isinstance(model, nn.Module):
        raise ModelMismatchError(
            f"model {architecture.name!r} gave a {type(model).__name__}, not a torch.nn.Module"
        )
    if any(isinstance(each, UninitializedParameter) for each in model.parameters()):
        raise ModelMismatchError(
            f"model {architecture.name!r} has lazy layers, whose weights no stream has drawn; "
            "give every layer its input size"
        )
    try:
        layers = sequence(model)
        _check_output(architecture, layers)
        check_stages(model, layers, image_shape=architecture.image_shape)
    except IllegalCutError as error:
        raise ModelMismatchError(f"model {architecture.name!r}: {error}") from error
    return layers


def _accepted(factory: Callable[..., Any], architecture: Architecture) -> dict[str, object]:
    """Return the settings a user's class takes by keyword, or say what it wants instead."""
    offered: dict[str, object] = {
        "image_shape": architecture.image_shape,
        "num_classes": architecture.num_classes,
    }
    if architecture.activation is not None:
        offered["activation"] = ACTIVATIONS[architecture.activation]
    try:
        signature = inspect.signature(factory)
    except ValueError as error:
        raise ModelMismatchError(
            f"model {architecture.name!r} cannot be called: {error}"
        ) from error
    names = set(signature.parameters)  # **kwargs is no promise: nn.Module has it and refuses them
    if architecture.activation is not None and "activation" not in names:
        raise ModelMismatchError(
            f"model {architecture.name!r} takes no keyword `activation`, so it cannot be given "
            f"{architecture.activation!r}; leave `activation` out, or add the keyword"
        )
    accepted = {name: value for name, value in offered.items() if name in names}
    try:
        signature.bind(**accepted)
    except TypeError as error:
        raise ModelMismatchError(
            f"model {architecture.name!r}: {error}; it is called with image_shape, num_classes and "
            "activation (a class) where it has keywords of these names, and with nothing else"
        ) from error
    return accepted


def _check_output(architecture: Architecture, layers: nn.Sequential) -> None:
    """Refuse a user's network that cannot read the images or does not return the classes."""
    try:
        shape = shape_after(layers, architecture.image_shape)
    except (RuntimeError, ValueError, IndexError) as error:
        raise ModelMismatchError(
            f"model {architecture.name!r} cannot read images of shape {architecture.image_shape}: "
            f"{error}"
        ) from error
    if shape != (architecture.num_classes,):
        raise ModelMismatchError(
            f"model {architecture.name!r} returns rows of shape {shape}; the data need "
            f"{architecture.num_classes} classes"
        )
