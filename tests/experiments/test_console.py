"""The console shows time that remains on a terminal, lines in a log, and the leading scores."""

import io
import re
from typing import Any

import pytest
from rich.console import Console

from experiments.console import _RATES as RATES
from experiments.console import COLUMNS, Bars, listing, summary
from experiments.results.cards import Card
from tests.support.waiting import until


def console(*, terminal: bool = False, width: int = 200) -> Console:
    return Console(file=io.StringIO(), force_terminal=terminal, width=width, highlight=False)


def written(on: Console) -> str:
    assert isinstance(on.file, io.StringIO)
    return on.file.getvalue()


def card(**changes: Any) -> Card:
    fields: dict[str, Any] = {
        "key": "0" * 16,
        "case": "split",
        "protocol": "vanilla-split",
        "data": "mnist-5k",
        "model": "mnistnet",
        "cut": 1,
        "nodes": 4,
        "attack": "unsplit",
        "seed": 0,
        "scores": {"identification": {"mean": 0.5}, "ssim": {"mean": 0.62}, "failures": 0},
        "baselines": {
            "nearest-public": {"ssim": 0.77},
            "another-row": {"ssim": 0.37, "identification": 0.0},
            "mean-public": {"ssim": 0.3},
        },
        "control": {"within": True},
        "utility": {"test_accuracy": 0.95},
        "version": "0.1.0",
        "source": "f" * 16,
    }
    return Card(**(fields | changes))


def printed(*cards: Card) -> list[str]:
    on = console()
    for part in summary(cards):
        on.print(part)
    return [" ".join(line.split()) for line in written(on).splitlines()]


def test_a_log_has_a_line_now_and_then_also_while_a_cell_takes_long() -> None:
    on = console(width=40)
    with Bars(on, every=0.01) as bars:
        bars.start(2, left_out=3)
        bars.note("training [fedavg] " + 9 * "at length ")
        until(lambda: written(on).count("[0/2]") > 2)
        bars.advance("split: dlm")
        until(lambda: "[1/2]" in written(on))
        bars.advance("split: unsplit")
    first, *_, last = lines = written(on).splitlines()
    assert first == (
        "2 cells; 3 more pairs of a case and an attack or a defence cannot fit, left out"
    )
    assert re.fullmatch(r"\[0/2\] 0:00:0\d gone, unknown left: training \[fedavg\].*", lines[2])
    assert last.startswith("[2/2] 0:00:0")
    assert last.endswith(" gone: split: unsplit")


def test_a_log_says_the_time_that_is_left() -> None:
    on = console()
    with Bars(on) as bars:
        bars.start(4)
        bars.advance("split: dlm")
        until(lambda: bars._bars.tasks[0].elapsed > 0.05)  # type: ignore[operator]
        bars.advance("split: unsplit")
    (line,) = (line for line in written(on).splitlines() if line.startswith("[2/4]"))
    assert re.fullmatch(r"\[2/4\] 0:00:0\d gone, 0:00:0\d left: split: unsplit", line)


def test_a_log_of_a_short_run_has_its_first_and_last_line_alone() -> None:
    on = console()
    with Bars(on) as bars:
        bars.start(1)
        bars.note("training")
        bars.advance("split: dlm")
    first, last = written(on).splitlines()
    assert (first, last[:5]) == ("1 cell", "[1/1]")


def test_a_terminal_has_a_bar_with_the_time_that_remains() -> None:
    on = console(terminal=True)
    with Bars(on, every=0.001) as bars:
        bars.start(2, left_out=1)
        bars.note("attacking [x]")
        bars.advance("done [y]")
    text = written(on)
    assert "remaining" in text
    assert "1/2" in text
    assert "done [y]" in text
    assert "[1/2]" not in text
    assert "2 cells; 1 more pair of a case" in text


def test_scores_stand_beside_the_best_evidence_free_baseline() -> None:
    assert printed(card(), card(attack="mean-image"), card(defense="noise")) == [
        "split, vanilla-split, cut 1, no defence",
        "attack identified SSIM control utility",
        "unsplit 50% (0%) 0.62 (0.37) holds 95%",
        "mean-image 50% (0%) 0.62 (0.37) holds 95%",
        "split, vanilla-split, cut 1, noise",
        "attack identified SSIM control utility",
        "unsplit 50% (0%) 0.62 (0.37) holds 95%",
        "In brackets the best guess that needed no message.",
    ]


