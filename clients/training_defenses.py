"""The training hooks of a node's defences: who calls them, and where their state lives.

A guard stays with the bottom's trainer, in memory or in ``context.state``, or for a round with
FedAvg's node. When a round begins it shows defences the part the node received. Per batch it asks
for images to show it, and for labels where a batch is sent; after backpropagation, for their part
in the training step, and for verdicts on a gradient that came back.
"""

from collections.abc import Mapping, Sequence
from dataclasses import replace

import torch
from flwr.app import Context
from jaxtyping import Float, Int
from torch import Tensor, nn

from clients.node import NodeConfig
from clients.trainer import load_momenta, momenta_of
from leakbed.contract_checks import blame, blamed, refuse_state, refuse_unsent
from leakbed.contracts import (
    BrokenPluginError,
    Defense,
    DefenseState,
    IllegalCombinationError,
    Protects,
    select,
)
from leakbed.contracts.defense import NO_ALARM, Holdings, ReturnedGradient, TrainingStep
from leakbed.contracts.hooks import untrained
from leakbed.contracts.training_steps import Answered, ask, refuse_stack, takes_part
from leakbed.node_memory import load_state, save_state
from leakbed.seeds import derive
from leakbed.tensors import finite
from leakbed.wire.fields import Alarms, Finding

_KEY = "leakbed.training-defence"


