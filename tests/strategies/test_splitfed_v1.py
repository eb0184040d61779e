"""SplitFed v1 is FedAvg of the uncut model, and with one node vanilla split learning."""

from typing import Any

import numpy as np
import pytest
import torch

from leakbed.events import BottomGradientUp, CutGradientDown, Event, SmashedUp
from leakbed.seeds import derive
from tests.support import double_models, several_nodes, tiny
from tests.support.several_nodes import OPTIMISERS, distance, plan, trained

pytestmark = pytest.mark.usefixtures("identity")


@pytest.mark.parametrize("optimizer", ["momentum", "adam"])
@pytest.mark.parametrize("state", ["fresh", "kept"])
def test_one_node_is_vanilla_bit_for_bit(optimizer: str, state: str) -> None:
    settings = plan(**OPTIMISERS[optimizer], optimizer_state=state)
    chosen: dict[str, Any] = {"nodes": 1, "model": tiny.architecture("stateful")}
    ours = trained("splitfed-v1", settings, **chosen)
    vanilla = trained("vanilla-split", settings, **chosen)
    assert tiny.same(ours, vanilla)
    assert ours["1.num_batches_tracked"] == 6


@pytest.mark.parametrize(
    ("optimizer", "steps"),
    [("plain", 1), ("plain", None), ("momentum", 3), ("momentum", None), ("adam", None)],
)
def test_is_fedavg_of_the_uncut_model(optimizer: str, steps: int | None) -> None:
    settings = plan(**OPTIMISERS[optimizer], local_steps=steps, optimizer_state="fresh")
    ours = trained("splitfed-v1", settings)
    assert distance(ours, trained("fedavg", settings)) < 1e-10


def test_the_nodes_are_unequal_in_samples_and_in_steps() -> None:
    cells = several_nodes.cells(plan(local_steps=None))
    sizes = [[len(batch) for batch in c.batches(1, len(c.rows()[0]))] for c in cells]
    assert [len(each) for each in sizes] == [2, 3, 4, 6]
    assert [sum(each) for each in sizes] == [5, 10, 16, 23]


def test_is_fedavg_also_where_nodes_come_and_go() -> None:
    settings = plan(**OPTIMISERS["momentum"], local_steps=None, optimizer_state="fresh")
    present = [[0, 1, 3], [2, 3], [0, 2]]
    ours = trained("splitfed-v1", settings, rounds=3, present=present)
    theirs = trained("fedavg", settings, rounds=3, present=present)
    assert distance(ours, theirs) < 1e-10


def test_with_batch_norm_it_is_fedavg_but_for_the_type_of_counters() -> None:
    """FedAvg's counters turn into floating point; nodes round them when they load them."""
    settings = plan(local_steps=3, optimizer_state="fresh")
    model = double_models.architecture("double_normed")
    ours = trained("splitfed-v1", settings, rounds=3, model=model)
    theirs = trained("fedavg", settings, rounds=3, model=model)
    counters = [name for name in ours if name.endswith("num_batches_tracked")]
    assert counters == ["2.num_batches_tracked", "7.num_batches_tracked"]
    for name in counters:
        assert ours.pop(name).dtype == torch.int64
        assert theirs.pop(name).dtype == torch.float64
    assert {"2.running_mean", "7.running_var"} <= ours.keys()
    assert distance(ours, theirs) < 1e-10


def test_statistics_that_weigh_by_their_counter_are_fedavgs_too() -> None:
    """An average over seven nodes makes 2.9999999999999996 of seven counts of 3."""
    settings = plan(batch_size=1, local_steps=3, optimizer_state="fresh")
    model = double_models.architecture("double_averaging")
    chosen: dict[str, Any] = {"nodes": 7, "rounds": 3, "model": model}
    ours, theirs = (trained(name, settings, **chosen) for name in ("splitfed-v1", "fedavg"))
    assert int(ours.pop("2.num_batches_tracked")) == 9
    assert theirs.pop("2.num_batches_tracked").round() == 9
    assert distance(ours, theirs) < 1e-10


