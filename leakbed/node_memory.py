"""What a node remembers between messages: a defence's state, and what a grid of ours keeps alive.

A state goes into Flower's own context, so that any process can serve the node's next message.
"""

from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

from flwr.app import ConfigRecord, Context

from leakbed.contracts import DefenseState
from leakbed.wire.records import pack, unpack

if TYPE_CHECKING:
    from torch import Tensor

_KEPT = ("tensors", "trained", "momenta")  # of a defence's state


def live(context: Context) -> dict[str, Any] | None:
    """Return what a sticky context keeps in memory, or None on Flower's own runtimes."""
    memory: dict[str, Any] | None = getattr(context, "live", None)
    return memory


def load_state(context: Context, key: str) -> DefenseState | None:
    """Return a defence's state as :func:`save_state` wrote it; None where it never did."""
    record = context.state.config_records.get(key)
    if record is None:
        return None
    arrays = context.state.array_records
    stored = {name: arrays.get(f"{key}.{name}") for name in _KEPT}
    tensors = {name: as_tensors(unpack(kept)) for name, kept in stored.items() if kept is not None}
    return DefenseState(
        stream=int(str(record["stream"])),
        messages=int(str(record["messages"])),
        **tensors,
        alarm=int(str(record["alarm"])),
        score=float(str(record["score"])),
        last=float(str(record["last"])),
        probing=bool(record["probing"]),
    )


def save_state(context: Context, key: str, state: DefenseState) -> None:
    """Write a defence's state into a node's, for whichever process serves the next message."""
    numbers = ("stream", "messages", "alarm", "score", "last", "probing")
    context.state[key] = ConfigRecord({name: getattr(state, name) for name in numbers})
    for name in _KEPT:
        tensors: Mapping[str, Tensor] = getattr(state, name)
        if tensors:
            arrays = {key_: value.numpy() for key_, value in tensors.items()}
            context.state[f"{key}.{name}"] = pack(arrays)
        elif f"{key}.{name}" in context.state:
            del context.state[f"{key}.{name}"]


def as_tensors(arrays: Mapping[str, object]) -> "dict[str, Tensor]":
    """Return arrays as torch's tensors, by name."""
    import torch  # noqa: PLC0415  a stranger's app may tap its grid without torch

    return {name: torch.as_tensor(value) for name, value in arrays.items()}
