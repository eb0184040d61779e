"""Targets: which recorded messages are attacked, picked the same way in every protocol family.

One round's messages (the last, unless the attack asks for another), first rows of every node first:
so both families attack the same private samples. Who reads relayed bottoms, and no smashed data,
attacks what each node trained on in the round, as of an update. A client reads its own messages
alone, updates and test rows included, so to its attacks the first node is the client. Where nodes
hold strips of the same images, only the first party is attacked: the others' messages are about the
same samples, and images of other shapes. Of updates over different numbers of samples those of one
number are attacked together: the number that most nodes have, of several such the first node's.
"""

from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from math import ceil
from typing import Any

from experiments.results.cards import Exposure
from experiments.settings.plugins import round_number
from leakbed.contracts import Evidence, Seat, ThreatModel, UnfitError
from leakbed.contracts.threat import sees
from leakbed.events import Arrays, Bottom, CutGradientDown, Phase, SmashedUp, Target, UpdateUp
from leakbed.tap.trace import Trace


class MisfitError(UnfitError):
    """An attack needs messages that the recorded protocol does not send; says what would fit."""


@dataclass(frozen=True, kw_only=True, eq=False)
class Evidences:
    """One round's messages of a trace, by kind.

    Attributes:
        updates: One per node that trained; of split learning :meth:`by_node` alone has them.
        smashed: Training batches by node and step.
        gradients: Cut gradients by node and step.
        evaluated: Smashed test batches.
        of_bottoms: Whether ``updates`` are of bottoms, from :meth:`by_node`.
    """

    updates: Sequence[UpdateUp]
    smashed: Mapping[tuple[int, int], SmashedUp]
    gradients: Mapping[tuple[int, int], CutGradientDown]
    evaluated: Sequence[SmashedUp]
    of_bottoms: bool = False

    @classmethod
    def of(cls, trace: Trace, collect: str | int = "last") -> "Evidences":
        """Read one round of a trace; one that it does not have is a :class:`MisfitError`.

        Args:
            trace: Of the run.
            collect: ``"first"``, ``"middle"``, ``"last"`` or the round's number.

        Returns:
            Its messages.
        """
        number = _recorded(trace, collect)
        events = list(trace.events(UpdateUp, SmashedUp, CutGradientDown, round_=number))
        if trace.about.get("divides") == "features":
            first = min((event.node for event in events), default=0)
            events = [event for event in events if event.node == first]
        batches = [e for e in events if isinstance(e, SmashedUp)]
        training = [e for e in batches if e.phase == Phase.TRAIN]
        gradients = [e for e in events if isinstance(e, CutGradientDown)]
        return cls(
            updates=[e for e in events if isinstance(e, UpdateUp)],
            smashed={(e.node, e.step): e for e in training},
            gradients={(e.node, e.step): e for e in gradients},
            evaluated=[e for e in batches if e.phase == Phase.EVALUATE],
        )

    @property
    def exchanges_weights(self) -> bool:
        """Whether the protocol sends whole weights rather than smashed data."""
        return bool(self.updates) and not self.of_bottoms

    def by_node(self, trace: Trace) -> "Evidences":
        """Return a round of split learning with each node's part before and after it, too.

        Args:
            trace: Of the run. A bottom that passed sealed is not in it, and its weights are empty.

        Returns:
            With an update for every node that trained, over all the rows it sent.
        """
        if self.updates or not self.smashed:
            return self
        number = next(iter(self.smashed.values())).round
        before: dict[int, Arrays] = {}
        after: dict[int, Arrays] = {}
        for event in trace.events(Bottom, round_=number):
            if isinstance(event, Bottom) and event.up:
                after[event.node] = event.arrays
            elif isinstance(event, Bottom) and event.node not in after:  # else to evaluate it
                before.setdefault(event.node, event.arrays)
        rows: Counter[int] = Counter()
        for (node, _), event in self.smashed.items():
            rows[node] += len(event.smashed)
        updates = [
            UpdateUp(
                node=node,
                round=number,
                before=before.get(node, {}),
                after=after.get(node, {}),
                examples=rows[node],
            )
            for node in sorted(rows)
        ]
        return replace(self, updates=updates, of_bottoms=True)


