from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch

from experiments.run.server_part import at_upper_cut
from experiments.run.targets import Evidences, MisfitError, pick_targets
from experiments.run.view import architecture_of, build_view
from leakbed.contracts import Evidence, Knowledge, Seat, ThreatModel
from leakbed.events import CutGradientDown, Event, FeaturesDown, Phase, UpperGradientUp
from leakbed.tap.trace import Recorder, Trace
from tests.support.small_traces import CPU, SMASHED, smashed

ABOUT = {
    "local_steps": 1,
    "architecture": {
        "name": "mnistnet",
        "image_shape": [1, 16, 16],
        "num_classes": 3,
        "cut": 2,
        "upper_cut": 8,
    },
}
LABELS = ThreatModel(
    seat=Seat.SERVER,
    evidence=frozenset({Evidence.SMASHED, Evidence.CUT_GRADIENT}),
    needs=frozenset({Knowledge.ARCHITECTURE}),
)
Make = Callable[..., Trace]


@pytest.fixture
def make(tmp_path: Path) -> Make:
    def made(*events: Event) -> Trace:
        with Recorder(tmp_path / "trace", about=ABOUT) as recorder:
            for event in events:
                recorder(event)
        return Trace(tmp_path / "trace")

    return made


def rows(value: float) -> np.ndarray:
    return np.full((2, 84), value, np.float32) + np.arange(2, dtype=np.float32)[:, None]


def batch(node: int, step: int, *, round_: int = 2) -> list[Event]:
    """The four messages of a step, each with numbers of its own."""
    at, value = {"node": node, "round": round_, "step": step}, 100.0 * node + 10 * step
    return [
        smashed(node, step),
        FeaturesDown(**at, features=rows(value)),
        UpperGradientUp(**at, gradient=rows(-value - 1)),
        CutGradientDown(**at, gradient=np.zeros((2, 32), np.float32)),
    ]


def test_a_server_reads_features_and_their_gradient_at_the_upper_cut(make: Make) -> None:
    held_out = FeaturesDown(node=0, round=2, step=0, features=rows(7), phase=Phase.EVALUATE)
    earlier = batch(0, 0, round_=1)[1:3]
    trace = make(*earlier, *batch(0, 0), *batch(1, 0), *batch(0, 1), held_out)
    evidences = Evidences.of(trace)
    targets = pick_targets(evidences, LABELS, when="training", count=5)
    view = build_view(trace, evidences, LABELS, targets, device=CPU)
    assert view.smashed is not None
    assert view.cut_gradient is not None
    firsts = torch.tensor([0.0, 100.0, 1.0, 101.0, 10.0])  # first rows of all nodes, then the next
    assert torch.equal(view.smashed, firsts.unsqueeze(1).expand(5, 84))
    places = [(target.node, target.step, target.row) for target in targets]
    expected = [-(100.0 * n + 10 * s) - 1 + float(r or 0) for n, s, r in places]
    assert torch.equal(view.cut_gradient[:, 0], torch.tensor(expected))
    assert view.architecture is not None
    assert (view.architecture.cut, view.architecture.upper_cut) == (8, None)
    assert [name for name, _ in view.architecture.top(0).named_parameters()] == [
        "10.weight",
        "10.bias",
    ]


def test_of_test_rows_it_infers_labels_from_features(make: Make) -> None:
    test_rows = [
        smashed(0, 4, phase=Phase.EVALUATE),
        FeaturesDown(node=0, round=2, step=4, features=rows(7), phase=Phase.EVALUATE),
    ]
    trace = make(*batch(0, 0), *test_rows)
    evidences = Evidences.of(trace)
    names = replace(SMASHED, needs=frozenset({Knowledge.KNOWN_LABELS}))
    targets = pick_targets(evidences, names, when="inference", count=9)
    known = torch.tensor([[1], [-1]])
    view = build_view(trace, evidences, names, targets, device=CPU, known_labels=known)
    assert view.smashed is not None
    assert torch.equal(view.smashed, torch.from_numpy(rows(7)))
    inverts = build_view(trace, evidences, SMASHED, targets, device=CPU)
    assert inverts.smashed is not None
    assert inverts.smashed.shape == (2, 32)


def test_an_attack_on_the_bottom_still_reads_the_lower_cut(make: Make) -> None:
    trace = make(*batch(0, 0))
    evidences = Evidences.of(trace)
    targets = pick_targets(evidences, SMASHED, when="training", count=1)
    view = build_view(trace, evidences, SMASHED, targets, device=CPU)
    assert view.smashed is not None
    assert view.smashed.shape == (1, 32)
    assert view.cut_gradient is None


def test_nothing_given_is_changed(make: Make) -> None:
    trace = make(*batch(0, 0))
    evidences, architecture = Evidences.of(trace), architecture_of(trace.about)
    before = dict(evidences.smashed)
    lifted, found = at_upper_cut(trace, evidences, architecture)
    assert lifted != architecture
    assert found.smashed.keys() == before.keys()
    assert evidences.smashed == before


def test_a_server_that_holds_the_loss_reads_no_gradient(make: Make) -> None:
    once = dict(ABOUT["architecture"], upper_cut=None)  # type: ignore[call-overload]
    trace = make(*batch(0, 0))
    with pytest.raises(MisfitError, match=r"seat = 'client'.*protocol\.name = 'u-shaped'"):
        at_upper_cut(trace, Evidences.of(trace), architecture_of({"architecture": once}))
