"""The training hooks of a node's defences: who calls them, and where their state lives.

A guard stays with the bottom's trainer, in memory or in ``context.state``. Per batch it asks for
labels when the batch is sent, and for penalties and verdicts when its gradient comes back.
"""

from dataclasses import replace

from flwr.app import Context
from jaxtyping import Float, Int
from torch import Tensor

from clients.cell import Cell
from leakbed.contracts import Defense, DefenseState, IllegalCombinationError, Protects
from leakbed.defending import NO_ALARM, Holdings, TrainingStep
from leakbed.mods import load_state, save_state
from leakbed.seeds import derive
from leakbed.wire.alarms import Alarms, Finding

_KEY = "leakbed.training-defence"


class Guard:
    """The defences that hook into one node's training, each with its state."""

    def __init__(self, cell: Cell, defences: tuple[Defense, ...]) -> None:
        """Make the guard; :meth:`restore` comes before any other call.

        Args:
            cell: The node's.
            defences: In the order of the cell.
        """
        self._cell, self._defences = cell, defences
        self._states: list[DefenseState] = []

    @classmethod
    def of(cls, cell: Cell) -> "Guard | None":
        """Return the guard of a cell; None where no defence hooks into training.

        Args:
            cell: The node's.

        Returns:
            One without state.

        Raises:
            IllegalCombinationError: If a defence needs labels that the node does not have.
        """
        chosen = tuple(d for d in cell.chosen_defenses() if Protects.TRAINING in d.protects)
        for defence in chosen:
            if cell.plan.labels not in defence.labels:
                raise IllegalCombinationError(unlabelled(defence, cell.plan.labels))
        return cls(cell, chosen) if chosen else None

    @property
    def probing(self) -> bool:
        """Whether the bottom must not learn from the batch that waits for its gradient."""
        return any(state.probing for state in self._states)

    @property
    def alarms(self) -> Alarms:
        """What the detectors found so far; none where there is no detector."""
        return {
            defence.name: Finding(state.alarm, state.score, state.last, state.messages)
            for defence, state in zip(self._defences, self._states, strict=True)
            if type(defence).inspect is not Defense.inspect
        }

    @property
    def stopped_by(self) -> str | None:
        """The first detector whose alarm ends the node's training; None while it goes on."""
        pairs = zip(self._defences, self._states, strict=True)
        stopping = (d.name for d, state in pairs if d.stop and state.alarm != NO_ALARM)
        return next(stopping, None)

    def labels(self, labels: Int[Tensor, " batch"]) -> Int[Tensor, " batch"]:
        """Return the labels to send with the next batch."""
        classes = self._cell.architecture.num_classes
        for index, defence in enumerate(self._defences):
            state, labels = defence.protect_labels(self._states[index], labels, classes=classes)
            self._states[index] = state
        return labels

    def penalty(
        self, images: Float[Tensor, " batch *image"], smashed: Float[Tensor, " batch *cut"]
    ) -> Float[Tensor, ""] | None:
        """Return the sum of what the bottom minimises beside the task, or None for nothing.

        Args:
            images: The batch, on the trainer's device.
            smashed: Of the bottom, with its graph.

        Returns:
            With its graph.
        """
        total: Tensor | None = None
        for index, defence in enumerate(self._defences):
            self._states[index], term = defence.penalty(self._states[index], images, smashed)
            if term is not None:
                total = term if total is None else total + term
        return total

    def inspect(self, seen: TrainingStep) -> None:
        """Show every detector what came back for a batch, before the bottom learns from it.

        Args:
            seen: All of it, on the CPU.
        """
        for index, defence in enumerate(self._defences):
            after = defence.inspect(self._states[index], seen)
            self._states[index] = replace(after, probing=False).next()

    def store(self, context: Context) -> None:
        """Write the states into the node's."""
        for index, state in enumerate(self._states):
            save_state(context, f"{_KEY}.{index}", state)

    def restore(self, context: Context) -> None:
        """Take the states from the node's, or begin where there are none.

        Args:
            context: The node's.
        """
        self._states = [
            load_state(context, f"{_KEY}.{index}") or self._begun(index, defence)
            for index, defence in enumerate(self._defences)
        ]

    def _begun(self, index: int, defence: Defense) -> DefenseState:
        cell = self._cell
        images, labels = cell.rows()
        defence.check(rows=len(images), batch_size=cell.plan.batch_size)
        held = Holdings(
            images=images,
            labels=labels,
            architecture=cell.architecture,
            batch_size=cell.plan.batch_size,
            optimiser=cell.plan.optimiser,
        )
        stream = derive(cell.defence_stream, f"training/{index}")
        return defence.prepare(defence.begin(stream), held)


def unlabelled(defence: Defense, labels: str) -> str:
    """Say why a defence cannot work where labels are kept as they are.

    Args:
        defence: One that needs the node to have them.
        labels: The value of ``protocol.labels``.

    Returns:
        What does not fit and what would.
    """
    fitting = " or ".join(map(repr, sorted(defence.labels)))
    return (
        f"{defence.name} cannot work with protocol.labels = {labels!r}: it needs labels that the "
        f"node itself holds and may use; choose a protocol with labels = {fitting}"
    )
