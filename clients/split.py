"""The node's side of split learning: the bottom, its optimiser and its place in the data.

On a sticky grid the trainer stays in memory between messages. On Flower's own runtimes any process
may serve any message, so the trainer is rebuilt from ``context.state``: the weights, buffers and
optimiser from before the pending forward pass, which is repeated with the same batch and the same
random state (so that BatchNorm counts each batch once). Both ways give the same numbers.
"""

from collections.abc import Mapping
from typing import Any

import numpy as np
import torch
from flwr.app import ConfigRecord, Context, Message, RecordDict
from flwr.clientapp import ClientApp
from jaxtyping import Float
from torch import Tensor

from clients.cell import Cell, UnstableTrainingError, live
from leakbed.events import Array, Arrays
from leakbed.seeds import derive, scoped
from leakbed.wire.messages import EvaluateRequest, SplitReply, SplitRequest
from leakbed.wire.records import ROUND, pack, unpack

_BOTTOM, _OPTIMISER = "leakbed.bottom", "leakbed.optimiser"
_PENDING = "leakbed.pending"


class OutOfStepError(RuntimeError):
    """A message that does not follow the ones before it."""


class BottomTrainer:
    """One node's bottom in training; a plain object, rebuilt or kept, never shared."""

    def __init__(self, cell: Cell) -> None:
        """Make the trainer; its weights must be loaded before it is used.

        Args:
            cell: The node's.
        """
        self._cell = cell
        self._device = cell.torch_device()
        self.bottom = cell.architecture.bottom(0).to(self._device).train()
        self._images, self._labels = cell.rows()
        self._optimiser = cell.plan.optimiser(self.bottom.parameters())
        self._batches: dict[int, list[Tensor]] = {}
        self._pending: tuple[tuple[int, int], Tensor] | None = None

    def batch(self, round_: int, step: int) -> Tensor:
        """Return the node's rows of one step."""
        if round_ not in self._batches:
            self._batches = {round_: self._cell.batches(round_, len(self._images))}
        return self._batches[round_][step]

    def steps(self, round_: int) -> tuple[int, int]:
        """Return how many steps and samples a round has at this node."""
        self.batch(round_, 0)
        return len(self._batches[round_]), sum(map(len, self._batches[round_]))

    def forward(self, round_: int, step: int) -> Float[Tensor, " batch *cut"]:
        """Return the smashed batch of a step, and keep its graph for the gradient."""
        images = self._images[self.batch(round_, step)].to(self._device)
        with scoped(derive(self._cell.stream, f"forward/{round_}/{step}")):
            smashed: Tensor = self.bottom(images)
        self._pending = (round_, step), smashed
        return smashed.detach()

    def backward(self, gradient: Array, *, round_: int, step: int) -> None:
        """Take one optimiser step with the gradient of the pending smashed batch.

        Args:
            gradient: dL/d(smashed), from the server.
            round_: The round of the batch it is for.
            step: Its step.

        Raises:
            OutOfStepError: If it is not this smashed batch that waits for a gradient.
        """
        place, pending = self._pending or ((0, 0), torch.empty(0))
        if place != (round_, step) or gradient.shape != pending.shape:
            raise OutOfStepError(
                f"a gradient of shape {gradient.shape} came for round {round_}, step {step}, but "
                f"{place} with shape {tuple(pending.shape)} is what waits for one; a message was "
                "lost, repeated or changed"
            )
        self._optimiser.zero_grad()
        pending.backward(torch.from_numpy(gradient).to(self._device))
        self._optimiser.step()
        self._pending = None

    def labels(self, round_: int, step: int) -> Array:
        """Return the labels of a step's batch."""
        return self._labels[self.batch(round_, step)].numpy()

    def load_bottom(self, arrays: Arrays) -> None:
        """Take weights and buffers from the wire or from the node's state; drop what waits."""
        self._pending = None
        self.bottom.load_state_dict({k: torch.from_numpy(v) for k, v in arrays.items()})

    def bottom_arrays(self) -> Arrays:
        """Return copies of the weights and buffers."""
        return {k: v.detach().cpu().numpy().copy() for k, v in self.bottom.state_dict().items()}

    def load_optimiser(self, arrays: Arrays) -> None:
        """Take momenta and step counts from the node's state."""
        state: dict[int, dict[str, Tensor]] = {}
        for key, value in arrays.items():
            index, _, name = key.partition("/")
            state.setdefault(int(index), {})[name] = torch.from_numpy(value)
        groups = self._optimiser.state_dict()["param_groups"]
        self._optimiser.load_state_dict({"state": state, "param_groups": groups})

    def optimiser_arrays(self) -> Arrays:
        """Return copies of momenta and step counts, by ``parameter/name``."""
        state: Mapping[int, Mapping[str, Any]] = self._optimiser.state_dict()["state"]
        return {
            f"{index}/{name}": value.detach().cpu().numpy().copy()
            for index, values in state.items()
            for name, value in values.items()
            if isinstance(value, Tensor)
        }


