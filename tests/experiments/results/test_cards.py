"""Cards survive the way to disk and back, and never hold a number that is not one."""

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
from pydantic import ValidationError

from experiments.results.cards import (
    PACKAGES,
    Bound,
    Card,
    CardError,
    Exposure,
    Threat,
    card_key,
    peak_memory,
    read_cards,
    source_hash,
    write_card,
)
from leakbed.contracts import Evidence, Knowledge, Seat, ThreatModel

THREAT = ThreatModel(
    seat=Seat.SERVER,
    evidence=frozenset({Evidence.SMASHED}),
    needs=frozenset({Knowledge.ARCHITECTURE}),
)


def card(**changes: Any) -> Card:
    settings: dict[str, Any] = {
        "key": card_key({"seed": changes.get("seed", 0)}, "code"),
        "case": "split",
        "protocol": "vanilla-split",
        "data": "mnist-5k",
        "model": "mnistnet",
        "cut": 1,
        "nodes": 4,
        "attack": "unsplit",
        "seed": 0,
        "threat": Threat.of(THREAT),
        "exposure": Exposure(round=2, trained="yes", mode="train", rows=32),
        "tuned_on": {"seeds": [100], "rows": "private"},
        "notes": ("a line",),
        "scores": {"ssim": {"mean": 0.5, "values": [0.4, 0.6]}, "failures": 0},
        "baselines": {"mean-public": {"ssim": 0.3}},
        "cost": {"seconds": 1.5},
        "version": "0.1.0",
        "source": "0123456789abcdef",
    }
    return Card(**(settings | changes))


def test_a_card_comes_back_as_it_was_written(tmp_path: Path) -> None:
    written = [card(seed=seed) for seed in range(3)]
    files = [write_card(each, tmp_path) for each in written]
    assert files[0] == tmp_path / "cards" / f"{written[0].key}.json"
    assert read_cards(tmp_path) == sorted(written, key=lambda each: each.key)


def test_no_cards_are_no_error(tmp_path: Path) -> None:
    assert read_cards(tmp_path) == []


def test_the_threat_is_also_said_in_words() -> None:
    threat = card().threat
    assert threat is not None
    assert threat.seat == "server"
    assert threat.needs == ("architecture",)
    assert threat.evidence == ("smashed",)
    assert threat.in_words.startswith("The server follows the protocol, reads the activations")


