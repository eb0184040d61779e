"""An attack is told the first labels of each class, and scored on the others alone."""

from collections.abc import Iterator
from dataclasses import dataclass, replace
from pathlib import Path
from typing import ClassVar

import pytest
import torch
from safetensors.torch import load_file

from attacks import ATTACKS
from clients import node_app
from experiments.run.attack import attack_run, make_attack
from experiments.run.judge import judge
from experiments.run.labels import first_of_each_class, grant_labels, unknown_only
from experiments.run.offline import attack_trace
from experiments.run.prepare import prepare
from experiments.run.targets import Evidences, MisfitError, pick_targets
from experiments.run.train import train
from experiments.run.training_run import TrainingRun
from experiments.run.view import build_view
from experiments.settings.cells import cells
from experiments.settings.load import load_settings
from experiments.settings.plugins import AttackSettings
from experiments.settings.schema import SettingsError
from leakbed.contracts import Evidence, Guess, Knowledge, Seat, ThreatModel, View
from leakbed.events import Phase, Target
from leakbed.flower_internals import task_identity
from leakbed.grids import LocalGrid
from leakbed.oracle.truth import AnswerKey
from leakbed.tap.trace import Trace

TABLE = {
    "name": "small",
    "data": {"size": 400, "nodes": 2},
    "model": {"name": "mlp2", "cut": 1},
    "protocol": {
        "name": "vanilla-split",
        "labels": "server",
        "batch_size": 16,
        "local_steps": 4,  # 64 rows of each node: a client attacks those of one
    },
    "attack": [{"name": "constant-image"}],
}
TARGETS = [Target(node=0, round=1, step=0, row=row, phase=Phase.TRAIN) for row in range(6)]
LABELS = torch.tensor([2, 0, 2, 2, 1, 0])[:, None]


@dataclass(frozen=True, kw_only=True)
class Parrot:
    """Says the labels it was told, and -5 where it was told none; keeps what it saw."""

    name: ClassVar[str] = "constant-image"
    source: ClassVar[str] = "https://example.org"
    threat: ClassVar[ThreatModel] = ThreatModel(
        seat=Seat.CLIENT,
        evidence=frozenset({Evidence.SMASHED}),
        needs=frozenset({Knowledge.KNOWN_LABELS}),
    )
    seen: ClassVar[list[View]] = []

    def run(self, view: View, *, seed: int) -> Guess:
        del seed
        self.seen.append(view)
        assert view.known_labels is not None
        assert view.smashed is not None
        guessed = torch.where(view.known_labels < 0, -5, view.known_labels)
        return Guess(labels=guessed, objective=view.smashed.flatten(1)[:, 0])


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory) -> Iterator[TrainingRun]:
    with task_identity():
        prepared = prepare(cells(load_settings(TABLE))[0].training, root=None)
        grid = LocalGrid(node_app, nodes=2)
        folder = tmp_path_factory.mktemp("runs") / "one"
        yield train(prepared, grid, folder, roster=grid.roster)


