"""The node's side of split learning: the bottom, its optimiser and its place in the data.

Within a round on a sticky grid the trainer stays in memory between messages. On Flower's own
runtimes any process may serve any message, so it is rebuilt from ``context.state``: the weights,
buffers and optimiser from before the pending forward pass, which is repeated with the same batch
and the same random state (so that BatchNorm counts each batch once). Both ways give the same
numbers. Between rounds a node lives in ``context.state`` alone.
"""

import torch
from flwr.app import ConfigRecord, Context, Message, RecordDict
from flwr.clientapp import ClientApp
from jaxtyping import Float
from torch import Tensor

from clients import head
from clients.cell import Cell, OutOfStepError, UnstableTrainingError, live
from clients.guard import Guard
from clients.intrusion import Intrusion
from clients.part_trainer import PartTrainer
from clients.parts import blank
from leakbed.defending import TrainingStep
from leakbed.events import Array, Arrays
from leakbed.mods import refuse_update_mods
from leakbed.tensors import finite, view
from leakbed.wire.alarms import Alarms, pack_stop
from leakbed.wire.head_messages import BackwardReply
from leakbed.wire.messages import EvaluateRequest, SplitReply, SplitRequest
from leakbed.wire.records import ROUND

_PENDING = "leakbed.pending"


class BottomTrainer(PartTrainer):
    """One node's bottom in training, with the smashed batch that waits for its gradient."""

    def __init__(self, cell: Cell, intrusion: Intrusion | None = None) -> None:
        """Make the trainer; its weights must be loaded before it is used.

        Args:
            cell: The node's.
            intrusion: The intruder at this node.
        """
        super().__init__(cell, "bottom", intrusion=intrusion)
        self._pending: tuple[tuple[int, int], Tensor] | None = None
        self._guard = Guard.of(cell)

    @property
    def alarms(self) -> Alarms | None:
        """What the node's detectors found so far; None where it has none."""
        return None if self._guard is None else self._guard.alarms or None

    @property
    def stopped_by(self) -> str | None:
        """The detector whose alarm ended the node's training; None while it goes on."""
        return None if self._guard is None else self._guard.stopped_by

    def forward(self, round_: int, step: int) -> Float[Tensor, " batch *cut"]:
        """Return the smashed batch of a step, and keep its graph for the gradient."""
        smashed = self.output(self.images(round_, step), role=f"forward/{round_}/{step}")
        self._pending = (round_, step), smashed
        return smashed.detach()

    def backward(self, gradient: Array, *, round_: int, step: int) -> None:
        """Fill the bottom's gradients from that of the pending smashed batch.

        Defences of the training step see it and add their penalties. A batch sent to probe the
        server, or one whose gradient ended the training, leaves no gradient to learn from.

        Args:
            gradient: dL/d(smashed), from the server.
            round_: The round of the batch it is for.
            step: Its step.

        Raises:
            OutOfStepError: If it is not this smashed batch that waits for a gradient.
        """
        place, pending = self._pending or ((0, 0), torch.empty(0))
        received = view(gradient)
        if place != (round_, step) or received.shape != pending.shape:
            raise OutOfStepError(
                f"a gradient of shape {gradient.shape} came for round {round_}, step {step}, but "
                f"{place} with shape {tuple(pending.shape)} is what waits for one; a message was "
                "lost, repeated or changed"
            )
        self.optimiser.zero_grad()
        if self._intrusion is not None:
            self._intrusion.learn(pending, received.to(self._device), self.optimiser)
        elif self._guard is None:
            pending.backward(received.to(self._device))
        else:
            self._backward_guarded(self._guard, pending, received, place=place)
        self._pending = None

    def gradients(self) -> Arrays:
        """Return copies of the bottom's gradients by parameter name; zero where there is none."""
        return {
            name: (torch.zeros_like(p) if p.grad is None else p.grad).cpu().numpy().copy()
            for name, p in self.module.named_parameters()
        }

    def labels(self, round_: int, step: int) -> Array:
        """Return the labels to send with a step's batch; call it once per batch."""
        labels = self.labels_of(round_, step)
        return (labels if self._guard is None else self._guard.labels(labels)).numpy()

    def load(self, arrays: Arrays) -> None:
        """Take weights and buffers as every part does, and drop the batch that waits.

        Args:
            arrays: All of them, or some.
        """
        self._pending = None
        super().load(arrays)

    def store(self, context: Context) -> None:
        """Write what every part does, and the state of the defences, into the node's state."""
        super().store(context)
        if self._guard is not None:
            self._guard.store(context)
        if self._intrusion is not None:
            self._intrusion.store(context)

    def restore(self, context: Context) -> bool:
        """Take from the node's state what :meth:`store` wrote; defences begin if there is none.

        Args:
            context: The node's.

        Returns:
            Whether there were weights.
        """
        if self._guard is not None:
            self._guard.restore(context)
        return super().restore(context)

    def _backward_guarded(
        self, guard: Guard, pending: Tensor, received: Tensor, *, place: tuple[int, int]
    ) -> None:
        rows = self.batch(*place)
        images = self._images.index_select(0, rows).to(self._device)
        penalty = guard.penalty(images, pending)
        pending.backward(received.to(self._device), retain_graph=penalty is not None)
        probing = guard.probing
        seen = TrainingStep(
            cut_gradient=received,
            labels=self._labels.index_select(0, rows),
            first_gradient=self._first_gradient(),
        )
        guard.inspect(seen)
        if probing or guard.stopped_by is not None:
            self.optimiser.zero_grad()
        elif penalty is not None:
            penalty.backward()

    def _first_gradient(self) -> Tensor:
        """Return a copy of the gradient of the bottom's first weights."""
        weights = [p for p in self.module.parameters() if p.requires_grad]
        first = next((p for p in weights if p.ndim > 1), weights[0])
        gradient = torch.zeros_like(first) if first.grad is None else first.grad
        return gradient.detach().cpu().clone()


