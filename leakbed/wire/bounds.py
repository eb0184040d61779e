"""What a server accepts in a reply: no more than its plan allows, seen before anything is decoded.

The tables of the message classes say which records and arrays a reply may have, and of which type
and rank; :class:`Bounds` adds what the server knows of the run: steps, rows of a batch, bytes of a
row and of a node's part. Only outlines are looked at (names, headers, lengths, whole numbers of the
metrics), so that refusing a reply costs no memory and no time that its size could set.
"""

from collections.abc import Mapping
from dataclasses import dataclass, field
from functools import cached_property
from math import prod
from typing import Any, NamedTuple

import numpy as np
from flwr.app import Array as WireArray
from flwr.app import ArrayRecord, ConfigRecord, Message, MetricRecord, RecordDict

from leakbed.wire.fields import ALARMS, STOPPED, Bottom, Carried, Field, Found, Named, Tensor, Whole
from leakbed.wire.messages import (
    BACKWARD_STEP,
    HEAD_EVALUATE,
    HEAD_STEP,
    RAN_ON,
    ROSTER,
    SAMPLES,
    SETUP,
    SPLIT_EVALUATE,
    SPLIT_STEP,
    WEIGHTS,
    BackwardReply,
    HeadEvaluateReply,
    HeadReply,
    SplitReply,
)
from leakbed.wire.records import (
    BOTTOMS,
    FEATURES,
    METRICS,
    WireError,
    buffer_of,
    config_of,
    described,
    int_field,
)

REPLIES: Mapping[str, type[Carried]] = {
    SPLIT_STEP: SplitReply,
    SPLIT_EVALUATE: SplitReply,
    HEAD_STEP: HeadReply,
    HEAD_EVALUATE: HeadEvaluateReply,
    BACKWARD_STEP: BackwardReply,
}
"""By type of message: the class whose table says what a reply may hold."""

WHOLE_WEIGHTS = "arrays"  # Flower's own key of the weights that FedAvg sends and averages

_HARNESS: Mapping[str, Mapping[str, "Names"]] = {
    ROSTER: {"roster": {}},
    SETUP: {"ready": {}, RAN_ON: {}},
}
_MAY_STOP = frozenset({SPLIT_STEP, BACKWARD_STEP})
_KINDS = {"f": "floating-point numbers", "i": "whole numbers"}
_SLACK = 64 * 1024  # bytes of all names, numbers and words of a reply: metrics, findings, paths
_HEADER = 1024  # bytes before an array's numbers; NumPy writes 128 for a few dimensions
_LABEL_BYTES = _NUMBER_BYTES = 8  # an int64; any number of a metric
_SHOWN, _FEW = 60, 8  # characters of a sender's name in an error; names expected


@dataclass(frozen=True)
class Weight:
    """How much a reply may weigh, for a grid that can refuse it where it is made.

    Attributes:
        bytes: Of arrays, names, numbers and words together.
        parts: Records and arrays together.
    """

    bytes: int
    parts: int

    def refuse(self, records: RecordDict) -> None:
        """Refuse records that weigh more.

        Args:
            records: Of a reply.

        Raises:
            WireError: Says how much it is, and how much it may be.
        """
        parts = len(records) + sum(len(each) for each in records.array_records.values())
        if parts > self.parts:
            raise WireError(f"{parts} records and arrays, where the plan allows {self.parts}")
        size = sum(map(_size_of, records.values())) + sum(map(_text_bytes, records))
        if size > self.bytes:
            raise WireError(f"{size} bytes, where the plan allows {self.bytes}")


class Limit(NamedTuple):
    """What one array may be.

    Attributes:
        bytes: At most, its header included; None for any.
        rows: Length of its first dimension, at most; None for any.
        kinds: Legal kinds of number, as NumPy's ``dtype.kind`` names them; None for any.
        rank: How many dimensions it has; None for any.
        like: Shape and types it must have; None for any.
        numbers: The one type that the server's part computes in; None for any.
    """

    bytes: int | None = None
    rows: int | None = None
    kinds: str | None = None
    rank: int | None = None
    like: tuple[tuple[int, ...], frozenset[Any]] | None = None
    numbers: Any = None

    def refuse(self, what: str, name: str, array: WireArray) -> None:
        """Refuse an array that is something else, by its header and its length.

        Args:
            what: The record it is in.
            name: Its own.
            array: As received.

        Raises:
            WireError: Says what it is, and what it may be.
        """
        named = f"array {name!r} of {what!r}"
        size = len(buffer_of(array))
        if self.bytes is not None and size > self.bytes:
            raise WireError(f"{named} has {size} bytes, where the plan allows {self.bytes}")
        shape, dtype = described(name, array)
        if self.kinds is not None and dtype.kind not in self.kinds:
            raise WireError(f"{named} is {dtype}, no {_KINDS[self.kinds]}")
        if self.numbers is not None and dtype != self.numbers:
            raise WireError(f"{named} is {dtype}, the server's part is {self.numbers}")
        if self.rank is not None and len(shape) != self.rank:
            raise WireError(f"{named} has shape {shape}; expected {self.rank} dimension(s)")
        if self.rows is not None and shape and shape[0] > self.rows:
            raise WireError(f"{named} has {shape[0]} rows, where the plan allows {self.rows}")
        if self.like is not None and (shape != self.like[0] or dtype not in self.like[1]):
            types = " or ".join(sorted(map(str, self.like[1])))
            raise WireError(
                f"{named} is {dtype} of shape {shape}, expected {types} of shape {self.like[0]}"
            )


