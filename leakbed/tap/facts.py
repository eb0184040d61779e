"""What a trace says of the run behind it: all that an adversary may know beyond the messages.

Our own runs say it by themselves; a tapped app says it as it is tapped::

    app = tapped(app, about=about(model="mine:Net", image_shape=(1, 28, 28), num_classes=10,
                                  batch_size=8, nodes=2, data="photos"))

Importing this module needs no torch, so nothing here is checked against the network itself.
"""

from collections.abc import Callable, Mapping, Sequence
from inspect import signature
from typing import Any

from leakbed.lookup import unknown_name
from leakbed.tap.segments import TraceError

_CALL = (
    'Recorder(folder, about=about(model="package.module:Class", image_shape=(1, 28, 28), '
    'num_classes=10, batch_size=8, nodes=2, data="name")) with about from leakbed.tap.facts'
)

UNKNOWN_DEFENSE = "defence not known"
"""What a run's defence is called where nobody said it: a stranger's client may have one."""


class UnpermittedModelError(ValueError):
    """A trace names a network of somebody's own, which its reader did not permit to be imported."""


def about(
    *,
    model: str,
    image_shape: tuple[int, int, int],
    num_classes: int,
    batch_size: int,
    nodes: int,
    data: str,
    local_steps: int | None = None,
    rounds: int | None = None,
    protocol: str = "fedavg",
    labels: str = "shared",
    bottoms: str = "sealed",
    defense: str = UNKNOWN_DEFENSE,
    cut: int | str | None = None,
    upper_cut: int | None = None,
    activation: str | None = None,
    initialisation: str = "default",
    linear_top: bool = False,
    modes: Mapping[str, str] | None = None,
    mean: Sequence[float] | None = None,
    std: Sequence[float] | None = None,
    partitions: Mapping[str, int] | None = None,
) -> dict[str, Any]:
    """Return what a trace's header says of its run: JSON values, no seed and no learning rate.

    Args:
        model: The network: a catalogue key, or ``package.module:Class`` of any ``nn.Module``. With
            ``cut``, its forward must be a chain of layers; where that is an index, it must be an
            ``nn.Sequential`` or name its ``stages``. Its parameters must have the names of the
            weights on the wire, which are those of its ``state_dict``; weights that are numbered
            are taken in its order.
        image_shape: Channels, height, width of the inputs; pixels lie in [0, 1], unless ``mean``
            and ``std`` say what was made of them.
        num_classes: Number of labels.
        batch_size: Rows in a training batch.
        nodes: Number of data holders.
        data: Name of the data, for reports.
        local_steps: Batches a node trains on in a round; None for one pass over its data.
        rounds: How many there are; None if that is not known.
        protocol: Catalogue key of the protocol.
        labels: Who has the labels: ``"shared"`` or ``"server"``.
        bottoms: How bottoms pass the server: ``"sealed"`` or ``"relayed"``.
        defense: Name of the defence; ``"none"`` where you know that there is none.
        cut: The last layer of the bottom, by its index or by its path in the network, such as
            ``"features.3"``; None where the model is not cut.
        upper_cut: Index of the last layer of the middle; None where the node holds no head.
        activation: Catalogue key of the activation that replaces the model's own.
        initialisation: How fresh weights are drawn: ``"default"`` or ``"uniform"``.
        linear_top: Whether activations above the cut were left out.
        modes: The mode of a node's network (``"train"`` or ``"eval"``) as it makes messages of
            ``"train"`` and of ``"evaluate"``, for the card; None if that is not known.
        mean: What the app takes from each channel of a picture in [0, 1] before it feeds the
            network, as ``torchvision.transforms.Normalize`` does; None where it feeds pixels.
            Attacks and scores then are of pictures all the same.
        std: What it divides each channel by, likewise.
        partitions: Flower's partition id of each node id, which stands in no message; None if that
            is not known.

    Returns:
        For a :class:`~leakbed.tap.trace.Recorder`.

    Raises:
        TraceError: If a number cannot be that of any run, or a mode is none.
    """
    _check_numbers(
        num_classes=num_classes, batch_size=batch_size, nodes=nodes, local_steps=local_steps
    )
    if len(image_shape) != 3 or min(image_shape) < 1:  # noqa: PLR2004  channels, height, width
        raise TraceError(
            f"image_shape is {tuple(image_shape)}; give three positive numbers: channels, height, "
            "width"
        )
    if modes is not None and not _are_modes(modes):
        raise TraceError(
            f"modes is {dict(modes)}; give a mode for 'train' and for 'evaluate', each 'train' or "
            "'eval', or leave it out"
        )
    normalised = {"mean": mean, "std": std}
    optional = {} if partitions is None else {"partitions": dict(partitions)}
    return {
        **optional,
        "protocol": protocol,
        "labels": labels,
        "bottoms": bottoms,
        "rounds": rounds,
        "batch_size": batch_size,
        "local_steps": local_steps,
        "nodes": nodes,
        "data": data,
        "defense": defense,
        "architecture": {
            "name": model,
            "image_shape": tuple(image_shape),
            "num_classes": num_classes,
            "activation": activation,
            "initialisation": initialisation,
            "cut": cut,
            "upper_cut": upper_cut,
            "linear_top": linear_top,
            **{key: tuple(value) for key, value in normalised.items() if value is not None},
        },
        "modes": None if modes is None else dict(modes),
    }


