from dataclasses import replace

import pytest
from flwr.app import ConfigRecord, MetricRecord, RecordDict

from leakbed.provenance import OtherInputsError, RanOn
from leakbed.wire.messages import RAN_ON
from tests.support import tiny
from tests.support.strange_nodes import message

HERE = RanOn.here(tiny.recipe(), tiny.architecture())


def reply(record: ConfigRecord | MetricRecord | None) -> RanOn | None:
    """What a node is read to have that answers with a record."""
    with tiny.identity():
        answer = message(1, "any")
    answer.content = RecordDict({} if record is None else {RAN_ON: record})
    return RanOn.of(answer)


def test_what_a_process_has_arrives_as_it_was_sent() -> None:
    assert reply(HERE.record()) == HERE
    assert HERE.modules.startswith("tests.support.tiny (")
    HERE.check("node 0", HERE)


@pytest.mark.parametrize(
    "record",
    [
        None,
        MetricRecord({"data": 1}),
        ConfigRecord({"data": "a"}),
        ConfigRecord({"data": b"a", "code": "b", "name": "c", "modules": "d"}),
    ],
)
def test_a_node_that_says_nothing_of_use_is_refused(
    record: ConfigRecord | MetricRecord | None,
) -> None:
    assert reply(record) is None
    with pytest.raises(OtherInputsError, match="node 3 does not say which data it has"):
        HERE.check("node 3", reply(record))


def test_other_data_name_the_setting_and_other_code_the_files() -> None:
    with pytest.raises(
        OtherInputsError, match=r"data.name = 'tests.support.tiny:images' gave 123456789012"
    ):
        HERE.check("node 1", replace(HERE, data="1234567890123"))
    with pytest.raises(
        OtherInputsError, match=r"tests.support.tiny \(elsewhere\), where the experiment has"
    ):
        HERE.check("node 1", replace(HERE, code="0", modules="tests.support.tiny (elsewhere)"))


def test_the_catalogues_own_names_are_no_code() -> None:
    data, network = replace(tiny.recipe(), name="mnist-5k", size=100), tiny.architecture()
    here = RanOn.here(data, replace(network, name="mlp2"))
    assert (here.code, here.modules) == ("", "")
