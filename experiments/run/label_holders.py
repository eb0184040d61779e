"""Whoever makes the gradient at a cut from labels, trained again on what was recorded.

With labels at the server that is its top: one for all nodes, which steps on their batches one by
one (``vanilla-split``, ``splitfed-v2``) or on all of a step at once (``parallel-split``,
``vertical-split``), or a copy for each node of a round, averaged when it ends (``splitfed-v1``). In
a U-shape it is the head, which goes from node to node while momenta stay behind. What it received
is in the trace; labels are the caller's, so that each guess of a label can have a part of its own.
"""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

import torch
from jaxtyping import Float, Int
from torch import Tensor, nn
from torch.nn.modules.dropout import _DropoutNd

from experiments.run.replay import refuse_own_protocol
from leakbed.contracts import Protects, select
from leakbed.contracts.gradient_defenses import Origin
from leakbed.contracts.noise_laws import NoCeilingError
from leakbed.events import Array, CutGradientDown, FeaturesDown, Phase, SmashedUp, UpperGradientUp
from leakbed.seeds import derive, scoped
from leakbed.tensors import load, predicted
from strategies.averaging import average
from strategies.server_model import Labelled, TopTrainer
from strategies.vertical_split import MERGES

if TYPE_CHECKING:
    from experiments.run.recorded import Recorded

_AT_ONCE = {"parallel-split", "vertical-split"}
_ONE_BY_ONE = {"vanilla-split", "splitfed-v1", "splitfed-v2", "u-shaped"}


@dataclass(frozen=True, kw_only=True, eq=False)
class Batch:
    """One batch at the cut above which the labels are.

    Attributes:
        node: Partition id.
        round: Server round.
        step: Within it.
        received: What the holder of the labels was sent: smashed rows, or a head's features.
        gradient: What it sent back, as recorded.
    """

    node: int
    round: int
    step: int
    received: Float[Tensor, " rows *cut"]
    gradient: Float[Tensor, " rows *cut"]

    @property
    def place(self) -> tuple[int, int, int]:
        """Node, round and step."""
        return self.node, self.round, self.step


Step = tuple[Batch, ...]
"""Batches that are trained on together."""


def refuse_unknown_holder(run: Recorded) -> None:
    """Refuse runs whose holder of labels is not trained again here.

    Args:
        run: The recorded run.

    Raises:
        NoCeilingError: If it is one.
    """
    refuse_own_protocol(run.trace.about)
    if (name := str(run.trace.about["protocol"])) not in _AT_ONCE | _ONE_BY_ONE:
        raise NoCeilingError(f"no ceiling of labels: no gradient at a cut of {name!r} says them")


