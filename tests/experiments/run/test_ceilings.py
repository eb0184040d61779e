"""The ceiling of recorded runs: messages are made again, noise is checked, gaps are refused."""

import json
import shutil
from dataclasses import replace
from pathlib import Path
from statistics import fmean
from typing import Any

import pytest
import torch
from torch import Tensor
from typer.testing import CliRunner

from defenses import SmashedNoise
from experiments.cli import app
from experiments.run.candidate_messages import CandidateMessages
from experiments.run.ceilings import _hit, ceiling_of_run
from experiments.run.recorded import Recorded
from experiments.run.runner import run
from experiments.run.targets import Evidences, MisfitError
from leakbed.contracts import DefenseState
from leakbed.contracts.noise_laws import NoCeilingError
from leakbed.events import Phase, Target
from leakbed.oracle.truth import AnswerKey, AnswerKeyError

FEW: dict[str, Any] = {"candidates": 60, "targets": 6, "draws": 4}


def recorded(
    folder: Path,
    protocol: dict[str, Any],
    *,
    model: dict[str, Any] | None = None,
    attack: str = "mean-image",
    keep: str = "all",
    data: dict[str, Any] | None = None,
    **defense: Any,
) -> Path:
    table: dict[str, Any] = {
        "name": "small",
        "keep_rounds": keep,
        "data": data or {"size": 300, "nodes": 2},
        "model": model or {"name": "mnistnet", "cut": 2},
        "protocol": {"rounds": 2, "batch_size": 8, "local_steps": 2, **protocol},
        "attack": [{"name": attack, "targets": 2}],
    }
    if defense:
        table["defense"] = [defense]
    run(table, out=folder)
    (only,) = (folder / "runs").iterdir()
    return only


