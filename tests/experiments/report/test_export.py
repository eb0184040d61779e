"""A folder's last run as records, LaTeX and figure files, with the report's numbers."""

import csv
import re
from collections.abc import Callable
from io import StringIO
from pathlib import Path

import pytest

import leakbed
from experiments.report.export import (
    COSTS,
    ExportError,
    comma_separated,
    escaped,
    latex,
    records,
    write_figures,
)
from experiments.report.rows import METRIC_IN_WORDS, cells
from experiments.report.tables import tables
from experiments.results.cards import Bound, Card, CardError, write_card
from experiments.results.folder import ReportError, note_last_run
from experiments.settings.plugins import is_taken

MakeCard = Callable[..., Card]


def noised(make_card: MakeCard, sigma: float, **changes: object) -> Card:
    stack = {"stack": [["smashed-noise", {"sigma": sigma}]]}
    return make_card(defense="smashed-noise", settings={"defense": stack}, **changes)


def left(folder: Path, *cards: Card) -> Path:
    for card in cards:
        write_card(card, folder)
    return folder


def test_a_frame_has_the_last_run_and_a_column_for_each_setting_that_differs(
    make_card: MakeCard, tmp_path: Path
) -> None:
    plain = [make_card(seed=seed) for seed in (0, 1)]
    kept = [*plain, noised(make_card, 0.1), noised(make_card, 0.2)]
    folder = left(tmp_path, *kept, make_card(attack="mean-image"))
    note_last_run(folder, "mine", [card.key for card in kept])
    frame = leakbed.results(folder)
    assert frame["attack"].tolist() == ["unsplit"] * 3
    assert frame["defense"].tolist() == ["none", "smashed-noise", "smashed-noise"]
    assert frame["seeds"].tolist() == [2, 1, 1]
    sigmas = frame["defense.smashed-noise.sigma"]
    assert sigmas.isna().tolist() == [True, False, False]
    assert sorted(sigmas.tolist()[1:]) == [0.1, 0.2]
    settings = [name for name in frame.columns if "." in name]
    assert settings == ["defense.smashed-noise.sigma"]  # what all have in common is no column
    by_seed = leakbed.results(folder, by_seed=True)
    assert by_seed["seed"].tolist() == [0, 1, 0, 0]
    assert "seeds" not in by_seed


def test_a_record_has_the_reports_intervals_and_baselines(
    make_card: MakeCard, tmp_path: Path
) -> None:
    card = make_card(means={"identification": 0.5, "ssim": 0.8}, unreliable="few targets")
    (row,) = cells([card])
    (found,) = records(left(tmp_path, card))
    low, high = row.measures["identification"].interval or (0, 0)
    assert (found["identification"], found["identification_low"]) == (0.5, low)
    assert found["identification_high"] == high
    stderr = row.measures["ssim"].stderr or 0
    assert found["ssim_high"] - found["ssim"] == pytest.approx(2 * stderr)
    assert (found["ssim_baseline"], found["ssim_baseline_name"]) == (0.37, "another-row")
    assert found["test_accuracy"] == 0.95
    assert found["test_accuracy_low"] is None  # one seed says nothing of its spread
    assert (found["control"], found["doubts"]) == ("holds", "few targets")
    assert found["targets"] == 16


def test_targets_and_failures_are_counted_over_all_seeds(
    make_card: MakeCard, tmp_path: Path
) -> None:
    first = make_card(seed=0)
    second = make_card(seed=1, scores={**first.scores, "failures": 9})
    folder = left(tmp_path, first, second)
    (pooled,) = records(folder)
    assert (pooled["seeds"], pooled["targets"], pooled["failures"]) == (2, 32, 9)
    assert (pooled["rows"], pooled["candidates"]) == (1, 1000)  # of one message, not of all
    by_seed = records(folder, by_seed=True)
    assert [(each["targets"], each["failures"]) for each in by_seed] == [(16, 0), (16, 9)]
    unscored = make_card(status="diverged", why="at step 3", attack="mean-image")
    (_, diverged) = sorted(records(left(tmp_path, unscored)), key=lambda each: -each["seeds"])
    assert (diverged["targets"], diverged["failures"]) == (None, None)


