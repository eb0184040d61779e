"""What inner loops launch and wait for, counted on a pretended GPU; and the bars they keep."""

import pytest
import torch

from tests.support import pretended_cuda

PRETENDED = torch.Generator.__module__ == pretended_cuda.__name__

# `test_on_cuda.py` starts the process that pretends.
pytestmark = [
    pytest.mark.cuda,
    pytest.mark.skipif(not PRETENDED, reason="runs where the device is pretended"),
]


@pytest.mark.parametrize(
    ("loop", "kernels", "waits"),
    [("dlm, L-BFGS, history 10", 400, 1), ("split step, dp-sgd", 130, 7)],
)
def test_a_step_launches_and_waits_for_no_more(loop: str, kernels: int, waits: int) -> None:
    """Of L-BFGS once its history is full, on whose length the counts do not depend: see below."""
    from benchmarks import launches  # noqa: PLC0415  it pretends as it is imported

    found = launches.count(launches.LOOPS[loop])
    assert 0 < found.kernels <= kernels
    assert found.waits <= waits, found.places


def test_a_longer_history_launches_and_waits_for_no_more() -> None:
    """Steps are counted once the history is full; the attack's own 100 would take half a minute."""
    from benchmarks import launches  # noqa: PLC0415  it pretends as it is imported

    short, longer = (
        launches.count(
            launches.Loop(launches.attacked("dlm", launches.LENET, launches.searching(full)), 1, 2)
        )
        for full in (2, 6)
    )
    assert short.kernels == longer.kernels > 0
    assert short.waits == longer.waits


def test_the_table_has_a_line_for_a_loop_and_its_waits() -> None:
    from benchmarks import launches  # noqa: PLC0415  it pretends as it is imported

    first, *others = launches.table("unsplit, input step")
    assert first.startswith("unsplit, input step: ")
    assert "waits" in first
    assert all(line.startswith(("    ", "unsplit")) for line in others)