def amended(
    said: Mapping[str, Any], facts: Mapping[str, Any], *, nodes: int | None = None
) -> dict[str, Any]:
    """Return what a trace says of its run, with some of it said otherwise by who attacks it.

    Args:
        said: The trace's ``about``; may be empty.
        facts: Arguments of :func:`about` that are to stand in place of what the trace says.
        nodes: How many nodes sent messages, where nothing says how many there are.

    Returns:
        For an attack on the trace.

    Raises:
        TraceError: A fact is none that a run has or cannot be that of any, or too few are known.
    """
    legal = signature(about).parameters
    if strange := [key for key in facts if key not in legal]:
        raise TraceError(unknown_name("fact of a run", strange[0], legal))
    layers = dict(said.get("architecture", {}))
    if "name" in layers:
        layers["model"] = layers.pop("name")
    told = {key: value for key, value in {**said, **layers}.items() if key in legal}
    told = {"data": "not named", "nodes": nodes, **told, **facts}
    needed = [key for key, each in legal.items() if each.default is each.empty]
    if missing := [key for key in needed if told.get(key) is None]:
        raise TraceError(
            f"neither the trace nor you said {', '.join(missing)} of its run; say it with "
            f"{' '.join(f'--about {key}=...' for key in missing)} (from Python: about={{...}})"
        )
    try:
        return {**said, **about(**told)}
    except TypeError as error:  # a number where there should be a list, and the like
        raise TraceError(f"{dict(facts)} cannot be facts of a run: {error}") from error


def require(said: Mapping[str, Any], *keys: str) -> None:
    """Refuse a trace that does not say what is needed of its run, or that no run could say.

    Args:
        said: The trace's ``about``.
        *keys: Of what :func:`about` returns.

    Raises:
        TraceError: One of them is missing; shows the call that would have said it. Or any that is
            there is of another type than :func:`about` gives it.
    """
    if missing := [key for key in keys if key not in said]:
        raise TraceError(
            f"the trace does not say {', '.join(missing)}, without which it cannot be attacked; "
            "say it to `leakbed attack` with --model package.module:Class and --about key=value, "
            f"or record it with {_CALL}"
        )
    for key, fits in _TYPES.items():
        if key in said and not fits(said[key]):
            raise TraceError(
                f"the trace says {key} = {str(said[key])[:_SHOWN]!r}, which no run says of itself; "
                f"record it with {_CALL}"
            )


