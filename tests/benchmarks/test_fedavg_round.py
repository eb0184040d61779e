"""The FedAvg benchmark trains the same on both grids and prints what it promises (tiny cells)."""

import json
import logging
from contextlib import ExitStack
from pathlib import Path
from typing import Any

import pytest
import torch

from benchmarks import cifar_shaped, fedavg_round
from benchmarks.fedavg_round import PFL, Size, measured
from clients import node_app
from leakbed.flower_internals import task_identity
from leakbed.grids import LocalGrid
from tests.support import tiny

TINY = Size(
    nodes=6,
    sampled=3,
    batch=5,
    turns=2,
    network="tests.support.tiny:plain",
    data="tests.support.tiny:images",
    image_shape=tiny.IMAGE_SHAPE,
    classes=tiny.CLASSES,
)
ANSWERS = "#!/bin/sh\necho '{\"seconds\": 0}'\nwhile read _; do echo '{\"seconds\": 0.5}'; done\n"


class Heard:
    """Turns that never wait."""

    def __init__(self) -> None:
        self.told: list[dict[str, Any]] = []

    def tell(self, **answer: Any) -> None:
        self.told.append(answer)

    def wait(self) -> bool:
        return True


def served(size: Size = TINY) -> list[dict[str, Any]]:
    active_channels = Heard()
    with task_identity():
        fedavg_round.serve(LocalGrid(node_app, nodes=size.nodes), size, active_channels)  # type: ignore[arg-type]
    return active_channels.told


@pytest.fixture(autouse=True)
def quiet() -> None:
    logging.getLogger("flwr").setLevel(logging.ERROR)


def test_every_round_is_told_and_trains() -> None:
    told = served()
    assert len(told) == 1 + TINY.turns  # the first says that it is ready
    assert len({answer["digest"] for answer in told}) == 1 + TINY.turns
    assert served()[-1]["digest"] == told[-1]["digest"]


def test_the_published_size() -> None:
    parameters = cifar_shaped.network().parameters()
    assert sum(parameter.numel() for parameter in parameters) == 315_722
    assert cifar_shaped.network()(torch.zeros(2, *cifar_shaped.IMAGE_SHAPE)).shape == (2, 10)
    assert Size().nodes * 50 == cifar_shaped.ROWS
    assert Size().cell(3).plan.local_steps is None  # one epoch


def test_images_of_every_class(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(cifar_shaped, "ROWS", 20)
    images, labels = cifar_shaped.images()
    assert images.shape == (20, *cifar_shaped.IMAGE_SHAPE)
    assert labels.unique().tolist() == list(range(cifar_shaped.CLASSES))


def test_without_pfl_its_side_is_skipped(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.delenv(PFL, raising=False)
    assert fedavg_round._pfl_commands("{}") == {}
    assert "skipped: not installed" in capsys.readouterr().err


@pytest.mark.runtime
def test_prints_a_line_per_other_side(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    python = tmp_path / "python"  # speaks like pfl's side, whose environment is not here
    python.write_text(ANSWERS)
    python.chmod(0o755)
    monkeypatch.setenv(PFL, str(python))
    lines = measured(TINY, warm=1, runs=1)
    assert [str(line["name"]).partition(": RayGrid / ")[2] for line in lines] == [
        "Flower's Simulation Runtime",
        "pfl 0.6, one process, all cores",
        "pfl 0.6, 2 processes",
    ]
    assert set(lines[0]) == {"name", "ours", "other", "ratio", "unit", "runs"}
    assert lines[1]["other"] == 0.5


def test_other_weights_are_an_error(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv(PFL, raising=False)
    original = fedavg_round.together

    def swapped(commands: dict[str, list[str]], stack: ExitStack) -> Any:
        """Sides that train nothing and disagree."""
        answers = [json.dumps({"seconds": 0.5, "digest": place}) for place in range(len(commands))]
        scripts = [f"echo '{each}'; while read _; do echo '{each}'; done" for each in answers]
        sides = {name: ["sh", "-c", s] for name, s in zip(commands, scripts, strict=True)}
        return original(sides, stack)

    monkeypatch.setattr(fedavg_round, "together", swapped)
    with pytest.raises(RuntimeError, match="different weights"):
        measured(TINY, warm=0, runs=1)
