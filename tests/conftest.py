"""One torch thread, as in every process with tensor arithmetic; the longest tests first."""

import gc
import os
from collections.abc import Iterator

import pytest
import torch

from leakbed.flower_internals import task_identity
from tests.support import shape_checks as _shape_checks  # noqa: F401  before what it checks

torch.set_num_threads(1)


BUSY = 1200.0  # seconds; the longest takes 150 where nothing else runs


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Begin with the tests that start runtimes: whoever ends early takes the short ones."""
    items.sort(key=lambda item: item.get_closest_marker("runtime") is None)
    for item in items:
        if item.get_closest_marker("runtime") or item.get_closest_marker("cuda"):
            item.add_marker(pytest.mark.timeout(BUSY))


def pytest_collection_finish() -> None:
    """Keep what was just loaded out of later searches for garbage: half a second each."""
    gc.collect()
    gc.freeze()


def pytest_sessionfinish() -> None:
    """Let Python take it down at its exit, where some libraries print what is left."""
    gc.unfreeze()


@pytest.fixture
def identity() -> Iterator[None]:
    """Let this process create messages, as Flower's own processes do."""
    with task_identity():
        yield


@pytest.fixture(autouse=True)
def gpus_as_before() -> Iterator[None]:
    """Refuse a test that hides this process's GPUs from the tests after it."""
    seen = os.environ.get("CUDA_VISIBLE_DEVICES")
    yield
    left = os.environ.pop("CUDA_VISIBLE_DEVICES", None)
    if seen is not None:
        os.environ["CUDA_VISIBLE_DEVICES"] = seen
    assert left == seen, f"CUDA_VISIBLE_DEVICES was {seen!r} and is left as {left!r}"
