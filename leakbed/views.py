"""Views: from a trace and a threat model to exactly what one attack may read.

Targets are picked the same way in every protocol family, so that both families attack the same
private samples: the last round's messages, first rows of every node first.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from jaxtyping import Int
from torch import Tensor

from leakbed.contracts import Evidence, Knowledge, ThreatModel, View
from leakbed.events import Arrays, CutGradientDown, Phase, SmashedUp, UpdateUp
from leakbed.models import Architecture
from leakbed.trace import Trace

ADVERSARY, PUBLIC = "adversary", "public"


class MisfitError(ValueError):
    """An attack needs messages that the recorded protocol does not send; says what would fit."""


@dataclass(frozen=True, kw_only=True)
class Target:
    """Which private samples one attacked message hides; says nothing about them.

    Attributes:
        node: Partition id.
        round: Server round.
        step: Step of the smashed batch, or its first test row when evaluating; 0 for an update.
        row: Row within the batch; None for all rows of an update.
        phase: Training or evaluation.
    """

    node: int
    round: int
    step: int
    row: int | None
    phase: Phase


@dataclass(frozen=True, kw_only=True, eq=False)
class Evidences:
    """The last round's messages of a trace, by kind.

    Attributes:
        updates: One per node that trained.
        smashed: Training batches by node and step.
        gradients: Cut gradients by node and step.
        evaluated: Smashed test batches.
    """

    updates: Sequence[UpdateUp]
    smashed: Mapping[tuple[int, int], SmashedUp]
    gradients: Mapping[tuple[int, int], CutGradientDown]
    evaluated: Sequence[SmashedUp]

    @classmethod
    def of(cls, trace: Trace) -> "Evidences":
        """Read the last round of a trace."""
        last = max((int(r.fields.get("round", 0)) for r in trace.records), default=0)
        events = [e for e in trace.events(UpdateUp, SmashedUp, CutGradientDown) if e.round == last]
        batches = [e for e in events if isinstance(e, SmashedUp)]
        training = [e for e in batches if e.phase == Phase.TRAIN]
        gradients = [e for e in events if isinstance(e, CutGradientDown)]
        return cls(
            updates=[e for e in events if isinstance(e, UpdateUp)],
            smashed={(e.node, e.step): e for e in training},
            gradients={(e.node, e.step): e for e in gradients},
            evaluated=[e for e in batches if e.phase == Phase.EVALUATE],
        )


def pick_targets(
    evidences: Evidences, threat: ThreatModel, *, when: str, count: int
) -> list[Target]:
    """Return the attacked messages.

    Args:
        evidences: The last round.
        threat: Says which kind of message is attacked; one without evidence takes what is there.
        when: ``"training"`` or ``"inference"``: which smashed rows are attacked.
        count: How many at most.

    Returns:
        At least one, in the order first rows of all nodes, second rows, and so on.

    Raises:
        MisfitError: If the trace holds no such message.
    """
    reads_cut = threat.evidence & {Evidence.SMASHED, Evidence.CUT_GRADIENT}
    if evidences.updates and not reads_cut:
        return [_of_update(event) for event in evidences.updates[:count]]
    if Evidence.UPDATE in threat.evidence or not evidences.smashed:
        has = "updates (weights)" if evidences.updates else "smashed data and cut gradients"
        wants = ", ".join(sorted(threat.evidence))
        raise MisfitError(
            f"the attack reads {wants} but this protocol exchanges {has}; use "
            + ("'vanilla-split'" if evidences.updates else "'fedavg'")
        )
    if when == "inference":
        if not evidences.evaluated:
            raise MisfitError("no test rows were evaluated in this run; use when = 'training'")
        rows = [(e, row) for e in evidences.evaluated for row in range(len(e.smashed))]
        return [_of_row(event, row) for event, row in rows[:count]]
    return _interleaved(evidences)[:count]


def build_view(
    trace: Trace,
    evidences: Evidences,
    threat: ThreatModel,
    targets: Sequence[Target],
    *,
    device: torch.device,
    labels: Int[Tensor, " targets rows"] | None = None,
) -> View:
    """Grant a threat model's seat what it may read, and nothing else.

    Args:
        trace: Where the run is described.
        evidences: Its last round.
        threat: The attack's.
        targets: From :func:`pick_targets`.
        device: Where the attack computes.
        labels: The targets' true labels, granted only to a threat model that says it needs them.

    Returns:
        The view.

    Raises:
        MisfitError: If it needs labels that neither the protocol nor the caller gives.
    """
    architecture = architecture_of(trace.about)
    granted: dict[str, Any] = {}
    if Evidence.UPDATE in threat.evidence:
        granted |= _weights(evidences, targets, architecture, device)
    if threat.evidence & {Evidence.SMASHED, Evidence.CUT_GRADIENT}:
        granted |= _cut(evidences, targets, threat, device)
    if Knowledge.PUBLIC_IMAGES in threat.needs:
        granted |= _public(trace, device)
    if Knowledge.ARCHITECTURE in threat.needs:
        granted["architecture"] = architecture
    if Knowledge.LABELS in threat.needs and granted.get("labels") is None:
        if labels is None:
            raise MisfitError("the attack is given true labels; it needs the answer key for them")
        granted["labels"] = labels.to(device)
    whole = targets[0].row is None
    return View(
        seat=threat.seat,
        image_shape=architecture.image_shape,
        num_classes=architecture.num_classes,
        targets=len(targets),
        rows=_rows(evidences) if whole else 1,
        local_steps=int(trace.about["local_steps"] or 1) if whole else 1,
        device=device,
        **granted,
    )


def architecture_of(about: Mapping[str, Any]) -> Architecture:
    """Return the architecture a trace's header describes."""
    fields = dict(about["architecture"])
    fields["image_shape"] = tuple(fields["image_shape"])
    return Architecture(**fields)


