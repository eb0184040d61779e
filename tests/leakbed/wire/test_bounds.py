import random
from collections.abc import Iterator
from typing import Any

import numpy as np
import pytest
from flwr.app import ArrayRecord, ConfigRecord, Error, Message, MetricRecord, RecordDict

from leakbed.wire.bounds import Asked, Bounds, Weight, bind
from leakbed.wire.messages import (
    BACKWARD_STEP,
    HEAD_STEP,
    REPLIES,
    ROSTER,
    SAMPLES,
    SETUP,
    SPLIT_STEP,
    WEIGHTS,
    HeadRequest,
    SplitReply,
    SplitRequest,
)
from leakbed.wire.records import WireError, count_bytes, pack
from tests.support import tiny


@pytest.fixture(autouse=True)
def identity() -> Iterator[None]:
    with tiny.identity():
        yield


ROW = 5
SMASHED = np.zeros((4, ROW), np.float32)
PART = {"w": np.zeros((3, 2), np.float32), "n": np.array(7)}
BOUNDS = Bounds(
    batch_size=4,
    local_steps=2,
    row_bytes=4 * ROW,
    held={name: array.nbytes for name, array in PART.items()},
    sample_bytes=36,
)


def sent(kind: str = SPLIT_STEP, step: int = 0, records: RecordDict | None = None) -> Message:
    request = SplitRequest(round=1, step=step).records() if records is None else records
    return Message(request, dst_node_id=1, message_type=kind)


def reply(records: RecordDict) -> Message:
    return Message(records, dst_node_id=1, message_type=SPLIT_STEP)


def batch(**changes: Any) -> RecordDict:
    fields: dict[str, Any] = {"steps": 2, "examples": 8, "smashed": SMASHED} | changes
    return SplitReply(**fields).records()


def test_what_the_plan_allows_passes() -> None:
    labels = np.zeros(4, np.int64)
    BOUNDS.refuse(sent(), reply(batch(labels=labels, rows=labels)))
    BOUNDS.refuse(sent(), reply(batch(smashed=SMASHED[:1])))
    for bottoms in ("sealed", "relayed"):
        closing = SplitReply(steps=2, examples=8, step=2, bottom=PART, bottoms=bottoms)
        BOUNDS.refuse(sent(step=2), reply(closing.records()))


def test_errors_and_messages_of_strangers_pass() -> None:
    message = sent()
    BOUNDS.refuse(message, Message(Error(1, "x" * 10**6), reply_to=message))
    BOUNDS.refuse(sent("train.other"), reply(RecordDict({"any": MetricRecord({"x": 1})})))
    assert BOUNDS.weight(Asked.by_message(sent("train.other"))) is None
    BOUNDS.refuse(sent("train.own"), reply(RecordDict({"any": MetricRecord({"x": 1})})))


@pytest.mark.parametrize(
    ("local_steps", "rows", "expected"),
    [(2, {}, (2, 8)), (None, {1: 9}, (3, 9)), (None, {1: 8}, (2, 8)), (None, {2: 9}, None)],
)
def test_steps_and_samples_follow_from_the_settings(
    local_steps: int | None, rows: dict[int, int], expected: tuple[int, int] | None
) -> None:
    assert Bounds(batch_size=4, local_steps=local_steps, rows=rows).plan(1) == expected
    assert Bounds(local_steps=local_steps, rows=rows).plan(1) is None


@pytest.mark.parametrize(
    ("kind", "step", "records", "match"),
    [
        (SPLIT_STEP, 0, batch(steps=3), "3 steps with 8 samples a round, where the plan is 2"),
        (SPLIT_STEP, 0, batch(examples=9), "2 steps with 9 samples"),
        (SPLIT_STEP, 0, batch(labels=np.zeros((4, 1), np.int64)), r"shape \(4, 1\); expected 1 di"),
        (SPLIT_STEP, 0, batch(labels=np.zeros(4, np.float32)), "is float32, no whole"),
        (SPLIT_STEP, 2, batch(), "an unknown record 'smashed'"),
        (SPLIT_STEP, 0, batch(smashed=SMASHED[:, :1].repeat(2, 0)), "8 rows, where the plan allo"),
        (SPLIT_STEP, 2, SplitReply(steps=2, examples=8, bottom={"w": SMASHED}).records(), None),
        (ROSTER, 0, RecordDict({"roster": ArrayRecord({"a": pack(PART)["w"]})}), "unknown array"),
        (SETUP, 0, RecordDict({"ran-on": ConfigRecord({"name": "x" * 10**5})}), "100010 bytes"),
        (SETUP, 0, RecordDict({"other": ConfigRecord()}), "unknown record 'other'"),
    ],
)
def test_what_it_does_not_allow_is_refused(
    kind: str, step: int, records: RecordDict, match: str | None
) -> None:
    if match is None:  # one kilobyte of header is the slack of every array
        BOUNDS.refuse(sent(kind, step), reply(records))
        return
    with pytest.raises(WireError, match=match):
        BOUNDS.refuse(sent(kind, step), reply(records))