def test_what_is_wrong_with_a_card_shows() -> None:
    rows = printed(
        card(control={"within": False}),
        card(unreliable="diverged"),
        card(control=None, scores={"ssim": {"mean": None}}, utility={}),
        *[card(status="unfit", why="no", scores={}, baselines={}, control=None)] * 2,
        card(status="diverged", why="node 0", scores={}, baselines={}, control=None),
    )
    dash = "\N{EN DASH}"
    assert rows[2:] == [
        "unsplit 50% (0%) 0.62 (0.37) fails 95%",
        "unsplit 50% (0%) 0.62 (0.37) doubted 95%",
        f"unsplit {dash} {dash} {dash} {dash}",
        "In brackets the best guess that needed no message.",
        "Diverged, 1 of 6 cells: node 0",
        "Unfit, 2 of 6 cells: no",
    ]


def test_a_budget_bound_card_says_so() -> None:
    assert printed(card(stopped_on_budget=0.5), card(attack="other", stopped_on_budget=0.1))[
        2:
    ] == [
        "unsplit 50% (0%) 0.62 (0.37) holds 95%",
        "budget-bound",
        "other 50% (0%) 0.62 (0.37) holds 95%",
        "In brackets the best guess that needed no message.",
        "Budget-bound: a larger budget of the attack may change the scores.",
    ]


def test_namesakes_say_the_settings_they_differ_in() -> None:
    def with_steps(steps: int, **shared: object) -> Card:
        own = {"steps": steps, "rate": 0.1}
        return card(settings={"attack": {"name": "unsplit", "targets": 8, **shared, "own": own}})

    rows = printed(with_steps(9), with_steps(90, when="untrained"), card(attack="mean-image"))
    assert [row for row in rows[2:] if "holds" not in row] == [
        "steps 9",
        "steps 90, when untrained",
        "In brackets the best guess that needed no message.",
    ]
    assert not any("steps" in row for row in printed(with_steps(9), with_steps(9)))


def test_strengths_of_one_defense_are_settings_apart() -> None:
    cards = [
        card(defense="noise", settings={"defense": {"stack": [["noise", {"sigma": sigma}]]}})
        for sigma in (0.1, 0.4)
    ]
    headings = [row for row in printed(*cards) if row.startswith("split")]
    assert headings == [
        "split, vanilla-split, cut 1, noise (sigma 0.1)",
        "split, vanilla-split, cut 1, noise (sigma 0.4)",
    ]


def test_without_scores_there_are_no_score_columns() -> None:
    assert printed(card(status="unscored", scores={}, case="split cut=1")) == [
        "split cut=1, vanilla-split, no defence",
        "attack control utility",
        "unsplit unscored 95%",
    ]


def test_the_summary_fits_a_narrow_terminal() -> None:
    on = console(width=80)
    attacks = [{"own": {"outer_steps": steps, "model_rate": 0.1 / steps}} for steps in (10, 1000)]
    names = ("identification", "abs_pearson", "ssim", "label_accuracy")
    baselines = {"b": dict.fromkeys(names, 0.5)}
    scores = {name: {"mean": 0.5} for name in names}
    fields: dict[str, Any] = {"scores": scores, "baselines": baselines}
    cards = [card(attack="smashed-as-image", settings={"attack": a}, **fields) for a in attacks]
    for part in summary(cards):
        on.print(part)
    text = written(on)
    assert text.count("smashed-as-image") == 2
    assert "outer_steps" in text
    assert "1000" in text
    assert "95%" in text
    assert "…" not in text


@pytest.mark.parametrize("width", [48, 80, 100, 200])
def test_names_are_whole_at_every_width(width: int) -> None:
    on = console(width=width)
    scores = {name: {"mean": 0.5} for name in COLUMNS}
    attacks = ("similarity-clustering", "feature-space-hijacking-of-properties")
    settings = [{"attack": {"own": {"learning_rate": rate}}} for rate in (0.1, 0.2)]
    for part in summary(
        [
            card(
                attack=name, scores=scores, settings=own, baselines={"b": dict.fromkeys(scores, 1)}
            )
            for name in attacks
            for own in settings
        ]
    ):
        on.print(part)
    text = written(on)
    words = text.split()
    assert {name for name in attacks if name in words} == {
        name for name in attacks if len(name) <= width / 2
    }
    assert "learning_rate" in words
    assert set(words) >= {word for heading in COLUMNS.values() for word in heading.split()}
    assert {"control", "utility"} <= set(words)
    assert text.count("0.50 (1.00)") == 4 * len(set(COLUMNS) - set(RATES))
    assert all(len(line) <= width for line in text.splitlines())
    assert "…" not in text


def test_the_listing_has_names_lines_and_settings() -> None:
    on = console()
    found = {"attacks": {"dlm": {"line": "Matches [x].", "settings": {"steps": "3", "k": "None"}}}}
    for table in listing(found):  # type: ignore[arg-type]
        on.print(table)
    assert [" ".join(line.split()) for line in written(on).splitlines()] == [
        "attacks",
        "dlm Matches [x].",
        "steps=3, k=None",
    ]
