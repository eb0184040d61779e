"""Values that are not finite stop a run, with node, round and step."""

import numpy as np
import pytest

from experiments.run.train import NonFiniteError, RefuseNonFinite
from leakbed.events import CutGradientDown, SmashedUp


def test_finite_values_pass() -> None:
    RefuseNonFinite()(CutGradientDown(node=1, round=2, step=3, gradient=np.ones(3)))


@pytest.mark.parametrize("bad", [np.nan, np.inf])
def test_others_are_named(bad: float) -> None:
    smashed = np.array([1.0, bad], dtype=np.float32)
    event = SmashedUp(node=1, round=2, step=3, smashed=smashed, labels=np.array([1, 2]))
    with pytest.raises(NonFiniteError, match=r"smashed 'smashed' of node 1 .* round 2, step 3"):
        RefuseNonFinite()(event)


def test_it_may_run_beside_threads_that_draw() -> None:
    assert RefuseNonFinite.draws_nothing