def _recorded(trace: Trace, collect: str | int) -> int:
    """Return the number of a round that the trace has, or say why it has it not."""
    rounds = sorted({int(record.fields.get("round", 0)) for record in trace.records})
    last = rounds[-1] if rounds else 0
    number = round_number(collect, last=last)
    if number > last:
        raise MisfitError(f"round {number} was not trained: the trace ends with round {last}")
    if number not in rounds and number != last:
        kept = ", ".join(str(each) for each in rounds if each)
        raise MisfitError(
            f"round {number} is not in the trace, which keeps round {kept}; record the run with "
            "keep_rounds = 'all'"
        )
    return number


def pick_targets(
    evidences: Evidences, threat: ThreatModel, *, when: str, count: int
) -> list[Target]:
    """Return the attacked messages; a trace that holds no such message is a :class:`MisfitError`.

    Args:
        evidences: The attacked round.
        threat: Says which kind of message is attacked; one without evidence takes what is there.
        when: ``"training"`` or ``"inference"``: which smashed rows are attacked.
        count: How many at most.

    Returns:
        At least one, in the order first rows of all nodes, second rows, and so on; of an attack by
        a client, messages of the first node alone.
    """
    refuse_misfit(threat, updates=evidences.exchanges_weights)
    by_node = evidences.exchanges_weights or attacks_nodes(threat)
    found = _found(evidences, when=when, by_node=by_node)
    if threat.seat == Seat.CLIENT:
        own = min(target.node for target in found)
        found = [target for target in found if target.node == own]
    elif by_node:
        found = _of_one_number(found, evidences)
    return found[:count]


def _of_one_number(found: Sequence[Target], evidences: Evidences) -> list[Target]:
    """Return the targets of the number of samples that most nodes have; in a tie, the first's."""
    numbers = {event.node: event.examples for event in evidences.updates}
    often = Counter(number for _, number in sorted(numbers.items()) if number)
    if not often:
        return list(found)
    ((chosen, _),) = often.most_common(1)
    return [target for target in found if numbers[target.node] == chosen]


def left_out(evidences: Evidences, targets: Sequence[Target]) -> str | None:
    """Say which updates are of other numbers of samples than those attacked.

    Args:
        evidences: The attacked round.
        targets: Picked from it.

    Returns:
        A note for the card; None if there is none.
    """
    if targets[0].row is not None:
        return None
    numbers = {event.node: event.examples for event in evidences.updates}
    attacked = {numbers.get(target.node) for target in targets}
    others = Counter(str(number) for number in numbers.values() if number not in attacked)
    if not others or len(attacked) != 1:
        return None
    of = ", ".join(f"{nodes} over {number}" for number, nodes in sorted(others.items()))
    return (
        f"nodes trained on different numbers of samples: updates over {next(iter(attacked))} were "
        f"attacked, others ({of}) were not"
    )


_OF_CUT = frozenset({Evidence.SMASHED, Evidence.ROUND_SMASHED, Evidence.CUT_GRADIENT})


def attacks_nodes(threat: ThreatModel) -> bool:
    """Say whether an attack on split learning is one on all that a node trained on in a round.

    Args:
        threat: The attack's.

    Returns:
        Whether it reads relayed bottoms, or kinds of its own that are of a node, and nothing that
        is of a row.
    """
    if threat.evidence & _OF_CUT or any(kind.per == "row" for kind in threat.evidence_kinds):
        return False
    return Evidence.UPDATE in threat.evidence or bool(threat.evidence_kinds)


def _found(evidences: Evidences, *, when: str, by_node: bool) -> list[Target]:
    """Return everything there is to attack, or say why there is nothing."""
    if by_node and evidences.updates:
        if when == "inference":
            raise MisfitError(
                "an update or a bottom is sent in training only; use when = 'training'"
            )
        return [_of_update(event) for event in evidences.updates]
    if not evidences.smashed:
        raise MisfitError("the trace holds neither updates nor smashed data of that round")
    if when == "inference":
        if not evidences.evaluated:
            raise MisfitError("no test rows were evaluated in that round; use when = 'training'")
        rows = [(e, row) for e in evidences.evaluated for row in range(len(e.smashed))]
        return [_of_row(event, row) for event, row in rows]
    return _interleaved(evidences)


