"""A card of altered inputs has rivals, bounds and a control; misfits are named before training."""

from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file

import experiments.run.executor
from experiments.report.page import write_report
from experiments.report.pictures import blocks
from experiments.report.rows import cells
from experiments.results.cards import Card
from experiments.run.attack import attack_run, with_rivals
from experiments.run.judge import judge
from experiments.run.runner import run
from experiments.settings.load import load_settings
from leakbed.oracle.rivals import NEEDS_TRUTH
from leakbed.oracle.truth import AnswerKey

RIVALS = {"random-signs", "untrained-shadow", "substitute"}
BOUNDS = {"oracle-shadow", "true-features", "white-box"}
ANSWERS = ("labels", "known_labels", "round_labels", "public_labels", "cut_gradient")
ATTACK = {
    "name": "spadv",
    "targets": 20,
    "when": "inference",
    "steps": 10,
    "batch": 16,
    "ascent": 4,
    "budgets": [0.3, 0.1],
}
TABLE: dict[str, Any] = {
    "name": "small",
    "data": {"size": 400, "nodes": 1},
    "model": {"name": "mnistnet", "cut": 2, "upper_cut": 9},
    "protocol": {
        "name": "u-shaped",
        "batch_size": 16,
        "optimizer": "adam",
        "learning_rate": 0.003,
        "rounds": 3,
    },
    "attack": [ATTACK],
}


@pytest.fixture(scope="module")
def results(tmp_path_factory: pytest.TempPathFactory) -> tuple[Card, Path]:
    folder = tmp_path_factory.mktemp("evasion")
    (card,) = run(TABLE, out=folder)
    return card, folder


def test_rivals_bounds_and_a_control_stand_beside_the_score(results: tuple[Card, Path]) -> None:
    card, _ = results
    assert card.status == "done", card.why
    assert set(card.baselines) == RIVALS | BOUNDS
    assert BOUNDS <= NEEDS_TRUTH
    assert not RIVALS & NEEDS_TRUTH
    assert card.control is not None
    assert set(card.control["scores"]) == {"misclassification"}  # type: ignore[arg-type]
    evasion: Any = card.scores["evasion"]
    assert [each["budget"] for each in evasion["budgets"]] == [0.3, 0.1]
    assert set(evasion["beside"]) == RIVALS | BOUNDS
    assert all(len(each) == 2 for each in evasion["beside"].values())
    own: Any = card.scores["misclassification"]
    assert own["mean"] == evasion["budgets"][0]["misclassification"]
    white, signs = (evasion["beside"][name][0] for name in ("white-box", "random-signs"))
    assert white["misclassification"] > signs["misclassification"]
    assert white["misclassification"] >= evasion["beside"]["white-box"][1]["misclassification"]
    assert 0 <= evasion["clean_accuracy"] <= 1


def test_the_clean_accuracy_is_what_the_nodes_head_says(results: tuple[Card, Path]) -> None:
    card, _ = results
    (whole,) = run({**TABLE, "attack": [{**ATTACK, "targets": 40}]}, out=results[1])
    assert whole.scores["evasion"]["clean_accuracy"] == pytest.approx(  # type: ignore[index,call-overload]
        whole.utility["test_accuracy"]
    )
    assert card.utility == whole.utility


def test_the_images_are_kept_within_their_budgets(results: tuple[Card, Path]) -> None:
    card, folder = results
    kept = load_file(folder / "guesses" / f"{card.guess_key}.safetensors")
    natural = load_file(folder / "truths" / f"{card.guess_key}.safetensors")["images"]
    assert kept["adversarial"].shape == (20, 2, 1, 28, 28)
    apart = (kept["adversarial"] - natural).abs().flatten(2).amax((0, 2))
    assert apart.tolist() == pytest.approx([0.3, 0.1], abs=1e-6)


def test_altered_images_do_not_follow_the_victims_answers(
    results: tuple[Card, Path], tmp_path: Path
) -> None:
    """Other labels and another head at the node: what the attack makes is the same bits."""
    folder = results[1]
    (finished,) = (folder / "runs").iterdir()
    key = AnswerKey.read(finished / "answers")
    assert key.bottom is not None
    changed = replace(
        key,
        labels=(key.labels + 1) % 10,
        test_labels=(key.test_labels + 1) % 10,
        public_labels=(key.public_labels + 1) % 10,
        bottom={name: -array for name, array in key.bottom.items()},
    )
    changed.write(tmp_path / "answers", trace=finished / "trace")
    settings = load_settings(TABLE, []).attack[0]
    made: list[Any] = []
    seen = []
    for answers in (finished / "answers", tmp_path / "answers"):
        attacked = attack_run(finished / "trace", settings, stream=7, device="cpu", answers=answers)
        made.append(attacked.guess.adversarial)
        assert attacked.rivalry is not None
        view = attacked.rivalry.view
        seen.append([getattr(view, each) for each in ANSWERS])
        key, trace = AnswerKey.read(answers), finished / "trace"
        attacked = with_rivals(attacked, key, trace, stream=7)
        verdict, _ = judge(attacked, key, trace, stream=7)
        made.append(verdict.scores["evasion"]["answers"])
    assert torch.equal(made[0], made[2])
    assert made[1] != made[3]
    assert seen == [[None] * len(ANSWERS)] * 2