@pytest.fixture(scope="module")
def split(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("split")
    adam = {"name": "vanilla-split", "optimizer": "adam", "learning_rate": 0.001}
    return recorded(folder, adam, name="smashed-noise", sigma=0.5, clip=1.0)


@pytest.fixture(scope="module")
def fedavg(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("fedavg")
    return recorded(folder, {"name": "fedavg"}, name="weight-noise", scale=0.003, form="corrected")


@pytest.fixture(scope="module")
def clear(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Updates of four rows under no defence."""
    folder = tmp_path_factory.mktemp("clear")
    return recorded(folder, {"name": "fedavg", "rounds": 1, "batch_size": 4})


@pytest.mark.parametrize("collect", ["first", "last"])
def test_bottoms_stepped_again_make_the_recorded_rows(split: Path, collect: str) -> None:
    found = ceiling_of_run(split, collect=collect, **FEW)
    assert all(each.sound for each in found.findings), list(map(str, found.findings))
    assert {each.check for each in found.findings} >= {"mean", "variance", "noise of two messages"}
    assert {each.guesses for each in found.messages} == {1}
    assert 1 / 60 < found.value < 1
    first = found.messages[0]
    assert first.cap is not None
    assert first.chance < found.value
    assert {each.node for each in found.messages} == {0, 1}
    assert found.norm == pytest.approx(1.0)  # rows are clipped to it


def test_test_rows_of_the_last_round_have_the_last_bottom(split: Path) -> None:
    found = ceiling_of_run(split, when="inference", **FEW)
    assert all(each.sound for each in found.findings), list(map(str, found.findings))
    assert not any(each.used_before for each in found.messages)
    assert all(each.ceiling <= float(each.label or 0) < 1 for each in found.messages)
    assert any("label is told by its message" in line for line in found.lines())
    told = ceiling_of_run(split, when="inference", labels=True, **FEW)
    assert told.value > found.value
    assert {each.label for each in told.messages} == {None}
    with pytest.raises(MisfitError, match="no test rows were evaluated in that round"):
        ceiling_of_run(split, when="inference", collect=1, **FEW)


def test_labels_answered_at_random_are_bounded_by_the_answer(tmp_path: Path) -> None:
    own = {"name": "vanilla-split", "rounds": 1}
    folder = recorded(tmp_path, own, name="label-dp", epsilon=1.0)
    (note,) = ceiling_of_run(folder, when="inference", **FEW).notes
    assert note.startswith("A training label as label-dp answers it")
    assert "epsilon 1 alone allows" in note
    with pytest.raises(NoCeilingError, match="what tells the labels beside these rows is noised"):
        ceiling_of_run(folder, **FEW)


def test_updates_are_trained_again(fedavg: Path) -> None:
    found = ceiling_of_run(fedavg, **FEW)
    assert all(each.sound for each in found.findings), list(map(str, found.findings))
    assert {each.guesses for each in found.messages} == {16}
    assert all(each.single <= each.ceiling for each in found.messages)
    assert all(each.chance < each.ceiling < 1 for each in found.messages)
    assert "list of 16 among 60" in found.lines()[0]


def test_rows_behind_updates_are_of_steps_all_over_the_round(fedavg: Path, clear: Path) -> None:
    for folder, size in ((fedavg, 8), (clear, 4)):
        found = ceiling_of_run(folder, candidates=60, targets=2, draws=1)
        assert [each.row // size for each in found.messages] == [0, 1]


def test_messages_are_spread_over_those_that_were_attacked(split: Path) -> None:
    few: dict[str, Any] = {"candidates": 10, "targets": 4, "draws": 1, "collect": "first"}
    assert [each.step for each in ceiling_of_run(split, **few).messages] == [0, 0, 0, 0]
    assert [each.step for each in ceiling_of_run(split, **few, among=32).messages] == [0, 0, 1, 1]


def test_who_knows_a_nodes_other_rows_knows_its_classes(tmp_path: Path) -> None:
    """Under endless noise: of nodes with few classes a guess of these is right more often."""
    divided = {"size": 600, "nodes": 4, "partition": "dirichlet", "alpha": 0.05}
    noise = {"name": "weight-noise", "scale": 1e6, "form": "corrected"}
    folder = recorded(tmp_path, {"name": "fedavg", "rounds": 1}, data=divided, **noise)
    key = AnswerKey.read(folder / "answers")
    nodes = key.labels.split(key.training["rows"])
    for labels in (False, True):
        found = ceiling_of_run(folder, labels=labels, candidates=200, targets=2, draws=2)
        for each in found.messages:
            common = int(nodes[each.node].mode().values)
            share = float((nodes[each.node] == common).double().mean())
            pool = int((key.labels == common).sum())
            blind = share * min(1.0, each.guesses / pool)  # names rows of that class alone
            assert each.ceiling > blind - 0.01
            assert each.chance > blind - 0.01
            assert each.cap is not None
            assert each.cap > blind - 0.01
        assert found.value > 1.5 * found.messages[0].guesses / found.messages[0].candidates


def test_several_updates_of_a_node_in_a_round_are_refused(clear: Path) -> None:
    run_ = Recorded.open(clear)
    evidences = Evidences.of(run_.trace)
    twice = replace(evidences, updates=[*evidences.updates, *evidences.updates])
    made = CandidateMessages(run_, twice, told=False, summed=False)
    target = Target(node=0, round=1, step=0, row=None, phase=Phase.TRAIN)
    own = made.rows_behind(target)[0]
    with pytest.raises(NoCeilingError, match="holds 2 updates of node 0 in round 1"):
        made.update(target, own, torch.tensor([own, 60]))


def test_a_sum_of_updates_gives_away_less_than_one_of_them(fedavg: Path, split: Path) -> None:
    many = {**FEW, "candidates": 100}
    alone = ceiling_of_run(fedavg, **many)
    found = ceiling_of_run(fedavg, summed=True, **many)
    assert all(each.sound for each in found.findings), list(map(str, found.findings))
    assert {each.guesses for each in found.messages} == {32}  # both nodes' rows are behind it
    assert fmean(m.single for m in found.messages) < fmean(m.single for m in alone.messages)
    assert "sum of all nodes' updates" in found.seat
    with pytest.raises(NoCeilingError, match="smashed rows, which nothing sums"):
        ceiling_of_run(split, summed=True, **FEW)


def test_a_sum_without_noise_names_the_row(clear: Path) -> None:
    found = ceiling_of_run(clear, summed=True, **FEW)
    assert found.value == pytest.approx(1.0)
    assert all(each.hit for each in found.messages)


def test_all_updates_that_a_row_was_in_are_read_together(tmp_path: Path) -> None:
    own = {"name": "fedavg", "rounds": 9}
    noise = {"name": "weight-noise", "scale": 0.01, "form": "corrected"}
    folder = recorded(tmp_path, own, data={"size": 130, "nodes": 2}, **noise)
    found = ceiling_of_run(folder, span="training", **{**FEW, "targets": 2})
    assert all(each.sound for each in found.findings), list(map(str, found.findings))
    for each in found.messages:
        assert each.read > 1
        assert each.ceiling > float(each.alone or 0) - 4 * each.error
    assert max(each.ceiling - float(each.alone or 0) for each in found.messages) > 0.03
    assert {each.guesses for each in found.messages} == {16}
    last = recorded(tmp_path / "last", own, keep="last", data={"size": 130, "nodes": 2}, **noise)
    with pytest.raises(NoCeilingError, match="in which the row was used; record the run with"):
        ceiling_of_run(last, span="training", **FEW)


def test_a_span_that_leaves_no_more_messages_is_refused(fedavg: Path, split: Path) -> None:
    for asked, why in (
        ({"span": "training", "summed": True}, "sums of several rounds"),
        ({"span": "round"}, "all that a node sends in a round"),
        ({"span": "trainings"}, "did you mean 'training'"),
    ):
        with pytest.raises(NoCeilingError, match=why):
            ceiling_of_run(fedavg, **asked, **FEW)
    with pytest.raises(NoCeilingError, match="one message on the wire"):
        ceiling_of_run(split, when="inference", span="round", **FEW)


def test_without_noise_everything_is_named_and_the_loss_is_in_the_message(clear: Path) -> None:
    found = ceiling_of_run(clear, **FEW)
    assert found.value == pytest.approx(1.0)
    assert all(each.hit for each in found.messages)


def test_a_loss_in_the_clear_beside_a_claim_is_flagged(
    fedavg: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("leakbed.mods._keep_counts_alone", lambda records: None)
    private = {"name": "weight-noise", "scale": 0.3, "form": "corrected", "clip": 0.1}
    folder = recorded(tmp_path, {"name": "fedavg", "rounds": 1}, **private)
    found = ceiling_of_run(folder, **FEW)
    (over,) = [each for each in found.findings if not each.sound]
    assert over.check == "ceiling under the claim's cap"
    assert any("loss travels beside" in note for note in found.notes)


@pytest.mark.parametrize("fault", ["repeated", "one stream", "too loud"])
def test_planted_faults_of_the_noise_are_flagged(
    fault: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    honest = SmashedNoise.protect_smashed

    def planted(self: SmashedNoise, state: DefenseState, smashed: Tensor) -> Any:
        if fault == "repeated":
            state = replace(state, messages=0)
        if fault == "one stream":
            state = replace(state, stream=1)
        louder = replace(self, sigma=1.05 * self.sigma) if fault == "too loud" else self
        return honest(louder, state, smashed)

    monkeypatch.setattr(SmashedNoise, "protect_smashed", planted)
    own = {"name": "vanilla-split", "local_steps": 6}
    folder = recorded(tmp_path, own, name="smashed-noise", sigma=0.5)
    # All first rows of the nodes' batches: the same place in several messages.
    findings = ceiling_of_run(folder, collect="first", **{**FEW, "targets": 40}).findings
    caught = {each.check for each in findings if not each.sound}
    assert caught == {"variance" if fault == "too loud" else "noise of two messages"}


def test_a_gap_is_named_and_no_number_given(split: Path, fedavg: Path, tmp_path: Path) -> None:
    blind = tmp_path / "blind"
    shutil.copytree(split / "trace", blind / "trace")
    with pytest.raises(NoCeilingError, match="no answer key"):
        ceiling_of_run(blind, **FEW)
    shutil.copytree(fedavg / "answers", blind / "answers")
    with pytest.raises(AnswerKeyError, match="answers another run"):
        ceiling_of_run(blind, **FEW)
    shutil.rmtree(blind / "answers")
    older = shutil.copytree(split / "answers", blind / "answers")
    about = json.loads((older / "answers.json").read_text())
    (older / "answers.json").write_text(json.dumps({**about, "training": {}}))
    with pytest.raises(NoCeilingError, match="an earlier version wrote it"):
        ceiling_of_run(blind, **FEW)
    other = {**about["training"], "defenses": [["smashed-noise", {"sigma": 0.5}]] * 2}
    (older / "answers.json").write_text(json.dumps({**about, "training": other}))
    with pytest.raises(NoCeilingError, match="changes what smashed-noise has noised"):
        ceiling_of_run(blind, **FEW)
    wrong = {**about["training"], "defenses": [["smashed-noise", {"sigma": 0.47, "clip": 1.0}]]}
    (older / "answers.json").write_text(json.dumps({**about, "training": wrong}))
    findings = {f.check: f for f in ceiling_of_run(blind, **{**FEW, "targets": 8}).findings}
    assert not findings["variance"].sound
    with pytest.raises(NoCeilingError, match="for lists of 16"):
        ceiling_of_run(fedavg, candidates=20)
    with pytest.raises(NoCeilingError, match="give 2, 1 and 1 at least"):
        ceiling_of_run(split, candidates=1)


def test_a_past_that_was_not_recorded_is_refused(tmp_path: Path) -> None:
    folder = recorded(tmp_path, {"name": "vanilla-split"}, keep="last")
    with pytest.raises(NoCeilingError, match="keep_rounds = 'all'"):
        ceiling_of_run(folder, **FEW)
    assert ceiling_of_run(folder, when="inference", **FEW).value == pytest.approx(1.0)


def test_the_command_prints_text_or_json(split: Path, tmp_path: Path) -> None:
    few = ["--candidates", "40", "--targets", "2", "--draws", "2"]
    text = CliRunner().invoke(app, ["ceiling", str(split), *few])
    assert text.exit_code == 0, text.output
    assert text.output.startswith("Ceiling ")
    table = CliRunner().invoke(app, ["ceiling", str(split), *few, "--json"])
    assert len(json.loads(table.output)["messages"]) == 2
    for wrong in (["--collect", "never"], ["--when", "noon"]):
        refused = CliRunner().invoke(app, ["ceiling", str(split), *wrong])
        assert refused.exit_code == 2
        assert wrong[1] in refused.output
    summed = CliRunner().invoke(app, ["ceiling", str(split), *few, "--summed"])
    assert summed.exit_code == 2
    assert "nothing sums" in summed.output
    missing = CliRunner().invoke(app, ["ceiling", str(tmp_path)])
    assert missing.exit_code == 2
    assert "has no recorded messages" in missing.output


def test_a_truth_among_equals_is_a_hit_in_part() -> None:
    assert _hit(torch.tensor([0.5, 0.3, 0.2])) == 1
    assert _hit(torch.tensor([0.25, 0.25, 0.25, 0.25])) == 0.25
    assert _hit(torch.tensor([0.2, 0.4, 0.4])) == 0
