"""Tables: no score without its error and its baseline."""

from collections.abc import Callable
from typing import Any

import pytest

from experiments.report.rows import cells
from experiments.report.tables import setting, stolen, tables
from experiments.results.cards import Card, Exposure
from leakbed.contracts import Evidence

MakeCard = Callable[..., Card]
MISSING = "\N{EN DASH}"


def row(card: Card) -> dict[str, Any]:
    (table,) = tables(cells([card]))
    (found,) = table["rows"]
    assert isinstance(found, dict)
    return found


def test_a_score_stands_beside_error_skill_and_baseline(make_card: MakeCard) -> None:
    found = row(make_card(means={"identification": 0.5, "ssim": 0.8, "ssim_skill": 0.6}))
    assert found["metrics"] == [
        {
            "label": "identification",
            "value": "50%",
            "notes": ["25 to 75%", "mean-public 0%"],
        },
        {"label": "SSIM", "value": "0.80", "notes": ["± 0.005", "skill 0.60", "another-row 0.37"]},
    ]


def test_what_decides_a_number_stands_below_its_setting(make_card: MakeCard) -> None:
    exposure = Exposure(round=2, trained="yes", mode="train", rows=4, steps=2)
    tuned = {"seeds": [100, 101], "rows": "private"}
    told = row(make_card(exposure=exposure, tuned_on=tuned, notes=("3 targets of 8",)))["facts"]
    assert told == (
        "round 2, trained before, train mode, 4 rows and 2 steps behind a message; settings chosen "
        "on the private rows, seeds 100, 101; 3 targets of 8"
    )
    assert row(make_card())["facts"] == "default settings"
    elsewhere = {"seeds": [7], "rows": "elsewhere"}
    assert "images outside these data, seed 7" in row(make_card(tuned_on=elsewhere))["facts"]
    unnamed = {"seeds": [], "rows": "elsewhere"}
    assert (
        row(make_card(tuned_on=unnamed))["facts"] == "settings chosen on images outside these data"
    )
    card = make_card(tuned_on="published")
    clipped = card.model_copy(update={"scores": {**card.scores, "clipped": 0.125}})
    assert row(clipped)["facts"] == "settings as published; 12% of the guesses' pixels clipped"


def test_networks_and_data_have_tables_of_their_own(make_card: MakeCard) -> None:
    found = tables(cells([make_card(), make_card(model="mlp2"), make_card(data="mnist")]))
    assert {table["title"] for table in found} == {
        "mnistnet on mnist-5k",
        "mlp2 on mnist-5k",
        "mnistnet on mnist",
    }


def test_a_metric_that_one_cell_lacks_is_a_dash(make_card: MakeCard) -> None:
    (table,) = tables(
        cells([make_card(means={"ssim": 0.5}), make_card(cut=2, means={"label_accuracy": 1.0})])
    )
    assert table["metrics"] == ["SSIM", "label accuracy"]
    assert [[cell["value"] for cell in each["metrics"]] for each in table["rows"]] == [
        ["0.50", MISSING],
        [MISSING, "100%"],
    ]


def test_costs_come_in_readable_units(make_card: MakeCard) -> None:
    cost = {"attack_seconds": 90.0, "seconds": 12.0, "bytes_up": 2048.0, "bytes_down": 3e9}
    assert row(make_card(cost=cost))["cost"] == {
        "time": "1.5 min",
        "notes": ["after 12.0 s", "2 KiB up", "2.8 GiB down"],
    }
    assert row(make_card(cost={"seconds": 3.0}))["cost"] == {"time": "3.0 s", "notes": []}
    assert row(make_card(cost={}))["cost"] == {"time": MISSING, "notes": []}


@pytest.mark.parametrize(
    ("control", "shown"),
    [({"within": True}, "holds"), ({"within": False}, "fails"), (None, "none")],
)
def test_the_control_is_judged(
    make_card: MakeCard, control: dict[str, Any] | None, shown: str
) -> None:
    assert row(make_card(control=control))["control"]["text"] == shown


@pytest.mark.parametrize(
    ("reported", "shown"),
    [
        (None, MISSING),
        ("see table 2", "see table 2"),
        (0.9, "0.9"),
        ({"ssim": 0.9, "label_accuracy": 1.0}, "SSIM 0.90, label accuracy 100%"),
    ],
)
def test_the_published_figure_stands_beside_ours(
    make_card: MakeCard, reported: Any, shown: str
) -> None:
    assert row(make_card(reported=reported))["reported"] == shown
    (table,) = tables(cells([make_card(reported=reported)]))
    assert table["reported"] is (reported is not None)


def test_doubts_and_failures_stand_below_the_row(make_card: MakeCard) -> None:
    card = make_card(unreliable="diverged; 2 of 16 targets failed")
    card = card.model_copy(update={"scores": {**card.scores, "failures": 2}})
    found = row(card)
    assert found["doubts"] == "diverged; 2 of 16 targets failed and count as failures"
    assert "doubted" in found["kind"]
    assert row(make_card(reads=Evidence.NOTHING))["kind"] == "plain"


def test_a_budget_bound_score_says_so_below_its_row(make_card: MakeCard) -> None:
    found = row(make_card(stopped_on_budget=0.5))
    assert found["doubts"] == (
        "budget-bound: 50% of the targets stopped on the attack's budget of steps"
    )
    assert row(make_card(stopped_on_budget=0.1))["doubts"] == ""


def test_everything_has_a_row_for_each_baseline(make_card: MakeCard) -> None:
    (table,) = tables(cells([make_card(means={"ssim": 0.5, "mse": 0.1})]))
    assert [each["name"] for each in table["everything"]] == [
        "unsplit",
        "mean-public",
        "another-row",
        "nearest-public",
        "chance",
    ]
    assert table["everything"][3]["metrics"] == ["0.77", "0.02"]
    assert table["everything"][4]["metrics"] == [MISSING, MISSING]


def test_stolen_models_stand_beside_untrained_ones(make_card: MakeCard) -> None:
    clone = {
        "accuracy": {"mean": 0.91},
        "agreement": {"mean": 0.92},
        "untrained_accuracy": 0.12,
        "victim_accuracy": 0.95,
    }
    card = make_card()
    card = card.model_copy(update={"scores": {**card.scores, "stolen_model": clone}})
    (found,) = stolen(cells([card, make_card(cut=2)]))
    assert found["metrics"] == ["91%", "12%", "95%", "92%", MISSING]


def test_settings_are_said_once(make_card: MakeCard) -> None:
    (cell,) = cells([make_card(case="split model.cut=1", defense="smashed-noise")])
    assert setting(cell) == "split model.cut=1 (vanilla-split), smashed-noise"
    (plain,) = cells([make_card(protocol="fedavg"), make_card(protocol="fedavg", seed=1)])
    assert setting(plain) == "fedavg, no defence, 2 seeds"


@pytest.mark.parametrize(
    ("done", "told"),
    [(1, "1 seed of 3, the others diverged"), (2, "2 seeds of 3, the others diverged")],
)
def test_means_say_which_seeds_they_lack(done: int, told: str, make_card: MakeCard) -> None:
    kept = [make_card(seed=seed) for seed in range(done)]
    lost = [make_card(seed=seed, status="diverged", why="it did") for seed in range(done, 3)]
    (cell,) = [cell for cell in cells([*kept, *lost]) if cell.measures]
    assert setting(cell).endswith(told)
