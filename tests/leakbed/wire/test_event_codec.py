from collections.abc import Iterator
from typing import Any

import numpy as np
import pytest
from flwr.app import Array, ArrayRecord, ConfigRecord, Error, Message, MetricRecord, RecordDict

from leakbed.events import (
    Bottom,
    CutGradientDown,
    Extras,
    Failed,
    Foreign,
    Gradients,
    Phase,
    Sealed,
    SmashedUp,
    UpdateUp,
    WeightsDown,
)
from leakbed.wire.event_codec import events_down, events_up, rewritten
from leakbed.wire.messages import EvaluateRequest, SplitReply, SplitRequest
from leakbed.wire.records import WireError, pack, unpack
from tests.support import tiny


@pytest.fixture(autouse=True)
def identity() -> Iterator[None]:
    with tiny.identity():
        yield


X, Y = np.arange(6, dtype=np.float32).reshape(2, 3), np.array([4, 5])
CONFIG = ConfigRecord({"server-round": 3})
METRICS = MetricRecord({"num-examples": 17})


def down(kind: str, **records: Any) -> Message:
    content = RecordDict({key.replace("_", "."): value for key, value in records.items()})
    return Message(content, dst_node_id=1, message_type=kind)


def up(sent: Message, **records: Any) -> Message:
    return Message(RecordDict(records), reply_to=sent)


def split(request: Any, kind: str = "train.split") -> Message:
    return Message(request.records(), dst_node_id=1, message_type=kind)


def test_fedavg_is_weights_down_and_an_update_up() -> None:
    sent = down("train", arrays=pack({"w": X}), config=CONFIG)
    (event,) = events_down(sent, 5)
    assert isinstance(event, WeightsDown)
    assert (event.node, event.round, event.phase) == (5, 3, Phase.TRAIN)
    assert np.array_equal(event.arrays["w"], X)
    (event,) = events_up(sent, up(sent, arrays=pack({"w": 2 * X}), metrics=METRICS), 5)
    assert isinstance(event, UpdateUp)
    assert (event.node, event.round, event.examples) == (5, 3, 17)
    assert event.train_loss is None
    for key in ("train-loss", "train_loss"):
        (told,) = events_up(sent, up(sent, arrays=pack({"w": X}), m=MetricRecord({key: 0.25})), 5)
        assert isinstance(told, UpdateUp)
        assert told.train_loss == 0.25
    assert np.array_equal(event.before["w"], X)
    assert np.array_equal(event.after["w"], 2 * X)


def test_other_keys_and_actions_are_recognised_too() -> None:
    sent = down("train.mine", model=pack({"w": X}))
    (event,) = events_down(sent, 0)
    assert isinstance(event, WeightsDown)
    assert event.round == 0
    (event,) = events_up(sent, up(sent, result=pack({"w": X})), 0)
    assert isinstance(event, UpdateUp)
    assert event.examples is None


def test_evaluation_sends_weights_down_and_nothing_of_interest_up() -> None:
    sent = down("evaluate", arrays=pack({"w": X}), config=CONFIG)
    (event,) = events_down(sent, 5)
    assert isinstance(event, WeightsDown)
    assert event.phase is Phase.EVALUATE
    assert events_up(sent, up(sent, metrics=METRICS), 5) == []
    (event,) = events_up(sent, up(sent, activations=pack({"a": X})), 5)  # of interest after all
    assert isinstance(event, Foreign)


def test_a_split_step_is_a_gradient_down_and_a_smashed_batch_up() -> None:
    sent = split(SplitRequest(round=3, step=2, gradient=X))
    (event,) = events_down(sent, 5)
    assert isinstance(event, CutGradientDown)
    assert (event.node, event.round, event.step) == (5, 3, 1)  # of the batch before
    assert np.array_equal(event.gradient, X)
    reply = SplitReply(steps=4, examples=8, smashed=X, labels=Y)
    (event,) = events_up(sent, Message(reply.records(), reply_to=sent), 5)
    assert isinstance(event, SmashedUp)
    assert (event.node, event.round, event.step, event.phase) == (5, 3, 2, Phase.TRAIN)
    assert np.array_equal(event.smashed, X)
    assert event.labels.tolist() == [4, 5]
    assert event.rows is None


