"""Nodes' bottoms as they were before a message: stepped again with the recorded cut gradients.

A row that is exchanged for a candidate moves the bottom at its own step, and with it every later
message: of its node in the round, of the nodes behind it, and of all nodes in the rounds that
follow. The gradients that came back are recorded, so each candidate's whole path can be made again.
"""

from __future__ import annotations

import copy
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass

import torch
from jaxtyping import Float, Int
from torch import Tensor, nn

from experiments.run.recorded import Recorded
from leakbed.contracts import Defense, Protects, select
from leakbed.contracts.noise_laws import (
    Channel,
    Clean,
    Fixed,
    Law,
    NoCeilingError,
    floating,
    sent_law,
)
from leakbed.events import Array, Bottom, CutGradientDown, Phase, SmashedUp, Target
from leakbed.plugins import is_own
from leakbed.seeds import derive, scoped
from leakbed.tensors import as_tensor, load
from strategies import find_protocol
from strategies.averaging import average

_SMASHED = Protects.SMASHED


def bottom_before(run: Recorded, target: Target) -> nn.Module:
    """Return the bottom that made a smashed batch.

    Args:
        run: The recorded run.
        target: One of its smashed rows.

    Returns:
        In the mode it had: of evaluation for test rows, else of training.

    Raises:
        NoCeilingError: If the trace does not hold what it was trained with.
    """
    if target.phase == Phase.EVALUATE:
        bottom = run.architecture.bottom(0)
        last = run.trace.about.get("rounds")
        if run.key.bottom is None or target.round != last:
            raise NoCeilingError(
                f"the answer key holds the bottom of the last round ({last}) alone; ask for that "
                f"round rather than {target.round}"
            )
        if missing := bottom.state_dict().keys() - run.key.bottom.keys():
            raise NoCeilingError(
                f"no ceiling: the answer key's bottom lacks {min(missing)!r}; it is of another "
                f"network than the trace's, and has {', '.join(sorted(run.key.bottom))}"
            )
        load(bottom, {name: run.key.bottom[name] for name in bottom.state_dict()})
        return bottom.eval()
    _refuse_unknown(run, target)
    return _reached(run, target)[0].bottom


def refuse_other_steps(defenses: Sequence[Defense], *, instead: str = "") -> None:
    """Refuse to repeat training in which defences took part.

    Args:
        defenses: Of the run.
        instead: What to do, if anything.

    Raises:
        NoCeilingError: If one hooks into training.
    """
    if select(defenses, Protects.TRAINING):
        raise NoCeilingError(
            f"no ceiling: a defence changes the node's own training steps{instead}"
        )


def refuse_own_protocol(about: Mapping[str, object]) -> None:
    """Refuse to repeat the training of a protocol whose steps only its author knows.

    Args:
        about: What the trace says of its run.

    Raises:
        NoCeilingError: If its protocol is none of the catalogue's.
    """
    if is_own(protocol := str(about["protocol"])):
        raise NoCeilingError(
            f"no ceiling: how nodes of {protocol!r} train is not repeated here; of a protocol of "
            "one's own there are ceilings of the first smashed batch and of test rows alone"
        )


@dataclass(frozen=True, kw_only=True, eq=False)
class Sent:
    """One smashed batch or relayed bottom, as it was sent and as each candidate would have sent it.

    Attributes:
        event: The recorded one.
        laws: By candidate; of a bottom without the head beside it, whose steps follow from features
            and labels that the server has.
    """

    event: SmashedUp | Bottom
    laws: Sequence[Law]


