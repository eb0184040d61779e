"""The benchmark runs and prints what it promises (on next to no steps)."""

import json

import pytest

from attacks.unsplit import UnSplit
from benchmarks import unsplit_targets


def test_prints_one_json_object_a_line(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    for name, value in {"RUNS": 1, "TARGETS": 3, "ALONE": 2}.items():
        monkeypatch.setattr(unsplit_targets, name, value)
    quick = UnSplit(outer_steps=1, input_steps=1, model_steps=1)
    monkeypatch.setattr(unsplit_targets, "ATTACK", quick)
    unsplit_targets.main()
    lines = [json.loads(line) for line in capsys.readouterr().out.splitlines()]
    assert [line["name"].split(":")[0] for line in lines] == [
        f"UnSplit, mnistnet cut {cut}" for cut in (1, 2, 5)
    ]
    for line in lines:
        assert {"name", "ours", "other", "ratio", "unit", "runs"} == set(line)
        # One run: the ratio is that of the two sides, which are printed with two decimals.
        assert line["ratio"] == pytest.approx(line["ours"] / line["other"], rel=0.01, abs=0.02)


def test_each_side_counts_the_targets_it_has_attacked(monkeypatch: pytest.MonkeyPatch) -> None:
    ticks = iter([0.0, 2.0, 2.0, 6.0])
    monkeypatch.setattr(unsplit_targets, "perf_counter", lambda: next(ticks))
    monkeypatch.setattr(unsplit_targets, "TARGETS", 6)
    quick = UnSplit(outer_steps=1, input_steps=1, model_steps=1)
    monkeypatch.setattr(unsplit_targets, "ATTACK", quick)
    monkeypatch.setattr(unsplit_targets, "RUNS", 1)
    line = unsplit_targets.measured(1)
    assert (line["ours"], line["other"], line["ratio"]) == (3.0, 1.0, 3.0)
