"""What a trace says of the run behind it: all that an adversary may know beyond the messages.

Our own runs say it by themselves; a tapped app gives it to its recorder::

    Recorder("trace", about=about(model="mine:Net", image_shape=(1, 28, 28), num_classes=10,
                                  batch_size=8, nodes=2, data="photos"))

Importing this module needs no torch, so nothing here is checked against the network itself.
"""

from collections.abc import Mapping
from typing import Any

from leakbed.trace_index import TraceError

_CALL = (
    'Recorder(folder, about=about(model="package.module:Class", image_shape=(1, 28, 28), '
    'num_classes=10, batch_size=8, nodes=2, data="name")) with about from leakbed.about'
)


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
    defense: str = "none",
    cut: int | None = None,
    upper_cut: int | None = None,
    activation: str | None = None,
    initialisation: str = "default",
) -> dict[str, Any]:
    """Return what a trace's header says of its run: JSON values, no seed and no learning rate.

    Args:
        model: The network: a catalogue key, or ``package.module:Class`` of an ``nn.Sequential`` or
            a module that names its ``stages``. Its parameters must have the names of the weights
            on the wire, which are those of its ``state_dict``.
        image_shape: Channels, height, width of the inputs, whose pixels lie in [0, 1].
        num_classes: Number of labels.
        batch_size: Rows in a training batch.
        nodes: Number of data holders.
        data: Name of the data, for reports.
        local_steps: Batches a node trains on in a round; None for one pass over its data.
        rounds: How many there are; None if that is not known.
        protocol: Catalogue key of the protocol.
        labels: Who has the labels: ``"shared"`` or ``"server"``.
        bottoms: How bottoms pass the server: ``"sealed"`` or ``"relayed"``.
        defense: Name of the defence.
        cut: Index of the last layer of the bottom; None where the model is not cut.
        upper_cut: Index of the last layer of the middle; None where the node holds no head.
        activation: Catalogue key of the activation that replaces the model's own.
        initialisation: How fresh weights are drawn: ``"default"`` or ``"uniform"``.

    Returns:
        For a :class:`~leakbed.trace.Recorder`.

    Raises:
        TraceError: If a number cannot be that of any run.
    """
    _check_numbers(
        num_classes=num_classes, batch_size=batch_size, nodes=nodes, local_steps=local_steps
    )
    if len(image_shape) != 3 or min(image_shape) < 1:  # noqa: PLR2004  channels, height, width
        raise TraceError(
            f"image_shape is {tuple(image_shape)}; give three positive numbers: channels, height, "
            "width"
        )
    return {
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
        },
    }


def require(said: Mapping[str, Any], *keys: str) -> None:
    """Refuse a trace that does not say what is needed of its run.

    Args:
        said: The trace's ``about``.
        *keys: Of what :func:`about` returns.

    Raises:
        TraceError: One of them is missing; shows the call that would have said it.
    """
    if missing := [key for key in keys if key not in said]:
        raise TraceError(
            f"the trace does not say {', '.join(missing)}, so it cannot be attacked; record it "
            f"with {_CALL}"
        )


def _check_numbers(**numbers: int | None) -> None:
    for name, value in numbers.items():
        if value is not None and value < 1:
            raise TraceError(f"{name} is {value}; it must be at least 1")
