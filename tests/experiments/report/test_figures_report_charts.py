"""Charts show the cells that have both a score and a utility, in the legend's colours."""

from collections.abc import Callable

import pytest

from experiments.report import figures
from experiments.report.figures import Point, charts, legend
from experiments.report.rows import cells
from experiments.results.cards import Card

MakeCard = Callable[..., Card]


def test_two_metrics_are_drawn_at_most(make_card: MakeCard) -> None:
    means = {"identification": 0.5, "abs_pearson": 0.5, "label_accuracy": 0.5}
    drawn = [each.inline() for each in charts(cells([make_card(means=means)]))]
    assert [">identification<" in each for each in drawn] == [True, False]
    assert ">|Pearson|<" in drawn[1]
    (labels,) = charts(cells([make_card(means={"label_accuracy": 0.5})]))
    assert ">label accuracy<" in labels.inline()


def test_a_rates_bar_covers_the_spread_between_seeds(
    make_card: MakeCard, monkeypatch: pytest.MonkeyPatch
) -> None:
    drawn: list[Point] = []
    monkeypatch.setattr(figures, "scatter", lambda points, **_: drawn.extend(points) or "")
    seeds = [make_card(means={"label_accuracy": share}, seed=i) for i, share in enumerate((0.5, 1))]
    charts(cells(seeds))
    (point,) = drawn
    assert point.leakage == 0.75
    assert point.error == (pytest.approx(0.5), pytest.approx(0.25))  # two errors of 0.25, up to 1


def test_without_utility_nothing_is_drawn(make_card: MakeCard) -> None:
    bare = cells([make_card(utility={})])
    assert charts(bare) == []
    assert legend(bare) == [[], []]


def test_the_legend_names_colours_and_shapes(make_card: MakeCard) -> None:
    found = cells(
        [
            make_card(),
            make_card(attack="smashed-as-image"),
            make_card(defense="smashed-noise"),
        ]
    )
    attacks, defenses = legend(found)
    assert [(entry["name"], entry["glyph"]) for entry in attacks] == [
        ("unsplit", "●"),
        ("smashed-as-image", "○"),
    ]
    assert [(entry["name"], entry["glyph"]) for entry in defenses] == [
        ("no defence", "●"),
        ("smashed-noise", "■"),
    ]
    assert len({entry["color"] for entry in attacks}) == 2
    drawn = charts(found)[0].inline()
    assert all(entry["color"] in drawn for entry in attacks)
    assert "smashed-noise" not in drawn  # the page has one legend for all
    keyed = charts(found, keyed=True)[0].inline()
    for words in ("unsplit", "smashed-as-image (no attack)", "no defence", "smashed-noise"):
        assert f">{words}<" in keyed
