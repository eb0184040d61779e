"""Planted faults of the noise are found, and sound noise is not called a fault."""

import pytest
import torch
from torch import Tensor

from leakbed.cards import ABOVE
from leakbed.oracle.noise_checks import Finding, above, check_hits, check_noise


def noise(seed: int, messages: int = 12, entries: int = 1000) -> list[Tensor]:
    drawn = torch.randn(messages, entries, generator=torch.Generator().manual_seed(seed))
    return list(drawn)


def alarms(residuals: list[Tensor]) -> set[str]:
    return {each.check for each in check_noise(residuals) if not each.sound}


def test_a_hundred_sound_runs_raise_no_alarm() -> None:
    assert [seed for seed in range(100) if alarms(noise(seed))] == []


def test_noise_that_repeats_is_found_and_placed() -> None:
    residuals = noise(0)
    residuals[9] = residuals[3].clone()
    (found,) = [each for each in check_noise(residuals) if not each.sound]
    assert (found.check, found.where) == ("noise of two messages", (3, 9))
    assert found.z > 20
    assert "NOT what the law says" in str(found)


def test_one_stream_for_all_nodes_is_found_at_other_lengths_too() -> None:
    node, other = noise(0, messages=4), noise(1, messages=4, entries=700)
    assert alarms([*node, *(each.clone() for each in node), *other]) == {"noise of two messages"}


@pytest.mark.parametrize(("factor", "found"), [(1.05, True), (0.95, True), (1.0, False)])
def test_a_wrong_deviation_is_found(factor: float, found: bool) -> None:
    assert ("variance" in alarms([factor * each for each in noise(2)])) is found


def test_a_shift_and_another_shape_are_found() -> None:
    assert "mean" in alarms([each + 0.1 for each in noise(3)])
    uniform = torch.rand(12, 1000, generator=torch.Generator().manual_seed(4)) - 0.5
    assert alarms(list(uniform * 12**0.5)) == {"kurtosis"}


def test_one_message_alone_has_no_pair() -> None:
    assert {each.check for each in check_noise(noise(0, messages=1))} == {
        "mean",
        "variance",
        "kurtosis",
    }


def test_hits_are_held_against_the_ceiling_on_both_sides() -> None:
    assert check_hits([1.0] * 45 + [0.0] * 5, [0.9] * 50).sound
    assert not check_hits([1.0] * 50, [0.3] * 50).sound
    assert not check_hits([0.0] * 50, [0.9] * 50).sound
    assert check_hits([1.0] * 5, [1.0] * 5).z == 0


def test_a_card_is_above_its_ceiling_only_beyond_chance() -> None:
    assert above(8, 64, ceiling=0.1, error=0.0) > ABOVE
    assert above(20, 64, ceiling=0.1, error=0.0) < ABOVE
    assert above(20, 64, ceiling=0.1, error=0.06) > ABOVE
    assert above(0, 64, ceiling=0.0, error=0.0) == 1.0
    assert Finding(check="mean", z=-9.0, limit=5.0).sound is False