def exposure(
    evidences: Evidences,
    targets: Sequence[Target],
    about: Mapping[str, Any],
    *,
    in_turn: bool,
) -> Exposure:
    """Say when and from how many rows the attacked messages were made.

    Args:
        evidences: The attacked round.
        targets: Picked from it, at least one.
        about: What the trace says of its run; its ``modes`` are those of the nodes' networks.
        in_turn: Whether a node starts from what the node before it left.

    Returns:
        It, for a card.
    """
    if targets[0].row is None:
        nodes = {target.node for target in targets}
        counts = {event.examples for event in evidences.updates if event.node in nodes}
        rows = None if None in counts else max((int(each or 0) for each in counts), default=None)
        steps = about.get("local_steps")
        if steps is None and rows is not None and about.get("batch_size"):
            steps = ceil(rows / int(about["batch_size"]))
    else:
        batches = {(Phase.TRAIN, *place): event for place, event in evidences.smashed.items()}
        batches |= {(Phase.EVALUATE, each.node, each.step): each for each in evidences.evaluated}
        rows = max(len(batches[each.phase, each.node, each.step].smashed) for each in targets)
        steps = None
    first = next((node for node, _ in evidences.smashed), targets[0].node)
    before = {_trained(target, behind=in_turn and target.node != first) for target in targets}
    return Exposure(
        round=targets[0].round,
        trained="partly" if len(before) > 1 else "yes" if True in before else "no",
        mode=(about.get("modes") or {}).get(targets[0].phase),
        rows=rows,
        steps=steps,
    )


def _trained(target: Target, *, behind: bool) -> bool:
    """Say whether the node's network had been trained before a message, if only a batch before."""
    return target.phase == Phase.EVALUATE or target.round > 1 or target.step > 0 or behind


def refuse_misfit(threat: ThreatModel, *, updates: bool, bottoms: str | None = None) -> None:
    """Refuse an attack whose evidence a protocol never sends, or its seat never sees.

    Args:
        threat: The attack's.
        updates: Whether the protocol exchanges weights; else smashed data and cut gradients.
        bottoms: ``"sealed"`` or ``"relayed"``, where that is known before there is a trace.

    Raises:
        MisfitError: If the attack reads what is not sent; says which protocol sends it.
    """
    _refuse_unseen(threat)
    of_weights = threat.evidence & {Evidence.UPDATE, Evidence.HEAD_WEIGHT_GRADIENT}
    of_cut = threat.evidence & _OF_CUT
    hears = threat.seat in {Seat.FED_SERVER, Seat.EAVESDROPPER}
    if not updates and of_weights == {Evidence.UPDATE} and hears:
        if bottoms == "sealed":
            raise MisfitError(SEALED)
        of_weights = frozenset()
    if (of_cut and not of_weights) if updates else of_weights:
        has = "updates (weights)" if updates else "smashed data and cut gradients"
        wants = ", ".join(sorted(map(str, threat.evidence)))
        other = "'vanilla-split'" if updates else "'fedavg'"
        if of_weights == {Evidence.UPDATE}:
            other += (
                f"; a {threat.seat} is granted no bottom either: relayed ones are the fed-server's "
                "(seat = 'fed-server'), and an experiment tells one to who needs "
                "leakbed.contracts.BOTTOM"
            )
        raise MisfitError(
            f"the attack reads {wants} but this protocol exchanges {has}; use {other}"
        )


SEALED = (
    "the attack reads bottoms, and here they pass the server sealed, so that a trace holds their "
    "size alone; set protocol.bottoms = 'relayed', or use 'splitfed-v1', 'splitfed-v2' or "
    "'parallel-split', which average bottoms and must read them"
)


def _refuse_unseen(threat: ThreatModel) -> None:
    """Refuse evidence of messages that a seat does not see, whatever the protocol."""
    if threat.seat == Seat.FED_SERVER and (more := threat.evidence & _OF_CUT):
        names = ", ".join(sorted(map(str, more)))
        raise MisfitError(
            f"the attack reads {names}, which a fed-server does not see: it gets bottoms alone. "
            "Who reads both is seat = 'eavesdropper', where bottoms are relayed, or a server that "
            "is told the bottom (leakbed.contracts.BOTTOM among its needs)"
        )
    for kind in threat.evidence_kinds:
        if unseen := sorted(each for each in kind.reads if not sees(threat.seat, each)):
            seats = [str(seat) for seat in Seat if all(sees(seat, each) for each in kind.reads)]
            raise MisfitError(
                f"the evidence {kind.name!r} is made of messages that a {threat.seat} does not "
                f"see: {', '.join(unseen)}; a seat that sees them is {' or '.join(seats)}"
            )


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
