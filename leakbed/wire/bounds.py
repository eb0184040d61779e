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
from flwr.app import ArrayRecord, ConfigRecord, Message, MetricRecord

from leakbed.events import Array
from leakbed.wire.fields import (
    ALARMS,
    PLAIN,
    STOPPED,
    Bottom,
    Carried,
    Field,
    Found,
    Named,
    Number,
    Tensor,
    Whole,
)
from leakbed.wire.messages import (
    HEAD_STEP,
    MAY_STOP,
    OWN_EVALUATE,
    OWN_STEP,
    RAN_ON,
    REPLIES,
    ROSTER,
    SAMPLES,
    SETUP,
    SPLIT_EVALUATE,
    SPLIT_STEP,
    WEIGHTS,
    NodeRequest,
    Stopped,
    is_own,
    reply_to,
)
from leakbed.wire.records import (
    BOTTOMS,
    CONFIG,
    FEATURES,
    METRICS,
    SMASHED,
    WireError,
    described,
    wire_bytes,
)

WHOLE_WEIGHTS = "arrays"  # Flower's own key of the weights that FedAvg sends and averages

_HARNESS: Mapping[str, Mapping[str, "Names"]] = {
    ROSTER: {"roster": {}},
    SETUP: {"ready": {}, RAN_ON: {}},
}
_KINDS = {"f": "floating-point numbers", "i": "whole numbers"}
_SLACK = 64 * 1024  # bytes of all names, numbers and words of a reply: metrics, findings, paths
_HEADER = 1024  # bytes before an array's numbers; NumPy writes 128 for a few dimensions
_LABEL_BYTES = _NUMBER_BYTES = 8  # an int64; any number of a metric
_ARRAYS, _METRICS = (np.ndarray, WireArray), (dict, MetricRecord)  # handed over, or in a message
_SHOWN, _FEW = 60, 8  # characters of a sender's name in an error; names expected


class Asked(NamedTuple):
    """What a reply answers, whether it went as a message or as a request itself.

    Attributes:
        kind: Type of the message.
        node: Flower's node id.
        config: Its numbers.
        arrays: Its arrays, by record and name.
        reply: The class of its reply; None where it is none of Leakbed's.
    """

    kind: str
    node: int
    config: Mapping[str, Any]
    arrays: Mapping[str, Mapping[str, Any]]
    reply: type[Carried] | None = None

    @classmethod
    def by_message(cls, sent: Message) -> "Asked":
        """Return what a message asks."""
        config = sent.content.get(CONFIG)
        numbers = config if isinstance(config, ConfigRecord) else {}
        kind, node = sent.metadata.message_type, sent.metadata.dst_node_id
        reply = NodeRequest.kind_of(sent).REPLY if is_own(sent) else REPLIES.get(kind)
        return cls(kind, node, numbers, sent.content.array_records, reply)

    @classmethod
    def by_call(cls, kind: str, node: int, request: Carried) -> "Asked":
        """Return what a typed call asks."""
        groups = request.groups()
        return cls(kind, node, groups.get(CONFIG, {}), groups, reply_to(request, kind))

    def number(self, key: str) -> int:
        """Return one of its whole numbers.

        Args:
            key: Its name.

        Returns:
            The number.

        Raises:
            WireError: If there is none.
        """
        number = self.config.get(key)
        if not isinstance(number, int):
            raise WireError(f"a {self.kind!r} message needs a whole number {key!r}, got {number!r}")
        return number


