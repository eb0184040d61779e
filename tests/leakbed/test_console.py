"""The console shows time that remains on a terminal, lines in a log, and the leading scores."""

import io
from typing import Any

from rich.console import Console

from leakbed.cards import Card
from leakbed.console import Bars, listing, summary


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
    on.print(summary(cards))
    return [" ".join(line.split()) for line in written(on).splitlines()]


def test_a_log_has_one_line_per_step() -> None:
    on = console()
    with Bars(on) as bars:
        bars.start(2)
        bars.note("training [fedavg]")
        bars.advance("split: dlm")
        bars.advance("split: unsplit")
    assert written(on).splitlines() == [
        "training [fedavg]",
        "[1/2] split: dlm",
        "[2/2] split: unsplit",
    ]


def test_a_terminal_has_a_bar_with_the_time_that_remains() -> None:
    on = console(terminal=True)
    with Bars(on) as bars:
        bars.start(2)
        bars.note("attacking [x]")
        bars.advance("done [y]")
    text = written(on)
    assert "remaining" in text
    assert "1/2" in text
    assert "done [y]" in text
    assert "[1/2]" not in text


def test_scores_stand_beside_the_best_evidence_free_baseline() -> None:
    assert printed(card()) == [
        "attack setting identified SSIM control utility",
        "unsplit split, vanilla-split, cut 1 50% (0%) 0.62 (0.37) holds 95%",
        "In brackets the best guess that needed no message.",
    ]


def test_what_is_wrong_with_a_card_shows() -> None:
    rows = printed(
        card(control={"within": False}),
        card(unreliable="diverged"),
        card(control=None, scores={"ssim": {"mean": None}}, utility={}),
        card(status="unfit", why="no", scores={}, baselines={}, control=None, defense="noise"),
    )[1:5]
    dash = "\N{EN DASH}"
    assert rows[0].endswith("fails 95%")
    assert rows[1].endswith("unreliable 95%")
    assert rows[2].endswith(f"{dash} {dash} {dash} {dash}")
    assert rows[3] == f"unsplit split, vanilla-split, cut 1, noise {dash} {dash} unfit 95%"


def test_without_scores_there_are_no_score_columns() -> None:
    rows = printed(card(status="unscored", scores={}, case="split cut=1", cut=1))
    assert rows == [
        "attack setting control utility",
        "unsplit split cut=1, vanilla-split unscored 95%",
    ]


def test_the_summary_fits_a_narrow_terminal() -> None:
    on = console(width=80)
    scores = {name: {"mean": 0.5} for name in ("identification", "abs_pearson", "ssim")}
    on.print(summary([card(attack="smashed-as-image", scores=scores)]))
    text = written(on)
    assert "smashed-as-image" in text
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
