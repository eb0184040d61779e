"""Heat maps: which cells share one, what a field says, and how settings name rows and columns."""

from collections.abc import Callable
from typing import Any

from experiments.report.rows import cells
from experiments.report.tables import matrices
from experiments.results.cards import Card, Threat
from leakbed.contracts import Evidence, Seat

MakeCard = Callable[..., Card]


def stack(*given: tuple[str, dict[str, Any]]) -> dict[str, Any]:
    return {"defense": {"stack": [list(each) for each in given]}}


def test_a_field_is_as_dark_as_the_attack_has_skill(make_card: MakeCard) -> None:
    found = cells(
        [
            make_card(means={"label_accuracy": 1.0}, utility={"test_accuracy": 0.9}),
            make_card(
                means={"label_accuracy": 0.5}, attack="exploit", utility={"test_accuracy": 0.9}
            ),
            make_card(means={"label_accuracy": 0.0}, defense="label-dp"),
            make_card(means={"label_accuracy": 0.1}, attack="exploit", defense="label-dp"),
        ]
    )
    (matrix,) = matrices(found)
    assert matrix["defenses"] == ["no defence", "label-dp"]
    fields = {row["attack"]: [f["tint"] for f in row["fields"]] for row in matrix["rows"]}
    assert fields["unsplit"] == [80, 0]
    open_, defended = fields["exploit"]
    assert open_ == round(80 * (0.5 - 0.1) / 0.9)
    assert defended == round(80 * (2 / 16 - 0.1) / 0.9)
    assert [row["attack"] for row in matrix["rows"]] == ["exploit", "unsplit"]
    assert [field["value"] for field in matrix["rows"][0]["fields"]] == ["50%", "12%"]
    assert matrix["rows"][0]["metric"] == "label accuracy"
    assert matrix["rows"][0]["fields"][0]["base"] == "(10%)"
    assert matrix["utility"][0] == "90%"


def test_one_attack_or_one_defense_is_no_map(make_card: MakeCard) -> None:
    assert matrices(cells([make_card(), make_card(attack="exploit")])) == []
    assert matrices(cells([make_card(), make_card(defense="label-dp")])) == []
    elsewhere = make_card(attack="exploit", defense="label-dp", model="two-blocks")
    assert matrices(cells([make_card(), elsewhere])) == []


def test_what_was_not_run_is_a_blank_field(make_card: MakeCard) -> None:
    found = cells([make_card(), make_card(attack="exploit", defense="label-dp")])
    (matrix,) = matrices(found)
    blanks = [[f["value"] for f in row["fields"]].count("\N{EN DASH}") for row in matrix["rows"]]
    assert blanks == [1, 1]


def test_namesakes_are_told_apart_by_the_settings_they_differ_in(make_card: MakeCard) -> None:
    weak, strong = (
        stack(("label-dp", {"epsilon": epsilon, "mechanism": "randomised-response"}))
        for epsilon in (1.0, 8.0)
    )
    attacks = [{"attack": {"name": "unsplit", "own": {"rate": rate}}} for rate in (0.1, 0.2)]
    found = cells(
        [
            make_card(defense="label-dp", settings=defense | attack)
            for defense in (weak, strong)
            for attack in attacks
        ]
    )
    (matrix,) = matrices(found)
    assert matrix["defenses"] == ["label-dp, epsilon 1.0", "label-dp, epsilon 8.0"]
    assert [row["attack"] for row in matrix["rows"]] == ["unsplit, rate 0.1", "unsplit, rate 0.2"]


def test_a_score_is_shown_by_its_order(make_card: MakeCard) -> None:
    means = {"label_accuracy": 0.5, "leak_auc": 0.75}
    found = [
        make_card(means=means, attack=attack, defense=defense)
        for attack in ("norm-score", "cosine-score")
        for defense in ("none", "marvell")
    ]
    (matrix,) = matrices(cells(found))
    assert {row["metric"] for row in matrix["rows"]} == {"leak AUC"}


def test_what_a_hijacker_left_of_the_task_is_not_the_defenses_price(make_card: MakeCard) -> None:
    hijacker = Threat(
        seat=Seat.SERVER, active=True, evidence=(Evidence.SMASHED,), needs=(), in_words="x"
    )
    found = [
        card
        for defense in ("none", "nopeek")
        for card in (
            make_card(
                attack="fsha", defense=defense, threat=hijacker, utility={"test_accuracy": 0.1}
            ),
            make_card(defense=defense, utility={"test_accuracy": 0.9}),
        )
    ]
    (matrix,) = matrices(cells(found))
    assert matrix["utility"] == ["90%", "90%"]


