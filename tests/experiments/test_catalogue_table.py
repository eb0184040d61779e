"""The README's tables name everything the catalogues hold, and are current."""

from pathlib import Path

import pytest

from attacks import ADVERSARIES, ATTACKS, INTRUDERS
from defenses import DEFENSES
from experiments.catalogue import BEGIN, END, MissingMarkersError, current, tables
from strategies import PROTOCOLS

ROOT = Path(__file__).parents[2]


def test_the_readme_is_current() -> None:
    text = (ROOT / "README.md").read_text()
    assert text == current(text), "run `make readme`"


def test_every_entry_has_one_row() -> None:
    names = [line.split("|")[1].strip() for line in tables().splitlines() if line.startswith("| `")]
    known = [*PROTOCOLS, *ATTACKS, *ADVERSARIES, *INTRUDERS, *DEFENSES]
    assert sorted(names) == sorted(f"`{name}`" for name in known)


def test_baselines_stand_below_published_attacks() -> None:
    _, attacks, _ = tables().split("\n\n")
    linked = ["https://" in line for line in attacks.splitlines()[2:]]
    assert linked == sorted(linked, reverse=True)


def test_every_row_has_as_many_cells_as_its_head() -> None:
    for table in tables().split("\n\n"):
        assert len({line.replace("\\|", "").count("|") for line in table.splitlines()}) == 1


def test_text_outside_the_markers_stays() -> None:
    page = f"above\n{BEGIN}\nstale\n{END}\nbelow\n"
    written = current(page)
    assert written.startswith(f"above\n{BEGIN}\n")
    assert written.endswith(f"\n{END}\nbelow\n")
    assert "stale" not in written
    assert current(written) == written


@pytest.mark.parametrize("page", ["", BEGIN, f"{END}{BEGIN}"])
def test_a_page_without_markers_is_refused(page: str) -> None:
    with pytest.raises(MissingMarkersError, match="catalogue"):
        current(page)
