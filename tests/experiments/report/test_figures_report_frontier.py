"""The frontier draws ceilings as lines, attacks as marks, and no line where there is no number."""

import xml.etree.ElementTree as ET
from collections.abc import Callable
from typing import Any

import pytest

from experiments.report import figures as report_figures
from experiments.report.figures import Curve, at_equal_accuracy, frontiers
from experiments.report.rows import cells
from experiments.results.cards import Bound, Card

MakeCard = Callable[..., Card]


def bounded(make_card: MakeCard, value: float, accuracy: float, **changes: Any) -> Card:
    attack = {"name": "unsplit", "collect": "last", "when": "inference", **changes.pop("at", {})}
    return make_card(
        means={"identification": 0.2},
        utility={"test_accuracy": accuracy},
        defense="smashed-noise",
        ceiling=Bound(
            ceiling=value, error=0.01, chance=0.003, seat="server", cap=changes.pop("cap", None)
        ),
        settings={"attack": attack, "sigma": value},
        **changes,
    )


def test_a_case_under_one_defense_is_a_curve_and_rounds_are_figures(
    make_card: MakeCard, monkeypatch: pytest.MonkeyPatch
) -> None:
    drawn: dict[str, list[Curve]] = {}
    honest = report_figures.frontier

    def kept(curves: list[Curve], *, title: str, utility: str) -> str:
        drawn[title] = curves
        return honest(curves, title=title, utility=utility)

    monkeypatch.setattr(report_figures, "frontier", kept)
    first = {"collect": "first", "when": "training"}
    made = [
        bounded(make_card, 0.9, 0.8, cap=0.95, case="cut 2"),
        bounded(make_card, 0.3, 0.5, case="cut 2"),
        bounded(make_card, 0.7, 0.5, case="cut 2", at=first),
        make_card(means={"identification": 0.2}, case="no ceiling"),
        make_card(ceiling=Bound(why="no law"), case="no law"),
    ]
    figures = frontiers(cells(made))
    assert list(drawn) == ["Last round", "First round"]
    (curve,) = drawn["Last round"]
    assert curve.label == "cut 2, smashed-noise (test rows)"
    assert sorted(curve.ceilings) == [(0.5, 0.3, 0.02), (0.8, 0.9, 0.02)]
    assert curve.caps == [(0.8, 0.95)]
    assert (0.5, pytest.approx(0.2, abs=0.02), False) in curve.attacks
    root = ET.fromstring(figures[0])  # noqa: S314  our own text
    assert {"cut 2, smashed-noise (test rows)", "test accuracy"} <= set(root.itertext())
    assert "currentColor" in figures[0]
    assert frontiers(cells([made[3], made[4]])) == []


def test_seeds_are_one_point_with_the_spread_between_them(make_card: MakeCard) -> None:
    pair = [
        bounded(make_card, 0.5, 0.5, seed=seed).model_copy(
            update={"ceiling": Bound(ceiling=value, error=0.01)}
        )
        for seed, value in enumerate((0.4, 0.6))
    ]
    (cell,) = cells(pair)
    assert cell.ceiling == (pytest.approx(0.5), pytest.approx(0.1))
    (lost,) = cells([pair[0], pair[1].model_copy(update={"ceiling": Bound(why="no law")})])
    assert lost.ceiling is None


def test_families_are_compared_at_the_accuracy_that_both_reach(make_card: MakeCard) -> None:
    made = [
        bounded(make_card, 0.999, 0.95, case="best split"),
        bounded(make_card, 0.98, 0.89, case="split"),
        bounded(make_card, 0.3, 0.5, case="poor split"),
        bounded(make_card, 0.6, 0.88, case="updates", protocol="fedavg"),
        bounded(make_card, 0.2, 0.6, case="poor updates", protocol="fedavg"),
    ]
    first, second = at_equal_accuracy(cells(made))
    assert first.startswith("At 89% accuracy")
    assert "98% of the time (split, smashed-noise (test rows)); at 88% accuracy" in first
    assert "60% of the time (updates, " in first
    assert second.startswith("Both are told to the server. Without a message 0.3% and 0.3%")
    assert at_equal_accuracy(cells(made[:3])) == []
    assert at_equal_accuracy(cells([made[0], made[4]])) == []
