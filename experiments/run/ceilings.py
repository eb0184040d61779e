"""The informed ceiling of a recorded run, and the check of its noise.

A run's folder holds the trace, and the answer key with how nodes trained and with which defences.
From them the messages of every candidate are made again: a forward pass for a smashed row, local
training for an update. Bottoms before a training message are stepped again with the recorded cut
gradients, so their whole past must be in the trace.

A row leaves more on the wire than one message. With ``span = "training"`` the guesser reads all of
it: every update of a round in which the row was used, or every smashed batch from the row's first
on, of all nodes, since the row has moved the bottoms that made them; and those bottoms themselves,
where they pass the server in the clear.
"""

from __future__ import annotations

from collections.abc import Collection, Iterable, Sequence
from dataclasses import replace
from itertools import accumulate
from math import sqrt
from pathlib import Path
from statistics import fmean
from typing import Any

import torch
from jaxtyping import Float, Int
from torch import Tensor
from torch.nn.functional import one_hot

from experiments.run.candidate_messages import CandidateMessages, Part
from experiments.run.ceiling_results import Message, RunCeiling
from experiments.run.recorded import Recorded
from experiments.run.replay import following
from experiments.run.targets import Evidences, pick_targets
from leakbed.contracts import Evidence, Protects, Seat, ThreatModel
from leakbed.contracts.noise_laws import (
    Channel,
    Clean,
    NoCeilingError,
    of_answers,
)
from leakbed.events import Phase, Target
from leakbed.lookup import unknown_name
from leakbed.oracle.caps import budget_cap, budget_of, cap
from leakbed.oracle.ceiling import beliefs, ceiling, label_ceiling
from leakbed.oracle.gathered import Gathered
from leakbed.oracle.noise_checks import Finding, check_hits, check_noise
from leakbed.seeds import derive, generator

SPANS = ("message", "round", "training")
_SMASHED = ThreatModel(seat=Seat.SERVER, evidence=frozenset({Evidence.SMASHED}))
_UPDATE = ThreatModel(seat=Seat.SERVER, evidence=frozenset({Evidence.UPDATE}))


