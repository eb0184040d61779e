"""Whatever a hostile client sends, decoding ends in a value or a WireError, and never in pickle."""

from collections.abc import Callable, Iterator
from contextlib import suppress
from typing import Any

import pytest
from flwr.app import Array as WireArray
from flwr.app import ArrayRecord, ConfigRecord, Message, MetricRecord, RecordDict
from hypothesis import given
from hypothesis import strategies as st

from leakbed.wire.event_codec import events_down, events_up
from leakbed.wire.fields import ALARMS, STOPPED, alarms_of, stop_of
from leakbed.wire.messages import (
    BACKWARD_STEP,
    HEAD_EVALUATE,
    HEAD_STEP,
    SPLIT_EVALUATE,
    SPLIT_STEP,
    BackwardReply,
    EvaluateRequest,
    HeadEvaluateReply,
    HeadEvaluateRequest,
    HeadReply,
    HeadRequest,
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
)
from tests.support import tiny
from tests.support.hostile import ANY, ARRAYS, FINE, NAMES, fuzz

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
} | {"alarms_of": alarms_of, "stop_of": stop_of}
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
    ALARMS,
    STOPPED,
]
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
    if key not in {*SOUND, ALARMS, STOPPED}
}
CONTENTS = st.one_of(
    st.dictionaries(st.sampled_from(KEYS), ANY, max_size=5),
    st.fixed_dictionaries(SOUND, optional=FITTING),
)
FUZZ = fuzz(60)


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
