"""Views: from a trace and a threat model to exactly what one attack may read."""

from collections.abc import Mapping, Sequence
from math import ceil
from typing import Any

import torch
from jaxtyping import Float, Int
from torch import Tensor, nn

from leakbed.about import require
from leakbed.contracts import Evidence, Knowledge, Seat, ThreatModel, View
from leakbed.events import Arrays, Phase, SmashedUp, UpdateUp
from leakbed.models import Architecture
from leakbed.opening import ADVERSARY, PUBLIC, owned
from leakbed.strips import strip, strip_architecture
from leakbed.targets import Evidences, MisfitError, Target
from leakbed.trace import Trace
from leakbed.upper_cut import at_upper_cut, attacks_head

_HOLDERS = {
    "shared": (Seat.SERVER, Seat.CLIENT),
    "server": (Seat.SERVER, Seat.LABEL_PARTY),
    "client": (Seat.CLIENT,),
}
"""Who holds the labels of what is attacked, by the run's ``protocol.labels``."""


def build_view(
    trace: Trace,
    evidences: Evidences,
    threat: ThreatModel,
    targets: Sequence[Target],
    *,
    device: torch.device,
    labels: Int[Tensor, " targets rows"] | None = None,
    known_labels: Int[Tensor, " targets rows"] | None = None,
    own_images: Float[Tensor, " targets channels height width"] | None = None,
) -> View:
    """Grant a threat model's seat what it may read, and nothing else.

    A protocol that cannot give the seat what it needs is a :class:`~leakbed.targets.MisfitError`.

    Args:
        trace: Where the run is described.
        evidences: Its attacked round.
        threat: The attack's.
        targets: From :func:`pick_targets`.
        device: Where the attack computes.
        labels: The targets' true labels, granted only to a threat model that says it needs them.
        known_labels: Those of a few targets, -1 elsewhere; granted likewise.
        own_images: The inputs behind them; granted likewise, and to the node alone.

    Returns:
        The view.
    """
    if targets[0].phase == Phase.TRAIN:  # of new samples nobody holds the labels
        _refuse_holder(threat, trace.about)
    party, parties = targets[0].node, _parties(trace.about)
    architecture = strip_architecture(
        architecture_of(trace.about), party=party if parties > 1 else 0, parties=parties
    )
    if attacks_head(threat, architecture, targets[0].phase):
        architecture, evidences = at_upper_cut(trace, evidences, architecture)
    granted = _evidence(evidences, targets, threat, architecture, device)
    if Knowledge.PUBLIC_IMAGES in threat.needs:
        granted |= owned(trace.holding(ADVERSARY, PUBLIC), device)
        if parties > 1:
            own = strip(granted["public_images"], party=party, parties=parties)
            granted["public_images"] = own
    if Knowledge.ARCHITECTURE in threat.needs:
        granted["architecture"] = architecture
    for need, name, given in (
        (Knowledge.LABELS, "labels", labels),
        (Knowledge.KNOWN_LABELS, "known_labels", known_labels),
        (Knowledge.OWN_IMAGES, "own_images", own_images),
    ):
        if need in threat.needs and granted.get(name) is None:
            granted[name] = _told(given, need, threat.seat).to(device)
    rows, local_steps = _batch_plan(evidences, trace.about) if targets[0].row is None else (1, 1)
    return View(
        seat=threat.seat,
        image_shape=architecture.image_shape,
        num_classes=architecture.num_classes,
        targets=len(targets),
        rows=rows,
        local_steps=local_steps,
        device=device,
        **granted,
    )


def _refuse_holder(threat: ThreatModel, about: Mapping[str, Any]) -> None:
    """Refuse a party that would infer labels of the training, of which it holds all."""
    where = str(about.get("labels"))
    told = threat.seat == Seat.CLIENT and Evidence.CUT_GRADIENT in threat.evidence  # the labels
    infers = Knowledge.KNOWN_LABELS in threat.needs or told
    if infers and threat.seat in _HOLDERS.get(where, ()):
        raise MisfitError(
            f"with protocol.labels = {where!r} the {threat.seat} holds every label itself and has "
            "none to infer; attack from the other seat: a client under protocol.labels = 'server', "
            "a server where nodes keep them: protocol.name = 'u-shaped'"
        )


