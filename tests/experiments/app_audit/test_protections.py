"""Defences of a stranger's app are named, and what its server learns all the same is attacked."""

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from typer.testing import CliRunner

from experiments.app_audit.protections import (
    SUM,
    defense_of,
    defenses_in,
    of_gradients,
    summed,
)
from experiments.cli import app as commands
from experiments.results.cards import read_cards
from leakbed.events import Arrays, Gradients, Phase, UpdateUp, WeightsDown
from leakbed.tap import Recorder, Trace
from leakbed.tap.facts import UNKNOWN_DEFENSE

AUDITED = Path(__file__).resolve().parents[3] / "experiments" / "studies" / "audit"


@pytest.mark.parametrize(
    ("code", "imported", "names"),
    [
        ("from opacus import PrivacyEngine", (), ["opacus (DP-SGD)"]),
        ("import theirs", ("opacus",), ["opacus (DP-SGD)"]),
        ("import flwr.clientapp.mod as m\nm.LocalDpMod(1, 1, 1, 1)", (), ["LocalDpMod"]),
        (
            "from flwr.serverapp.strategy import DifferentialPrivacyServerSideFixedClipping",
            (),
            ["DifferentialPrivacyServerSideFixedClipping"],
        ),
        ("from leakbed.mods import defend", (), ["a defence of Leakbed's"]),
        ("# opacus would be a PrivacyEngine\nx = 'opacus'", (), []),
        ("this is no Python", (), []),
    ],
)
def test_defences_are_found_in_code_and_not_in_comments(
    tmp_path: Path, code: str, imported: tuple[str, ...], names: list[str]
) -> None:
    (tmp_path / "client.py").write_text(code)
    assert defenses_in(tmp_path, imported) == names
    assumed: list[str] = []
    assert defense_of(tmp_path, imported, assumed) == (", ".join(names) or UNKNOWN_DEFENSE)
    assert ("may be others" if names else "may defend") in assumed[0]


def test_only_the_apps_own_files_are_read(tmp_path: Path) -> None:
    """A folder may be called like a file, and an environment in the bundle is not the app."""
    (tmp_path / "folder.py").mkdir()
    for place in (".venv", "venv/lib/site-packages"):
        (tmp_path / place).mkdir(parents=True)
        (tmp_path / place / "a.py").write_text("import opacus")
    assert defenses_in(tmp_path, ()) == []
    (tmp_path / "client.py").write_bytes("# coding: latin-1\nimport opacus  # é".encode("latin-1"))
    assert defenses_in(tmp_path, ()) == ["opacus (DP-SGD)"]


def recorded(folder: Path, *rounds: float, phase: Phase = Phase.TRAIN) -> Trace:
    """Record the models that two nodes are sent in each round."""
    with Recorder(folder) as recorder:
        for number, value in enumerate(rounds, 1):
            arrays: Arrays = {"w": np.full(2, value, np.float32)}
            for node in (1, 2):
                recorder(WeightsDown(node=node, round=number, arrays=arrays, phase=phase))
    return Trace(folder)


SEEN: dict[str, Any] = {"batches": {"1/1": [2], "2/1": [1], "1/2": [2], "2/2": [1]}}
FED = {
    "1/1/images": torch.zeros(2, 1, 1, 1),
    "2/1/images": torch.ones(1, 1, 1, 1),
    "1/1/labels": torch.tensor([0, 1]),
    "2/1/labels": torch.tensor([2]),
}


