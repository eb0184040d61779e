"""What a threat model's own kinds grant, of hand-made traces."""

from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from experiments.run.granted import grant_kinds, refuse_grants
from experiments.run.targets import Evidences, MisfitError, pick_targets, refuse_misfit
from experiments.run.view import build_view
from experiments.settings.plugins import AttackSettings
from experiments.settings.schema import SettingsError
from leakbed.contract_checks import read_evidence
from leakbed.contracts import (
    BOTTOM,
    BOTTOM_QUERIES,
    PAIRS,
    ROUND_BOTTOMS,
    BrokenPluginError,
    Evidence,
    EvidenceKind,
    Seat,
    Seen,
    ThreatModel,
    UnfitViewError,
    View,
)
from leakbed.contracts.threat import Granted
from leakbed.events import Bottom, Event, Sealed, Target
from leakbed.oracle.truth import AnswerKey
from leakbed.tap.trace import Trace
from tests.support.own_evidence import ROWS
from tests.support.small_traces import CPU, Make, make_trace, smashed, update

FED_SERVER = ThreatModel(seat=Seat.FED_SERVER, evidence=frozenset({Evidence.UPDATE}))
PLAIN = AttackSettings(name="mine:Own")


@pytest.fixture
def make(tmp_path: Path) -> Make:
    return partial(make_trace, tmp_path / "trace")


def _bottoms(node: int, *, round_: int = 2) -> list[Event]:
    """Return a bottom as a node got it, as it sent it back, and the average as it is evaluated."""
    start = {k: v for k, v in update(node).before.items() if k.startswith("0.")}
    values = ((0, False), (round_, True), (99, False))
    return [
        Bottom(node=node, round=round_, arrays={k: v + more for k, v in start.items()}, up=up)
        for more, up in values
    ]


def _view(trace: Trace, threat: ThreatModel) -> View:
    evidences = Evidences.of(trace)
    if Evidence.UPDATE in threat.evidence or threat.evidence_kinds:
        evidences = evidences.by_node(trace)
    targets = pick_targets(evidences, threat, when="training", count=8)
    kinds, _ = grant_kinds(threat, PLAIN, trace, targets, answers=None, device=CPU, stream=3)
    return build_view(trace, evidences, threat, targets, device=CPU, kinds=kinds)


def test_a_fed_server_reads_relayed_bottoms_and_no_smashed_data(make: Make) -> None:
    trace = make([*_bottoms(0), *_bottoms(1), smashed(0, 0), smashed(0, 1), smashed(1, 0, rows=4)])
    view = _view(trace, FED_SERVER)
    assert (view.targets, view.rows, view.smashed) == (2, 4, None)
    assert view.before is not None
    assert view.after is not None
    assert sorted(view.before) == ["0.bias", "0.weight"]
    assert view.before["0.bias"][:, 0].tolist() == [0, 1]
    assert view.after["0.bias"][:, 0].tolist() == [2, 3]
    assert view.num_examples is not None
    assert view.num_examples.tolist() == [4, 4]


def test_who_hears_everything_reads_bottoms_beside_rows(make: Make) -> None:
    trace = make([*_bottoms(0), smashed(0, 0), *_bottoms(1), smashed(1, 0)])
    both = frozenset({Evidence.UPDATE, Evidence.SMASHED})
    view = _view(trace, ThreatModel(seat=Seat.EAVESDROPPER, evidence=both))
    assert view.smashed is not None
    assert view.after is not None
    assert view.smashed[:, 0].tolist() == [0, 100, 1, 101]
    assert view.after["0.bias"][:, 0].tolist() == [2, 3, 2, 3]
    assert view.rows == 1
    with pytest.raises(MisfitError, match="smashed, which a fed-server does not see"):
        refuse_misfit(ThreatModel(seat=Seat.FED_SERVER, evidence=both), updates=False)


@pytest.mark.parametrize("kinds", [{Evidence.UPDATE}, {ROUND_BOTTOMS}])
def test_a_sealed_bottom_is_said_to_be_sealed(make: Make, kinds: set[Any]) -> None:
    events = [
        Sealed(node=0, round=number, size=9, up=up) for number in (1, 2) for up in (False, True)
    ]
    trace = make([*events, smashed(0, 0)])
    threat = ThreatModel(seat=Seat.FED_SERVER, evidence=frozenset(kinds))
    with pytest.raises(MisfitError, match=r"sealed.*set protocol.bottoms = 'relayed'"):
        _view(trace, threat)


