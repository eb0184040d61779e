"""A training run keeps a trace an adversary may have and answers only the oracle may open."""

import shutil
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest
import torch
from flwr.app import ArrayRecord, Message

from clients import node_app
from experiments.run.prepare import prepare
from experiments.run.train import NodeCountError, NonFiniteError, _whole_accuracy, train
from experiments.run.training_run import TrainingRun
from experiments.settings.cells import Training, cells
from experiments.settings.load import load_settings
from leakbed.events import Bottom, Sealed, SmashedUp, UpdateUp
from leakbed.flower_internals import task_identity
from leakbed.grids import LocalGrid, NodeFailed
from leakbed.oracle.truth import AnswerKey
from leakbed.tap.trace import Trace
from leakbed.wire.records import BOTTOMS, pack, unpack
from tests.support import several_nodes

TABLE = {
    "name": "small",
    "data": {"size": 400, "nodes": 2},
    "model": {"name": "mlp2", "cut": 1},
    "protocol": {"name": "vanilla-split", "batch_size": 16, "local_steps": 3, "rounds": 2},
    "attack": [{"name": "constant-image"}],
}


@pytest.fixture(autouse=True)
def identity() -> Iterator[None]:
    with task_identity():
        yield


def training(*overrides: str) -> Training:
    return cells(load_settings(TABLE, overrides))[0].training


def trained(folder: Path, *overrides: str, nodes: int = 2) -> TrainingRun:
    grid = LocalGrid(node_app, nodes=nodes)
    prepared = prepare(training(*overrides), root=None)
    return train(prepared, grid, folder, roster=grid.roster)


