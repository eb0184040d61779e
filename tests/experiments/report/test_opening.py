"""A report opens with who gives away more, and with ceilings as lines and attacks as marks."""

import re
import xml.etree.ElementTree as ET
from collections.abc import Callable, Sequence
from statistics import fmean
from typing import Any

import pytest

from experiments.report import opening as report_opening
from experiments.report.figures import Curve, Drawing, Mark
from experiments.report.opening import opening, panels
from experiments.report.rows import cells
from experiments.results.cards import Bound, Card, Threat
from leakbed.contracts import Evidence, Seat, ThreatModel

MakeCard = Callable[..., Card]
Drawn = dict[tuple[str, str], tuple[list[Curve], list[Mark]]]


def bounded(make_card: MakeCard, value: float, accuracy: float, **changes: Any) -> Card:
    """A card with a ceiling, of smashed test rows or, by FedAvg, of updates of eight rows."""
    updates = changes.get("protocol") == "fedavg"
    own = {"name": "unsplit", "collect": "last", "when": "training" if updates else "inference"}
    level = changes.pop("sigma", value)
    bound = {
        "ceiling": value,
        "error": 0.01,
        "guesses": 8 if updates else 1,
        "candidates": 400,
        "chance": 0.02 if updates else 0.0025,
        "seat": "server",
        "told": "everything but the row and the noise",
        **changes.pop("bound", {}),
    }
    return make_card(
        **{
            "means": {"identification": 0.2},
            "utility": {"test_accuracy": accuracy},
            "defense": "smashed-noise",
            "ceiling": Bound(**bound),
            "settings": {
                "attack": own | changes.pop("at", {}),
                "defense": {"stack": [["smashed-noise", {"sigma": level}]]},
            },
            "cut": None if updates else 2,
        }
        | changes
    )


@pytest.fixture
def drawn(monkeypatch: pytest.MonkeyPatch) -> Drawn:
    """What :func:`panels` draws, by title."""
    kept: Drawn = {}
    honest = report_opening.panel

    def keep(
        curves: list[Curve], marks: list[Mark], *, title: str, aside: str, **rest: str
    ) -> Drawing:
        kept[title, aside] = curves, marks
        return honest(curves, marks, title=title, aside=aside, **rest)

    monkeypatch.setattr(report_opening, "panel", keep)
    return kept


def seat(who: Seat, *, active: bool = False) -> Threat:
    evidence = frozenset({Evidence.CUT_GRADIENT if who is Seat.CLIENT else Evidence.SMASHED})
    return Threat.of(ThreatModel(seat=who, active=active, evidence=evidence))


def test_each_kind_of_adversary_has_a_panel(make_card: MakeCard, drawn: Drawn) -> None:
    drawings = panels(
        cells(
            [
                bounded(make_card, 0.9, 0.8),
                make_card(attack="fsha", threat=seat(Seat.SERVER, active=True)),
                make_card(
                    attack="similarity-distance",
                    means={"label_accuracy": 0.5},
                    threat=seat(Seat.CLIENT),
                ),
                make_card(attack="fsha", threat=seat(Seat.SERVER, active=True), utility={}),
            ]
        )
    )
    assert list(drawn) == [
        ("To the server", "which follows the protocol; last round"),
        ("To the server", "which rewrites messages; last round"),
        ("To a node", "which follows the protocol; last round"),
    ]
    assert [len(curves) for curves, _ in drawn.values()] == [1, 0, 0]
    (_, labels) = drawn["To a node", "which follows the protocol; last round"]
    assert {mark.attack: mark.leakage for mark in labels} == {
        "similarity-distance": pytest.approx(0.5),
        "best guess without a message": pytest.approx(0.1),
    }
    figures = [each.inline() for each in drawings]
    texts = [set(ET.fromstring(figure).itertext()) for figure in figures]  # noqa: S314  our own
    assert {"private rows named", "test accuracy", "100%", "unsplit"} <= texts[0]
    assert {"private labels read", "similarity-distance"} <= texts[2]
    assert all("currentColor" in figure for figure in figures)


def test_nothing_is_drawn_without_a_utility(make_card: MakeCard) -> None:
    assert panels(cells([make_card(utility={})])) == []


def test_a_line_is_a_case_in_the_order_of_its_noise(make_card: MakeCard, drawn: Drawn) -> None:
    panels(
        cells(
            [
                bounded(make_card, 0.3, 0.85, sigma=2.0, bound={"cap": 0.9}),
                bounded(make_card, 0.9, 0.8, sigma=0.5, bound={"cap": 1.0}),
                bounded(
                    make_card,
                    1.0,
                    0.7,
                    defense="none",
                    settings={"attack": {"when": "inference"}, "defense": {"stack": []}},
                ),
                bounded(make_card, 0.8, 0.6, case="other"),
                make_card(ceiling=Bound(why="no law"), case="no law"),
            ]
        )
    )
    ((curves, marks),) = drawn.values()
    assert [curve.label for curve in curves] == [
        "other (smashed-noise, test rows)",
        "split (smashed-noise, test rows)",
    ]
    assert curves[1].ceilings == [(0.7, 1.0, 0.02), (0.8, 0.9, 0.02), (0.85, 0.3, 0.02)]
    assert curves[1].caps == [(0.8, 1.0), (0.85, 0.9)]
    assert {(mark.utility, mark.style, mark.ceiling) for mark in marks} == {
        (0.6, 0, 0.8),
        (0.7, 1, 1.0),
        (0.8, 1, 0.9),
        (0.85, 1, 0.3),
        (0.95, None, None),
    }


