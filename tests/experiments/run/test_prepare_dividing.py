"""Who has what under each protocol, from the settings to the trace and the answers behind it."""

from pathlib import Path
from typing import Any

import pytest
import torch

from clients import node_app
from experiments.run.prepare import labels_of, partition_of, prepare
from experiments.run.targets import Evidences, pick_targets
from experiments.run.train import train
from experiments.run.training_run import TrainingRun
from experiments.run.view import build_view
from experiments.settings.cells import Training, cells
from experiments.settings.load import load_settings
from experiments.settings.schema import SettingsError
from leakbed.contracts import Evidence, Seat, ThreatModel
from leakbed.events import Phase, SmashedUp
from leakbed.grids import LocalGrid
from leakbed.models import IllegalCutError
from leakbed.oracle.truth import AnswerKey
from leakbed.seeds import derive
from leakbed.tap.trace import Trace
from strategies import PROTOCOLS, Protocol
from tests.support import tiny

pytestmark = pytest.mark.usefixtures("identity")

AVERAGING = Protocol(
    exchanges="split",
    build=PROTOCOLS["vertical-split"].build,
    labels=("server",),
    divides="features",
    options={"merge": ("mean",)},
)
TABLE: dict[str, Any] = {
    "name": "small",
    "data": {"size": 400, "nodes": 2},
    "model": {"name": "mlp2", "cut": 1},
    "protocol": {"name": "vertical-split", "batch_size": 16, "local_steps": 3},
    "attack": [{"name": "constant-image"}],
}


def training(*overrides: str, merge: str | None = "sum") -> Training:
    table = {**TABLE, "protocol": {**TABLE["protocol"], "merge": merge}}
    return cells(load_settings(table, overrides))[0].training


def trained(folder: Path, *overrides: str, merge: str | None = "sum") -> TrainingRun:
    prepared = prepare(training(*overrides, merge=merge), root=None)
    grid = LocalGrid(node_app, nodes=prepared.data.nodes)
    return train(prepared, grid, folder, roster=grid.roster)


def test_features_are_divided_by_protocols_that_do_so_and_rows_by_the_others() -> None:
    assert partition_of(training()) == "aligned"
    assert partition_of(training("data.partition=aligned")) == "aligned"
    rows = training("protocol.name=vanilla-split", "data.partition=linear", merge=None)
    assert partition_of(rows) == "linear"


@pytest.mark.parametrize(
    ("overrides", "why"),
    [
        (["data.partition=dirichlet", "data.alpha=0.5"], r"it is 'dirichlet'"),
        (["data.alpha=0.5"], r"leave out .*data\.alpha"),
        (["protocol.fraction=0.5"], r"fraction = 0\.5: each party of vertical-split"),
        (["protocol.labels=shared"], "vertical-split takes 'server'"),
    ],
)
def test_settings_that_do_not_fit_the_division_are_refused(overrides: list[str], why: str) -> None:
    with pytest.raises(SettingsError, match=why):
        prepare(training(*overrides), root=None)


def test_aligned_rows_are_refused_where_a_protocol_divides_rows() -> None:
    chosen = training("protocol.name=fedavg", "data.partition=aligned", merge=None)
    with pytest.raises(SettingsError, match="fedavg divides rows"):
        prepare(chosen, root=None)


def test_parts_that_do_not_merge_are_refused_before_anything_is_sent() -> None:
    with pytest.raises(IllegalCutError, match="makes 64 of them, but the top reads 32"):
        prepare(training(merge="concat"), root=None)


def test_labels_follow_the_ids_a_node_names_its_rows_by() -> None:
    aligned, dealt = tiny.recipe(2, partition="aligned"), tiny.recipe(2)
    whole = aligned.dataset().labels
    for node in range(2):
        assert torch.equal(labels_of(aligned, node), whole[aligned.split().private])
        assert torch.equal(labels_of(dealt, node), whole[dealt.split().nodes[node]])


def test_every_smashed_row_comes_from_the_strip_the_answer_key_says(tmp_path: Path) -> None:
    prepared = prepare(training(), root=None)
    run = trained(tmp_path / "run")
    key = AnswerKey.read(run.answers, trace=run.trace)
    assert set(key.order) == {(node, 1, step) for node in range(2) for step in range(3)}
    assert key.order[0, 1, 2] == key.order[1, 1, 2]
    batches = {
        (event.node, event.step): event
        for event in Trace(run.trace).events(SmashedUp)
        if isinstance(event, SmashedUp) and event.phase == Phase.TRAIN
    }
    for node in range(2):
        first = prepared.cell(node).architecture.bottom(
            derive(prepared.stream("victim-init"), f"party/{node}")
        )
        rows = key.order[node, 1, 0]
        images = key.images[rows][..., 14 * node : 14 * (node + 1)]
        sent = torch.from_numpy(batches[node, 0].smashed)
        assert torch.allclose(sent, first(images).detach(), atol=1e-6)
    assert key.bottom is None
    assert key.parties == 2


def test_a_client_can_be_given_cut_gradients_and_its_rows_labels(tmp_path: Path) -> None:
    run = trained(tmp_path / "run")
    recorded = Trace(run.trace)
    evidences = Evidences.of(recorded)
    reads = frozenset({Evidence.SMASHED, Evidence.CUT_GRADIENT})
    client = ThreatModel(seat=Seat.CLIENT, evidence=reads)
    targets = pick_targets(evidences, client, when="training", count=20)
    view = build_view(recorded, evidences, client, targets, device=torch.device("cpu"))
    assert view.cut_gradient is not None
    assert view.cut_gradient.shape == (20, 32)
    assert view.labels is None
    truth = AnswerKey.read(run.answers).truth(targets)
    assert truth.images.shape == (20, 1, 1, 28, 14)
    assert truth.labels.shape == (20, 1)


def test_how_a_protocol_of_ones_own_merges_is_left_to_it() -> None:
    chosen = training(f"protocol.name={__name__}:AVERAGING", merge=None)
    assert prepare(chosen, root=None).settings.protocol.chosen["merge"] == "mean"


def test_one_party_is_one_vanilla_node_with_its_labels_at_the_server(tmp_path: Path) -> None:
    common = ["data.nodes=1", "protocol.rounds=2", "protocol.labels=server"]
    runs = [
        trained(tmp_path / name, f"protocol.name={name}", *common, merge=None)
        for name in ("vertical-split", "vanilla-split")
    ]
    keys = [AnswerKey.read(run.answers) for run in runs]
    assert keys[0].order == keys[1].order
    assert torch.equal(keys[0].images, keys[1].images)
    bottoms = [
        {name: torch.from_numpy(value) for name, value in (key.bottom or {}).items()}
        for key in keys
    ]
    assert bottoms[0]
    assert tiny.same(*bottoms)
    assert runs[0].utility == runs[1].utility
