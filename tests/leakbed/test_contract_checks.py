"""What a run holds the answers of attacks and defences to."""

from pathlib import Path

import pytest
import torch

from leakbed.contract_checks import blamed, guess_breaches, refuse_unsent
from leakbed.contracts import BrokenPluginError, Guess, Seat, UnfitViewError, View

VIEW = View(seat=Seat.SERVER, image_shape=(1, 4, 4), num_classes=2, targets=3)


class Mine:
    name = "mine"


def test_a_guess_has_a_tensor_of_the_right_shape_or_says_what_is_wrong() -> None:
    assert guess_breaches(Guess(images=torch.zeros(3, 1, 1, 4, 4)), VIEW) == []
    (said,) = guess_breaches(Guess(labels=torch.zeros(3, 2, dtype=torch.int64)), VIEW)
    assert said == "a tensor of shape (3, 2) where (3, 1) belongs as labels"
    assert guess_breaches(None, VIEW) == ["None; return a leakbed.contracts.Guess"]


@pytest.mark.parametrize(
    ("sent", "said"),
    [
        ({}, r"returned \[\] where \['w'\] belong"),
        ({"w": torch.zeros(3)}, r"shape \(3,\) where \(2,\)"),
        ({"w": torch.zeros(2).double()}, "float64 for one of torch.float32"),
        ({"w": torch.tensor([0.0, torch.nan])}, "not finite"),
        (None, "returned None where"),
    ],
)
def test_what_a_defense_sends_stands_for_what_it_was_given(sent: object, said: str) -> None:
    given = {"w": torch.ones(2)}
    refuse_unsent(Mine(), {"w": torch.zeros(2)}, given)
    with pytest.raises(BrokenPluginError, match=f"the code of defence mine .Mine. .*{said}"):
        refuse_unsent(Mine(), sent, given)  # type: ignore[arg-type]


def test_what_was_not_finite_before_is_not_the_defenses_fault() -> None:
    refuse_unsent(Mine(), {"w": torch.tensor([torch.nan])}, {"w": torch.tensor([torch.inf])})


def test_only_what_the_code_of_the_plugin_is_at_fault_for_is_blamed_on_it() -> None:
    said = rf"raised KeyError: 'a' .{Path(__file__).name}"
    with pytest.raises(BrokenPluginError, match=said), blamed(Mine(), "attack"):
        raise KeyError("a")
    with pytest.raises(UnfitViewError), blamed(Mine(), "attack"):
        raise UnfitViewError("no images")
    with pytest.raises(MemoryError), blamed(Mine(), "attack"):
        raise MemoryError
