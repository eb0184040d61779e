"""One torch thread, as in every process that does tensor arithmetic here; who runs beside whom."""

import pytest
import torch

torch.set_num_threads(1)


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Put tests that start runtimes first and into one process, where several share the rest."""
    items.sort(key=lambda item: item.get_closest_marker("runtime") is None)
    for item in items:
        alone = item.get_closest_marker("runtime") is not None
        item.add_marker(pytest.mark.xdist_group("runtime" if alone else item.path.name))
