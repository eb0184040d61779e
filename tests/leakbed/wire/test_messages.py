from typing import Any

import numpy as np
import pytest
from flwr.app import ConfigRecord, Message, RecordDict

from leakbed.wire.fields import Finding
from leakbed.wire.messages import (
    SPLIT_EVALUATE,
    SPLIT_STEP,
    EvaluateRequest,
    SplitReply,
    SplitRequest,
)
from leakbed.wire.records import WireError

pytestmark = pytest.mark.usefixtures("identity")


X, Y = np.arange(6, dtype=np.float32).reshape(2, 3), np.array([4, 5])


def carried(value: Any, kind: str = SPLIT_STEP) -> Any:
    message = Message(value.records(), dst_node_id=1, message_type=kind)
    return type(value).of(message)


@pytest.mark.parametrize(
    ("value", "kind"),
    [
        (SplitRequest(round=2, step=0, bottom={"w": X}), SPLIT_STEP),
        (SplitRequest(round=2, step=0, bottom={"w": X}, bottoms="relayed"), SPLIT_STEP),
        (SplitRequest(round=2, step=3, gradient=X), SPLIT_STEP),
        (SplitReply(steps=3, examples=6, smashed=X, labels=Y), SPLIT_STEP),
        (SplitReply(steps=3, examples=6, smashed=X, rows=Y), SPLIT_STEP),
        (SplitReply(steps=3, examples=6, bottom={"w": X}), SPLIT_STEP),
        (SplitReply(steps=3, examples=6, bottom={"w": X}, bottoms="relayed"), SPLIT_STEP),
        (
            SplitReply(steps=3, examples=6, bottom={"w": X}, alarms={"d": Finding(4, 0.5, 0.5, 6)}),
            SPLIT_STEP,
        ),
        (SplitReply(steps=0, examples=2, smashed=X), SPLIT_EVALUATE),
        (EvaluateRequest(round=2, start=0, stop=2, bottom={"w": X}), SPLIT_EVALUATE),
        (EvaluateRequest(round=2, start=0, stop=2, bottom={"w": X}, bottoms="relayed"), "e.split"),
    ],
)
def test_every_field_survives_the_wire(value: Any, kind: str) -> None:
    kind = SPLIT_EVALUATE if kind == "e.split" else kind
    found = carried(value, kind)
    for name in value.FIELDS:
        np.testing.assert_equal(getattr(found, name), getattr(value, name), err_msg=name)


def test_a_sealed_bottom_travels_under_a_sealed_key_and_nowhere_else() -> None:
    for value in (
        SplitRequest(round=1, step=0, bottom={"w": X}),
        SplitReply(steps=1, examples=2, bottom={"w": X}),
        EvaluateRequest(round=1, start=0, stop=2, bottom={"w": X}),
    ):
        assert list(value.records().array_records) == ["sealed.bottom"]


def broken(records: RecordDict, key: str, inner: str | None = None) -> Message:
    if inner is None:
        del records[key]
    else:
        del records[key][inner]  # type: ignore[attr-defined]
    return Message(records, dst_node_id=1, message_type=SPLIT_STEP)


def test_what_a_message_lacks_is_an_error_and_never_a_default() -> None:
    request = SplitRequest(round=2, step=3, gradient=X)
    with pytest.raises(WireError, match="needs a ConfigRecord"):
        SplitRequest.of(broken(request.records(), "config"))
    for key in ("step", "server-round"):
        with pytest.raises(WireError, match=f"whole number '{key}'"):
            SplitRequest.of(broken(request.records(), "config", key))
    with pytest.raises(WireError, match="needs an array 'gradient'"):
        SplitRequest.of(broken(request.records(), "cut-gradient", "gradient"))
    reply = SplitReply(steps=3, examples=6, smashed=X, labels=Y)
    with pytest.raises(WireError, match="needs a MetricRecord under 'metrics'"):
        SplitReply.of(broken(reply.records(), "metrics"))
    for key in ("steps", "num-examples"):
        with pytest.raises(WireError, match=f"whole number '{key}'"):
            SplitReply.of(broken(reply.records(), "metrics", key))
    with pytest.raises(WireError, match="needs an array 'smashed'"):
        SplitReply.of(broken(reply.records(), "smashed", "smashed"))
    evaluate = EvaluateRequest(round=1, start=0, stop=2, bottom={"w": X})
    with pytest.raises(WireError, match="needs a bottom"):
        EvaluateRequest.of(broken(evaluate.records(), "sealed.bottom"))
    with pytest.raises(WireError, match="whole number 'stop'"):
        EvaluateRequest.of(broken(evaluate.records(), "config", "stop"))


def test_an_array_record_of_another_kind_is_an_error() -> None:
    records = SplitRequest(round=1, step=1).records()
    records["cut-gradient"] = ConfigRecord()
    with pytest.raises(WireError, match="needs an ArrayRecord under 'cut-gradient'"):
        SplitRequest.of(Message(records, dst_node_id=1, message_type=SPLIT_STEP))


def test_a_share_of_rows_travels_with_the_gradient_and_one_is_not_sent() -> None:
    def read(share: object) -> SplitRequest:
        request = SplitRequest(round=1, step=2, gradient=X, share=share)  # type: ignore[arg-type]
        return SplitRequest.of(
            Message(request.records(), dst_node_id=1, message_type="train.split")
        )

    assert read(0.25).share == 0.25
    assert read(1.0).share == 1.0
    assert "share" not in SplitRequest(round=1, step=2).records().config_records["config"]
    for wrong in (0.0, 1.5, -1.0, 2):
        with pytest.raises(WireError, match=r"a share of rows in \(0, 1\], got"):
            read(wrong)
