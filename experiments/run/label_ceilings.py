"""The ceiling of a label under a recorded run's cut gradients: three games, never mixed.

**Canary**, computed here: the row's label was drawn from the classes' shares whatever its image
(``data.canaries``), and a party without labels must name it. It knows the top before the message,
every smashed row, all other labels and every seed but those of noise and of the draw. Exact, and
the one game that scores of attacks can be held against: those of the canary rows alone.

**Pool**: someone without inputs has labelled candidates, one of which sent the smashed row; it is
:func:`leakbed.oracle.ceiling.label_ceiling`, of test rows, beside the ceiling of rows.

**With inputs**: a party holds the pictures of rows with their natural labels. There is no ceiling,
since the picture itself says the label; but a message of mu-Gaussian DP raises the accuracy kappa
of the best classifier that reads no message to :func:`~leakbed.oracle.caps.cap` of it at most.
"""

from __future__ import annotations

import copy
from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass
from itertools import islice
from pathlib import Path
from statistics import fmean
from typing import Any

import torch
from jaxtyping import Float, Int
from torch import Tensor, nn

from experiments.run.ceiling_results import pooled_error
from experiments.run.recorded import Recorded
from experiments.run.replay import refuse_own_protocol
from experiments.run.targets import round_number
from leakbed.contracts import Protects, select
from leakbed.contracts.noise_laws import Clean, Law, NoCeilingError, sent_law
from leakbed.events import CutGradientDown, Phase, SmashedUp, Target
from leakbed.oracle.caps import cap, class_cap
from leakbed.oracle.ceiling import beliefs, ceiling
from leakbed.oracle.gathered import Gathered
from leakbed.oracle.messages import Messages
from leakbed.oracle.noise_checks import Finding, check_hits, check_noise
from leakbed.oracle.truth import AnswerKey
from leakbed.seeds import derive
from leakbed.tensors import load
from strategies import find_protocol
from strategies.server_model import TopTrainer

_KIND = Protects.CUT_GRADIENT


@dataclass(frozen=True, kw_only=True)
class LabelMessage:
    """The ceiling of one canary's label.

    Attributes:
        node: Partition id.
        round: Server round of the row's first batch.
        step: That batch's.
        row: Within it.
        ceiling: By all gradients that are read.
        error: Standard error of the draws.
        alone: By the gradient of the row's own batch alone.
        believed: Posterior of the true label, given what was recorded.
        hit: 1 where the likeliest label is the true one, 1 of k among equals.
        cap: What the defence's claim allows the own batch's gradient; None without a claim of it.
        inputs: What it allows a party that holds the inputs and is right kappa of the time without
            any message; None where kappa was not given, or without a claim.
        read: How many gradients are read.
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
        findings: Of the check of the gradients' noise; empty without normal noise.
        seat: Who reads the gradients.
        told: What the informed guesser is told beside the protocol.
    """

    messages: Sequence[LabelMessage]
    chance: float
    classes: int
    kappa: float | None
    findings: Sequence[Finding]
    seat: str = "client"
    told: str = (
        "the top before the message, every smashed row, all other labels, all seeds but those of "
        "the noise and of the canaries"
    )

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
            lines.append(f"Of the own batch's gradient alone, and none behind it: {alone:.3f}.")
        if self.cap is not None:
            lines.append(f"The defence's claim caps the own batch's gradient at {self.cap:.3f}.")
        if self.kappa is not None:
            inputs = [each.inputs for each in self.messages if each.inputs is not None]
            lines.append(
                f"With the inputs, and {self.kappa:.3f} right without any message, that gradient "
                f"leaves at most {fmean(inputs):.3f} right."
                if inputs
                else "With the inputs there is no bound: no claim covers the gradient."
            )
        return lines + [f"Check of {each}." for each in self.findings]


