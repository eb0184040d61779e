"""Whether the parts of a cell fit together: its attack, its defences and its protocol.

:func:`unfit` alone says it before anything is trained: from settings, or, where the run is
prepared, by the attack's own check as well. What only a finished run shows to be missing is the
:class:`~leakbed.contracts.UnfitError` of who misses it.
"""

from collections.abc import Sequence

from clients.malicious import unlabelling
from clients.training_defenses import unlabelled
from defenses import DEFENSES
from experiments.run.attack import Cell
from experiments.run.prepare import Prepared
from experiments.run.server_part import layers, refuse_more_than_middle
from experiments.run.targets import refuse_misfit
from experiments.run.view import initial_view
from experiments.settings.cells import Training
from leakbed.contracts import Knowledge, Protects, UnfitError
from leakbed.contracts.attack import MaliciousClient
from leakbed.contracts.hooks import untrained
from leakbed.plugins import picked
from leakbed.tensors import resolve_device
from strategies import find_protocol

_U_SHAPE = 3  # parts of a network whose head the node holds
_SPLIT = set(Protects) - {Protects.UPDATE}


def unfit(cell: Cell, prepared: Prepared | None = None) -> dict[str, str]:
    """Return why parts of a cell do not fit, by which of a case's choices they are.

    Args:
        cell: The cell.
        prepared: Its training run. With it, an attack with a method ``check`` is shown the view of
            before the first message.

    Returns:
        For ``"defenses"`` and ``"attacks"`` what does not fit and what would; neither of those
        that do.
    """
    training = cell.settings.training
    found = {"defenses": _defense_unfit(training), "attacks": _attack_unfit(cell)}
    if prepared is not None and not any(found.values()):
        found["attacks"] = _refused(cell, prepared)
    return {choice: why for choice, why in found.items() if why is not None}


def fitting(wanted: Sequence[Cell]) -> list[Cell]:
    """Leave out cells that cannot fit and that no case asks for by name.

    An attack or a defence that fits nowhere stays: its cards say why, and nothing else would.
    """
    crossed = [bool(unfit(cell).keys() - cell.settings.named) for cell in wanted]
    fit = [cell.settings for cell, out in zip(wanted, crossed, strict=True) if not out]
    attacks = {each.attack.choice for each in fit}
    defenses = {each.training.defense.choice for each in fit}
    return [
        cell
        for cell, out in zip(wanted, crossed, strict=True)
        if not out
        or cell.settings.attack.choice not in attacks
        or cell.settings.training.defense.choice not in defenses
    ]


def _attack_unfit(cell: Cell) -> str | None:
    """Return why a protocol sends nothing that an attack reads, or gives an intruder no say."""
    training, threat = cell.settings.training, cell.attack.threat
    entry, protocol = find_protocol(training.protocol.name), training.protocol
    if isinstance(cell.attack, MaliciousClient) and entry.exchanges == "split":
        why = unlabelling(cell.attack, protocol.labels)
        if why is not None:
            return why
    watches = training.adversary is not None and training.adversary.watches
    if (threat.active or watches) and entry.divides == "features":
        does = "watches the smashed data" if watches else "forges the gradients"
        return (
            f"each party of {training.protocol.name} holds a strip of every image, and no "
            f"adversary here {does} of strips; use 'vanilla-split'"
        )
    try:
        refuse_misfit(threat, updates=entry.exchanges == "weights", bottoms=protocol.bottoms)
        if Knowledge.NATURAL_IMAGES in threat.needs:
            held = training.model.upper_cut if entry.parts == _U_SHAPE else None
            refuse_more_than_middle(training.protocol.name, held)
    except UnfitError as error:
        return str(error)
    return None


def _refused(cell: Cell, prepared: Prepared) -> str | None:
    """Return why an attack cannot work with what is known before training, if it says so."""
    threat, layout = cell.attack.threat, prepared.architecture
    if (check := getattr(cell.attack, "check", None)) is None:
        return None
    try:
        part = layers(layout) if Knowledge.SERVER_PART in threat.needs else None
        check(
            initial_view(
                threat,
                layout,
                rows=prepared.plan.batch_size,
                public=prepared.public,
                device=resolve_device("cpu"),
                part=part,
                labelled=prepared.plan.labels == "shared",
            )
        )
    except UnfitError as error:
        return str(error)
    return None


def _defense_unfit(training: Training) -> str | None:
    """Return why a defence does not fit a protocol, or None if all do."""
    entry = find_protocol(training.protocol.name)
    exchanges = entry.exchanges
    sent = {Protects.UPDATE, Protects.TRAINING} if exchanges == "weights" else _SPLIT
    labels = training.protocol.labels
    for name, _ in training.defense.stack:
        kind = picked(name, DEFENSES, "defence")
        protects = kind.protects
        if exchanges == "split" and labels not in kind.labels:
            return unlabelled(kind, labels)
        if Protects.TRAINING in protects and (why := untrained(kind, exchanges)) is not None:
            return why
        if Protects.UPDATE in protects and exchanges == "weights" and entry.requests:
            asked = ", ".join(each.__name__ for each in entry.requests)
            return (
                f"{name} protects the weights that nodes send back in FedAvg's own messages, but "
                f"{training.protocol.name} asks them requests of its own ({asked}), and what they "
                "reply would go out unprotected; leave the defence out, or protect the reply in "
                "the request's answer"
            )
        if not protects & sent:
            others = [
                key
                for key, other in DEFENSES.items()
                if other.protects & sent and untrained(other, exchanges) is None
            ]
            return (
                f"{name} protects {', '.join(sorted(protects))} messages but "
                f"{training.protocol.name} sends {', '.join(sorted(sent))}; "
                f"use {' or '.join(others)}"
            )
    return None
