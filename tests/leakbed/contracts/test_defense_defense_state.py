from dataclasses import replace
from math import isnan

import pytest
import torch

from leakbed.contracts.defense import NO_ALARM, DefenseState


def test_a_state_begins_without_alarm_or_score() -> None:
    state = DefenseState(stream=5)
    assert (state.alarm, state.probing, state.messages) == (NO_ALARM, False, 0)
    assert isnan(state.score)
    assert isnan(state.last)


@pytest.mark.parametrize(("worse", "kept"), [(min, [0.7, 0.2, 0.2]), (max, [0.7, 0.7, 0.9])])
def test_the_first_alarm_and_the_worst_score_stay(worse: object, kept: list[float]) -> None:
    state = DefenseState(stream=1, messages=4)
    found = []
    for score, suspicious in [(0.7, False), (0.2, True), (0.9, True)]:
        state = state.judged(score, suspicious=suspicious, worse=worse).next()  # type: ignore[arg-type]
        found.append(state.score)
    assert found == kept
    assert state.last == 0.9
    assert state.alarm == 6  # the second verdict, after five gradients and its own


def test_each_message_has_a_generator_of_its_own_and_the_same_again() -> None:
    state = replace(DefenseState(stream=3), messages=2)
    draws = [torch.rand(2, generator=s.generator()) for s in (state, state, state.next())]
    assert torch.equal(draws[0], draws[1])
    assert not torch.equal(draws[0], draws[2])
