"""One torch thread, as in every process with tensor arithmetic; the longest tests first."""

import pytest
import torch

torch.set_num_threads(1)


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Begin with the tests that start runtimes: whoever ends early takes the short ones."""
    items.sort(key=lambda item: item.get_closest_marker("runtime") is None)
