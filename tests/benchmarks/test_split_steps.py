"""The benchmark runs and prints what it promises (on next to no steps)."""

import json

import pytest

from benchmarks import split_steps


def test_prints_one_json_object_a_line(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(split_steps, "RUNS", 1)
    monkeypatch.setattr(split_steps, "STEPS", 2)
    monkeypatch.setattr(split_steps, "PLAN", split_steps.TrainingPlan(batch_size=8, local_steps=2))
    split_steps.main()
    lines = [json.loads(line) for line in capsys.readouterr().out.splitlines()]
    assert len(lines) == 2
    assert {"name", "ours", "other", "ratio", "unit", "runs"} == set(lines[0])
