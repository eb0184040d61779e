"""The table of docs/speed.md is made from what was saved, and is current."""

import json
from pathlib import Path
from typing import Any

import pytest

from benchmarks import table as module
from benchmarks.table import (
    BEGIN,
    END,
    SAVED,
    BadLineError,
    MissingMarkersError,
    current,
    read,
    saved,
    table,
)

ROOT = Path(__file__).parents[2]


def printed(name: str, **values: Any) -> dict[str, Any]:
    line = {"name": name, "ours": 1, "other": 2.5, "ratio": 0.4, "unit": "s", "runs": 3}
    return line | values


def test_the_page_is_current() -> None:
    text = (ROOT / "docs/speed.md").read_text()
    assert text == current(text, read(SAVED)), "run `make readme`"


def test_what_is_saved_names_no_host() -> None:
    for line in read(SAVED):
        assert set(line) == {*module.KEYS, "date", "machine"}
        assert line["machine"].split() == [line["machine"].split()[0], "cores"]


def test_a_row_per_line_and_the_day_below() -> None:
    when = {"date": "2026-01-02", "machine": "2 cores"}
    rows = table([printed("a", **when), printed("b|c", ours=12345, **when)]).splitlines()
    assert rows[2:] == [
        "| a | 1 | 2.5 | 0.4 | s | 3 |",
        "| b\\|c | 12,345 | 2.5 | 0.4 | s | 3 |",
        "",
        "Measured 2026-01-02, 2 cores.",
    ]


def test_new_lines_replace_old_ones_of_their_name() -> None:
    old = [printed("a", date="then", machine="1 cores"), printed("b", date="then", machine="x")]
    new = [printed("c"), printed("a", ours=7)]
    kept = saved(old, new, date="now", machine="2 cores")
    assert [(line["name"], line["ours"], line["date"]) for line in kept] == [
        ("a", 7, "now"),
        ("b", 1, "then"),
        ("c", 1, "now"),
    ]


@pytest.mark.parametrize("text", ["no json", '{"name": "x"}'])
def test_a_line_no_benchmark_prints_is_refused(tmp_path: Path, text: str) -> None:
    (tmp_path / "lines").write_text(f"{json.dumps(printed('a'))}\n{text}\n")
    with pytest.raises(BadLineError, match="line 2"):
        read(tmp_path / "lines")


@pytest.mark.parametrize("page", ["", BEGIN, f"{END}{BEGIN}"])
def test_a_page_without_markers_is_refused(page: str) -> None:
    with pytest.raises(MissingMarkersError, match="benchmarks"):
        current(page, [])


def test_show_save_and_write(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    lines, page = tmp_path / "lines", tmp_path / "speed.md"
    lines.write_text(json.dumps(printed("a")) + "\n")
    page.write_text(f"above\n{BEGIN}\nstale\n{END}\nbelow\n")
    monkeypatch.setattr(module, "SAVED", tmp_path / "saved")
    for arguments in (["show", str(lines)], ["save", str(lines)], ["write", str(page)]):
        module.main(arguments)
    assert "| a | 1 |" in capsys.readouterr().out
    assert "| a | 1 |" in page.read_text()
    assert "stale" not in page.read_text()
    with pytest.raises(SystemExit):
        module.main(["sav", str(lines)])
