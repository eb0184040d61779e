"""A node: the settings it is sent, what it keeps between messages, and the order of its batches.

The harness sends each node one ``query.setup`` before a cell starts. It says which model, data and
protocol to use and gives the node its own streams; it resets everything the node kept before.

The order in which a node goes through its data is a pure function of its stream. So the oracle
knows which private row each smashed row came from, and which rows lie behind an update, without
anything on the wire saying so.
"""

import json
from collections.abc import Mapping
from dataclasses import asdict, dataclass, field, replace
from functools import lru_cache
from math import ceil
from typing import Any

import torch
from flwr.app import ConfigRecord, Context, Message, MetricRecord, RecordDict
from flwr.clientapp import ClientApp
from jaxtyping import Float, Int
from torch import Tensor

from defenses import DEFENSES
from leakbed.contracts import Defense, Protects, select
from leakbed.contracts.hooks import refuse_uncalled
from leakbed.data.config import DataConfig
from leakbed.flower_internals import is_simulated
from leakbed.lookup import import_object, unknown_name
from leakbed.models import Architecture
from leakbed.node_memory import live
from leakbed.plugins import picked
from leakbed.provenance import RanOn, find_first
from leakbed.seeds import derive, generator
from leakbed.tensors import configure_torch, describe_device, resolve_device
from leakbed.wire.calls import before
from leakbed.wire.messages import RAN_ON


class BatchTooLargeError(ValueError):
    """A batch has more rows than the node that should fill it."""


def batches(
    stream: int, *, round_: int, rows: int, batch_size: int, steps: int | None
) -> list[Int[Tensor, " batch"]]:
    """Return the batches of one node in one round, as indices into the node's own rows.

    Every round starts a new pass over the data; a pass that runs out before ``steps`` batches are
    full is followed by another.

    Args:
        stream: The node's stream.
        round_: Server round, from 1.
        rows: How many rows the node has.
        batch_size: Rows in a batch.
        steps: How many full batches; None for one pass, whose last batch may be smaller.

    Returns:
        Indices from 0 to ``rows - 1``, one tensor per batch.

    Raises:
        BatchTooLargeError: If the node has fewer rows than a batch.
    """
    if batch_size > rows:
        raise BatchTooLargeError(
            f"batch_size is {batch_size} but a node has only {rows} samples; "
            f"set protocol.batch_size to at most {rows}, or fewer data.nodes"
        )
    needed = rows if steps is None else steps * batch_size
    passes = [
        torch.randperm(rows, generator=generator(derive(stream, f"order/{round_}/{index}")))
        for index in range(ceil(needed / rows))
    ]
    return list(torch.cat(passes)[:needed].split(batch_size))


def smallest_batch(*, rows: int, batch_size: int, steps: int | None) -> int:
    """Return how many rows the smallest of :func:`batches` has.

    Args:
        rows: How many rows the node has, at least ``batch_size``.
        batch_size: Rows in a batch.
        steps: How many full batches; None for one pass.

    Returns:
        ``batch_size``, or less where a pass does not end in a full batch.
    """
    return batch_size if steps is not None else rows % batch_size or batch_size


def straddles(*, rows: int, batch_size: int, steps: int | None) -> bool:
    """Return whether one of :func:`batches` holds rows of two passes, and so maybe one row twice.

    Args:
        rows: How many rows the node has, at least ``batch_size``.
        batch_size: Rows in a batch.
        steps: How many full batches; None for one pass.

    Returns:
        False where every pass ends with a batch.
    """
    ends = range(rows, (steps or 0) * batch_size, rows)
    return any(end % batch_size for end in ends)


_CELL = "leakbed.cell"


class NoCellError(RuntimeError):
    """A node was asked to train before it was told its cell."""


class OutOfStepError(RuntimeError):
    """A message that does not follow the ones before it."""


class UnlistedError(ValueError):
    """A server of a deployment named code or files that the node's operator does not list."""


