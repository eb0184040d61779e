"""Vertical split learning against its definitions, on processes that stay and that are swapped."""

from dataclasses import replace
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor, nn

from clients.node import TrainingPlan
from leakbed.data.partitioning import columns, strip_architecture
from leakbed.events import CutGradientDown, Event, Sealed, SmashedUp, arrays_of
from leakbed.models import Architecture
from leakbed.seeds import derive
from leakbed.tap.wiretap import Wiretap
from tests.support import slow_nodes, tiny
from tests.support.parties import (
    ORDER,
    Weights,
    labels,
    network,
    plan,
    ready,
    strategy,
    told,
    train,
)

pytestmark = pytest.mark.usefixtures("identity")

OPTIMISERS: dict[str, dict[str, Any]] = {
    "sgd": {"momentum": 0.9, "learning_rate": 0.1},
    "adam": {"optimizer": "adam", "learning_rate": 0.01},
}


@pytest.mark.parametrize(("optimizer", "model"), [("sgd", "plain"), ("adam", "stateful")])
@pytest.mark.parametrize("merge", ["concat", "sum"])
def test_one_party_is_vanilla_with_the_labels_at_the_server(
    optimizer: str, model: str, merge: str
) -> None:
    settings = plan(**OPTIMISERS[optimizer], weight_decay=0.01)
    architecture = tiny.architecture(model)
    grid = ready(1, architecture, settings)
    bottoms, top = train(grid, strategy(1, architecture, settings, merge=merge), rounds=3)
    own = tiny.cell(plan=settings).rows()[1]
    vanilla = tiny.split_strategy(model, settings=settings, labels={1: own})
    expected = tiny.train_split(tiny.ready(plan=settings, model=model), vanilla, rounds=3)
    assert tiny.same(bottoms[0] | top, expected)


@pytest.mark.parametrize("cut", [0, 2, 3])
def test_every_cut_of_one_party_gives_the_same_model(cut: int) -> None:
    settings = plan(momentum=0.9)
    trained = []
    for each in (1, cut):
        architecture = replace(tiny.architecture(), cut=each)
        bottoms, top = train(ready(1, architecture, settings), strategy(1, architecture, settings))
        trained.append(bottoms[0] | top)
    assert tiny.same(*trained)


def uncut(
    model: nn.Module, settings: TrainingPlan, *, faster: str | None = None, times: int = 1
) -> Weights:
    """The oracle: whole images, one loop; one parameter may move several times as fast."""
    named = dict(model.named_parameters())
    fast = [named.pop(faster)] if faster else []
    groups = [{"params": list(named.values())}]
    if fast:
        groups.append({"params": fast, "lr": settings.learning_rate * times})  # type: ignore[dict-item]
    optimizer = settings.optimiser(groups)
    cell = tiny.cell(plan=settings, data=tiny.recipe(1, partition="aligned"), order_stream=ORDER)
    images, _ = cell.rows()
    for round_ in (1, 2):
        for batch in cell.batches(round_, len(images)):
            optimizer.zero_grad()
            nn.functional.cross_entropy(model(images[batch]), labels()[batch]).backward()
            optimizer.step()
    return dict(model.state_dict())


def cells_of(party: int, nodes: int) -> slice:
    return columns(tiny.IMAGE_SHAPE[2], party=party, parties=nodes)


def close(left: Tensor, right: Tensor) -> None:
    torch.testing.assert_close(left, right, rtol=0, atol=1e-10)


@pytest.mark.parametrize("optimizer", OPTIMISERS)
@pytest.mark.parametrize("nodes", [2, 4])
def test_a_sum_after_the_first_linear_layer_is_the_uncut_model(optimizer: str, nodes: int) -> None:
    settings = plan(**OPTIMISERS[optimizer])
    architecture = network("summed", 1)
    whole = architecture.build(derive(tiny.SEED, "victim-init"))
    first = whole.state_dict()["1.weight"].unflatten(1, tiny.IMAGE_SHAPE).clone()
    bias = whole.state_dict()["1.bias"]
    weights = [
        {
            "1.weight": first[..., cells_of(party, nodes)].flatten(1).clone(),
            "1.bias": bias / nodes,
        }
        for party in range(nodes)
    ]
    bottoms, top = train(
        ready(nodes, architecture, settings),
        strategy(nodes, architecture, settings, weights=weights, merge="sum"),
    )
    # Every party adds a bias of its own, so that their sum moves as many times as far.
    expected = uncut(whole, settings, faster="1.bias", times=nodes)
    trained = expected["1.weight"].unflatten(1, tiny.IMAGE_SHAPE)
    for party, bottom in enumerate(bottoms):
        close(bottom["1.weight"], trained[..., cells_of(party, nodes)].flatten(1))
    close(sum((each["1.bias"] for each in bottoms), torch.zeros(())), expected["1.bias"])
    close(top["3.weight"], expected["3.weight"])
    assert not torch.allclose(trained, first)


@pytest.mark.parametrize("optimizer", OPTIMISERS)
@pytest.mark.parametrize(("nodes", "cut"), [(2, 1), (4, 2)])
def test_columns_side_by_side_are_the_uncut_model(optimizer: str, nodes: int, cut: int) -> None:
    settings = plan(**OPTIMISERS[optimizer], weight_decay=0.01)
    architecture = network("joined", cut)
    whole = architecture.build(derive(tiny.SEED, "victim-init"))
    weights = [
        {
            n: whole.state_dict()[n][..., cells_of(party, nodes)].clone()
            for n in ("1.weight", "1.bias")
        }
        for party in range(nodes)
    ]
    bottoms, top = train(
        ready(nodes, architecture, settings),
        strategy(nodes, architecture, settings, weights=weights),
    )
    expected = uncut(whole, settings)
    for name in ("1.weight", "1.bias"):
        close(torch.cat([bottom[name] for bottom in bottoms], dim=-1), expected[name])
    close(top["3.weight"], expected["3.weight"])
    close(top["3.bias"], expected["3.bias"])