class Holder:
    """The parts that make gradients from labels, without the defences of what they send."""

    def __init__(
        self, run: Recorded, module: Callable[[], nn.Module], *, private: bool = True
    ) -> None:
        """Begin without momenta.

        Args:
            run: The recorded run.
            module: Makes the part with the weights to begin from.
            private: Whether defences of the steps take part in them.

        Raises:
            NoCeilingError: If the top draws numbers that are not drawn again here.
        """
        self._run, self._protocol = run, str(run.trace.about["protocol"])
        self._make, self._module = module, module()
        steps = select(run.defenses, Protects.TOP) if private else ()
        self._private = tuple(steps)
        self._trainers: dict[int, tuple[TopTrainer, torch.optim.Optimizer]] = {}
        self._rows: dict[int, int] = {}  # by node, of the round so far
        self._round = 0
        if self._protocol != "u-shaped" and any(
            isinstance(layer, _DropoutNd) for layer in self._module.modules()
        ):
            raise NoCeilingError(
                "no ceiling of labels: the top draws dropout from the server's own stream, which "
                "is not repeated here"
            )

    def train(self, step: Step, labels: Sequence[Int[Tensor, " rows"]]) -> list[Tensor]:
        """Take a step.

        Args:
            step: Its batches.
            labels: Of each one's rows.

        Returns:
            The gradient of what was received, of each batch.
        """
        if step[0].round != self._round:
            self._begin(step[0].round)
        origins = [self._origin(batch) for batch in step]
        batch = step[0]
        trainer, _ = self._trainer(batch.node)
        if self._protocol == "vertical-split":
            received = [trainer.received(each.received) for each in step]
            merge = MERGES[self._run.option("merge")]
            return trainer.train_merged(received, labels[0], merge=merge, origin=origins[0])
        if self._protocol == "parallel-split":
            parts = zip(step, labels, origins, strict=True)
            own_mean = self._run.option("gradient_scale") == "local"
            together = [Labelled(each.received, own, origin) for each, own, origin in parts]
            return trainer.train_jointly(together, own_mean=own_mean)
        self._rows[batch.node] = self._rows.get(batch.node, 0) + len(batch.received)
        stream = derive(self._run.node_stream(batch.node) or 0, f"head/{batch.round}/{batch.step}")
        with scoped(stream):  # of which a head's dropout draws
            return [trainer.train(batch.received, labels[0], origins[0])]

    def right(self, round_: int) -> list[int]:
        """Return how many test rows the part predicts right, as a head tells the server.

        Args:
            round_: At the end of which; of one without an evaluation there are none.

        Returns:
            A count for each message of features that heads were sent.
        """
        found, module = list[int](), self._module.eval()
        for event in self._run.trace.events(FeaturesDown, round_=round_):
            if isinstance(event, FeaturesDown) and event.phase == Phase.EVALUATE:
                labels = self._run.key.test_labels[event.step : event.step + len(event.features)]
                with torch.no_grad():
                    named = predicted(module(torch.from_numpy(event.features)))
                found.append(int((named == labels).sum()))
        module.train()
        return found

    def apart(self) -> Holder:
        """Return parts that go their own way from here, by steps that no defence changes."""
        made = Holder(self._run, self._make, private=False)
        made._module.load_state_dict(self._module.state_dict())
        made._round, made._rows = self._round, dict(self._rows)
        for node, (trainer, optimiser) in self._trainers.items():
            other, own = made._trainer(node)
            other.module.load_state_dict(trainer.module.state_dict())
            own.load_state_dict(copy.deepcopy(optimiser.state_dict()))
        return made

    def _begin(self, round_: int) -> None:
        """Begin a round: average the copies, and forget momenta if they do not stay."""
        if self._protocol == "splitfed-v1" and self._rows:
            states = [self._trainers[node][0].module.state_dict() for node in self._rows]
            arrays = [{name: value.numpy() for name, value in each.items()} for each in states]
            load(self._module, average(arrays, list(self._rows.values())))
        for trainer, _ in self._trainers.values():
            if self._protocol == "splitfed-v1":
                trainer.module.load_state_dict(self._module.state_dict())
            if self._run.plan.optimizer_state == "fresh":
                trainer.forget()
        self._round, self._rows = round_, {}

    def _trainer(self, node: int) -> tuple[TopTrainer, torch.optim.Optimizer]:
        """Return who trains with a node, and the optimiser."""
        place = node if self._protocol in {"splitfed-v1", "u-shaped"} else 0
        if place not in self._trainers:
            module = self._module
            if self._protocol == "splitfed-v1":
                module = self._make()
                module.load_state_dict(self._module.state_dict())
            optimiser = self._run.plan.optimiser(module.parameters())
            trainer = TopTrainer(
                module,
                optimiser,
                defenses=self._private,
                defense_stream=derive(self._run.key.seed or 0, "defence/server"),
            )
            self._trainers[place] = trainer, optimiser
        return self._trainers[place]

    def _origin(self, batch: Batch) -> Origin:
        rows = tuple(map(int, self._run.key.order[batch.place]))
        return Origin(node=batch.node, round=batch.round, step=batch.step, rows=rows)