def register(app: ClientApp) -> None:
    """Register the handlers of a split step, of a backward pass alone and of a split evaluation.

    Args:
        app: The node's app.
    """
    refuse_update_mods(app)

    @app.train("split")
    def step(message: Message, context: Context) -> Message:
        request = SplitRequest.of(message)
        cell = Cell.of(context)
        trainer = _trainer(cell, context, request)
        if request.gradient is not None:
            trainer.backward(request.gradient, round_=request.round, step=request.step - 1)
            trainer.optimiser.step()
        return Message(_answer(cell, trainer, context, request), reply_to=message)

    @app.train("backward")
    def backward(message: Message, context: Context) -> Message:
        request = SplitRequest.of(message)
        if request.gradient is None:
            raise OutOfStepError("train.backward needs the cut gradient of the pending batch")
        trainer = _trainer(Cell.of(context), context, request)
        trainer.backward(request.gradient, round_=request.round, step=request.step)
        return Message(_gradients(trainer, context, request), reply_to=message)

    @app.evaluate("split")
    def evaluate(message: Message, context: Context) -> Message:
        request = EvaluateRequest.of(message)
        cell = Cell.of(context)
        device = cell.torch_device()
        bottom = blank(cell.architecture, "bottom", device).eval()
        bottom.load_state_dict({name: view(request.bottom[name]) for name in bottom.state_dict()})
        images = cell.test_images(request.start, request.stop)
        with torch.no_grad():
            smashed = bottom(images.to(device)).cpu().numpy()
        reply = SplitReply(steps=0, examples=len(images), step=request.start, smashed=smashed)
        return Message(reply.records(), reply_to=message)


