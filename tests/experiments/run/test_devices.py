"""A device that is not there is refused before anything is trained."""

import warnings
from pathlib import Path
from typing import Any

import pytest
import torch

from experiments.run.runner import run
from leakbed.tensors import UnavailableDeviceError, resolve_device

TABLE: dict[str, Any] = {
    "name": "devices",
    "data": {"name": "tests.support.tiny:images", "nodes": 2, "test": 0.2},
    "model": {"name": "tests.support.tiny:plain", "cut": 1},
    "protocol": {"name": "vanilla-split", "batch_size": 5, "local_steps": 2},
    "attack": [{"name": "smashed-as-image", "targets": 2}],
}


@pytest.mark.parametrize("grid", ["local", "ray"])
def test_cuda_without_a_gpu_is_refused_before_training(
    grid: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    with pytest.raises(UnavailableDeviceError, match="sees 0 CUDA devices here; use 'auto'"):
        run({**TABLE, "grid": grid, "device": "cuda"}, out=tmp_path)
    assert not list(tmp_path.glob("runs/*"))


def test_a_driver_too_old_for_the_build_is_no_gpu_and_torch_says_why(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    def outdated() -> bool:
        warnings.warn(
            "CUDA initialization: The NVIDIA driver on your system is too old", stacklevel=1
        )
        return False

    monkeypatch.setattr(torch.cuda, "is_available", outdated)
    with (
        pytest.warns(UserWarning, match="driver on your system is too old"),
        pytest.raises(UnavailableDeviceError, match="install a PyTorch build that matches"),
    ):
        resolve_device("cuda")
    with pytest.warns(UserWarning, match="too old"):
        assert resolve_device("auto").type == "cpu"
