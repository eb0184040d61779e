"""What an attack's own kinds of evidence and knowledge grant it.

Evidence is read off the messages of the trace that the seat sees, and of those the kinds that the
evidence names alone. Knowledge is told by the experiment, of the run's answer key, where the
attack's table says so (``grants``); a card names it with its settings.
"""

from __future__ import annotations

import sys
from collections.abc import Sequence
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING

import torch
from torch import Tensor, nn

from defenses import DEFENSES
from experiments.run.evasion import at_the_end
from experiments.run.targets import SEALED, MisfitError
from experiments.run.view import architecture_of
from experiments.settings.schema import SettingsError
from leakbed.contract_checks import read_evidence, tell
from leakbed.contracts import (
    EvidenceKind,
    KnowledgeKind,
    Protects,
    Seat,
    Secrets,
    Seen,
    ThreatModel,
    select,
)
from leakbed.contracts.threat import Granted
from leakbed.lookup import unknown_name
from leakbed.mods import applied
from leakbed.oracle.truth import AnswerKey
from leakbed.plugins import is_own, picked
from leakbed.seeds import derive
from leakbed.tap.trace_index import TYPES
from leakbed.tensors import load

if TYPE_CHECKING:
    from experiments.settings.plugins import AttackSettings
    from leakbed.events import Event, Target
    from leakbed.tap.trace import Trace

_CHUNK = 256  # images that pass a bottom at once


def refuse_grants(threat: ThreatModel, settings: AttackSettings) -> None:
    """Refuse an experiment that does not grant what an attack needs, or grants what it does not.

    Args:
        threat: The attack's.
        settings: From which it was made.

    Raises:
        SettingsError: If so, or a setting of a grant is none, or of another type.
    """
    kinds = {kind.name: kind for kind in threat.knowledge_kinds}
    if missing := [name for name in kinds if name not in settings.grants]:
        raise SettingsError(
            f"attack {settings.name} needs {', '.join(missing)}, which no party of a protocol has "
            f"by itself; an experiment grants it: grants = {list(kinds)} in the attack's table"
        )
    for name, given in settings.grants.items():
        if name not in kinds:
            raise SettingsError(
                f"attack {settings.name}: grants has {name!r}, which its threat model does not "
                f"need; it needs {', '.join(kinds) or 'nothing that is granted'}"
            )
        for key, value in given.items():
            _check_setting(settings.name, kinds[name], key, value)


def _check_setting(attack: str, kind: KnowledgeKind, key: str, value: object) -> None:
    if key not in kind.settings:
        raise SettingsError(
            f"attack {attack}: {unknown_name(f'setting of {kind.name}', key, kind.settings)}"
        )
    wanted = type(kind.settings[key])
    if type(value) is not wanted and not (wanted is float and type(value) is int):
        raise SettingsError(
            f"attack {attack}: {key} of {kind.name} is {value!r}; give a {wanted.__name__}, such "
            f"as {kind.settings[key]!r}"
        )


def grant_kinds(
    threat: ThreatModel,
    settings: AttackSettings,
    trace: Trace,
    targets: Sequence[Target],
    *,
    answers: Path | AnswerKey | None,
    device: torch.device,
    stream: int,
) -> tuple[Granted, tuple[str, ...]]:
    """Return what a threat model's own kinds grant.

    Evidence that the trace lacks is a :class:`~experiments.run.targets.MisfitError` too; code that
    breaks is a :class:`~leakbed.contracts.BrokenPluginError` that names the kind.

    Args:
        threat: The attack's.
        settings: Its settings, with what the experiment grants.
        trace: Of the run.
        targets: The attacked messages.
        answers: The answer key, or its folder; looked at where something is to be told.
        device: Where the attack computes.
        stream: Of what is drawn for it.

    Returns:
        By name, and notes for the card of what was told.

    Raises:
        MisfitError: Something is to be told, and there is no answer key.
    """
    found = Granted()
    for kind in threat.evidence_kinds:
        found[kind.name] = read_evidence(kind, seen(trace, kind, threat.seat, targets), device)
    if not threat.knowledge_kinds:
        return found, ()
    if answers is None:
        names = ", ".join(kind.name for kind in threat.knowledge_kinds)
        raise MisfitError(f"the attack is told {names}, which needs the answer key of the run")
    key = answers if isinstance(answers, AnswerKey) else AnswerKey.read(answers)
    secrets = _secrets(trace, key, targets, device)
    notes = []
    for each in threat.knowledge_kinds:
        own = {**each.settings, **settings.grants.get(each.name, {})}
        found[each.name] = tell(each, secrets(stream=derive(stream, f"knowledge/{each.name}")), own)
        said = ", ".join(f"{key} = {value!r}" for key, value in own.items())
        notes.append(
            f"the experiment told it {each.name}{f' ({said})' if said else ''}: {each.in_words}; "
            "no baseline is told the same"
        )
    return found, tuple(notes)


