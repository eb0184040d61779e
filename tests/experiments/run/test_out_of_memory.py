"""Out of memory is one line that names what helps, and what was finished before it stays."""

from pathlib import Path
from typing import Any

import pytest

from experiments.results.cards import Card
from experiments.run.runner import run
from leakbed.errors import FAILED, verdict
from tests.support import hungry

TABLE: dict[str, Any] = {
    "name": "memory",
    "data": {"name": "tests.support.tiny:images", "nodes": 2, "test": 0.2},
    "model": {"name": "tests.support.tiny:plain", "cut": 1},
    "protocol": {"name": "vanilla-split", "labels": "server", "batch_size": 5, "local_steps": 2},
    "attack": [{"name": "smashed-as-image", "targets": 2}],
}
FULL_AT_NODE = {"defense": [{"name": "none"}, {"name": "tests.support.hungry:AtNode"}]}


@pytest.fixture
def untried(monkeypatch: pytest.MonkeyPatch) -> None:
    """Let the defence run out of memory in training, not where it is tried out before."""
    monkeypatch.setattr("experiments.run.executor.refuse_breaches", lambda _: None)


def line_of(changes: dict[str, Any], folder: Path) -> str:
    """Run until memory ends; return the command line's one line, with the first cell kept."""
    with pytest.raises(Exception, match="out of memory") as caught:
        run({**TABLE, **changes}, out=folder)
    found = verdict(caught.value)
    assert found is not None, caught.value
    code, lines = found
    assert code == FAILED
    (card,) = (folder / "cards").glob("*.json")
    assert Card.model_validate_json(card.read_text()).status == "done"
    (line,) = lines
    assert hungry.FULL in line
    assert "finished cells stay" in line
    return line


def test_of_an_attack_it_names_targets_and_stack(tmp_path: Path) -> None:
    attack = [*TABLE["attack"], {"name": "tests.support.hungry:Attack", "targets": 2}]
    line = line_of({"attack": attack}, tmp_path)
    assert "fewer targets" in line
    assert "smaller stack" in line


def test_of_a_node_it_names_the_batch(untried: None, tmp_path: Path) -> None:
    line = line_of(FULL_AT_NODE, tmp_path)
    assert line.startswith("error: node 0 failed on 'train.split'")
    assert "smaller protocol.batch_size" in line


def test_of_the_server_it_names_the_batch(tmp_path: Path) -> None:
    defenses = [{"name": "none"}, {"name": "tests.support.hungry:AtServer"}]
    line = line_of({"defense": defenses}, tmp_path)
    assert "smaller protocol.batch_size" in line


@pytest.mark.runtime
def test_of_a_worker_of_ray_it_names_its_share(untried: None, tmp_path: Path) -> None:
    run({**TABLE, "device": "cpu"}, out=tmp_path)  # the finished cell, without a start of Ray
    on_ray = {"grid": "ray", "workers": 1, "device": "cpu"}
    assert "larger gpus_per_worker" in line_of({**FULL_AT_NODE, **on_ray}, tmp_path)
