from dataclasses import fields

import numpy as np
import pytest
from flwr.app import Message

from leakbed.wire.fields import Carried
from leakbed.wire.messages import (
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
from leakbed.wire.records import WireError, pack

pytestmark = pytest.mark.usefixtures("identity")


MESSAGES: list[type[Carried]] = [
    BackwardReply,
    EvaluateRequest,
    HeadEvaluateReply,
    HeadEvaluateRequest,
    HeadReply,
    HeadRequest,
    SplitReply,
    SplitRequest,
]


@pytest.mark.parametrize("message", MESSAGES)
def test_every_attribute_of_a_message_is_in_its_table(message: type[Carried]) -> None:
    attributes = {each.name for each in fields(message)}  # type: ignore[arg-type]  a dataclass
    assert attributes == set(message.FIELDS)


def test_a_table_reads_only_the_arrays_that_it_names() -> None:
    reply = SplitReply(steps=1, examples=2, smashed=np.zeros((2, 3), np.float32))
    records = reply.records()
    needless = pack({"x": np.zeros(1)})["x"]
    needless.data = b"no array at all"
    records.array_records["smashed"]["junk"] = needless
    found = SplitReply.of(Message(records, dst_node_id=1, message_type=SPLIT_STEP))
    assert found.smashed is not None
    assert found.labels is None


def test_an_optional_array_never_travels_alone() -> None:
    records = SplitReply(steps=1, examples=2, labels=np.zeros(2, np.int64)).records()
    assert list(records) == ["metrics"]


def test_an_error_shows_few_of_many_records() -> None:
    records = SplitReply(steps=1, examples=2).records()
    del records["metrics"]
    for number in range(1000):
        records[f"{number}{'x' * 1000}"] = pack({})
    with pytest.raises(WireError, match="and 992 more needs a MetricRecord") as error:
        SplitReply.of(Message(records, dst_node_id=1, message_type=SPLIT_STEP))
    assert len(str(error.value)) < 1000
