"""Views: from a trace and a threat model to exactly what one attack may read.

An adversary that forges, or that watches live, begins with a view of before the first message: its
own images and shapes, and no evidence. It gets every smashed batch as it comes; one that attacks a
trace finds the same images there.
"""

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import replace
from math import ceil
from typing import Any

import numpy as np
import torch
from jaxtyping import Float, Int
from torch import Tensor, nn

from experiments.run.server_part import (
    at_upper_cut,
    attack_is_on_head,
    held_part,
    refuse_more_than_middle,
    refuse_seat,
)
from experiments.run.targets import SEALED, Evidences, MisfitError
from leakbed.contracts import Evidence, Knowledge, Seat, ThreatModel, View
from leakbed.contracts.attributes import attribute_of
from leakbed.contracts.threat import Granted
from leakbed.data.partitioning import strip, strip_architecture
from leakbed.events import Arrays, Phase, SmashedUp, Target, UpdateUp
from leakbed.models import Architecture
from leakbed.tap.facts import require
from leakbed.tap.trace import Trace

ADVERSARY, PUBLIC = "adversary", "public"


def initial_view(
    threat: ThreatModel,
    architecture: Architecture,
    *,
    rows: int,
    public: Arrays | None,
    device: torch.device,
    classes: Sequence[str] = (),
    part: nn.Module | None = None,
    labelled: bool = False,
) -> View:
    """Grant an adversary's seat what it may read before the first message.

    One that needs what its seat, or the run, does not have is a
    :class:`~experiments.run.targets.MisfitError`.

    Args:
        threat: The adversary's.
        architecture: The network, cut.
        rows: Size of the batches to come, which the first one would tell.
        public: Images and labels that adversaries own, if any.
        device: Where the adversary computes.
        classes: What each label means, which an attribute follows from.
        part: The server's part with its first weights, frozen; granted to a server that names it.
        labelled: Whether nodes will send labels beside their smashed rows; who reads those of a
            round has none of them yet, and not ``None``.

    Returns:
        A view without targets.
    """
    granted: dict[str, Any] = {}
    if labelled and Evidence.ROUND_SMASHED in threat.evidence:
        granted["round_labels"] = torch.empty(0, dtype=torch.long, device=device)
    granted |= owned(threat, public, device)
    if threat.infers is not None and Knowledge.PUBLIC_ATTRIBUTES in threat.needs:
        attribute = attribute_of(threat.infers, classes)
        granted["attribute_values"] = len(attribute.values)
        granted["public_attributes"] = attribute.of(_public_labels(public, device))
    if Knowledge.ARCHITECTURE in threat.needs:
        granted["architecture"] = architecture
    if Knowledge.SERVER_PART in threat.needs:
        refuse_seat(threat.seat)
        granted["server_part"] = part
    return View(
        seat=threat.seat,
        image_shape=architecture.image_shape,
        num_classes=architecture.num_classes,
        targets=0,
        rows=rows,
        smashed_shape=architecture.smashed_shape,
        device=device,
        **granted,
    )


def owned(threat: ThreatModel, held: Arrays | None, device: torch.device) -> dict[str, Any]:
    """Return public images and labels as fields of a view, each for who names it.

    Args:
        threat: The adversary's.
        held: What adversaries own, as a trace keeps it; None if they own nothing.
        device: Where it computes.

    Returns:
        ``public_images``, ``public_labels``, both or neither.

    Raises:
        MisfitError: If it needs what adversaries of this run do not own.
    """
    granted: dict[str, Any] = {}
    if Knowledge.PUBLIC_IMAGES in threat.needs:
        if held is None:
            raise MisfitError(
                "the attack needs public images; set data.public above 0, or, in a tapped app, "
                f"recorder.hold({ADVERSARY!r}, {PUBLIC!r}, {{'images': ..., 'labels': ...}})"
            )
        granted["public_images"] = torch.from_numpy(held["images"]).to(device)
    if Knowledge.PUBLIC_LABELS in threat.needs:
        granted["public_labels"] = _public_labels(held, device)
    return granted


def _public_labels(held: Arrays | None, device: torch.device) -> Int[Tensor, " public"]:
    """Return the labels of public images, or say how the adversary gets some."""
    if held is None or "labels" not in held:
        how = f"recorder.hold({ADVERSARY!r}, {PUBLIC!r}, {{'images': ..., 'labels': ...}})"
        raise MisfitError(
            "the attack needs the labels of public images; set data.public above 0, or, in a "
            f"tapped app, {how}"
        )
    return torch.from_numpy(held["labels"]).to(device)


_HOLDERS = {
    "shared": (Seat.SERVER, Seat.CLIENT),
    "server": (Seat.SERVER, Seat.LABEL_PARTY),
    "client": (Seat.CLIENT,),
}
"""Who holds the labels of what is attacked, by the run's ``protocol.labels``."""