def _told(given: Tensor | None, need: Knowledge, seat: Seat) -> Tensor:
    """Return what only the truth says, or why it is not granted."""
    if need == Knowledge.OWN_IMAGES and seat != Seat.CLIENT:
        raise MisfitError(f"inputs belong to the node: a {seat} has none; use seat = 'client'")
    if given is None:
        what = "its own inputs" if need == Knowledge.OWN_IMAGES else "true labels"
        raise MisfitError(f"the attack is given {what}; it needs the answer key for them")
    return given


def architecture_of(about: Mapping[str, Any]) -> Architecture:
    """Return the architecture a trace's header describes; one that has none is refused."""
    require(about, "architecture")
    fields = dict(about["architecture"])
    fields["image_shape"] = tuple(fields["image_shape"])
    return Architecture(**fields)


def _parties(about: Mapping[str, Any]) -> int:
    """Return how many nodes hold a strip of every image; 1 where nodes hold whole ones."""
    return int(about["nodes"]) if about.get("divides") == "features" else 1


def _evidence(
    evidences: Evidences,
    targets: Sequence[Target],
    threat: ThreatModel,
    architecture: Architecture,
    device: torch.device,
) -> dict[str, Any]:
    """Return the messages the threat model names, as the attack reads them."""
    reads = threat.evidence
    granted: dict[str, Any] = {}
    if Evidence.UPDATE in reads:
        granted |= _weights(evidences, targets, architecture, device)
    if Evidence.HEAD_WEIGHT_GRADIENT in reads:
        return granted | _head(evidences, targets, architecture, device)
    if reads & {Evidence.SMASHED, Evidence.CUT_GRADIENT}:
        granted |= _cut(evidences, targets, threat, device)
    return granted


def _rows(evidences: Evidences) -> int:
    """Return how many samples lie behind each update, which all updates must agree on."""
    counts = {event.examples for event in evidences.updates}
    if len(counts) > 1 or None in counts:
        raise MisfitError(
            f"updates cover different numbers of samples ({sorted(map(str, counts))}); "
            "set protocol.local_steps so that all nodes train on as many"
        )
    return int(next(iter(counts)) or 1)


def _batch_plan(evidences: Evidences, about: Mapping[str, Any]) -> tuple[int, int]:
    """Return the samples and optimiser steps behind each update; no number of steps is one pass."""
    rows = _rows(evidences)
    require(about, "local_steps")
    if about["local_steps"] is not None:
        return rows, int(about["local_steps"])
    require(about, "batch_size")
    return rows, ceil(rows / int(about["batch_size"]))


def _weights(
    evidences: Evidences,
    targets: Sequence[Target],
    architecture: Architecture,
    device: torch.device,
) -> dict[str, Any]:
    events = _updates(evidences, targets, architecture)
    trainable = [name for name, _ in architecture.build(0).named_parameters()]
    first = events[0].before
    return {
        "before": _stacked([event.before for event in events], trainable, device),
        "after": _stacked([event.after for event in events], trainable, device),
        "buffers": {
            name: torch.from_numpy(value).to(device)
            for name, value in first.items()
            if name not in trainable
        },
    }


def _updates(
    evidences: Evidences, targets: Sequence[Target], architecture: Architecture
) -> list[UpdateUp]:
    """Return the targets' updates, of the model that the trace says."""
    by_node = {event.node: event for event in evidences.updates}
    events = [by_node[target.node] for target in targets]
    model = architecture.build(0)
    for event in events:
        _check_weights(event.before, model, architecture.name)
        _check_weights(event.after, model, architecture.name)
    return events


