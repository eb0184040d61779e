"""A malicious client at a node: what it shows the node's parts, and what it learns from them.

An intrusion stays with the node's trainers, in memory or in ``context.state``. Per batch it hands
them the intruder's images and labels in place of the node's own, keeps them from learning where it
is not their turn, and gives the intruder the gradient of its images.
"""

from contextlib import AbstractContextManager

import torch
from flwr.app import ConfigRecord, Context, Message, MetricRecord, RecordDict
from flwr.clientapp import ClientApp
from jaxtyping import Float, Int
from torch import Tensor, nn
from torch.optim import Optimizer

from attacks import INTRUDERS
from clients.node import NodeConfig, OutOfStepError
from leakbed.contracts.attack import CraftedBatch, MaliciousClient, MaliciousClientState, NodeView
from leakbed.node_memory import live
from leakbed.plugins import picked
from leakbed.seeds import derive, scoped
from leakbed.wire.records import METRICS, config_of, int_field, pack, unpack

_KEY, _TENSORS = "leakbed.intruder", "leakbed.intruder.tensors"


def intruder_of(cell: NodeConfig) -> MaliciousClient | None:
    """Return the malicious client that a node is, with its settings; None for an honest node."""
    if cell.intruder is None:
        return None
    name, settings = cell.intruder
    made: MaliciousClient = picked(name, INTRUDERS, "attack")(**settings)
    return made


def begun(intruder: MaliciousClient, view: NodeView, *, seed: int) -> MaliciousClientState:
    """Let an intruder begin; global generators are seeded from its stream and put back."""
    with scoped(derive(seed, "global/begin")):
        return intruder.begin(view, seed=seed)


def view_of(cell: NodeConfig) -> NodeView:
    """Return what the intruder of a node knows of it beforehand."""
    return NodeView(
        image_shape=cell.architecture.image_shape,
        num_classes=cell.data.num_classes,
        outputs=cell.architecture.num_classes,
        device=cell.torch_device(),
    )


def unlabelling(intruder: MaliciousClient, labels: str) -> str | None:
    """Say why an intruder cannot choose its labels, or the size of its gradient, in a split.

    Args:
        intruder: With its settings.
        labels: The value of ``protocol.labels``.

    Returns:
        What does not fit and what would; None where it can.
    """
    if labels == "server":
        return (
            f"{intruder.name} chooses the labels of its batches, but with protocol.labels = "
            "'server' the server has them; use 'u-shaped', 'fedavg', or labels = 'shared'"
        )
    if labels == "shared" and intruder.scales:
        return (
            f"{intruder.name} shrinks the gradient of its own loss, but with protocol.labels = "
            "'shared' the server computes the loss; use 'u-shaped' or 'fedavg', or set epsilon = 1 "
            "to let the server learn from its batches"
        )
    return None