_GIVEN = {
    Knowledge.OWN_IMAGES: "its own inputs",
    Knowledge.NATURAL_IMAGES: "the natural images that it alters",
}
"""What an answer key is opened for, where it is not for labels."""


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
    natural_images: Float[Tensor, " targets channels height width"] | None = None,
    kinds: Granted | None = None,
) -> View:
    """Grant a threat model's seat what it may read, and nothing else.

    A protocol that cannot give the seat what it needs is a
    :class:`~experiments.run.targets.MisfitError`.

    Args:
        trace: Where the run is described.
        evidences: Its attacked round.
        threat: The attack's.
        targets: From :func:`pick_targets`.
        device: Where the attack computes.
        labels: The targets' true labels, granted only to a threat model that says it needs them.
        known_labels: Those of a few targets, -1 elsewhere; granted likewise.
        own_images: The inputs behind them; granted likewise, and to the node alone.
        natural_images: The same for an attack that alters them; granted likewise, and refused where
            the server holds more than the middle of the network.
        kinds: What the threat model's own kinds grant, from :mod:`experiments.run.granted`.

    Returns:
        The view.
    """
    if targets[0].phase == Phase.TRAIN:  # of new samples nobody holds the labels
        _refuse_holder(threat, trace.about)
    architecture = _held_architecture(trace.about, targets[0].node)
    if attack_is_on_head(threat, architecture, targets[0].phase):
        architecture, evidences = at_upper_cut(trace, evidences, architecture)
    granted = _evidence(evidences, targets, threat, architecture, device)
    granted |= public_images(trace, threat, targets[0].node, device)
    if Knowledge.ARCHITECTURE in threat.needs:
        granted["architecture"] = architecture
    if Knowledge.SERVER_PART in threat.needs:
        refuse_seat(threat.seat)
        granted["server_part"] = held_part(
            trace, architecture, round_=targets[0].round, device=device
        )
    if Knowledge.NATURAL_IMAGES in threat.needs:
        refuse_more_than_middle(str(trace.about.get("protocol")), architecture.upper_cut)
    for need, name, given in (
        (Knowledge.LABELS, "labels", labels),
        (Knowledge.KNOWN_LABELS, "known_labels", known_labels),
        (Knowledge.OWN_IMAGES, "own_images", own_images),
        (Knowledge.NATURAL_IMAGES, "natural_images", natural_images),
    ):
        if need in threat.needs and granted.get(name) is None:
            granted[name] = _told(given, need, threat.seat).to(device)
    rows, local_steps = (
        _batch_plan(evidences, targets, trace.about) if targets[0].row is None else (1, 1)
    )
    return View(
        seat=threat.seat,
        image_shape=architecture.image_shape,
        num_classes=architecture.num_classes,
        targets=len(targets),
        rows=rows,
        local_steps=local_steps,
        granted=kinds or Granted(),
        device=device,
        **granted,
    )


def _refuse_holder(threat: ThreatModel, about: Mapping[str, Any]) -> None:
    """Refuse a party that would infer labels of the training, of which it holds all."""
    where = str(about.get("labels"))
    read = {each for kind in threat.evidence_kinds for each in kind.reads}
    gradients = Evidence.CUT_GRADIENT in threat.evidence or "cut-gradient-down" in read
    told = threat.seat == Seat.CLIENT and gradients  # of the labels
    infers = Knowledge.KNOWN_LABELS in threat.needs or told
    if infers and threat.seat in _HOLDERS.get(where, ()):
        raise MisfitError(
            f"with protocol.labels = {where!r} the {threat.seat} holds every label itself and has "
            "none to infer; attack from the other seat (a client under protocol.labels = 'server', "
            "the server of 'u-shaped'), or new samples (evidence = 'smashed', when = 'inference')"
        )


def _told(given: Tensor | None, need: Knowledge, seat: Seat) -> Tensor:
    """Return what only the truth says, or why it is not granted."""
    if need == Knowledge.OWN_IMAGES and seat != Seat.CLIENT:
        raise MisfitError(f"inputs belong to the node: a {seat} has none; use seat = 'client'")
    if given is None:
        what = _GIVEN.get(need, "true labels")
        raise MisfitError(f"the attack is given {what}; it needs the answer key for them")
    return given


def architecture_of(about: Mapping[str, Any]) -> Architecture:
    """Return the architecture a trace's header describes; one that has none is refused."""
    require(about, "architecture")
    fields = dict(about["architecture"])
    for key in ("image_shape", "mean", "std"):
        if fields.get(key) is not None:
            fields[key] = tuple(fields[key])
    fields["settings"] = tuple(map(tuple, fields.get("settings", ())))
    return Architecture(**fields)