def test_the_report_shows_both_images_their_difference_and_both_answers(
    results: tuple[Card, Path],
) -> None:
    card, folder = results
    (block,) = blocks(folder, cells([card]))
    answers: Any = card.scores["evasion"]["answers"]  # type: ignore[index,call-overload]
    altered, apart = block.strips
    assert len(block.originals) == len(altered.pictures) == len(apart.pictures) == 8
    assert block.originals[0].caption.endswith(f"answer {answers['natural'][0]}")
    assert altered.pictures[0].caption == f"answer {answers['altered'][0][0]}"
    assert "the budget of 0.3" in apart.note
    page = write_report(folder).read_text()
    assert apart.note in page
    assert "misclassified" in page


def _no_training(*_: Any, **__: Any) -> None:
    raise AssertionError("it was trained")


@pytest.mark.parametrize(
    ("changes", "says"),
    [
        ({"protocol": {"name": "vanilla-split"}}, "use 'u-shaped' with model.upper_cut"),
        ({"protocol": {"name": "splitfed-v1"}}, "splitfed-v1 holds the last layers"),
        ({"protocol": {"name": "parallel-split"}}, "parallel-split holds the last layers"),
        ({"protocol": {"name": "fedavg"}}, "smashed"),
        ({"data": {"size": 400, "nodes": 1, "public": 0.0}}, "set data.public above 0"),
        ({"attack": [{**ATTACK, "batch": 73}]}, "72 public images cannot fill a batch of 73"),
        ({"attack": [{**ATTACK, "layer": 7}]}, "its part has 7 layers"),
        (
            {"attack": [{**ATTACK, "mean": [0.5, 0.5], "std": [1.0, 1.0]}]},
            "of 2 channels, the images have 1",
        ),
    ],
)
def test_a_misfit_is_named_before_training(
    changes: dict[str, Any], says: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(experiments.run.executor, "train", _no_training)
    (card,) = run({**TABLE, **changes}, out=tmp_path)
    assert card.status == "unfit"
    assert says in str(card.why)


@pytest.mark.parametrize(
    ("name", "live", "protocol"),
    [
        ("fora", True, {"name": "u-shaped"}),
        ("fora", False, {"name": "vanilla-split", "labels": "server"}),
        ("sdar", True, {"name": "vanilla-split", "labels": "server"}),
        ("sdar", False, {"name": "u-shaped"}),
    ],
)
def test_labels_asked_for_that_no_node_sends_are_refused_before_training(
    protocol: dict[str, Any],
    live: bool,
    name: str,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(experiments.run.executor, "train", _no_training)
    model = dict(TABLE["model"])
    if protocol["name"] == "vanilla-split":
        del model["upper_cut"]
    attack = {"name": name, "targets": 4, "aligned": True, "live": live}
    (card,) = run({**TABLE, "protocol": protocol, "model": model, "attack": [attack]}, out=tmp_path)
    assert card.status == "unfit"
    assert 'protocol.labels = "shared"' in str(card.why)


@pytest.mark.parametrize(("mean", "std"), [([0.5], []), ([], [0.5]), ([0.5], [0.0])])
def test_a_normalisation_without_its_numbers_ends_the_run_before_training(
    mean: list[float], std: list[float], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(experiments.run.executor, "train", _no_training)
    with pytest.raises(ValueError, match="one std above 0 per channel"):
        run({**TABLE, "attack": [{**ATTACK, "mean": mean, "std": std}]}, out=tmp_path)


@pytest.mark.parametrize("budgets", [[0.0], [-0.1], [1.1]])
def test_a_budget_that_is_none_ends_the_run_before_training(
    budgets: list[float], tmp_path: Path
) -> None:
    with pytest.raises(ValueError, match="above 0 and at most 1"):
        run({**TABLE, "attack": [{**ATTACK, "budgets": budgets}]}, out=tmp_path)