def following(
    run: Recorded,
    target: Target,
    candidates: Int[Tensor, " candidates"],
    *,
    whole: bool,
) -> Iterator[Sent]:
    """Yield what candidates would send from a row's message on.

    Every candidate has bottoms and optimisers of its own, stepped with the recorded gradients.

    Args:
        run: The recorded run.
        target: One of its smashed rows, of training.
        candidates: Rows of the answer key's images that take its place.
        whole: Whether to go on to the end of the training, with all nodes' batches and the test
            rows that the last bottom was shown; else to the end of the node's round.

    Yields:
        Batches in the order they were sent, and where a node's turn ends its bottom, if it is in
        the clear. If the trace does not hold what bottoms were trained with, or how they step is
        not repeated here, that is a
        :class:`~leakbed.contracts.noise_laws.NoCeilingError`.
    """
    _refuse_unknown(run, target, later=True)
    honest, rest = _reached(run, target)
    walkers = [honest.apart() for _ in candidates]
    own = run.key.order[target.node, target.round, target.step][int(target.row or 0)]
    for step in rest:
        if isinstance(step, _Batch):
            event = step.event
            recorded = torch.tensor(run.key.order[event.node, event.round, event.step])
            rows = [torch.where(recorded == own, each, recorded) for each in candidates]
            made = [walker.step(step, batch) for walker, batch in zip(walkers, rows, strict=True)]
            yield Sent(event=event, laws=[_smashed_law(run, each) for each in made])
        elif isinstance(step, _Evaluated):
            made = [walker.shown(step) for walker in walkers]
            yield Sent(event=step.event, laws=[_smashed_law(run, each) for each in made])
        else:
            for walker in walkers:
                walker.move(step)
        if isinstance(step, _End):
            if step.bottom is not None:
                ends = [Fixed(mean=floating(walker.ends[-1][1])) for walker in walkers]
                yield Sent(event=step.bottom, laws=ends)
            if not whole:
                return


def _smashed_law(run: Recorded, made: Tensor) -> Law:
    return sent_law(run.defenses, Clean(kind=_SMASHED, arrays={_SMASHED: made}))


@dataclass(frozen=True, kw_only=True)
class _Begin:
    node: int


@dataclass(frozen=True, kw_only=True, eq=False)
class _Batch:
    event: SmashedUp
    gradient: Array | None


@dataclass(frozen=True, kw_only=True)
class _End:
    node: int
    rows: int
    bottom: Bottom | None


class _RoundEnd:
    """All nodes of a round are done."""


@dataclass(frozen=True, kw_only=True, eq=False)
class _Evaluated:
    event: SmashedUp


_Step = _Begin | _Batch | _End | _RoundEnd | _Evaluated


def _steps(run: Recorded, target: Target) -> Iterator[_Step]:
    """Yield what happened to bottoms in a whole training, round by round as the trace has them."""
    for round_ in range(1, int(run.trace.about["rounds"]) + 1):
        events = list(run.trace.events(SmashedUp, CutGradientDown, Bottom, round_=round_))
        batches = [e for e in events if isinstance(e, SmashedUp) and e.phase == Phase.TRAIN]
        gradients = {(e.node, e.step): e.gradient for e in events if isinstance(e, CutGradientDown)}
        bottoms = {e.node: e for e in events if isinstance(e, Bottom) and e.up}
        if not batches:
            raise NoCeilingError(
                f"the trace does not hold round {round_}, by which bottoms were trained before or "
                f"after round {target.round}; record the run with keep_rounds = 'all', or attack "
                "test rows (when = 'inference')"
            )
        for node in dict.fromkeys(each.node for each in batches):
            own = sorted((e for e in batches if e.node == node), key=lambda event: event.step)
            yield _Begin(node=node)
            for event in own:
                yield _Batch(event=event, gradient=gradients.get((node, event.step)))
            rows = sum(len(event.smashed) for event in own)
            yield _End(node=node, rows=rows, bottom=bottoms.get(node))
        yield _RoundEnd()
        for message in events:
            if isinstance(message, SmashedUp) and message.phase == Phase.EVALUATE:
                yield _Evaluated(event=message)


def _reached(run: Recorded, target: Target) -> tuple[_Bottoms, Iterator[_Step]]:
    """Return bottoms as they were before a target's batch, and what happened from it on."""
    bottoms, steps = _Bottoms(run), _steps(run, target)
    at = target.node, target.round, target.step
    for step in steps:
        if isinstance(step, _Evaluated):
            continue
        if not isinstance(step, _Batch):
            bottoms.move(step)
            continue
        event = step.event
        if (event.node, event.round, event.step) == at:
            return bottoms, _with(step, steps)
        bottoms.step(step, torch.tensor(run.key.order[event.node, event.round, event.step]))
    raise NoCeilingError(f"the trace holds no batch of {target}")


def _with(first: _Step, rest: Iterator[_Step]) -> Iterator[_Step]:
    yield first
    yield from rest


