"""Defences of labels and cut gradients through a whole run: who applies them, and what is left."""

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

from clients import node_app
from defenses import DPCutGradient
from experiments.run.attack import Cell
from experiments.run.fit import unfit
from experiments.run.prepare import labels_of, prepare
from experiments.run.runner import run
from experiments.run.train import _labels_at_server, train
from experiments.run.training_run import TrainingRun
from experiments.settings.cells import cells
from experiments.settings.load import load_settings
from leakbed.contracts import IllegalCombinationError
from leakbed.contracts.gradient_defenses import HorizonError
from leakbed.events import CutGradientDown, SmashedUp, UpperGradientUp
from leakbed.grids import LocalGrid
from leakbed.oracle.truth import AnswerKey
from leakbed.tap.trace import Trace
from strategies import PROTOCOLS, Protocol
from strategies.node_session import NodeSession
from strategies.protocol import BuiltProtocol, ProtocolSetup
from strategies.server_model import TopTrainer
from strategies.vanilla_split import VanillaSplit

pytestmark = pytest.mark.usefixtures("identity")

TABLE = {
    "name": "small",
    "data": {"size": 200, "nodes": 2},
    "model": {"name": "tabular-mlp", "cut": 2},
    "protocol": {
        "name": "vanilla-split",
        "labels": "server",
        "batch_size": 16,
        "local_steps": 6,
        "rounds": 2,
    },
    "keep_rounds": "all",
    "attack": [{"name": "constant-image"}],
}
U_SHAPED = ("protocol.name=u-shaped", "protocol.labels=client", "model.upper_cut=6")
BINARY = ("data.name=breast-cancer", "data.size=300")


def prepared(*overrides: str, **defense: Any) -> Any:
    table = {**TABLE, "defense": [defense or {"name": "none"}]}
    return prepare(cells(load_settings(table, overrides))[0].training, root=None)


def trained(folder: Path, *overrides: str, **defense: Any) -> TrainingRun:
    grid = LocalGrid(node_app, nodes=2)
    return train(prepared(*overrides, **defense), grid, folder, roster=grid.roster)


def events(run: TrainingRun, kind: type[Any]) -> list[Any]:
    return [e for e in Trace(run.trace).events(kind) if getattr(e, "phase", "train") == "train"]


def gradients(run: TrainingRun, kind: type[Any] = CutGradientDown) -> list[Tensor]:
    return [torch.tensor(event.gradient) for event in events(run, kind)]


def test_the_server_compresses_what_it_sends(tmp_path: Path) -> None:
    plain = gradients(trained(tmp_path / "plain"))
    sent = gradients(trained(tmp_path / "run", name="gradient-compression", ratio=0.25))
    assert all(each.count_nonzero() == each.numel() / 4 for each in sent)
    assert len(sent) == len(plain) == 24
    kept = sent[0] != 0
    assert torch.equal(sent[0][kept], plain[0][kept])


def test_a_u_shaped_node_protects_the_gradient_that_leaves_its_head(tmp_path: Path) -> None:
    defense = {"name": "gradient-compression", "ratio": 0.25}
    run = trained(tmp_path / "run", *U_SHAPED, **defense)
    upper = gradients(run, UpperGradientUp)
    assert len(upper) == 24
    assert all(each.count_nonzero() <= each.numel() / 4 for each in upper)
    assert any(each.count_nonzero() > each.numel() / 4 for each in gradients(run))


def test_marvell_is_told_the_labels_wherever_they_are(tmp_path: Path) -> None:
    for place, kind in (((), CutGradientDown), (U_SHAPED, UpperGradientUp)):
        folder, once = tmp_path / kind.__name__, (*BINARY, "protocol.local_steps=1", *place)
        plain = gradients(trained(folder / "plain", *once), kind)
        sent = gradients(trained(folder / "run", *once, name="marvell"), kind)
        noise = sent[0] - plain[0]
        # The first batch has the undefended gradients, whose classes' means are this far apart.
        assert 0.1 < noise.square().sum(1).mean() / plain[0].square().sum(1).mean() < 10


