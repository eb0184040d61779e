"""The benchmark finds what it planted and prints what it promises (on a few rows)."""

import json

import pytest
import torch

from attacks.similarity_clustering import SimilarityClustering
from benchmarks import label_rows


@pytest.fixture(autouse=True)
def few(monkeypatch: pytest.MonkeyPatch) -> None:
    for name, value in {"ROWS": 500, "WIDTH": 700, "CHUNK": 64, "THREADS": 1}.items():
        monkeypatch.setattr(label_rows, name, value)


def test_rows_point_where_their_label_says() -> None:
    rows, labels = label_rows.planted()
    assert rows.shape == (500, 700)
    means = torch.stack([rows[labels == label].mean(0) for label in range(10)])
    assert ((rows @ means.T).argmax(1) == labels).all()
    assert rows[:64].norm(dim=1).mean() == pytest.approx(2**0.5, rel=0.1), "as much noise as label"


def test_prints_one_json_object_a_line(capsys: pytest.CaptureFixture[str]) -> None:
    label_rows.main()
    lines = [json.loads(text) for text in capsys.readouterr().out.splitlines()]
    assert [each["unit"] for each in lines] == ["rows/s", "rows/s", "bytes"]
    for each in lines:
        assert set(each) == {"name", "ours", "other", "ratio", "unit", "runs"}
    assert lines[2]["other"] == 500 * 700 * 4


def test_a_side_that_finds_nothing_is_no_measurement(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(label_rows, "attacked", lambda *_: (1.0, 0.4))
    with pytest.raises(RuntimeError, match=r"40\.0%, 40\.0%, 40\.0% of planted labels"):
        label_rows.main()
    rows, labels = label_rows.planted()
    monkeypatch.undo()
    assert label_rows.attacked(rows, labels, SimilarityClustering())[1] > 0.99
