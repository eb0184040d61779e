"""Views grant what a threat model names, for the same samples in both families."""

from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import torch

from leakbed.contracts import Evidence, Knowledge, Seat, ThreatModel
from leakbed.events import CutGradientDown, Event, Phase, SmashedUp, UpdateUp
from leakbed.trace import Recorder, Trace
from leakbed.views import Evidences, MisfitError, build_view, pick_targets

ABOUT = {
    "local_steps": 1,
    "architecture": {"name": "mlp2", "image_shape": [1, 4, 4], "num_classes": 3, "cut": 1},
}
CPU = torch.device("cpu")
UPDATE = ThreatModel(seat=Seat.SERVER, evidence=frozenset({Evidence.UPDATE}))
SMASHED = ThreatModel(seat=Seat.SERVER, evidence=frozenset({Evidence.SMASHED}))
Make = Callable[[list[Event]], Trace]


@pytest.fixture
def make(tmp_path: Path) -> Make:
    def made(events: list[Event]) -> Trace:
        with Recorder(tmp_path / "trace", about=ABOUT) as recorder:
            recorder.hold(
                "adversary",
                "public",
                {"images": np.zeros((2, 1, 4, 4), np.float32), "labels": np.arange(2)},
            )
            for event in events:
                recorder(event)
        return Trace(tmp_path / "trace")

    return made


def smashed(node: int, step: int, *, rows: int = 2, phase: Phase = Phase.TRAIN) -> SmashedUp:
    values = np.full((rows, 32), 100 * node + 10 * step, np.float32) + np.arange(rows)[:, None]
    return SmashedUp(
        node=node,
        round=2,
        step=step,
        smashed=values.astype(np.float32),
        labels=np.arange(rows),
        phase=phase,
    )


def update(node: int, *, examples: int = 1) -> UpdateUp:
    shapes = {"0.weight": (32, 16), "0.bias": (32,), "2.weight": (3, 32), "2.bias": (3,)}
    names = {name: np.full(shape, float(node), np.float32) for name, shape in shapes.items()}
    return UpdateUp(
        node=node,
        round=2,
        before=names,
        after={k: v + 1 for k, v in names.items()},
        examples=examples,
    )


def test_first_rows_of_all_nodes_come_first(make: Make) -> None:
    trace = make([smashed(1, 0), smashed(1, 1), smashed(0, 0), smashed(0, 1)])
    targets = pick_targets(Evidences.of(trace), SMASHED, when="training", count=6)
    assert [(t.node, t.step, t.row) for t in targets] == [
        (0, 0, 0),
        (1, 0, 0),
        (0, 0, 1),
        (1, 0, 1),
        (0, 1, 0),
        (1, 1, 0),
    ]
    view = build_view(trace, Evidences.of(trace), SMASHED, targets, device=CPU)
    assert view.smashed is not None
    assert view.smashed[:, 0].tolist() == [0, 100, 1, 101, 10, 110]
    assert view.labels is not None, "this protocol shares them"


def test_only_the_last_round_is_attacked(make: Make) -> None:
    early = SmashedUp(node=0, round=1, step=0, smashed=np.zeros((2, 32), np.float32))
    targets = pick_targets(
        Evidences.of(make([early, smashed(0, 0)])), SMASHED, when="training", count=9
    )
    assert {target.round for target in targets} == {2}


def test_inference_attacks_the_evaluated_rows(make: Make) -> None:
    trace = make([smashed(0, 0), smashed(0, 4, rows=3, phase=Phase.EVALUATE)])
    targets = pick_targets(Evidences.of(trace), SMASHED, when="inference", count=9)
    assert [(t.step, t.row, t.phase) for t in targets] == [(4, r, Phase.EVALUATE) for r in range(3)]
    with pytest.raises(MisfitError, match="no test rows"):
        pick_targets(
            Evidences(updates=[], smashed={(0, 0): smashed(0, 0)}, gradients={}, evaluated=[]),
            SMASHED,
            when="inference",
            count=1,
        )


def test_nothing_is_granted_that_is_not_named(make: Make) -> None:
    trace = make([smashed(0, 0)])
    evidences = Evidences.of(trace)
    targets = pick_targets(evidences, SMASHED, when="training", count=2)
    view = build_view(trace, evidences, SMASHED, targets, device=CPU)
    for field in ("before", "after", "cut_gradient", "architecture", "public_images"):
        assert getattr(view, field) is None, field
    needs = frozenset({Knowledge.ARCHITECTURE, Knowledge.PUBLIC_IMAGES})
    greedy = ThreatModel(seat=Seat.SERVER, evidence=SMASHED.evidence, needs=needs)
    granted = build_view(trace, evidences, greedy, targets, device=CPU)
    assert granted.architecture is not None
    assert granted.public_images is not None


def test_gradients_are_those_of_the_same_rows(make: Make) -> None:
    gradient = CutGradientDown(
        node=0, round=2, step=0, gradient=np.arange(64, dtype=np.float32).reshape(2, 32)
    )
    trace = make([smashed(0, 0), gradient])
    both = ThreatModel(
        seat=Seat.CLIENT, evidence=frozenset({Evidence.SMASHED, Evidence.CUT_GRADIENT})
    )
    evidences = Evidences.of(trace)
    targets = pick_targets(evidences, both, when="training", count=2)
    view = build_view(trace, evidences, both, targets, device=CPU)
    assert view.cut_gradient is not None
    assert view.cut_gradient[:, 0].tolist() == [0, 32]


def test_updates_are_stacked_with_their_own_start(make: Make) -> None:
    trace = make([update(0), update(1)])
    evidences = Evidences.of(trace)
    targets = pick_targets(evidences, UPDATE, when="training", count=8)
    view = build_view(trace, evidences, UPDATE, targets, device=CPU)
    assert view.before is not None
    assert view.after is not None
    assert view.before["0.bias"][:, 0].tolist() == [0, 1]
    assert view.after["0.bias"][:, 0].tolist() == [1, 2]
    assert (view.targets, view.rows) == (2, 1)


def test_updates_over_different_numbers_of_samples_are_refused(make: Make) -> None:
    trace = make([update(0, examples=3), update(1, examples=4)])
    evidences = Evidences.of(trace)
    targets = pick_targets(evidences, UPDATE, when="training", count=8)
    with pytest.raises(MisfitError, match="local_steps"):
        build_view(trace, evidences, UPDATE, targets, device=CPU)


def test_the_wrong_family_says_which_fits(make: Make) -> None:
    with pytest.raises(MisfitError, match="'fedavg'"):
        pick_targets(Evidences.of(make([smashed(0, 0)])), UPDATE, when="training", count=1)
    evidences = Evidences(updates=[update(0)], smashed={}, gradients={}, evaluated=[])
    with pytest.raises(MisfitError, match="'vanilla-split'"):
        pick_targets(evidences, SMASHED, when="training", count=1)


def test_labels_are_given_only_where_declared(make: Make) -> None:
    trace = make([update(0)])
    evidences = Evidences.of(trace)
    given = ThreatModel(
        seat=Seat.SERVER, evidence=UPDATE.evidence, needs=frozenset({Knowledge.LABELS})
    )
    targets = pick_targets(evidences, given, when="training", count=1)
    with pytest.raises(MisfitError, match="answer key"):
        build_view(trace, evidences, given, targets, device=CPU)
    labels = torch.tensor([[2]])
    view = build_view(trace, evidences, given, targets, device=CPU, labels=labels)
    assert view.labels is not None
    assert build_view(trace, evidences, UPDATE, targets, device=CPU, labels=labels).labels is None