def share_kept(run: TrainingRun) -> tuple[float, dict[tuple[int, int], set[int]]]:
    """How many shared labels are true, and every label that each row was sent with."""
    answers, hits = AnswerKey.read(run.answers), []
    sent: dict[tuple[int, int], set[int]] = {}
    for event in events(run, SmashedUp):
        rows = answers.order[event.node, event.round, event.step]
        for row, label in zip(rows, event.labels.tolist(), strict=True):
            sent.setdefault((event.node, row), set()).add(label)
    hits = [answers.labels[row].item() in labels for (_, row), labels in sent.items()]
    return sum(hits) / len(hits), sent


def test_shared_labels_are_noisy_and_the_same_in_every_round(tmp_path: Path) -> None:
    run = trained(tmp_path / "run", "protocol.labels=shared", name="label-dp", epsilon=1.0)
    kept, sent = share_kept(run)
    assert abs(kept - 0.232) < 4 * (0.232 * 0.768 / len(sent)) ** 0.5
    assert {len(labels) for labels in sent.values()} == {1}
    assert share_kept(trained(tmp_path / "plain", "protocol.labels=shared"))[0] == 1


def test_no_label_is_noised_to_an_output_that_the_data_has_no_class_for() -> None:
    for place in ("shared", "server"):
        wide = ("model.extra_classes=90", f"protocol.labels={place}", "data.size=800")
        made = prepared(*wide, name="label-dp", epsilon=0.01)
        assert made.architecture.num_classes == 100
        own = made.cell(0).training_rows()[1] if place == "shared" else _labels_at_server(made, 0)
        assert own.unique().tolist() == list(range(10))


def test_first_gradients_say_the_noisy_labels_and_no_more(tmp_path: Path) -> None:
    table = {
        **TABLE,
        "data": {"size": 1000, "nodes": 1},
        "model": {"name": "mlp2", "cut": 1},
        "protocol": {"name": "vanilla-split", "labels": "server", "batch_size": 64},
        "attack": [{"name": "similarity-clustering", "targets": 1000, "known_per_class": 0}],
        "defense": [{"name": "none"}, {"name": "label-dp", "epsilon": 1.0}],
    }
    plain, noised = run(table, out=tmp_path)
    count = plain.scores["targets"]
    assert plain.scores["cluster_accuracy"]["mean"] > 0.99
    # One of ten classes stays with e / (e + 9); the best naming of ten clusters adds a little.
    error = (0.232 * 0.768 / count) ** 0.5
    assert abs(noised.scores["cluster_accuracy"]["mean"] - 0.232) < 3 * error


def test_labels_at_the_server_are_noisy_there(tmp_path: Path) -> None:
    run = trained(tmp_path / "run", name="label-dp", epsilon=0.1)
    plain = trained(tmp_path / "plain")
    assert all(event.labels is None for event in events(run, SmashedUp))
    one, two = gradients(run)[0], gradients(plain)[0]
    # The first batch differs in its labels alone: rows whose label was kept are the same.
    same = torch.isclose(one, two, rtol=1e-3).all(1).float().mean()
    assert same < 0.6
    assert torch.equal(AnswerKey.read(run.answers).labels, AnswerKey.read(plain.answers).labels)


def test_labels_at_a_u_shaped_node_are_noisy_in_its_head(tmp_path: Path) -> None:
    run = trained(tmp_path / "run", *U_SHAPED, name="label-dp", epsilon=0.1)
    one = gradients(run, UpperGradientUp)[0]
    two = gradients(trained(tmp_path / "plain", *U_SHAPED), UpperGradientUp)[0]
    assert torch.isclose(one, two, rtol=1e-3).all(1).float().mean() < 0.6


def test_feature_parties_strips_of_one_row_have_one_noisy_label() -> None:
    vertical = prepared("protocol.name=vertical-split", "protocol.merge=sum", name="label-dp")
    one, two = (_labels_at_server(vertical, party) for party in (0, 1))
    assert torch.equal(one, two)
    true = labels_of(vertical.data, 0)
    assert 0.1 < (one == true).float().mean().item() < 0.4
    split = prepared(name="label-dp")
    flips = [_labels_at_server(split, node) != labels_of(split.data, node) for node in (0, 1)]
    assert not torch.equal(*flips)