class UnfitBottomError(RuntimeError):
    """Weights that a node was sent are not all it needs, or are none of its part's."""


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
        """Check the optimizer; what a protocol takes, its entry in the catalogue says.

        Raises:
            ValueError: If there is none of its name; names the nearest.
        """
        if self.optimizer not in {"sgd", "adam"}:
            raise ValueError(unknown_name("optimizer", self.optimizer, ("sgd", "adam")))

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
class NodeConfig:
    """One node's cell.

    Attributes:
        data: What the node's rows are a function of.
        architecture: The network; its ``cut`` parts it, where the protocol does.
        plan: How the node trains.
        partition: Which node this is.
        stream: The node's own stream.
        defense_stream: The stream of its defences.
        defenses: Name and settings of each defence, in order.
        device: As for :func:`leakbed.models.resolve_device`.
        order_stream: The stream that orders the batches, where nodes share one; None takes the
            node's own.
        intruder: Name and settings of the malicious client that the node is; None for an honest
            node.
        intruder_stream: The intruder's own stream.
        protocol: Import path of a protocol of one's own, whose module has the requests that the
            node answers; empty for the catalogue's.
    """

    data: DataConfig
    architecture: Architecture
    plan: TrainingPlan
    partition: int
    stream: int
    defense_stream: int
    defenses: tuple[tuple[str, Mapping[str, Any]], ...] = field(default=())
    device: str = "auto"
    order_stream: int | None = None
    intruder: tuple[str, Mapping[str, Any]] | None = None
    intruder_stream: int = 0
    protocol: str = ""

    def record(self) -> ConfigRecord:
        """Return the cell as a Flower record."""
        return ConfigRecord({"json": json.dumps(asdict(self))})

    @classmethod
    def of(cls, context: Context) -> "NodeConfig":
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
        for index, defense in enumerate(self.chosen_defenses()):
            stream = derive(self.defense_stream, f"labels/{index}")
            labels = defense.noised_labels(stream, labels, classes=self.data.num_classes)
        return images, labels

    def chosen_defenses(self) -> tuple[Defense, ...]:
        """Return all of the node's defences, those of its training step among them.

        One with a hook that nobody would call is a
        :class:`~leakbed.contracts.hooks.UncalledHookError`.
        """
        kinds = [picked(name, DEFENSES, "defence") for name, _ in self.defenses]
        for kind in kinds:
            refuse_uncalled(kind)
        return tuple(kind(**own) for kind, (_, own) in zip(kinds, self.defenses, strict=True))

    def plugins(self) -> tuple[str, ...]:
        """Return the names of its defences and of the intruder that it is."""
        acting = () if self.intruder is None else (self.intruder[0],)
        return (*(name for name, _ in self.defenses), *acting)

    def decided(self) -> "NodeConfig":
        """Return the same cell with ``"auto"`` replaced by the type of device that is there now.

        A GPU that vanishes later is then an error, and not a CPU that goes on in its place.
        """
        if self.device != "auto":
            return self
        return replace(self, device=self.torch_device().type)

    def torch_device(self) -> torch.device:
        """Return where this node computes; nodes are dealt over the GPUs that a process sees."""
        return resolve_device(self.device, turn=self.partition)


@lru_cache(maxsize=64)
def _parsed(text: str) -> NodeConfig:
    fields = json.loads(text)
    data, model = fields.pop("data"), fields.pop("architecture")
    for told, key in ((data, "partition_settings"), (data, "settings"), (model, "settings")):
        told[key] = tuple(map(tuple, told[key]))
    model["image_shape"] = tuple(model["image_shape"])
    intruder = fields.pop("intruder")
    return NodeConfig(
        data=DataConfig(**data),
        architecture=Architecture(**model),
        plan=TrainingPlan(**fields.pop("plan")),
        defenses=tuple(map(tuple, fields.pop("defenses"))),
        intruder=None if intruder is None else tuple(intruder),
        **fields,
    )


@lru_cache(maxsize=64)
def _rows(
    data: DataConfig, partition: int
) -> tuple[Float[Tensor, " rows *image"], Int[Tensor, " rows"]]:
    return data.rows_of(partition)


