"""Messages made again: what memory cannot hold, and the floor behind a linear bottom."""

from pathlib import Path
from typing import Any

import pytest

from experiments.run import candidate_messages
from experiments.run.ceilings import ceiling_of_run
from experiments.run.runner import run
from leakbed.contracts.noise_laws import NoCeilingError

FEW: dict[str, Any] = {"candidates": 40, "targets": 2, "draws": 2}


def recorded(out: Path, **noise: float) -> Path:
    table: dict[str, Any] = {
        "name": "small",
        "data": {"size": 200, "nodes": 2},
        "model": {"name": "mnistnet", "cut": 0},
        "protocol": {"name": "vanilla-split", "batch_size": 4, "local_steps": 1},
        "attack": [{"name": "mean-image", "targets": 1}],
        "defense": [{"name": "smashed-noise", "sigma": 0.5, **noise}],
    }
    run(table, out=out)
    (only,) = (out / "runs").iterdir()
    return only


@pytest.fixture(scope="module")
def linear(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return recorded(tmp_path_factory.mktemp("linear"))


def test_a_linear_bottom_has_a_floor_of_reconstruction(linear: Path, tmp_path: Path) -> None:
    found = ceiling_of_run(linear, **FEW)
    floors = [float(each.floor or 0) for each in found.messages]
    assert all(0 < floor < 0.1 for floor in floors)  # under the pixels' own variance
    assert "no linear reconstruction" in "\n".join(found.lines())
    clipped = ceiling_of_run(recorded(tmp_path, clip=1.0), **FEW)
    assert {each.floor for each in clipped.messages} == {None}  # a clip is not linear


def test_more_candidates_than_memory_holds_are_refused(
    linear: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(candidate_messages, "_MEMORY", 2**16)
    with pytest.raises(NoCeilingError, match=r"candidates' messages of \d+ numbers are .* at most"):
        ceiling_of_run(linear, **FEW)