def test_dp_noise_is_on_the_message(tmp_path: Path) -> None:
    told = "sent 1 times, this run sends some 4 times; set horizon = 4"
    with pytest.raises(IllegalCombinationError, match=told):
        prepared(name="dp-cut-gradient")
    settings = {"horizon": 4, "epsilon": 1.0, "clip": 0.01}
    sent = gradients(trained(tmp_path / "run", name="dp-cut-gradient", **settings))
    deviation = DPCutGradient(**settings).sigma * 0.01 / 16
    noise = torch.stack(sent[:5])  # far above what was clipped
    assert noise.std().item() == pytest.approx(deviation, rel=0.05)


def test_dp_sgd_changes_the_top_and_not_the_message(tmp_path: Path) -> None:
    defense = {"name": "dp-sgd", "rate": 0.25, "steps": 8, "epsilon": 1.0}
    steps = "protocol.local_steps=4"
    run, plain = trained(tmp_path / "run", steps, **defense), trained(tmp_path / "plain", steps)
    assert torch.equal(gradients(run)[0], gradients(plain)[0])  # made before the first noise
    held = [Trace(each.trace).holding("server", "model/round-1") for each in (run, plain)]
    assert held[0] is not None
    assert held[1] is not None
    assert held[0].keys() == held[1].keys()
    assert all(not np.allclose(held[0][name], held[1][name]) for name in held[0])


class Cached(VanillaSplit):
    """Steps once more on the batch before after each fresh one, and throws that gradient away."""

    def train_round(self, lanes: Sequence[NodeSession]) -> None:
        for lane in lanes:
            lane.open(self.bottom)
            while not lane.done:
                batch = lane.receive()
                gradient = self.part.train(*batch.labelled)
                self.part.train(*batch.labelled)
                lane.answer(gradient)
            if lane is not lanes[-1]:
                self.close_round([self.close_session(lane)])


def cached(setup: ProtocolSetup) -> BuiltProtocol:
    parts = setup.architecture.parts(setup.init_stream)
    part = setup.part(TopTrainer, parts.top)
    strategy = Cached(part, setup.arrays(parts.bottom), **setup.common())
    return BuiltProtocol(strategy=strategy, arrays=part.arrays(), bottom=lambda: strategy.bottom)


@pytest.mark.parametrize(
    ("labels", "defense", "told"),
    [
        ("server", {"name": "dp-sgd", "rate": 0.25, "steps": 8}, "vanilla-split took step 9 of"),
        ("shared", {"name": "dp-sgd", "rate": 0.25, "steps": 8}, "8 with rows of node 0: dp-sgd"),
        ("server", {"name": "dp-cut-gradient", "horizon": 4}, r"gradient 5 of 4 with row \d+ of n"),
        ("shared", {"name": "dp-cut-gradient", "horizon": 4}, "gradient 8 of 4 with a batch of no"),
    ],
)
def test_a_protocol_that_uses_a_claim_more_often_than_planned_is_stopped(
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    labels: str,
    defense: dict[str, Any],
    told: str,
) -> None:
    monkeypatch.setitem(PROTOCOLS, "vanilla-split", Protocol(exchanges="split", build=cached))
    whole = ("protocol.local_steps=4",) * (defense["name"] == "dp-sgd")  # passes, as it asks for
    with pytest.raises(HorizonError, match=told):
        trained(tmp_path / "run", f"protocol.labels={labels}", *whole, **defense)


@pytest.mark.parametrize(
    ("protocol", "labels", "horizon"),
    [
        ("vanilla-split", "shared", 4),
        ("vanilla-split", "server", 4),
        ("parallel-split", "shared", 4),
        ("splitfed-v1", "server", 4),
        ("splitfed-v2", "shared", 4),
        ("u-shaped", "client", 4),
        ("vertical-split", "server", 4),
    ],
)
def test_a_run_as_planned_ends_within_its_horizon(
    tmp_path: Path, protocol: str, labels: str, horizon: int
) -> None:
    overrides = [f"protocol.name={protocol}", f"protocol.labels={labels}"]
    if protocol == "u-shaped":
        overrides.append("model.upper_cut=6")
    if protocol == "vertical-split":  # every row of both parties, in two rounds of six batches
        overrides += ["protocol.merge=sum", "protocol.local_steps=4"]
    trained(tmp_path / "cut", *overrides, name="dp-cut-gradient", horizon=horizon)
    if protocol not in {"u-shaped", "splitfed-v1"}:
        overrides.append("protocol.local_steps=4")  # whole passes, as it asks for
        trained(tmp_path / "top", *overrides, name="dp-sgd", rate=0.25, steps=8)