def test_a_split_evaluation_is_a_bottom_down_and_smashed_test_rows_up() -> None:
    request = EvaluateRequest(round=3, start=256, stop=258, bottom={"w": X})
    sent = split(request, "evaluate.split")
    (event,) = events_down(sent, 5)
    assert isinstance(event, Sealed)
    reply = SplitReply(steps=0, examples=2, smashed=X)
    (event,) = events_up(sent, Message(reply.records(), reply_to=sent), 5)
    assert isinstance(event, SmashedUp)
    assert (event.step, event.phase) == (256, Phase.EVALUATE)


def test_bottoms_show_their_arrays_only_when_relayed() -> None:
    for policy, kind in (("sealed", Sealed), ("relayed", Bottom)):
        sent = split(SplitRequest(round=3, step=0, bottom={"w": X}, bottoms=policy))
        (event,) = events_down(sent, 5)
        reply = SplitReply(steps=1, examples=2, bottom={"w": X}, bottoms=policy)
        (back,) = events_up(sent, Message(reply.records(), reply_to=sent), 5)
        assert type(event) is type(back) is kind
        assert (event.up, back.up) == (False, True)
    assert set(vars(Sealed(node=0, round=1, size=9, up=True))) == {
        "node",
        "round",
        "step",
        "size",
        "up",
    }


def test_an_error_is_a_failure_with_its_reason() -> None:
    sent = down("train", arrays=pack({"w": X}), config=CONFIG)
    (event,) = events_up(sent, Message(Error(0, "out of memory"), reply_to=sent), 5)
    assert isinstance(event, Failed)
    assert (event.message_type, event.reason, event.round) == ("train", "out of memory", 3)


def test_the_harness_is_never_shown() -> None:
    for kind in ("query.setup", "query.roster"):
        sent = down(kind, arrays=pack({"w": X}))
        assert events_down(sent, 5) == []
        assert events_up(sent, up(sent, arrays=pack({"w": X})), 5) == []
        assert events_up(sent, Message(Error(0, "no"), reply_to=sent), 5) == []


@pytest.mark.parametrize("kind", ["query", "query.mine", "train.scaffold"])
def test_foreign_messages_are_copies(kind: str) -> None:
    sent = down(kind, a=pack({"w": X}), b=pack({"v": X}), config=CONFIG)
    for event, message in (
        (events_down(sent, 5)[0], sent),
        (events_up(sent, sent, 5)[0], sent),
    ):
        assert isinstance(event, Foreign)
        assert event.message_type == kind
        assert event.content == message.content
        event.content["a"]["w"] = event.content["b"]["v"]
        event.content["config"]["server-round"] = 9
        del event.content["b"]
        assert np.array_equal(unpack(message.content["a"])["w"], X)
        assert message.content["config"]["server-round"] == 3
        assert "b" in message.content


def test_what_is_sealed_stays_so_in_messages_we_have_no_words_for() -> None:
    only = down("train.other", sealed_bottom=pack({"w": X}), config=CONFIG)
    more = down("train.other", sealed_head=pack({"w": X}), arrays=pack({"v": X}))
    for sent in (only, more):
        for (event,) in (events_down(sent, 5), events_up(sent, sent, 5)):
            assert isinstance(event, Foreign)
            assert not [key for key in event.content if key.startswith("sealed")]
            assert set(rewritten(sent, event)) == set(sent.content)  # but travels on


def test_a_malformed_split_message_is_an_error() -> None:
    sent = down("train.split", **{"cut-gradient": pack({"gradient": X})})
    with pytest.raises(WireError, match="needs a ConfigRecord"):
        events_down(sent, 5)
    sent = down("train.split", config=CONFIG, **{"cut-gradient": pack({"gradient": X})})
    with pytest.raises(WireError, match="whole number 'step'"):
        events_down(sent, 5)


def test_rewriting_changes_the_events_arrays_and_nothing_else() -> None:
    sent = split(SplitRequest(round=3, step=2, gradient=X))
    records = rewritten(sent, CutGradientDown(node=5, round=3, step=1, gradient=-X))
    assert np.array_equal(unpack(records["cut-gradient"])["gradient"], -X)
    assert records["config"] == sent.content["config"]
    reply = Message(SplitReply(steps=4, examples=8, smashed=X, labels=Y).records(), reply_to=sent)
    records = rewritten(reply, SmashedUp(node=5, round=3, step=2, smashed=-X))
    assert np.array_equal(unpack(records["smashed"])["smashed"], -X)
    assert unpack(records["smashed"])["labels"].tolist() == [4, 5]
    assert np.array_equal(unpack(reply.content["smashed"])["smashed"], X)
    assert np.array_equal(unpack(sent.content["cut-gradient"])["gradient"], X)


