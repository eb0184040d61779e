"""Strategies: the server parts of protocols, one per file. Listing one here puts it under test.

A protocol of one's own is listed nowhere: a :class:`Protocol` in a module of one's own, named by
its import path.
"""

from leakbed.lookup import import_object
from leakbed.plugins import PluginError, is_own
from strategies import (
    fedavg,
    parallel_split,
    splitfed_v1,
    splitfed_v2,
    u_shaped,
    vanilla_split,
    vertical_split,
)
from strategies.protocol import Protocol

PROTOCOLS: dict[str, Protocol] = {
    "fedavg": Protocol(
        exchanges="weights",
        build=fedavg.build,
        labels=("shared", "server", "client"),  # it reads none, and cases share tables
        parts=1,
    ),
    "parallel-split": Protocol(
        exchanges="split",
        build=parallel_split.build,
        bottoms=("relayed",),
        merges=True,
        options={"sync": ("round", "step"), "gradient_scale": ("global", "local")},
    ),
    "splitfed-v1": Protocol(
        exchanges="split",
        build=splitfed_v1.build,
        bottoms=("relayed",),
        optimizer_state=("fresh", "kept"),
        merges=True,
    ),
    "splitfed-v2": Protocol(
        exchanges="split", build=splitfed_v2.build, bottoms=("relayed",), merges=True
    ),
    "u-shaped": Protocol(
        exchanges="split", build=u_shaped.build, labels=("client",), parts=3, in_turn=True
    ),
    "vanilla-split": Protocol(exchanges="split", build=vanilla_split.build, in_turn=True),
    "vertical-split": Protocol(
        exchanges="split",
        build=vertical_split.build,
        labels=("server",),
        bottoms=("sealed",),
        divides="features",
        options={"merge": ("concat", "sum")},
    ),
}


def find_protocol(name: str) -> Protocol:
    """Return the protocol of a catalogue key or of an import path.

    What cannot be imported is an :class:`~leakbed.lookup.ImportPathError`.

    Args:
        name: A key of ``PROTOCOLS``, or ``package.module:name``.

    Returns:
        The protocol.

    Raises:
        PluginError: What the path names is no :class:`Protocol`.
    """
    if not is_own(name):
        return PROTOCOLS[name]
    found = import_object(name)
    if not isinstance(found, Protocol):
        raise PluginError(
            f"{name} is {found!r}, no protocol; name a `strategies.Protocol(exchanges=..., "
            "build=...)` that your module makes"
        )
    return found


__all__ = ["PROTOCOLS", "Protocol", "find_protocol"]
