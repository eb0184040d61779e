"""What a protocol is made from, and what it gives back: the contract of the catalogue."""

from collections.abc import Callable, Collection, Mapping
from dataclasses import dataclass, field
from math import prod
from typing import Any, Literal, TypeVar

import torch
from flwr.app import ArrayRecord
from flwr.serverapp.strategy import Strategy
from jaxtyping import Int
from torch import Tensor, nn

from leakbed.contracts import Defense
from leakbed.events import Arrays
from leakbed.models import Architecture
from leakbed.wire.bounds import Bounds
from leakbed.wire.messages import NodeRequest
from strategies.server_model import ServerPart

_NUMBER_BYTES = 8  # of the widest number an image may come in

Part = TypeVar("Part", bound=ServerPart)


@dataclass(frozen=True, kw_only=True, eq=False)
class ProtocolSetup:
    """Everything a protocol's server part is made from.

    Attributes:
        architecture: The network; its ``cut`` parts it, where the protocol does.
        init_stream: The ``victim-init`` stream of the first weights.
        optimiser: Makes the server's optimiser over its parameters.
        nodes: How many nodes there are.
        fraction: Share of them that train in a round.
        labels: Labels of each node's rows by Flower node id, where the server holds them.
        test_labels: Labels of the held-out rows.
        evaluate_rounds: Rounds that end with an evaluation through both parts.
        defenses: The server's: of the cut gradient, which it sends, and of its top's steps.
        defense_stream: The secret seed of their noise.
        timeout: Seconds to wait for each reply.
        device: Where the server computes.
        chosen: What was chosen of each key of :attr:`Protocol.choices`.
        stream: The server's own, for what a protocol draws by lot.
        protocol: Its catalogue key, for errors.
        passes: In how many batches of the whole run a node's row is, at most.
        batch_size: Rows in a batch; None bounds no reply by it.
        local_steps: Steps of a round; None for one pass over a node's rows.
        rows: How many rows each node has, by Flower node id; those of ``labels`` where they are
            there. Without them, and without ``local_steps``, a node's steps are its own word.
    """

    architecture: Architecture
    init_stream: int
    optimiser: Callable[[Any], torch.optim.Optimizer]
    nodes: int
    fraction: float
    labels: Mapping[int, Int[Tensor, " rows"]] | None
    test_labels: Int[Tensor, " test"]
    evaluate_rounds: Collection[int]
    defenses: tuple[Defense, ...]
    defense_stream: int
    timeout: float | None
    device: torch.device
    chosen: Mapping[str, Any]
    stream: int = 0
    protocol: str = "the protocol"
    passes: int = 1
    batch_size: int | None = None
    local_steps: int | None = None
    rows: Mapping[int, int] | None = None

    def bounds(self) -> Bounds:
        """Return what the plan says of replies; protocols add the sizes of what is cut."""
        rows = {node: len(own) for node, own in (self.labels or {}).items()}
        return Bounds(
            batch_size=self.batch_size,
            local_steps=self.local_steps,
            rows=rows if self.rows is None else self.rows,
            sample_bytes=_NUMBER_BYTES * prod(self.architecture.image_shape),
        )

    def common(self) -> dict[str, Any]:
        """Return the keywords that every split strategy takes."""
        return {
            "bottoms": self.chosen["bottoms"],
            "labels": self.labels,
            "fraction_train": self.fraction,
            "test_labels": self.test_labels,
            "evaluate_rounds": self.evaluate_rounds,
            "step_timeout": self.timeout,
            "smashed_shape": self.architecture.smashed_shape,
            "optimizer_state": self.chosen["optimizer_state"],
            "bounds": self.bounds(),
        }

    def part(self, kind: type[Part], module: nn.Module) -> Part:
        """Return the server's part of the model, in training.

        Args:
            kind: How it trains.
            module: Its layers; moved to the server's device.

        Returns:
            It, with an optimiser and the server's defences.
        """
        module = module.to(self.device)
        return kind(
            module,
            self.optimiser(module.parameters()),
            defenses=self.defenses,
            defense_stream=self.defense_stream,
            protocol=self.protocol,
            passes=self.passes,
        )

    @staticmethod
    def arrays(*modules: nn.Module) -> Arrays:
        """Return the weights and buffers of a node's part, by name."""
        return {
            name: value.numpy() for module in modules for name, value in module.state_dict().items()
        }


