"""What detectors found reaches the card, also where a node stopped; passive attacks go unseen."""

from collections.abc import Iterator
from dataclasses import replace
from math import nan
from pathlib import Path
from typing import Any

import pytest
from safetensors.torch import load_file

from attacks import ADVERSARIES
from clients import node_app
from experiments.results.cards import Card
from experiments.run.alarms import detected, found, timed
from experiments.run.prepare import prepare
from experiments.run.runner import run
from experiments.run.train import train
from experiments.run.training_run import TrainingRun
from experiments.settings.cells import Hijacking, cells
from experiments.settings.load import load_settings
from leakbed.events import CutGradientDown, SmashedUp
from leakbed.flower_internals import task_identity
from leakbed.grids import LocalGrid
from leakbed.oracle.truth import AnswerKey
from leakbed.tap.trace import Trace
from leakbed.wire.fields import Finding
from strategies.node_channel import NodeStopped
from tests.support.adversaries import Doubling

ALWAYS = {"name": "gradients-scrutinizer", "every": 4, "offset": 100.0}
NEVER = {"name": "gradients-scrutinizer", "every": 4, "offset": -100.0}
TABLE: dict[str, Any] = {
    "name": "watched",
    "data": {"name": "tests.support.tiny:images", "nodes": 2, "partition": "linear", "public": 0.2},
    "model": {"name": "tests.support.slow_nodes:stateful", "cut": 3},
    "protocol": {"name": "vanilla-split", "batch_size": 4, "local_steps": 5, "rounds": 2},
    "attack": [
        {"name": "smashed-as-image", "targets": 4},
        {"name": "fsha", "targets": 4, "checkpoint_every": 3},
    ],
}
PROTOCOLS = {
    "vanilla-split": {},
    "u-shaped": {"model.upper_cut": 5},
    "splitfed-v1": {},
    "splitfed-v2": {},
    "parallel-split": {},
    "lockstep": {"protocol.name": "parallel-split", "protocol.sync": "step"},
}


