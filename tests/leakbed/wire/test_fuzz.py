"""Whatever a hostile client sends, decoding ends in a value or a WireError, and never in pickle."""

import pickle
from collections.abc import Callable, Iterator
from contextlib import suppress
from typing import Any

import pytest
from flwr.app import Array as WireArray
from flwr.app import ArrayRecord, ConfigRecord, Message, MetricRecord, RecordDict
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from leakbed.wire.head_messages import (
    BackwardReply,
    HeadEvaluateReply,
    HeadEvaluateRequest,
    HeadReply,
    HeadRequest,
)
from leakbed.wire.messages import (
    BACKWARD_STEP,
    HEAD_EVALUATE,
    HEAD_STEP,
    SPLIT_EVALUATE,
    SPLIT_STEP,
    EvaluateRequest,
    SplitReply,
    SplitRequest,
)
from leakbed.wire.records import (
    BOTTOM_GRADIENT,
    BOTTOMS,
    CONFIG,
    FEATURES,
    GRADIENT,
    METRICS,
    ROUND,
    SMASHED,
    UPPER_GRADIENT,
    WireError,
    pack,
)
from leakbed.wire.translation import events_down, events_up
from tests import tiny

READERS: dict[str, Callable[[Message], object]] = {
    reader.__name__: reader.of  # type: ignore[attr-defined]
    for reader in (
        SplitRequest,
        SplitReply,
        EvaluateRequest,
        HeadRequest,
        HeadReply,
        HeadEvaluateRequest,
        HeadEvaluateReply,
        BackwardReply,
    )
}
KINDS = [SPLIT_STEP, SPLIT_EVALUATE, HEAD_STEP, HEAD_EVALUATE, BACKWARD_STEP, "train", "evaluate"]
KEYS = [
    CONFIG,
    METRICS,
    GRADIENT,
    SMASHED,
    FEATURES,
    UPPER_GRADIENT,
    BOTTOM_GRADIENT,
    *BOTTOMS.values(),
    "arrays",
]
NAMES = ["smashed", "labels", "rows", "gradient", "features", "0.weight"]
FINE = pack({"a": tiny.images()[0][:2].numpy()})["a"].data


class Bomb:
    """Unpickling it would be noticed."""

    def __reduce__(self) -> tuple[Any, ...]:
        return pytest.fail, ("a received message was unpickled",)


def damaged() -> st.SearchStrategy[bytes]:
    """An array's bytes with some of them changed, cut off or appended."""
    change = st.tuples(st.integers(0, len(FINE) - 1), st.integers(0, 255))

    def apply(changes: list[tuple[int, int]], length: int, more: bytes) -> bytes:
        data = bytearray(FINE)
        for place, value in changes:
            data[place] = value
        return bytes(data[:length]) + more

    lengths = st.integers(0, len(FINE)) | st.just(len(FINE))
    return st.builds(apply, st.lists(change, max_size=4), lengths, st.binary(max_size=8))


HEADERS = st.sampled_from(
    [
        b"{'descr': '|O', 'fortran_order': False, 'shape': (1,), }",
        b"{'descr': '<f4', 'fortran_order': False, 'shape': (-1,), }",
        b"{'descr': '<f4', 'fortran_order': False, 'shape': (99999999999,), }",
        b"{'descr': [('a', '<f4')], 'fortran_order': False, 'shape': (1,), }",
        b"{'descr': '<f4', 'fortran_order': False, 'shape': 3, }",
        b"__import__('os').system('true')",
        b"(" * 5000,
    ]
).map(lambda header: b"\x93NUMPY\x01\x00" + len(header).to_bytes(2, "little") + header)
DATA = st.one_of(
    st.just(FINE),
    damaged(),
    st.binary(max_size=64),
    st.just(pickle.dumps(Bomb())),
    st.tuples(HEADERS, st.just(pickle.dumps(Bomb()))).map(b"".join),
)
SHAPES = st.lists(st.integers(-2, 2**40), max_size=3).map(tuple)
ARRAYS = st.builds(
    WireArray,
    st.sampled_from(["float32", "object", ""]),
    SHAPES,
    st.sampled_from(["numpy.ndarray", "numpy.ndarray", "pickle", ""]),
    DATA,
)
NUMBERS = st.integers(-(2**62), 2**62) | st.floats()
CONFIGS = st.dictionaries(
    st.sampled_from([ROUND, "step", "start", "stop"]), NUMBERS | st.text(max_size=3)
).map(ConfigRecord)
COUNTS = st.dictionaries(
    st.sampled_from(["steps", "step", "num-examples", "correct"]),
    NUMBERS | st.lists(st.integers(0, 9), max_size=2),
).map(MetricRecord)
ARRAY_RECORDS = st.dictionaries(st.sampled_from(NAMES), ARRAYS, min_size=1, max_size=3)
ANY = st.one_of(CONFIGS, COUNTS, ARRAY_RECORDS.map(ArrayRecord))
# Without sound counts and positions, most messages would be refused before an array is looked at.
SOUND = {
    CONFIG: st.just({ROUND: 1, "step": 0, "start": 0, "stop": 2}).map(ConfigRecord),
    METRICS: st.just({"steps": 1, "step": 0, "num-examples": 2, "correct": 1}).map(MetricRecord),
}
WANTED = {
    GRADIENT: ["gradient"],
    SMASHED: ["smashed"],
    FEATURES: ["features"],
    UPPER_GRADIENT: ["gradient"],
}
FITTING = {
    key: st.fixed_dictionaries(dict.fromkeys(WANTED.get(key, NAMES[:1]), ARRAYS)).map(ArrayRecord)
    for key in KEYS
    if key not in SOUND
}
CONTENTS = st.one_of(
    st.dictionaries(st.sampled_from(KEYS), ANY, max_size=5),
    st.fixed_dictionaries(SOUND, optional=FITTING),
)
FUZZ = settings(
    max_examples=60, deadline=None, database=None, suppress_health_check=list(HealthCheck)
)


@pytest.fixture(autouse=True, scope="module")
def identity() -> Iterator[None]:
    with tiny.identity():
        yield


def message(kind: str, content: dict[str, Any]) -> Message:
    return Message(RecordDict(content), dst_node_id=1, message_type=kind)


@pytest.mark.parametrize("reader", READERS)
@FUZZ
@given(content=CONTENTS)
def test_reading_a_message_gives_a_value_or_a_wire_error(
    reader: str, content: dict[str, Any]
) -> None:
    with suppress(WireError):
        READERS[reader](message(SPLIT_STEP, content))


@FUZZ
@given(kind=st.sampled_from(KINDS), asked=CONTENTS, answered=CONTENTS)
def test_translating_an_exchange_gives_events_or_a_wire_error(
    kind: str, asked: dict[str, Any], answered: dict[str, Any]
) -> None:
    sent = message(kind, asked)
    reply = Message(RecordDict(answered), reply_to=sent)
    for translate in (lambda: events_down(sent, 0), lambda: events_up(sent, reply, 0)):
        with suppress(WireError):
            assert isinstance(translate(), list)


def test_the_fuzz_reaches_whole_messages_too() -> None:
    content = {
        METRICS: MetricRecord({"steps": 1, "num-examples": 2, "step": 0}),
        SMASHED: ArrayRecord({"smashed": WireArray("float32", (2,), "numpy.ndarray", FINE)}),
    }
    reply = READERS["SplitReply"](message(SPLIT_STEP, content))
    assert isinstance(reply, SplitReply)
    assert reply.smashed is not None
    assert reply.smashed.shape == (2, 1, 6, 6)