def test_weights_updates_and_foreign_messages_can_be_rewritten() -> None:
    sent = down("train", mine=pack({"w": X}), config=CONFIG)
    records = rewritten(sent, WeightsDown(node=5, round=3, arrays={"w": -X}))
    assert np.array_equal(unpack(records["mine"])["w"], -X)
    update = UpdateUp(node=5, round=3, before={"w": X}, after={"w": -X})
    assert np.array_equal(unpack(rewritten(sent, update)["mine"])["w"], -X)
    foreign = Foreign(node=5, round=3, message_type="x", up=False, content=RecordDict())
    assert rewritten(sent, foreign) == RecordDict()


def test_a_bottom_cannot_be_rewritten() -> None:
    sent = split(SplitRequest(round=3, step=0, bottom={"w": X}))
    with pytest.raises(WireError, match="Sealed cannot be rewritten"):
        rewritten(sent, Sealed(node=5, round=3, size=1, up=False))


def test_what_travels_beside_the_weights_is_told_too() -> None:
    """As SCAFFOLD and the like do: control variates, settings of their own, metrics."""
    control = pack({"w": -X})
    sent = down(
        "train",
        arrays=pack({"w": X}),
        control=control,
        config=ConfigRecord({"server-round": 3, "lr": 0.5}),
    )
    weights, extras = events_down(sent, 5)
    assert isinstance(weights, WeightsDown)
    assert isinstance(extras, Extras)
    assert (extras.node, extras.round, extras.up, extras.message_type) == (5, 3, False, "train")
    assert set(extras.content) == {"control", "config"}
    assert extras.content["config"]["lr"] == 0.5
    reply = up(
        sent,
        control=control,
        arrays=pack({"w": 2 * X}),
        metrics=MetricRecord({"num-examples": 17, "accuracy": 0.5}),
    )
    update, extras = events_up(sent, reply, 5)
    assert isinstance(update, UpdateUp)
    assert np.array_equal(update.after["w"], 2 * X)
    assert isinstance(extras, Extras)
    assert (extras.round, extras.up) == (3, True)
    assert set(extras.content) == {"control", "metrics"}
    changed = rewritten(reply, UpdateUp(node=5, round=3, before={"w": X}, after={"w": 3 * X}))
    assert np.array_equal(unpack(changed["arrays"])["w"], 3 * X)
    assert np.array_equal(unpack(changed["control"])["w"], -X)
    loud = Extras(**{**vars(extras), "content": RecordDict({"control": pack({"w": X})})})
    changed = rewritten(reply, loud)
    assert set(changed) == {"control", "arrays", "metrics"}
    assert np.array_equal(unpack(changed["control"])["w"], X)


def test_a_second_record_is_told_apart_by_its_names() -> None:
    sent = down("train", model=pack({"w": X}))
    reply = up(sent, control=pack({"c": X}), trained=pack({"w": 2 * X}))
    update, extras = events_up(sent, reply, 5)
    assert isinstance(update, UpdateUp)
    assert np.array_equal(update.after["w"], 2 * X)
    assert isinstance(extras, Extras)
    assert set(extras.content) == {"control"}
    (event,) = events_down(down("train", one=pack({"w": X}), two=pack({"w": X})), 5)
    assert isinstance(event, Foreign)


@pytest.mark.parametrize(
    ("metrics", "examples"),
    [
        ({"num-examples": 17.0, "epochs": 2}, 17),
        ({"num_examples": 17}, 17),
        ({"n": 17, "epochs": 2}, 17),
        ({"train_samples": 17.0, "accuracy": 1.0}, 17),
        ({"weight": 17, "loss": 2.0}, 17),
        ({"weight": 17, "epochs": 2}, None),
        ({"accuracy": 1.0}, None),
        ({"num-examples": 1.5}, None),
        ({}, None),
    ],
    ids=str,
)
def test_the_number_of_samples_is_found_under_any_key(
    metrics: dict[str, float], examples: int | None
) -> None:
    sent = down("train", arrays=pack({"w": X}))
    reply = up(sent, arrays=pack({"w": X}), metrics=MetricRecord(dict(metrics)))
    event, *_ = events_up(sent, reply, 5)
    assert isinstance(event, UpdateUp)
    assert event.examples == examples
    assert type(event.examples) is type(examples)