@dataclass(frozen=True, kw_only=True, eq=False)
class BuiltProtocol:
    """A protocol ready to start.

    Attributes:
        strategy: For ``strategy.start(grid, arrays, ...)``.
        arrays: What the server may read of the first weights.
        bottom: Returns the bottom as it stands, for the answer key; None where nothing is cut.
    """

    strategy: Strategy
    arrays: ArrayRecord
    bottom: Callable[[], Arrays] | None = None


Option = str | int | float | bool
Build = Callable[[ProtocolSetup], BuiltProtocol]
"""Makes a protocol's server part."""


@dataclass(frozen=True, kw_only=True)
class Protocol:
    """A line of the catalogue.

    Attributes:
        exchanges: What crosses the wire: whole weights, or smashed data and cut gradients.
        build: Makes the server's part.
        labels: Who may hold the labels: ``"shared"``, ``"server"`` or ``"client"``; the first is
            the protocol's default.
        bottoms: Who may read bottoms: ``"sealed"`` or ``"relayed"``; likewise.
        optimizer_state: Momenta ``"kept"`` from round to round, or ``"fresh"`` in each; likewise.
        parts: In how many parts the model is cut: 1 not at all, 3 with a head at the node.
        divides: What each node has a share of: ``"rows"``, or ``"features"`` of all rows.
        in_turn: Whether nodes train one after another, each from the part that the last one left.
        merges: Whether nodes step bottoms of their own, which are averaged by rows when a round
            ends; with an option ``sync``, only where that is ``"round"``.
        options: Settings of this protocol alone: name to legal values (texts, numbers, yes or no),
            the default first.
        requests: Requests of its own that its nodes answer. Nodes then import its module, which in
            a deployment their operators must list. Where weights are exchanged, no defence of
            updates goes with them: it would not see the replies.
    """

    exchanges: Literal["weights", "split"]
    build: Build
    labels: tuple[str, ...] = ("shared", "server")
    bottoms: tuple[str, ...] = ("sealed", "relayed")
    optimizer_state: tuple[str, ...] = ("kept", "fresh")
    parts: Literal[1, 2, 3] = 2
    divides: Literal["rows", "features"] = "rows"
    in_turn: bool = False
    merges: bool = False
    options: Mapping[str, tuple[Option, ...]] = field(default_factory=dict)
    requests: tuple[type[NodeRequest], ...] = ()

    def __post_init__(self) -> None:
        """Check the legal values.

        Raises:
            ValueError: If those of a key are no tuple of texts, numbers or bools.
        """
        for key, values in self.choices.items():
            tuples = isinstance(values, tuple) and values != ()
            if not tuples or not all(isinstance(each, Option) for each in values):
                raise ValueError(
                    f"{key!r} has the legal values {values!r}; write a tuple of texts, numbers or "
                    "bools, the default first, such as ('fast', 'slow')"
                )

    @property
    def choices(self) -> dict[str, tuple[Option, ...]]:
        """What a settings file may choose: key to legal values, the default first.

        Where weights are exchanged nobody asks who holds the labels, and cases share tables: there
        every value is taken.
        """
        unread = () if self.exchanges == "split" else ("shared", "server", "client")
        return {
            "labels": tuple(dict.fromkeys((*self.labels, *unread))),
            "bottoms": self.bottoms,
            "optimizer_state": self.optimizer_state,
            **self.options,
        }