@pytest.fixture(autouse=True)
def quick(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    monkeypatch.setitem(ADVERSARIES, "fsha", Doubling)
    with task_identity():
        yield


def ran(folder: Path, defense: dict[str, Any], **changes: Any) -> list[Card]:
    return run({**TABLE, "defense": [defense], **changes}, out=folder)


def runs(folder: Path) -> list[TrainingRun]:
    return [r for each in (folder / "runs").iterdir() if (r := TrainingRun.read(each)) is not None]


FOUND = Finding(alarm=-1, score=nan, last=nan, gradients=3)


def test_a_finding_without_alarm_or_score_is_plain_json() -> None:
    plain = {"alarm": None, "score": None, "last": None, "gradients": 3}
    detection = found({1: {"d": FOUND}, 0: {"d": FOUND}}, None)
    assert detection == {
        "hijacked": False,
        "nodes": {"0": {"d": plain}, "1": {"d": plain}},
        "stopped": None,
    }
    assert list(detection["nodes"]) == ["0", "1"]
    assert found({}, None) == timed({}, {}, hijacked=True) == {}


def test_what_the_stopping_node_found_replaces_what_it_said_before() -> None:
    stop = NodeStopped(1, "train.split", "d", {"d": Finding(5, 0.1, 0.1, 5)})
    detection = found({1: {"d": FOUND}}, stop)
    assert detection["stopped"] == {"node": 1, "by": "d"}
    assert detection["nodes"]["1"]["d"]["alarm"] == 5


def test_an_alarm_has_its_place_among_all_forged_gradients() -> None:
    alarms = {0: {"d": Finding(2, 0.1, 0.1, 3)}, 1: {"d": Finding(1, 0.1, 0.1, 3), "e": FOUND}}
    forged = {0: [1, 2, 3], 1: [4, 5, 6]}
    detection = timed(found(alarms, None), forged, hijacked=True)
    assert detection["hijacked"]
    assert detection["nodes"]["0"]["d"]["iteration"] == 2
    assert detection["nodes"]["1"]["d"]["iteration"] == 4
    assert detection["nodes"]["1"]["e"]["iteration"] is None


@pytest.mark.parametrize(("every", "before"), [(3, 3), (4, 4), (5, None)])
def test_the_last_checkpoint_up_to_the_alarm_is_what_was_read_before_it(
    every: int, before: int | None
) -> None:
    points = [{"step": step, "ssim": step / 10} for step in range(every, 20, every)]
    alarms = {0: {"d": Finding(4, 0.1, 0.1, 9)}}
    detection = timed(found(alarms, None), {0: list(range(1, 20))}, hijacked=True)
    done = TrainingRun(folder=Path(), utility={}, cost={}, checkpoints=points, detection=detection)
    read = detected(done)["nodes"]["0"]["d"]["before"]
    assert read == (None if before is None else {"step": before, "ssim": before / 10})
    assert "before" not in detected(replace(done, detection=found(alarms, None)))["nodes"]["0"]["d"]


def test_a_card_says_when_each_node_was_alarmed_and_what_was_read_by_then(tmp_path: Path) -> None:
    passive, hijacked = ran(tmp_path, ALWAYS)
    assert not passive.detection["hijacked"]
    assert hijacked.detection["hijacked"]
    assert passive.detection["stopped"] is hijacked.detection["stopped"] is None
    nodes: Any = hijacked.detection["nodes"]
    first, second = (nodes[node]["gradients-scrutinizer"] for node in ("0", "1"))
    assert (first["alarm"], first["iteration"], first["gradients"]) == (4, 4, 10)
    assert (second["alarm"], second["iteration"]) == (4, 9)  # the other's five came first
    assert (first["before"]["step"], second["before"]["step"]) == (3, 9)
    assert 0 <= first["score"] <= first["last"] < 0.5
    beside: Any = hijacked.control
    assert not beside["detection"]["hijacked"]
    assert beside["detection"]["nodes"] != nodes
    honest: Any = passive.detection
    for node in ("0", "1"):  # the control run is the honest one
        plain = dict(beside["detection"]["nodes"][node]["gradients-scrutinizer"])
        del plain["iteration"]
        assert plain == honest["nodes"][node]["gradients-scrutinizer"]


def test_a_run_that_a_node_stopped_is_a_result(tmp_path: Path) -> None:
    cards = ran(tmp_path, {**ALWAYS, "stop": True})
    assert [card.status for card in cards] == ["done", "done"]
    for card in cards:
        assert card.detection["stopped"] == {"node": 0, "by": "gradients-scrutinizer"}
        assert list(card.detection["nodes"]) == ["0"]  # type: ignore[arg-type]
        assert card.utility == {}
        assert card.scores["targets"] == 4
    found_: Any = cards[1].detection["nodes"]
    assert found_["0"]["gradients-scrutinizer"]["before"]["step"] == 4, "measured at the very end"
    for each in runs(tmp_path):
        events = list(Trace(each.trace).events())
        assert sum(isinstance(event, CutGradientDown) for event in events) == 4
        assert sum(isinstance(event, SmashedUp) for event in events) == 4
        assert AnswerKey.read(each.answers).bottom is None
        if each.decoded.exists():
            assert len(load_file(each.decoded)) == 4


@pytest.mark.parametrize("protocol", PROTOCOLS)
def test_every_protocol_ends_where_a_node_stops(tmp_path: Path, protocol: str) -> None:
    changes = {"protocol.name": protocol, **PROTOCOLS[protocol]}
    chosen = [f'{k}="{v}"' if isinstance(v, str) else f"{k}={v}" for k, v in changes.items()]
    table = {**TABLE, "attack": TABLE["attack"][:1], "defense": [{**ALWAYS, "stop": True}]}
    settings = cells(load_settings(table, chosen))[0].training
    hijacking = Hijacking(name="fsha", own={}, checkpoint_every=100)
    prepared = prepare(replace(settings, adversary=hijacking), root=None)
    grid = LocalGrid(node_app, nodes=2)
    done = train(prepared, grid, tmp_path / "run", roster=grid.roster)
    assert done.detection["stopped"] == {"node": 0, "by": "gradients-scrutinizer"}
    alarmed = done.detection["nodes"]["0"]["gradients-scrutinizer"]
    assert alarmed["alarm"] == alarmed["gradients"] == 4
    assert done.checkpoints[-1]["step"] >= alarmed["iteration"]
    assert done.utility == {}


def test_a_run_with_a_detector_that_never_stops_keeps_its_last_round_alone(tmp_path: Path) -> None:
    ran(tmp_path, {**NEVER, "stop": True}, attack=TABLE["attack"][:1])
    ran(tmp_path / "b", NEVER, attack=TABLE["attack"][:1])
    (every,), (last,) = runs(tmp_path), runs(tmp_path / "b")
    assert {e.round for e in Trace(every.trace).events(SmashedUp)} == {1, 2}
    assert {e.round for e in Trace(last.trace).events(SmashedUp)} == {2}
    assert every.utility == last.utility
    assert every.detection == last.detection


def test_detectors_see_nothing_of_passive_attacks(tmp_path: Path) -> None:
    """They read a trace: the run is the same to the last bit, whoever reads it, and unalarmed."""
    unsplit = {
        "name": "unsplit",
        "targets": 1,
        "outer_steps": 2,
        "input_steps": 2,
        "model_steps": 2,
    }
    attacked = ran(tmp_path / "a", NEVER, attack=[TABLE["attack"][0], unsplit])
    alone = ran(tmp_path / "b", NEVER, attack=[{"name": "constant-image"}])
    assert [card.status for card in attacked] == ["done", "done"]
    assert attacked[0].detection == attacked[1].detection == alone[0].detection
    nodes: Any = alone[0].detection["nodes"]
    assert [nodes[node]["gradients-scrutinizer"]["alarm"] for node in nodes] == [None, None]
    (one,), (two,) = runs(tmp_path / "a"), runs(tmp_path / "b")
    assert Trace(one.trace).records == Trace(two.trace).records


def test_without_detectors_a_card_says_nothing_of_them(tmp_path: Path) -> None:
    cards = ran(tmp_path, {"name": "none"})
    assert cards
    for card in cards:
        assert card.detection == {}
        assert (card.control or {}).get("detection", {}) == {}
