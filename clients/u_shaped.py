"""The node's head in U-shaped split learning: the last layers, the loss and the labels.

The features of a batch come, the head computes the loss against labels that never leave the node,
takes its own optimiser step and answers with the gradient of the features; so nothing of a head's
batch must be kept between messages. On a sticky grid the head stays in memory within a round; on
Flower's own runtimes it is rebuilt from ``context.state``, as the bottom is.

Source: Vepakomma, Gupta, Swedish, Raskar. "Split learning for health: Distributed deep learning
without sharing raw patient data", 2018, https://arxiv.org/abs/1812.00564 (section 2.1).
"""

from collections import Counter

import numpy as np
import torch
from flwr.app import ConfigRecord, Context
from flwr.clientapp import ClientApp
from jaxtyping import Float, Shaped
from torch import Tensor, nn

from clients.malicious import MaliciousClientSession
from clients.node import NodeConfig, OutOfStepError, UnstableTrainingError
from clients.trainer import PartTrainer, arrays_of, blank, refuse_unfit
from leakbed.contracts import Protects, select
from leakbed.contracts.gradient_defenses import GradientDefenses, Origin
from leakbed.events import Array, Arrays
from leakbed.models import Architecture
from leakbed.node_memory import live, load_state, save_state
from leakbed.seeds import derive
from leakbed.tensors import as_tensor, finite, placed, predicted
from leakbed.tensors import load as load_weights
from leakbed.wire.calls import serve
from leakbed.wire.messages import (
    HEAD_EVALUATE,
    HEAD_STEP,
    HeadEvaluateReply,
    HeadEvaluateRequest,
    HeadReply,
    HeadRequest,
)
from leakbed.wire.records import ROUND, pack, unpack

_AWAITED = "leakbed.head-awaited"
_DEFENSE = "leakbed.head-defence"
_USED = "leakbed.head-defence-used"  # how often each row's gradient was sent


class HeadTrainer(PartTrainer):
    """One node's head in training."""

    def __init__(self, cell: NodeConfig, intrusion: MaliciousClientSession | None = None) -> None:
        """Make the trainer; its weights must be loaded before it is used."""
        super().__init__(cell, "head", intrusion=intrusion)
        chosen = select(cell.chosen_defenses(), Protects.CUT_GRADIENT)
        self._defenses = GradientDefenses(
            chosen, stream=derive(cell.defense_stream, "head"), protocol=f"node {cell.partition}"
        )

    def train(
        self, features: Shaped[Tensor, " batch *upper"], *, round_: int, step: int
    ) -> Float[Tensor, " batch *upper"]:
        """Take one optimiser step on a batch's features, unless it is an intruder's turn.

        Args:
            features: As received; never written to.
            round_: Server round, from 1.
            step: The batch's step.

        Returns:
            dL/d(features) on the CPU, with L the mean cross-entropy of the batch, times the scale
            of an intruder; as defences let it go.
        """
        received = placed(features, self._device).detach().requires_grad_()
        own = self.labels_of(round_, step)
        labels = placed(own, self._device)
        logits = self.output(received, role=f"head/{round_}/{step}")
        self.optimiser.zero_grad()
        nn.functional.cross_entropy(logits, labels).backward()
        if not self.frozen:
            self.optimiser.step()
        gradient = torch.zeros_like(received) if received.grad is None else received.grad
        if self._intrusion is not None:
            gradient = self._intrusion.scaled(gradient)
        origin = Origin(
            node=self._cell.partition,
            round=round_,
            step=step,
            rows=tuple(self.batch(round_, step).tolist()),
        )
        return self._defenses.protect(gradient.cpu(), own, origin)

    def store(self, context: Context) -> None:
        """Write what every part does, and the state of the defences, into the node's state."""
        super().store(context)
        for index, state in enumerate(self._defenses.states):
            save_state(context, f"{_DEFENSE}.{index}", state)
        for index, horizon in enumerate(self._defenses.horizons):
            if horizon.used:
                rows = [[key[1], times] for key, times in horizon.used.items()]
                context.state[f"{_USED}.{index}"] = pack({"rows": np.array(rows, np.int64)})

    def restore(self, context: Context) -> bool:
        """Take from the node's state what :meth:`store` wrote; say whether there were weights."""
        self._defenses.states = [
            load_state(context, f"{_DEFENSE}.{index}") or state
            for index, state in enumerate(self._defenses.states)
        ]
        for index, horizon in enumerate(self._defenses.horizons):
            if (kept := context.state.array_records.get(f"{_USED}.{index}")) is not None:
                pairs = unpack(kept)["rows"].tolist()
                horizon.used = Counter({(self._cell.partition, row): n for row, n in pairs})
        return super().restore(context)


def like(cell: NodeConfig, context: Context) -> Arrays:
    """Return arrays of the names, shapes and types of the head's; none where there is no head."""
    return {} if cell.architecture.upper_cut is None else arrays_of(_trainer(cell, context).module)


def load(cell: NodeConfig, context: Context, arrays: Arrays) -> None:
    """Take the head's weights from what the server passed on; nothing where there is no head."""
    if cell.architecture.upper_cut is None:
        return
    trainer = _trainer(cell, context)
    trainer.load(arrays)
    _keep(trainer, context)