def test_a_run_that_another_finished_meanwhile_is_taken_and_other_failures_are_told(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    other = trained(tmp_path / "other", "protocol.rounds=1")
    rename = Path.rename

    def beaten(work: Path, folder: Path) -> None:
        shutil.copytree(other.folder, folder)
        rename(work, folder)  # not empty any more

    monkeypatch.setattr(Path, "rename", beaten)
    assert trained(tmp_path / "run").cost == other.cost

    def full(work: Path, _: Path) -> None:
        raise OSError(f"no space left for {work.name}")

    monkeypatch.setattr(Path, "rename", full)
    with pytest.raises(OSError, match="no space left"):
        trained(tmp_path / "none")


def test_the_trace_tells_what_an_adversary_may_know_and_nothing_else(tmp_path: Path) -> None:
    run = trained(tmp_path / "run", "protocol.learning_rate=0.0625")
    about = Trace(run.trace).about
    assert about["architecture"]["name"] == "mlp2"
    text = (run.trace / "index.jsonl").read_text()
    for secret in ("seed", "stream", "0.0625", "learning"):
        assert secret not in text


def test_private_rows_are_in_the_answers_and_not_in_the_trace(tmp_path: Path) -> None:
    run = trained(tmp_path / "run")
    answers = AnswerKey.read(run.answers)
    private = {image.numpy().tobytes() for image in answers.images}
    trace = Trace(run.trace)
    for event in trace.events(SmashedUp):
        assert not private & {row.tobytes() for row in event.smashed}  # type: ignore[attr-defined]
    public = trace.holding("adversary", "public")
    assert public is not None
    assert not private & {image.tobytes() for image in public["images"]}


@pytest.mark.parametrize("bottoms", ["sealed", "relayed"])
def test_only_a_relayed_bottom_can_be_read(tmp_path: Path, bottoms: str) -> None:
    run = trained(tmp_path / "run", f"protocol.bottoms={bottoms}")
    trace = Trace(run.trace)
    assert bool(list(trace.events(Sealed))) == (bottoms == "sealed")
    assert bool(list(trace.events(Bottom))) == (bottoms == "relayed")


def test_who_holds_the_labels_changes_no_number(tmp_path: Path) -> None:
    shared = trained(tmp_path / "a")
    server = trained(tmp_path / "b", "protocol.labels=server")
    held = [Trace(run.trace).holding("server", "model/round-2") for run in (shared, server)]
    assert held[0] is not None
    assert held[1] is not None
    for name in held[0]:
        np.testing.assert_array_equal(held[0][name], held[1][name])
    assert all(e.labels is None for e in Trace(server.trace).events(SmashedUp))  # type: ignore[attr-defined]


def test_smashed_rows_are_those_the_answer_key_says(tmp_path: Path) -> None:
    run = trained(tmp_path / "run")
    answers = AnswerKey.read(run.answers)
    events = [e for e in Trace(run.trace).events(SmashedUp) if e.phase == "train"]  # type: ignore[attr-defined]
    assert events
    for event in events:
        rows = answers.order[event.node, event.round, event.step]
        assert isinstance(event, SmashedUp)
        assert event.labels is not None
        assert answers.labels[torch.tensor(rows)].tolist() == event.labels.tolist()


def test_another_number_of_nodes_prints_the_flag_to_use(tmp_path: Path) -> None:
    with pytest.raises(NodeCountError, match='--federation-config "num-supernodes=2"'):
        trained(tmp_path / "run", nodes=3)


def test_training_that_diverges_says_where(tmp_path: Path) -> None:
    with pytest.raises((NonFiniteError, NodeFailed), match=r"round 1.*learning_rate"):
        trained(tmp_path / "run", "protocol.learning_rate=1e30")
    assert TrainingRun.read(tmp_path / "run") is None


def test_a_trace_keeps_the_last_round_unless_all_are_asked_for(tmp_path: Path) -> None:
    last = trained(tmp_path / "a")
    every = trained(tmp_path / "b", "keep_rounds=all")
    assert {e.round for e in Trace(last.trace).events(SmashedUp)} == {2}
    assert {e.round for e in Trace(every.trace).events(SmashedUp)} == {1, 2}
    assert last.utility == every.utility


def test_a_trace_keeps_the_rounds_that_an_attack_of_the_case_reads(tmp_path: Path) -> None:
    changes = ("attack=[{name='smashed-as-image', collect='first'}]", "protocol.rounds=3")
    run = trained(tmp_path / "a", *changes)
    assert {e.round for e in Trace(run.trace).events(SmashedUp)} == {1, 3}


def test_a_node_that_diverges_is_named_by_its_partition(tmp_path: Path) -> None:
    with pytest.raises((NonFiniteError, NodeFailed), match="node 0"):
        trained(tmp_path / "run", "protocol.learning_rate=1e30")


@pytest.mark.parametrize("protocol", ["fedavg", "vanilla-split"])
def test_without_held_out_rows_there_is_no_utility(tmp_path: Path, protocol: str) -> None:
    run = trained(tmp_path / "run", "data.test=0", f"protocol.name={protocol}")
    assert run.utility == {}


@pytest.mark.parametrize(
    ("nodes", "spoiler", "changes"),
    [
        (2, 1, ["protocol.name=vanilla-split"]),  # the second node looks at it
        (2, 2, ["protocol.name=vanilla-split"]),
        (2, 2, ["protocol.name=u-shaped", "model={name='mnistnet', cut=2, upper_cut=7}"]),
        (1, 1, ["protocol.name=vertical-split", "data.nodes=1"]),
    ],
)
def test_a_last_bottom_that_nobody_evaluates_is_looked_at_by_whoever_opens_it(
    tmp_path: Path, nodes: int, spoiler: int, changes: list[str]
) -> None:
    def spoil(reply: Message) -> None:
        if reply.metadata.src_node_id == spoiler and BOTTOMS["sealed"] in reply.content:
            bottom = unpack(reply.content.array_records[BOTTOMS["sealed"]])
            name = list(bottom)[-1]
            bottom[name] = np.full_like(bottom[name], np.nan)
            reply.content[BOTTOMS["sealed"]] = pack(bottom)

    inner = LocalGrid(node_app, nodes=nodes)
    grid = several_nodes.Altered(inner, spoil)
    prepared = prepare(training("data.test=0", "protocol.rounds=1", *changes), root=None)
    with pytest.raises(NodeFailed, match="not finite") as failed:
        train(prepared, grid, tmp_path / "run", roster=inner.roster)
    assert failed.value.node == spoiler - 1
    assert TrainingRun.read(tmp_path / "run") is None


def test_a_network_without_finite_outputs_is_never_right() -> None:
    """Taken as class 0, it would have the utility of that class's share."""
    ready = prepare(training("protocol.name=fedavg"), root=None)
    broken = {
        name: torch.full_like(value, torch.nan)
        for name, value in ready.architecture.build(0).state_dict().items()
    }
    assert (ready.data.dataset().labels[ready.data.split().test] == 0).any()
    assert _whole_accuracy(ready, ArrayRecord(broken)) == 0


def test_what_an_update_says_beside_its_weights_is_in_the_trace(tmp_path: Path) -> None:
    ups = list(Trace(trained(tmp_path / "run", "protocol.name=fedavg").trace).events(UpdateUp))
    assert [up.examples for up in ups] == [48, 48]
    assert all(up.train_loss is not None and up.train_loss > 0 for up in ups)


@pytest.mark.parametrize(
    ("settings", "told"),
    [
        ({"name": "local-dp", "epsilon": 0.5}, False),
        ({"name": "local-dp", "sensitivity": 0.0}, True),
        ({"name": "weight-noise", "form": "corrected"}, False),
        ({"name": "weight-noise"}, True),
        ({"name": "weight-sparsification"}, True),
    ],
)
def test_under_a_claim_of_privacy_no_loss_is_sent(
    tmp_path: Path, settings: dict[str, object], told: bool
) -> None:
    """One exact loss names the batch behind it, whatever noise is on the weights."""
    table = {**TABLE, "protocol": {**TABLE["protocol"], "name": "fedavg"}, "defense": [settings]}
    chosen = prepare(cells(load_settings(table, ()))[0].training, root=None)
    grid = LocalGrid(node_app, nodes=2)
    made = train(chosen, grid, tmp_path / "run", roster=grid.roster)
    ups = list(Trace(made.trace).events(UpdateUp))
    assert [up.examples for up in ups] == [48, 48]
    assert [up.train_loss is not None for up in ups] == [told, told]


@pytest.mark.parametrize("name", ["local-dp", "weight-noise"])
def test_noise_on_batchnorm_leaves_a_network_that_answers(tmp_path: Path, name: str) -> None:
    settings = {
        "local-dp": {"name": name, "epsilon": 0.5},
        "weight-noise": {"name": name, "scale": 2.0},
    }[name]
    table = {
        **TABLE,
        "model": {"name": "two-blocks", "cut": 1},
        "protocol": {**TABLE["protocol"], "name": "fedavg"},
        "defense": [settings],
    }
    chosen = prepare(cells(load_settings(table, ()))[0].training, root=None)
    grid = LocalGrid(node_app, nodes=2)
    made = train(chosen, grid, tmp_path / "run", roster=grid.roster)
    held = Trace(made.trace).holding("server", "model/round-2")
    assert held is not None
    variances = [value for key, value in held.items() if key.endswith("running_var")]
    assert variances
    assert all((value >= 0).all() for value in variances)
    model = chosen.architecture.build(0).eval()
    model.load_state_dict({key: torch.from_numpy(value) for key, value in held.items()})
    with torch.no_grad():
        assert model(chosen.data.dataset().images[:50]).isfinite().all()
