"""Settings of one's own network and data set: [model.settings] and [data.settings]."""

import sys
from pathlib import Path
from typing import Any

import pytest

from experiments.run.offline import attack_trace
from experiments.run.runner import run
from experiments.settings.load import load_settings
from experiments.settings.schema import SettingsError
from leakbed.data import BadDataError
from leakbed.models import Architecture, ModelMismatchError
from leakbed.tap.trace import Trace

MODULE = """
import torch
from torch import nn


def network(image_shape, num_classes, width=4, widths=(3,)):
    sizes = [image_shape[1] * image_shape[2], width, *widths, num_classes]
    layers = [nn.Linear(*pair) for pair in zip(sizes, sizes[1:])]
    return nn.Sequential(nn.Flatten(), *layers)


def pictures(rows=60, side=6):
    drawn = torch.Generator().manual_seed(0)
    return torch.rand(rows, 1, side, side, generator=drawn), torch.arange(rows) % 3
"""
TABLE: dict[str, Any] = {
    "name": "own",
    "data": {"name": "own_of_a_settings_test:pictures", "nodes": 2, "settings": {"side": 8}},
    "model": {
        "name": "own_of_a_settings_test:network",
        "cut": 1,
        "settings": {"width": 5, "widths": [7, 6]},
    },
    "protocol": {"name": "vanilla-split", "batch_size": 8, "local_steps": 1},
    "attack": [{"name": "smashed-as-image", "targets": 2}],
}


@pytest.fixture(autouse=True)
def module(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "own_of_a_settings_test.py").write_text(MODULE)
    monkeypatch.syspath_prepend(str(tmp_path))
    monkeypatch.delitem(sys.modules, "own_of_a_settings_test", raising=False)


def test_settings_reach_the_network_and_the_data(tmp_path: Path) -> None:
    (card,) = run(TABLE, out=tmp_path / "out")
    assert card.status == "done", card.why
    assert card.settings["model"]["settings"] == {"width": 5, "widths": [7, 6]}  # type: ignore[index,call-overload]
    (folder,) = (tmp_path / "out" / "runs").iterdir()
    about = Trace(folder / "trace").about["architecture"]
    assert about["image_shape"] == [1, 8, 8]
    assert about["settings"] == [["width", 5], ["widths", [7, 6]]]
    again = attack_trace(
        folder / "trace",
        "smashed-as-image",
        answers=folder / "answers",
        out=tmp_path / "again",
        settings={"targets": 2},
        model=TABLE["model"]["name"],
    )
    assert again.scores == card.scores
    (other,) = run(TABLE, out=tmp_path / "out", overrides=["model.settings={width=6}"])
    assert other.key != card.key
    assert load_settings(load_settings(TABLE)) == load_settings(TABLE)


@pytest.mark.parametrize(
    ("override", "message"),
    [
        ("model.settings={widht=6}", "did you mean 'width'"),
        ("model.settings={num_classes=6}", "'num_classes' is set by the run itself"),
        ("data.settings={sides=6}", "unexpected keyword argument 'sides'"),
        ("data.settings={root='/'}", "'root' is set by the run itself"),
    ],
)
def test_what_they_do_not_take_is_refused(tmp_path: Path, override: str, message: str) -> None:
    with pytest.raises((ModelMismatchError, BadDataError), match=message):
        run(TABLE, out=tmp_path / "out", overrides=[override])


def test_a_table_within_and_settings_of_a_catalogues_own_are_refused(tmp_path: Path) -> None:
    with pytest.raises(SettingsError, match=r"width = \{'a': 1\} is a table"):
        load_settings(TABLE, ["model.settings={width={a=1}}"])
    with pytest.raises(ModelMismatchError, match="'mlp2' takes no settings of its own"):
        Architecture(name="mlp2", image_shape=(1, 8, 8), num_classes=3, settings=(("width", 4),))
    with pytest.raises(BadDataError, match="'mnist-5k' takes no settings of its own"):
        run(TABLE, out=tmp_path, overrides=['data.name="mnist-5k"'])
