"""The table of detectors: every rate with its interval, true alarms beside false ones."""

from collections.abc import Callable
from pathlib import Path

import pytest

from experiments.report.detection import COLUMNS, detectors, main, noticed
from experiments.report.page import write_report
from experiments.results.cards import Card
from experiments.results.folder import note_last_run
from tests.support.watched import finding, watched

MakeCard = Callable[..., Card]
Leave = Callable[..., Path]
MISSING = "\N{EN DASH}"


def cards(make_card: MakeCard) -> list[Card]:
    before = {"step": 10, "ssim": 0.11, "identification": 0.0}
    hijacked = {"0": {"splitout": finding(10, 1.0, iteration=10, before=before)}}
    return [
        watched(make_card, hijacked, attack="fsha", hijacked=True),
        watched(make_card, {"0": {"splitout": finding(None, 0.25)}}),
    ]


def test_a_row_has_both_rates_the_step_and_what_was_read(make_card: MakeCard) -> None:
    (row,) = detectors(cards(make_card))
    assert dict(zip(COLUMNS, row, strict=True)) == {
        "detector": "splitout against fsha",
        "setting": "split",
        "hijacked runs noticed": "1 of 1 (3 to 100 %)",
        "at gradient": "10",
        "read before": "identification 0%, SSIM 0.11",
        "honest runs accused": "0 of 1 (0 to 98 %)",
        "worst scores, hijacked": "1.000 to 1.000",
        "honest": "0.250 to 0.250",
        "area under ROC": "1.00",
    }
    (pooled,) = detectors(cards(make_card), pooled=True)
    assert pooled[1] == "all 1"


def test_what_was_read_of_images_too_small_for_ssim_is_said(make_card: MakeCard) -> None:
    before = {"step": 10, "identification": 0.0}
    hijacked = {"0": {"splitout": finding(10, 1.0, iteration=10, before=before)}}
    card = watched(make_card, hijacked, attack="fsha", hijacked=True)
    assert "by when identification 0% had been read" in noticed([card])[0]


def test_what_is_unknown_is_a_dash(make_card: MakeCard) -> None:
    (row,) = detectors([watched(make_card, {"0": {"splitout": finding(None, None)}})])
    assert row == (
        "splitout",
        "split",
        "no run",
        MISSING,
        MISSING,
        "0 of 1 (0 to 98 %)",
        MISSING,
        f"{MISSING}, 1 without a verdict",
        MISSING,
    )


def test_settings_are_named_where_one_detector_has_several(make_card: MakeCard) -> None:
    nodes = {"0": {"splitout": finding(None, 0.1)}}
    found = [watched(make_card, nodes), watched(make_card, nodes, own={"window": 5})]
    assert [row[0] for row in detectors(found)] == ["splitout {}", 'splitout {"window": 5}']


def test_sentences_say_who_noticed_whom_and_who_was_accused(make_card: MakeCard) -> None:
    assert noticed(cards(make_card)) == [
        "splitout notices fsha in 1 of 1 (3 to 100 %) runs, at gradient 10, by when "
        "identification 0%, SSIM 0.11 had been read; it accuses 0 of 1 (0 to 98 %) honest runs."
    ]
    assert noticed(cards(make_card)[1:]) == [
        "splitout accuses 0 of 1 (0 to 98 %) honest runs; nobody hijacked one."
    ]
    assert noticed([make_card()]) == []


def test_the_page_has_the_table_where_there_are_detectors(
    make_card: MakeCard, leave: Leave
) -> None:
    for card in cards(make_card):
        folder = leave(card)
    page = write_report(folder).read_text()
    assert "<h2>Detectors at the nodes</h2>" in page
    assert "splitout against fsha" in page
    assert "splitout notices fsha in 1 of 1" in page


def test_the_command_prints_tables_roc_and_calibration(
    make_card: MakeCard, leave: Leave, capsys: pytest.CaptureFixture[str]
) -> None:
    for card in cards(make_card):
        folder = leave(card)
    main([str(folder), str(folder)])  # a run is the same run in both
    said = capsys.readouterr().out
    assert "| splitout against fsha | all 1 | 1 of 1 (3 to 100 %) |" in said
    assert "splitout, score: true, false alarms: 1.000: 1.00, 0.00; 0.250: 1.00, 1.00" in said
    assert "splitout, one honest run in a hundred: 0.2500" in said


def test_the_command_counts_the_last_run_alone(
    make_card: MakeCard, leave: Leave, capsys: pytest.CaptureFixture[str]
) -> None:
    earlier = watched(
        make_card, {"0": {"splitout": finding(None, 0.5)}}, attack="fsha", hijacked=True
    )
    for card in (earlier, *cards(make_card)):
        folder = leave(card)
    note_last_run(folder, "now", [card.key for card in cards(make_card)])
    main([str(folder)])
    assert "| splitout against fsha | all 1 | 1 of 1 (3 to 100 %) |" in capsys.readouterr().out
