"""Both sides hijack what they are told and answer with a rate (on next to no steps)."""

from dataclasses import replace

import pytest

from benchmarks.hijacked_steps import SIDES, SIZE
from tests.benchmarks.test_split_steps import Twice


@pytest.mark.parametrize("side", SIDES)
def test_a_side_is_ready_and_answers_every_turn_with_its_rate(side: str) -> None:
    turns = Twice()
    SIDES[side](replace(SIZE, steps=2, batch=4), turns)  # type: ignore[arg-type]
    ready, *answers = turns.told
    assert ready == {}
    assert [answer["rate"] > 0 for answer in answers] == [True, True]
