"""Every run counts once; rates have exact intervals; a threshold comes from honest runs alone."""

from collections.abc import Callable
from typing import Any

import pytest

from experiments.report.detection import Rate, Rates, Trial, calibrated, rates, roc, trials
from experiments.results.cards import Card
from tests.support.watched import finding, watched

MakeCard = Callable[..., Card]


def test_a_rate_has_its_exact_interval() -> None:
    low, high = Rate(alarms=20, runs=20).interval
    assert (low, high) == (pytest.approx(0.025 ** (1 / 20)), 1)  # Clopper-Pearson, in closed form
    assert str(Rate(alarms=20, runs=20)) == "20 of 20 (83 to 100 %)"
    assert str(Rate(alarms=0, runs=20)) == "0 of 20 (0 to 17 %)"
    assert str(Rate(alarms=0, runs=0)) == "no run"
    assert Rate(alarms=0, runs=0).interval == (0, 1)


def test_an_honest_run_counts_once_whoever_read_it(make_card: MakeCard) -> None:
    honest = {"0": {"splitout": finding(None, 0.2)}}
    cards = [
        watched(make_card, honest, attack="unsplit"),
        watched(make_card, honest, attack="smashed-as-image"),
        watched(make_card, honest, attack="unsplit", seed=1),
        watched(
            make_card,
            {"0": {"splitout": finding(10, 1.0)}},
            attack="fsha",
            hijacked=True,
            control={"within": True, "detection": {"hijacked": False, "nodes": honest}},
        ),
    ]
    found = trials(cards)
    assert [(trial.seed, trial.hijacker, trial.alarm) for trial in found] == [
        (0, "", None),
        (1, "", None),
        (0, "fsha", 10),
    ]


def test_checkpoints_make_no_other_hijacked_run_but_settings_do(make_card: MakeCard) -> None:
    def hijacked(**adversary: Any) -> Card:
        nodes = {"0": {"splitout": finding(10, 1.0)}}
        return watched(make_card, nodes, attack="fsha", hijacked=True, adversary=adversary)

    same = [hijacked(own={}, checkpoint_every=5), hijacked(own={}, checkpoint_every=7)]
    assert len(trials(same)) == 1
    assert len(trials([*same, hijacked(own={"scale": 2}, checkpoint_every=5)])) == 2


def test_of_several_nodes_the_first_alarm_and_the_worst_score_count(make_card: MakeCard) -> None:
    nodes = {
        "0": {"splitguard": finding(90, 0.4, iteration=190, before={"ssim": 0.9})},
        "1": {"splitguard": finding(95, 0.2, iteration=95, before={"ssim": 0.1})},
        "2": {"splitguard": finding(None, None)},
    }
    (trial,) = trials([watched(make_card, nodes, attack="fsha", hijacked=True)])
    assert (trial.alarm, trial.score, trial.before) == (95, 0.2, {"ssim": 0.1})


def test_cards_without_detectors_are_no_trials(make_card: MakeCard) -> None:
    assert trials([make_card(), make_card(defense="nopeek", status="unfit", why="no")]) == []


def trial(score: float | None, *, hijacked: bool, alarm: int | None = None, **more: Any) -> Trial:
    about = {"detector": "splitguard", "settings": "{}", "where": "here", "seed": 0} | more
    return Trial(hijacker="fsha" * hijacked, score=score, alarm=alarm, **about)


def entry(hijacked: list[float | None], honest: list[float | None], **more: Any) -> Rates:
    return Rates(
        hijacked=tuple(trial(score, hijacked=True, **more) for score in hijacked),
        honest=tuple(trial(score, hijacked=False, **more) for score in honest),
    )


def test_the_area_knows_which_scores_are_suspicious() -> None:
    assert entry([0.1, 0.2], [0.8, 0.9]).area == 1  # splitguard's are low
    assert entry([0.1, 0.2], [0.8, 0.9], detector="splitout").area == 0
    assert entry([0.1, 0.85], [0.8, 0.9]).area == pytest.approx(0.75)
    assert entry([0.1, None], [None]).area is None


def test_the_roc_is_told_in_the_scores_own_scale() -> None:
    assert roc(entry([0.1, 0.85], [0.8, 0.9])) == [
        (0.1, 0.5, 0.0),
        (0.8, 0.5, 0.5),
        (0.85, 1.0, 0.5),
        (0.9, 1.0, 1.0),
    ]
    assert roc(entry([1.0], [0.2], detector="splitout"))[0] == (1.0, 1.0, 0.0)


def test_calibration_reads_honest_runs_alone() -> None:
    assert calibrated(entry([0.1], [0.8, 0.7, 0.9, None])) == 0.7
    assert calibrated(entry([1.0], [0.3, 0.4], detector="splitout")) == 0.4
    assert calibrated(entry([0.1], [None])) is None
    many: list[float | None] = [score / 200 for score in range(200)]
    assert calibrated(entry([], many)) == pytest.approx(1 / 200)


def test_settings_are_apart_unless_pooled(make_card: MakeCard) -> None:
    cards = [
        watched(make_card, {"0": {"splitout": finding(10, 1.0)}}, attack="fsha", hijacked=True),
        watched(make_card, {"0": {"splitout": finding(None, 0.1)}}),
        watched(make_card, {"0": {"splitout": finding(20, 0.6)}}, case="other seed=3", seed=3),
    ]
    apart = {each.first.where: each for each in rates(cards)}
    assert (str(apart["split"].true_alarms)[:6], apart["split"].steps) == ("1 of 1", (10, 10, 10))
    assert str(apart["split"].false_alarms)[:6] == "0 of 1"
    assert apart["other"].hijacked == ()
    assert apart["other"].steps is None
    (everything,) = rates(cards, pooled=True)
    assert str(everything.false_alarms)[:6] == "1 of 2"


def test_what_was_read_before_the_alarm_is_a_median_over_runs_that_know(
    make_card: MakeCard,
) -> None:
    cards = [
        watched(
            make_card,
            {"0": {"splitout": finding(10, 1.0, before=before)}},
            attack="fsha",
            hijacked=True,
            seed=seed,
        )
        for seed, before in enumerate([{"ssim": 0.1}, {"ssim": 0.3}, None, {"mse": 1.0}])
    ]
    (found,) = rates(cards)
    assert found.before("ssim") == pytest.approx(0.2)
    assert found.before("identification") is None