def _check_weights(arrays: Arrays, model: nn.Module, name: str) -> None:
    """Refuse weights of another model than the trace says."""
    for key, parameter in model.named_parameters():
        if key not in arrays:
            raise MisfitError(
                f"the trace's update has no {key!r}, which model {name!r} has; it has "
                f"{', '.join(arrays)}; send weights under the names of the model's state_dict, and "
                "name that model in about(model=...)"
            )
        if arrays[key].shape != tuple(parameter.shape):
            raise MisfitError(
                f"{key!r} of the trace's update has shape {arrays[key].shape}, that of model "
                f"{name!r} {tuple(parameter.shape)}; name the model that was trained in "
                "about(model=...), with its image_shape and num_classes"
            )


def _head(
    evidences: Evidences,
    targets: Sequence[Target],
    architecture: Architecture,
    device: torch.device,
) -> dict[str, Any]:
    """Return what an update over one sample says of its last layer.

    Row c of the weights moves by (p_c - y_c) u and entry c of the bias by p_c - y_c, both times the
    unknown learning rate: so the features u are their quotient, and the gradient is known up to a
    factor.
    """
    if _rows(evidences) != 1:
        raise MisfitError(
            "a head's gradient says one label only where one sample stands behind an update; set "
            "protocol.batch_size = 1 and protocol.local_steps = 1"
        )
    names = [name for name, _ in architecture.top(0).named_parameters()]
    if len(names) != 2:  # noqa: PLR2004  weight and bias
        raise MisfitError("the head must be one linear layer; set model.cut to the layer before it")
    events = _updates(evidences, targets, architecture)
    weight, bias = (
        torch.stack([torch.from_numpy(e.before[name] - e.after[name]) for e in events])
        for name in names
    )
    surest = bias.abs().argmax(1)
    each = torch.arange(len(events))
    features = weight[each, surest] / bias[each, surest].unsqueeze(1)
    return {"smashed": features.to(device), "head_gradient": weight.to(device)}


def _stacked(
    arrays: Sequence[Arrays], names: Sequence[str], device: torch.device
) -> dict[str, Tensor]:
    return {
        name: torch.stack([torch.from_numpy(each[name]) for each in arrays]).to(device)
        for name in names
    }


def _cut(
    evidences: Evidences,
    targets: Sequence[Target],
    threat: ThreatModel,
    device: torch.device,
) -> dict[str, Any]:
    batches: Mapping[tuple[Phase, int, int], SmashedUp] = {
        (event.phase, event.node, event.step): event
        for event in [*evidences.smashed.values(), *evidences.evaluated]
    }
    events = [batches[target.phase, target.node, target.step] for target in targets]
    rows = [int(target.row or 0) for target in targets]
    shared = all(event.labels is not None for event in events)
    if shared and threat.seat == Seat.CLIENT and Evidence.CUT_GRADIENT in threat.evidence:
        raise MisfitError(
            "here the node has the labels itself, and sends them to the server; a node that reads "
            "them off cut gradients needs protocol.labels = 'server'"
        )
    granted: dict[str, Any] = {}
    if Evidence.SMASHED in threat.evidence:
        picked = [torch.from_numpy(e.smashed[row]) for e, row in zip(events, rows, strict=True)]
        granted["smashed"] = torch.stack(picked).to(device)
    if Evidence.CUT_GRADIENT in threat.evidence:
        granted["cut_gradient"] = _gradients(evidences, targets).to(device)
    if shared and threat.seat == Seat.SERVER:
        granted["labels"] = _labels(events, rows).to(device)
    return granted


def _gradients(evidences: Evidences, targets: Sequence[Target]) -> Tensor:
    if any(target.phase == Phase.EVALUATE for target in targets):
        raise MisfitError("no gradient crosses the wire at inference; use when = 'training'")
    picked = [
        torch.from_numpy(evidences.gradients[target.node, target.step].gradient[target.row])
        for target in targets
    ]
    return torch.stack(picked)


def _labels(events: Sequence[SmashedUp], rows: Sequence[int]) -> Tensor:
    labels = [e.labels[row] for e, row in zip(events, rows, strict=True) if e.labels is not None]
    return torch.as_tensor(labels).reshape(-1, 1)