def begun(run: Recorded, start: int, *, until: int) -> tuple[Holder, Iterator[Step]]:
    """Return a run's holder of labels as a round began, and what it took from there on.

    Args:
        run: The recorded run.
        start: The round; the first where the trace does not hold the part, as of a head.
        until: The last round.

    Returns:
        The holder without momenta, and steps in their order.

    Raises:
        NoCeilingError: If the trace or the answer key lacks what the part begins with.
    """
    architecture, seed = run.architecture, run.key.seed
    if architecture.upper_cut is not None:
        if seed is None:
            raise NoCeilingError("the answer key does not say the run's seed; record it again")
        stream = derive(seed, "victim-init")
        return Holder(run, lambda: architecture.head(stream).train()), _steps(run, 1, until)
    held = run.trace.holding("server", f"model/round-{start - 1}")
    if held is None:
        raise NoCeilingError(
            f"the trace does not hold the server's part before round {start}; record it again"
        )

    def top() -> nn.Module:
        module = architecture.parts(0).top
        load(module, held)
        return module.train()

    return Holder(run, top), _steps(run, start, until)


def reached(
    run: Recorded, at: tuple[int, int, int], *, until: int
) -> tuple[Holder, Iterator[Step]]:
    """Return the holder of labels as it was before a batch, and the steps from it on.

    Args:
        run: The recorded run.
        at: Node, round and step.
        until: The last round.

    Returns:
        They; the first step has the batch.

    Raises:
        NoCeilingError: If the trace does not hold the batch, or what leads to it.
    """
    plan = run.plan
    kept = plan.optimizer_state == "kept" and (plan.momentum or plan.optimizer == "adam")
    counted = bool(select(run.defenses, Protects.TOP))  # noise is drawn by the number of the step
    holder, steps = begun(run, 1 if kept or counted else at[1], until=until)
    labels = run.trained_labels()
    for step in steps:
        if any(batch.place == at for batch in step):
            return holder, _with(step, steps)
        holder.train(step, [labels[rows_of(run, batch)] for batch in step])
    raise NoCeilingError(f"the trace holds no gradient of batch {at} (node, round, step)")


def rows_of(run: Recorded, batch: Batch) -> Int[Tensor, " rows"]:
    """Return the rows of the answer key's images that are in a batch."""
    return torch.tensor(run.key.order[batch.place])


def _steps(run: Recorded, start: int, until: int) -> Iterator[Step]:
    """Yield steps in the order in which they were taken."""
    at_once = str(run.trace.about["protocol"]) in _AT_ONCE
    for round_ in range(start, until + 1):
        batches = _batches(run, round_)
        if not batches:
            raise NoCeilingError(
                f"the trace does not hold round {round_}, in which the part with the labels was "
                "trained; record the run with keep_rounds = 'all'"
            )
        if not at_once:
            yield from ((each,) for each in batches)
            continue
        for step in sorted({each.step for each in batches}):
            yield tuple(each for each in batches if each.step == step)


def _batches(run: Recorded, round_: int) -> list[Batch]:
    """Return a round's batches in the order in which their gradients were sent."""
    upper = run.architecture.upper_cut is not None
    sent: dict[tuple[int, int], Array] = {}
    made: list[CutGradientDown | UpperGradientUp] = []
    kinds = (FeaturesDown, UpperGradientUp) if upper else (SmashedUp, CutGradientDown)
    for event in run.trace.events(*kinds, round_=round_):
        if isinstance(event, CutGradientDown | UpperGradientUp):
            made.append(event)
        elif isinstance(event, SmashedUp | FeaturesDown) and event.phase == Phase.TRAIN:
            received = event.smashed if isinstance(event, SmashedUp) else event.features
            sent[event.node, event.step] = received
    return [
        Batch(
            node=event.node,
            round=round_,
            step=event.step,
            received=torch.from_numpy(sent[event.node, event.step]),
            gradient=torch.from_numpy(event.gradient),
        )
        for event in made
    ]


def _with(first: Step, rest: Iterator[Step]) -> Iterator[Step]:
    yield first
    yield from rest
