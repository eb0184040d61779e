"""The ceiling of a label under a recorded run's messages: three games, never mixed.

**Canary**, computed here: the row's label was drawn from the classes' shares whatever its image
(``data.canaries``), and a party without labels must name it. It knows whatever made the gradient
before the message, every row at that cut, all other labels and every seed but those of noise and of
the draw. Exact, and the one game that scores of attacks can be held against: those of the canary
rows alone. Who reads is the party that labels are hidden from: the client, or a party of features,
that is sent cut gradients; of a U-shape the server that is sent gradients of features; of FedAvg
the server that is sent updates. Labels that were answered at random are guessed through the
answers.

**Pool**: someone without inputs has labelled candidates, one of which sent the smashed row; it is
:func:`leakbed.oracle.ceiling.label_ceiling`, of test rows, beside the ceiling of rows.

**With inputs**: a party holds the pictures of rows with their natural labels. There is no ceiling,
since the picture itself says the label; but a message of mu-Gaussian DP raises the accuracy kappa
of the best classifier that reads no message to :func:`~leakbed.oracle.caps.cap` of it at most.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass, replace
from functools import cached_property
from itertools import islice
from pathlib import Path
from statistics import fmean
from typing import Any

import torch
from jaxtyping import Float, Int
from torch import Tensor

from experiments.run.candidate_messages import CandidateMessages
from experiments.run.ceiling_results import pooled_error
from experiments.run.label_holders import (
    Batch,
    Holder,
    Step,
    begun,
    reached,
    refuse_unknown_holder,
    rows_of,
)
from experiments.run.recorded import Recorded
from experiments.run.targets import Evidences
from experiments.settings.plugins import round_number
from leakbed.contracts import Defense, Protects, select
from leakbed.contracts.noise_laws import Channel, Clean, Fixed, Law, NoCeilingError, sent_law
from leakbed.events import Phase, Target
from leakbed.oracle.caps import budget_cap, budget_of, cap, class_cap
from leakbed.oracle.ceiling import beliefs, label_ceiling
from leakbed.oracle.gathered import Gathered
from leakbed.oracle.messages import Messages
from leakbed.oracle.noise_checks import Finding, check_hits, check_noise
from leakbed.oracle.truth import AnswerKey
from leakbed.plugins import is_own
from leakbed.seeds import derive
from strategies import find_protocol

_KIND = Protects.CUT_GRADIENT


@dataclass(frozen=True, kw_only=True)
class LabelMessage:
    """The ceiling of one canary's label.

    Attributes:
        node: Partition id.
        round: Server round of the row's first batch.
        step: That batch's.
        row: Within it.
        ceiling: By all messages that are read.
        error: Standard error of the draws.
        alone: By the gradient of the row's own batch alone, or by the first update alone.
        believed: Posterior of the true label, given what was recorded.
        hit: 1 where the likeliest label is the true one, 1 of k among equals.
        cap: What the defences' claims allow that one message; None without a claim of it.
        inputs: What it allows a party that holds the inputs and is right kappa of the time without
            any message; None where kappa was not given, or without a claim.
        read: How many messages are read.
    """

    node: int
    round: int
    step: int
    row: int
    ceiling: float
    error: float
    alone: float
    believed: float
    hit: float
    cap: float | None
    inputs: float | None
    read: int


@dataclass(frozen=True, kw_only=True)
class LabelCeiling:
    """The ceilings of a run's canary labels.

    Attributes:
        messages: One for each canary.
        chance: Of a guess that reads nothing: the largest class's share.
        classes: Among how many labels.
        kappa: As it was given.
        findings: Of the check of the messages' noise; without normal noise of hits alone.
        message: What is read first.
        seat: Who reads it.
        told: What the informed guesser is told beside the protocol.
    """

    messages: Sequence[LabelMessage]
    chance: float
    classes: int
    kappa: float | None
    findings: Sequence[Finding]
    message: str
    seat: str
    told: str

    @property
    def value(self) -> float:
        """The mean over canaries."""
        return fmean(each.ceiling for each in self.messages)

    @property
    def error(self) -> float:
        """Its standard error: of the spread over canaries, and of the draws."""
        return pooled_error([(each.ceiling, each.error) for each in self.messages])

    @property
    def cap(self) -> float | None:
        """The mean of the caps; None unless every message has one."""
        caps = [each.cap for each in self.messages if each.cap is not None]
        return fmean(caps) if len(caps) == len(self.messages) else None

    def table(self) -> dict[str, Any]:
        """Return it as JSON has it."""
        return {
            "game": "canary",
            "ceiling": self.value,
            "error": self.error,
            "chance": self.chance,
            "classes": self.classes,
            "kappa": self.kappa,
            "seat": self.seat,
            "told": self.told,
            "messages": [asdict(each) for each in self.messages],
            "checks": [{**asdict(each), "sound": each.sound} for each in self.findings],
        }

    def lines(self) -> list[str]:
        """Return it as text."""
        alone, read = fmean(each.alone for each in self.messages), self.messages[0].read
        lines = [
            f"Ceiling {self.value:.3f} (s.e. {self.error:.3f}) of a canary's label, over "
            f"{len(self.messages)} canaries and {self.classes} classes; chance {self.chance:.3f}.",
            f"Seat: {self.seat}. Round {self.messages[0].round}. Told: {self.told}.",
            "It bounds labels that were drawn whatever the picture, and no natural ones.",
        ]
        if read > 1:
            lines.append(f"Of {self.message} alone, and none behind it: {alone:.3f}.")
        if self.cap is not None:
            lines.append(f"The defences' claims cap {self.message} at {self.cap:.3f}.")
        if self.kappa is not None:
            inputs = [each.inputs for each in self.messages if each.inputs is not None]
            lines.append(
                f"With the inputs, and {self.kappa:.3f} right without any message, "
                f"{self.message} leaves at most {fmean(inputs):.3f} right."
                if inputs
                else f"With the inputs there is no bound: no claim covers {self.message}."
            )
        return lines + [f"Check of {each}." for each in self.findings]


def label_ceiling_of_run(
    run: Path,
    *,
    collect: str | int = "last",
    span: str = "training",
    targets: int = 8,
    draws: int = 100,
    kappa: float | None = None,
    model: str | None = None,
    party: int | None = None,
) -> LabelCeiling:
    """Return the ceilings of a recorded run's canary labels.

    Args:
        run: Its folder, with ``trace`` and ``answers``.
        collect: The last round that is read: ``"first"``, ``"middle"``, ``"last"`` or its number.
        span: ``"message"`` for the gradient of the row's own first batch, ``"training"`` for it and
            all that follow to the end of that round, which a part sent that the label had moved; of
            FedAvg for the first update that the row was in, or all of them to that round.
        targets: How many canaries at most.
        draws: Of the noise, for each label.
        kappa: For a party with the inputs: how often the best classifier that reads no message is
            right. A trained classifier gives a lower limit of it alone.
        model: As for :func:`~experiments.run.ceilings.ceiling_of_run`.
        party: Where nodes hold strips of the same rows: whose gradients are read; None deals
            canaries out among them.

    Returns:
        They, and what the check of the recorded noise found.

    Raises:
        NoCeilingError: If something is missing without which no number is a bound.
    """
    if span not in {"message", "training"}:
        raise NoCeilingError(f"span is {span!r}; of labels it is 'message' or 'training'")
    if kappa is not None and not 0 < kappa <= 1:
        raise NoCeilingError(f"kappa is {kappa}; give a share above 0 and at most 1")
    torch.set_num_threads(1)
    recorded = Recorded.open(run, model=model)
    _refuse(recorded, span=span)
    until = round_number(collect, last=int(recorded.trace.about["rounds"]))
    game = _Game(recorded, draws=draws, kappa=kappa)
    one = span == "message"
    if _sends_updates(recorded):
        messages = game.of_updates(until=until, one=one, most=targets)
    else:
        places = _first_uses(recorded, until=until, party=party)[:targets]
        messages = [game.of_gradients(at, until=until, one=one) for at in places]
    message, seat, told = _who(recorded)
    return LabelCeiling(
        messages=messages,
        chance=float(game.prior.max()),
        classes=len(game.prior),
        kappa=kappa,
        findings=game.findings(messages),
        message=message,
        seat=seat,
        told=f"{told}, all other labels, all seeds but those of the noise and of the canaries",
    )


def canary_targets(run: Path, targets: Sequence[Target]) -> list[bool]:
    """Say which targets are rows whose label was drawn whatever the image.

    Args:
        run: The folder of a recorded run.
        targets: Smashed rows of training.

    Returns:
        One for each target.
    """
    key = AnswerKey.read(run / "answers")
    canaries = set(key.canaries)
    return [
        target.row is not None
        and target.phase == Phase.TRAIN
        and int(key.order[target.node, target.round, target.step][target.row]) in canaries
        for target in targets
    ]


def recorded_gradients(run: Recorded, *, most: int) -> Iterator[Float[Tensor, " entries"]]:
    """Yield how far recorded gradients at the cut are from those of the true labels.

    Args:
        run: The recorded run.
        most: How many steps of the first round at most.

    Yields:
        In units of the noise, where that is normal. If the part that sent them is not trained again
        here, or not in the trace, that is a
        :class:`~leakbed.contracts.noise_laws.NoCeilingError`.
    """
    if not select(run.defenses, Protects.CUT_GRADIENT):
        return
    refuse_unknown_holder(run)
    game = _Game(run, draws=1, kappa=None)
    holder, steps = begun(run, 1, until=1)
    for step in islice(steps, most):
        yield from game.residuals(step, holder)


def refuse_no_game(
    *, protocol: str, labels: str, bottoms: str, defenses: Sequence[Defense], classes: int
) -> None:
    """Refuse canaries where nobody must guess a label, or the best guess is not known here.

    Args:
        protocol: Its catalogue key or import path.
        labels: Who holds the labels.
        bottoms: Whether nodes' parts pass the server ``"sealed"`` or ``"relayed"``.
        defenses: Of the run.
        classes: Labels are 0 to ``classes - 1``.

    Raises:
        NoCeilingError: If it is so.
    """
    if is_own(protocol):
        raise NoCeilingError(
            f"no ceiling of labels: how parts of {protocol!r} learn from labels is not repeated "
            "here; use a protocol of the catalogue"
        )
    whole = find_protocol(protocol).exchanges == "weights"
    if labels == "shared" and not whole:
        raise NoCeilingError(
            "no ceiling of labels: with labels = 'shared' both sides have them, so nobody must "
            "guess; set labels = 'server', or use 'u-shaped' or 'fedavg'"
        )
    if find_protocol(protocol).parts == 3 and bottoms == "relayed":  # noqa: PLR2004
        raise NoCeilingError(
            "no ceiling of labels: with bottoms = 'relayed' heads pass the server in the clear, "
            "and what their weights tell of a label is not read here; set bottoms = 'sealed'"
        )
    if whole and (found := select(defenses, Protects.TRAINING)):
        raise NoCeilingError(
            f"no ceiling of labels: {found[0].name} changes the steps behind an update, which are "
            "not repeated here"
        )
    if labels == "client" and (found := select(defenses, Protects.TRAINING)):
        raise NoCeilingError(
            f"no ceiling of labels: {found[0].name} is handed labels at the node that holds them, "
            "and what its steps, or its stop, tell of them is not read here"
        )
    answers_of(defenses, classes=classes)


def answers_of(
    defenses: Sequence[Defense], *, classes: int
) -> Float[Tensor, " classes classes"] | None:
    """Return how labels are answered at random by the time they are trained with.

    Args:
        defenses: Of the run.
        classes: Labels are 0 to ``classes - 1``.

    Returns:
        Probability of each answer (second axis), given the label; None where labels stay.

    Raises:
        NoCeilingError: If a defence of labels does not say how it answers.
    """
    answers: Tensor | None = None
    for defense in select(defenses, Protects.LABELS):
        law = defense.law(Clean(kind=Protects.LABELS, arrays={}, classes=classes))
        if not isinstance(law, Channel):
            raise NoCeilingError(
                f"no ceiling of labels: {defense.name} states no chances of its answers that hold "
                "whatever the labels; where it counts its prior from them, give it a prior"
            )
        own = law.answers.double()
        answers = own if answers is None else answers @ own
    return answers


def _sends_updates(run: Recorded) -> bool:
    return find_protocol(str(run.trace.about["protocol"])).exchanges == "weights"


def _who(run: Recorded) -> tuple[str, str, str]:
    """Return what is read, who reads it, and what that one is told of the network and the rows."""
    if _sends_updates(run):
        return "the first update", "server", "the weights before each update, all rows"
    if run.architecture.upper_cut is not None:
        told = "the head before the message, all features, how many test rows heads count as right"
        return "the own batch's gradient", "server", told
    seat = "party that is sent them" if run.key.parties > 1 else "client"
    return "the own batch's gradient", seat, "the top before the message, every smashed row"


def _refuse(run: Recorded, *, span: str) -> None:
    """Refuse runs without canaries, and those of which the best guess is not known here."""
    if not run.key.canaries:
        raise NoCeilingError(
            "no ceiling of labels: no label of this run was drawn whatever its picture, so the "
            "picture says it; set data.canaries"
        )
    refuse_no_game(
        protocol=str(run.trace.about["protocol"]),
        labels=run.plan.labels,
        bottoms=run.plan.bottoms,
        defenses=run.defenses,
        classes=run.key.num_classes,
    )
    if span == "training" and run.key.parties > 1:
        raise NoCeilingError(
            "no ceiling over several gradients: the other parties' next rows follow gradients that "
            "tell the same label and are not sent to this party; ask for span = 'message'"
        )
    if span == "training" and (private := select(run.defenses, Protects.TOP)):
        raise NoCeilingError(
            f"no ceiling over several gradients: {private[0].name} noises the top's weights, and a "
            "later gradient is a function of noised weights whose density is not known; ask for "
            "span = 'message'"
        )


def _first_uses(run: Recorded, *, until: int, party: int | None = None) -> list[Target]:
    """Return the first batch of each canary, in the order of rounds, steps and nodes."""
    found: dict[int, Target] = {}
    canaries = set(run.key.canaries)
    for (node, round_, step), batch in sorted(run.key.order.items(), key=lambda at: at[0][1:]):
        for place, row in enumerate(map(int, batch)):
            if row in canaries and round_ <= until:
                target = Target(node=node, round=round_, step=step, row=place, phase=Phase.TRAIN)
                found.setdefault(row, target)
    if not found:
        raise NoCeilingError(
            f"none of {len(canaries)} canaries was in a batch up to round {until}; set more of them"
        )
    if (parties := run.key.parties) > 1:
        dealt = enumerate(found.values())
        return [replace(e, node=at % parties if party is None else party) for at, e in dealt]
    return list(found.values())


class _Game:
    def __init__(self, run: Recorded, *, draws: int, kappa: float | None) -> None:
        self._run, self._draws, self._kappa = run, draws, kappa
        classes = run.key.num_classes
        shares = torch.bincount(run.key.labels, minlength=classes).double()
        self.prior: Float[Tensor, " classes"] = shares / shares.sum()
        self._labels = run.trained_labels()
        self._residuals: dict[tuple[int, int, int], Tensor] = {}

    @cached_property
    def _channel(self) -> Channel | None:
        answers = answers_of(self._run.defenses, classes=self._run.key.num_classes)
        return None if answers is None else Channel(answers=answers)

    @cached_property
    def _joint(self) -> Float[Tensor, "labels answers"]:
        answers = torch.eye(len(self.prior)) if self._channel is None else self._channel.answers
        return self.prior.unsqueeze(1) * answers

    @property
    def _shares(self) -> Float[Tensor, " answers"]:
        return self._joint.sum(0)  # of what is trained with

    @property
    def _behind(self) -> Float[Tensor, "answers labels"]:
        return (self._joint / self._shares).T  # of an answer that is never given no number

    def of_gradients(self, target: Target, *, until: int, one: bool) -> LabelMessage:
        """Return the ceiling of one canary's label by its batch's gradient, or all from it on."""
        at = target.node, target.round, target.step
        batch_rows = list(map(int, self._run.key.order[at]))
        row = batch_rows[int(target.row or 0)]
        answers = self._answers(row)
        honest, steps = reached(self._run, at, until=until)
        holders = [honest.apart() for _ in answers]
        gathered, first = Gathered(), list[Messages]()
        for step in steps:
            for batch, messages in self._messages(step, row, answers, holders):
                if batch.place == at:
                    first.append(messages.of_copies(batch_rows.count(row)))
                if batch.place == at or not one:
                    gathered.add(messages, batch.gradient.flatten())
            if one:
                break
        if self._run.architecture.upper_cut is not None and not one:
            counts = torch.tensor([holder.right(until) for holder in holders]).float()
            if counts.numel():
                gathered.add(Messages.of_rows(Fixed(mean={"right": counts})), counts[0])
        clear = torch.zeros(1, 0, dtype=torch.float64)
        return self._message(target, row, answers, first[0], gathered, clear=clear)

    def of_updates(self, *, until: int, one: bool, most: int) -> list[LabelMessage]:
        """Return the ceilings of canaries' labels by the updates that they were in."""
        found: list[LabelMessage] = []
        for place in _first_uses(self._run, until=until):
            if len(found) == most:
                break
            row = int(self._run.key.order[place.node, place.round, place.step][int(place.row or 0)])
            answers = self._answers(row)
            made, chosen = self._relabelled(row, answers, round_=until)
            uses = made.uses(replace(place, step=0, row=None), row)
            uses = [at for at in uses if at.round <= until]
            if not uses:
                continue  # its node was not asked in those rounds
            gathered, clear, first = Gathered(), list[Tensor](), list[Messages]()
            for at in uses[:1] if one else uses:
                part = made.update(at, row, chosen)
                residual = gathered.add(part.messages, part.seen[0])
                clear.append(part.clear)
                first.append(part.messages)
                if part.messages.family == "normal":
                    self._residuals.setdefault((at.node, at.round, 0), residual)
            target = replace(uses[0], row=made.rows_behind(uses[0]).index(row))
            whole = torch.cat(clear, 1)
            found.append(self._message(target, row, answers, first[0], gathered, clear=whole))
        if not found:
            raise NoCeilingError("no node that holds a canary was asked; train for more rounds")
        return found

    def findings(self, messages: Sequence[LabelMessage]) -> list[Finding]:
        """Return what the check of the recorded noise found."""
        residuals = list(self._residuals.values())
        found = check_noise(residuals) if residuals else []
        return [*found, check_hits([m.hit for m in messages], [m.ceiling for m in messages])]

    def residuals(self, step: Step, holder: Holder) -> Iterator[Tensor]:
        """Yield how far recorded gradients are from those of the true labels, if that is known."""
        labels = [self._labels[rows_of(self._run, batch)] for batch in step]
        for batch, own, made in zip(step, labels, holder.train(step, labels), strict=True):
            yield from _residual(batch, Messages.of([self._law(made, own)]))

    def _answers(self, row: int) -> Int[Tensor, " answers"]:
        """Return what a row may be trained with, what it was trained with first."""
        true = int(self._labels[row])
        others = (each for each in range(len(self._shares)) if each != true)
        return torch.tensor([true, *(each for each in others if self._shares[each] > 0)])

    def _messages(
        self,
        step: Step,
        row: int,
        answers: Int[Tensor, " answers"],
        holders: Sequence[Holder],
    ) -> list[tuple[Batch, Messages]]:
        """Return the gradients that each answer's part sends; every part takes the step."""
        rows = [rows_of(self._run, batch) for batch in step]
        laws: list[list[Law]] = [[] for _ in step]
        for answer, holder in zip(answers, holders, strict=True):
            labels = [torch.where(own == row, answer, self._labels[own]) for own in rows]
            made = holder.train(step, labels)
            for place, (gradient, own) in enumerate(zip(made, labels, strict=True)):
                laws[place].append(self._law(gradient, own))
        sent = [(batch, Messages.of(own)) for batch, own in zip(step, laws, strict=True)]
        for batch, messages in sent:
            for residual in _residual(batch, messages):
                self._residuals.setdefault(batch.place, residual)
        return sent

    def _law(self, made: Tensor, labels: Int[Tensor, " rows"]) -> Law:
        classes = self._run.key.num_classes
        clean = Clean(kind=_KIND, arrays={_KIND: made}, labels=labels, classes=classes)
        return sent_law(self._run.defenses, clean)

    def _relabelled(
        self, row: int, answers: Int[Tensor, " answers"], *, round_: int
    ) -> tuple[CandidateMessages, Int[Tensor, " answers"]]:
        """Return updates in which a row may be exchanged for itself under another label."""
        run, key = self._run, self._run.key
        images = torch.cat([key.images, key.images[[row] * len(answers)]])
        labels = torch.cat([key.labels, answers])
        shown = replace(run, key=replace(key, images=images, labels=labels))
        made = CandidateMessages(shown, Evidences.of(run.trace, round_), told=False, summed=False)
        return made, torch.arange(len(key.labels), len(labels))

    def _message(
        self,
        target: Target,
        row: int,
        answers: Int[Tensor, " answers"],
        first: Messages,
        gathered: Gathered,
        *,
        clear: Float[Tensor, " 1 columns"],
    ) -> LabelMessage:
        """Return the numbers of one canary, whose first message is the first that was gathered."""
        prior, behind = self._shares[answers], self._behind[answers]
        stream = derive(0, f"canary/{target}")
        alone, error = label_ceiling(first, behind, draws=self._draws, stream=stream, prior=prior)
        messages, seen = gathered.together()
        value = alone
        if gathered.count > 1:
            whole = derive(stream, "whole")
            value, error = label_ceiling(
                messages, behind, draws=self._draws, stream=whole, prior=prior
            )
        believed = beliefs(messages, seen, clear=clear, prior=prior)[0] @ behind
        likeliest = believed == believed.max()
        true = int(self._run.key.labels[row])
        return LabelMessage(
            node=target.node,
            round=target.round,
            step=target.step,
            row=int(target.row or 0),
            ceiling=value,
            error=error,
            alone=alone,
            believed=float(believed[true]),
            hit=float(likeliest[true]) / int(likeliest.sum()),
            cap=self._cap(first.mu, None),
            inputs=None if self._kappa is None else self._cap(first.mu, self._kappa),
            read=gathered.count,
        )

    def _cap(self, mu: float | None, kappa: float | None) -> float | None:
        """Return what claims allow of a message; with kappa, who holds the inputs."""
        chance = float(self.prior.max()) if kappa is None else kappa
        caps = []
        if mu is not None:
            caps.append(class_cap(mu, self.prior) if kappa is None else cap(mu, chance=kappa))
        if self._channel is not None:
            caps.append(budget_cap(budget_of(self._channel), 0.0, chance=chance))
        return min(caps, default=None)


def _residual(batch: Batch, messages: Messages) -> Iterator[Tensor]:
    """Yield how far a recorded gradient is from the first candidate's, where noise is normal."""
    if messages.family == "normal":
        scale = messages.scales[0].repeat_interleave(torch.tensor(messages.sizes))
        yield (batch.gradient.flatten().double() - messages.means[0].double()) / scale
