"""Protocols of one's own whose nodes do something new, and whose server takes what comes first."""

from typing import Any, ClassVar

import numpy as np
import pytest
import torch
from flwr.app import ConfigRecord, Context, Message, RecordDict
from torch import nn

from leakbed.events import CutGradientDown, Event, Extras, SmashedUp
from leakbed.grids import LocalGrid
from leakbed.grids.base import NodeFailed
from leakbed.seeds import derive
from leakbed.wire.bounds import Asked, Bounds
from leakbed.wire.fields import OWN, Carried, Tensor, Whole
from leakbed.wire.messages import (
    OWN_EVALUATE,
    OWN_STEP,
    SETUP,
    NodeRequest,
    SplitReply,
    SplitRequest,
)
from leakbed.wire.records import CONFIG, GRADIENT, ROUND, SMASHED, WireError
from strategies import PROTOCOLS
from strategies.node_channel import Clock, NodeChannel, NodeStopped
from tests.support import double_models, guarded, several_nodes, tiny
from tests.support.own_requests import (
    AS_THEY_COME,
    DELAYS,
    LOCAL_LOSS,
    PLAIN_STEPS,
    LocalStep,
    local_loss,
)

pytestmark = pytest.mark.usefixtures("identity")


@pytest.fixture(autouse=True)
def listed(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(PROTOCOLS, "local-loss", LOCAL_LOSS)
    monkeypatch.setitem(PROTOCOLS, "as-they-come", AS_THEY_COME)
    monkeypatch.setitem(PROTOCOLS, "plain-steps", PLAIN_STEPS)


def nothing(reply: Message) -> None:
    """Changes no reply; but what could change one is sent messages."""


ROADS: dict[str, dict[str, Any]] = {
    "hand to hand": {},
    "messages": {"alter": nothing},
    "messages, any process": {"alter": nothing, "resident": False},
}


def test_a_loss_at_the_node_is_that_of_a_plain_loop() -> None:
    plan = several_nodes.plan(momentum=0.9, learning_rate=0.1)
    found = several_nodes.trained("local-loss", plan, nodes=2, rounds=1)
    network = double_models.architecture().parts(derive(tiny.SEED, "victim-init"))
    both = [plan.optimiser(each.parameters()) for each in (network.bottom, network.top)]
    for cell in several_nodes.cells(plan, nodes=2):
        images, labels = cell.rows()
        bottom = plan.optimiser(network.bottom.parameters())
        for batch in cell.batches(1, len(images)):
            smashed = network.bottom(images[batch])
            bottom.zero_grad()
            local_loss(smashed, labels[batch], tiny.CLASSES).backward()
            bottom.step()
            both[1].zero_grad()
            nn.functional.cross_entropy(network.top(smashed.detach()), labels[batch]).backward()
            both[1].step()
    expected = {**network.bottom.state_dict(), **network.top.state_dict()}
    assert expected.keys() == found.keys()
    assert all(torch.equal(expected[name], found[name]) for name in found)


@pytest.mark.parametrize("road", ROADS)
def test_every_road_leads_to_the_same_bits_and_events(road: str) -> None:
    there, here = list[Event](), list[Event]()
    plan = several_nodes.plan(local_steps=None)
    noise = {"at_nodes": [("smashed-noise", {"sigma": 0.1})]}
    first = several_nodes.trained("local-loss", plan, events=there, **noise)
    found = several_nodes.trained("local-loss", plan, events=here, **noise, **ROADS[road])
    assert all(torch.equal(first[name], found[name]) for name in first)
    assert [(type(each), each.node, each.step) for each in here] == [
        (type(each), each.node, each.step) for each in there
    ]
    smashed = [each.smashed for each in here if isinstance(each, SmashedUp)]
    assert len(smashed) == 2 * (2 + 3 + 4 + 6)
    assert all(
        (a == b.smashed).all()
        for a, b in zip(smashed, (e for e in there if isinstance(e, SmashedUp)), strict=True)
    )
    assert not [each for each in here if isinstance(each, CutGradientDown)]
    own = [each for each in here if isinstance(each, Extras)]
    assert len(own) == len(smashed)
    assert {tuple(record) for each in own for record in each.content.values()} == {("local-loss",)}


@pytest.mark.parametrize("road", ROADS)
def test_a_gradient_may_come_with_the_next_request(road: str) -> None:
    chosen: dict[str, Any] = {
        "at_nodes": [("smashed-noise", {"sigma": 0.1})],
        "model": tiny.architecture("stateful"),
        "nodes": 2,
    }
    plan = several_nodes.plan(momentum=0.9)
    there, here = list[Event](), list[Event]()
    first = several_nodes.trained("vanilla-split", plan, events=there, **chosen)
    found = several_nodes.trained("plain-steps", plan, events=here, **chosen, **ROADS[road])
    assert all(torch.equal(first[name], found[name]) for name in first)
    assert [(type(each), each.node, each.round, each.step) for each in here] == [
        (type(each), each.node, each.round, each.step) for each in there
    ]


@pytest.mark.parametrize("road", ROADS)
def test_a_detector_that_stops_its_node_is_told_at_once(road: str) -> None:
    stops = [("witness", {"alarm": 2, "stop": True})]
    events = list[Event]()
    with guarded.catalogued(), pytest.raises(NodeStopped) as caught:
        several_nodes.trained(
            "plain-steps",
            several_nodes.plan(),
            nodes=1,
            events=events,
            at_nodes=stops,
            **ROADS[road],
        )
    assert (caught.value.node, caught.value.by) == (0, "witness")
    assert [each.step for each in events if isinstance(each, SmashedUp)] == [0, 1]


def test_a_process_that_lost_the_round_is_no_place_to_go_on() -> None:
    cell = tiny.cell(plan=several_nodes.plan())
    (node,) = (grid := LocalGrid(tiny.node_app, nodes=1)).get_node_ids()
    setup = Message(RecordDict({"cell": cell.record()}), dst_node_id=node, message_type=SETUP)
    grid.send_and_receive([setup])
    channel = NodeChannel(grid, timeout=None)
    with pytest.raises(NodeFailed, match="round 2, step 1 came to a process that served none"):
        channel.exchange(node, OWN_STEP, LocalStep(round=2, step=1))


def test_an_evaluation_needs_no_last_row() -> None:
    class Rows(NodeRequest):
        TYPE = OWN_EVALUATE
        FIELDS: ClassVar = {"round": Whole(CONFIG, ROUND), "start": Whole(CONFIG, "start")}
        round, start = 1, 0

        def answer(self, context: Context) -> SplitReply:
            return SplitReply(steps=1, examples=1)

    asked = Asked.by_call(OWN_EVALUATE, 1, Rows())
    smashed = np.zeros((3, 2), np.float32)
    reply = SplitReply(steps=1, examples=1, smashed=smashed)
    Bounds(batch_size=2, row_bytes=8, numbers=smashed.dtype).refuse_answer(asked, reply)


@pytest.mark.parametrize("road", ["hand to hand", "messages"])
def test_batches_are_taken_as_they_arrive(road: str) -> None:
    events = list[Event]()
    plan = several_nodes.plan(local_steps=2)
    found = several_nodes.trained("as-they-come", plan, rounds=1, events=events, **ROADS[road])
    taken = [(each.node, each.step) for each in events if isinstance(each, SmashedUp)]
    arrivals = [
        (delay * (step + 1) + step / 1000, (node, step))
        for node, delay in enumerate(DELAYS)
        for step in (0, 1)
    ]
    assert taken == [place for _, place in sorted(arrivals)]
    turns = several_nodes.trained("splitfed-v2", plan, rounds=1)
    assert not all(torch.equal(turns[name], found[name]) for name in found)


def test_a_clock_goes_on_with_what_is_received() -> None:
    plan = several_nodes.plan()
    grid = several_nodes.grid(plan, nodes=2)
    clock = Clock(lambda node, before: (3.0, 1.0)[node] * (before + 1))
    channel = NodeChannel(grid, timeout=None, clock=clock)
    weights = several_nodes.built("vanilla-split", plan).bottom
    assert weights is not None
    for node in grid.get_node_ids():
        opening = SplitRequest(round=1, step=0, bottom=weights(), bottoms="relayed")
        channel.send(node, "train.split", opening)
    slow, fast = grid.get_node_ids()
    assert channel.first() == fast
    channel.receive(fast)
    assert clock.now == 1.0
    channel.receive(slow)
    assert clock.now == 3.0
    with pytest.raises(RuntimeError, match="no node owes a reply"):
        channel.first()


@pytest.mark.parametrize("seconds", [-1.0, float("nan"), float("inf")])
def test_a_clock_that_goes_back_is_refused(seconds: float) -> None:
    with pytest.raises(ValueError, match=r"request 0 to node 7 takes .* finite number of seconds"):
        Clock(lambda node, before: seconds).arrival(7)


def test_a_class_that_nobody_imported_is_refused_and_not_imported() -> None:
    records = replace_class(LocalStep(round=1, step=0).records(), "os:system")
    message = Message(records, dst_node_id=1, message_type=OWN_STEP)
    with pytest.raises(WireError, match="class 'os:system', which was not imported here"):
        NodeRequest.of(message)


def replace_class(records: RecordDict, path: str) -> RecordDict:
    records[OWN] = ConfigRecord({"class": path})
    return records


def test_a_reply_of_another_class_is_a_failure_of_its_node(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    def answer(self: LocalStep, context: Context) -> SplitReply:
        return SplitReply(steps=1, examples=1, step=0)

    monkeypatch.setattr(LocalStep, "answer", answer)
    for road in ROADS.values():
        with pytest.raises(NodeFailed, match=r"node 0 .*(SplitReply came|local-loss)"):
            several_nodes.trained("local-loss", several_nodes.plan(), **road)


@pytest.mark.parametrize(
    ("fields", "reply", "said"),
    [
        ({}, SplitReply, r"no server-round and no step in its FIELDS"),
        ({"gradient": Tensor(GRADIENT, "gradient")}, SplitReply, "look for in a SplitRequest"),
        ({}, {"own": Tensor(SMASHED, "smashed")}, "look for in a SplitReply"),
    ],
)
def test_what_defences_and_taps_would_not_see_is_refused(
    fields: dict[str, Any], reply: Any, said: str
) -> None:
    if isinstance(reply, dict):
        reply = type("Own", (Carried,), {"FIELDS": reply})
    with pytest.raises(TypeError, match=said):
        type("Asking", (NodeRequest,), {"FIELDS": fields, "REPLY": reply})