@pytest.mark.parametrize(
    ("overrides", "defense", "told"),
    [
        ((), {"name": "marvell"}, "solved for two classes, this task has 10; use 'iso-noise'"),
        ((), {"name": "dp-sgd"}, "this run takes 12 of 0"),
        (
            (),
            {"name": "label-dp", "mechanism": "rr-with-prior", "prior": [0.5, 0.5]},
            "a prior of 2 classes, this task has 10",
        ),
    ],
)
def test_what_cannot_be_protected_is_refused_before_training(
    overrides: tuple[str, ...], defense: dict[str, Any], told: str
) -> None:
    with pytest.raises(IllegalCombinationError, match=told):
        prepared(*overrides, **defense)


def test_copies_of_the_top_have_no_private_steps(tmp_path: Path) -> None:
    defense = {"name": "dp-sgd", "rate": 0.25, "steps": 8}
    protocol = ("protocol.name=splitfed-v1", "protocol.local_steps=4")
    with pytest.raises(IllegalCombinationError, match="every node has a copy of its own"):
        trained(tmp_path / "run", *protocol, **defense)


@pytest.mark.parametrize(
    ("protocol", "labels", "defense", "told"),
    [
        ("u-shaped", "client", "dp-sgd", "dp-sgd cannot work with protocol.labels = 'client'"),
        ("fedavg", "shared", "label-dp", "label-dp protects labels messages but fedavg sends"),
        ("fedavg", "shared", "marvell", "marvell protects cut-gradient messages but fedavg"),
        ("u-shaped", "client", "marvell", None),
        ("vertical-split", "server", "label-dp", None),
        ("splitfed-v2", "shared", "dp-cut-gradient", None),
    ],
)
def test_what_fits_which_protocol(
    protocol: str, labels: str, defense: str, told: str | None
) -> None:
    overrides = [f"protocol.name={protocol}", f"protocol.labels={labels}"]
    table = {**TABLE, "defense": [{"name": defense}]}
    why = unfit(Cell.of(cells(load_settings(table, overrides))[0])).get("defenses")
    assert why is None if told is None else told in str(why)


@pytest.mark.parametrize("name", ["max-norm", "iso-noise", "marvell"])
def test_batches_of_one_row_are_refused_where_they_leave_a_row_undefended(name: str) -> None:
    with pytest.raises(IllegalCombinationError, match=f"{name} .* set protocol.batch_size"):
        prepared(*BINARY, "protocol.batch_size=1", name=name)


@pytest.mark.parametrize("name", ["max-norm", "iso-noise"])
def test_a_pass_that_ends_in_one_row_is_refused_too(name: str) -> None:
    """Of 300 rows each of two nodes has 108 for its own."""

    def one_pass(size: int) -> Any:
        protocol = {"name": "vanilla-split", "labels": "server", "batch_size": size}
        table = {**TABLE, "protocol": protocol, "defense": [{"name": name}]}
        training = cells(load_settings(table, BINARY))[0].training
        return prepare(training, root=None)

    with pytest.raises(IllegalCombinationError, match=f"{name} .* last batch of a pass has one"):
        one_pass(107)
    assert len(one_pass(106).data.split().nodes[0]) == 108


def test_a_privacy_budget_that_no_noise_meets_is_refused_before_training() -> None:
    settings = {"name": "dp-sgd", "rate": 0.25, "steps": 12, "epsilon": 0.1}
    with pytest.raises(IllegalCombinationError, match=r"epsilon = 0\.1 .* at least 0\.10"):
        prepared("protocol.local_steps=4", **settings)