def public_images(
    trace: Trace, threat: ThreatModel, party: int, device: torch.device
) -> dict[str, Tensor]:
    """Return the images that adversaries of a run own, as one party would see them.

    A run that gives them none is a :class:`~experiments.run.targets.MisfitError`.

    Args:
        trace: Of the run.
        threat: Says whether the adversary owns images, labels of them, both or neither.
        party: Whose view it is; of a party that holds strips of images, its own strip of each.
        device: Where they are wanted.

    Returns:
        ``public_images`` and ``public_labels``, as far as the threat model names them.
    """
    found: dict[str, Tensor] = owned(threat, trace.holding(ADVERSARY, PUBLIC), device)
    if "public_images" in found and (parties := _parties(trace.about)) > 1:
        found["public_images"] = strip(found["public_images"], party=party, parties=parties)
    return found


def attacked_architecture(
    about: Mapping[str, Any], threat: ThreatModel, target: Target
) -> Architecture:
    """Return the network as an attack's messages cut it: at the upper cut for one on the head.

    Args:
        about: The trace's header.
        threat: The attack's.
        target: One of its targets; of a party that holds strips, the network for its strip.

    Returns:
        Layers whose bottom makes the smashed data that the attack reads.
    """
    architecture = _held_architecture(about, target.node)
    if attack_is_on_head(threat, architecture, target.phase):
        return replace(architecture, cut=architecture.upper_cut, upper_cut=None)
    return architecture


def _held_architecture(about: Mapping[str, Any], node: int) -> Architecture:
    """Return the network for the images of a node: strips, where nodes hold those."""
    parties = _parties(about)
    party = node if parties > 1 else 0
    return strip_architecture(architecture_of(about), party=party, parties=parties)


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
        whole = evidences.exchanges_weights
        model = architecture.build(0) if whole else architecture.bottom(0)
        granted |= _weights(evidences, targets, model, architecture.name, device)
    if Evidence.HEAD_WEIGHT_GRADIENT in reads:
        return granted | _head(evidences, targets, architecture, device)
    if reads & {Evidence.SMASHED, Evidence.CUT_GRADIENT}:
        granted |= _cut(evidences, targets, threat, device)
    if Evidence.ROUND_SMASHED in reads:
        granted |= _round(evidences, threat, device)
    return granted


def refuse_uncounted(updates: Iterable[UpdateUp]) -> None:
    """Refuse updates that do not say of how many samples they are.

    Args:
        updates: Of the attacked round.

    Raises:
        MisfitError: One says it not.
    """
    if any(update.examples is None or update.examples < 1 for update in updates):
        raise MisfitError(
            "the replies carry no whole number above 0 as 'num-examples', nor under another key "
            "that speaks of samples, so nothing says how many stand behind an update; let the app "
            'send it: MetricRecord({"num-examples": <int>})'
        )


def _rows(evidences: Evidences, targets: Sequence[Target]) -> int:
    """Return how many samples lie behind each attacked update, which all of them agree on."""
    nodes = {target.node for target in targets}
    attacked = [update for update in evidences.updates if update.node in nodes]
    refuse_uncounted(attacked)
    counts = {update.examples for update in attacked}
    if len(counts) > 1:
        raise MisfitError(
            "the attacked updates cover different numbers of samples "
            f"({sorted(map(str, counts))}); attack those of one number at a time"
        )
    return int(next(iter(counts)) or 1)


def _batch_plan(
    evidences: Evidences, targets: Sequence[Target], about: Mapping[str, Any]
) -> tuple[int, int]:
    """Return the samples and optimiser steps behind each update; no number of steps is one pass."""
    rows = _rows(evidences, targets)
    require(about, "local_steps")
    if about["local_steps"] is not None:
        return rows, int(about["local_steps"])
    require(about, "batch_size")
    return rows, ceil(rows / int(about["batch_size"]))


def _weights(
    evidences: Evidences,
    targets: Sequence[Target],
    model: nn.Module,
    name: str,
    device: torch.device,
) -> dict[str, Any]:
    events = _updates(evidences, targets, model, name)
    trainable = [name for name, each in model.named_parameters() if each.requires_grad]
    if not trainable:
        raise MisfitError(
            f"model {name!r} has no weight that is trained (requires_grad), so its "
            "updates say nothing of the samples"
        )
    tied = {name for name, _ in model.named_parameters(remove_duplicate=False)}
    tied -= {name for name, _ in model.named_parameters()}
    first = events[0].before
    losses = [event.train_loss for event in events]
    told = [loss for loss in losses if loss is not None]
    return {
        "num_examples": torch.tensor([event.examples or 0 for event in events], device=device),
        "train_loss": _exact(told, device) if len(told) == len(losses) else None,
        "before": _stacked([event.before for event in events], trainable, device),
        "after": _stacked([event.after for event in events], trainable, device),
        "buffers": {
            name: torch.from_numpy(value).to(device)
            for name, value in first.items()
            if name not in {*trainable, *tied}
        },
    }