def arrays(cell: NodeConfig, context: Context) -> Arrays:
    """Close the round: return copies of the head's weights and buffers, and store all it needs.

    Args:
        cell: The node's.
        context: The node's; keeps the head.

    Returns:
        By name; none where there is no head.
    """
    if cell.architecture.upper_cut is None:
        return {}
    _refuse_skipped(context)
    trainer = _trainer(cell, context)
    trainer.store(context)
    return trainer.arrays()


def expect(cell: NodeConfig, context: Context, *, round_: int, step: int) -> None:
    """Note in the node's state that a smashed batch was sent, whose features alone are awaited."""
    if cell.architecture.upper_cut is None:
        return
    if step > 0:
        _refuse_skipped(context)
    context.state[_AWAITED] = ConfigRecord({ROUND: round_, "step": step})


def register(app: ClientApp) -> None:
    """Register the handlers of a head's step and of its evaluation."""

    @serve(app, HEAD_STEP, HeadRequest)
    def step(request: HeadRequest, context: Context) -> HeadReply:
        cell = NodeConfig.of(context)
        trainer = _trainer(cell, context)
        features = _awaited(cell, context, request, trainer)
        if request.step == 0 and cell.plan.optimizer_state == "fresh":
            trainer.forget()
        gradient = trainer.train(features, round_=request.round, step=request.step)
        _check_finite(cell, request, "the gradient of its features", gradient)
        _keep(trainer, context)
        return HeadReply(step=request.step, gradient=gradient.numpy())

    @serve(app, HEAD_EVALUATE, HeadEvaluateRequest)
    def evaluate(request: HeadEvaluateRequest, context: Context) -> HeadEvaluateReply:
        cell = NodeConfig.of(context)
        device = cell.torch_device()
        head = blank(cell.architecture, "head", device).eval()
        own = {name: request.bottom[name] for name in head.state_dict() if name in request.bottom}
        refuse_unfit(cell, own, arrays_of(head))
        load_weights(head, own)
        labels = cell.test_labels(request.start, request.stop)
        features = _fitting(cell.architecture, request.features, rows=len(labels), head=head)
        with torch.no_grad():
            named = predicted(head(placed(features, device))).cpu()
        right = int((named == labels).sum())
        return HeadEvaluateReply(correct=right, examples=len(labels))


def _awaited(
    cell: NodeConfig, context: Context, request: HeadRequest, trainer: HeadTrainer
) -> Shaped[Tensor, " batch *upper"]:
    """Return a request's features, or say why they are not those of the batch that waits."""
    note = context.state.config_records.get(_AWAITED, ConfigRecord())
    if (note.get(ROUND), note.get("step")) != (request.round, request.step):
        waits = f"round {note[ROUND]!r}, step {note['step']!r} waits" if note else "no batch waits"
        raise OutOfStepError(
            f"features came for round {request.round}, step {request.step}, but {waits} for them; "
            "a message was lost, repeated or changed"
        )
    rows = len(trainer.batch(request.round, request.step))
    features = _fitting(cell.architecture, request.features, rows=rows, head=trainer.module)
    _check_finite(cell, request, "the features it was sent", features)
    del context.state[_AWAITED]
    return features


def _refuse_skipped(context: Context) -> None:
    """Refuse to go on from a batch whose features never came."""
    if note := context.state.config_records.get(_AWAITED):
        raise OutOfStepError(
            f"the features of round {note[ROUND]!r}, step {note['step']!r} never came, but the "
            "message after them did"
        )


def _fitting(
    architecture: Architecture, array: Array, *, rows: int, head: nn.Module
) -> Shaped[Tensor, " batch *upper"]:
    """Return features as a tensor, or refuse a shape or type that the head cannot read."""
    features = as_tensor(array)
    shape, dtype = (rows, *architecture.features_shape), next(head.parameters()).dtype
    if (tuple(features.shape), features.dtype) != (shape, dtype):
        raise OutOfStepError(
            f"features of shape {tuple(features.shape)} and type {features.dtype} came; the head "
            f"expects {shape} of {dtype}"
        )
    return features


def _trainer(cell: NodeConfig, context: Context) -> HeadTrainer:
    """Return the node's head, kept in memory or rebuilt from its state.

    One that nothing was ever loaded into has blank weights: :func:`load` comes before any step.
    """
    memory = live(context)
    if memory is not None and "head" in memory:
        kept: HeadTrainer = memory["head"]
        return kept
    trainer = HeadTrainer(cell, MaliciousClientSession.at(cell, context))
    trainer.restore(context)
    return trainer


def _keep(trainer: HeadTrainer, context: Context) -> None:
    """Keep the head for the next message, in memory where there is one."""
    memory = live(context)
    if memory is None:
        trainer.store(context)
    else:
        memory["head"] = trainer


def _check_finite(cell: NodeConfig, request: HeadRequest, what: str, tensor: Tensor) -> None:
    """Refuse to train on, or to send, values that are not finite."""
    if not finite(tensor):
        raise UnstableTrainingError(
            f"training at node {cell.partition} left the finite numbers ({what}) in round "
            f"{request.round}, step {request.step}; lower protocol.learning_rate"
        )
