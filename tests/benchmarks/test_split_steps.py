"""Every side trains what it says and answers with a rate (on next to no steps)."""

import json
from typing import Any

import pytest

from benchmarks import split_steps
from benchmarks.split_steps import SIDES, Size

TINY = Size(steps=2, batch=8)


class Twice:
    """A side's end of the conversation: two turns, then the end."""

    def __init__(self) -> None:
        self.told: list[dict[str, Any]] = []
        self._left = 2

    def tell(self, **answer: Any) -> None:
        self.told.append(answer)

    def wait(self) -> bool:
        self._left -= 1
        return self._left >= 0


@pytest.mark.parametrize(
    ("side", "size"),
    [
        ("plain", TINY),
        ("local", TINY),
        ("local", Size(network="mnistnet", protocol="splitfed-v1", nodes=2, steps=1, batch=4)),
    ],
)
def test_a_side_is_ready_and_answers_every_turn_with_its_rate(side: str, size: Size) -> None:
    turns = Twice()
    SIDES[side](size, turns)  # type: ignore[arg-type]
    ready, *answers = turns.told
    assert ready == {}
    assert len(answers) == 2
    assert all(answer["rate"] > 0 for answer in answers)


@pytest.mark.runtime
def test_a_comparison_is_one_line_of_paired_turns() -> None:
    result = split_steps.compared("a / b", ("local", TINY), ("plain", TINY), warm=0, runs=1)
    assert {"name", "ours", "other", "ratio", "unit", "runs"} == set(result)
    assert result["ratio"] == pytest.approx(result["ours"] / result["other"], rel=1e-3)  # type: ignore[operator]
    assert json.dumps(result)