def test_several_rounds_are_told_apart_and_a_missing_one_is_named(tmp_path: Path) -> None:
    threat = ThreatModel(seat=Seat.FED_SERVER, evidence=frozenset({ROUND_BOTTOMS}))
    last = [*_bottoms(0), *_bottoms(1), smashed(0, 0), smashed(1, 0)]
    first = [*_bottoms(0, round_=1), *_bottoms(1, round_=1)]
    view = _view(make_trace(tmp_path / "whole", [*first, *last]), threat)
    bias = view.granted["round-bottoms"]["after/0.bias"]
    assert bias.shape == (2, 2, 32)
    assert bias[:, :, 0].tolist() == [[1, 2], [2, 3]]
    assert view.granted["round-bottoms"]["before/0.bias"][:, :, 0].tolist() == [[0, 0], [1, 1]]
    with pytest.raises(MisfitError, match=r"lacks round 1; record the run with keep_rounds"):
        _view(make_trace(tmp_path / "late", last), threat)


@pytest.mark.parametrize(
    ("left", "said"), [([1, 2], "node 1 was sent"), ([1], "node 1 was sent"), ([0], "node 1 sent")]
)
def test_a_relayed_bottom_that_passed_one_way_alone_is_named(
    make: Make, left: list[int], said: str
) -> None:
    events = [*_bottoms(0), *(_bottoms(1)[place] for place in left)]
    with pytest.raises(MisfitError, match=f"lacks the bottom that {said}.* in round 2; record"):
        _view(make([*events, smashed(0, 0), smashed(1, 0)]), FED_SERVER)


@pytest.mark.parametrize("left", [[1], [1, 2]])
def test_a_bottom_that_was_sent_back_but_not_sent_down_is_named(
    make: Make, left: list[int]
) -> None:
    """The average that a node evaluates afterwards is not what it began the round from."""
    threat = ThreatModel(seat=Seat.FED_SERVER, evidence=frozenset({ROUND_BOTTOMS}))
    first = [*_bottoms(0, round_=1), *_bottoms(1, round_=1)]
    last = [*_bottoms(0), *(_bottoms(1)[place] for place in left)]
    said = "node 1 sent a bottom back in round 2, and the trace has none that was sent down to it"
    with pytest.raises(UnfitViewError, match=said):
        _view(make([*first, *last, smashed(0, 0), smashed(1, 0)]), threat)


def test_evidence_of_ones_own_is_read_from_what_its_seat_sees(make: Make) -> None:
    trace = make([smashed(0, 0), smashed(1, 0)])
    rows = _view(trace, ThreatModel(seat=Seat.SERVER, evidence=frozenset({ROWS}))).granted["rows"]
    assert rows[:, 0].tolist() == [0, 100, 1, 101]
    nodes: list[int] = []

    def noted(seen: Seen) -> torch.Tensor:
        nodes.extend(event.node for event in seen.events)
        return torch.zeros(len(seen.targets))

    own = EvidenceKind(name="own", in_words="its", reads=frozenset({"smashed-up"}), tensors=noted)
    view = _view(trace, ThreatModel(seat=Seat.CLIENT, evidence=frozenset({own})))
    assert view.targets == 2
    assert nodes == [0]


def test_a_seat_that_does_not_see_the_messages_is_refused_by_the_evidences_name() -> None:
    threat = ThreatModel(seat=Seat.SERVER, evidence=frozenset({ROUND_BOTTOMS}))
    said = r"'round-bottoms'.*a server does not see: bottom; a seat that sees them is fed-server or"
    with pytest.raises(MisfitError, match=said):
        refuse_misfit(threat, updates=False)


def test_messages_that_a_trace_lacks_are_named(make: Make) -> None:
    kind = replace(ROWS, reads=frozenset({"smashed-up", "cut-gradient-down"}))
    said = r"'rows' is made of cut-gradient-down, of which.*it holds smashed-up"
    with pytest.raises(MisfitError, match=said):
        _view(make([smashed(0, 0)]), ThreatModel(seat=Seat.SERVER, evidence=frozenset({kind})))