def test_writing_is_whole_or_not_at_all(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    file = write_card(card(), tmp_path)
    before = file.read_bytes()

    def full_disk(_: int) -> None:
        raise OSError("no space left on device")

    monkeypatch.setattr(os, "fsync", full_disk)
    with pytest.raises(OSError, match="no space"):
        write_card(card(defense="other"), tmp_path)
    assert file.read_bytes() == before
    assert list(file.parent.iterdir()) == [file]


def test_what_is_not_finite_becomes_null_with_its_place(tmp_path: Path) -> None:
    broken = card(
        scores={"psnr": {"mean": float("inf"), "values": [1.0, float("nan")]}},
        unreliable="diverged",
    )
    text = write_card(broken, tmp_path).read_text()
    assert "NaN" not in text
    assert "Infinity" not in text
    content = json.loads(text)
    assert content["scores"]["psnr"] == {"mean": None, "values": [1.0, None]}
    assert content["unreliable"] == "diverged; not finite: scores.psnr.mean, scores.psnr.values[1]"
    assert read_cards(tmp_path) == [broken]


def test_a_card_is_budget_bound_where_more_than_a_tenth_stopped_on_the_budget(
    tmp_path: Path,
) -> None:
    assert card().stopped_on_budget is None
    assert card().budget_bound is None
    assert card(stopped_on_budget=0.1).budget_bound is None
    bound = card(stopped_on_budget=0.25)
    assert bound.budget_bound is not None
    assert bound.budget_bound.startswith("budget-bound: 25% of the targets stopped on")
    text = write_card(bound, tmp_path).read_text()
    assert json.loads(text)["stopped_on_budget"] == 0.25
    assert read_cards(tmp_path) == [bound]
    with pytest.raises(ValidationError, match="stopped_on_budget"):
        card(stopped_on_budget=1.5)


def test_numbers_need_baselines_and_refusals_reasons() -> None:
    with pytest.raises(ValidationError, match="need their baselines"):
        card(baselines={})
    with pytest.raises(ValidationError, match="needs `why`"):
        card(status="unfit", scores={})
    with pytest.raises(ValidationError, match="has no scores"):
        card(status="unscored")
    with pytest.raises(ValidationError, match="'diverged' needs `why`"):
        card(status="diverged", scores={})
    assert card(status="unfit", scores={}, why="no smashed data").why == "no smashed data"


def test_what_decides_a_number_is_said_in_words() -> None:
    update = Exposure(round=1, trained="no", mode="train", rows=8, steps=1)
    said = "round 1, not trained before, train mode, 8 rows and 1 step behind a message"
    assert update.in_words() == said
    smashed = Exposure(round=3, trained="partly", mode="eval", rows=1)
    assert smashed.in_words() == "round 3, partly untrained, eval mode, 1 row behind a message"
    foreign = Exposure(round=2, trained="yes", mode=None, rows=None)
    assert foreign.in_words() == "round 2, trained before"


def test_a_broken_file_is_named(tmp_path: Path) -> None:
    file = write_card(card(), tmp_path)
    whole = file.read_text()
    for content, reason in (
        (whole[:100], "Expecting"),
        ("[]", "format version is None"),
        (whole.replace('"schema_version": 2', '"schema_version": 9'), "format version is 9"),
        (whole.replace('"schema_version": 2', '"schema_version": 1'), "version is 1, whose SSIM"),
        (whole.replace('"nodes": 4', '"nodes": "many"'), "nodes"),
        (whole.replace('"nodes": 4', '"nodes": 4, "colour": 1'), "colour"),
    ):
        file.write_text(content)
        with pytest.raises(CardError, match=f"{file.name} is not a card.*") as caught:
            read_cards(tmp_path)
        assert reason in str(caught.value)
    file.write_text(whole)
    file.rename(file.with_name("0" * 16 + ".json"))
    with pytest.raises(CardError, match="it holds the card"):
        read_cards(tmp_path)


def test_the_key_follows_settings_and_source_but_not_their_order() -> None:
    key = card_key({"a": 1, "b": {"c": [1, 2]}}, "source")
    assert key == card_key({"b": {"c": [1, 2]}, "a": 1}, "source")
    assert key != card_key({"a": 1, "b": {"c": [2, 1]}}, "source")
    assert key != card_key({"a": 1, "b": {"c": [1, 2]}}, "other")
    assert len(key) == 16
    with pytest.raises(CardError, match="finite JSON"):
        card_key({"a": float("nan")}, "source")
    with pytest.raises(CardError, match="finite JSON"):
        card_key({"a": {1, 2}}, "source")


def test_peak_memory_is_bytes_of_this_process() -> None:
    assert 10_000_000 < peak_memory() < 100_000_000_000


def test_cards_need_no_torch() -> None:
    code = "import sys, experiments.results.cards; sys.exit('torch' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == 0  # noqa: S603


def test_the_source_hash_sees_names_and_contents_of_python_files_only(tmp_path: Path) -> None:
    with pytest.raises(CardError, match="no sources"):
        source_hash(tmp_path)
    for name in PACKAGES:
        (tmp_path / name).mkdir()
        (tmp_path / name / "a.py").write_text("x = 1\n")
    first = source_hash(tmp_path)
    (tmp_path / "leakbed" / "settings.toml").write_text("ignored = true\n")
    (tmp_path / "elsewhere.py").write_text("y = 1\n")
    assert source_hash(tmp_path) == first
    (tmp_path / "leakbed" / "a.py").rename(tmp_path / "leakbed" / "b.py")
    renamed = source_hash(tmp_path)
    (tmp_path / "attacks" / "a.py").write_text("x = 2\n")
    assert len({first, renamed, source_hash(tmp_path)}) == 3
    assert len(source_hash()) == 16


def test_one_fault_of_the_noise_is_one_doubt_whichever_check_found_it() -> None:
    ceiling = Bound(
        ceiling=0.5,
        doubts=(
            "recorded noise, variance: NOT what the law says (z 9.0, limit 4.9)",
            "recorded noise, hits on recorded messages: NOT what the law says (z 5.0, limit 4.0)",
        ),
    )
    noise = ("recorded noise, variance: NOT what the law says (z 40.0, limit 4.9)",)
    found = card(noise=noise, ceiling=ceiling).noise_doubts
    assert found == (*noise, ceiling.doubts[1])
