"""Targets are the last round's messages, the same samples in both families."""

from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from safetensors.numpy import load

from experiments.results.cards import Exposure
from experiments.run.targets import Evidences, MisfitError, exposure, pick_targets
from experiments.settings.plugins import round_number
from leakbed.contracts import Evidence, Seat, ThreatModel
from leakbed.events import Phase, SmashedUp
from leakbed.tap.trace import Trace
from tests.support.small_traces import SMASHED, UPDATE, Make, make_trace, smashed, update


@pytest.fixture
def make(tmp_path: Path) -> Make:
    return partial(make_trace, tmp_path / "trace")


def test_only_the_last_round_is_attacked(make: Make) -> None:
    early = SmashedUp(node=0, round=1, step=0, smashed=np.zeros((2, 32), np.float32))
    targets = pick_targets(
        Evidences.of(make([early, smashed(0, 0)])), SMASHED, when="training", count=9
    )
    assert {target.round for target in targets} == {2}


def test_another_round_is_attacked_where_it_is_asked_for(make: Make) -> None:
    rounds = [replace(smashed(0, 0), round=number) for number in (1, 3, 6)]
    trace = make([*rounds])
    for collect, number in (("first", 1), ("middle", 3), ("last", 6), (3, 3), (6, 6)):
        evidences = Evidences.of(trace, collect)
        targets = pick_targets(evidences, SMASHED, when="training", count=9)
        assert {target.round for target in targets} == {number}, collect
    with pytest.raises(MisfitError, match=r"keeps round 1, 3, 6; record .* keep_rounds = 'all'"):
        Evidences.of(trace, 2)
    with pytest.raises(MisfitError, match="round 7 was not trained: the trace ends with round 6"):
        Evidences.of(trace, 7)


def test_the_middle_of_an_even_number_of_rounds_is_the_earlier_one() -> None:
    assert [round_number("middle", last=last) for last in (1, 2, 3, 4, 5)] == [1, 1, 2, 2, 3]


def test_a_client_attacks_its_own_rows_and_a_server_everybodys(make: Make) -> None:
    evidences = Evidences.of(make([smashed(node, step) for step in (0, 1) for node in (1, 2)]))
    for evidence in (Evidence.CUT_GRADIENT, Evidence.NOTHING):
        threat = ThreatModel(seat=Seat.CLIENT, evidence=frozenset({evidence}))
        targets = pick_targets(evidences, threat, when="training", count=9)
        assert [(t.node, t.step, t.row) for t in targets] == [
            (1, 0, 0),
            (1, 0, 1),
            (1, 1, 0),
            (1, 1, 1),
        ]
    targets = pick_targets(evidences, SMASHED, when="training", count=9)
    assert {target.node for target in targets} == {1, 2}


def test_of_updates_a_client_has_its_own_too(make: Make) -> None:
    averaged = Evidences.of(make([update(2), update(1)]))
    client = replace(UPDATE, seat=Seat.CLIENT)
    own = pick_targets(averaged, client, when="training", count=9)
    assert [target.node for target in own] == [1]
    everybody = pick_targets(averaged, UPDATE, when="training", count=9)
    assert {target.node for target in everybody} == {1, 2}


def test_of_test_rows_a_client_has_those_it_evaluated(make: Make) -> None:
    tests = [smashed(node, 4, phase=Phase.EVALUATE) for node in (2, 1)]
    evidences = Evidences.of(make([smashed(0, 0), *tests]))
    client = replace(SMASHED, seat=Seat.CLIENT)
    own = pick_targets(evidences, client, when="inference", count=9)
    assert [(target.node, target.row) for target in own] == [(1, 0), (1, 1)]
    everybody = pick_targets(evidences, SMASHED, when="inference", count=9)
    assert {target.node for target in everybody} == {1, 2}


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


