"""The messages Leakbed adds to Flower's own: their types, and their records in one place.

The message of step t carries the gradient of batch t - 1, its reply the smashed batch t, so that a
round of n steps costs n + 1 exchanges per node.
"""

from dataclasses import dataclass

from flwr.app import ConfigRecord, Message, MetricRecord, RecordDict

from leakbed.events import Array, Arrays
from leakbed.wire.alarms import ALARMS, Alarms, alarms_of, pack_alarms
from leakbed.wire.records import (
    BOTTOMS,
    CONFIG,
    GRADIENT,
    METRICS,
    ROUND,
    SMASHED,
    WireError,
    bottom_of,
    config_of,
    pack,
    sole_view,
    views_under,
    where,
    whole,
)

WEIGHTS = "train"
WEIGHTS_EVALUATE = "evaluate"
SPLIT_STEP = "train.split"
SPLIT_EVALUATE = "evaluate.split"
HEAD_STEP = "train.head"
HEAD_EVALUATE = "evaluate.head"
BACKWARD_STEP = "train.backward"
ROSTER = "query.roster"
SETUP = "query.setup"
HARNESS = frozenset({ROSTER, SETUP})  # never in a trace or a view


@dataclass(frozen=True, kw_only=True, eq=False)
class SplitRequest:
    """Server to node, one step of a split round.

    Arrays read from a message are read-only views of its bytes; so in every class of this module.

    Attributes:
        round: Server round, from 1.
        step: From 0; step n of n closes the round and only brings the last gradient.
        gradient: dL/d(smashed) of the previous step's batch; None at step 0, and where the node
            had it in a ``train.backward`` message already.
        bottom: The bottom to continue from; None where the node holds it.
        bottoms: Whether ``bottom`` travels ``"sealed"`` or ``"relayed"``.
    """

    round: int
    step: int
    gradient: Array | None = None
    bottom: Arrays | None = None
    bottoms: str = "sealed"

    def records(self) -> RecordDict:
        """Return the records that carry this request."""
        records = RecordDict({CONFIG: ConfigRecord({ROUND: self.round, "step": self.step})})
        if self.gradient is not None:
            records[GRADIENT] = pack({"gradient": self.gradient})
        if self.bottom is not None:
            records[BOTTOMS[self.bottoms]] = pack(self.bottom)
        return records

    @classmethod
    def of(cls, message: Message) -> "SplitRequest":
        """Read the request a message carries.

        Args:
            message: Of type ``train.split``.

        Returns:
            The request.
        """
        config = config_of(message)
        bottom, bottoms = bottom_of(message)
        return cls(
            round=whole(message, config, ROUND),
            step=whole(message, config, "step"),
            gradient=sole_view(message, GRADIENT, "gradient"),
            bottom=bottom,
            bottoms=bottoms,
        )


@dataclass(frozen=True, kw_only=True, eq=False)
class SplitReply:
    """Node to server, one step of a split round.

    Attributes:
        steps: How many batches this node trains on this round.
        examples: How many samples those are.
        step: The request's own step, or first row, again.
        smashed: The next smashed batch; None when the round is closed.
        labels: Its labels, where labels are shared.
        rows: Its sample ids at the node, where the server holds the labels.
        bottom: The trained bottom, when the round is closed.
        bottoms: Whether ``bottom`` travels ``"sealed"`` or ``"relayed"``.
        alarms: By detector, after how many gradients it raised its alarm (-1 for never) and its
            most suspicious score, when the round is closed; for the harness, sealed from all taps.
    """

    steps: int
    examples: int
    step: int = 0
    smashed: Array | None = None
    labels: Array | None = None
    rows: Array | None = None
    bottom: Arrays | None = None
    bottoms: str = "sealed"
    alarms: Alarms | None = None

    def records(self) -> RecordDict:
        """Return the records that carry this reply."""
        counts = MetricRecord(
            {"steps": self.steps, "num-examples": self.examples, "step": self.step}
        )
        records = RecordDict({METRICS: counts})
        batch = {"smashed": self.smashed, "labels": self.labels, "rows": self.rows}
        if self.smashed is not None:
            records[SMASHED] = pack({k: v for k, v in batch.items() if v is not None})
        if self.bottom is not None:
            records[BOTTOMS[self.bottoms]] = pack(self.bottom)
        if self.alarms:
            records[ALARMS] = pack_alarms(self.alarms)
        return records

    @classmethod
    def of(cls, message: Message) -> "SplitReply":
        """Read the reply a message carries.

        Args:
            message: A reply of type ``train.split`` or ``evaluate.split``.

        Returns:
            The reply.

        Raises:
            WireError: If a record is missing or of the wrong kind.
        """
        metrics = message.content.get(METRICS)
        if not isinstance(metrics, MetricRecord):
            raise WireError(f"{where(message)} needs a MetricRecord under {METRICS!r}")
        bottom, bottoms = bottom_of(message)
        batch = views_under(message, SMASHED, needs="smashed") or {}
        return cls(
            steps=whole(message, metrics, "steps"),
            examples=whole(message, metrics, "num-examples"),
            step=whole(message, metrics, "step"),
            smashed=batch.get("smashed"),
            labels=batch.get("labels"),
            rows=batch.get("rows"),
            bottom=bottom,
            bottoms=bottoms,
            alarms=alarms_of(message),
        )


@dataclass(frozen=True, kw_only=True, eq=False)
class EvaluateRequest:
    """Server to node: push these test rows through the bottom.

    Attributes:
        round: Server round, from 1.
        start: First test row.
        stop: One past the last test row.
        bottom: The bottom to evaluate.
        bottoms: Whether it travels ``"sealed"`` or ``"relayed"``.
    """

    round: int
    start: int
    stop: int
    bottom: Arrays
    bottoms: str = "sealed"

    def records(self) -> RecordDict:
        """Return the records that carry this request."""
        config = ConfigRecord({ROUND: self.round, "start": self.start, "stop": self.stop})
        return RecordDict({CONFIG: config, BOTTOMS[self.bottoms]: pack(self.bottom)})

    @classmethod
    def of(cls, message: Message) -> "EvaluateRequest":
        """Read the request a message carries.

        Args:
            message: Of type ``evaluate.split``.

        Returns:
            The request.

        Raises:
            WireError: If a record is missing or of the wrong kind.
        """
        config = config_of(message)
        bottom, bottoms = bottom_of(message)
        if bottom is None:
            raise WireError(f"{where(message)} needs a bottom")
        return cls(
            round=whole(message, config, ROUND),
            start=whole(message, config, "start"),
            stop=whole(message, config, "stop"),
            bottom=bottom,
            bottoms=bottoms,
        )
