import pytest
import torch

from leakbed.models import UnavailableDeviceError, resolve_device


def machine(monkeypatch: pytest.MonkeyPatch, *, cuda_devices: int) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: cuda_devices > 0)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: cuda_devices)


def test_auto_takes_what_is_there(monkeypatch: pytest.MonkeyPatch) -> None:
    machine(monkeypatch, cuda_devices=0)
    assert resolve_device() == torch.device("cpu")
    machine(monkeypatch, cuda_devices=1)
    assert resolve_device("auto") == torch.device("cuda")


def test_named_devices(monkeypatch: pytest.MonkeyPatch) -> None:
    machine(monkeypatch, cuda_devices=2)
    for name in ("cpu", "cuda", "cuda:0", "cuda:1"):
        assert str(resolve_device(name)) == name


@pytest.mark.parametrize(("name", "devices"), [("cuda", 0), ("cuda:0", 0), ("cuda:1", 1)])
def test_an_absent_device_is_an_error(
    monkeypatch: pytest.MonkeyPatch, name: str, devices: int
) -> None:
    machine(monkeypatch, cuda_devices=devices)
    with pytest.raises(UnavailableDeviceError, match=f"sees {devices} CUDA devices"):
        resolve_device(name)


@pytest.mark.parametrize("name", ["gpu", "cudda", "meta", ""])
def test_other_names_are_refused(name: str) -> None:
    with pytest.raises(UnavailableDeviceError, match="use auto"):
        resolve_device(name)