@pytest.mark.parametrize(("optimizer", "state"), [("adam", "kept"), ("sgd", "fresh")])
def test_swapped_processes_give_the_same_bits(optimizer: str, state: str) -> None:
    settings = plan(**OPTIMISERS[optimizer], optimizer_state=state)
    architecture = network("stateful", 3)
    trained = []
    for resident in (True, False):
        grid = ready(2, architecture, settings, resident=resident)
        chosen = strategy(2, architecture, settings, optimizer_state=state)
        trained.append(train(grid, chosen))
    assert both(*trained)
    for bottom in trained[0][0]:
        assert bottom["1.num_batches_tracked"] == 6  # two rounds of three; each batch counted once
    assert not torch.equal(trained[0][0][0]["0.weight"], trained[0][0][1]["0.weight"])


def both(left: tuple[list[Weights], Weights], right: tuple[list[Weights], Weights]) -> bool:
    """Equal bits in every bottom and in the top."""
    bottoms = all(tiny.same(*pair) for pair in zip(left[0], right[0], strict=True))
    return bottoms and tiny.same(left[1], right[1])


@pytest.mark.runtime
@pytest.mark.filterwarnings("ignore::ResourceWarning", "ignore:Tip:FutureWarning")
def test_parties_in_processes_of_their_own_give_the_same_bits(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    from leakbed.grids.ray.grid import RayGrid  # noqa: PLC0415  Ray takes seconds to import

    monkeypatch.setenv("PYTHONPATH", "")
    settings, architecture = plan(momentum=0.9), network("stateful", 3)
    expected = train(ready(3, architecture, settings), strategy(3, architecture, settings))
    with RayGrid(slow_nodes.app, nodes=3, workers=2) as grid:
        told(grid, architecture, settings)
        shared = dict.fromkeys(grid.roster, labels())
        found = train(grid, strategy(3, architecture, settings, labels=shared))
    assert both(found, expected)


def watched(merge: str, architecture: Architecture, **more: Any) -> tuple[list[Event], Any]:
    settings = plan()
    events: list[Event] = []
    grid = ready(2, architecture, settings)
    chosen = strategy(2, architecture, settings, merge=merge, **more)
    tap = Wiretap(grid, [events.append], roster=grid.roster, strict=True)
    before = [{name: value.copy() for name, value in each.items()} for each in chosen.weights]
    train(tap, chosen)
    return events, [*before, *chosen.weights]


@pytest.mark.parametrize("merge", ["concat", "sum"])
def test_each_party_gets_its_share_of_the_gradient(merge: str) -> None:
    architecture = network("joined" if merge == "concat" else "summed", 1)
    events, _ = watched(merge, architecture)
    gradients = {
        (e.node, e.round, e.step): e.gradient for e in events if isinstance(e, CutGradientDown)
    }
    assert len(gradients) == 2 * 2 * 3
    for (node, round_, step), gradient in gradients.items():
        assert gradient.shape[1:] == ((4, 1, 3) if merge == "concat" else (6,))
        same = np.array_equal(gradient, gradients[1 - node, round_, step])
        assert same == (merge == "sum")


def test_parties_send_the_same_rows_in_an_order_of_their_own() -> None:
    events, _ = watched("concat", network("joined", 1))
    batches = [event for event in events if isinstance(event, SmashedUp)]
    rows = {(e.node, e.round, e.step): np.asarray(e.rows).tolist() for e in batches}
    for round_ in (1, 2):
        for step in range(3):
            assert rows[0, round_, step] == rows[1, round_, step]
    assert all(event.labels is None for event in batches)
    assert rows[0, 1, 0] != rows[0, 2, 0]


def test_no_event_holds_a_bottom_and_none_goes_down_again_but_to_evaluate() -> None:
    events, bottoms = watched("concat", network("joined", 1))
    secret = {array.tobytes() for bottom in bottoms for array in bottom.values()}
    seen = {
        array.tobytes()
        for event in events
        for group in arrays_of(event).values()
        for array in group.values()
    }
    assert secret.isdisjoint(seen)
    sealed = [(event.round, event.node, event.up) for event in events if isinstance(event, Sealed)]
    assert sorted(sealed) == [
        (1, 0, False), (1, 0, True), (1, 1, False), (1, 1, True), (2, 0, True), (2, 1, True)
    ]  # fmt: skip


def test_evaluation_merges_every_partys_strip() -> None:
    settings, architecture = plan(), network("stateful", 3)
    recipe = tiny.recipe(2, partition="aligned")
    rows = recipe.split().test
    truth = recipe.dataset().labels[rows]
    chosen = strategy(2, architecture, settings, test_labels=truth, evaluate_rounds=[2])
    grid = ready(2, architecture, settings)
    result = chosen.start(grid, chosen.part.arrays(), num_rounds=2)
    smashed = []
    for party in range(2):
        own = strip_architecture(architecture, party=party, parties=2).bottom(0).eval()
        own.load_state_dict({n: torch.tensor(v) for n, v in chosen.weights[party].items()})
        smashed.append(own(recipe.dataset().images[rows][..., cells_of(party, 2)]))
    predicted = chosen.part.module.eval()(torch.cat(smashed, dim=-1)).argmax(1)
    accuracy = (predicted == truth).float().mean().item()
    assert accuracy > 0
    assert dict(result.evaluate_metrics_clientapp) == {
        2: {"accuracy": accuracy, "num-examples": len(rows)}
    }
