"""A cell with a malicious client, from its settings to its card."""

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file

from experiments.report.page import write_report
from experiments.results.cards import Card
from experiments.run import executor
from experiments.run.runner import run
from experiments.run.training_run import TrainingRun
from leakbed.tap.trace import Trace

TABLE: dict[str, Any] = {
    "name": "intruded",
    "data": {"name": "mnist-5k", "size": 400, "nodes": 3},
    "model": {"name": "lenet-sigmoid", "cut": 1, "upper_cut": 5, "extra_classes": 1},
    "protocol": {"name": "u-shaped", "batch_size": 8, "local_steps": 2, "rounds": 2},
    "attack": [
        {"name": "smashed-as-image", "targets": 4},
        {"name": "client-gan", "nodes": [0, 2], "targets": 9, "target_class": 3, "width": 8},
    ],
}


@pytest.fixture(scope="module", autouse=True)
def brief() -> Any:
    with pytest.MonkeyPatch.context() as patched:
        patched.setattr("leakbed.oracle.model_scores._STEPS", 30)
        yield


@pytest.fixture(scope="module")
def done(tmp_path_factory: pytest.TempPathFactory, brief: None) -> tuple[Path, list[Card]]:
    folder = tmp_path_factory.mktemp("intruded")
    return folder, run(TABLE, out=folder)


def runs(folder: Path) -> list[TrainingRun]:
    found = [TrainingRun.read(each) for each in (folder / "runs").iterdir()]
    return [each for each in found if each is not None]


def test_a_card_has_the_rate_beside_chance_the_control_and_real_images(
    done: tuple[Path, list[Card]],
) -> None:
    _, (_, card) = done
    assert card.status == "done"
    assert card.scores["targets"] == 9
    rate: Any = card.scores["class_rate"]
    assert rate["interval"][0] <= rate["mean"] <= rate["interval"][1]
    assert {"nearest_real", "diversity"} <= set(card.scores)
    judge: Any = card.scores["judge"]
    assert 0.3 < judge["accuracy"] <= 1
    assert judge["held_out"] > 0
    assert set(card.baselines) == {"chance", "real-images", "other-classes", "untrained-victim"}
    assert card.baselines["chance"]["class_rate"] == pytest.approx(0.1)
    real, other = (card.baselines[name]["class_rate"] for name in ("real-images", "other-classes"))
    assert float(str(real)) > float(str(other))
    control: Any = card.control
    assert control["within"] is not None
    assert control["untrained_victim"]["targets"] == 9
    assert (
        control["untrained_victim"]["class_rate"]["mean"]
        == card.baselines["untrained-victim"]["class_rate"]
    )


def test_a_card_says_who_attacked_and_what_was_left_of_the_task(
    done: tuple[Path, list[Card]],
) -> None:
    _, (passive, card) = done
    assert card.threat is not None
    assert (card.threat.seat, card.threat.active) == ("client", True)
    assert card.settings["intruder"]["nodes"] == [0, 2]  # type: ignore[index,call-overload]
    assert set(card.utility) == {"test_accuracy", "honest_test_accuracy"}
    assert card.utility["honest_test_accuracy"] == passive.utility["test_accuracy"]
    assert card.scores["turns"] == [4, 4]


def test_the_honest_run_is_the_one_that_passive_attacks_share(
    done: tuple[Path, list[Card]],
) -> None:
    folder, _ = done
    assert [each.samples.exists() for each in runs(folder)].count(True) == 1
    assert len(runs(folder)) == 2


def test_samples_come_from_every_malicious_node_and_no_trace_holds_them(
    done: tuple[Path, list[Card]],
) -> None:
    folder, (_, card) = done
    (intruded,) = [each for each in runs(folder) if each.samples.exists()]
    held = load_file(intruded.samples)
    assert held["images"].shape == (9, 1, 28, 28)
    assert intruded.samples.stat().st_mode & 0o077 == 0
    assert not torch.allclose(held["images"][:4].mean(0), held["images"][5:].mean(0), atol=1e-3)
    told = json.dumps([record.fields for record in Trace(intruded.trace).records], default=str)
    assert "samples" not in told
    guess = load_file(folder / "guesses" / f"{card.guess_key}.safetensors")
    truth = load_file(folder / "truths" / f"{card.guess_key}.safetensors")
    assert torch.equal(guess["images"][:, 0], held["images"])
    assert guess["images"].shape == truth["images"].shape
    assert set(truth["labels"].flatten().tolist()) == {3}


def test_the_report_shows_the_samples_and_names_the_rate(done: tuple[Path, list[Card]]) -> None:
    folder, _ = done
    text = write_report(folder).read_text()
    assert "called the class" in text
    assert "judge right" in text
    assert "client-gan" in text
    assert text.count("data:image/png") > 8


def test_without_a_control_no_honest_run_is_trained(tmp_path: Path) -> None:
    attack = {**TABLE["attack"][1], "control": False}
    (card,) = run({**TABLE, "attack": [attack]}, out=tmp_path)
    assert card.status == "done"
    assert set(card.utility) == {"test_accuracy"}
    assert len(runs(tmp_path)) == 1


def test_by_fedavg_the_same_settings_run(tmp_path: Path) -> None:
    table = {**TABLE, "attack": [{**TABLE["attack"][1], "control": False}]}
    (card,) = run(table, overrides=["protocol.name=fedavg"], out=tmp_path)
    assert card.status == "done"
    assert card.scores["turns"] == [8, 8]  # four steps, each after a turn that costs none


def test_a_protocol_that_does_not_fit_is_a_card_that_says_so(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(executor, "train", None)  # nothing may be trained
    table = {**TABLE, "attack": [TABLE["attack"][1]]}
    (card,) = run(table, overrides=["protocol.name=vanilla-split"], out=tmp_path)
    assert card.status == "unfit"
    assert "use 'u-shaped' or 'fedavg'" in str(card.why)


def test_an_intruder_that_was_never_sampled_has_nothing_to_show(tmp_path: Path) -> None:
    table = {**TABLE, "attack": [{**TABLE["attack"][1], "nodes": [2], "control": False}]}
    overrides = ["protocol.rounds=1", "protocol.fraction=0.1", "data.nodes=6"]
    cards = [run(table, overrides=[*overrides, f"seed={s}"], out=tmp_path)[0] for s in range(2)]
    assert {card.status for card in cards} <= {"done", "unfit"}
    missed = [card for card in cards if card.status == "unfit"]
    assert all("ever sampled for a round" in str(card.why) for card in missed)
    assert missed
