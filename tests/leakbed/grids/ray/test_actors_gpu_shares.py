import os
from collections import Counter
from collections.abc import Iterator
from functools import partial
from typing import Any

import pytest
import ray
import torch

from leakbed.flower_internals import task_identity
from leakbed.grids.ray.actors import (
    NoRoomError,
    NoWorkersError,
    equal_share,
    hide_gpus,
    start_ray,
    stop_ray,
    take_share,
)
from leakbed.grids.ray.grid import RayGrid
from leakbed.tensors import UnavailableDeviceError
from tests.support import pretended_gpus
from tests.support.strange_nodes import message, said


@pytest.fixture(scope="module")
def two_gpus() -> Iterator[None]:
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(ray, "init", partial(ray.init, num_gpus=2))
        assert start_ray(None, cpus=4)
    yield
    stop_ray()


@pytest.fixture(autouse=True)
def pretending(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    monkeypatch.setenv("LEAKBED_PRETEND_GPUS", "1")  # the workers' alone
    with task_identity():
        yield


def workers(num_gpus: float | None, *, count: int | None) -> list[dict[str, Any]]:
    """What each worker of a grid says of its GPUs."""
    with RayGrid(pretended_gpus.app, nodes=8, workers=count, num_gpus=num_gpus) as grid:
        replies = list(grid.send_and_receive([message(n, "gpu") for n in grid.get_node_ids()]))
        found = {said(reply)["process"]: said(reply) for reply in replies}
        assert len(found) == grid.workers
    return list(found.values())


@pytest.mark.runtime
@pytest.mark.parametrize("count", [4, None], ids=["asked for", "as many as fit"])
def test_four_halves_are_two_on_each_gpu(two_gpus: None, count: int | None) -> None:
    found = workers(0.5, count=count)
    assert Counter(worker["visible"] for worker in found) == {"0": 2, "1": 2}
    assert [worker["caps"] for worker in found] == [[0.5]] * 4  # once in each
    assert {worker["device"] for worker in found} == {"cuda"}


@pytest.mark.runtime
def test_a_whole_gpu_has_no_cap(two_gpus: None) -> None:
    found = workers(1.0, count=None)
    assert sorted(worker["visible"] for worker in found) == ["0", "1"]
    assert [worker["caps"] for worker in found] == [[], []]


@pytest.mark.runtime
def test_without_a_share_auto_is_the_cpu(two_gpus: None) -> None:
    (worker,) = workers(0.0, count=1)
    assert (worker["visible"], worker["device"], worker["caps"]) == ("", "cpu", [])


@pytest.mark.runtime
def test_a_worker_whose_gpu_vanished_is_refused_as_it_starts(
    two_gpus: None, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.delenv("LEAKBED_PRETEND_GPUS")  # Ray gives shares of what torch does not see
    one_line = r"^a worker could not start with '[\w.:]+': Ray gave this process 0\.5 of a GPU .*$"
    with pytest.raises(NoWorkersError, match=one_line) as refused:
        workers(0.5, count=1)
    assert "\n" not in str(refused.value)


@pytest.mark.runtime
def test_more_shares_than_gpus_are_refused(two_gpus: None) -> None:
    with pytest.raises(NoRoomError, match=r"4 workers of 1 CPU and 0\.75 GPU have no room"):
        workers(0.75, count=4)


def test_hiding_leaves_no_gpu_to_see(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "0,1")
    hide_gpus()
    assert os.environ["CUDA_VISIBLE_DEVICES"] == ""


@pytest.mark.parametrize(("share", "caps"), [(0.25, [0.25]), (1.0, [])])
def test_the_cap_is_the_share(
    monkeypatch: pytest.MonkeyPatch, share: float, caps: list[float]
) -> None:
    asked: list[float] = []
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "set_per_process_memory_fraction", asked.append)
    take_share(share)
    assert asked == caps


def test_a_process_whose_gpu_vanished_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "3")
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    with pytest.raises(UnavailableDeviceError, match=r"0\.5 of a GPU .*'3'\), but .* sees none"):
        take_share(0.5)


@pytest.mark.parametrize(
    ("gpus", "workers", "share"),
    [(1, 1, 1 / 2), (1, 3, 1 / 4), (2, 1, 1 / 2), (2, 3, 1 / 3), (4, 8, 1 / 3)],
)
def test_equal_shares_leave_one_on_each_gpu_to_the_driver(
    monkeypatch: pytest.MonkeyPatch, gpus: int, workers: int, share: float
) -> None:
    monkeypatch.setattr(ray, "cluster_resources", lambda: {"CPU": 16.0, "GPU": float(gpus)})
    assert equal_share(workers) == pytest.approx(share)


def test_equal_shares_of_no_gpu_are_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(ray, "cluster_resources", lambda: {"CPU": 16.0})
    with pytest.raises(NoRoomError, match=r"counts none; set device = 'cpu', or gpus_per_worker"):
        equal_share(4)


@pytest.mark.runtime
def test_without_a_share_workers_use_every_gpu(two_gpus: None) -> None:
    found = workers(None, count=4)
    assert {worker["visible"] for worker in found} == {"0", "1"}
    assert [worker["caps"] for worker in found] == [[pytest.approx(1 / 3)]] * 4
    assert {worker["device"] for worker in found} == {"cuda"}
