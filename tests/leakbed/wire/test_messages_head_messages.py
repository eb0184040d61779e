from typing import Any

import numpy as np
import pytest
from flwr.app import ConfigRecord, Message, MetricRecord, RecordDict

from leakbed.events import (
    BottomGradientUp,
    CutGradientDown,
    FeaturesDown,
    Phase,
    Sealed,
    UpperGradientUp,
)
from leakbed.wire.event_codec import events_down, events_up, rewritten
from leakbed.wire.messages import (
    BACKWARD_STEP,
    HEAD_EVALUATE,
    HEAD_STEP,
    BackwardReply,
    HeadEvaluateReply,
    HeadEvaluateRequest,
    HeadReply,
    HeadRequest,
    SplitRequest,
)
from leakbed.wire.records import WireError, pack

pytestmark = pytest.mark.usefixtures("identity")


X = np.arange(6, dtype=np.float32).reshape(2, 3)
EVALUATE = HeadEvaluateRequest(round=2, start=4, stop=6, features=X, bottom={"w": X})
ALL: list[tuple[Any, str]] = [
    (HeadRequest(round=2, step=3, features=X), HEAD_STEP),
    (HeadReply(step=3, gradient=X), HEAD_STEP),
    (EVALUATE, HEAD_EVALUATE),
    (HeadEvaluateReply(correct=1, examples=2), HEAD_EVALUATE),
    (BackwardReply(step=3, gradient={"w": X, "b": X[0]}), BACKWARD_STEP),
]


def carried(records: RecordDict, kind: str) -> Message:
    return Message(records, dst_node_id=1, message_type=kind)


@pytest.mark.parametrize(("value", "kind"), ALL, ids=lambda v: type(v).__name__)
def test_every_field_survives_the_wire(value: Any, kind: str) -> None:
    found = type(value).of(carried(value.records(), kind))
    for name in value.FIELDS:
        np.testing.assert_equal(getattr(found, name), getattr(value, name), err_msg=name)


@pytest.mark.parametrize(("value", "kind"), ALL, ids=lambda v: type(v).__name__)
def test_a_record_or_number_that_lacks_is_an_error(value: Any, kind: str) -> None:
    for key in list(value.records()):
        records = value.records()
        del records[key]
        with pytest.raises(WireError, match="needs"):
            type(value).of(carried(records, kind))
    for key, record in value.records().items():
        for inner in record if isinstance(record, ConfigRecord | MetricRecord) else ():
            records = value.records()
            del records[key][inner]
            with pytest.raises(WireError, match=f"needs a whole number '{inner}', got None"):
                type(value).of(carried(records, kind))


@pytest.mark.parametrize(("value", "kind"), ALL, ids=lambda v: type(v).__name__)
def test_a_record_of_another_kind_is_an_error(value: Any, kind: str) -> None:
    for key, record in value.records().items():
        records = value.records()
        plain = isinstance(record, ConfigRecord | MetricRecord)
        records[key] = pack({"step": X}) if plain else ConfigRecord()
        with pytest.raises(WireError, match="needs"):
            type(value).of(carried(records, kind))


def test_an_evaluated_part_travels_as_it_says() -> None:
    assert set(EVALUATE.records().array_records) == {"features", "sealed.bottom"}
    relayed = HeadEvaluateRequest(
        round=2, start=4, stop=6, features=X, bottom={"w": X}, bottoms="relayed"
    )
    assert set(relayed.records().array_records) == {"features", "relayed.bottom"}


def test_a_heads_step_is_features_down_and_their_gradient_up() -> None:
    sent = carried(HeadRequest(round=2, step=3, features=X).records(), HEAD_STEP)
    (down,) = events_down(sent, 7)
    assert isinstance(down, FeaturesDown)
    assert (down.node, down.round, down.step, down.phase) == (7, 2, 3, Phase.TRAIN)
    assert np.array_equal(down.features, X)
    reply = Message(HeadReply(step=3, gradient=-X).records(), reply_to=sent)
    (up,) = events_up(sent, reply, 7)
    assert isinstance(up, UpperGradientUp)
    assert (up.node, up.round, up.step) == (7, 2, 3)
    assert np.array_equal(up.gradient, -X)


def test_an_evaluation_shows_features_and_the_size_of_the_sealed_part() -> None:
    sent = carried(EVALUATE.records(), HEAD_EVALUATE)
    sealed, down = events_down(sent, 7)
    assert isinstance(sealed, Sealed)
    assert isinstance(down, FeaturesDown)
    assert (down.round, down.step, down.phase) == (2, 4, Phase.EVALUATE)
    reply = Message(HeadEvaluateReply(correct=1, examples=2).records(), reply_to=sent)
    assert events_up(sent, reply, 7) == []


def test_a_backward_step_is_of_the_batch_it_names() -> None:
    request = SplitRequest(round=2, step=3, gradient=X)
    sent = carried(request.records(), BACKWARD_STEP)
    (down,) = events_down(sent, 7)
    assert isinstance(down, CutGradientDown)
    assert (down.round, down.step) == (2, 3)
    reply = Message(BackwardReply(step=3, gradient={"w": X}).records(), reply_to=sent)
    (up,) = events_up(sent, reply, 7)
    assert isinstance(up, BottomGradientUp)
    assert (up.round, up.step, set(up.arrays)) == (2, 3, {"w"})


def test_a_hook_may_rewrite_features_and_their_gradient() -> None:
    sent = carried(HeadRequest(round=2, step=3, features=X).records(), HEAD_STEP)
    changed = rewritten(sent, FeaturesDown(node=7, round=2, step=3, features=2 * X))
    assert np.array_equal(HeadRequest.of(carried(changed, HEAD_STEP)).features, 2 * X)
    assert np.array_equal(HeadRequest.of(sent).features, X)
    reply = Message(HeadReply(step=3, gradient=X).records(), reply_to=sent)
    changed = rewritten(reply, UpperGradientUp(node=7, round=2, step=3, gradient=3 * X))
    assert np.array_equal(HeadReply.of(carried(changed, HEAD_STEP)).gradient, 3 * X)