def test_two_defenses_of_one_case_are_two_lines(make_card: MakeCard, drawn: Drawn) -> None:
    panels(
        cells(
            [
                bounded(make_card, 0.9, 0.8),
                bounded(make_card, 0.5, 0.7, defense="nopeek"),
            ]
        )
    )
    ((curves, _),) = drawn.values()
    assert [len(curve.ceilings) for curve in curves] == [1, 1]


def test_many_lines_are_parted_by_round_and_few_are_not(make_card: MakeCard, drawn: Drawn) -> None:
    first = {"collect": "first", "when": "training"}
    both = [
        bounded(make_card, 0.5, 0.5, case=f"case {place}", at=at)
        for place in range(4)
        for at in (first, {})
    ]
    panels(cells(both[:6]))
    assert list(drawn) == [("To the server", "which follows the protocol")]
    ((curves, _),) = drawn.values()
    assert "case 0 (smashed-noise, first round)" in {curve.label for curve in curves}
    drawn.clear()
    panels(cells(both))
    assert [aside for _, aside in drawn] == [
        "which follows the protocol; last round",
        "which follows the protocol; first round",
    ]


def test_lines_and_marks_are_told_apart_without_colour(make_card: MakeCard) -> None:
    made = [
        bounded(make_card, 0.9, 0.8, case="a"),
        bounded(make_card, 0.9, 0.6, case="one whose name is longer than a panel is wide"),
        bounded(make_card, 0.7, 0.7, case="b"),
        bounded(make_card, 0.7, 0.7, case="b", attack="sdar"),
    ]
    (drawing,) = panels(cells(made))
    figure = drawing.inline()
    grey = re.sub(r"#[0-9a-f]{6}", "#777777", figure)
    words = [text.strip() for text in ET.fromstring(grey).itertext() if text.strip()]  # noqa: S314
    assert words.count("A") == 1  # at its line; in the legend it stands before the case
    assert any(word.startswith("A  a (") for word in words)
    assert any(word.startswith("B  b (") for word in words)
    assert max(len(word) for word in words) <= 50  # longer ones would leave the panel
    assert "stroke-dasharray" in grey
    marks = set(re.findall(r'<path id="(m[0-9a-f]+)"', figure))
    assert len(marks) >= 4  # two ticks, and a shape for each attack


@pytest.mark.parametrize(
    "other",
    [
        [["smashed-noise", {"sigma": 0.2}], ["nopeek", {"sigma": 0.3}]],
        [["smashed-noise", {"sigma": 0.1, "form": "published"}], ["nopeek", {"sigma": 0.3}]],
    ],
)
def test_an_attack_hangs_from_the_ceiling_of_its_own_stack(
    make_card: MakeCard, drawn: Drawn, other: list[list[Any]]
) -> None:
    stack = [["smashed-noise", {"sigma": 0.1}], ["nopeek", {"sigma": 0.3}]]
    at = {"name": "unsplit", "collect": "last", "when": "inference"}
    attacked = make_card(
        defense="smashed-noise+nopeek", settings={"attack": at, "defense": {"stack": other}}
    )
    settings = {"attack": at, "defense": {"stack": stack}}
    bound = bounded(
        make_card, 0.9, 0.8, defense="smashed-noise+nopeek", settings=settings, attack="sdar"
    )
    panels(cells([bound, attacked]))
    ((_, marks),) = drawn.values()
    assert {mark.attack: mark.ceiling for mark in marks} == {"sdar": 0.9, "unsplit": None}


def compared(make_card: MakeCard) -> list[Card]:
    return [
        bounded(make_card, 0.999, 0.95, case="best split"),
        bounded(make_card, 0.98, 0.89, case="split"),
        bounded(make_card, 0.3, 0.5, case="poor split"),
        bounded(make_card, 0.6, 0.88, case="updates", protocol="fedavg"),
        bounded(make_card, 0.2, 0.6, case="poor updates", protocol="fedavg"),
    ]


def test_families_are_compared_where_both_learn_the_same(make_card: MakeCard) -> None:
    who, whom, told = opening(compared(make_card))
    assert who == (
        "At the same accuracy (89% split, 88% by weight exchange) split learning gives away more: "
        "the best possible guess names the row behind a message at the cut 98% (96 to 100%) of "
        "the time, and a row behind an update of 8 rows, by a list of as many names, 60% (58 to "
        "62%)."
    )
    assert whom.startswith("Both are told to the server, which only follows the protocol; of the ")
    assert "unsplit names 19% (4 to 46%) of the rows at the cut" in whom
    assert told.startswith("The best possible guess is told everything but the row and the noise")
    assert (
        "among 400 rows, of which chance names 0.2% at the cut and 2.0% behind the update." in told
    )


