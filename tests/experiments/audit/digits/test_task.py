"""The example that is audited is what it says it is."""

import importlib
from pathlib import Path
from typing import Any

import pytest
import torch

from leakbed.models import IllegalCutError, sequence

APP = Path(__file__).resolve().parents[4] / "experiments" / "studies" / "audit" / "digits"


def test_its_network_cannot_be_cut_and_its_inputs_are_normalised(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.syspath_prepend(str(APP))
    task: Any = importlib.import_module("digits.task")
    with pytest.raises(IllegalCutError):
        sequence(task.Net())
    loader = task.load_data(1, 2, batch_size=4, rows=8)
    images = torch.cat([images for images, _ in loader])
    assert images.shape == (8, 1, 8, 8)
    assert images.min() < -0.5
    assert task.Net()(images).shape == (8, 10)
    assert task.train(task.Net(), loader, epochs=1, lr=0.1) > 0
