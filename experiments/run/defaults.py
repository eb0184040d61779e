"""Settings left open take the protocol's own defaults, before anything depends on them."""

from dataclasses import replace

from experiments.settings.cells import CellSettings
from experiments.settings.protocol import OPTIONS, ProtocolSettings
from experiments.settings.schema import SettingsError
from strategies import find_protocol


def resolve_defaults(cell: CellSettings) -> CellSettings:
    """Return a cell that says what it will be run with: nothing is left to a default.

    Args:
        cell: As the experiment has it.

    Returns:
        The cell whose card will be written.
    """
    training = replace(cell.training, protocol=resolve_protocol(cell.training.protocol))
    return replace(cell, training=training)


def resolve_protocol(protocol: ProtocolSettings) -> ProtocolSettings:
    """Return a protocol's settings with its own defaults in place of None.

    FedAvg cuts nothing and ignores what it does not have, since cases share tables; a split
    protocol refuses it.

    Args:
        protocol: As the experiment has them.

    Returns:
        The settings to train with.

    Raises:
        SettingsError: If a setting is none that this protocol has; names the legal ones.
    """
    entry = find_protocol(protocol.name)
    legal = {
        "labels": entry.labels,
        "bottoms": entry.bottoms,
        "optimizer_state": entry.optimizer_state,
        **dict.fromkeys(OPTIONS, ()),
        **entry.options,
    }
    chosen = {}
    for key, values in legal.items():
        value = getattr(protocol, key)
        if value is not None and value not in values and entry.exchanges == "split":
            wanted = " or ".join(map(repr, values)) or "nothing: leave it out"
            raise SettingsError(f"protocol.{key} = {value!r}: {protocol.name} takes {wanted}")
        if value is None and values:
            chosen[key] = values[0]
    return protocol.model_copy(update=chosen)