@pytest.fixture
def parrot(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(ATTACKS, "constant-image", Parrot)
    monkeypatch.setattr(Parrot, "seen", [])


def told(count: int | None, *, targets: int = 40) -> AttackSettings:
    return AttackSettings(name="constant-image", targets=targets, known_per_class=count)


def test_the_first_targets_of_each_class_are_known_and_all_of_a_rarer_one() -> None:
    assert first_of_each_class(LABELS, 1).flatten().tolist() == [2, 0, -1, -1, 1, -1]
    assert first_of_each_class(LABELS, 2).flatten().tolist() == [2, 0, 2, -1, 1, 0]


def test_several_samples_behind_a_message_are_refused() -> None:
    with pytest.raises(MisfitError, match="2 samples stand behind each message"):
        first_of_each_class(LABELS.reshape(3, 2), 1)


def test_what_is_left_are_the_unknown_rows_of_every_field() -> None:
    guess = Guess(
        labels=torch.arange(6)[:, None],
        failed=torch.arange(6) == 2,
        clones={"w": torch.arange(6.0)[:, None]},
    )
    targets, left = unknown_only(TARGETS, guess, first_of_each_class(LABELS, 1))
    assert [target.row for target in targets] == [2, 3, 5]
    assert left.labels is not None
    assert left.labels.flatten().tolist() == [2, 3, 5]
    assert left.failed is not None
    assert left.failed.tolist() == [True, False, False]
    assert left.clones is not None
    assert left.clones["w"].flatten().tolist() == [2, 3, 5]
    everything = torch.full((6, 1), -1)
    assert unknown_only(TARGETS, guess, everything) == (TARGETS, guess)


def test_nothing_left_to_infer_is_refused() -> None:
    with pytest.raises(MisfitError, match="all 6 targets are known"):
        unknown_only(TARGETS, Guess(labels=LABELS), LABELS)


def test_only_a_threat_model_that_needs_labels_is_told_any(run: TrainingRun) -> None:
    blind = ThreatModel(seat=Seat.SERVER, evidence=frozenset({Evidence.SMASHED}))
    nothing = grant_labels(blind, TARGETS, run.answers, known_per_class=5)
    assert nothing.labels is nothing.known_labels is None
    none_known = grant_labels(Parrot.threat, TARGETS, None, known_per_class=0).known_labels
    assert none_known is not None
    assert none_known.flatten().tolist() == [-1] * 6


@pytest.mark.usefixtures("parrot")
def test_known_rows_are_never_scored(run: TrainingRun) -> None:
    attacked = attack_run(run.trace, told(1), stream=1, device="cpu", answers=run.answers)
    (view,) = Parrot.seen
    answers = AnswerKey.read(run.answers)
    assert view.known_labels is not None
    known = view.known_labels.flatten() >= 0
    assert known.sum() == len(view.known_labels[known].unique()) == 10
    assert len(attacked.targets) == 40 - 10
    assert attacked.guess.labels is not None
    assert (attacked.guess.labels == -5).all(), "what it was told is not among what is scored"
    verdict, truth = judge(attacked, answers, run.trace, stream=3)
    assert verdict.scores["label_accuracy"]["mean"] == 0
    assert verdict.scores["targets"] == truth.targets == 30
    assert view.smashed is not None
    assert torch.equal(attacked.guess.objective, view.smashed.flatten(1)[~known, 0])  # type: ignore[arg-type]


@pytest.mark.usefixtures("parrot")
def test_what_is_known_is_true(run: TrainingRun) -> None:
    attack_run(run.trace, told(2), stream=1, device="cpu", answers=run.answers)
    (view,) = Parrot.seen
    everyone = attack_run(run.trace, told(0), stream=1, device="cpu", answers=run.answers).targets
    true = AnswerKey.read(run.answers).labels_of(everyone)
    assert view.known_labels is not None
    known = view.known_labels >= 0
    assert torch.equal(view.known_labels[known], true[known])
    assert torch.equal(view.known_labels, first_of_each_class(true, 2))


@pytest.mark.usefixtures("parrot")
def test_without_answers_there_is_nothing_to_be_told(run: TrainingRun) -> None:
    with pytest.raises(MisfitError, match="needs the answer key"):
        attack_run(run.trace, told(1), stream=1, device="cpu")
    blind = attack_run(run.trace, told(0), stream=1, device="cpu")
    assert len(blind.targets) == 40


def test_a_trace_attacked_elsewhere_tells_as_much(run: TrainingRun, tmp_path: Path) -> None:
    smashed = {"targets": 60, "evidence": "smashed", "partial": True}
    name, folders = "similarity-clustering", [tmp_path / "a", tmp_path / "b"]
    card = attack_trace(run.trace, name, answers=run.answers, out=folders[0], settings=smashed)
    assert card.scores["targets"] == 60 - 10
    blind = smashed | {"known_per_class": 0}
    unscored = attack_trace(run.trace, name, out=folders[1], settings=blind)
    assert unscored.status == "unscored"
    (guess,) = (load_file(file) for file in (folders[1] / "guesses").iterdir())
    assert guess["clusters"].shape == (60, 1)
    with pytest.raises(MisfitError, match="needs the answer key"):
        attack_trace(run.trace, name, out=tmp_path / "c", settings=smashed)


def test_inputs_are_told_to_the_party_that_they_belong_to(run: TrainingRun) -> None:
    needs = frozenset({Knowledge.OWN_IMAGES})
    threat = ThreatModel(seat=Seat.CLIENT, evidence=frozenset({Evidence.NOTHING}), needs=needs)
    trace = Trace(run.trace)
    evidences = Evidences.of(trace)
    targets = pick_targets(evidences, threat, when="training", count=5)
    given = grant_labels(threat, targets, run.answers, known_per_class=None)
    assert given.labels is given.known_labels is None
    view = build_view(
        trace, evidences, threat, targets, device=torch.device("cpu"), own_images=given.own_images
    )
    truth = AnswerKey.read(run.answers).truth(targets)
    assert torch.equal(view.own_images, truth.images[:, 0])  # type: ignore[arg-type]
    server = replace(threat, seat=Seat.SERVER)
    with pytest.raises(MisfitError, match="inputs belong to the node"):
        build_view(
            trace,
            evidences,
            server,
            targets,
            device=torch.device("cpu"),
            own_images=given.own_images,
        )


def test_what_a_client_is_told_and_shown_is_of_one_node_and_a_servers_of_all(
    run: TrainingRun,
) -> None:
    trace, key = Trace(run.trace), AnswerKey.read(run.answers)
    evidences = Evidences.of(trace)
    rows = {
        node: {row for (of, *_), batch in key.order.items() if of == node for row in batch}
        for node in (0, 1)
    }
    assert not rows[0] & rows[1]
    needs = frozenset({Knowledge.KNOWN_LABELS, Knowledge.OWN_IMAGES})
    client = ThreatModel(
        seat=Seat.CLIENT, evidence=frozenset({Evidence.SMASHED, Evidence.CUT_GRADIENT}), needs=needs
    )
    targets = pick_targets(evidences, client, when="training", count=100)
    assert {target.node for target in targets} == {0}
    assert len(targets) == 64, "all there are, though more were asked for"
    given = grant_labels(client, targets, run.answers, known_per_class=100)
    view = build_view(trace, evidences, client, targets, device=torch.device("cpu"), **vars(given))
    mine = [row for step in range(4) for row in key.order[0, 1, step]]
    assert set(mine) == rows[0]
    assert torch.equal(view.own_images, key.images[mine])  # type: ignore[arg-type]
    assert torch.equal(view.known_labels, key.labels[mine][:, None])  # type: ignore[arg-type]
    gradients = [torch.from_numpy(evidences.gradients[0, step].gradient) for step in range(4)]
    assert torch.equal(view.cut_gradient, torch.cat(gradients))  # type: ignore[arg-type]
    server = ThreatModel(seat=Seat.SERVER, evidence=frozenset({Evidence.SMASHED}))
    everybodys = pick_targets(evidences, server, when="training", count=100)
    assert {target.node for target in everybodys} == {0, 1}
    assert len(everybodys) == 100


def test_an_attack_that_is_told_nothing_has_no_such_setting() -> None:
    with pytest.raises(
        SettingsError, match="unknown key of attack constant-image 'known_per_class'"
    ):
        load_settings({**TABLE, "attack": [{"name": "constant-image", "known_per_class": 1}]})


def test_with_settings_that_are_told_nothing_it_is_refused() -> None:
    own = {"reference": "rarer"}
    make_attack(AttackSettings(name="cosine-score", known_per_class=1, own=own))  # the default
    with pytest.raises(SettingsError, match="known_per_class is 5, but with its other settings"):
        make_attack(AttackSettings(name="cosine-score", known_per_class=5, own=own))