@dataclass(frozen=True)
class Weight:
    """How much a reply may weigh, for a grid that can refuse it where it is made.

    Attributes:
        bytes: Of arrays, names, numbers and words together.
        parts: Records and arrays together.
    """

    bytes: int
    parts: int

    def refuse(self, records: Mapping[str, Mapping[str, Any]]) -> None:
        """Refuse records that weigh more.

        Args:
            records: Of a reply, or its groups.

        Raises:
            WireError: Says how much it is, and how much it may be.
        """
        arrays = [each for key, each in records.items() if _is_arrays(key, each)]
        parts = len(records) + sum(map(len, arrays))
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

    def refuse(self, what: str, name: str, array: WireArray | Array) -> None:
        """Refuse an array that is something else, by its header and its length.

        Args:
            what: The record it is in.
            name: Its own.
            array: As received.

        Raises:
            WireError: Says what it is, and what it may be.
        """
        named = f"array {name!r} of {what!r}"
        size = wire_bytes(array)
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
Table = tuple[Mapping[str, Names] | None, Weight | None]
"""By record what it may hold, None for anything; and how much all of it may weigh."""


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

        One that is refused is a :class:`~leakbed.wire.records.WireError`, which says what is too
        much, and what is allowed.
        """
        if not reply.has_error():
            self._refuse(Asked.by_message(sent), reply.content)

    def refuse_answer(self, asked: Asked, reply: object) -> None:
        """Refuse a typed call's reply that the plan does not allow, or that is none to it.

        Args:
            asked: The call.
            reply: What the node's code returned.

        Raises:
            WireError: Says what is too much, and what is allowed.
        """
        kinds = {asked.reply, Stopped} if asked.kind in MAY_STOP else {asked.reply}
        if not isinstance(reply, Carried) or type(reply) not in kinds:
            found = type(reply).__name__
            raise WireError(f"a {found} came in answer to {asked.kind!r}, which is no reply to it")
        self._refuse(asked, reply.groups())

    def weight(self, asked: Asked) -> Weight | None:
        """Return how much a reply may weigh; None where nothing is known of it."""
        return self._table(asked)[1]

    def _table(self, asked: Asked) -> "Table":
        """Return what is allowed in a reply, and its weight; of a step's, made once."""
        if asked.kind != SPLIT_STEP:
            return self._made(asked)
        closing = self._closing(asked)
        if closing not in self._step_tables:
            self._step_tables[closing] = self._made(asked)
        return self._step_tables[closing]

    @cached_property
    def _step_tables(self) -> "dict[bool | None, Table]":
        return {}

    def _made(self, asked: Asked) -> "Table":
        allowed = self._allowed(asked)
        return allowed, None if allowed is None else _weight(allowed)

    def _refuse(self, asked: Asked, content: Mapping[str, Mapping[str, Any]]) -> None:
        allowed, most = self._table(asked)
        if allowed is None:
            return
        for key, record in content.items():
            if key not in allowed:
                raise WireError(f"an unknown record {key[:_SHOWN]!r}; expected {sorted(allowed)}")
            if _is_arrays(key, record):
                _refuse_arrays(key, record, allowed[key])
        if most is not None:
            most.refuse(content)
        if asked.kind == SPLIT_STEP:
            self._refuse_plan(asked, content)

    def _refuse_plan(self, asked: Asked, content: Mapping[str, Mapping[str, Any]]) -> None:
        """Refuse other steps, or other samples in them, than the node was set up for."""
        plan, metrics = self.plan(asked.node), content.get(METRICS)
        if plan is None or not isinstance(metrics, _METRICS):
            return  # what is missing is refused by whoever reads it
        said = (metrics.get("steps"), metrics.get("num-examples"))
        if said != plan:
            raise WireError(
                f"{said[0]} steps with {said[1]} samples a round, where the plan is {plan[0]} "
                f"steps with {plan[1]}"
            )

    def _allowed(self, sent: Asked) -> Mapping[str, Names] | None:
        """Return the records a reply may have, and their arrays; None for a stranger's message."""
        kind = sent.kind
        if sent.reply is not None:
            return self._split(sent, sent.reply.FIELDS)
        if kind == WEIGHTS:
            return {WHOLE_WEIGHTS: self._whole(sent), METRICS: {}}
        if kind == SAMPLES:
            count = sent.number("count")
            return {WHOLE_WEIGHTS: {"images": self._rows_of(count, self.sample_bytes)}, METRICS: {}}
        return _HARNESS.get(kind)

    def _split(self, sent: Asked, fields: Mapping[str, Field]) -> Mapping[str, Names]:
        """Return what the table of a message class allows in the reply to one message."""
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
            elif isinstance(each, Whole | Number):
                allowed[each.record] = {}
            elif isinstance(each, Found):
                allowed[ALARMS] = {}
        # Wherever a step is asked for, a node may stop instead.
        return allowed | ({STOPPED: {}, ALARMS: {}} if sent.kind in MAY_STOP else {})

    def _closing(self, sent: Asked) -> bool | None:
        """Say whether a bottom is asked for, and no batch; None where the steps are not known."""
        if sent.kind != SPLIT_STEP:
            return None if sent.kind in {OWN_STEP, OWN_EVALUATE} else False
        plan = self.plan(sent.node)
        return None if plan is None else sent.number("step") == plan[0]

    def _limit(self, sent: Asked, each: Tensor) -> Limit:
        """Return what an array of the table may be in the reply to one message."""
        if sent.kind == HEAD_STEP:  # as many bytes as the features that the server sent
            features = sent.arrays[FEATURES]["features"]
            return Limit(wire_bytes(features) + _HEADER, kinds=each.kinds)
        if sent.kind in {OWN_STEP, OWN_EVALUATE} and each.record != SMASHED:
            return Limit(kinds=each.kinds, rank=each.rank)  # its size is the protocol's own matter
        rows = self.batch_size
        if sent.kind == OWN_EVALUATE and "stop" not in sent.config:
            rows = None
        elif sent.kind in {SPLIT_EVALUATE, OWN_EVALUATE}:
            rows = sent.number("stop") - sent.number("start")
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

    def _whole(self, sent: Asked) -> Mapping[str, Limit]:
        """Return what an update may be: the arrays that were sent, trained."""
        allowed = {}
        for name, array in sent.arrays[WHOLE_WEIGHTS].items():
            shape, dtype = described(name, array)
            # Where the first type is not known, a counter may be behind a single float.
            first = self.weights.get(name, dtype if shape else np.dtype(np.int64))
            types = frozenset({dtype, first})
            size = prod(shape) * max(each.itemsize for each in types)
            allowed[name] = Limit(bytes=size + _HEADER, like=(shape, types))
        return allowed


def bind(grid: object, bounds: Bounds) -> None:
    """Let a grid refuse what comes in, before anyone else sees it, where it is one of ours."""
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


def _is_arrays(key: str, record: Mapping[str, Any]) -> bool:
    """Say whether a record is one of arrays; a message's says so itself, a group by its key."""
    return key not in PLAIN if isinstance(record, dict) else isinstance(record, ArrayRecord)


def _refuse_arrays(key: str, record: Mapping[str, Any], names: Names) -> None:
    if names is None:
        return
    for name, array in record.items():
        if name not in names:
            known = sorted(names)[:_FEW]
            raise WireError(f"an unknown array {name[:_SHOWN]!r} in {key!r}; expected {known}")
        names[name].refuse(key, name, array)


def _size_of(record: Mapping[str, Any]) -> int:
    """Return the bytes of a record's names and values."""
    return sum(_text_bytes(name) + _value_size(value) for name, value in record.items())


def _value_size(value: object) -> int:
    if isinstance(value, _ARRAYS):
        return wire_bytes(value)
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
