"""SplitFed v2's top takes the nodes' batches one by one, in an order that a trace shows."""

from itertools import groupby
from typing import Any

import pytest

from leakbed.events import Bottom, CutGradientDown, Event, SmashedUp
from tests.support import double_models, several_nodes, tiny
from tests.support.definitions import interleaved, left, order
from tests.support.several_nodes import NODES, OPTIMISERS, distance, plan, trained

pytestmark = pytest.mark.usefixtures("identity")


@pytest.mark.parametrize("optimizer", ["momentum", "adam"])
@pytest.mark.parametrize("state", ["fresh", "kept"])
def test_one_node_is_vanilla_bit_for_bit(optimizer: str, state: str) -> None:
    settings = plan(**OPTIMISERS[optimizer], optimizer_state=state)
    chosen: dict[str, Any] = {"nodes": 1, "model": tiny.architecture("stateful")}
    ours = trained("splitfed-v2", settings, **chosen)
    assert tiny.same(ours, trained("vanilla-split", settings, **chosen))


@pytest.mark.parametrize(
    ("optimizer", "steps"), [("plain", 3), ("momentum", 3), ("momentum", None), ("adam", None)]
)
def test_is_the_papers_loop(optimizer: str, steps: int | None) -> None:
    settings = plan(**OPTIMISERS[optimizer], local_steps=steps)
    ours = trained("splitfed-v2", settings, rounds=2)
    assert distance(ours, interleaved(several_nodes.cells(settings), rounds=2)) < 1e-10


def gradients(settings: Any, *, rounds: int = 2) -> list[CutGradientDown]:
    events = list[Event]()
    trained("splitfed-v2", settings, rounds=rounds, events=events)
    return [event for event in events if isinstance(event, CutGradientDown)]


@pytest.mark.parametrize("steps", [3, None])
def test_gradients_stand_in_the_record_in_the_order_of_processing(steps: int | None) -> None:
    """Also where nodes with fewer batches have left, and where they send their last one."""
    settings = plan(local_steps=steps)
    sent = gradients(settings)
    found = {
        place: [event.node for event in group]
        for place, group in groupby(sent, key=lambda event: (event.round, event.step))
    }
    cells = several_nodes.cells(settings)
    expected = {
        (round_, step): order(left(cells, step=step), round_=round_, step=step)
        for round_ in (1, 2)
        for step in range(6 if steps is None else steps)
    }
    assert found == expected
    assert list(found) == list(expected)
    assert {len(nodes) for nodes in found.values()} == ({1, 2, 3, 4} if steps is None else {4})


def test_the_order_is_drawn_anew_in_every_step_and_round() -> None:
    sent = gradients(plan(local_steps=3))
    orders = [
        tuple(event.node for event in sent[i : i + NODES]) for i in range(0, len(sent), NODES)
    ]
    assert len(orders) == 6
    assert len(set(orders)) > 3
    assert all(sorted(each) == list(range(NODES)) for each in orders)


def test_a_step_begins_when_every_nodes_batch_is_there() -> None:
    events = list[Event]()
    trained("splitfed-v2", plan(local_steps=2), rounds=1, events=events)
    kinds = [
        (type(event).__name__, event.step)
        for event in events
        if isinstance(event, SmashedUp | CutGradientDown)
    ]
    assert kinds[:NODES] == [("SmashedUp", 0)] * NODES
    assert kinds.index(("CutGradientDown", 0)) >= NODES


def test_a_node_that_is_done_sends_its_bottom_once() -> None:
    events = list[Event]()
    trained("splitfed-v2", plan(local_steps=None), rounds=1, events=events)
    up = [event.node for event in events if isinstance(event, Bottom) and event.up]
    assert sorted(up) == list(range(NODES))


def test_another_stream_is_another_order_and_another_model() -> None:
    settings = plan(local_steps=3)
    assert (
        distance(trained("splitfed-v2", settings), trained("splitfed-v2", settings, stream=1))
        > 1e-6
    )


def test_every_cut_gives_the_same_model_for_one_node_only() -> None:
    """With several nodes the cut matters: it says which layers step on every batch."""
    settings = plan(**OPTIMISERS["momentum"])
    chosen = [double_models.architecture(cut=cut) for cut in double_models.CUTS]
    first, *others = [trained("splitfed-v2", settings, model=model, nodes=1) for model in chosen]
    assert all(distance(first, other) < 1e-10 for other in others)
    first, *others = [trained("splitfed-v2", settings, model=model) for model in chosen[::3]]
    assert all(distance(first, other) > 1e-4 for other in others)


@pytest.mark.parametrize("state", ["fresh", "kept"])
def test_any_process_may_serve_any_message(state: str) -> None:
    settings = plan(**OPTIMISERS["adam"], local_steps=3, optimizer_state=state)
    chosen: dict[str, Any] = {"nodes": 2, "model": tiny.architecture("stateful")}
    resident = trained("splitfed-v2", settings, **chosen)
    assert tiny.same(resident, trained("splitfed-v2", settings, resident=False, **chosen))


def test_labels_may_be_at_the_server() -> None:
    shared = trained("splitfed-v2", plan(local_steps=None))
    settings = plan(local_steps=None, labels="server")
    at_server = trained("splitfed-v2", settings, labels=several_nodes.labels())
    assert tiny.same(shared, at_server)