def _answer(
    cell: Cell, trainer: BottomTrainer, context: Context, request: SplitRequest
) -> RecordDict:
    """Return the next smashed batch, or the bottom when the round is over; store the state."""
    if trainer.stopped_by is not None:
        return _refusal(trainer, context)
    steps, examples = trainer.steps(request.round)
    closing = request.step == steps
    memory = live(context)
    shared, at_server = cell.plan.labels == "shared", cell.plan.labels == "server"
    # Before anything is stored: defences of labels note what they sent.
    labels = trainer.labels(request.round, request.step) if shared and not closing else None
    if closing or memory is None:
        _store(trainer, context, pending=None if closing else request)
    if closing:
        bottom = {**trainer.arrays(), **head.arrays(cell, context)}
        for array in bottom.values():
            _check_finite(cell, request, "its bottom", view(array))
        if memory is not None:
            memory.clear()
        reply = SplitReply(
            steps=steps,
            examples=examples,
            step=request.step,
            bottom=bottom,
            bottoms=cell.plan.bottoms,
            alarms=trainer.alarms,
        )
        return reply.records()
    smashed = trainer.forward(request.round, request.step).cpu()
    _check_finite(cell, request, "its smashed data", smashed)
    head.expect(cell, context, round_=request.round, step=request.step)
    return SplitReply(
        steps=steps,
        examples=examples,
        step=request.step,
        smashed=smashed.numpy(),
        labels=labels,
        rows=trainer.batch(request.round, request.step).numpy() if at_server else None,
    ).records()


def _gradients(trainer: BottomTrainer, context: Context, request: SplitRequest) -> RecordDict:
    """Return the bottom's gradient instead of a step; store the state."""
    if trainer.stopped_by is not None:
        return _refusal(trainer, context)
    if live(context) is None:
        _store(trainer, context, pending=None)
    return BackwardReply(step=request.step, gradient=trainer.gradients()).records()


def _refusal(trainer: BottomTrainer, context: Context) -> RecordDict:
    """Return the answer of a node that trains no further; its state says so from then on."""
    _store(trainer, context, pending=None)
    return pack_stop(str(trainer.stopped_by), trainer.alarms or {})


def _trainer(cell: Cell, context: Context, request: SplitRequest) -> BottomTrainer:
    """Return the node's trainer with the weights to go on from, kept in memory or rebuilt."""
    memory = live(context)
    kept: BottomTrainer | None = None if memory is None else memory.get("bottom")
    trainer = kept or _rebuilt(cell, context, request)
    if request.bottom is not None:
        trainer.load(request.bottom)
        head.load(cell, context, request.bottom)
    if request.step == 0 and cell.plan.optimizer_state == "fresh":
        trainer.forget()
    if memory is not None:
        memory["bottom"] = trainer
    return trainer


def _rebuilt(cell: Cell, context: Context, request: SplitRequest) -> BottomTrainer:
    """Return a trainer made from the node's state, its pending forward pass repeated."""
    trainer = BottomTrainer(cell, Intrusion.at(cell, context))
    pending = context.state.config_records.get(_PENDING)
    if not trainer.restore(context) and request.bottom is None:
        raise OutOfStepError(f"node {cell.partition} was sent no bottom and holds none")
    if request.gradient is not None and pending:
        trainer.forward(int(str(pending[ROUND])), int(str(pending["step"])))
    return trainer


def _store(trainer: BottomTrainer, context: Context, *, pending: SplitRequest | None) -> None:
    trainer.store(context)
    place = {} if pending is None else {ROUND: pending.round, "step": pending.step}
    context.state[_PENDING] = ConfigRecord(place)  # type: ignore[arg-type]  dict is invariant


def _check_finite(cell: Cell, request: SplitRequest, what: str, tensor: Tensor) -> None:
    """Refuse to send values that are not finite."""
    if not finite(tensor):
        raise UnstableTrainingError(
            f"training at node {cell.partition} left the finite numbers ({what}) in round "
            f"{request.round}, step {request.step}; lower protocol.learning_rate"
        )
