"""Images one pixel high or wide, as tables are, and strips of one column: attacks are scored."""

import math
from pathlib import Path
from typing import Any

import pytest

from experiments.results.cards import Card
from experiments.run.runner import run

SPLIT: dict[str, Any] = {
    "name": "vanilla-split",
    "batch_size": 4,
    "local_steps": 3,
}
FEDAVG: dict[str, Any] = {"name": "fedavg", "batch_size": 1, "local_steps": 1}


def table(shape: str, protocol: dict[str, Any], *attacks: dict[str, Any]) -> dict[str, Any]:
    return {
        "name": "narrow",
        "data": {"name": f"tests.support.narrow_data:{shape}", "nodes": 2},
        "model": {"name": "tests.support.narrow_data:net"},
        "protocol": protocol,
        "attack": [{"targets": 2, **attack} for attack in attacks],
    }


def checked(cards: list[Card]) -> None:
    """Every attack is done, and no score of it lacks its number."""
    for card in cards:
        assert (card.status, card.why) == ("done", None), card.attack
        assert card.scores["failures"] == 0, card.attack
        assert "ssim" not in card.scores
        if "abs_pearson" in card.scores:
            mean = card.scores["abs_pearson"]["mean"]  # type: ignore[index, call-overload]
            assert math.isfinite(mean), card.attack  # type: ignore[arg-type]


@pytest.mark.parametrize("shape", ["low", "slim"])
def test_split_images_of_one_pixel_a_side(tmp_path: Path, shape: str) -> None:
    settings = table(
        shape,
        SPLIT,
        {"name": "unsplit", "outer_steps": 3, "input_steps": 3, "model_steps": 3},
        {"name": "smashed-as-image"},
        {"name": "mean-image"},
    )
    settings["model"]["cut"] = 2
    checked(run(settings, out=tmp_path))


@pytest.mark.parametrize("shape", ["low", "slim"])
def test_whole_networks_updates_of_images_of_one_pixel_a_side(tmp_path: Path, shape: str) -> None:
    settings = table(
        shape,
        FEDAVG,
        {"name": "dlm", "iterations": 5},
        {"name": "dlm-plus", "iterations": 5},
        {"name": "constant-image"},
    )
    checked(run(settings, out=tmp_path))


def test_strips_of_one_column(tmp_path: Path) -> None:
    settings = table(
        "square",
        {**SPLIT, "name": "vertical-split", "merge": "sum"},
        {"name": "smashed-as-image"},
        {"name": "mean-image"},
    )
    settings["data"]["nodes"] = 4
    settings["model"]["cut"] = 2
    cards = run(settings, out=tmp_path)
    checked(cards)
    assert len(cards) == 2