class TrainingDefenses:
    """The defences that hook into one node's training, each with its state."""

    def __init__(self, cell: NodeConfig, defenses: tuple[Defense, ...]) -> None:
        """Make the guard; :meth:`restore` comes next, :meth:`open` before a round's batches."""
        self._cell, self._defenses = cell, defenses
        self._states: list[DefenseState] = []

    @classmethod
    def of(cls, cell: NodeConfig, *, exchanges: str = "split") -> "TrainingDefenses | None":
        """Return the guard of a cell; None where no defence hooks into training.

        Args:
            cell: The node's.
            exchanges: What its protocol exchanges: ``"split"`` or ``"weights"``.

        Returns:
            One without state.

        Raises:
            IllegalCombinationError: If a defence needs labels that the node does not have, cannot
                take part in such a protocol's training, or voids another one's claim of privacy.
        """
        chosen = select(cell.chosen_defenses(), Protects.TRAINING)
        refuse_stack(cell.chosen_defenses())
        for defense in chosen:
            if (why := untrained(type(defense), exchanges)) is not None:
                raise IllegalCombinationError(why)
            if cell.plan.labels not in defense.labels:
                raise IllegalCombinationError(unlabelled(defense, cell.plan.labels))
        return cls(cell, chosen) if chosen else None

    @property
    def probing(self) -> bool:
        """Whether the bottom must not learn from the batch that waits for its gradient."""
        return any(state.probing for state in self._states)

    @property
    def claiming(self) -> bool:
        """Whether one of them claims differential privacy of what the node trains."""
        return any(defense.claiming for defense in self._defenses)

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

    @property
    def takes_part(self) -> bool:
        """Whether a defence has a hook in the step that the batch at hand leads to."""
        return not self.probing and any(map(takes_part, self._defenses))

    def ask(self, step: TrainingStep) -> list[Answered | None]:
        """Ask every defence that has a hook in the training step.

        Args:
            step: After backpropagation of the task's loss.

        Returns:
            An answer of each, in their order; None of those without that hook.
        """
        answers: list[Answered | None] = []
        for index, defense in enumerate(self._defenses):
            answered = ask(defense, self._states[index], step) if takes_part(defense) else None
            answers.append(answered)
            if answered is not None:
                self._states[index] = answered.state
                if answered.gradients is not None:
                    step = replace(step, gradients=answered.gradients)
        return answers

    def follow_answers(
        self, answers: Sequence[Answered | None], module: nn.Module, *, share: float = 1.0
    ) -> None:
        """Put what defences answered into a module's gradients, and train their own weights.

        Only the module's gradients are weighed by the share: a node's own weights are in no joint
        loss.

        Args:
            answers: From :meth:`ask`.
            module: What the node trains; the optimiser's step follows.
            share: What the task's loss is of the mean of the node's own rows.

        Raises:
            BrokenPluginError: If the gradient of a loss is not finite.
        """
        changed = [each.gradients for each in answers if each and each.gradients is not None]
        for name, weight in module.named_parameters() if changed else ():
            if name in changed[-1]:
                weight.grad = changed[-1][name] * share
        pairs = zip(self._defenses, answers, strict=True)
        added = [(d, each.loss) for d, each in pairs if each and each.loss is not None]
        if not added:
            return
        adding = added[0][0] if len(added) == 1 else ", ".join(d.name for d, _ in added)
        sound = _finite_gradients(module)
        total = added[0][1]
        for _, loss in added[1:]:
            total = total + loss
        with blamed(adding, "defence"):
            own = [leaf for each in answers if each for leaf in each.leaves.values()]
            _backpropagate(total, module, own, share=share)
        if sound and not _finite_gradients(module):
            said = "returned a loss whose gradient is not finite"
            raise BrokenPluginError(blame(adding, "defence", said))
        for index, each in enumerate(answers):
            if each is not None and any(leaf.grad is not None for leaf in each.leaves.values()):
                self._states[index] = self._trained(index, each.leaves, blaming=sound)

    def advance(self) -> None:
        """Count a step on where there is nothing to :meth:`inspect`."""
        self._states = [state.next() for state in self._states]

    def forget(self) -> None:
        """Drop the momenta of own weights, as a node's optimiser that starts afresh."""
        self._states = [replace(state, momenta={}) for state in self._states]

    def inspect(self, seen: ReturnedGradient) -> None:
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
            bottom: Weights and buffers of the node's part as it received them, on the CPU; in
                FedAvg of the whole network.
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
        states = []
        for defense, state in pairs:
            with blamed(defense, "defence"):
                states.append(defense.prepare(state, held))
                refuse_state(defense, states[-1])
        self._states = states

    def store(self, context: Context) -> None:
        """Write the states into the node's."""
        for index, state in enumerate(self._states):
            save_state(context, f"{_KEY}.{index}", state)

    def restore(self, context: Context) -> None:
        """Take the states from the node's, or begin where there are none."""
        self._states = [
            load_state(context, f"{_KEY}.{index}") or self._begun(index, defense)
            for index, defense in enumerate(self._defenses)
        ]

    def _begun(self, index: int, defense: Defense) -> DefenseState:
        cell = self._cell
        defense.check(rows=len(cell.rows()[0]), batch_size=cell.plan.batch_size)
        return defense.begin(derive(cell.defense_stream, f"training/{index}"))

    def _trained(self, index: int, leaves: Mapping[str, Tensor], *, blaming: bool) -> DefenseState:
        """Return a defence's state after one step of the node's optimiser on its weights."""
        defense, state = self._defenses[index], self._states[index]
        names = sorted(leaves)
        optimiser = self._cell.plan.optimiser([leaves[name] for name in names])
        known = (key.rpartition("/") for key in state.momenta)
        kept = {
            f"{names.index(name)}/{what}": state.momenta[f"{name}/{what}"].numpy().copy()
            for name, _, what in known
            if name in names
        }
        load_momenta(optimiser, kept)
        optimiser.step()
        moved = {name: leaves[name].detach().cpu() for name in names}
        for name, value in moved.items():
            if blaming and not finite(value):
                said = f"drove its own weight {name!r} out of the finite numbers"
                raise BrokenPluginError(blame(defense, "defence", said))
        momenta = dict(state.momenta)
        for key, array in momenta_of(optimiser).items():
            place, _, what = key.partition("/")
            momenta[f"{names[int(place)]}/{what}"] = torch.from_numpy(array)
        return replace(state, trained={**state.trained, **moved}, momenta=momenta)


def _backpropagate(
    loss: Float[Tensor, ""], module: nn.Module, own: Sequence[Tensor], *, share: float
) -> None:
    """Add a loss's gradient to a module's, weighed by a share, and to own weights as it is."""
    if share == 1 or not own:
        (loss * share).backward()
        return
    loss.backward(inputs=own, retain_graph=True)
    (loss * share).backward(inputs=[each for each in module.parameters() if each.requires_grad])


def _finite_gradients(module: nn.Module) -> bool:
    return all(finite(p.grad) for p in module.parameters() if p.grad is not None)


def unlabelled(defense: Defense | type[Defense], labels: str) -> str:
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