def label_ceiling_of_run(
    run: Path,
    *,
    collect: str | int = "last",
    span: str = "training",
    targets: int = 8,
    draws: int = 100,
    seed: int = 0,
    kappa: float | None = None,
    model: str | None = None,
) -> LabelCeiling:
    """Return the ceilings of a recorded run's canary labels.

    Args:
        run: Its folder, with ``trace`` and ``answers``.
        collect: The last round that is read: ``"first"``, ``"middle"``, ``"last"`` or its number.
        span: ``"message"`` for the gradient of the row's own first batch, ``"training"`` for it and
            all that follow to the end of that round, which a top sent that the label had moved.
        targets: How many canaries at most.
        draws: Of the noise, for each label.
        seed: Of those draws.
        kappa: For a party with the inputs: how often the best classifier that reads no message is
            right. A trained classifier gives a lower limit of it alone.
        model: As for :func:`~experiments.run.ceilings.ceiling_of_run`.

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
    _refuse(recorded)
    until = round_number(collect, last=int(recorded.trace.about["rounds"]))
    game = _Game(recorded, draws=draws, seed=seed, kappa=kappa)
    places = _first_uses(recorded, until=until)[:targets]
    messages = [game.canary(at, until=until if span == "training" else None) for at in places]
    return LabelCeiling(
        messages=messages,
        chance=float(game.prior.max()),
        classes=len(game.prior),
        kappa=kappa,
        findings=game.findings(messages),
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
    """Yield how far recorded cut gradients are from those of the true labels.

    Args:
        run: The recorded run.
        most: How many of the first round at most.

    Yields:
        In units of the noise, where that is normal. If the top that sent them is not stepped again
        here, or not in the trace, that is a
        :class:`~leakbed.contracts.noise_laws.NoCeilingError`.
    """
    if not select(run.defenses, Protects.CUT_GRADIENT):
        return
    _refuse_top(run)
    game = _Game(run, draws=1, seed=0, kappa=None)
    top, batches = game.begun(1)
    for batch in islice(batches, most):
        yield from game.residual(batch, top)


def _refuse(run: Recorded) -> None:
    """Refuse runs without canaries, and those whose tops are not stepped again here."""
    if not run.key.canaries:
        raise NoCeilingError(
            "no ceiling of labels: no label of this run was drawn whatever its picture, so the "
            "picture says it; set data.canaries"
        )
    if run.plan.labels != "server":
        raise NoCeilingError(
            "no ceiling of labels: who reads the gradients has them, as this run's labels = "
            f"{run.plan.labels!r}; set labels = 'server'"
        )
    _refuse_top(run)


def _refuse_top(run: Recorded) -> None:
    refuse_own_protocol(run.trace.about)
    protocol = find_protocol(str(run.trace.about["protocol"]))
    if not protocol.in_turn or protocol.parts != 2:  # noqa: PLR2004
        raise NoCeilingError(
            "no ceiling of labels: the one top of 'vanilla-split' alone is stepped again here; "
            f"this run is of {run.trace.about['protocol']!r}"
        )
    for defense in select(run.defenses, Protects.LABELS, Protects.TOP):
        raise NoCeilingError(
            f"no ceiling of labels under the gradient: {defense.name} changes how the top learns; "
            "of labels answered at random the command for rows says what the answer tells"
        )


def _first_uses(run: Recorded, *, until: int) -> list[Target]:
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
    return list(found.values())


@dataclass(frozen=True, kw_only=True, eq=False)
class _Batch:
    node: int
    round: int
    step: int
    smashed: Tensor
    gradient: Tensor

    @property
    def place(self) -> tuple[int, int, int]:
        return self.node, self.round, self.step


class _Game:
    def __init__(self, run: Recorded, *, draws: int, seed: int, kappa: float | None) -> None:
        self._run, self._draws, self._seed, self._kappa = run, draws, seed, kappa
        shares = torch.bincount(run.key.labels, minlength=run.key.num_classes).double()
        self.prior: Float[Tensor, " classes"] = shares / shares.sum()
        self._residuals: dict[tuple[int, int, int], Tensor] = {}

    def canary(self, target: Target, *, until: int | None) -> LabelMessage:
        """Return the ceiling of one canary's label; with ``until``, by gradients to that round."""
        at = target.node, target.round, target.step
        row = int(self._run.key.order[at][int(target.row or 0)])
        true, classes = int(self._run.key.labels[row]), len(self.prior)
        # The truth first, as everywhere: the others in their order.
        labels = torch.tensor([true, *(each for each in range(classes) if each != true)])
        prior = self.prior[labels]
        stream = derive(self._seed, f"canary/{target}")
        honest, batches = self._reached(at)
        own = next(batches)
        tops = [honest.apart() for _ in labels]
        first = self._messages(own, row, labels, tops)
        alone = ceiling(first, draws=self._draws, stream=stream, prior=prior)[1]
        seen = own.gradient.reshape(1, -1)
        messages, read, found = first, 1, alone
        if until is not None:
            gathered = Gathered()
            gathered.add(first, seen[0])
            for batch in batches:
                if batch.round > until:
                    break
                later = self._messages(batch, row, labels, tops)
                gathered.add(later, batch.gradient.flatten())
            messages, seen = gathered.together()
            read, whole = gathered.count, derive(stream, "whole")
            found = ceiling(messages, draws=self._draws, stream=whole, prior=prior)[1]
        believed = beliefs(messages, seen, prior=prior)[0]
        mu = first.mu
        return LabelMessage(
            node=target.node,
            round=target.round,
            step=target.step,
            row=int(target.row or 0),
            ceiling=found.value,
            error=found.error,
            alone=alone.value,
            believed=float(believed[0]),
            hit=float(believed[0] == believed.max()) / int((believed == believed.max()).sum()),
            cap=None if mu is None else class_cap(mu, prior),
            inputs=None if mu is None or self._kappa is None else cap(mu, chance=self._kappa),
            read=read,
        )

    def findings(self, messages: Sequence[LabelMessage]) -> list[Finding]:
        """Return what the check of the recorded noise found."""
        residuals = list(self._residuals.values())
        found = check_noise(residuals) if residuals else []
        return [*found, check_hits([m.hit for m in messages], [m.ceiling for m in messages])]

    def _messages(
        self, batch: _Batch, row: int, labels: Int[Tensor, " classes"], tops: Sequence[_Top]
    ) -> Messages:
        """Return the gradient that each label's top sends; every top takes the step."""
        rows = self._rows(batch)
        laws = [
            self._law(batch, torch.where(rows == row, label, self._run.key.labels[rows]), top)
            for label, top in zip(labels, tops, strict=True)
        ]
        messages = Messages.of(laws)
        for residual in _residual(batch, messages):
            self._residuals.setdefault(batch.place, residual)
        return messages

    def residual(self, batch: _Batch, top: _Top) -> Iterator[Tensor]:
        """Yield how far a recorded gradient is from that of the true labels, if that is known."""
        labels = self._run.key.labels[self._rows(batch)]
        yield from _residual(batch, Messages.of([self._law(batch, labels, top)]))

    def _law(self, batch: _Batch, labels: Int[Tensor, " rows"], top: _Top) -> Law:
        made, classes = top.train(batch, labels), self._run.key.num_classes
        clean = Clean(kind=_KIND, arrays={_KIND: made}, labels=labels, classes=classes)
        return sent_law(self._run.defenses, clean)

    def _rows(self, batch: _Batch) -> Int[Tensor, " rows"]:
        return torch.tensor(self._run.key.order[batch.place])

    def _reached(self, at: tuple[int, int, int]) -> tuple[_Top, Iterator[_Batch]]:
        """Return the top as it was before a batch, and the batches from it on."""
        plan = self._run.plan
        remembers = plan.optimizer_state == "kept" and (plan.momentum or plan.optimizer == "adam")
        top, batches = self.begun(1 if remembers else at[1])
        for batch in batches:
            if batch.place == at:
                return top, _with(batch, batches)
            top.train(batch, self._run.key.labels[self._rows(batch)])
        raise NoCeilingError(f"the trace holds no gradient of batch {at} (node, round, step)")

    def begun(self, start: int) -> tuple[_Top, Iterator[_Batch]]:
        """Return the top as a round began, without momenta, and the batches from there on."""
        held = self._run.trace.holding("server", f"model/round-{start - 1}")
        if held is None:
            raise NoCeilingError(
                f"the trace does not hold the server's part before round {start}; record it again"
            )
        module = self._run.architecture.parts(0).top
        load(module, held)
        return _Top(self._run, module.train()), self._batches(start)

    def _batches(self, start: int) -> Iterator[_Batch]:
        """Yield batches in the order in which the top took them."""
        for round_ in range(start, int(self._run.trace.about["rounds"]) + 1):
            events = list(self._run.trace.events(SmashedUp, CutGradientDown, round_=round_))
            sent = {
                (e.node, e.step): torch.from_numpy(e.smashed)
                for e in events
                if isinstance(e, SmashedUp) and e.phase == Phase.TRAIN
            }
            if not sent:
                raise NoCeilingError(
                    f"the trace does not hold round {round_}, in which the top was trained; record "
                    "the run with keep_rounds = 'all'"
                )
            for event in events:
                if isinstance(event, CutGradientDown):
                    yield _Batch(
                        node=event.node,
                        round=round_,
                        step=event.step,
                        smashed=sent[event.node, event.step],
                        gradient=torch.from_numpy(event.gradient),
                    )


