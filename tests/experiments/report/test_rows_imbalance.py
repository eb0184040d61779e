"""Imbalanced labels are told from balanced ones, and only they are led with balanced accuracy."""

from collections.abc import Callable
from typing import Any

from experiments.report.findings import conclusions
from experiments.report.rows import BALANCED, LEADING, cells, imbalanced, leading
from experiments.report.tables import tables
from experiments.results.cards import Card

MakeCard = Callable[..., Card]


def skewed(make_card: MakeCard, *, majority: float = 0.9, **changes: Any) -> Card:
    """A card of a table on which one label of two is common."""
    baselines: dict[str, dict[str, float | None]] = {
        "majority-label": {"label_accuracy": majority, "balanced_accuracy": 0.5},
        "chance": {"label_accuracy": 0.5, "balanced_accuracy": 0.5},
    }
    means = {"label_accuracy": 0.875, "balanced_accuracy": 0.7}
    return make_card(means=changes.pop("means", means), baselines=baselines, **changes)


def test_a_label_is_common_beyond_its_share_and_beyond_chance(
    make_card: MakeCard, scores: Callable[..., dict[str, Any]]
) -> None:
    (cell,) = cells([skewed(make_card)])
    assert imbalanced(cell)
    assert leading([cell]).index(BALANCED) == LEADING.index("label_accuracy") + 1
    (fair,) = cells([skewed(make_card, majority=0.63)])
    assert not imbalanced(fair)
    assert leading([fair]) == LEADING
    assert BALANCED in leading([fair, cell])
    for targets, beyond in ((4, False), (400, True)):
        few = scores(targets=targets, label_accuracy=0.5, balanced_accuracy=0.5)
        (cell,) = cells([skewed(make_card, scores=few)])
        assert imbalanced(cell) is beyond


def test_the_commonest_of_a_few_samples_is_not_common(
    make_card: MakeCard, scores: Callable[..., dict[str, Any]]
) -> None:
    chance = {"label_accuracy": 0.1, "balanced_accuracy": 0.1}
    few = scores(targets=16, label_accuracy=0.5, balanced_accuracy=0.5)
    for often, beyond in ((4, False), (12, True)):  # of 16, four of some label are luck
        majority = {"label_accuracy": often / 16, "balanced_accuracy": 0.1}
        found = {"majority-label": majority, "chance": chance}
        (cell,) = cells([make_card(scores=few, baselines=found)])
        assert imbalanced(cell) is beyond


def test_cards_from_before_it_are_read_as_balanced(make_card: MakeCard) -> None:
    (cell,) = cells([make_card(means={"label_accuracy": 0.9})])
    assert not imbalanced(cell)
    (table,) = tables([cell])
    assert table["all_metrics"] == ["label accuracy"]


def test_the_table_has_a_column_where_labels_are_imbalanced(make_card: MakeCard) -> None:
    (table,) = tables(cells([skewed(make_card)]))
    assert table["metrics"] == ["label accuracy", "balanced label accuracy"]
    column = table["rows"][0]["metrics"][1]
    assert column["value"] == "70%"
    assert column["notes"][-1] == "majority-label 50%"
    (fair,) = tables(cells([skewed(make_card, majority=0.5)]))
    assert fair["metrics"] == ["label accuracy"]
    assert fair["all_metrics"] == ["label accuracy", "balanced label accuracy"]


def test_sentences_say_that_an_attack_reads_the_rare_label_though_it_is_seldom_right(
    make_card: MakeCard,
) -> None:
    means = {"label_accuracy": 0.625, "balanced_accuracy": 0.75}
    said = " ".join(conclusions([skewed(make_card, means=means)]))
    assert "balanced label accuracy 75%" in said
    assert "the majority-label baseline (label accuracy 62% against 90%)" in said
    plain = " ".join(conclusions([skewed(make_card, means=means, majority=0.5)]))
    assert "balanced" not in plain


def test_what_a_defense_does_is_said_of_it_too(make_card: MakeCard) -> None:
    after = {"label_accuracy": 0.875, "balanced_accuracy": 0.5}
    found = [skewed(make_card), skewed(make_card, means=after, defense="label-dp")]
    said = " ".join(conclusions(found))
    assert "balanced label accuracy falls from 70% to 50%" in said
