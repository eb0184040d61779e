"""The ceiling beside a card: no attack from its seat identifies rows more often, but by chance.

It is computed once for each training run and kind of message, and put on the card of every attack
that it bounds. An attack that reads more than one message of a row, is told more than the guesser,
or sits elsewhere, gets no number but the reason why there is none.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from math import floor
from pathlib import Path
from statistics import fmean
from typing import Any, TypeVar, cast

from experiments.results.cards import Bound
from experiments.run.attack import Cell
from experiments.run.ceiling_results import RunCeiling
from experiments.run.ceilings import ceiling_of_run
from experiments.run.label_ceilings import (
    LabelCeiling,
    canary_targets,
    label_ceiling_of_run,
)
from experiments.settings.cells import CellSettings
from experiments.settings.schema import CeilingSettings
from leakbed.contracts import Evidence, Knowledge, Seat, ThreatModel
from leakbed.contracts.noise_laws import NoCeilingError
from leakbed.events import Phase, Target
from leakbed.oracle.noise_checks import above
from strategies import find_protocol

_OF_A_MESSAGE = {
    Evidence.UPDATE,
    Evidence.HEAD_WEIGHT_GRADIENT,  # a part of the update
    Evidence.SMASHED,
    Evidence.CUT_GRADIENT,  # the server made it of the smashed row and the label
}
_NOT_TOLD = {Knowledge.KNOWN_LABELS, Knowledge.OWN_IMAGES, Knowledge.NATURAL_IMAGES}


_Found = TypeVar("_Found", RunCeiling, LabelCeiling)


class Bounds:
    """The ceilings of one training run, each computed when the first card asks for it."""

    def __init__(self) -> None:
        """Compute nothing yet."""
        self._found: dict[tuple[object, ...], RunCeiling | LabelCeiling | str] = {}

    def beside(
        self,
        cell: Cell,
        run: Path,
        scores: Mapping[str, Any],
        targets: Sequence[Target],
    ) -> Bound | None:
        """Return what bounds a card's identification, or of canaries its label accuracy.

        Args:
            cell: The card's.
            run: The folder of its training run.
            scores: The card's.
            targets: The messages behind them, in their order; at least one.

        Returns:
            The ceiling, or why there is none; None where the experiment does not ask for one.
        """
        settings, threat = cell.settings, cell.attack.threat
        if settings.ceiling is None:
            return None
        try:
            if "identification" not in scores and settings.training.data.canaries:
                _refuse_labels(threat, scores, when=settings.attack.when, reader=_reader(settings))
                return self._of_labels(settings, settings.ceiling, run, scores, targets=targets)
            _refuse(threat, scores, when=settings.attack.when)
            among = _spread_over(targets)
            found = self._of(settings, settings.ceiling, run, threat, scores, among=among)
        except NoCeilingError as error:
            return Bound(why=str(error))
        return _bound(found, scores, several=_tell_of_each_other(settings, targets))

    def _of(
        self,
        cell: CellSettings,
        settings: CeilingSettings,
        run: Path,
        threat: ThreatModel,
        scores: Mapping[str, Any],
        *,
        among: int | None,
    ) -> RunCeiling:
        # Among fewer rows than the card's a guess is right more often, never less.
        candidates = min(settings.candidates, int(scores["candidates"]))
        labels = Knowledge.LABELS in threat.needs
        place = run, cell.attack.collect, cell.attack.when, candidates, labels, among

        def compute() -> RunCeiling:
            return ceiling_of_run(
                run,
                collect=cell.attack.collect,
                when=cell.attack.when,
                targets=settings.messages,
                candidates=candidates,
                draws=settings.draws,
                labels=labels,
                among=among,
                model=cell.training.model.name,  # the user names it, so it may be imported
            )

        return self._once(place, compute)

    def _of_labels(
        self,
        cell: CellSettings,
        settings: CeilingSettings,
        run: Path,
        scores: Mapping[str, Any],
        *,
        targets: Sequence[Target],
    ) -> Bound:
        collect = cell.attack.collect
        hits = [
            bool(value)
            for value, canary in zip(
                scores["label_accuracy"]["values"], canary_targets(run, targets), strict=True
            )
            if canary
        ]
        if not hits:
            raise NoCeilingError(
                "no ceiling: none of the attacked rows is a canary; attack more of them, or set "
                "more data.canaries"
            )

        def compute() -> LabelCeiling:
            return label_ceiling_of_run(
                run,
                collect=collect,
                targets=settings.messages,
                draws=25 * settings.draws,
                model=cell.training.model.name,
                party=targets[0].node,  # cards are of the first party
            )

        found = self._once((run, "labels", collect), compute)
        return Bound(
            game="canary label",
            ceiling=found.value,
            error=found.error,
            messages=len(found.messages),
            guesses=1,
            candidates=found.classes,
            chance=found.chance,
            seat=found.seat,
            round=found.messages[0].round,
            used_before=0,
            told=found.told,
            hits=sum(hits),
            targets=len(hits),
            p=above(sum(hits), len(hits), ceiling=found.value, error=found.error),
            doubts=tuple(f"recorded noise, {each}" for each in found.findings if not each.sound),
        )

    def _once(self, place: tuple[object, ...], compute: Callable[[], _Found]) -> _Found:
        """Return what was computed for a place, or compute it; its refusal is kept too.

        Kept as words: an exception holds the arrays of all the calls that it came through.
        """
        if place not in self._found:
            try:
                self._found[place] = compute()
            except NoCeilingError as error:
                self._found[place] = str(error)
        found = self._found[place]
        if isinstance(found, str):
            raise NoCeilingError(found)
        return cast("_Found", found)


def _refuse(threat: ThreatModel, scores: Mapping[str, Any], *, when: str) -> None:
    """Refuse an attack that the ceiling does not bound, or whose score is another."""
    if "identification" not in scores:
        raise NoCeilingError(
            "no ceiling: it bounds how often rows are identified by guessed images"
        )
    if threat.active:
        raise NoCeilingError(
            "no ceiling: it is of runs that follow the protocol, not of active ones"
        )
    reads = threat.evidence - {Evidence.NOTHING}
    if reads and threat.seat != Seat.SERVER:
        raise NoCeilingError(
            f"no ceiling: it is the server's, and this attack's seat is {threat.seat}"
        )
    if more := sorted(map(str, reads - _OF_A_MESSAGE)):
        raise NoCeilingError(
            f"no ceiling: it is of single messages; the attack reads {', '.join(more)}"
        )
    told = {*(threat.needs & _NOT_TOLD), *threat.knowledge_kinds}
    if when == "training" and Knowledge.SERVER_PART in threat.needs:
        told |= {Knowledge.SERVER_PART}  # as the row's own message left it
    if told:
        raise NoCeilingError(
            f"no ceiling: its guesser is not told {', '.join(sorted(map(str, told)))}"
        )


def _reader(cell: CellSettings) -> Seat:
    """Return who must guess the labels of a run; of updates no card is held against the ceiling."""
    protocol = cell.training.protocol
    if find_protocol(protocol.name).exchanges == "weights":
        raise NoCeilingError(
            "no ceiling: an update hides the labels of several rows, which are guessed together; "
            "the ceiling of canaries is of one label"
        )
    return Seat.SERVER if protocol.labels == "client" else Seat.CLIENT


def _refuse_labels(
    threat: ThreatModel, scores: Mapping[str, Any], *, when: str, reader: Seat
) -> None:
    """Refuse an attack on labels that the ceiling of canaries does not bound."""
    if "label_accuracy" not in scores:
        raise NoCeilingError(
            "no ceiling: it bounds how often rows are identified, or canaries' labels named"
        )
    reads = threat.evidence - {Evidence.NOTHING}
    if threat.active or (reads and threat.seat != reader):
        raise NoCeilingError(
            f"no ceiling: that of labels is of a {reader} that follows the protocol; this attack's "
            f"seat is {threat.seat}"
        )
    if when != "training":
        raise NoCeilingError("no ceiling: test rows are no canaries; attack rows of training")
    if Knowledge.LABELS in threat.needs:
        raise NoCeilingError("no ceiling: the attack is told the labels that it is scored by")
    if told := threat.knowledge_kinds:
        raise NoCeilingError(f"no ceiling: its guesser is not told {', '.join(map(str, told))}")


def _tell_of_each_other(cell: CellSettings, targets: Sequence[Target]) -> bool:
    """Whether later attacked messages may tell of a row in an earlier one, by what it trained."""
    if cell.attack.when != "training":
        return False
    if find_protocol(cell.training.protocol.name).exchanges == "weights":
        return len({each.round for each in targets}) > 1
    return len({(each.node, each.round, each.step) for each in targets}) > 1


def _spread_over(targets: Sequence[Target]) -> int | None:
    """Return how many attacked rows of training the ceiling's are spread over, if of several steps.

    A bottom learns from step to step, so later rows are named more often than the first, or less.
    An earlier version took the first alone; corrected 2026-11-29.
    """
    steps = {each.step for each in targets if each.phase == Phase.TRAIN}
    return len(targets) if len(steps) > 1 else None


def _bound(found: RunCeiling, scores: Mapping[str, Any], *, several: bool) -> Bound:
    """Hold a card's hits against a ceiling; of batches a message counts by its share of hits."""
    alone = "; one message of each row, where later ones may tell of it too"
    shares = [float(value) for value in scores["identification"]["values"]]
    hits, first = floor(sum(shares) + 1e-9), found.messages[0]
    caps = [each.cap for each in found.messages if each.cap is not None]
    return Bound(
        ceiling=found.value,
        error=found.error,
        messages=len(found.messages),
        guesses=first.guesses,
        candidates=first.candidates,
        chance=fmean(each.chance for each in found.messages),
        cap=fmean(caps) if len(caps) == len(found.messages) else None,
        norm=found.norm,
        seat=found.seat,
        round=first.round,
        used_before=sum(each.used_before for each in found.messages),
        told=found.told + alone * several,
        hits=hits,
        targets=len(shares),
        p=above(hits, len(shares), ceiling=found.value, error=found.error),
        doubts=tuple(f"recorded noise, {each}" for each in found.findings if not each.sound),
    )
