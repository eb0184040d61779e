import json
import sys
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from flwr.app import Context, Message, RecordDict
from flwr.clientapp import ClientApp

from clients import node_app
from clients.node import (
    NoCellError,
    NodeConfig,
    TrainingPlan,
    UnlistedError,
    cell_defenses,
    one_torch_thread,
    own_code,
)
from defenses import SmashedNoise, WeightNoise
from leakbed.grids import LocalGrid, ask_roster
from leakbed.tensors import UnavailableDeviceError
from leakbed.wire.messages import RAN_ON, SETUP
from tests.support import tiny

pytestmark = pytest.mark.usefixtures("identity")


def context() -> Context:
    return Context(run_id=1, node_id=1, node_config={}, state=RecordDict(), run_config={})


def told(cell: NodeConfig) -> Context:
    kept = context()
    kept.state["leakbed.cell"] = cell.record()
    return kept


def setup(grid: LocalGrid, cell: NodeConfig) -> Message:
    records = RecordDict({"cell": cell.record()})
    (reply,) = grid.send_and_receive([Message(records, dst_node_id=1, message_type=SETUP)])
    return reply


def test_a_cell_survives_its_record() -> None:
    cell = tiny.cell(
        1,
        2,
        data=tiny.recipe(2, partition="dirichlet", partition_settings=(("alpha", 0.1),)),
        plan=tiny.plan(local_steps=None, learning_rate=0.1 + 0.2),
        defenses=(("weight-noise", {"scale": 0.1}), ("smashed-noise", {"sigma": 1.0})),
    )
    assert NodeConfig.of(told(cell)) == cell
    assert cell.stream > 2**53  # more than a float holds


def test_a_cell_names_its_defenses() -> None:
    cell = tiny.cell(defenses=(("weight-noise", {"scale": 0.1}), ("smashed-noise", {})))
    defenses, stream = cell_defenses(told(cell))
    assert defenses == (WeightNoise(scale=0.1), SmashedNoise())
    assert stream == cell.defense_stream
    assert cell_defenses(context()) == ((), 0)


def test_nothing_works_before_the_setup() -> None:
    with pytest.raises(NoCellError, match=r"no query\.setup before"):
        NodeConfig.of(context())


def test_rows_are_the_partitions_and_test_rows_nobodys() -> None:
    dataset, split = tiny.recipe(2).dataset(), tiny.recipe(2).split()
    for node in range(2):
        images, labels = tiny.cell(node, 2).rows()
        assert torch.equal(images, dataset.images[split.nodes[node]])
        assert torch.equal(labels, dataset.labels[split.nodes[node]])
    assert torch.equal(tiny.cell().test_images(1, 3), dataset.images[split.test[1:3]])


def test_setup_answers_with_the_rows_and_forgets_the_cell_before() -> None:
    grid = LocalGrid(node_app, nodes=1)
    assert setup(grid, tiny.cell()).content["ready"]["rows"] == 43
    kept = grid._host._contexts[1]
    kept.state["leakbed.optimiser"] = tiny.cell().record()
    kept.live["bottom"] = object()
    assert setup(grid, tiny.cell(model="stateful")).content["ready"]["rows"] == 43
    assert set(kept.state) == {"leakbed.cell"}
    assert kept.live == {}
    assert NodeConfig.of(kept).architecture == tiny.architecture("stateful")


def test_setup_refuses_a_batch_larger_than_the_partition() -> None:
    reply = setup(LocalGrid(node_app, nodes=1), tiny.cell(plan=tiny.plan(batch_size=44)))
    assert "BatchTooLargeError: batch_size is 44 but a node has only 43" in reply.error.reason


