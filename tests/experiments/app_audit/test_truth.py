"""A stranger's trace is attacked with facts and data that its owner has, and scored."""

from pathlib import Path
from typing import Any

import pytest
import torch
from typer.testing import CliRunner

from experiments.app_audit.truth import OwnedTruthError, answers_of
from experiments.cli import app as commands
from experiments.results.cards import read_cards
from experiments.run.offline import TwoTruthsError, attack_trace
from leakbed.contracts import Guess
from leakbed.events import Phase, Target
from leakbed.models import Architecture
from leakbed.oracle import score
from leakbed.tap.segments import TraceError
from tests.support import normalising_app as theirs

APP = "tests.support.normalising_app"
FACTS = {"image_shape": theirs.SHAPE, "num_classes": theirs.CLASSES, "batch_size": 1}
NORMALISED = {**FACTS, "mean": theirs.MEAN, "std": theirs.STD}
FEW = {"iterations": 3, "restarts": 1}


@pytest.fixture(scope="module")
def trace(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return theirs.recorded(tmp_path_factory.mktemp("traces"))


def attacked(trace: Path, out: Path, about: Any = NORMALISED, **more: Any) -> Any:
    settings = {"settings": {"iterations": 400}} | more
    return attack_trace(trace, "dlm-plus", out=out, model=f"{APP}:Net", about=about, **settings)


@pytest.mark.parametrize("truth", ["fed", "loader"])
def test_scores_are_of_pictures_where_the_app_normalises(
    trace: Path, tmp_path: Path, truth: str
) -> None:
    card = attacked(trace, tmp_path, truth=f"{APP}:{truth}")
    assert card.status == "done"
    assert card.scores["mse"]["mean"] < 1e-4
    assert card.scores["label_accuracy"]["mean"] == 1
    assert card.objective["solved"] == theirs.NODES
    assert card.objective["attack"] < 1e-6 < card.objective["grey"]
    assert card.objective["attack"] < 1e-6 < card.objective["noise"]


def test_samples_that_come_again_in_another_round_can_be_identified() -> None:
    draws = torch.Generator().manual_seed(0)
    images, labels = torch.rand(3, *theirs.SHAPE, generator=draws), torch.tensor([1, 2, 2])
    fed = {(1, 1): (images, labels), (1, 2): (images.flip(0), labels.flip(0))}
    architecture = Architecture(name="mlp2", image_shape=theirs.SHAPE, num_classes=theirs.CLASSES)
    key = answers_of(fed, architecture)
    truth = key.truth([Target(node=1, round=2, step=0, row=None, phase=Phase.TRAIN)])
    assert torch.equal(truth.images[0], images.flip(0))
    assert len(truth.candidates) == 3
    found = score(Guess(images=truth.images), truth)
    assert found.metrics["identification"].mean == 1


def test_from_the_command_line_a_search_that_solves_nothing_says_so(
    trace: Path, tmp_path: Path
) -> None:
    facts = ["image_shape=[1, 6, 6]", "num_classes=4", "batch_size=1", "mean=[0.4]", "std=[0.25]"]
    command = ["attack", str(trace), "--with", "dlm-plus", "--model", f"{APP}:Net"]
    command += [word for fact in facts for word in ("--about", fact)]
    command += ["-o", "iterations=2", "--truth", f"{APP}:fed", "--out", str(tmp_path)]
    ended = CliRunner().invoke(commands, command)
    assert ended.exit_code == 0, ended.output
    (card,) = read_cards(tmp_path)
    assert (card.status, card.objective["solved"]) == ("done", 0)
    assert (tmp_path / "answers" / "images.safetensors").stat().st_mode & 0o777 == 0o600


@pytest.mark.parametrize(
    ("truth", "about", "message"),
    [
        ("unnormalised", FACTS, r"not in \[0, 1\]; say what the app made .* --about mean"),
        ("fed", FACTS, r"not in \[0, 1\]"),
        ("too_many", NORMALISED, r"too_many\(0\) returned 3 samples, and node 1 said .* 1;"),
        ("shuffled", NORMALISED, "the loader shuffles"),
        ("fed", {**NORMALISED, "partitions": {"1": 0}}, "which partition node 2 holds"),
        ("missing", NORMALISED, "unknown name in tests.support.normalising_app 'missing'"),
        ("SHAPE", NORMALISED, "is a tuple; name a function"),
        ("fed", {**NORMALISED, "num_classes": 2}, "labels go from 1 to 2"),
    ],
)
def test_a_truth_that_cannot_be_is_refused(
    trace: Path, tmp_path: Path, truth: str, about: Any, message: str
) -> None:
    with pytest.raises(OwnedTruthError, match=message):
        attacked(trace, tmp_path, about, truth=f"{APP}:{truth}", settings=FEW)


@pytest.mark.parametrize(
    ("about", "message"),
    [
        ({"batch": 1}, "unknown fact of a run 'batch'; did you mean 'batch_size'"),
        ({"batch_size": 1}, r"said image_shape, num_classes of its run.*--about image_shape"),
        ({**FACTS, "image_shape": 3}, "cannot be facts of a run"),
        ({**FACTS, "mean": [0.5]}, "std = None must both be 1 finite numbers"),
    ],
)
def test_facts_that_cannot_be_are_refused(
    trace: Path, tmp_path: Path, about: Any, message: str
) -> None:
    with pytest.raises(ValueError, match=message) as caught:
        attacked(trace, tmp_path, about, settings=FEW)
    assert isinstance(caught.value, TraceError) or "mean" in message or "std" in message


def test_there_is_one_truth(trace: Path, tmp_path: Path) -> None:
    with pytest.raises(TwoTruthsError, match="give one of them"):
        attacked(trace, tmp_path, answers=tmp_path, truth=f"{APP}:fed")