def _of_update(event: UpdateUp) -> Target:
    return Target(node=event.node, round=event.round, step=0, row=None, phase=Phase.TRAIN)


def _of_row(event: SmashedUp, row: int) -> Target:
    return Target(node=event.node, round=event.round, step=event.step, row=row, phase=event.phase)


def _interleaved(evidences: Evidences) -> list[Target]:
    """Return every smashed training row: all nodes' first rows, then their second rows, ..."""
    place: dict[int, int] = {}
    rows: list[tuple[int, int, Target]] = []
    for (node, _), event in sorted(evidences.smashed.items()):
        start = place.get(node, 0)
        place[node] = start + len(event.smashed)
        rows += [(start + row, node, _of_row(event, row)) for row in range(len(event.smashed))]
    return [target for _, _, target in sorted(rows, key=lambda item: item[:2])]


def _rows(evidences: Evidences) -> int:
    """Return how many samples lie behind each update, which all updates must agree on."""
    counts = {event.examples for event in evidences.updates}
    if len(counts) > 1 or None in counts:
        raise MisfitError(
            f"updates cover different numbers of samples ({sorted(map(str, counts))}); "
            "set protocol.local_steps so that all nodes train on as many"
        )
    return int(next(iter(counts)) or 1)


def _weights(
    evidences: Evidences,
    targets: Sequence[Target],
    architecture: Architecture,
    device: torch.device,
) -> dict[str, Any]:
    by_node = {event.node: event for event in evidences.updates}
    events = [by_node[target.node] for target in targets]
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
    granted: dict[str, Any] = {}
    if Evidence.SMASHED in threat.evidence:
        picked = [torch.from_numpy(e.smashed[row]) for e, row in zip(events, rows, strict=True)]
        granted["smashed"] = torch.stack(picked).to(device)
    if Evidence.CUT_GRADIENT in threat.evidence:
        granted["cut_gradient"] = _gradients(evidences, targets).to(device)
    if all(event.labels is not None for event in events):
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


def _public(trace: Trace, device: torch.device) -> dict[str, Any]:
    held = trace.holding(ADVERSARY, PUBLIC)
    if held is None:
        raise MisfitError("the attack needs public images; set data.public above 0")
    return {
        "public_images": torch.from_numpy(held["images"]).to(device),
        "public_labels": torch.from_numpy(held["labels"]).to(device),
    }
