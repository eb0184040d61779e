"""What a node is told of its cell, and what it keeps between messages.

The harness sends each node one ``query.setup`` before a cell starts. It says which model, data and
protocol to use and gives the node its own streams; it resets everything the node kept before.
"""

import json
from collections.abc import Mapping
from dataclasses import asdict, dataclass, field
from functools import lru_cache
from typing import Any

import torch
from flwr.app import ConfigRecord, Context, Message, MetricRecord, RecordDict
from flwr.clientapp import ClientApp
from flwr.clientapp.typing import ClientAppCallable
from jaxtyping import Float, Int
from torch import Tensor

from defenses import DEFENSES
from leakbed.contracts import Defense, Protects
from leakbed.data.recipe import DataRecipe
from leakbed.models import Architecture, resolve_device
from leakbed.naming import unknown
from leakbed.order import batches
from leakbed.seeds import derive

_CELL = "leakbed.cell"
_LEGAL = {
    "optimizer": ("sgd", "adam"),
    "labels": ("shared", "server", "client"),
    "bottoms": ("sealed", "relayed"),
    "optimizer_state": ("kept", "fresh"),
}


class NoCellError(RuntimeError):
    """A node was asked to train before it was told its cell."""


class OutOfStepError(RuntimeError):
    """A message that does not follow the ones before it."""


class UnstableTrainingError(RuntimeError):
    """Training at a node produced values that are not finite."""


@dataclass(frozen=True, kw_only=True)
class TrainingPlan:
    """How a node trains in one round.

    Attributes:
        batch_size: Samples per step.
        local_steps: Steps per round; None for one pass over the node's data.
        optimizer: ``"sgd"`` or ``"adam"``.
        learning_rate: Its step size.
        momentum: SGD's momentum.
        weight_decay: L2 penalty of either optimiser.
        labels: Who has the labels: ``"shared"``, ``"server"`` or ``"client"``.
        bottoms: ``"sealed"`` or ``"relayed"``.
        optimizer_state: Whether split protocols keep momenta from round to round: ``"kept"`` or
            ``"fresh"``. FedAvg's nodes always start afresh.
    """

    batch_size: int
    local_steps: int | None
    optimizer: str = "sgd"
    learning_rate: float = 0.01
    momentum: float = 0.0
    weight_decay: float = 0.0
    labels: str = "shared"
    bottoms: str = "sealed"
    optimizer_state: str = "kept"

    def __post_init__(self) -> None:
        """Check the settings that have names.

        Raises:
            ValueError: If one is not legal; names the nearest that is.
        """
        for setting, legal in _LEGAL.items():
            if (value := getattr(self, setting)) not in legal:
                raise ValueError(unknown(setting, value, legal))

    def optimiser(self, parameters: Any) -> torch.optim.Optimizer:  # noqa: ANN401  torch's own type
        """Return a fresh optimiser over the parameters."""
        if self.optimizer == "adam":
            return torch.optim.Adam(
                parameters, lr=self.learning_rate, weight_decay=self.weight_decay
            )
        return torch.optim.SGD(
            parameters,
            lr=self.learning_rate,
            momentum=self.momentum,
            weight_decay=self.weight_decay,
        )


