"""Values of the wrong type are refused; every plug-in's types are among those that are known."""

import pytest

from experiments import settings_values
from experiments.plugins import plugin_fields
from experiments.settings_values import check_value


@pytest.mark.parametrize("package", ["attacks", "defenses"])
def test_the_types_of_every_plug_in_are_checked(package: str) -> None:
    written = {kind for each in plugin_fields(package).values() for kind in each.settings.values()}
    assert written <= set(settings_values._TYPES)


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
    check_value("attack x", "key", value, written=written)


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
        check_value("attack x", "key", value, written=written)