def test_a_gradient_of_features_has_the_bytes_of_the_features() -> None:
    asked = sent(HEAD_STEP, records=HeadRequest(round=1, step=0, features=SMASHED).records())
    gradients = [np.zeros((4, ROW), np.float32), np.zeros((400, ROW), np.float32)]
    records = [
        RecordDict({"metrics": MetricRecord({"step": 0}), "upper-gradient": pack({"gradient": g})})
        for g in gradients
    ]
    BOUNDS.refuse(asked, reply(records[0]))
    with pytest.raises(WireError, match=r"8128 bytes, where the plan allows \d+"):
        BOUNDS.refuse(asked, reply(records[1]))


def test_an_update_may_bring_a_counter_back_whole() -> None:
    model = pack({"w": np.zeros(3, np.float32), "n": np.array(1.5)})
    asked = sent(WEIGHTS, records=RecordDict({"arrays": model}))
    trained = RecordDict({"arrays": pack({"w": np.ones(3, np.float32), "n": np.array(2)})})
    Bounds(weights={"n": np.dtype(np.int64)}).refuse(asked, reply(trained))
    Bounds().refuse(asked, reply(trained))
    with pytest.raises(WireError, match=r"'n' of 'arrays' is int64 of shape .*, expected float64"):
        Bounds(weights={"n": np.dtype(np.float64)}).refuse(asked, reply(trained))


def test_samples_are_as_many_as_were_asked_for() -> None:
    asked = sent(SAMPLES, records=RecordDict({"config": ConfigRecord({"count": 2})}))
    for count, fits in ((2, True), (100, False)):
        images = pack({"images": np.zeros((count, 1, 3, 3), np.float32)})
        if fits:
            BOUNDS.refuse(asked, reply(RecordDict({"arrays": images})))
            continue
        with pytest.raises(WireError, match="where the plan allows"):
            BOUNDS.refuse(asked, reply(RecordDict({"arrays": images})))


def test_a_weight_counts_records_arrays_and_words() -> None:
    Weight(bytes=200, parts=2).refuse(RecordDict({"a": ConfigRecord({"x": "y" * 50})}))
    with pytest.raises(WireError, match="3 records and arrays, where the plan allows 2"):
        Weight(bytes=200, parts=2).refuse(RecordDict({k: MetricRecord() for k in "abc"}))
    with pytest.raises(WireError, match="802 bytes, where the plan allows 200"):
        Weight(bytes=200, parts=2).refuse(RecordDict({"a": ConfigRecord({"x": [0.0] * 100})}))
    with pytest.raises(WireError, match="302 bytes, where the plan allows 200"):
        Weight(bytes=200, parts=2).refuse(RecordDict({"a": ConfigRecord({"x": ["yyy"] * 100})}))


@pytest.mark.parametrize(
    "records",
    [
        RecordDict({"ä" * 120: ConfigRecord()}),
        RecordDict({"a": ConfigRecord({"\N{SNOWMAN}" * 70: 1})}),
        RecordDict({"a": ConfigRecord({"x": "\N{GRINNING FACE}" * 60})}),
        RecordDict({"a": ConfigRecord({"x": ["ä"] * 120})}),
        RecordDict({"a": ConfigRecord({"x": "\ud800" * 70})}),  # no text of UTF-8
        RecordDict({"a": MetricRecord({"ä" * 120: 1})}),
    ],
)
def test_names_and_words_weigh_what_they_are_on_the_wire(records: RecordDict) -> None:
    with pytest.raises(WireError, match="bytes, where the plan allows 200"):
        Weight(bytes=200, parts=2).refuse(records)


@pytest.mark.parametrize("seed", range(100))
def test_whatever_passes_weighs_no_more_than_the_plan_allows(seed: int) -> None:
    draw = random.Random(seed)
    step = draw.choice([0, 1, 2])
    kind = draw.choice([SPLIT_STEP, BACKWARD_STEP])
    records = RecordDict({"metrics": MetricRecord({"steps": 2, "num-examples": 8, "step": step})})
    names = ["smashed", "labels", "rows", "w", "n", "junk"]
    for key in draw.sample(["smashed", "sealed.bottom", "relayed.bottom-gradient", "junk"], 2):
        shapes = [(draw.choice([1, 4, 5, 40_000]), *[ROW] * draw.choice([0, 1])) for _ in names]
        arrays = {
            name: np.zeros(shape, draw.choice(["f4", "f8", "i8"]))
            for name, shape in draw.sample(
                list(zip(names, shapes, strict=True)), draw.randint(1, 3)
            )
        }
        records[key] = pack(arrays)
    if draw.random() < 0.3:
        records["metrics"]["x" * draw.choice([1, 10**5])] = 1  # type: ignore[call-overload]
    asked = sent(kind, step)
    most = BOUNDS.weight(Asked.by_message(asked))
    assert most is not None
    assert most.bytes < 100_000
    try:
        BOUNDS.refuse(asked, reply(records))
    except WireError:
        return
    assert count_bytes(reply(records)) <= most.bytes
    assert all(
        key in {"metrics", "smashed", "sealed.bottom"} | {"relayed.bottom-gradient"}
        for key in records
    )


def test_every_split_message_has_a_table() -> None:
    for kind, carried in REPLIES.items():
        assert kind.split(".")[0] in {"train", "evaluate"}
        assert carried.FIELDS


def test_a_grid_that_cannot_be_bound_is_left_alone() -> None:
    bind(object(), BOUNDS)