def test_no_metric_of_ones_own_can_have_the_name_of_a_column(
    make_card: MakeCard, tmp_path: Path
) -> None:
    settings = [
        {"device": "cpu", "keep_rounds": "last", "metric": [{"name": "far:Far", "own": {}}]},
        {"device": "cuda", "keep_rounds": "all", "protocol": {"rounds": 2}},
    ]
    costs = dict.fromkeys(COSTS, 1.0)
    accuracy = {"test_accuracy": 0.9, "honest_test_accuracy": 0.95}
    row = Bound(ceiling=0.5, error=0.01)
    made = [
        make_card(settings=each, cost=costs, utility=accuracy, attack_seed=1, ceiling=row)
        for each in settings
    ]
    folder = left(tmp_path, *made)
    found = {key: None for way in (False, True) for key in records(folder, by_seed=way)[0]}
    assert {"device", "metric", "ceiling", "peak_gpu_memory", "seed", "attack_seed"} < set(found)
    assert [key for key in found if key not in METRIC_IN_WORDS and not is_taken(key)] == []


def test_ceilings_of_rows_and_of_canary_labels_are_columns_of_their_own(
    make_card: MakeCard, tmp_path: Path
) -> None:
    canaries = Bound(game="canary label", ceiling=0.25, error=0.02, hits=3, targets=16)
    named = make_card(ceiling=canaries, means={"label_accuracy": 0.2})
    rows = make_card(attack="mean-image", ceiling=Bound(ceiling=0.5, error=0.01))
    (table,) = tables(cells([named]))
    (score,) = table["rows"][0]["metrics"]
    assert "canaries 3 of 16, ceiling 25% ± 4%" in score["notes"]
    found = {each["attack"]: each for each in records(left(tmp_path, named, rows))}
    ends = [f"canary_label_ceiling{end}" for end in ("", "_low", "_high")]
    assert [found["unsplit"][name] for name in ends] == [0.25, 0.21, 0.29]
    assert [found["mean-image"][name] for name in ends] == [None] * 3
    assert (found["unsplit"]["ceiling"], found["mean-image"]["ceiling"]) == (None, 0.5)


def test_what_did_not_run_says_why_and_lists_are_tuples(
    make_card: MakeCard, tmp_path: Path
) -> None:
    lost = make_card(status="diverged", why="at step 3", attack="mean-image")
    budgets = make_card(settings={"attack": {"own": {"budgets": [0.2, 0.1]}}})
    done, diverged = sorted(records(left(tmp_path, lost, budgets)), key=lambda r: r["status"])[::-1]
    assert (done["status"], diverged["status"]) == ("done", "diverged")
    assert (diverged["why"], diverged["identification"]) == ("at step 3", None)
    assert (done["attack.budgets"], diverged["attack.budgets"]) == ((0.2, 0.1), None)
    assert list(done) == list(diverged)


def test_two_equal_defences_in_a_stack_keep_their_own_strengths(
    make_card: MakeCard, tmp_path: Path
) -> None:
    def stacked(second: float) -> Card:
        pairs = [["smashed-noise", {"sigma": 0.1}], ["smashed-noise", {"sigma": second}]]
        return make_card(
            defense="smashed-noise+smashed-noise", settings={"defense": {"stack": pairs}}
        )

    found = records(left(tmp_path, stacked(0.2), stacked(0.3)))
    assert sorted(each["defense.smashed-noise 2.sigma"] for each in found) == [0.2, 0.3]
    assert "defense.smashed-noise.sigma" not in found[0]


def test_values_are_separated_by_commas(make_card: MakeCard, tmp_path: Path) -> None:
    found = records(left(tmp_path, make_card(case="a, b"), make_card(attack="mean-image")))
    read = list(csv.DictReader(StringIO(comma_separated(found))))
    assert [row["case"] for row in read] == [each["case"] for each in found]
    assert list(read[0]) == list(found[0])


