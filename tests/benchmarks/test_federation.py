import pytest
from flwr.app import Message

from benchmarks.federation import NamedApp, told
from clients import node_app
from leakbed.grids import LocalGrid, NodeFailed
from leakbed.wire.messages import SPLIT_STEP, SplitRequest
from tests.support import tiny

pytestmark = pytest.mark.usefixtures("identity")


def test_every_node_knows_its_own_cell_afterwards() -> None:
    asked: list[int] = []

    def cell(partition: int) -> object:
        asked.append(partition)
        return tiny.cell(partition, 3)

    grid = told(LocalGrid(node_app, nodes=3), cell, nodes=3, stream=0)  # type: ignore[arg-type]
    assert asked == [0, 1, 2]
    records = SplitRequest(round=1, step=0).records()
    message = Message(records, dst_node_id=2, message_type=SPLIT_STEP)
    with pytest.raises(NodeFailed, match="node 1 was sent no bottom"):  # and not: no cell
        grid.send_and_receive([message])


def test_the_app_travels_by_name() -> None:
    make, (name,) = NamedApp().__reduce__()
    assert make(name) is node_app