@pytest.mark.parametrize(
    ("answer", "said"),
    [
        (lambda _: 1 / 0, r"the code of evidence rows raised ZeroDivisionError.*test_granted.py"),
        (lambda _: torch.zeros(3), r"returned a tensor of shape \(3,\) for 2 targets"),
        (lambda _: {"a": np.zeros(2)}, r"returned a numpy.ndarray where .* belongs as a"),
        (lambda _: {}, "returned no tensors"),
    ],
)
def test_evidence_that_breaks_is_blamed_by_name(answer: Any, said: str) -> None:
    place = Target(node=0, round=1, step=0, row=0, phase=smashed(0, 0).phase)
    seen = Seen(seat=Seat.SERVER, events=(), targets=(place, place), about={})
    with pytest.raises(BrokenPluginError, match=said):
        read_evidence(replace(ROWS, tensors=answer), seen, CPU)


@pytest.mark.parametrize(
    ("grants", "said"),
    [
        ({}, r"mine:Own needs bottom, pairs, .*grants = \['bottom', 'pairs'\]"),
        ({"bottom": {}, "pairs": {}, "labels": {}}, "grants has 'labels', which its threat model"),
        ({"bottom": {}, "pairs": {"cuont": 3}}, "did you mean 'count'"),
        ({"bottom": {}, "pairs": {"count": "3"}}, "count of pairs is '3'; give a int, such as 50"),
    ],
)
def test_what_is_not_granted_or_not_needed_is_refused(grants: dict[str, Any], said: str) -> None:
    threat = ThreatModel(
        seat=Seat.SERVER, evidence=frozenset({ROWS}), needs=frozenset({BOTTOM, PAIRS})
    )
    with pytest.raises(SettingsError, match=said):
        refuse_grants(threat, AttackSettings(name="mine:Own", grants=grants))
    refuse_grants(threat, AttackSettings(name="mine:Own", grants={"bottom": {}, "pairs": {}}))


def test_knowledge_needs_the_answer_key(make: Make) -> None:
    threat = ThreatModel(
        seat=Seat.SERVER, evidence=frozenset({Evidence.SMASHED}), needs=frozenset({BOTTOM})
    )
    with pytest.raises(MisfitError, match="told bottom, which needs the answer key"):
        _view(make([smashed(0, 0)]), threat)


def _key(*defenses: tuple[str, dict[str, float]]) -> AnswerKey:
    images, labels = torch.rand(6, 1, 4, 4), torch.arange(6) % 3
    return AnswerKey(
        images=images,
        labels=labels,
        test_images=images,
        test_labels=labels,
        order={(0, 2, 0): [0, 1]},
        num_classes=3,
        public_images=images,
        public_labels=labels,
        bottom={k: v + 0.1 for k, v in update(0).before.items() if k.startswith("0.")},
        training={"defenses": [list(each) for each in defenses]},
    )


def test_queries_are_answered_behind_the_nodes_defences_and_a_told_bottom_is_bare(
    make: Make,
) -> None:
    threat = ThreatModel(
        seat=Seat.SERVER,
        evidence=frozenset({Evidence.SMASHED}),
        needs=frozenset({BOTTOM, BOTTOM_QUERIES}),
    )
    trace, images = make([smashed(0, 0)]), torch.rand(3, 1, 4, 4)
    targets = pick_targets(Evidences.of(trace), threat, when="training", count=8)

    def granted(key: AnswerKey) -> Granted:
        return grant_kinds(threat, PLAIN, trace, targets, answers=key, device=CPU, stream=3)[0]

    plain, noised = granted(_key()), granted(_key(("smashed-noise", {"sigma": 0.5})))
    told = plain["bottom"](images)
    assert torch.equal(told, noised["bottom"](images))
    assert torch.equal(told, plain["bottom-queries"](images))
    first, second = noised["bottom-queries"](images), noised["bottom-queries"](images)
    assert 0.2 < float((first - told).std()) < 0.9
    assert not torch.equal(first, second), "each answer has noise of its own"
    assert torch.equal(first, noised["bottom-queries"].renewed()(images))
    with pytest.raises(MisfitError, match="'nowhere:Mask', and importing it runs the code there"):
        granted(_key(("nowhere:Mask", {})))["bottom-queries"](images)
    with pytest.raises(MisfitError, match="the answer key holds no bottom"):
        granted(replace(_key(), bottom=None))