def refuse_import(said: Mapping[str, Any], permitted: str | None) -> None:
    """Refuse to import the network that a trace names by import path, unless its reader names it.

    A trace may be a stranger's, and importing a module runs its code. Networks of the catalogue
    need no permission.

    Args:
        said: The trace's ``about``.
        permitted: The import path that the reader permits; None for none.

    Raises:
        UnpermittedModelError: The trace names another; says what to look at and how to permit it.
    """
    require(said, "architecture")
    name = said["architecture"]["name"]
    if permitted is not None and name != permitted and ":" not in name:
        raise UnpermittedModelError(
            f"the network of this trace is {name!r}, not {permitted!r}; leave --model out"
        )
    if ":" in name and name != permitted:
        given = "" if permitted is None else f", not {permitted!r}"
        raise UnpermittedModelError(
            f"the trace names its network by import path: {name!r}{given}. Importing it runs the "
            f"code there; if you know that code, permit it with --model {name} (from Python: "
            f"model={name!r})"
        )


def _are_modes(modes: Mapping[str, str]) -> bool:
    return set(modes) <= {"train", "evaluate"} and all(
        mode in ("train", "eval") for mode in modes.values()
    )


def _check_numbers(**numbers: int | None) -> None:
    for name, value in numbers.items():
        if value is not None and value < 1:
            raise TraceError(f"{name} is {value}; it must be at least 1")


def _is_text(value: object) -> bool:
    return isinstance(value, str)


def _is_index(value: object) -> bool:
    return type(value) is int and value >= 0


def _is_count(value: object) -> bool:
    return type(value) is int and value >= 1


def _or_none(fits: Callable[[object], bool]) -> Callable[[object], bool]:
    return lambda value: value is None or fits(value)


def _is_shape(value: object) -> bool:
    if not isinstance(value, list | tuple) or len(value) != 3:  # noqa: PLR2004  as above
        return False
    return all(_is_count(side) for side in value)


def _is_architecture(value: object) -> bool:
    """Say whether a value has the keys of a network's layers, each with a value of its type."""
    if not isinstance(value, Mapping) or not {"name", "image_shape", "num_classes"} <= set(value):
        return False
    return all(key in _LAYERS and _LAYERS[key](each) for key, each in value.items())


def _are_numbers(value: object) -> bool:
    return isinstance(value, (list, tuple)) and all(
        isinstance(each, (int, float)) and not isinstance(each, bool) for each in value
    )


def _are_pairs(value: object) -> bool:
    """Say whether a value is a list of names with what each is set to, no tables among it."""
    if not isinstance(value, list | tuple) or not all(_is_pair(each) for each in value):
        return False
    return all(_is_plain(each[1]) for each in value)


def _is_pair(value: object) -> bool:
    return isinstance(value, list | tuple) and len(value) == 2 and _is_text(value[0])  # noqa: PLR2004


def _is_plain(value: object) -> bool:
    if isinstance(value, list | tuple):
        return all(map(_is_plain, value))
    return isinstance(value, bool | int | float | str)


_LAYERS: Mapping[str, Callable[[object], bool]] = {
    "name": _is_text,
    "image_shape": _is_shape,
    "num_classes": _is_count,
    "mean": _or_none(_are_numbers),
    "std": _or_none(_are_numbers),
    "activation": _or_none(_is_text),
    "initialisation": _is_text,
    "cut": _or_none(lambda value: _is_index(value) or bool(value and _is_text(value))),
    "upper_cut": _or_none(_is_index),
    "linear_top": lambda value: isinstance(value, bool),
    "settings": _are_pairs,
}

_TYPES: Mapping[str, Callable[[object], bool]] = {
    "protocol": _is_text,
    "labels": _is_text,
    "bottoms": _is_text,
    "rounds": _or_none(_is_count),
    "batch_size": _is_count,
    "local_steps": _or_none(_is_count),
    "nodes": _is_count,
    "data": _is_text,
    "defense": _is_text,
    "architecture": _is_architecture,
    "modes": _or_none(lambda value: isinstance(value, Mapping) and _are_modes(value)),
}
"""What each key of :func:`about` may be; recorded runs know further keys."""

_SHOWN = 200  # characters of a stranger's value in an error