def test_a_folder_without_results_or_of_another_version_is_refused(tmp_path: Path) -> None:
    with pytest.raises(ReportError, match=r"no results in .*missing.*--out"):
        leakbed.results(tmp_path / "missing")
    (tmp_path / "cards").mkdir()
    (tmp_path / "cards" / "a.json").write_text('{"schema_version": 1}')
    with pytest.raises(CardError, match=r"a\.json is not a card: its format version is 1"):
        leakbed.results(tmp_path)


def test_a_latex_table_has_the_reports_numbers(make_card: MakeCard) -> None:
    cards = [
        make_card(means={"identification": 0.5, "ssim": 0.8}),
        noised(make_card, 0.1, means={"identification": 0.0, "ssim": -0.004}),
    ]
    (table,) = tables(cells(cards))
    text = latex(cards)
    lines = [line for line in text.splitlines() if line.startswith("unsplit &")]
    assert len(lines) == len(table["rows"]) == 2
    for line, row in zip(lines, table["rows"], strict=True):
        fields = line.removesuffix(r" \\").split(" & ")
        shown = [fields[2:4], fields[4:6]]
        for (value, guess), score in zip(shown, row["metrics"], strict=True):
            assert value.startswith(escaped(score["value"]))
            assert escaped(score["notes"][0]) in value
            assert escaped(score["notes"][-1]).endswith(f" {guess}")
        assert fields[-1] == escaped(row["utility"]["value"])
    assert r"\toprule" in text
    assert text.count(r"\begin{table}") == text.count(r"\end{table}") == 1


def test_every_letter_that_latex_reads_is_escaped(make_card: MakeCard) -> None:
    text = latex([make_card(case=r"50% of a_b & {c} #1 $x ~ ^ \d <e> |f|", cut=None)])
    (line,) = (each for each in text.splitlines() if each.startswith("unsplit &"))
    assert r"50\% of a\_b \& \{c\} \#1 \$x \textasciitilde{} \textasciicircum{}" in line
    assert r"\textbackslash{}d $<$e$>$ $|$f$|$" in line
    assert not re.search(r"(?<!\\)[%#_]", line)
    assert line.isascii()


def test_doubts_are_notes_and_what_was_not_scored_is_counted(make_card: MakeCard) -> None:
    text = latex(
        [
            make_card(attack="fsha"),
            make_card(attack="sdar", stopped_on_budget=0.5),
            make_card(attack="unsplit", unreliable="few_targets"),
            make_card(attack="nearest-public", unreliable="few_targets"),
            make_card(attack="mean-image", status="diverged", why="at step 3"),
        ]
    )
    marks = dict(re.findall(r"^(\S+?)((?:\$\^\{\d+\}\$)?) & ", text, re.MULTILINE))
    notes = dict(re.findall(r"(\$\^\{\d+\}\$) ([^$]+)\.(?= |$)", text, re.MULTILINE))
    assert {attack: notes.get(mark) for attack, mark in marks.items() if attack != "attack"} == {
        "fsha": None,
        "sdar": r"budget-bound: 50\% of the targets stopped on the attack's budget of steps",
        "unsplit": r"few\_targets",
        "nearest-public": r"few\_targets",
    }
    assert len(notes) == 2  # rows of the same doubt share a note
    assert not marks["fsha"]
    assert "% Not in a table: 1 rows of status diverged." in text


def test_a_metric_is_chosen_by_name(make_card: MakeCard) -> None:
    card = make_card(means={"identification": 0.5, "ssim": 0.8, "psnr": 12.0})
    text = latex([card], metrics=["psnr"])
    assert "attack & setting & PSNR & no message & accuracy" in text
    with pytest.raises(ExportError, match=r"unknown metric of these results 'psn'.*'psnr'"):
        latex([card], metrics=["psn"])
    with pytest.raises(ExportError, match="nothing was scored"):
        latex([make_card(status="unfit", why="no")])


def test_without_a_utility_there_is_no_figure(make_card: MakeCard, tmp_path: Path) -> None:
    with pytest.raises(ExportError, match="what was left of the task"):
        write_figures([make_card(utility={})], tmp_path / "figures")
    assert not (tmp_path / "figures").exists()
