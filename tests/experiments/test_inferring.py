"""A cell whose adversary infers an attribute: from its settings to its card and its report."""

from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file

from attacks import ADVERSARIES
from attacks.feature_space_hijacking_property import FeatureSpaceHijackingProperty
from experiments.report.caveats import shortfall
from experiments.report.rows import cells as pooled_cells
from experiments.results.cards import Card
from experiments.run.attack import Cell
from experiments.run.judge import honest_probe
from experiments.run.runner import run
from experiments.run.training_run import TrainingRun
from experiments.settings.cells import cells
from experiments.settings.load import load_settings
from leakbed.events import Phase, SmashedUp
from leakbed.oracle.truth import AnswerKey
from leakbed.tap.trace import Trace
from tests.support.adversaries import Doubling, Telling

PROPERTY: dict[str, Any] = {"name": "fsha-property", "targets": 30, "checkpoint_every": 3}
TABLE: dict[str, Any] = {
    "name": "inferring",
    "data": {"name": "mnist-5k", "size": 400, "nodes": 2},
    "model": {"name": "mlp2", "cut": 1},
    "protocol": {"name": "vanilla-split", "batch_size": 16},
    "attack": [
        PROPERTY | {"attribute": "parity"},
        PROPERTY | {"attribute": "label", "when": "inference"},
    ],
}


@pytest.fixture(scope="module")
def done(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, list[Card]]:
    folder = tmp_path_factory.mktemp("inferring")
    with pytest.MonkeyPatch.context() as patched:
        patched.setitem(ADVERSARIES, "fsha-property", Telling)
        return folder, run(TABLE, out=folder)


def runs(folder: Path) -> list[TrainingRun]:
    found = [TrainingRun.read(each) for each in (folder / "runs").iterdir()]
    return [each for each in found if each is not None]


def test_a_card_has_the_attributes_score_beside_its_baselines(
    done: tuple[Path, list[Card]],
) -> None:
    _, (parity, label) = done
    for card, chance in ((parity, 0.5), (label, 0.1)):
        assert card.status == "done"
        assert card.scores["attribute_accuracy"]["interval"]  # type: ignore[index,call-overload]
        assert "attribute_accuracy_skill" in card.scores
        assert "label_accuracy" not in card.scores
        assert card.baselines["chance"]["attribute_accuracy"] == pytest.approx(chance)
        for name in ("majority-attribute", "another-row", "nearest-public"):
            assert card.baselines[name]["attribute_accuracy"] is not None
        assert card.control is not None
        assert card.control["within"] is not None
        assert "attribute_accuracy" in card.control["scores"]  # type: ignore[operator]
    assert parity.threat is not None
    assert "infers the attribute 'parity'" in parity.threat.in_words
    told: Any = parity.scores["checkpoints"]
    assert set(told["peak"]) == {"attribute_accuracy"}
    assert len(told["attribute_accuracy"]) == len(told["step"]) > 1


def test_what_is_kept_of_a_guess_is_scored_again_alike(done: tuple[Path, list[Card]]) -> None:
    folder, (parity, _) = done
    guessed = load_file(folder / "guesses" / f"{parity.guess_key}.safetensors")["attributes"]
    labels = load_file(folder / "truths" / f"{parity.guess_key}.safetensors")["labels"]
    mean = (guessed == labels % 2).double().mean().item()
    assert parity.scores["attribute_accuracy"]["mean"] == pytest.approx(mean)  # type: ignore[index,call-overload]


def test_beside_it_stand_the_same_head_and_a_probe_of_honest_training(
    done: tuple[Path, list[Card]],
) -> None:
    folder, cards = done
    for card, tested in zip(cards, (144, 20), strict=True):
        assert card.control is not None
        beside: Any = card.control["never_hijacked"]
        assert beside["attribute_accuracy"]["mean"] != card.scores["attribute_accuracy"]["mean"]  # type: ignore[index,call-overload]
        probe: Any = card.control["honest_probe"]
        assert probe["targets"] == probe["fitted"] == tested
        assert 0 < probe["attribute_accuracy"]["mean"] < 1
        assert len(probe["attribute_accuracy"]["values"]) == tested
    control, cell = runs(folder)[0], Cell.of(cells(load_settings(TABLE))[0])
    assert honest_probe(control, cell, stream=1) == honest_probe(control, cell, stream=1)


def test_the_probe_reads_each_row_with_its_own_truth(
    done: tuple[Path, list[Card]], monkeypatch: pytest.MonkeyPatch
) -> None:
    seen: list[Any] = []
    monkeypatch.setattr("experiments.run.judge.linear_probe", lambda *a, **k: seen.append((a, k)))
    folder, _ = done
    control = runs(folder)[0]
    honest_probe(control, Cell.of(cells(load_settings(TABLE))[0]), stream=1)
    (smashed, values), asked = seen[0]
    assert len(asked["samples"].unique()) == len(asked["samples"]) == 288
    key, bright = AnswerKey.read(control.answers), {}
    for event in Trace(control.trace).events(SmashedUp, round_=1):
        assert isinstance(event, SmashedUp)
        if event.phase == Phase.TRAIN:
            rows = key.order[event.node, 1, event.step]
            for row, label in zip(event.smashed, key.labels[rows], strict=True):
                bright[row.tobytes()] = int(label) % 2
    found = [bright[row.numpy().tobytes()] for row in smashed]
    assert found == values.tolist()
    assert 0 < sum(found) < 288


def test_an_adversary_that_infers_nothing_has_no_probe(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(ADVERSARIES, "fsha", Doubling)
    table = TABLE | {"attack": [{"name": "fsha", "targets": 4}]}
    (card,) = run(table, out=tmp_path)
    assert "honest_probe" not in (card.control or {})
    assert "attribute_accuracy" not in card.scores


def test_the_report_holds_the_probe_against_it(done: tuple[Path, list[Card]]) -> None:
    found = pooled_cells(done[1][:1])
    said = shortfall(found, found)
    assert "the same adversary with a client that was never hijacked" in said
    assert "a linear probe of honest smashed data that was told half of the truth" in said
    assert "attribute accuracy" in said


def test_data_that_do_not_tell_the_attribute_are_refused_before_training(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(ADVERSARIES, "fsha-property", FeatureSpaceHijackingProperty)
    table = TABLE | {"attack": [PROPERTY | {"attribute": "animal"}]}
    (card,) = run(table, out=tmp_path)
    assert card.status == "unfit"
    assert "use high-digit or label or parity" in str(card.why)
    assert not list(tmp_path.glob("runs/*"))


def test_the_private_labels_never_reach_it(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    seen: list[Any] = []

    class Listening(Telling):
        def begin(self, view: Any, *, seed: int) -> Any:
            seen.append(view)
            return super().begin(view, seed=seed)

    monkeypatch.setitem(ADVERSARIES, "fsha-property", Listening)
    run(TABLE | {"attack": TABLE["attack"][:1]}, out=tmp_path)
    trace = Trace(next((tmp_path / "runs").glob("*/trace")))
    held = trace.holding("adversary", "public")
    assert held is not None
    for view in seen:
        assert view.labels is None
        assert view.smashed is None
        assert len(view.public_attributes) == len(view.public_images) == 72
        assert view.public_labels is None, "of its own images it is told the attribute alone"
        assert torch.equal(view.public_attributes.cpu(), torch.as_tensor(held["labels"]) % 2)
