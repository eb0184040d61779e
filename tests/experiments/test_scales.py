"""The papers' settings, which want a GPU for hours, run as they stand for a step or two."""

from pathlib import Path

import pytest

from experiments.cells import cells
from experiments.preparing import make_defenses, prepare
from experiments.runner import run
from experiments.settings_file import load_settings

FOLDER = Path(__file__).parents[2] / "experiments"
PAPERS = sorted(FOLDER.glob("*/paper.toml"))
SMALL = [
    'data.name="mnist-5k"',
    "data.size=60",
    "protocol.batch_size=2",
    "protocol.local_steps=2",
    "protocol.rounds=1",
    "attack.targets=2",
    "attack.checkpoint_every=1",
]


def test_there_are_some() -> None:
    assert {path.parent.name for path in PAPERS} >= {"fsha", "fsha_nopeek", "fsha_public"}


@pytest.mark.parametrize("file", PAPERS, ids=lambda path: path.parent.name)
def test_every_cell_of_a_paper_can_be_prepared(file: Path) -> None:
    settings = load_settings(file, SMALL)
    for cell in cells(settings):
        prepared = prepare(cell.training, root=None)
        assert len(make_defenses(prepared.settings)) == len(cell.training.defense.stack)


@pytest.mark.parametrize("file", PAPERS, ids=lambda path: path.parent.name)
def test_the_last_cell_of_a_paper_runs(file: Path, tmp_path: Path) -> None:
    settings = load_settings(file, SMALL)
    listed = {"case", "attack", "defense"} & settings.model_fields_set
    last = {name: getattr(settings, name)[-1:] for name in listed}
    cards = run(settings.model_copy(update=last), out=tmp_path)
    assert [card.status for card in cards] == ["done"]