@pytest.mark.parametrize(
    ("weights", "verdict"),
    [(0.96, "neither family clearly gives"), (0.94, "split learning gives"), (1.0, "neither")],
)
def test_who_gives_away_more_needs_two_standard_errors(
    make_card: MakeCard, weights: float, verdict: str
) -> None:
    made = [
        bounded(make_card, 0.98, 0.89),
        bounded(make_card, weights, 0.88, case="updates", protocol="fedavg"),
    ]
    assert verdict in opening(made)[0]


def one_step(make_card: MakeCard, collect: str | int, *hits: float, attack: str = "dlm") -> Card:
    """An attack on another case of updates, whose model was hardly trained."""
    return make_card(
        protocol="fedavg",
        case="one step on one image",
        attack=attack,
        cut=None,
        scores={"identification": {"mean": fmean(hits), "values": hits}, "targets": len(hits)},
        utility={"test_accuracy": 0.18},
        settings={"attack": {"name": attack, "collect": collect}, "protocol": {"rounds": 5}},
    )


def test_the_worst_case_of_updates_is_named_with_the_worst_of_its_rounds(
    make_card: MakeCard,
) -> None:
    worst, last = one_step(make_card, "first", 1, 1, 1, 0), one_step(make_card, "last", 1, 0)
    _, alone, _ = opening([*compared(make_card), last])
    assert (
        "“one step on one image” in the last round: dlm names 50% (1 to 99%) of the rows there"
        in alone
    )
    _, whom, _ = opening([*compared(make_card), last, worst])
    assert whom.endswith(
        "Of the other updates most is read of “one step on one image” in the first round, the "
        "worst of the 2 attacked: dlm names 75% (19 to 99%) of the rows there; that model ended at "
        "18% accuracy."
    )
    _, whom, _ = opening([*compared(make_card), worst.model_copy(update={"model": "other"})])
    assert "one step on one image" not in whom


@pytest.mark.parametrize("order", [(0, 1, 2, 3, 4), (4, 3, 2, 1, 0), (2, 0, 4, 1, 3)])
def test_rounds_that_are_equally_bad_are_all_named_in_their_order(
    make_card: MakeCard, order: Sequence[int]
) -> None:
    made = [
        one_step(make_card, "last", 1, 0),
        one_step(make_card, 4, 1, 1),
        one_step(make_card, "first", 1, 1),
        one_step(make_card, "middle", 1, 1, 1, attack="sdar"),
        one_step(make_card, "middle", 1, 1, 1, attack="dlm-plus"),
    ]
    _, whom, _ = opening([*compared(make_card), *(made[place] for place in order)])
    assert whom.endswith(
        "in the first round, the middle round and round 4, the worst of the 4 attacked: dlm-plus "
        "names 100% (29 to 100%) of the rows in the middle round; that model ended at 18% accuracy."
    )
    _, whom, _ = opening(
        [*compared(make_card), *(made[place] for place in order if place in (1, 2))]
    )
    assert "in the first round and round 4, all that were attacked: dlm names 100% (16 to" in whom


def test_a_round_that_is_named_by_its_number_too_is_one_round(make_card: MakeCard) -> None:
    twice = [one_step(make_card, 5, 1, 1), one_step(make_card, "last", 1, 1, attack="sdar")]
    _, whom, _ = opening([*compared(make_card), *twice])
    assert "“one step on one image” in the last round: dlm names 100%" in whom


def test_families_that_do_not_learn_the_same_are_not_compared(make_card: MakeCard) -> None:
    made = compared(make_card)
    (said,) = opening([made[0], made[4]])
    assert said.startswith("Weight exchange learns 60% here at most and split learning 95%")
    assert opening(made[:3]) == []
    assert opening([made[0], made[3].model_copy(update={"ceiling": Bound(why="no law")})]) == []


def test_what_the_first_round_gives_away_is_not_compared(make_card: MakeCard) -> None:
    first = {"collect": "first", "when": "training"}
    made = [
        bounded(make_card, 0.98, 0.89, at=first),
        bounded(make_card, 0.1, 0.89, at=first, protocol="fedavg"),
    ]
    assert opening(made) == []


def test_seeds_are_one_point_with_the_spread_between_them(make_card: MakeCard) -> None:
    pair: Sequence[Card] = [
        bounded(make_card, 0.5, 0.5, seed=seed).model_copy(
            update={"ceiling": Bound(ceiling=value, error=0.01)}
        )
        for seed, value in enumerate((0.4, 0.6))
    ]
    (cell,) = cells(pair)
    assert cell.ceiling == (pytest.approx(0.5), pytest.approx(0.1))
    (lost,) = cells([pair[0], pair[1].model_copy(update={"ceiling": Bound(why="no law")})])
    assert lost.ceiling is None
