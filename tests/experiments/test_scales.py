"""The papers' settings, which want a GPU for hours, run as they stand for a step or two."""

from pathlib import Path
from typing import Any

import pytest

from experiments.run.prepare import prepare
from experiments.run.runner import run
from experiments.settings.cells import cells
from experiments.settings.load import load_settings
from experiments.settings.schema import Settings

FOLDER = Path(__file__).parents[2] / "experiments" / "studies"
PAPERS = sorted(FOLDER.glob("*/paper.toml"))
SMALL = [
    'data.name="mnist-5k"',
    "data.size=200",
    "protocol.batch_size=2",
    "protocol.local_steps=2",
    "protocol.rounds=1",
    "attack.targets=2",
]
HASTY: dict[str, dict[str, Any]] = {  # a verdict within four steps of three rows
    "splitguard": {"warm_up": 0, "fakes": 1},
    "splitout": {"window": 2},
    "gradients-scrutinizer": {"every": 4},
}


def small(file: Path) -> Settings:
    """The settings of a file on next to no data."""
    text, changes = file.read_text(), list(SMALL)
    if "checkpoint_every" in text:
        changes.append("attack.checkpoint_every=1")
    if any(name in text for name in HASTY):
        changes += ["protocol.batch_size=3", "protocol.local_steps=4"]
    settings = load_settings(file, changes)
    defenses = tuple(
        each.model_copy(
            update={"stack": tuple((n, {**own, **HASTY.get(n, {})}) for n, own in each.stack)}
        )
        for each in settings.defense
    )
    return settings.model_copy(update={"defense": defenses} if defenses else {})


def test_there_are_some() -> None:
    named = {path.parent.name for path in PAPERS}
    assert named >= {"fsha", "fsha_nopeek", "fsha_public", "detectors", "client_gan"}


@pytest.mark.parametrize("file", PAPERS, ids=lambda path: path.parent.name)
def test_every_cell_of_a_paper_can_be_prepared(file: Path) -> None:
    settings = small(file)
    # Seeds change which rows and weights are drawn, and the rows here are not the paper's anyway.
    sweep = {key: values[:1] if key == "seed" else values for key, values in settings.sweep.items()}
    for cell in cells(settings.model_copy(update={"sweep": sweep})):
        prepared = prepare(cell.training, root=None)
        assert len(prepared.defenses) == len(cell.training.defense.stack)


@pytest.mark.parametrize("file", PAPERS, ids=lambda path: path.parent.name)
def test_the_last_cell_of_a_paper_runs(
    file: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("leakbed.oracle.model_scores._STEPS", 20)
    settings = small(file)
    listed = {"case", "attack", "defense"} & settings.model_fields_set
    last: dict[str, Any] = {name: getattr(settings, name)[-1:] for name in listed}
    sweep = {key: values[-1:] for key, values in settings.sweep.items()}
    cards = run(settings.model_copy(update=last | {"sweep": sweep}), out=tmp_path)
    assert [card.status for card in cards] == ["done"]
