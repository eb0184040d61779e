"""The training hooks of a node's defences: who calls them, and where their state lives.

A guard stays with the bottom's trainer, in memory or in ``context.state``. When a round begins it
shows defences the bottom the node received. Per batch it asks for images to show the bottom and for
labels when the batch is sent, and for penalties and verdicts when its gradient comes back.
"""

from collections.abc import Mapping
from dataclasses import replace

from flwr.app import Context
from jaxtyping import Float, Int
from torch import Tensor

from clients.node import NodeConfig
from leakbed.contract_checks import blamed, refuse_penalty, refuse_unsent
from leakbed.contracts import Defense, DefenseState, IllegalCombinationError, Protects, select
from leakbed.contracts.defense import NO_ALARM, Holdings, TrainingStep
from leakbed.mods import load_state, save_state
from leakbed.seeds import derive
from leakbed.wire.fields import Alarms, Finding

_KEY = "leakbed.training-defence"


class TrainingDefenses:
    """The defences that hook into one node's training, each with its state."""

    def __init__(self, cell: NodeConfig, defenses: tuple[Defense, ...]) -> None:
        """Make the guard; :meth:`restore` comes first, and :meth:`open` before a round's batches.

        Args:
            cell: The node's.
            defenses: In the order of the cell.
        """
        self._cell, self._defenses = cell, defenses
        self._states: list[DefenseState] = []

    @classmethod
    def of(cls, cell: NodeConfig) -> "TrainingDefenses | None":
        """Return the guard of a cell; None where no defence hooks into training.

        Args:
            cell: The node's.

        Returns:
            One without state.

        Raises:
            IllegalCombinationError: If a defence needs labels that the node does not have.
        """
        chosen = select(cell.chosen_defenses(), Protects.TRAINING)
        for defense in chosen:
            if cell.plan.labels not in defense.labels:
                raise IllegalCombinationError(unlabelled(defense, cell.plan.labels))
        return cls(cell, chosen) if chosen else None

    @property
    def probing(self) -> bool:
        """Whether the bottom must not learn from the batch that waits for its gradient."""
        return any(state.probing for state in self._states)

    @property
    def alarms(self) -> Alarms:
        """What the detectors found so far; none where there is no detector."""
        return {
            defense.name: Finding(state.alarm, state.score, state.last, state.messages)
            for defense, state in zip(self._defenses, self._states, strict=True)
            if type(defense).inspect is not Defense.inspect
        }

    @property
    def stopped_by(self) -> str | None:
        """The first detector whose alarm ends the node's training; None while it goes on."""
        pairs = zip(self._defenses, self._states, strict=True)
        stopping = (d.name for d, state in pairs if d.stop and state.alarm != NO_ALARM)
        return next(stopping, None)

    def labels(self, labels: Int[Tensor, " batch"]) -> Int[Tensor, " batch"]:
        """Return the labels to send with the next batch."""
        classes = self._cell.data.num_classes
        for index, defense in enumerate(self._defenses):
            with blamed(defense, "defence"):
                state, sent = defense.protect_labels(self._states[index], labels, classes=classes)
                refuse_unsent(defense, {"labels": sent}, {"labels": labels})
            labels = sent
            self._states[index] = state
        return labels

    @property
    def follows(self) -> bool:
        """Whether a defence learns from the gradient at the images the bottom is shown."""
        plain = Defense.follow_gradient
        return any(type(defense).follow_gradient is not plain for defense in self._defenses)

    def altered(
        self, images: Float[Tensor, " batch *image"], rows: Int[Tensor, " batch"]
    ) -> Float[Tensor, " batch *image"]:
        """Return what the bottom is shown of a batch.

        Args:
            images: The batch, on the trainer's device.
            rows: Which of the node's they are.

        Returns:
            The images, a leaf that gathers its gradient where a defence learns from that.
        """
        for defense, state in zip(self._defenses, self._states, strict=True):
            with blamed(defense, "defence"):
                shown = defense.alter_images(state, images, rows)
                refuse_unsent(defense, {"images": shown}, {"images": images})
            images = shown
        return images.detach().requires_grad_() if self.follows else images

    def follow(self, gradient: Float[Tensor, " batch *image"], rows: Int[Tensor, " batch"]) -> None:
        """Let defences learn from the gradient at the images the bottom was shown.

        Args:
            gradient: Of the task's loss alone.
            rows: Which of the node's they are.
        """
        for index, defense in enumerate(self._defenses):
            with blamed(defense, "defence"):
                self._states[index] = defense.follow_gradient(self._states[index], gradient, rows)

    def penalty(
        self, images: Float[Tensor, " batch *image"], smashed: Float[Tensor, " batch *cut"]
    ) -> Float[Tensor, ""] | None:
        """Return the sum of what the bottom minimises beside the task, or None for nothing.

        It is for the mean of the node's own rows; who adds it weighs it by the node's share.

        Args:
            images: The batch, on the trainer's device.
            smashed: Of the bottom, with its graph.

        Returns:
            With its graph.
        """
        total: Tensor | None = None
        for index, defense in enumerate(self._defenses):
            with blamed(defense, "defence"):
                self._states[index], term = defense.penalty(self._states[index], images, smashed)
                refuse_penalty(defense, term, smashed)
            if term is not None:
                total = term if total is None else total + term
        return total

    def inspect(self, seen: TrainingStep) -> None:
        """Show every detector what came back for a batch, before the bottom learns from it.

        Args:
            seen: All of it, on the CPU.
        """
        for index, defense in enumerate(self._defenses):
            with blamed(defense, "defence"):
                after = defense.inspect(self._states[index], seen)
            self._states[index] = replace(after, probing=False).next()

    def open(self, bottom: Mapping[str, Tensor]) -> None:
        """Let every defence learn from what the node holds when a round begins.

        Args:
            bottom: Weights and buffers of the node's part as it received them, on the CPU.
        """
        if self.stopped_by is not None:
            return
        cell = self._cell
        images, labels = cell.training_rows()
        held = Holdings(
            images=images,
            labels=labels,
            architecture=cell.architecture,
            bottom=bottom,
            batch_size=cell.plan.batch_size,
            optimiser=cell.plan.optimiser,
        )
        pairs = zip(self._defenses, self._states, strict=True)
        self._states = [defense.prepare(state, held) for defense, state in pairs]

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
            load_state(context, f"{_KEY}.{index}") or self._begun(index, defense)
            for index, defense in enumerate(self._defenses)
        ]

    def _begun(self, index: int, defense: Defense) -> DefenseState:
        cell = self._cell
        defense.check(rows=len(cell.rows()[0]), batch_size=cell.plan.batch_size)
        return defense.begin(derive(cell.defense_stream, f"training/{index}"))


def unlabelled(defense: Defense, labels: str) -> str:
    """Say why a defence cannot work where labels are kept as they are.

    Args:
        defense: One that needs the node to have them.
        labels: The value of ``protocol.labels``.

    Returns:
        What does not fit and what would.
    """
    fitting = " or ".join(map(repr, sorted(defense.labels)))
    return (
        f"{defense.name} cannot work with protocol.labels = {labels!r}: it needs labels that the "
        f"node itself holds and may use; choose a protocol with labels = {fitting}"
    )