def seen(trace: Trace, kind: EvidenceKind, seat: Seat, targets: Sequence[Target]) -> Seen:
    """Return the messages that an evidence may be made of.

    Args:
        trace: Of the run.
        kind: Names the kinds of messages and the rounds.
        seat: Who sees them; of a client its own node's alone.
        targets: The attacked messages.

    Returns:
        In the order they were sent.

    Raises:
        MisfitError: The trace lacks a kind of message or a round; says what it has.
    """
    last = targets[0].round
    wanted = range(1, last + 1) if kind.rounds == "until" else range(last, last + 1)
    kept = {int(each.fields.get("round", 0)) for each in trace.records}
    if missing := [number for number in wanted if number not in kept]:
        raise MisfitError(
            f"the evidence {kind.name!r} is of rounds 1 to {last}, and the trace lacks round "
            f"{', '.join(map(str, missing))}; record the run with keep_rounds = 'all'"
        )
    events: list[Event] = []
    for number in wanted:
        events += trace.events(*(TYPES[each] for each in sorted(kind.reads)), round_=number)
    if seat == Seat.CLIENT:
        events = [each for each in events if each.node == targets[0].node]
    sent = {type(each) for each in events}
    if lacking := sorted(each for each in kind.reads if TYPES[each] not in sent):
        has = sorted({each.kind for each in trace.records if each.kind in TYPES})
        raise MisfitError(
            f"the evidence {kind.name!r} is made of {', '.join(lacking)}, of which the trace holds "
            f"none in that round; it holds {', '.join(has)}"
            + (f". {SEALED}" if "sealed" in has and "bottom" in lacking else "")
        )
    return Seen(seat=seat, events=tuple(events), targets=tuple(targets), about=trace.about)


def _secrets(
    trace: Trace, key: AnswerKey, targets: Sequence[Target], device: torch.device
) -> partial[Secrets]:
    """Return everything of a run that may be told, but for the stream."""

    def bottom() -> nn.Module:
        return _bottom(trace, key, targets).to(device)

    def sends(images: Tensor, stream: int) -> Tensor:
        network = bottom()
        with torch.no_grad():
            made = torch.cat([network(part.to(device)) for part in images.split(_CHUNK)])
            return _defended(key, made.cpu(), stream).to(device)

    return partial(
        Secrets,
        targets=targets,
        behind=key.rows_of(targets),
        images=key.images,
        labels=key.labels,
        test_images=key.test_images,
        test_labels=key.test_labels,
        public_images=key.public_images,
        public_labels=key.public_labels,
        architecture=architecture_of(trace.about),
        about=trace.about,
        bottom=bottom,
        sends=sends,
        device=device,
    )


def _bottom(trace: Trace, key: AnswerKey, targets: Sequence[Target]) -> nn.Module:
    """Return the node's part as the last round left it, or say why there is none to tell."""
    if key.bottom is None:
        raise MisfitError(
            "the answer key holds no bottom: the protocol has none, has one for each party, or a "
            "node stopped the run; use a protocol with one bottom, such as 'vanilla-split'"
        )
    if not at_the_end(targets, trace):
        raise MisfitError(
            f"a bottom is told as the last round left it, and round {targets[0].round} is "
            "attacked; use collect = 'last'"
        )
    network = architecture_of(trace.about).bottom(0)
    # The key of a U-shaped run has the head beside it.
    load(network, {n: torch.from_numpy(key.bottom[n]) for n in network.state_dict()})
    return network.eval().requires_grad_(requires_grad=False)


def _defended(key: AnswerKey, smashed: Tensor, stream: int) -> Tensor:
    """Return smashed data as the node's defences let them go."""
    named = key.training.get("defenses", [])
    for name, _ in named:
        if is_own(name) and name.partition(":")[0] not in sys.modules:
            raise MisfitError(
                f"what the node sends passes its defence, a class of somebody's own, {name!r}, and "
                "importing it runs the code there; attack in the experiment that has it, or import "
                "it yourself before you attack"
            )
    defenses = tuple(picked(name, DEFENSES, "defence")(**own) for name, own in named)
    chosen = select(defenses, Protects.SMASHED)
    stages = [
        (str(place), each, each.begin(derive(stream, f"defence/{place}")))
        for place, each in enumerate(chosen)
    ]
    return applied(stages, smashed)[1] if stages else smashed