def test_the_wrong_family_says_which_fits(make: Make) -> None:
    with pytest.raises(MisfitError, match="'fedavg'"):
        pick_targets(Evidences.of(make([smashed(0, 0)])), UPDATE, when="training", count=1)
    evidences = Evidences(updates=[update(0)], smashed={}, gradients={}, evaluated=[])
    with pytest.raises(MisfitError, match="'vanilla-split'"):
        pick_targets(evidences, SMASHED, when="training", count=1)


def test_rounds_that_are_not_attacked_are_not_read(
    make: Make, monkeypatch: pytest.MonkeyPatch
) -> None:
    early = SmashedUp(node=0, round=1, step=0, smashed=np.zeros((2, 32), np.float32))
    trace, read = make([early, early, smashed(0, 0), smashed(1, 0)]), []
    monkeypatch.setattr("leakbed.tap.segments.load", lambda data: read.append(data) or load(data))
    assert set(Evidences.of(trace).smashed) == {(0, 0), (1, 0)}
    assert len(read) == 4, "smashed data and labels of two batches"


def test_an_update_belongs_to_training(make: Make) -> None:
    evidences = Evidences.of(make([update(0)]))
    with pytest.raises(MisfitError, match="when = 'training'"):
        pick_targets(evidences, UPDATE, when="inference", count=1)


def test_a_trace_of_nothing_has_no_targets(make: Make) -> None:
    with pytest.raises(MisfitError, match="neither updates nor smashed data"):
        pick_targets(Evidences.of(make([])), SMASHED, when="training", count=1)


def test_of_feature_parties_the_first_alone_is_attacked(make: Make) -> None:
    events = [
        *(smashed(node, 0) for node in (1, 0)),
        *(smashed(node, 4, phase=Phase.EVALUATE) for node in (1, 0)),
    ]
    evidences = Evidences.of(make(events, divides="features", nodes=2))
    for when in ("training", "inference"):
        targets = pick_targets(evidences, SMASHED, when=when, count=9)
        assert [(target.node, target.row) for target in targets] == [(0, 0), (0, 1)]


def exposed(trace: Trace, threat: ThreatModel, *, when: str = "training", **settings: Any) -> Any:
    evidences = Evidences.of(trace)
    count = settings.pop("count", 9)
    targets = pick_targets(evidences, threat, when=when, count=count)
    return exposure(evidences, targets, trace.about, **{"in_turn": False, **settings})


def test_an_update_says_its_round_rows_and_steps(make: Make, tmp_path: Path) -> None:
    trace = make([update(0, examples=8), update(1, examples=6)], batch_size=4, local_steps=None)
    found = exposed(trace, UPDATE)
    assert found == Exposure(round=2, trained="yes", mode=None, rows=8, steps=2)
    first = [replace(update(0), round=1, examples=None)]
    early = make_trace(tmp_path / "early", first, modes={"train": "train"})
    assert exposed(early, UPDATE) == Exposure(
        round=1, trained="no", mode="train", rows=None, steps=1
    )


def test_smashed_rows_say_whether_a_step_came_before_them(make: Make) -> None:
    sent = [replace(smashed(node, step, rows=3), round=1) for node in (0, 1) for step in (0, 1)]
    later = replace(smashed(0, 0, rows=5, phase=Phase.EVALUATE), round=1)
    trace = make([*sent, later], modes={"train": "train", "evaluate": "eval"})
    untrained = exposed(trace, SMASHED, count=6)
    assert untrained == Exposure(round=1, trained="no", mode="train", rows=3)
    assert exposed(trace, SMASHED, count=7).trained == "partly"
    # In turn the second node starts from what the first left.
    assert exposed(trace, SMASHED, count=6, in_turn=True).trained == "partly"
    assert exposed(trace, SMASHED, count=1, in_turn=True).trained == "no"
    new = exposed(trace, SMASHED, when="inference")
    assert new == Exposure(round=1, trained="yes", mode="eval", rows=5)
