"""Damaged settings files: each is read, or refused in lines, and never ends in a traceback."""

from pathlib import Path
from random import Random

import pytest

from experiments.run.attack import Cell
from experiments.run.fit import unfit
from experiments.run.prepare import prepare
from experiments.settings.cells import cells
from experiments.settings.load import load_settings
from leakbed.errors import BAD_INPUT, verdict
from tests.support.mutating import mutated, mutated_settings

ROOT = Path(__file__).parents[2]
WHOLE = sorted(ROOT.glob("experiments/studies/*/settings.toml"))
FIRST, ALL, AT_A_TIME = 60, 5000, 600


def prepared(file: Path) -> None:
    """Do what a run does before it trains."""
    wanted = cells(load_settings(file))
    for cell in wanted:
        unfit(Cell.of(cell))
    prepare(wanted[0].training, root=None)


def taken(file: Path) -> bool:
    """Say whether settings were taken; one that was refused must say so in lines of its own."""
    try:
        prepared(file)
    except Exception as error:
        told = verdict(error)
        if told is None or told[0] != BAD_INPUT or not all(line.strip() for line in told[1]):
            raise
        return False
    return True


@pytest.mark.parametrize(
    "numbers",
    [
        range(FIRST),
        *(
            pytest.param(range(start, min(start + AT_A_TIME, ALL)), marks=pytest.mark.reproduces)
            for start in range(FIRST, ALL, AT_A_TIME)
        ),
    ],
    ids=str,
)
def test_damaged_settings_are_taken_or_refused_in_lines(tmp_path: Path, numbers: range) -> None:
    outcomes = []
    for number in numbers:
        draw = Random(number)
        content = WHOLE[number % len(WHOLE)].read_bytes()
        file = tmp_path / "settings.toml"
        if number % 3:
            file.write_text(mutated_settings(content.decode(), draw), encoding="utf-8")
        else:
            file.write_bytes(mutated(content, draw))
        try:
            outcomes.append(taken(file))
        except Exception as error:
            raise AssertionError(f"number {number}:\n{file.read_text(errors='replace')}") from error
    assert 0.02 < sum(outcomes) / len(outcomes) < 0.9