def test_the_round_is_the_groups_where_no_record_names_it() -> None:
    content = RecordDict({"fitins.parameters": pack({"0": X})})
    sent = Message(content, dst_node_id=1, message_type="train", group_id="4")
    (event,) = events_down(sent, 5)
    assert event.round == 4
    (event,) = events_up(sent, up(sent, metrics=MetricRecord({"a": 1})), 5)
    assert event.round == 4
    other = Message(content, dst_node_id=1, message_type="train", group_id="evening")
    assert events_down(other, 5)[0].round == 0
    named = down("query.x", config=CONFIG)
    (event,) = events_up(named, up(named, metrics=MetricRecord({"a": 1})), 5)
    assert event.round == 3


def test_an_empty_reply_is_no_update() -> None:
    """As of secure aggregation, whose masked vector stands in a configuration, as bytes."""
    masked = ConfigRecord({"masked_parameters": [b"abc"]})
    sent = down("train", fitins_parameters=pack({"0": X}))
    reply = up(sent, **{"fitres.parameters": pack({}), "secaggplus": masked})
    (event,) = events_up(sent, reply, 5)
    assert isinstance(event, Foreign)
    assert event.content["secaggplus"]["masked_parameters"] == [b"abc"]


@pytest.mark.parametrize(
    ("kind", "key", "names"),
    [
        ("train.apply_gradients", "arrays", ["embedding"]),
        ("train.back", "gradients", ["embedding"]),
        ("train", "arrays", ["local-gradients", "w.grad"]),
    ],
)
def test_gradients_are_called_gradients(kind: str, key: str, names: list[str]) -> None:
    sent = down(kind, **{key: pack(dict.fromkeys(names, X))})
    (event,) = events_down(sent, 5)
    assert isinstance(event, Gradients)
    assert not event.up
    assert list(event.arrays) == names
    changed = rewritten(sent, Gradients(node=5, round=0, up=False, arrays={"g": -X}))
    assert np.array_equal(unpack(changed[key])["g"], -X)
    weights = down("train", arrays=pack({"w": X, "upgrade": X}))
    (reply,) = events_up(weights, up(weights, gradients=pack({"w": X})), 5)
    assert isinstance(reply, Gradients)
    assert reply.up
    assert isinstance(events_down(weights, 5)[0], WeightsDown)


def test_what_comes_beside_gradients_is_kept() -> None:
    weights = down("train", arrays=pack({"w": X}))
    metrics = MetricRecord({"num-examples": 3})
    gradients, extras = events_up(weights, up(weights, grads=pack({"w": X}), metrics=metrics), 5)
    assert isinstance(gradients, Gradients)
    assert isinstance(extras, Extras)
    assert extras.content["metrics"]["num-examples"] == 3


def test_arrays_that_are_no_numbers_are_skipped_by_name() -> None:
    strange = Array("int8", (4,), "mine.zip", b"abcd")
    some = pack({"w": X})
    some["zipped"] = strange
    sent = down("train", arrays=some)
    weights, extras = events_down(sent, 5)
    assert isinstance(weights, WeightsDown)
    assert list(weights.arrays) == ["w"]
    assert isinstance(extras, Extras)
    assert extras.skipped == "arrays/zipped (int8 of mine.zip, 4 bytes)"
    none = down("train", arrays=ArrayRecord({"zipped": strange}))
    (event,) = events_down(none, 5)
    assert isinstance(event, Foreign)
    (event,) = events_up(none, none, 5)
    assert isinstance(event, Foreign)


def test_metrics_of_an_evaluation_are_told() -> None:
    sent = down("evaluate", arrays=pack({"w": X}), config=CONFIG)
    metrics = MetricRecord({"num-examples": 17, "accuracy": 0.5})
    (event,) = events_up(sent, up(sent, metrics=metrics), 5)
    assert isinstance(event, Extras)
    assert event.content["metrics"] == metrics
    assert event.round == 3


def test_views_are_read_only() -> None:
    (event,) = events_down(down("train", arrays=pack({"w": X})), 5)
    assert isinstance(event, WeightsDown)
    with pytest.raises(ValueError, match="read-only"):
        event.arrays["w"][:] = 0


@pytest.mark.parametrize("kind", ["train.own", "train.split", "train.head", "train.backward"])
def test_an_app_whose_action_is_named_as_ours_sends_weights(kind: str) -> None:
    sent = down(kind, arrays=pack({"w": X}))
    (event,) = events_down(sent, 5)
    assert isinstance(event, WeightsDown)
    (event,) = events_up(sent, up(sent, arrays=pack({"w": 2 * X}), metrics=METRICS), 5)
    assert isinstance(event, UpdateUp)
    assert np.array_equal(event.after["w"], 2 * X)