def ceiling_of_run(
    run: Path,
    *,
    collect: str | int = "last",
    when: str = "training",
    targets: int = 8,
    candidates: int = 1000,
    draws: int = 4,
    seed: int = 0,
    span: str = "message",
    model: str | None = None,
    labels: bool = False,
    summed: bool = False,
    among: int | None = None,
) -> RunCeiling:
    """Return the ceilings of a recorded run's attacked messages.

    Args:
        run: Its folder, with ``trace`` and ``answers``.
        collect: The round: ``"first"``, ``"middle"``, ``"last"`` or its number.
        when: Of smashed rows: ``"training"`` or ``"inference"``.
        targets: How many messages at most.
        candidates: Among how many rows, or all there are.
        draws: Of the noise, for each candidate.
        seed: Of those draws.
        span: What the guesser reads: the ``"message"`` alone; of a smashed row also the node's
            later ones of the ``"round"``, and the bottom that ends it where that is relayed; or all
            that the row left on the wire in the whole ``"training"``, from its first use on,
            whichever message was picked.
        model: The import path of the network, where the trace names one: permits to import it.
        labels: Whether the guesser is told the row's label where no message tells it: of updates,
            and of test rows. Of a U-shape's test rows it always is: heads say how many are right.
        summed: Whether the server is given the sum of the round's updates alone, weighted by their
            numbers of samples, as under secure aggregation. A recorded loss is still read.
        among: How many messages of the round were attacked, all over which ``targets`` are spread;
            None takes the first.

    Returns:
        They, and what the check of the recorded noise found.

    Raises:
        NoCeilingError: If something is missing without which no number is a bound.
    """
    if candidates < 2 or draws < 1 or targets < 1:  # noqa: PLR2004
        raise NoCeilingError(
            f"got {candidates} candidates, {draws} draws and {targets} messages; give 2, 1 and 1 "
            "at least"
        )
    if span not in SPANS:
        raise NoCeilingError(unknown_name("span", span, SPANS))
    torch.set_num_threads(1)
    recorded = Recorded.open(run, model=model)
    evidences = Evidences.of(recorded.trace, collect)
    threat = _UPDATE if evidences.updates else _SMASHED
    if summed and not evidences.updates:
        raise NoCeilingError(
            "no ceiling: nodes of this run send smashed rows, which nothing sums; a sum is of "
            "updates, as FedAvg's"
        )
    _refuse_span(span, updates=bool(evidences.updates), when=when, summed=summed)
    attacked = pick_targets(evidences, threat, when=when, count=max(targets, among or 0))
    count = min(targets, len(attacked))
    chosen = [attacked[(2 * at + 1) * len(attacked) // (2 * count)] for at in range(count)]
    # Heads report how many test rows are right. Who knows the features and all other rows is told
    # by it whether the row has the predicted label; an earlier version left that out (2026-11-29).
    labels |= when == "inference" and recorded.architecture.upper_cut is not None
    game = _Game(
        recorded,
        evidences,
        chosen,
        candidates=candidates,
        draws=draws,
        seed=seed,
        span=span,
        labels=labels,
        summed=summed,
    )
    messages = [game.update(at) if evidences.updates else game.row(at) for at in chosen]
    found = RunCeiling(messages=messages, findings=game.findings(messages), notes=game.notes)
    found = replace(found, span=span)
    if any(each.without_bottoms is not None for each in messages):
        found = replace(found, seat="server together with the fed-server, which reads bottoms")
    if summed:
        found = replace(found, seat="server that is given the sum of all nodes' updates alone")
    return replace(found, told=f"{found.told}, the row's label") if labels else found


def _refuse_span(span: str, *, updates: bool, when: str, summed: bool) -> None:
    """Refuse to read several messages of what leaves one, or of what is summed."""
    if span == "message":
        return
    if summed:
        raise NoCeilingError(
            "no ceiling: sums of several rounds are not read together here; ask for one sum"
        )
    if when == "inference":
        raise NoCeilingError(
            "no ceiling: a test row leaves one message on the wire; ask for span = 'message'"
        )
    if span == "round" and updates:
        raise NoCeilingError(
            "no ceiling: an update is all that a node sends in a round; ask for span = 'training'"
        )


class _Game:
    def __init__(
        self,
        recorded: Recorded,
        evidences: Evidences,
        targets: Sequence[Target],
        *,
        candidates: int,
        draws: int,
        seed: int,
        span: str,
        labels: bool,
        summed: bool,
    ) -> None:
        self._span, self._told, self._summed = span, labels, summed
        self._run = recorded
        self._made = CandidateMessages(recorded, evidences, told=labels, summed=summed)
        self.notes = _answered(recorded)
        self._count, self._draws, self._seed = candidates, draws, seed
        self._targets = targets
        known = [replace(targets[0], node=e.node) for e in evidences.updates] if summed else targets
        self._attacked = {row for target in known for row in self._made.rows_behind(target)}
        self._residuals: list[Tensor] = []
        self._checked: set[tuple[Any, ...]] = set()

    def update(self, target: Target) -> Message:
        """Return the ceiling of one update, for one of the rows behind it, or of all it is in."""
        key = self._run.key
        behind, places = self._made.rows_behind(target), [target]
        row = self._row_of(target)
        if self._span == "training":
            places = self._made.uses(target, row)
            target, behind = places[0], self._made.rows_behind(places[0])
        place = behind.index(row)
        guesses = len(self._attacked) if self._summed else len(behind)
        known = {each for at in places for each in self._made.rows_behind(at)}
        chosen = self._candidates(row, len(key.images), guesses=guesses, known=known)
        told = key.labels[chosen] if self._told else None
        prior = self._run.prior_of(target.node, chosen)
        parts = (self._made.update(at, row, chosen) for at in places)
        if self._span == "training":
            return self._path(parts, guesses=guesses, place=place, labels=told, prior=prior)
        return self._message(next(parts), guesses=guesses, place=place, labels=told, prior=prior)

    def _row_of(self, target: Target) -> int:
        """Return a row behind an update; those of all updates are of steps all over the round.

        Rows of one step are alike, those of several are not: with momentum the first steps' rows
        move the weights most, and a smaller last batch's more than others. An earlier version took
        rows of the first step alone, as soon as there were fewer nodes than rows in it; corrected
        2026-11-29.
        """
        batches = self._made.batches(target)
        ends = list(accumulate(map(len, batches)))
        random = generator(derive(self._run.key.seed or 0, f"ceiling/{target.node}/{target.round}"))
        within = self._targets.index(target) + float(torch.rand((), generator=random))
        slot = within * ends[-1] / len(self._targets)
        step = next(at for at, end in enumerate(ends) if slot < end)
        return batches[step][target.node % len(batches[step])]

    def row(self, target: Target) -> Message:
        """Return the ceiling of one smashed row, and of what it moved behind it."""
        key = self._run.key
        testing = target.phase == Phase.EVALUATE
        labels = key.test_labels if testing else key.labels
        (own,) = self._made.rows_behind(target)
        if self._span != "message":
            return self._from(target, own)
        chosen = self._candidates(own, len(labels), guesses=1)
        blind = testing and not self._told
        return self._message(
            self._made.row(target, chosen),
            guesses=1,
            place=int(target.row or 0),
            labels=None if blind else labels[chosen],
            pool=labels[chosen] if blind else None,
            prior=None if testing else self._run.prior_of(target.node, chosen),
        )

    def _from(self, target: Target, own: int) -> Message:
        key = self._run.key
        holding = {at: batch for at, batch in key.order.items() if own in batch}
        if self._span == "training":
            node, round_, step = min(holding, key=lambda at: at[1:])
            place = list(map(int, holding[node, round_, step])).index(own)
            target = replace(target, node=node, round=round_, step=step, row=place)
        known = {int(row) for batch in holding.values() for row in batch}
        chosen = self._candidates(own, len(key.images), guesses=1, known=known)
        sent = following(self._run, target, chosen, whole=self._span == "training")
        parts = (self._made.batch(target, each, chosen) for each in sent)
        prior, labels = self._run.prior_of(target.node, chosen), key.labels[chosen]
        place = int(target.row or 0)
        return self._path(parts, guesses=1, place=place, labels=labels, prior=prior)

    def _path(
        self,
        parts: Iterable[Part],
        *,
        guesses: int,
        place: int,
        labels: Tensor | None,
        prior: Tensor | None,
    ) -> Message:
        """Return the ceiling of several messages together, beside that of the first alone."""
        gathered, read = Gathered(), list[Part]()
        alone: float | None = None
        for part in parts:
            if alone is None:
                stream = derive(self._seed, f"alone/{part.target}")
                first = ceiling(
                    part.messages,
                    guesses=(guesses,),
                    draws=self._draws,
                    stream=stream,
                    prior=prior,
                )
                alone = first[guesses].value
            residual = gathered.add(part.messages, part.seen[0], apart=part.of_bottom)
            self._keep_residual(part, residual)
            read.append(replace(part, messages=part.messages.picked(torch.tensor([0]))))
        clear = torch.cat([part.clear for part in read], 1)

        def together(*, apart: bool) -> Message:
            messages, seen = gathered.together(apart=apart)
            whole = replace(read[0], messages=messages, seen=seen, clear=clear)
            return self._message(whole, guesses=guesses, place=place, labels=labels, prior=prior)

        found, without = together(apart=True), None
        if any(part.of_bottom for part in read):
            without = together(apart=False).ceiling
        used = self._span == "round" and found.used_before  # else it is the row's first use
        found = replace(found, alone=alone, read=gathered.count, norm=None, used_before=used)
        return replace(found, without_bottoms=without)

    def findings(self, messages: Sequence[Message]) -> list[Finding]:
        """Return what the check of the recorded noise found."""
        found = check_noise(self._residuals) if self._residuals else []
        apart = messages[:1] if self._summed else messages  # those of noise of their own
        hits = check_hits([each.hit for each in apart], [each.single for each in apart])
        if capped := [each for each in messages if each.cap is not None]:
            over = fmean(each.ceiling - float(each.cap or 0) for each in capped)
            error = max(sqrt(sum(each.error**2 for each in capped)) / len(capped), 1e-6)
            found.append(
                Finding(check="ceiling under the claim's cap", z=max(0.0, over / error), limit=3.0)
            )
        if self._made.losses and any(each.claiming for each in self._run.defenses):
            self.notes.append(
                "A loss travels beside the update in the clear, and a defence that claims "
                "differential privacy does not cover it."
            )
        return [*found, hits]

    def _message(
        self,
        part: Part,
        *,
        guesses: int,
        place: int,
        labels: Tensor | None = None,
        pool: Tensor | None = None,
        prior: Tensor | None = None,
    ) -> Message:
        """Return the numbers of one message; the truth is candidate 0.

        ``labels`` of candidates are those in the clear, ``pool`` those that no message tells;
        without a ``prior`` candidates are equally likely.
        """
        target, messages = part.target, part.messages
        stream = derive(self._seed, f"ceiling/{target}")
        slow = not messages.equal_noise and messages.family != "fixed"
        truths = torch.arange(min(len(messages), 50)) if slow else None
        found = ceiling(
            messages,
            guesses=sorted({1, guesses}),
            draws=self._draws,
            stream=stream,
            prior=prior,
            truths=truths,
        )
        told = None
        if pool is not None:
            of = one_hot(pool).double()
            told, _ = label_ceiling(
                messages, of, draws=self._draws, stream=derive(stream, "label"), truths=truths
            )
        believed = beliefs(messages, part.seen, clear=part.clear, prior=prior)[0]
        if self._span == "message" and messages.family == "normal":
            scale = messages.scales[0].repeat_interleave(torch.tensor(messages.sizes))
            apart = part.seen[0].double() - messages.means[0].double()
            self._keep_residual(part, apart / scale)
        mu, best = messages.mu, found[guesses]
        return Message(
            node=target.node,
            round=target.round,
            step=target.step,
            row=place,
            phase=str(target.phase),
            guesses=guesses,
            candidates=len(messages),
            ceiling=best.value,
            error=best.error,
            single=found[1].value,
            named=float(best.records[0]),
            believed=float(believed[0]),
            hit=_hit(believed),
            chance=best.chance if prior is None else _blind(prior, guesses),
            norm=None if target.row is None else _norm(messages.means),
            cap=None if mu is None else _cap(mu, guesses, labels, prior=prior, count=len(messages)),
            label=told,
            floor=part.floor,
            used_before=self._used_before(target),
        )

    def _keep_residual(self, part: Part, residual: Tensor) -> None:
        node = None if self._summed else part.target.node  # one sum, whoever's row is attacked
        seen = tuple(part.seen[0, :8].tolist())
        place = part.target.phase, node, part.target.round, part.target.step, seen
        if part.messages.family != "normal" or place in self._checked:
            return  # a whole batch is one message, whichever of its rows is attacked
        self._checked.add(place)
        self._residuals.append(residual)

    def _candidates(
        self, own: int, pool: int, *, guesses: int, known: Collection[int] = ()
    ) -> Int[Tensor, " candidates"]:
        """Return the truth and others that are in no attacked message, in a drawn order."""
        order = torch.randperm(pool, generator=generator(derive(0, "candidates")))
        behind = torch.tensor(sorted({*self._attacked, *known}))
        others = order[~torch.isin(order, behind)][: self._count - 1]
        if len(others) + 1 < 2 * guesses:
            raise NoCeilingError(
                f"only {len(others) + 1} rows of {pool} are in no attacked message, for lists of "
                f"{guesses}; a pool hardly larger than a list says nothing: use more data or fewer "
                "messages"
            )
        return torch.cat([torch.tensor([own]), others])

    def _used_before(self, target: Target) -> bool:
        if target.phase == Phase.EVALUATE:
            return False
        rows, now = {*self._made.rows_behind(target)}, (target.round, target.step)
        return any(
            (round_, step) < now and not rows.isdisjoint(batch)
            for (_, round_, step), batch in self._run.key.order.items()
        )


def _answered(run: Recorded) -> list[str]:
    """Say what training labels that are answered at random tell by themselves."""
    key, said = run.key, []
    for defense in run.defenses:
        if Protects.LABELS not in defense.protects:
            continue
        law = defense.law(Clean(kind=Protects.LABELS, arrays={}, classes=key.num_classes))
        if isinstance(law, Channel):
            counts = torch.bincount(key.labels, minlength=key.num_classes).double()
            shares, epsilon = counts / counts.sum(), budget_of(law)
            found = of_answers(law, shares)
            allowed = budget_cap(epsilon, 0.0, chance=float(shares.max()))
            said.append(
                f"A training label as {defense.name} answers it is guessed right at most "
                f"{found:.3f} of the time, if it was drawn from the classes' shares whatever the "
                f"picture; epsilon {epsilon:.3g} alone allows {allowed:.3f}. That bounds no seat "
                "that holds the inputs."
            )
    return said


def _norm(rows: Float[Tensor, " candidates entries"]) -> float:
    return float(torch.linalg.vector_norm(rows, dim=1).mean())


def _hit(believed: Float[Tensor, " candidates"]) -> float:
    """Return whether the truth, candidate 0, is the likeliest; among k equals 1 of k."""
    likeliest = believed == believed.max()
    return float(likeliest[0]) / int(likeliest.sum())


def _cap(
    mu: float, guesses: int, labels: Tensor | None, *, prior: Tensor | None, count: int
) -> float:
    """Return what a claim allows; labels in the clear leave the candidates of each label alone."""
    likely = torch.full((count,), 1 / count) if prior is None else prior
    groups = [likely] if labels is None else [likely[labels == each] for each in labels.unique()]
    return sum(
        float(each.sum()) * cap(mu, chance=_blind(each / each.sum(), guesses))
        for each in groups
        if each.sum() > 0
    )


def _blind(prior: Tensor, guesses: int) -> float:
    """Return how often a list is right that reads no message."""
    return min(1.0, float(prior.sort(descending=True).values[:guesses].sum()))