@dataclass(frozen=True, kw_only=True)
class Cell:
    """One node's cell.

    Attributes:
        data: What the node's rows are a function of.
        architecture: The network; its ``cut`` parts it, where the protocol does.
        plan: How the node trains.
        partition: Which node this is.
        stream: The node's own stream.
        defence_stream: The stream of its defences.
        defenses: Name and settings of each defence, in order.
        device: As for :func:`leakbed.models.resolve_device`.
        order_stream: The stream that orders the batches, where nodes share one; None takes the
            node's own.
        intruder: Name and settings of the malicious client that the node is; None for an honest
            node.
        intruder_stream: The intruder's own stream.
    """

    data: DataRecipe
    architecture: Architecture
    plan: TrainingPlan
    partition: int
    stream: int
    defence_stream: int
    defenses: tuple[tuple[str, Mapping[str, Any]], ...] = field(default=())
    device: str = "auto"
    order_stream: int | None = None
    intruder: tuple[str, Mapping[str, Any]] | None = None
    intruder_stream: int = 0

    def record(self) -> ConfigRecord:
        """Return the cell as a Flower record."""
        return ConfigRecord({"json": json.dumps(asdict(self))})

    @classmethod
    def of(cls, context: Context) -> "Cell":
        """Return the cell a node was set up for.

        Args:
            context: The node's.

        Returns:
            Its cell.

        Raises:
            NoCellError: If no setup message came before.
        """
        record = context.state.get(_CELL)
        if not isinstance(record, ConfigRecord):
            raise NoCellError("no query.setup before this message; the harness sends it first")
        return _parsed(str(record["json"]))

    def rows(self) -> tuple[Float[Tensor, " rows *image"], Int[Tensor, " rows"]]:
        """Return the node's private images and labels."""
        return _rows(self.data, self.partition)

    def test_images(self, start: int, stop: int) -> Float[Tensor, " rows *image"]:
        """Return some of the held-out images, in test order, as far as this node sees them."""
        images = self.data.dataset().images[self.data.split().test[start:stop]]
        return self.data.seen_by(images, self.partition)

    def test_labels(self, start: int, stop: int) -> Int[Tensor, " rows"]:
        """Return some of the held-out labels, in test order."""
        return self.data.dataset().labels[self.data.split().test[start:stop]]

    def batches(self, round_: int, rows: int) -> list[Int[Tensor, " batch"]]:
        """Return this round's batches, as indices into the node's rows."""
        return batches(
            self.stream if self.order_stream is None else self.order_stream,
            round_=round_,
            rows=rows,
            batch_size=self.plan.batch_size,
            steps=self.plan.local_steps,
        )

    def training_rows(self) -> tuple[Float[Tensor, " rows *image"], Int[Tensor, " rows"]]:
        """Return the node's images, and the labels it trains with: as defences noised them.

        The noise is drawn once: every call returns the same labels.
        """
        images, labels = self.rows()
        classes = len(self.data.dataset().classes)  # a network may have outputs that no label uses
        for index, defence in enumerate(self.chosen_defenses()):
            stream = derive(self.defence_stream, f"labels/{index}")
            labels = defence.noised_labels(stream, labels, classes=classes)
        return images, labels

    def chosen_defenses(self) -> tuple[Defense, ...]:
        """Return all of the node's defences, those of its training step among them."""
        return tuple(DEFENSES[name](**settings) for name, settings in self.defenses)

    def torch_device(self) -> torch.device:
        """Return where this node computes."""
        return resolve_device(self.device)


@lru_cache(maxsize=64)
def _parsed(text: str) -> Cell:
    fields = json.loads(text)
    data, model = fields.pop("data"), fields.pop("architecture")
    data["partition_settings"] = tuple(map(tuple, data["partition_settings"]))
    model["image_shape"] = tuple(model["image_shape"])
    intruder = fields.pop("intruder")
    return Cell(
        data=DataRecipe(**data),
        architecture=Architecture(**model),
        plan=TrainingPlan(**fields.pop("plan")),
        defenses=tuple(map(tuple, fields.pop("defenses"))),
        intruder=None if intruder is None else tuple(intruder),
        **fields,
    )


@lru_cache(maxsize=64)
def _rows(
    data: DataRecipe, partition: int
) -> tuple[Float[Tensor, " rows *image"], Int[Tensor, " rows"]]:
    return data.rows_of(partition)


def cell_defenses(context: Context) -> tuple[tuple[Defense, ...], int]:
    """Return a node's defences of what a mod sees, and their stream; none before it is set up."""
    if _CELL not in context.state:
        return (), 0
    cell = Cell.of(context)
    chosen = cell.chosen_defenses()
    messages = {Protects.UPDATE, Protects.SMASHED}
    return tuple(d for d in chosen if d.protects & messages), cell.defence_stream


def one_torch_thread(message: Message, context: Context, call_next: ClientAppCallable) -> Message:
    """Run a handler on one torch thread, which fixes the order of every sum.

    At every message, since OpenMP counts its threads anew in each thread that Python starts.

    Args:
        message: For the handler.
        context: The node's.
        call_next: The handler.

    Returns:
        Its reply.
    """
    torch.set_num_threads(1)
    return call_next(message, context)


def live(context: Context) -> dict[str, Any] | None:
    """Return what a sticky context keeps in memory, or None on Flower's own runtimes."""
    memory: dict[str, Any] | None = getattr(context, "live", None)
    return memory


def register(app: ClientApp) -> None:
    """Register the harness's two queries.

    Args:
        app: The node's app.
    """

    @app.query("roster")
    def roster(message: Message, context: Context) -> Message:
        partition = ConfigRecord({"partition": int(context.node_config["partition-id"])})
        return Message(RecordDict({"roster": partition}), reply_to=message)

    @app.query("setup")
    def setup(message: Message, context: Context) -> Message:
        """Forget everything, take the new cell, and prove that its batches can be had."""
        for key in list(context.state):
            del context.state[key]
        if (memory := live(context)) is not None:
            memory.clear()
        context.state[_CELL] = message.content.config_records["cell"]
        cell = Cell.of(context)
        _, labels = cell.rows()
        cell.batches(1, len(labels))
        return Message(RecordDict({"ready": MetricRecord({"rows": len(labels)})}), reply_to=message)
