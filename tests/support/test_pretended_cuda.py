"""The pretended device fails where CUDA does and goes on where CUDA goes on."""

import copy
import pickle
import threading
from collections.abc import Callable

import pytest
import torch
from torch import nn

from tests.support import pretended_cuda

PRETENDED = torch.Generator.__module__ == pretended_cuda.__name__

# `test_on_cuda.py` starts the process that pretends.
pytestmark = [
    pytest.mark.cuda,
    pytest.mark.skipif(not PRETENDED, reason="runs where the device is pretended"),
]


@pytest.fixture
def rows() -> tuple[torch.Tensor, torch.Tensor]:
    here = torch.arange(6.0).reshape(2, 3)
    return here, here.to("cuda")


def network() -> nn.Sequential:
    return nn.Sequential(
        *(nn.Conv2d(1, 4, 3), nn.BatchNorm2d(4), nn.ReLU(), nn.MaxPool2d(2)),
        *(nn.Flatten(), nn.Linear(36, 3)),
    )


REFUSED: dict[str, Callable[[torch.Tensor, torch.Tensor], object]] = {
    "numpy": lambda _, there: there.numpy(),
    "two devices": lambda here, there: here + there,
    "least two devices": lambda _, there: torch.zeros(()).add_(there.sum()),
    "mm": lambda here, there: here @ there.T,
    "index_select": lambda _, there: there.index_select(0, torch.tensor([0])),
    "indices": lambda here, _: here[torch.tensor([1], device="cuda")],
    "values": lambda _, there: there.__setitem__(torch.tensor([0]), torch.zeros(1, 3)),
    "generator": lambda *_: torch.rand(2, device="cuda", generator=torch.Generator()),
    "generator but found 'cuda'": lambda *_: torch.rand(2, generator=torch.Generator("cuda")),
    "not implemented": lambda _, there: there.long() @ there.long().T,
    "pickled": lambda _, there: pickle.dumps(there),
    "ordinal": lambda here, _: here.to("cuda:7"),
}


@pytest.mark.parametrize("said", REFUSED)
def test_it_refuses_what_cuda_refuses(said: str, rows: tuple[torch.Tensor, torch.Tensor]) -> None:
    with pytest.raises((RuntimeError, TypeError), match=said):
        REFUSED[said](*rows)


def test_it_takes_what_cuda_takes(rows: tuple[torch.Tensor, torch.Tensor]) -> None:
    here, there = rows
    assert there.device == torch.device("cuda:0")
    assert there.to("cuda") is there
    assert torch.equal((there + torch.tensor(1.0)).cpu(), here + 1)
    assert there[torch.tensor([1])].is_cuda
    there[0] = torch.ones(3)
    assert there[0].tolist() == [1, 1, 1]
    found = []
    thread = threading.Thread(target=lambda: found.append(torch.zeros(2, device="cuda").is_cuda))
    thread.start()
    thread.join()
    assert found == [True]


@pytest.mark.skipif(torch.cuda.device_count() < 2, reason="two GPUs")
def test_two_devices_exchange_copies_and_nothing_else(
    rows: tuple[torch.Tensor, torch.Tensor],
) -> None:
    here, there = rows
    other = there.to("cuda:1")
    assert [str(each.device) for each in (other, other + 1, other.to("cuda:0"))] == [
        "cuda:1",
        "cuda:1",
        "cuda:0",
    ]
    assert str(torch.zeros_like(there, device="cuda:1").device) == "cuda:1"
    with pytest.raises(RuntimeError, match="both GPUs"):
        there + other
    assert torch.equal(other.cpu(), here)


def test_its_global_generator_is_its_own() -> None:
    torch.manual_seed(3)
    first = torch.rand(3, device="cuda").cpu()
    torch.manual_seed(3)
    assert torch.equal(first, torch.rand(3, device="cuda").cpu())
    torch.default_generator.manual_seed(3)
    assert not torch.equal(first, torch.rand(3, device="cuda").cpu())
    torch.manual_seed(3)
    assert not torch.equal(first, torch.rand(3))


def test_a_forked_generator_is_put_back() -> None:
    torch.manual_seed(3)
    expected = torch.rand(3, device="cuda").cpu()
    torch.manual_seed(3)
    with torch.random.fork_rng(devices=[0]):
        torch.rand(3, device="cuda")
    assert torch.equal(torch.rand(3, device="cuda").cpu(), expected)


@pytest.mark.parametrize("optimiser", [torch.optim.SGD, torch.optim.Adam])
def test_a_network_moves_and_trains_as_on_the_cpu(optimiser: type[torch.optim.Optimizer]) -> None:
    here = network()
    there = copy.deepcopy(here)
    before = [id(each) for each in there.parameters()]
    there.to("cuda")
    assert [id(each) for each in there.parameters()] == before
    images, labels = torch.rand(5, 1, 8, 8), torch.tensor([0, 1, 2, 0, 1])
    for module, device in ((here, "cpu"), (there, "cuda")):
        steps = optimiser(module.parameters(), lr=0.1)
        for _ in range(2):
            steps.zero_grad()
            loss = nn.functional.cross_entropy(module(images.to(device)), labels.to(device))
            loss.backward()
            steps.step()
    pairs = zip(here.parameters(), there.parameters(), strict=True)
    assert all(torch.allclose(one, other.cpu(), atol=1e-6) for one, other in pairs)


def test_it_counts_kernels_and_waits(rows: tuple[torch.Tensor, torch.Tensor]) -> None:
    here, there = rows
    with pretended_cuda.counting() as found:
        if (there > 1).any():
            float(there.sum())
        there[there > 1]
        there.cpu()
        here.to("cuda")
        here.pin_memory().to("cuda", non_blocking=True)
    assert found.waits == {"item": 2, "mask index": 1, "to cpu": 1, "to gpu": 1}
    assert found.kernels["gt"] == 2


def test_it_runs_out_of_memory() -> None:
    with pretended_cuda.memory(100):
        kept = torch.zeros(20, device="cuda")
        with pytest.raises(torch.OutOfMemoryError, match="CUDA out of memory"):
            torch.zeros(20, device="cuda")
        del kept
        torch.zeros(20, device="cuda")


def test_after_a_label_out_of_range_nothing_works(
    rows: tuple[torch.Tensor, torch.Tensor],
) -> None:
    logits = torch.zeros(2, 3, device="cuda")
    try:
        with pytest.raises(RuntimeError, match="device-side assert"):
            nn.functional.cross_entropy(logits, torch.tensor([9, 9], device="cuda"))
        with pytest.raises(RuntimeError, match="device-side assert"):
            rows[1] + 1
    finally:
        pretended_cuda.DRIVER.broken = False