def cell_defenses(context: Context) -> tuple[tuple[Defense, ...], int]:
    """Return a node's defences of what a mod sees, and their stream; none before it is set up."""
    if _CELL not in context.state or not (cell := NodeConfig.of(context)).defenses:
        return (), 0
    chosen = select(cell.chosen_defenses(), Protects.UPDATE, Protects.SMASHED)
    return chosen, cell.defense_stream


@before
def one_torch_thread(context: Context) -> None:
    """Run a handler on one torch thread, which fixes the order of every sum.

    At every message, since OpenMP counts its threads anew in each thread that Python starts.
    """
    del context
    configure_torch()


@before
def own_code(context: Context) -> None:
    """Find the user's modules where the run config of a simulation says they are.

    Only there is the node the user's own: in a deployment, whoever runs the node chooses its path.
    """
    if is_simulated():
        find_first(context.run_config)


def own_protocol(context: Context) -> None:
    """Import the protocol of one's own whose requests a node is to answer."""
    if protocol := NodeConfig.of(context).protocol:
        import_object(protocol)  # which makes the requests of its module known


def allowed(cell: NodeConfig, context: Context) -> NodeConfig:
    """Return a cell as the operator of a node lets a server set it.

    On grids of our own and in a simulation the user is the operator, so that settings may name
    anything. In a deployment the settings are the server's: without this, a server could let a node
    import any module, call any function and read any folder. Names of a catalogue pass.

    Args:
        cell: As the server wants it.
        context: The node's; its node config may have ``import-paths`` (separated by commas),
            ``data-root`` and ``download``.

    Returns:
        The cell; in a deployment with the node's own folder of data sets, ``data-root``, in place
        of the server's. Without one, data sets lie where the node's ``LEAKBED_DATA`` says.

    Raises:
        UnlistedError: Names the setting, and what the operator may put into the node config.
    """
    if live(context) is not None or is_simulated():
        return cell
    config, data = context.node_config, cell.data
    listed = {path.strip() for path in str(config.get("import-paths", "")).split(",")}
    named = {
        "data.name": data.name,
        "data.public_from": data.public_from,
        "model.name": cell.architecture.name,
    }
    named |= {f"defense.name ({index})": name for index, (name, _) in enumerate(cell.defenses)}
    named |= {} if cell.intruder is None else {"attack.name": cell.intruder[0]}
    named |= {"protocol.name": cell.protocol}
    for setting, path in named.items():
        if path is not None and ":" in path and path not in listed:
            wanted = f'import-paths="{path}" (several with commas)'
            raise UnlistedError(_unlisted(setting, path, wanted))
    if data.download and config.get("download") is not True:
        raise UnlistedError(_unlisted("data.download", data.download, "download=true"))
    return replace(cell, data=replace(data, root=str(config.get("data-root", "")) or None))


def _unlisted(setting: str, value: object, wanted: str) -> str:
    return (
        f"the server wants {setting} = {value!r}, which this node's operator does not allow; in a "
        f"deployment a node imports and reads only what its own node config lists: start it with "
        f"flower-supernode --node-config '... {wanted}'"
    )


def register(app: ClientApp) -> None:
    """Register the harness's two queries."""

    @app.query("roster")
    def roster(message: Message, context: Context) -> Message:
        partition = ConfigRecord({"partition": int(context.node_config["partition-id"])})
        return Message(RecordDict({"roster": partition}), reply_to=message)

    @app.query("setup")
    def setup(message: Message, context: Context) -> Message:
        """Forget everything, take the new cell, prove that its batches can be had, say of what."""
        sent = message.content.config_records["cell"]
        cell = allowed(_parsed(str(sent["json"])), context)
        for key in list(context.state):
            del context.state[key]
        if (memory := live(context)) is not None:
            memory.clear()
        context.state[_CELL] = cell.decided().record()
        _, labels = cell.rows()
        cell.batches(1, len(labels))
        ready = MetricRecord({"rows": len(labels)})
        device = describe_device(cell.torch_device())["name"]
        found = RanOn.here(cell.data, cell.architecture, device=device, also=cell.plugins())
        return Message(RecordDict({"ready": ready, RAN_ON: found.record()}), reply_to=message)
