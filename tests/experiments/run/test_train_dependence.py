"""What smashed data tell of the images, measured on what a run sent."""

from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

from experiments.run.runner import run
from experiments.run.train import smashed_dependence
from leakbed.distance_correlation import corrected_correlation, distance_correlation
from leakbed.events import Phase, SmashedUp
from leakbed.tap.trace import Recorder, Trace

IMAGES = torch.rand(40, 1, 6, 6, generator=torch.Generator().manual_seed(0))


def answers(**changes: Any) -> Any:
    order = {
        (0, round_, step): range(8 * step, 8 * step + 8) for round_ in (1, 2) for step in range(5)
    }
    return SimpleNamespace(**{"images": IMAGES, "order": order, "parties": 1} | changes)


def recorded(folder: Path, smash: Callable[[Tensor], Tensor], *, rows: int = 8) -> Trace:
    with Recorder(folder) as recorder:
        for round_ in (1, 2):
            for step in range(5):
                images = IMAGES[8 * step : 8 * step + rows]
                seen = smash(images) if round_ == 2 else torch.zeros(rows, 3)
                recorder(SmashedUp(node=0, round=round_, step=step, smashed=seen.numpy()))
        recorder(
            SmashedUp(
                node=0, round=2, step=0, smashed=np.ones((8, 3), np.float32), phase=Phase.EVALUATE
            )
        )
    return Trace(folder)


def test_copies_depend_wholly_and_noise_not_at_all(tmp_path: Path) -> None:
    copied = smashed_dependence(recorded(tmp_path / "a", lambda images: 2 * images + 1), answers())
    assert copied["corrected"] == pytest.approx(1, abs=1e-3)
    assert copied["batches"] == 5  # of the last round's training
    draws = torch.Generator().manual_seed(1)
    noise = recorded(tmp_path / "b", lambda images: torch.randn(len(images), 50, generator=draws))
    found = smashed_dependence(noise, answers())
    assert abs(found["corrected"]) < 0.2
    assert found["plain"] > 0.8, "which is why the plain one says little"


def test_it_is_the_mean_over_batches_of_either_estimate(tmp_path: Path) -> None:
    trace = recorded(tmp_path / "a", lambda images: images.flatten(1)[:, :3].square())
    found = smashed_dependence(trace, answers())
    batches = [
        (part.double(), part.flatten(1)[:, :3].square().double()) for part in IMAGES.split(8)
    ]
    for name, estimate in (("plain", distance_correlation), ("corrected", corrected_correlation)):
        values = [float(estimate(*batch)) for batch in batches]
        assert found[name] == pytest.approx(sum(values) / 5, abs=1e-6)


def test_strips_and_batches_too_small_are_left_out(tmp_path: Path) -> None:
    trace = recorded(tmp_path / "a", lambda images: images)
    assert smashed_dependence(trace, answers(parties=2)) == {}
    assert smashed_dependence(recorded(tmp_path / "b", lambda i: i, rows=3), answers()) == {}


def test_cards_of_split_runs_hold_it_and_others_do_not(tmp_path: Path) -> None:
    table: dict[str, Any] = {
        "name": "small",
        "data": {"name": "tests.support.tiny:images", "nodes": 2, "public": 0.2},
        "model": {"name": "tests.support.tiny:plain", "cut": 1},
        "protocol": {"name": "vanilla-split", "batch_size": 4, "local_steps": 3},
        "attack": [{"name": "constant-image"}],
    }
    (card,) = run(table, out=tmp_path)
    assert card.smashed["batches"] == 6
    assert 0 < float(str(card.smashed["corrected"])) < float(str(card.smashed["plain"])) <= 1
    (weights,) = run(table, out=tmp_path, overrides=["protocol.name=fedavg"])
    assert weights.smashed == {}