def test_auto_is_decided_at_the_setup_and_a_gpu_that_vanishes_is_an_error(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    seen = [True]
    monkeypatch.setattr(torch.cuda, "is_available", lambda: seen[0])
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 1)
    monkeypatch.setattr("clients.node.describe_device", lambda device: {"name": str(device)})
    grid = LocalGrid(node_app, nodes=1)
    assert setup(grid, tiny.cell(device="auto")).content[RAN_ON]["device"] == "cuda"
    seen[0] = False
    kept = NodeConfig.of(grid._host._contexts[1])
    with pytest.raises(UnavailableDeviceError, match=r"'cuda' asked for, but .* sees 0 CUDA"):
        kept.torch_device()
    setup(grid, tiny.cell(device="auto"))
    assert NodeConfig.of(grid._host._contexts[1]).torch_device().type == "cpu"


def test_the_roster_is_asked_of_the_nodes() -> None:
    assert ask_roster(LocalGrid(node_app, nodes=3)) == {1: 0, 2: 1, 3: 2}


def test_a_plan_refuses_an_optimizer_it_does_not_know() -> None:
    with pytest.raises(ValueError, match="unknown optimizer 'SGD'; did you mean 'sgd'"):
        tiny.plan(optimizer="SGD")


def test_a_plan_makes_the_optimizer_it_names() -> None:
    weights = [torch.nn.Parameter(torch.zeros(2))]
    sgd = tiny.plan(learning_rate=0.3, momentum=0.5, weight_decay=0.1).optimiser(weights)
    assert isinstance(sgd, torch.optim.SGD)
    assert [sgd.defaults[k] for k in ("lr", "momentum", "weight_decay")] == [0.3, 0.5, 0.1]
    adam = TrainingPlan(batch_size=1, local_steps=1, optimizer="adam").optimiser(weights)
    assert isinstance(adam, torch.optim.Adam)


def test_every_handler_runs_on_one_thread_in_whatever_thread_it_is_called() -> None:
    seen = []
    app = ClientApp(mods=[one_torch_thread])

    @app.query("count")
    def count(message: Message, context: Context) -> Message:
        seen.append(torch.get_num_threads())
        return Message(RecordDict(), reply_to=message)

    torch.set_num_threads(2)
    try:
        message = Message(RecordDict(), dst_node_id=1, message_type="query.count")
        list(LocalGrid(app, nodes=1).send_and_receive([message], timeout=60))
    finally:
        torch.set_num_threads(1)
    assert seen == [1]


def test_the_record_is_plain_json() -> None:
    fields = json.loads(str(tiny.cell().record()["json"]))
    assert fields["plan"]["batch_size"] == 8
    assert fields["architecture"]["name"] == "tests.support.tiny:plain"


def test_feature_parties_share_an_order_and_see_their_strips() -> None:
    data = tiny.recipe(2, partition="aligned")
    parties = [tiny.cell(node, 2, data=data, order_stream=7) for node in range(2)]
    first, second = (cell.batches(1, 43) for cell in parties)
    assert all(torch.equal(a, b) for a, b in zip(first, second, strict=True))
    own = tiny.cell(0, 2, data=data).batches(1, 43)
    assert not torch.equal(own[0], first[0])
    assert [cell.rows()[0].shape[-1] for cell in parties] == [3, 3]
    held_out = torch.cat([cell.test_images(0, 4) for cell in parties], dim=-1)
    assert torch.equal(held_out, tiny.cell().test_images(0, 4))


@pytest.mark.parametrize("simulated", [True, False])
def test_a_run_config_names_the_users_code_in_simulations_only(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path, simulated: bool
) -> None:
    monkeypatch.setattr("clients.node.is_simulated", lambda: simulated)
    monkeypatch.setattr(sys, "path", list(sys.path))
    context = Context(1, 1, {}, RecordDict(), {"code": str(tmp_path)})
    message = Message(RecordDict(), dst_node_id=1, message_type="query.any")
    assert own_code(message, context, lambda message, _: message) is message
    assert (sys.path[0] == str(tmp_path)) == simulated


LISTED = {"import-paths": "tests.support.tiny:images, tests.support.tiny:plain"}


