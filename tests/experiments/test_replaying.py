"""Bottoms stepped again with recorded gradients make what was recorded, protocol by protocol."""

from pathlib import Path
from typing import Any

import pytest

from experiments.ceilings import RunCeiling, ceiling_of_run
from experiments.runner import run
from leakbed.noise_laws import NoCeilingError

FEW: dict[str, Any] = {"candidates": 30, "targets": 4, "draws": 2}


def recorded(folder: Path, protocol: str, *, model: dict[str, Any], **own: Any) -> Path:
    table: dict[str, Any] = {
        "name": "small",
        "keep_rounds": "all",
        "data": {"size": 200, "nodes": 2},
        "model": model,
        "protocol": {
            "name": protocol,
            "rounds": 2,
            "batch_size": 8,
            "local_steps": 2,
            "optimizer": "sgd",
            "momentum": 0.9,
            **own,
        },
        "attack": [{"name": "mean-image", "targets": 2}],
        "defense": [{"name": "smashed-noise", "sigma": 0.05}],
    }
    run(table, out=folder)
    (only,) = (folder / "runs").iterdir()
    return only


def sound(found: RunCeiling) -> bool:
    assert all(each.sound for each in found.findings), list(map(str, found.findings))
    return bool(found.findings)


@pytest.mark.parametrize(
    ("protocol", "model"),
    [
        ("splitfed-v1", {"name": "mnistnet", "cut": 2}),
        ("splitfed-v2", {"name": "mnistnet", "cut": 2}),
        ("u-shaped", {"name": "mnistnet", "cut": 2, "upper_cut": 7}),
    ],
)
def test_the_last_round_and_test_rows_are_made_again(
    protocol: str, model: dict[str, Any], tmp_path: Path
) -> None:
    folder = recorded(tmp_path, protocol, model=model)
    assert sound(ceiling_of_run(folder, collect="last", **FEW))
    assert sound(ceiling_of_run(folder, when="inference", **FEW))


def test_bottoms_that_step_together_have_a_first_message_only(tmp_path: Path) -> None:
    folder = recorded(tmp_path, "parallel-split", model={"name": "mnistnet", "cut": 2})
    assert sound(ceiling_of_run(folder, collect="first", **FEW))
    with pytest.raises(NoCeilingError, match="how bottoms of 'parallel-split' step together"):
        ceiling_of_run(folder, collect="last", **FEW)


def test_batchnorm_makes_a_batch_one_message(tmp_path: Path) -> None:
    own = {"name": "tests.deployed_network:network", "cut": 3}
    folder = recorded(tmp_path, "vanilla-split", model=own)
    found = ceiling_of_run(folder, collect="last", **FEW)
    assert sound(found)
    assert {each.guesses for each in found.messages} == {1}
