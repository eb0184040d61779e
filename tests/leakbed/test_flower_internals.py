"""These fail, and say so, when Flower moves what the one file that touches its internals uses."""

import pickle
import sys
from collections.abc import Iterator

import numpy as np
import pytest
from flwr.app import Array, ArrayRecord, ConfigRecord, Message, MetricRecord, RecordDict
from flwr.clientapp import ClientApp
from flwr.clientapp.mod import arrays_size_mod
from flwr.common.serde import recorddict_to_proto
from flwr.supercore.task_identity import TaskIdentity

import leakbed.flower_internals
from leakbed.flower_internals import (
    FlowerMovedError,
    assembled,
    filled,
    mods_of,
    set_message_id,
    task_identity,
    with_content,
)

NAMES = ("_run_id", "_task_id", "_node_id")


@pytest.fixture(autouse=True)
def unset(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in NAMES:
        monkeypatch.setattr(TaskIdentity, name, None)


@pytest.fixture
def message() -> Iterator[Message]:
    with task_identity():
        yield Message(RecordDict(), dst_node_id=7, message_type="train")


def test_flower_still_refuses_messages_without_an_identity() -> None:
    with pytest.raises(RuntimeError, match=r"TaskIdentity\.\w+ is not set"):
        Message(RecordDict(), dst_node_id=7, message_type="train")


def test_an_identity_is_lent_and_taken_back() -> None:
    with task_identity():
        Message(RecordDict(), dst_node_id=7, message_type="train")
        assert (TaskIdentity.run_id, TaskIdentity.node_id) == (0, 1)
    assert [getattr(TaskIdentity, name) for name in NAMES] == [None, None, None]


def test_an_identity_that_is_set_stays_as_it_is(monkeypatch: pytest.MonkeyPatch) -> None:
    """Inside `flwr run` it is the run's own."""
    monkeypatch.setattr(TaskIdentity, "_run_id", 42)
    with task_identity():
        assert TaskIdentity.run_id == 42
        with task_identity():
            pass
        assert TaskIdentity.task_id == 0
    assert TaskIdentity.run_id == 42
    assert TaskIdentity._task_id is None


def test_an_identity_is_taken_back_after_an_error() -> None:
    with pytest.raises(KeyError), task_identity():
        raise KeyError
    assert TaskIdentity._run_id is None


@pytest.mark.parametrize("name", NAMES)
def test_an_identity_that_moved_is_said_to_have_moved(
    name: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.delattr(TaskIdentity, name)
    with (
        pytest.raises(FlowerMovedError, match=r"TaskIdentity is not what it was.*flwr>=1.41,<1.42"),
        task_identity(),
    ):
        pass


def test_a_message_gets_its_id(message: Message) -> None:
    set_message_id(message, "local-3")
    assert message.metadata.message_id == "local-3"
    reply = Message(RecordDict(), reply_to=message)
    assert reply.metadata.reply_to_message_id == "local-3"
    assert reply.metadata.src_node_id == 7


def test_an_id_that_moved_is_said_to_have_moved(
    message: Message, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(type(message.metadata), "message_id", property(lambda _: "elsewhere"))
    with pytest.raises(FlowerMovedError, match=r"flwr\.app\.Metadata is not what it was"):
        set_message_id(message, "local-3")


def test_other_content_keeps_the_metadata_and_changes_nothing(message: Message) -> None:
    set_message_id(message, "a")
    other = with_content(message, RecordDict({"x": ConfigRecord({"y": 1})}))
    assert list(other.content) == ["x"]
    assert list(message.content) == []
    assert other.metadata.message_id == "a"
    assert other.metadata.message_type == "train"


def test_metadata_that_moved_are_said_to_have_moved(
    message: Message, monkeypatch: pytest.MonkeyPatch
) -> None:
    def refuse(*args: object, **kwargs: object) -> None:
        raise TypeError("no argument 'metadata'")

    monkeypatch.setattr(leakbed.flower_internals, "Message", refuse)
    with pytest.raises(FlowerMovedError, match=r"flwr\.app\.Message \(no argument 'metadata'\)"):
        assembled(message.metadata, RecordDict())


def test_a_module_that_moved_is_said_to_have_moved_when_it_is_needed(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setitem(sys.modules, "flwr.supercore.task_identity", None)
    moved = r"flwr\.supercore\.task_identity\.TaskIdentity is not what it was in flwr 1\.41"
    with pytest.raises(FlowerMovedError, match=moved), task_identity():
        pass


def test_constants_are_looked_up_when_they_are_asked_for(monkeypatch: pytest.MonkeyPatch) -> None:
    assert isinstance(leakbed.flower_internals.CLIENT_RAISED, int)
    monkeypatch.delitem(vars(leakbed.flower_internals), "CLIPPING_NORM", raising=False)
    with monkeypatch.context() as patch:
        patch.setitem(sys.modules, "flwr.supercore.differential_privacy", None)
        with pytest.raises(FlowerMovedError, match=r"privacy\.KEY_CLIPPING_NORM is not"):
            assert leakbed.flower_internals.CLIPPING_NORM
    assert leakbed.flower_internals.CLIPPING_NORM
    with pytest.raises(AttributeError, match="has no attribute 'OTHER'"):
        assert leakbed.flower_internals.OTHER


def test_a_filled_record_is_what_flower_would_have_made() -> None:
    arrays = {"x": Array(np.arange(3.0))}
    ours: RecordDict = filled(
        RecordDict(),
        {
            "a": filled(ArrayRecord(), arrays),
            "c": filled(ConfigRecord(), {"y": 1}),
            "m": filled(MetricRecord(), {"z": 2.0}),
        },
    )
    theirs = RecordDict(
        {"a": ArrayRecord(arrays), "c": ConfigRecord({"y": 1}), "m": MetricRecord({"z": 2.0})}
    )
    assert ours == theirs
    assert recorddict_to_proto(ours) == recorddict_to_proto(theirs)
    assert ours.array_records["a"].object_id == theirs.array_records["a"].object_id
    ours["a"]["y"] = Array(np.zeros(1))  # type: ignore[index]
    assert list(theirs.array_records["a"]) == ["x"]


def test_items_that_moved_are_said_to_have_moved() -> None:
    record = ConfigRecord()
    record.__dict__["_data"] = None
    with pytest.raises(FlowerMovedError, match=r"flwr\.app\.ConfigRecord is not what it was"):
        filled(record, {})


def test_an_apps_mods_can_be_read() -> None:
    assert mods_of(ClientApp(mods=[arrays_size_mod])) == (arrays_size_mod,)
    assert mods_of(ClientApp()) == ()
    app = ClientApp()
    del app._mods
    with pytest.raises(FlowerMovedError, match=r"flwr\.clientapp\.ClientApp"):
        mods_of(app)


def test_what_moved_is_told_once_however_many_processes_it_passes() -> None:
    error = FlowerMovedError("TaskIdentity")
    for _ in range(2):
        error = pickle.loads(pickle.dumps(error))  # noqa: S301
    assert str(error) == str(FlowerMovedError("TaskIdentity"))
    assert str(error).startswith("TaskIdentity is not")