@pytest.mark.parametrize("state", ["fresh", "kept"])
def test_every_cut_gives_the_same_model(state: str) -> None:
    settings = plan(**OPTIMISERS["momentum"], local_steps=2, optimizer_state=state)
    first, *others = [
        trained("splitfed-v1", settings, model=double_models.architecture(cut=cut))
        for cut in (double_models.CUTS if state == "kept" else double_models.CUTS[::3])
    ]
    assert all(distance(first, other) < 1e-10 for other in others)


@pytest.mark.parametrize("state", ["fresh", "kept"])
def test_any_process_may_serve_any_message(state: str) -> None:
    settings = plan(**OPTIMISERS["adam"], local_steps=None, optimizer_state=state)
    chosen: dict[str, Any] = {"nodes": 2, "model": tiny.architecture("stateful")}
    resident = trained("splitfed-v1", settings, **chosen)
    assert tiny.same(resident, trained("splitfed-v1", settings, resident=False, **chosen))


def test_kept_momenta_are_each_nodes_own() -> None:
    """Against one uncut model and one optimiser for each node."""
    settings = plan(**OPTIMISERS["momentum"], local_steps=2, optimizer_state="kept")
    present = [[0, 1], [1, 2], [0, 2]]
    found = trained("splitfed-v1", settings, rounds=3, present=present)
    cells = several_nodes.cells(settings)
    together = cells[0].architecture.build(derive(tiny.SEED, "victim-init")).state_dict()
    own = [cell.architecture.build(0) for cell in cells]
    optimizers = [settings.optimiser(model.parameters()) for model in own]
    for round_, nodes in enumerate(present, 1):
        for node in nodes:
            own[node].load_state_dict(together)
            images, labels = cells[node].rows()
            for batch in cells[node].batches(round_, len(images)):
                optimizers[node].zero_grad()
                logits = own[node](images[batch])
                torch.nn.functional.cross_entropy(logits, labels[batch]).backward()
                optimizers[node].step()
        states = [own[node].state_dict() for node in nodes]  # two batches of four at every node
        together = {name: sum(s[name] for s in states) / len(states) for name in together}
    assert distance(found, together) < 1e-10
    fresh = plan(**OPTIMISERS["momentum"], local_steps=2, optimizer_state="fresh")
    assert distance(found, trained("splitfed-v1", fresh, rounds=3, present=present)) > 1e-4


def test_the_server_keeps_copies_for_sampled_nodes_only() -> None:
    settings = plan(local_steps=1, optimizer_state="fresh")
    server = several_nodes.built("splitfed-v1", settings, fraction=0.5)
    server.strategy.start(several_nodes.grid(settings), server.arrays, num_rounds=3)
    assert len(server.strategy._copies) == 2  # type: ignore[attr-defined]
    assert server.strategy._momenta == {}  # type: ignore[attr-defined]


def test_each_gradient_is_of_its_own_nodes_mean() -> None:
    settings, events = plan(local_steps=1), list[Event]()
    trained("splitfed-v1", settings, rounds=1, events=events)
    smashed = {e.node: e for e in events if isinstance(e, SmashedUp)}
    top = double_models.architecture().top(derive(tiny.SEED, "victim-init"))
    for event in events:
        assert not isinstance(event, BottomGradientUp)
        if isinstance(event, CutGradientDown):
            leaf = torch.from_numpy(smashed[event.node].smashed).requires_grad_()
            labels = torch.from_numpy(smashed[event.node].labels)
            torch.nn.functional.cross_entropy(top(leaf), labels).backward()
            assert leaf.grad is not None
            assert np.allclose(event.gradient, leaf.grad.numpy(), atol=1e-15)


def test_labels_may_be_at_the_server() -> None:
    shared = trained("splitfed-v1", plan(local_steps=None))
    settings = plan(local_steps=None, labels="server")
    at_server = trained("splitfed-v1", settings, labels=several_nodes.labels())
    assert tiny.same(shared, at_server)
