"""Namesakes are told apart by the settings they differ in, also where one lacks a setting."""

from typing import Any

import pytest

from experiments.report.rows import differing


@pytest.mark.parametrize(
    ("own", "other", "told"),
    [
        ({"attack": {"steps": 9}}, {"attack": {"steps": 90}}, "steps 9"),
        ({"attack": {"by": "noise"}}, {"attack": {"by": "sign"}}, "by noise"),
        ({"attack": {}}, {"attack": {"own": {"reference": "rarer"}}}, "reference unset"),
        ({"attack": {"steps": None}}, {"attack": {"steps": 90}}, "steps unset"),
        ({"attack": {"steps": None}}, {"attack": {}}, ""),
        ({"attack": {"name": "null and void"}}, {"attack": {"name": "x"}}, "name null and void"),
        (
            {"defense": {"stack": [["nopeek", {"alpha": 10.0}]]}},
            {"defense": {"stack": [["nopeek", {"alpha": 100.0}]]}},
            "alpha 10.0",
        ),
        ({"seed": 0, "case": "a"}, {"seed": 1, "case": "b"}, ""),
        ({"a": {"x": 1, "y": 2}}, {"a": {"x": 3, "y": 4}}, "x 1, y 2"),
    ],
)
def test_what_differs_is_told_and_nothing_else(
    own: dict[str, Any], other: dict[str, Any], told: str
) -> None:
    assert differing(own, [own, other]) == told
    assert differing(own, [own]) == ""
