from pathlib import Path

import pytest
import torch

from leakbed.tensors import UnavailableDeviceError, describe_device, peak_gpu_memory, resolve_device


def machine(monkeypatch: pytest.MonkeyPatch, *, cuda_devices: int) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: cuda_devices > 0)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: cuda_devices)


def test_auto_takes_what_is_there(monkeypatch: pytest.MonkeyPatch) -> None:
    machine(monkeypatch, cuda_devices=0)
    assert resolve_device() == torch.device("cpu")
    machine(monkeypatch, cuda_devices=1)
    assert resolve_device("auto") == torch.device("cuda")


def test_several_gpus_are_dealt_out_in_turn_unless_one_is_named(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    def dealt(name: str) -> list[str]:
        return [str(resolve_device(name, turn=turn)) for turn in range(5)]

    machine(monkeypatch, cuda_devices=2)
    assert dealt("auto") == dealt("cuda") == ["cuda", "cuda:1"] * 2 + ["cuda"]
    assert dealt("cuda:1") == ["cuda:1"] * 5
    assert dealt("cpu") == ["cpu"] * 5
    machine(monkeypatch, cuda_devices=1)
    assert dealt("auto") == ["cuda"] * 5
    machine(monkeypatch, cuda_devices=0)
    assert dealt("auto") == ["cpu"] * 5


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


def test_a_device_is_described_by_type_name_and_driver(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    cpu = describe_device(torch.device("cpu"))
    assert cpu["type"] == "cpu"
    assert torch.backends.cpu.get_cpu_capability() in cpu["name"]
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda _: "NVIDIA H200")
    monkeypatch.setattr("leakbed.tensors._DRIVER", tmp_path / "version")
    gpu = torch.device("cuda")
    described = {"type": "cuda", "name": "NVIDIA H200", "driver": "unknown"}
    assert describe_device(gpu) == described
    (tmp_path / "version").write_text("NVRM version: NVIDIA UNIX x86_64  550.54.15  Tue\nGCC 12\n")
    assert describe_device(gpu) == {**described, "driver": "550.54.15"}


def test_memory_of_a_gpu_is_a_cost_and_a_cpu_has_none(monkeypatch: pytest.MonkeyPatch) -> None:
    machine(monkeypatch, cuda_devices=2)
    monkeypatch.setattr(torch.cuda, "max_memory_allocated", [3, 7].__getitem__)
    assert peak_gpu_memory(torch.device("cuda")) == {"peak_gpu_memory": 7}
    assert peak_gpu_memory(torch.device("cpu")) == {}
