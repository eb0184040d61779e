"""Values of the wrong type are refused; every plug-in's types are among those that are known."""

from collections.abc import Callable
from dataclasses import dataclass
from enum import StrEnum
from typing import Any, Literal

import pytest
import torch
from torch import Tensor

from experiments.settings import values
from experiments.settings.catalogues import plugin_fields
from experiments.settings.load import load_settings
from experiments.settings.values import checked_value, is_scalar


@pytest.mark.parametrize("package", ["attacks", "defenses"])
def test_the_types_of_every_plug_in_are_checked(package: str) -> None:
    written = {kind for each in plugin_fields(package).values() for kind in each.settings.values()}
    assert written <= set(values._TYPES)


@pytest.mark.parametrize(
    ("written", "value"),
    [
        ("int", 3),
        ("float", 3),
        ("int | None", None),
        ("bool", False),
        ("tuple[float, ...]", [60, 80.5]),
        ("tuple[float, ...]", (60,)),
        ("Callable[[int], int]", "left to the class"),
    ],
)
def test_takes_what_fits(written: str, value: object) -> None:
    assert checked_value("attack x", "key", value, written=written) == value


@pytest.mark.parametrize(
    ("written", "value"),
    [
        ("int", 1.5),
        ("int", True),
        ("int", "3"),
        ("float", float("nan")),
        ("float | None", float("inf")),
        ("bool", 1),
        ("str", 1),
        ("tuple[float, ...]", ["a"]),
    ],
)
def test_says_whose_setting_it_is_and_what_was_seen(written: str, value: object) -> None:
    with pytest.raises(ValueError, match=r"attack x: key: Input should .* \(got "):
        checked_value("attack x", "key", value, written=written)


class Side(StrEnum):
    LEFT = "left"


@dataclass
class Held:
    of: Tensor


@pytest.mark.parametrize(
    ("kind", "value"),
    [
        (Literal["mean", "sum"], "sum"),
        (tuple[int, str], [3, "rows"]),
        (dict[str, float], {"a": 1}),
        (list[int] | None, None),
        (Side, "left"),
        (Any, object),
        (Tensor, torch.zeros(2)),
        (Held, {"of": 3}),
    ],
)
def test_takes_what_fits_a_type_that_was_imported(kind: object, value: object) -> None:
    assert checked_value("attack x", "key", value, written=kind) is value


@pytest.mark.parametrize(
    ("kind", "value", "said"),
    [
        (Literal["mean", "sum"], "median", "'mean' or 'sum' .got 'median'"),
        (tuple[int, str], [3, 4], "valid string"),
        (tuple[int, str], [3], "required"),
        (dict[str, float], {"a": float("nan")}, "finite number"),
        (list[int], [1.5], "valid integer"),
        (Side, "right", "'left'"),
        (Callable[[int], int], 3, "callable"),
        (Tensor, 3, "no settings file can hold a Tensor; give the class a default"),
    ],
)
def test_refuses_what_does_not_fit_it(kind: object, value: object, said: str) -> None:
    with pytest.raises(ValueError, match=f"attack x: key: .*{said}"):
        checked_value("attack x", "key", value, written=kind)


def test_a_list_is_several_values_of_one_that_is_a_scalar() -> None:
    scalars: list[object] = ["float | None", Literal["mean", "sum"], int | None]
    assert all(map(is_scalar, scalars))
    others: list[object] = ["tuple[float, ...]", tuple[int, str], list[int] | None, Any, Side]
    assert not any(map(is_scalar, others))


def test_a_whole_number_is_the_same_setting_as_its_float() -> None:
    for written in ("float", "float | None"):
        assert type(checked_value("attack x", "key", 3, written=written)) is float
    assert type(checked_value("attack x", "key", 3, written="int")) is int
    with pytest.raises(ValueError, match="attack x: key"):
        checked_value("attack x", "key", 10**400, written="float")
    whole, point = (
        load_settings(
            {
                "name": "same",
                "attack": [{"name": "fsha", "critic_beta": 1}],
                "defense": [{"name": "smashed-noise", "sigma": 2}],
            },
            list(more),
        )
        for more in ((), ("attack=[{name='fsha', critic_beta=1.0}]",))
    )
    assert repr(whole.attack) == repr(point.attack)
    assert repr(whole.defense[0].stack) == "(('smashed-noise', {'sigma': 2.0}),)"