Names = Mapping[str, Limit] | None
"""By name of an array what it may be; None for any arrays of any names."""


@dataclass(frozen=True, kw_only=True, eq=False)
class Bounds:
    """What the server knows of the replies it asks for; what it does not know it does not bound.

    Attributes:
        batch_size: Rows in a batch.
        local_steps: Steps of a round; None for one pass over a node's rows.
        rows: How many rows each node has, by Flower node id.
        row_bytes: Of one smashed row; the largest, where nodes have several.
        numbers: The type of smashed data: that of the server's part.
        held: Bytes of each array of the node's part, by name.
        weights: First types of the whole network's arrays, where it is averaged: Flower's average
            turns counters into floating point, and nodes send them back whole. Without them, any
            single number may come back whole.
        sample_bytes: Of one image that a malicious client shows.
    """

    batch_size: int | None = None
    local_steps: int | None = None
    rows: Mapping[int, int] = field(default_factory=dict)
    row_bytes: int | None = None
    numbers: np.dtype[Any] | None = None
    held: Mapping[str, int] | None = None
    weights: Mapping[str, np.dtype[Any]] = field(default_factory=dict)
    sample_bytes: int | None = None

    def plan(self, node: int) -> tuple[int, int] | None:
        """Return a node's steps and samples in a round; None where they are not known.

        Args:
            node: Flower's node id.

        Returns:
            As :func:`clients.node.batches` makes them.
        """
        if self.batch_size is None:
            return None
        if self.local_steps is not None:
            return self.local_steps, self.local_steps * self.batch_size
        rows = self.rows.get(node)
        return None if rows is None else (-(-rows // self.batch_size), rows)

    def refuse(self, sent: Message, reply: Message) -> None:
        """Refuse a reply that the plan does not allow; errors and unknown types pass.

        Args:
            sent: What it answers.
            reply: As it came.

        Raises:
            WireError: Says what is too much, and what is allowed.
        """
        if reply.has_error() or (allowed := self._allowed(sent)) is None:
            return
        content = reply.content
        for key, record in content.items():
            if key not in allowed:
                raise WireError(f"an unknown record {key[:_SHOWN]!r}; expected {sorted(allowed)}")
            if isinstance(record, ArrayRecord):
                _refuse_arrays(key, record, allowed[key])
        if (most := _weight(allowed)) is not None:
            most.refuse(content)
        if sent.metadata.message_type == SPLIT_STEP:
            self._refuse_plan(sent, content)

    def weight(self, sent: Message) -> Weight | None:
        """Return how much the reply to a message may weigh; None where nothing is known of it."""
        allowed = self._allowed(sent)
        return None if allowed is None else _weight(allowed)

    def _refuse_plan(self, sent: Message, content: RecordDict) -> None:
        """Refuse other steps, or other samples in them, than the node was set up for."""
        plan, metrics = self.plan(sent.metadata.dst_node_id), content.get(METRICS)
        if plan is None or not isinstance(metrics, MetricRecord):
            return  # what is missing is refused by whoever reads it
        said = (metrics.get("steps"), metrics.get("num-examples"))
        if said != plan:
            raise WireError(
                f"{said[0]} steps with {said[1]} samples a round, where the plan is {plan[0]} "
                f"steps with {plan[1]}"
            )

    def _allowed(self, sent: Message) -> Mapping[str, Names] | None:
        """Return the records a reply may have, and their arrays; None for a stranger's message."""
        kind = sent.metadata.message_type
        if kind in REPLIES:
            return self._split(sent, REPLIES[kind].FIELDS)
        if kind == WEIGHTS:
            return {WHOLE_WEIGHTS: self._whole(sent), METRICS: {}}
        if kind == SAMPLES:
            count = _number(sent, "count")
            return {WHOLE_WEIGHTS: {"images": self._rows_of(count, self.sample_bytes)}, METRICS: {}}
        return _HARNESS.get(kind)

    def _split(self, sent: Message, fields: Mapping[str, Field]) -> Mapping[str, Names]:
        """Return what the table of a message class allows in the reply to one message."""
        kind = sent.metadata.message_type
        part: Names = None if self.held is None else self._part
        allowed: dict[str, Names] = {}
        closing = self._closing(sent)
        for each in fields.values():
            if isinstance(each, Tensor) and closing is not True:
                names = allowed.get(each.record) or {}
                allowed[each.record] = {**names, each.name: self._limit(sent, each)}
            elif isinstance(each, Named):
                allowed[each.record] = part
            elif isinstance(each, Bottom) and closing is not False:
                allowed |= dict.fromkeys(BOTTOMS.values(), part)
            elif isinstance(each, Whole):
                allowed[each.record] = {}
            elif isinstance(each, Found):
                allowed[ALARMS] = {}
        # Wherever a step is asked for, a node may stop instead.
        return allowed | ({STOPPED: {}, ALARMS: {}} if kind in _MAY_STOP else {})

    def _closing(self, sent: Message) -> bool | None:
        """Say whether a bottom is asked for, and no batch; None where the steps are not known."""
        if sent.metadata.message_type != SPLIT_STEP:
            return False
        plan = self.plan(sent.metadata.dst_node_id)
        return None if plan is None else _number(sent, "step") == plan[0]

    def _limit(self, sent: Message, each: Tensor) -> Limit:
        """Return what an array of the table may be in the reply to one message."""
        kind = sent.metadata.message_type
        if kind == HEAD_STEP:  # as many bytes as the features that the server sent
            features = sent.content.array_records[FEATURES]["features"]
            return Limit(len(buffer_of(features)) + _HEADER, kinds=each.kinds)
        rows = self.batch_size
        if kind == SPLIT_EVALUATE:
            rows = _number(sent, "stop") - _number(sent, "start")
        if each.rank is not None:
            limit = self._rows_of(rows, _LABEL_BYTES)
            return limit._replace(kinds=each.kinds, rank=each.rank)
        limit = self._rows_of(rows, self.row_bytes)
        return limit._replace(kinds=each.kinds, numbers=self.numbers)

    @staticmethod
    def _rows_of(rows: int | None, each: int | None) -> Limit:
        known = rows is not None and each is not None
        return Limit(bytes=rows * each + _HEADER if known else None, rows=rows)  # type: ignore[operator]

    @cached_property
    def _part(self) -> Mapping[str, Limit]:
        return {name: Limit(bytes=size + _HEADER) for name, size in (self.held or {}).items()}

    def _whole(self, sent: Message) -> Mapping[str, Limit]:
        """Return what an update may be: the arrays that were sent, trained."""
        allowed = {}
        for name, array in sent.content.array_records[WHOLE_WEIGHTS].items():
            shape, dtype = described(name, array)
            # Where the first type is not known, a counter may be behind a single float.
            first = self.weights.get(name, dtype if shape else np.dtype(np.int64))
            types = frozenset({dtype, first})
            size = prod(shape) * max(each.itemsize for each in types)
            allowed[name] = Limit(bytes=size + _HEADER, like=(shape, types))
        return allowed


def bind(grid: object, bounds: Bounds) -> None:
    """Let a grid refuse what comes in, before anyone else sees it, where it is one of ours.

    Args:
        grid: Any Flower grid.
        bounds: From now on.
    """
    if (tell := getattr(grid, "bound_by", None)) is not None:
        tell(bounds)


def _weight(allowed: Mapping[str, Names]) -> Weight | None:
    """Return what all that is allowed weighs; of a bottom, sealed or relayed, one."""
    limits = list[Limit]()
    for key, names in allowed.items():
        if names is None:
            return None
        if key != BOTTOMS["relayed"]:
            limits += names.values()
    if any(limit.bytes is None for limit in limits):
        return None
    size = sum(limit.bytes for limit in limits if limit.bytes is not None)
    return Weight(size + _SLACK, len(limits) + len(allowed))


def _refuse_arrays(key: str, record: ArrayRecord, names: Names) -> None:
    if names is None:
        return
    for name, array in record.items():
        if name not in names:
            known = sorted(names)[:_FEW]
            raise WireError(f"an unknown array {name[:_SHOWN]!r} in {key!r}; expected {known}")
        names[name].refuse(key, name, array)


def _number(sent: Message, key: str) -> int:
    """Return a whole number of the server's own message."""
    return int_field(sent, config_of(sent), key)


def _size_of(record: ArrayRecord | ConfigRecord | MetricRecord) -> int:
    """Return the bytes of a record's names and values."""
    if isinstance(record, ArrayRecord):
        return sum(_text_bytes(name) + len(buffer_of(array)) for name, array in record.items())
    return sum(_text_bytes(name) + _value_size(value) for name, value in record.items())


def _value_size(value: object) -> int:
    if isinstance(value, list):
        return (
            sum(map(_value_size, value))
            if value and isinstance(value[0], str | bytes)
            else (_NUMBER_BYTES * len(value))
        )
    if isinstance(value, str):
        return _text_bytes(value)
    return len(value) if isinstance(value, bytes) else _NUMBER_BYTES


def _text_bytes(text: str) -> int:
    """Return the bytes of a text in UTF-8, as it travels, with no second copy of a long one."""
    if text.isascii():
        return len(text)
    starts = range(0, len(text), _SLACK)
    return sum(len(text[at : at + _SLACK].encode(errors="surrogatepass")) for at in starts)