def test_the_difference_of_two_models_is_one_update_over_all_rows(tmp_path: Path) -> None:
    found = summed(recorded(tmp_path / "masked", 0.0, -0.5), SEEN, FED, tmp_path / "sum")
    assert found is not None
    (update,) = list(found.trace.events(UpdateUp))
    assert isinstance(update, UpdateUp)
    assert (update.node, update.round, update.examples) == (SUM, 1, 3)
    assert np.array_equal(update.before["w"], np.zeros(2, np.float32))
    assert np.array_equal(update.after["w"], np.full(2, -0.5, np.float32))
    assert found.facts["batch_size"] == 3
    assert found.facts["local_steps"] == 1
    assert found.fed["0/1/labels"].tolist() == [0, 1, 2]
    assert found.fed["0/1/images"].flatten().tolist() == [0, 0, 1]
    assert "exact" in found.assumed
    several = {"batches": {"1/1": [1, 1], "2/1": [1, 1]}}
    near = summed(recorded(tmp_path / "more", 0.0, 1.0), several, FED, tmp_path / "near")
    assert near is not None
    assert near.facts["local_steps"] == 2
    assert "is near what 2 steps" in near.assumed
    unequal = {"batches": {"1/1": [4, 1], "2/1": [3]}}  # a last batch that is smaller, a node less
    part = summed(recorded(tmp_path / "part", 0.0, 1.0), unequal, FED, tmp_path / "unequal")
    assert part is not None
    assert "over the 8 rows of 2 nodes" in part.assumed
    (whole,) = list(part.trace.events(UpdateUp))
    assert isinstance(whole, UpdateUp)
    assert whole.examples == 8


def test_a_model_that_is_never_sent_again_tells_no_sum(tmp_path: Path) -> None:
    alone = recorded(tmp_path / "alone", 0.0)
    assert summed(alone, SEEN, FED, tmp_path / "a") is None
    unchanged = recorded(tmp_path / "unchanged", 0.0, 0.0)
    assert summed(unchanged, SEEN, FED, tmp_path / "b") is None
    unseen = recorded(tmp_path / "unseen", 0.0, 1.0)
    assert summed(unseen, {"batches": {}}, {}, tmp_path / "c") is None
    evaluated = recorded(tmp_path / "evaluated", 0.0, 1.0, phase=Phase.EVALUATE)
    assert summed(evaluated, SEEN, FED, tmp_path / "d") is None


def test_gradients_of_weights_are_updates_and_others_are_not(tmp_path: Path) -> None:
    weights: Arrays = {"w": np.full(2, 1.0, np.float32)}
    gradients: Arrays = {"w": np.array([0.25, -1.0], np.float32)}
    with Recorder(tmp_path / "sent") as recorder:
        recorder(WeightsDown(node=1, round=1, arrays=weights))
        recorder(Gradients(node=1, round=1, arrays=gradients, up=True))
        recorder(Gradients(node=2, round=1, arrays=gradients, up=True))  # was sent no weights
        recorder(Gradients(node=1, round=2, arrays={"embedding": weights["w"]}, up=True))
        recorder(Gradients(node=1, round=3, arrays=gradients, up=False))
    made = of_gradients(Trace(tmp_path / "sent"), SEEN, tmp_path / "made")
    assert made is not None
    (update,) = list(made.events(UpdateUp))
    assert isinstance(update, UpdateUp)
    assert (update.node, update.round, update.examples) == (1, 1, 2)
    assert np.array_equal(update.before["w"], weights["w"])
    assert np.array_equal(update.after["w"], np.array([0.75, 2.0], np.float32))
    with Recorder(tmp_path / "vertical") as recorder:
        recorder(Gradients(node=1, round=1, arrays=gradients, up=False))
    assert of_gradients(Trace(tmp_path / "vertical"), SEEN, tmp_path / "none") is None


@pytest.mark.runtime
@pytest.mark.parametrize(
    ("name", "nodes", "defense", "assumed"),
    [
        ("older", 2, UNKNOWN_DEFENSE, "the network is older.task:Net"),
        ("secure", 4, "SecAgg+", "one update over the 4 rows of 4 nodes"),
    ],
)
def test_apps_of_an_older_kind_and_with_secure_aggregation_are_attacked(
    tmp_path: Path, name: str, nodes: int, defense: str, assumed: str
) -> None:
    command = ["audit", str(AUDITED / name), "--out", str(tmp_path), "--nodes", str(nodes)]
    ended = CliRunner().invoke(commands, [*command, "--with", "dlm-plus", "--iterations", "100"])
    assert ended.exit_code == 0, ended.output
    assert assumed in ended.output
    (card,) = read_cards(tmp_path)
    scores: Any = card.scores
    assert card.defense == defense
    assert scores["abs_pearson"]["mean"] > 0.9
    assert scores["label_accuracy"]["mean"] == 1