def register(app: ClientApp) -> None:
    """Register the handlers of a split step and of a split evaluation.

    Args:
        app: The node's app.
    """

    @app.train("split")
    def step(message: Message, context: Context) -> Message:
        request = SplitRequest.of(message)
        cell = Cell.of(context)
        trainer = _trainer(cell, context, request)
        if request.gradient is not None:
            trainer.backward(request.gradient, round_=request.round, step=request.step - 1)
        return Message(_answer(cell, trainer, context, request), reply_to=message)

    @app.evaluate("split")
    def evaluate(message: Message, context: Context) -> Message:
        request = EvaluateRequest.of(message)
        cell = Cell.of(context)
        device = cell.torch_device()
        bottom = cell.architecture.bottom(0).to(device).eval()
        bottom.load_state_dict({k: torch.from_numpy(v) for k, v in request.bottom.items()})
        images = cell.test_images(request.start, request.stop)
        with torch.no_grad():
            smashed = bottom(images.to(device)).cpu().numpy()
        reply = SplitReply(steps=0, examples=len(images), smashed=smashed)
        return Message(reply.records(), reply_to=message)


def _answer(
    cell: Cell, trainer: BottomTrainer, context: Context, request: SplitRequest
) -> RecordDict:
    """Return the next smashed batch, or the bottom when the round is over; store the state."""
    steps, examples = trainer.steps(request.round)
    closing = request.step == steps
    if closing or live(context) is None:
        _store(trainer, context, pending=None if closing else request)
    if closing:
        bottom = trainer.bottom_arrays()
        _check_finite(cell, request, "its bottom", bottom)
        reply = SplitReply(steps=steps, examples=examples, bottom=bottom, bottoms=cell.plan.bottoms)
        return reply.records()
    batch = trainer.batch(request.round, request.step)
    smashed = trainer.forward(request.round, request.step).cpu().numpy()
    _check_finite(cell, request, "its smashed data", {"smashed": smashed})
    return SplitReply(
        steps=steps,
        examples=examples,
        smashed=smashed,
        labels=trainer.labels(request.round, request.step)
        if cell.plan.labels == "shared"
        else None,
        rows=batch.numpy() if cell.plan.labels == "server" else None,
    ).records()


def _trainer(cell: Cell, context: Context, request: SplitRequest) -> BottomTrainer:
    """Return the node's trainer with the weights to go on from, kept in memory or rebuilt."""
    memory = live(context)
    kept: BottomTrainer | None = None if memory is None else memory.get("bottom")
    trainer = kept or _rebuilt(cell, context, request)
    if request.bottom is not None:
        trainer.load_bottom(request.bottom)
    if memory is not None:
        memory["bottom"] = trainer
    return trainer


def _rebuilt(cell: Cell, context: Context, request: SplitRequest) -> BottomTrainer:
    """Return a trainer made from the node's state, its pending forward pass repeated."""
    trainer = BottomTrainer(cell)
    arrays, pending = context.state.array_records, context.state.config_records.get(_PENDING)
    if _OPTIMISER in arrays:
        trainer.load_optimiser(unpack(arrays[_OPTIMISER]))
    if _BOTTOM in arrays:
        trainer.load_bottom(unpack(arrays[_BOTTOM]))
    elif request.bottom is None:
        raise OutOfStepError(f"node {cell.partition} was sent no bottom and holds none")
    if request.gradient is not None and pending:
        trainer.forward(int(str(pending[ROUND])), int(str(pending["step"])))
    return trainer


def _store(trainer: BottomTrainer, context: Context, *, pending: SplitRequest | None) -> None:
    context.state[_BOTTOM] = pack(trainer.bottom_arrays())
    context.state[_OPTIMISER] = pack(trainer.optimiser_arrays())
    place = ConfigRecord()
    if pending is not None:
        place[ROUND], place["step"] = pending.round, pending.step
    context.state[_PENDING] = place


def _check_finite(cell: Cell, request: SplitRequest, what: str, arrays: Arrays) -> None:
    """Refuse to send values that are not finite."""
    if not all(np.isfinite(array).all() for array in arrays.values()):
        raise UnstableTrainingError(
            f"training at node {cell.partition} left the finite numbers ({what}) in round "
            f"{request.round}, step {request.step}; lower protocol.learning_rate"
        )