@pytest.mark.parametrize(
    ("data", "config", "refused"),
    [
        ({"name": "os:getcwd"}, LISTED, r"data\.name = 'os:getcwd'.*import-paths=\"os:getcwd\""),
        ({"public_from": "os:getcwd"}, LISTED, r"data\.public_from = 'os:getcwd'.*import-paths"),
        (
            {},
            {"import-paths": "tests.support.tiny:images"},
            r"model\.name = 'tests\.support\.tiny:plain'.*import-paths",
        ),
        ({"download": True}, LISTED, r"data\.download = True.*download=true"),
        ({"download": True}, LISTED | {"download": "false"}, r"download=true"),
    ],
)
def test_in_a_deployment_a_node_imports_and_reads_only_what_its_operator_lists(
    monkeypatch: pytest.MonkeyPatch,
    data: dict[str, Any],
    config: dict[str, str | bool],
    refused: str,
) -> None:
    monkeypatch.setattr("clients.node.is_simulated", lambda: False)  # whatever else ran here
    imports: list[str] = []
    monkeypatch.setattr("leakbed.data.sources.import_object", imports.append)
    monkeypatch.setattr("leakbed.models.architecture.import_object", imports.append)
    cell = tiny.cell(data=replace(tiny.recipe(), **data))
    kept = Context(1, 1, {"partition-id": 0, **config}, RecordDict({"b": cell.record()}), {})
    message = Message(RecordDict({"cell": cell.record()}), dst_node_id=1, message_type=SETUP)
    with pytest.raises(UnlistedError, match=refused):
        node_app(message, kept)
    assert imports == []
    assert list(kept.state) == ["b"]  # what the node knew before is still there


@pytest.mark.parametrize(
    ("named", "refused"),
    [
        ({"defenses": (("os:Mask", {}),)}, r"defense\.name \(0\) = 'os:Mask'.*import-paths"),
        ({"intruder": ("os:Gan", {})}, r"attack\.name = 'os:Gan'.*import-paths"),
        ({"protocol": "os:RING"}, r"protocol\.name = 'os:RING'.*import-paths"),
    ],
)
def test_in_a_deployment_a_node_imports_no_plugin_that_its_operator_does_not_list(
    monkeypatch: pytest.MonkeyPatch, named: dict[str, Any], refused: str
) -> None:
    monkeypatch.setattr("clients.node.is_simulated", lambda: False)
    imports: list[str] = []
    monkeypatch.setattr("leakbed.plugins.import_object", imports.append)
    kept = Context(1, 1, {"partition-id": 0, **LISTED}, RecordDict(), {})
    sent = RecordDict({"cell": replace(tiny.cell(), **named).record()})
    with pytest.raises(UnlistedError, match=refused):
        node_app(Message(sent, dst_node_id=1, message_type=SETUP), kept)
    assert imports == []


@pytest.mark.parametrize(("config", "root"), [({}, None), ({"data-root": "/own"}, "/own")])
def test_in_a_deployment_a_node_takes_what_its_operator_lists_and_its_own_folder(
    monkeypatch: pytest.MonkeyPatch, config: dict[str, str], root: str | None
) -> None:
    monkeypatch.setattr("clients.node.is_simulated", lambda: False)
    cell = tiny.cell(data=replace(tiny.recipe(), root="/the/servers"))
    kept = Context(1, 1, {"partition-id": 0, **LISTED, **config}, RecordDict(), {})
    message = Message(RecordDict({"cell": cell.record()}), dst_node_id=1, message_type=SETUP)
    assert node_app(message, kept).content["ready"]["rows"] == 43
    assert NodeConfig.of(kept).data.root == root


def test_in_flowers_simulation_the_settings_name_import_paths(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr("clients.node.is_simulated", lambda: True)
    kept = Context(1, 1, {"partition-id": 0}, RecordDict(), {})
    message = Message(RecordDict({"cell": tiny.cell().record()}), dst_node_id=1, message_type=SETUP)
    assert node_app(message, kept).content["ready"]["rows"] == 43
