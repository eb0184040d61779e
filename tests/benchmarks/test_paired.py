"""Sides take turns, and one that ends is an error that shows what it logged."""

import json
import sys
from contextlib import ExitStack

import pytest

from benchmarks.paired import Side, SideFailedError, line, rounds, show, together

COUNTS = """
import sys
from benchmarks.paired import Turns
turns, count = Turns(), 0
print("noise on standard output")
turns.tell(count=count)
while turns.wait():
    count += 1
    turns.tell(count=count, name=sys.argv[1])
"""
FAILS = "import sys; sys.exit('it broke')"


def command(source: str, name: str = "") -> list[str]:
    return [sys.executable, "-c", source, name]


def test_sides_take_turns_and_warm_ones_do_not_count() -> None:
    with ExitStack() as stack:
        sides = together({name: command(COUNTS, name) for name in "ab"}, stack)
        assert sides["a"].ready() == {"count": 0}
        taken = rounds(sides, warm=1, runs=2)
    assert [{n: a["count"] for n, a in turn.items()} for turn in taken] == [
        {"a": 2, "b": 2},
        {"a": 3, "b": 3},
    ]
    assert [answer["name"] for answer in taken[0].values()] == ["a", "b"]


def test_a_side_that_ends_says_why() -> None:
    with Side(command(FAILS)) as side, pytest.raises(SideFailedError, match="it broke"):
        side.turn()


def test_a_side_is_ended_when_it_is_no_longer_needed() -> None:
    with Side(command(COUNTS)) as side:
        side.ready()
    assert side._process.returncode == 0


def test_a_line_has_medians_and_the_median_of_ratios(capsys: pytest.CaptureFixture[str]) -> None:
    show(line("x: ours / other", [(1.0, 2.0), (9.0, 3.0), (2.23456, 4.0)], unit="s"))
    assert json.loads(capsys.readouterr().out) == {
        "name": "x: ours / other",
        "ours": 2.235,
        "other": 3,
        "ratio": 0.5586,
        "unit": "s",
        "runs": 3,
    }


def test_counts_are_not_rounded() -> None:
    assert line("x", [(1234567, 1234560)], unit="bytes")["ours"] == 1234567