def _refuse_unknown(run: Recorded, target: Target, *, later: bool = False) -> None:
    """Refuse what cannot be stepped again; of a first message nothing needs to be."""
    if run.key.seed is None:
        raise NoCeilingError("the answer key does not say the run's seed; record it again")
    refuse_other_steps(run.defenses, instead="; attack test rows (when = 'inference')")
    protocol = str(run.trace.about["protocol"])
    known = not is_own(protocol) and (_merged(run) or find_protocol(protocol).in_turn)
    if not known and (later or (target.round, target.step) != (1, 0)):
        raise NoCeilingError(
            f"no ceiling: how bottoms of {protocol!r} step together (protocol.sync = 'step') is "
            "not repeated here; attack the first message alone, or test rows (when = 'inference')"
        )


def _merged(run: Recorded) -> bool:
    """Say whether nodes start from one bottom, and theirs are averaged when a round ends."""
    entry = find_protocol(str(run.trace.about["protocol"]))
    in_step = "sync" in entry.options and run.option("sync") != "round"
    return entry.merges and not in_step


class _Bottoms:
    """All nodes' bottoms in training; the one at work is ``bottom``."""

    def __init__(self, run: Recorded) -> None:
        self._run, self._merges = run, _merged(run)
        self.kept: dict[int, Mapping[str, object]] = {}  # momenta by node
        self.ends: list[tuple[int, Mapping[str, Tensor]]] = []
        first = run.architecture.parts(derive(run.key.seed or 0, "victim-init")).bottom
        self._state: Mapping[str, Tensor] = _copied(first)
        self.bottom = run.architecture.bottom(0)
        self.optimiser = run.plan.optimiser(self.bottom.parameters())

    def apart(self) -> _Bottoms:
        """Return bottoms that go their own way from here; the run is shared."""
        made = copy.copy(self)
        made.bottom = copy.deepcopy(self.bottom)
        made.optimiser = self._run.plan.optimiser(made.bottom.parameters())
        made.optimiser.load_state_dict(copy.deepcopy(self.optimiser.state_dict()))
        made.kept, made.ends = dict(self.kept), list(self.ends)
        return made

    def move(self, step: _Begin | _End | _RoundEnd) -> None:
        """Begin or end a node's round, or end the round of all."""
        if isinstance(step, _Begin):
            self.bottom.load_state_dict(dict(self._state))
            self.bottom.train()
            self.optimiser = self._run.plan.optimiser(self.bottom.parameters())
            if self._run.plan.optimizer_state == "kept" and step.node in self.kept:
                # A state that is loaded is stepped in place, and others may start from it too.
                self.optimiser.load_state_dict(copy.deepcopy(dict(self.kept[step.node])))
        elif isinstance(step, _End):
            self.kept[step.node] = self.optimiser.state_dict()
            self.ends.append((step.rows, _copied(self.bottom)))
            if not self._merges:
                self._state = self.ends[-1][1]
        else:
            if self._merges:
                counts, states = zip(*self.ends, strict=True)
                merged = average([{n: v.numpy() for n, v in s.items()} for s in states], counts)
                self._state = {name: torch.tensor(value) for name, value in merged.items()}
            self.ends = []

    def shown(self, evaluated: _Evaluated) -> Tensor:
        """Return what the bottom of a round that has ended makes of test rows."""
        self.bottom.load_state_dict(dict(self._state))
        start, count = evaluated.event.step, len(evaluated.event.smashed)
        with torch.no_grad():
            made: Tensor = self.bottom.eval()(self._run.key.test_images[start : start + count])
        return made

    def step(self, batch: _Batch, rows: Int[Tensor, " batch"]) -> Float[Tensor, " batch *cut"]:
        """Send a batch of some rows, and learn from the gradient that came back."""
        run, event = self._run, batch.event
        stream = derive(run.node_stream(event.node) or 0, f"forward/{event.round}/{event.step}")
        with scoped(stream):  # of which dropout draws
            made: Tensor = self.bottom(run.key.images[rows])
        if batch.gradient is not None:
            self.optimiser.zero_grad()
            _sent(run.defenses, made).backward(as_tensor(batch.gradient))
            self.optimiser.step()
        return made.detach()


def _copied(module: nn.Module) -> Mapping[str, Tensor]:
    return {name: value.clone() for name, value in module.state_dict().items()}


def _sent(defenses: Sequence[Defense], made: Tensor) -> Tensor:
    """Return what is sent but for the noise, with its graph, as nodes learn through defences."""
    kind = _SMASHED
    for defense in defenses:
        if kind not in defense.protects or defense.straight_through:
            continue
        law = sent_law([defense], Clean(kind=kind, arrays={kind: made}))
        made = made if isinstance(law, Channel) else law.mean[kind]
    return made