class MaliciousClientSession:
    """One intruder at work: its state, and the batch that waits for its gradient."""

    def __init__(
        self, intruder: MaliciousClient, view: NodeView, state: MaliciousClientState
    ) -> None:
        """Go on from a state."""
        self._intruder, self._view, self._state = intruder, view, state
        self._turn: CraftedBatch | None = None
        self._shown: Tensor | None = None

    @classmethod
    def at(cls, cell: NodeConfig, context: Context) -> "MaliciousClientSession | None":
        """Return a node's intrusion, kept, rebuilt or begun; None where the node is honest."""
        memory = live(context)
        if memory is not None and "intrusion" in memory:
            kept: MaliciousClientSession = memory["intrusion"]
            return kept
        found = cls.of(cell, context)
        if found is not None and memory is not None:
            memory["intrusion"] = found
        return found

    @classmethod
    def of(
        cls, cell: NodeConfig, context: Context | None = None
    ) -> "MaliciousClientSession | None":
        """Return a node's intrusion from its state, else begun; None where the node is honest."""
        if (intruder := intruder_of(cell)) is None:
            return None
        view = view_of(cell)
        state = None if context is None else _load(context, view)
        return cls(intruder, view, state or begun(intruder, view, seed=cell.intruder_stream))

    def store(self, context: Context) -> None:
        """Write the intruder's state into the node's."""
        state = self._state
        context.state[_KEY] = ConfigRecord({"stream": state.stream, "turns": state.turns})
        tensors = {k: v.detach().cpu().numpy() for k, v in state.tensors.items()}
        context.state[_TENSORS] = pack(tensors)

    def turn(self, rows: int) -> CraftedBatch:
        """Return what the batch at hand is to be.

        Args:
            rows: Its size.

        Returns:
            The same until something is learned from it.
        """
        if self._turn is None:
            with self._scoped("turn"):
                self._turn = self._intruder.turn(self._view, self._state, rows=rows)
            made = self._turn.images
            self._shown = None if made is None else made.detach().requires_grad_()
        return self._turn

    def images(self, rows: int) -> Float[Tensor, " batch *image"] | None:
        """Return the images to show the bottom, as a leaf; None for the node's own."""
        self.turn(rows)
        return self._shown

    @property
    def freezes(self) -> bool:
        """Whether the node's parts must not learn from the batch at hand."""
        return self._turn is not None and not self._turn.trains

    def scaled(self, gradient: Float[Tensor, " batch *upper"]) -> Float[Tensor, " batch *upper"]:
        """Return a gradient as the node sends it up for the batch at hand."""
        return gradient if self._turn is None else gradient * self._turn.scale

    def learn(self, smashed: Tensor, gradient: Tensor, optimiser: Optimizer) -> None:
        """Fill the bottom's gradients unless it is frozen, and let the intruder learn from its own.

        Args:
            smashed: Of the batch at hand, with its graph.
            gradient: dL/d(smashed) as received, on the device of both.
            optimiser: Of the bottom.
        """
        turn = self.turn(len(smashed))
        smashed.backward(gradient / turn.scale)
        if not turn.trains:
            optimiser.zero_grad()
        self._learn(None if self._shown is None else self._shown.grad)

    def local_batch(
        self, model: nn.Module, rows: int
    ) -> tuple[Float[Tensor, " batch *image"], Int[Tensor, " batch"]] | None:
        """Return the batch that a whole model is to train on next.

        Turns at which the model does not train cost no step here: the intruder takes them first,
        against the model as it stands.

        Args:
            model: With the weights it has by now; left as it is.
            rows: Size of the batch.

        Returns:
            Images and labels; None for the node's own.
        """
        model.eval()
        while not self.turn(rows).trains:
            self._learn(self._local_gradient(model, rows))
        model.train()
        turn = self.turn(rows)
        self._learn(None)
        if turn.images is None or turn.labels is None:
            return None
        return turn.images.detach(), turn.labels

    def train_offline(self, model: nn.Module, *, turns: int, rows: int) -> None:
        """Take turns against a whole model that never trains.

        Args:
            model: Put into evaluation, and otherwise left as it is.
            turns: How many.
            rows: Size of each batch.
        """
        model.eval()
        for _ in range(turns):
            frozen = not self.turn(rows).trains
            self._learn(self._local_gradient(model, rows) if frozen else None)

    def labels(self, rows: int) -> Int[Tensor, " batch"] | None:
        """Return the labels of the batch at hand; None for the node's own."""
        return self.turn(rows).labels

    def samples(self, count: int) -> Float[Tensor, " count *image"]:
        """Return the intruder's samples of its aim."""
        with self._scoped("samples"):
            return self._intruder.samples(self._view, self._state, count=count)

    @property
    def turns(self) -> int:
        """Batches the intruder has had."""
        return self._state.turns

    def _local_gradient(self, model: nn.Module, rows: int) -> Tensor | None:
        """Return what the loss of a whole model says of the images at hand."""
        images, labels = self.images(rows), self.labels(rows)
        if images is None or labels is None:
            return None
        loss = nn.functional.cross_entropy(model(images), labels.to(images.device))
        (gradient,) = torch.autograd.grad(loss, [images])
        return gradient

    def _scoped(self, what: str) -> AbstractContextManager[None]:
        """Seed the global generators for one call of the intruder from its stream and its turn."""
        return scoped(derive(self._state.stream, f"global/{what}/{self._state.turns}"))

    def _learn(self, gradient: Tensor | None) -> None:
        if self._turn is None:
            raise OutOfStepError("an intruder learns from a batch that it chose; there is none")
        with self._scoped("learn"):
            self._state = self._intruder.learn(self._state, self._turn, gradient)
        self._turn = self._shown = None


def register(app: ClientApp) -> None:
    """Register the harness's query for an intruder's samples."""

    @app.query("samples")
    def samples(message: Message, context: Context) -> Message:
        cell = NodeConfig.of(context)
        intrusion = MaliciousClientSession.of(cell, context)
        if intrusion is None:
            raise OutOfStepError(f"node {cell.partition} is honest: it has no samples to show")
        images = intrusion.samples(int_field(message, config_of(message), "count"))
        records = RecordDict(
            {
                "arrays": pack({"images": images.cpu().numpy()}),
                METRICS: MetricRecord({"turns": intrusion.turns}),
            }
        )
        return Message(records, reply_to=message)


def _load(context: Context, view: NodeView) -> MaliciousClientState | None:
    """Return what :meth:`MaliciousClientSession.store` wrote, if it ever did."""
    if (numbers := context.state.config_records.get(_KEY)) is None:
        return None
    arrays = unpack(context.state.array_records[_TENSORS])
    return MaliciousClientState(
        stream=int(str(numbers["stream"])),
        turns=int(str(numbers["turns"])),
        tensors={name: torch.as_tensor(value).to(view.device) for name, value in arrays.items()},
    )