def test_a_run_that_diverged_shows_and_is_in_no_mean(make_card: MakeCard) -> None:
    lost = {"status": "diverged", "why": "node 0", "means": {"ssim": 1.0}}
    found = cells(
        [
            *[make_card(attack=name) for name in ("unsplit", "exploit")],
            *[make_card(attack=name, defense="nopeek", **lost) for name in ("unsplit", "exploit")],
            make_card(attack="unsplit", defense="iso-noise", means={"identification": 0.5}),
            make_card(attack="unsplit", defense="iso-noise", seed=1, **lost),
            make_card(attack="unsplit", defense="iso-noise", seed=2, **lost | {"why": "later"}),
            make_card(attack="exploit", defense="iso-noise"),
        ]
    )
    (matrix,) = matrices([cell for cell in found if cell.first.status != "unfit"])
    assert matrix["defenses"] == ["no defence", "iso-noise", "nopeek"]
    exploit, unsplit = matrix["rows"]
    assert [field["value"] for field in exploit["fields"]][2] == "diverged"
    assert [field["value"] for field in unsplit["fields"]][1:] == ["50%", "diverged"]
    assert unsplit["fields"][1]["base"] == "(0%) 2 of 3 diverged"
    assert [field["tint"] for field in unsplit["fields"]][2] == 0

    whole = [make_card(attack="fsha", defense=name, **lost) for name in ("none", "nopeek")]
    (matrix,) = matrices(cells([make_card(), make_card(defense="nopeek"), *whole]))
    assert [field["value"] for field in matrix["rows"][0]["fields"]] == ["diverged", "diverged"]


def test_several_seeds_show_their_range(make_card: MakeCard) -> None:
    shares = (0.5, 0.75, 1.0)
    found = [
        make_card(means={"label_accuracy": share}, attack=attack, defense=defense, seed=seed)
        for attack in ("unsplit", "exploit")
        for defense in ("none", "label-dp")
        for seed, share in enumerate(shares if attack == "unsplit" else shares[:1])
    ]
    (matrix,) = matrices(cells(found))
    exploit, unsplit = matrix["rows"]
    assert {field["range"] for field in unsplit["fields"]} == {"50\N{EN DASH}100%"}
    assert {field["value"] for field in unsplit["fields"]} == {"75%"}
    assert {field["range"] for field in exploit["fields"]} == {""}
    shown = [make_card(means={"ssim": 0.5 + seed / 10}, seed=seed) for seed in range(2)]
    others = [make_card(means={"ssim": 0.5}, attack="exploit", defense="label-dp")]
    (matrix,) = matrices(cells([*shown, *others]))
    (field,) = (each for row in matrix["rows"] for each in row["fields"] if each["range"])
    assert field["range"] == "0.50\N{EN DASH}0.60"
    alike = [make_card(means={"ssim": 0.5}, seed=seed, defense="nopeek") for seed in range(2)]
    (matrix,) = matrices(cells([*shown, *alike, *others]))
    assert {field["range"] for row in matrix["rows"] for field in row["fields"]} == {
        "0.50\N{EN DASH}0.60",
        "",
    }


def test_imbalanced_labels_are_shown_balanced_unless_there_is_a_leak_auc(
    make_card: MakeCard,
) -> None:
    def shown(majority: float, **more: float) -> Any:
        baselines = {
            "majority-label": {"label_accuracy": majority, "balanced_accuracy": 0.5},
            "chance": {"label_accuracy": 0.5, "balanced_accuracy": 0.5, "leak_auc": 0.5},
        }
        means = {"label_accuracy": 0.875, "balanced_accuracy": 0.75, **more}
        (matrix,) = matrices(
            cells(
                [
                    make_card(means=means, baselines=baselines, attack=attack, defense=defense)
                    for attack in ("exploit", "unsplit")
                    for defense in ("none", "label-dp")
                ]
            )
        )
        return matrix

    skewed, fair, ranked = shown(0.9), shown(0.5), shown(0.9, leak_auc=0.8)
    assert {row["metric"] for row in skewed["rows"]} == {"balanced label accuracy"}
    assert "much commoner" in skewed["note"]
    field = skewed["rows"][0]["fields"][0]
    assert (field["value"], field["base"], field["tint"]) == ("75%", "(50%)", 40)
    assert {row["metric"] for row in fair["rows"]} == {"label accuracy"}
    assert {row["metric"] for row in ranked["rows"]} == {"leak AUC"}
    assert fair["note"] == ranked["note"] == ""