def _residual(batch: _Batch, messages: Messages) -> Iterator[Tensor]:
    """Yield how far a recorded gradient is from the first candidate's, where noise is normal."""
    if messages.family == "normal":
        scale = messages.scales[0].repeat_interleave(torch.tensor(messages.sizes))
        yield (batch.gradient.flatten().double() - messages.means[0].double()) / scale


class _Top:
    """A top in training, without the defences of what it sends."""

    def __init__(self, run: Recorded, module: nn.Module) -> None:
        self._run, self._module, self.round = run, module, 0
        self.optimiser = run.plan.optimiser(module.parameters())
        self.trainer = TopTrainer(module, self.optimiser)

    def train(self, batch: _Batch, labels: Int[Tensor, " rows"]) -> Float[Tensor, " rows *cut"]:
        """Take a step, and return the gradient of what was received."""
        if self._run.plan.optimizer_state == "fresh" and batch.round != self.round:
            self.trainer.forget()
        self.round = batch.round
        return self.trainer.train(batch.smashed, labels)

    def apart(self) -> _Top:
        """Return a top that goes its own way from here."""
        made = _Top(self._run, copy.deepcopy(self._module))
        made.optimiser.load_state_dict(copy.deepcopy(self.optimiser.state_dict()))
        made.round = self.round
        return made


def _with(first: _Batch, rest: Iterator[_Batch]) -> Iterator[_Batch]:
    yield first
    yield from rest