def _exact(losses: Sequence[float], device: torch.device) -> Float[Tensor, " targets"]:
    """Return losses as they were sent: in double precision, where the device has it."""
    made = torch.tensor(losses, dtype=torch.float64)
    return made.to(device, torch.float32 if device.type == "mps" else torch.float64)


def _updates(
    evidences: Evidences, targets: Sequence[Target], model: nn.Module, name: str
) -> list[UpdateUp]:
    """Return the targets' updates, of the model that the trace says."""
    by_node = {event.node: event for event in evidences.updates}
    events = []
    for target in targets:
        event = by_node[target.node]
        if not event.before or not event.after:
            raise MisfitError(_lacking(event))
        before, after = _named(event.before, model), _named(event.after, model)
        for arrays in (before, after):
            _check_weights(arrays, model, name)
        events.append(replace(event, before=before, after=after))
    return events


def _lacking(event: UpdateUp) -> str:
    """Say why there are no weights before or after a node's training."""
    if not event.before and not event.after:
        return SEALED
    passed = "sent back" if event.before else "was sent"
    return (
        f"the trace lacks the bottom that node {event.node} {passed} in round {event.round}; "
        "record every message of the run, or attack another round"
    )


def _named(arrays: Arrays, model: nn.Module) -> Arrays:
    """Return arrays that are numbered 0, 1, ... under the model's names, where all shapes fit.

    Flower's older clients send lists: of all the values of a ``state_dict``, or of the parameters
    alone. What fits neither is returned as it is.
    """
    numbers = [str(number) for number in range(len(arrays))]
    if not arrays or set(arrays) != set(numbers):
        return arrays
    every = model.state_dict()
    trained = {name: every[name] for name, _ in model.named_parameters()}
    values = [arrays[number] for number in numbers]
    for wanted in (every, trained):
        shapes = [tuple(value.shape) for value in wanted.values()]
        if shapes == [value.shape for value in values]:
            return dict(zip(wanted, values, strict=True))
    return arrays


def _check_weights(arrays: Arrays, model: nn.Module, name: str) -> None:
    """Refuse weights of another model than the trace says."""
    first = {parameter: key for key, parameter in model.named_parameters()}
    for key, parameter in model.named_parameters(remove_duplicate=False):
        if key in arrays and not np.array_equal(arrays[key], arrays.get(first[parameter], ())):
            raise MisfitError(
                f"{key!r} and {first[parameter]!r} are one weight in model {name!r}, and two of "
                "different values in the trace's update; name the model that was trained in "
                "about(model=...)"
            )
    for key, parameter in model.named_parameters():
        if key not in arrays:
            raise MisfitError(
                f"the trace's update has no {key!r}, which model {name!r} has; it has "
                f"{', '.join(arrays)}; send weights under the names of the model's state_dict, or "
                "as the list of its values in their order, and name that model in about(model=...)"
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
    if _rows(evidences, targets) != 1:
        raise MisfitError(
            "a head's gradient says one label only where one sample stands behind an update; set "
            "protocol.batch_size = 1 and protocol.local_steps = 1"
        )
    names = [name for name, _ in architecture.top(0).named_parameters()]
    if len(names) != 2:  # noqa: PLR2004  weight and bias
        raise MisfitError("the head must be one linear layer; set model.cut to the layer before it")
    events = _updates(evidences, targets, architecture.build(0), architecture.name)
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


def _round(evidences: Evidences, threat: ThreatModel, device: torch.device) -> dict[str, Any]:
    """Return every smashed row of a round's training, in the order of nodes and steps."""
    if threat.seat != Seat.SERVER:
        raise MisfitError(
            f"only the server gets what all nodes send at the cut: a {threat.seat} does not; use "
            "seat = 'server'"
        )
    if not evidences.smashed:
        raise MisfitError(
            "the attack learns from a round's smashed data of training, and that round has none"
        )
    events = [event for _, event in sorted(evidences.smashed.items())]
    shapes = {event.smashed.shape[1:] for event in events}
    if len(shapes) > 1:
        raise MisfitError(
            f"nodes sent smashed rows of several shapes ({sorted(shapes)}), which cannot be "
            "learned from together"
        )
    seen = torch.cat([torch.from_numpy(event.smashed) for event in events]).to(device)
    if any(event.labels is None for event in events):
        return {"round_smashed": seen}
    labels = [torch.as_tensor(event.labels) for event in events]
    return {"round_smashed": seen, "round_labels": torch.cat(labels).to(device)}


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
