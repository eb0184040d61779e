"""A cell with an active adversary, from its settings to its card."""

from itertools import product
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file

from attacks import ADVERSARIES
from attacks.feature_space_hijacking import FeatureSpaceHijacking
from experiments.results.cards import Card
from experiments.run import executor
from experiments.run.attack import Cell
from experiments.run.judge import quality
from experiments.run.malicious_server import decoded_attack
from experiments.run.runner import run
from experiments.run.training_run import TrainingRun
from experiments.settings.cells import cells
from experiments.settings.load import load_settings
from leakbed.events import Phase
from tests.support.adversaries import Doubling

TABLE: dict[str, Any] = {
    "name": "active",
    "data": {"name": "mnist-5k", "size": 400, "nodes": 2},
    "model": {"name": "mlp2", "cut": 1},
    "protocol": {"name": "vanilla-split", "batch_size": 16, "local_steps": 4},
    "attack": [
        {"name": "fsha", "targets": 6, "checkpoint_every": 2},
        {"name": "smashed-as-image", "targets": 6},
        {"name": "fsha", "targets": 3, "checkpoint_every": 2, "when": "inference"},
        {"name": "fsha", "targets": 6, "checkpoint_every": 3, "control": False},
    ],
}


@pytest.fixture(autouse=True)
def quick(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(ADVERSARIES, "fsha", Doubling)


@pytest.fixture(scope="module")
def done(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, list[Card]]:
    folder = tmp_path_factory.mktemp("active")
    with pytest.MonkeyPatch.context() as patched:
        patched.setitem(ADVERSARIES, "fsha", Doubling)
        return folder, run(TABLE, out=folder)


def runs(folder: Path) -> list[TrainingRun]:
    found = [TrainingRun.read(each) for each in (folder / "runs").iterdir()]
    return [each for each in found if each is not None]


def test_adversaries_train_runs_of_their_own(done: tuple[Path, list[Card]]) -> None:
    folder, cards = done
    assert [card.status for card in cards] == ["done"] * 4
    assert [card.attack for card in cards] == ["smashed-as-image", *["fsha"] * 3]
    hijacked = [each for each in runs(folder) if each.decoded.exists()]
    # Passive; hijacked and its control; hijacked with other checkpoints.
    assert (len(runs(folder)), len(hijacked)) == (4, 3)


def test_a_card_says_who_hijacked_and_what_it_had_without(done: tuple[Path, list[Card]]) -> None:
    _, (passive, training, inference, alone) = done
    assert training.threat is not None
    assert training.threat.active
    assert "rewrites messages" in training.threat.in_words
    assert "never_hijacked" not in (passive.control or {})
    assert "never_hijacked" not in (alone.control or {})
    for card in (training, inference):
        assert card.control is not None
        assert card.control["within"] is not None
        beside = card.control["never_hijacked"]
        assert beside["ssim"]["mean"] != card.scores["ssim"]["mean"]  # type: ignore[index,call-overload]
        assert {"ssim", "ssim_skill", "mse", "identification"} <= set(beside)  # type: ignore[arg-type]
        assert card.baselines["nearest-public"]
    assert training.scores["targets"] == 6
    assert inference.scores["targets"] == 3
    assert float(str(training.cost["adversary_seconds"])) > 0
    assert training.utility != passive.utility or training.scores != passive.scores


def test_quality_is_told_by_iteration_and_at_its_peak(done: tuple[Path, list[Card]]) -> None:
    _, (passive, training, _, _) = done
    assert "checkpoints" not in passive.scores
    told: Any = training.scores["checkpoints"]
    assert told["step"] == [2, 4, 6, 8]
    assert len(told["mse"]) == len(told["ssim"]) == 4
    assert told["peak"]["mse"]["value"] == min(told["mse"])
    assert told["peak"]["ssim"]["value"] == max(told["ssim"])
    assert told["step"][told["ssim"].index(max(told["ssim"]))] == told["peak"]["ssim"]["step"]
    assert told["last"]["ssim"] == told["ssim"][-1]
    assert min(told["ssim"]) <= told["median"]["ssim"] <= max(told["ssim"])


def test_without_checkpoints_there_is_no_curve() -> None:
    run = TrainingRun(folder=Path(), utility={}, cost={})
    assert quality(run) == {}


def test_targets_get_the_answers_to_their_own_rows(done: tuple[Path, list[Card]]) -> None:
    folder, _ = done
    chosen = cells(load_settings(TABLE))
    found = [each for each in runs(folder) if each.decoded.exists()]
    assert found
    for cell, hijacked in product((chosen[1], chosen[2]), found):
        attacked = decoded_attack(hijacked, Cell.of(cell))
        decoded = load_file(hijacked.decoded)
        phase = Phase.EVALUATE if cell.attack.when == "inference" else Phase.TRAIN
        assert attacked.guess.images is not None
        assert len(attacked.targets) == len(attacked.guess.images) == cell.attack.targets
        for target, image in zip(attacked.targets, attacked.guess.images, strict=True):
            assert target.phase == phase
            own = decoded[f"{phase}/{target.node}/{target.step}/images"][target.row or 0]
            assert torch.equal(image, own)


def test_a_finished_hijack_is_judged_again_without_training(
    done: tuple[Path, list[Card]], monkeypatch: pytest.MonkeyPatch
) -> None:
    folder, before = done
    monkeypatch.setattr(executor, "train", pytest.fail)
    (folder / "cards" / f"{before[1].key}.json").unlink()
    again = run(TABLE, out=folder)
    assert (again[1].scores, again[1].control) == (before[1].scores, before[1].control)


@pytest.mark.parametrize(
    ("overrides", "told"),
    [
        (["protocol.name=fedavg"], "exchanges updates"),
        (["protocol.name=vertical-split", "data.nodes=1"], "holds a strip"),
        (["data.public=0.0"], "set data.public above 0"),
    ],
)
def test_what_does_not_fit_is_a_card_that_says_why(
    overrides: list[str], told: str, tmp_path: Path
) -> None:
    table = {**TABLE, "attack": TABLE["attack"][:1]}
    (card,) = run(table, out=tmp_path, overrides=overrides)
    assert card.status == "unfit"
    assert told in str(card.why)
    assert not (tmp_path / "runs").exists() or runs(tmp_path) == []


@pytest.mark.parametrize(
    ("overrides", "told"),
    [
        (["model.name=mnistnet", "model.cut=2", "protocol.batch_size=100"], "cannot fill a batch"),
        (["model.name=mlp2"], "which no pilot makes"),
    ],
)
def test_what_the_adversary_refuses_is_refused_before_training(
    overrides: list[str], told: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(ADVERSARIES, "fsha", FeatureSpaceHijacking)
    table = {**TABLE, "attack": TABLE["attack"][:1]}
    (card,) = run(table, out=tmp_path, overrides=overrides)
    assert card.status == "unfit"
    assert told in str(card.why)
    assert not (tmp_path / "runs").exists() or not list((tmp_path / "runs").iterdir())


def test_bad_settings_of_an_adversary_are_refused_before_training(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(ADVERSARIES, "fsha", FeatureSpaceHijacking)
    monkeypatch.setattr(executor, "train", pytest.fail)
    table = {**TABLE, "attack": [{"name": "fsha", "gradient_scale": -1.0}]}
    with pytest.raises(ValueError, match="gradient_scale"):
        run(table, out=tmp_path)
