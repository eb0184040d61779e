from typing import Any

import numpy as np
import pytest
import torch
from torch import nn

from leakbed.events import Bottom, Event, Sealed, SmashedUp, arrays_of
from leakbed.grids import DeterministicGrid, NodeFailed
from leakbed.seeds import derive
from leakbed.tap.wiretap import Wiretap
from tests.support import double_models, several_nodes, tiny
from tests.support.definitions import uncut

pytestmark = pytest.mark.usefixtures("identity")


OPTIMISERS: dict[str, dict[str, Any]] = {
    "sgd": {"momentum": 0.9, "weight_decay": 0.01, "learning_rate": 0.1},
    "adam": {"optimizer": "adam", "weight_decay": 0.01, "learning_rate": 0.01},
}


def split(settings: Any, *, rounds: int, model: str = "plain", **more: Any) -> dict[str, Any]:
    grid = tiny.ready(plan=settings, model=model)
    if settings.labels == "server":
        more["labels"] = {1: tiny.cell(plan=settings).rows()[1]}
    strategy = tiny.split_strategy(model, settings=settings, **more)
    return tiny.train_split(grid, strategy, rounds=rounds)


@pytest.mark.parametrize("optimizer", OPTIMISERS)
@pytest.mark.parametrize(
    ("labels", "bottoms", "steps"),  # every pair of settings
    [
        ("shared", "sealed", 3),
        ("shared", "relayed", None),
        ("server", "sealed", None),
        ("server", "relayed", 3),
    ],
)
def test_one_node_is_training_the_uncut_model_bit_for_bit(
    optimizer: str, labels: str, bottoms: str, steps: int | None
) -> None:
    settings = tiny.plan(**OPTIMISERS[optimizer], labels=labels, bottoms=bottoms, local_steps=steps)
    trained = split(settings, rounds=3)
    assert tiny.same(trained, uncut(tiny.cell(plan=settings), rounds=3))


@pytest.mark.parametrize("optimizer", OPTIMISERS)
def test_one_node_is_training_the_uncut_model_with_dropout_and_batch_norm(optimizer: str) -> None:
    settings = tiny.plan(**OPTIMISERS[optimizer])
    trained = split(settings, rounds=3, model="stateful")
    assert tiny.same(trained, uncut(tiny.cell(plan=settings, model="stateful"), rounds=3))
    assert trained["1.num_batches_tracked"] == 9  # each batch counted once


def test_nodes_in_turn_go_on_from_the_bottom_of_the_one_before() -> None:
    settings = tiny.plan()
    grid = DeterministicGrid(tiny.ready(2, plan=settings), stream=0, roster={1: 0, 2: 1})
    trained = tiny.train_split(grid, tiny.split_strategy(settings=settings), rounds=2)

    network = tiny.architecture().build(derive(tiny.SEED, "victim-init"))
    optimizer = settings.optimiser(network.parameters())  # plain SGD has no state of its own
    cells = [tiny.cell(node, 2, plan=settings) for node in range(2)]
    for round_ in (1, 2):
        for cell in cells:
            images, labels = cell.rows()
            for batch in cell.batches(round_, len(images)):
                optimizer.zero_grad()
                nn.functional.cross_entropy(network(images[batch]), labels[batch]).backward()
                optimizer.step()
    assert tiny.same(trained, dict(network.state_dict()))


@pytest.mark.parametrize("optimizer", OPTIMISERS)
def test_every_cut_gives_one_node_the_same_model(optimizer: str) -> None:
    settings = several_nodes.plan(**OPTIMISERS[optimizer], local_steps=2)
    expected = uncut(several_nodes.cells(settings, nodes=1)[0], rounds=2)
    for cut in double_models.CUTS:
        model = double_models.architecture(cut=cut)
        found = several_nodes.trained("vanilla-split", settings, nodes=1, model=model)
        assert tiny.same(found, expected), cut


def test_every_cut_gives_several_nodes_the_same_model_without_momenta_only() -> None:
    """A bottom's momenta stay at its node; a top's serve all."""

    def trained(settings: Any) -> list[dict[str, torch.Tensor]]:
        models = [double_models.architecture(cut=cut) for cut in (1, 4, 7)]
        return [several_nodes.trained("vanilla-split", settings, model=each) for each in models]

    first, *others = trained(several_nodes.plan(weight_decay=0.01, local_steps=2))
    assert all(tiny.same(first, other) for other in others)
    first, *others = trained(several_nodes.plan(momentum=0.9, local_steps=2))
    assert not any(tiny.same(first, other) for other in others)


def watched(bottoms: str) -> tuple[list[Event], list[dict[str, Any]]]:
    """Everything a hook sees, and every bottom there ever was."""
    settings = tiny.plan(bottoms=bottoms, momentum=0.9)
    events: list[Event] = []
    there: list[dict[str, Any]] = []
    inner = tiny.ready(2, plan=settings)

    def look(event: Event) -> None:
        events.append(event)
        trainers = [context.live.get("bottom") for context in inner._host._contexts.values()]
        there.extend(trainer.arrays() for trainer in trainers if trainer is not None)

    strategy = tiny.split_strategy(
        settings=settings, test_labels=tiny.recipe(2).dataset().labels[:4], evaluate_rounds=[1, 2]
    )
    there.append(dict(strategy.bottom))
    tap = Wiretap(inner, [look], strict=True)
    tiny.train_split(tap, strategy)
    there.append(dict(strategy.bottom))
    return events, there


def leaks(events: list[Event], bottoms: list[dict[str, Any]]) -> set[bytes]:
    """The bottom's tensors that stand in an event, by their bytes."""
    secret = {array.tobytes() for bottom in bottoms for array in bottom.values()}
    seen = {
        array.tobytes()
        for event in events
        for group in arrays_of(event).values()
        for array in group.values()
    }
    return secret & seen


def test_no_event_holds_a_sealed_bottom() -> None:
    events, bottoms = watched("sealed")
    assert len({bottom["0.weight"].tobytes() for bottom in bottoms}) == 13  # 2 x 2 x 3 steps + 1
    assert leaks(events, bottoms) == set()
    sealed = [event for event in events if isinstance(event, Sealed)]
    # Down at each turn's start, up at its end, down again for each evaluation.
    assert [event.up for event in sealed] == [False, True, False, True, False] * 2
    assert all(event.size > 0 for event in sealed)


def test_relayed_bottoms_are_in_the_view() -> None:
    events, bottoms = watched("relayed")
    assert bottoms[0]["0.weight"].tobytes() in leaks(events, bottoms)
    assert bottoms[-1]["0.weight"].tobytes() in leaks(events, bottoms)
    relayed = [event for event in events if isinstance(event, Bottom)]
    assert [event.up for event in relayed] == [False, True, False, True, False] * 2


def test_an_adversarys_clone_shares_no_tensor_with_the_victim() -> None:
    architecture = tiny.architecture("stateful")
    victim = architecture.bottom(derive(tiny.SEED, "victim-init"))
    clone = dict(architecture.bottom(derive(tiny.SEED, "adversary/unsplit")).named_parameters())
    drawn = {n for n, p in victim.named_parameters() if not n.startswith("1.")}  # BatchNorm: ones
    assert drawn == {"0.weight", "0.bias"}
    assert not any(torch.equal(clone[name], victim.get_parameter(name)) for name in drawn)


def test_a_round_of_n_steps_costs_n_plus_one_exchanges() -> None:
    settings = tiny.plan()
    grid = tiny.ready(plan=settings)
    sent: list[Event] = []
    counting = DeterministicGrid(grid, stream=0, roster=grid.roster)
    tap = Wiretap(counting, [sent.append], strict=True)
    tiny.train_split(tap, tiny.split_strategy(settings=settings), rounds=1)
    smashed = [event.step for event in sent if isinstance(event, SmashedUp)]
    assert smashed == [0, 1, 2]
    assert counting._exchanges == 5  # three steps, the closing one, an evaluation of no rows


def test_evaluation_goes_through_both_parts_in_evaluation_mode() -> None:
    settings = tiny.plan()
    grid = tiny.ready(plan=settings, model="stateful")
    rows = tiny.recipe().split().test
    truth = tiny.recipe().dataset().labels[rows]
    strategy = tiny.split_strategy(
        "stateful", settings=settings, test_labels=truth, evaluate_rounds=[2]
    )
    result = strategy.start(grid, strategy.part.arrays(), num_rounds=2)
    whole = tiny.architecture("stateful").build(0)
    bottom = {name: torch.from_numpy(value) for name, value in strategy.bottom.items()}
    whole.load_state_dict(bottom | strategy.part.module.state_dict())
    predicted = whole.eval()(tiny.recipe().dataset().images[rows]).argmax(1)
    expected = (predicted == truth).float().mean().item()
    assert dict(result.evaluate_metrics_clientapp) == {
        2: {"accuracy": expected, "num-examples": len(rows)}
    }


def test_evaluating_changes_no_bit_of_the_training() -> None:
    settings = tiny.plan(momentum=0.9)
    truth = torch.zeros(4, dtype=torch.long)
    without = split(settings, rounds=2, model="stateful")
    evaluated = split(
        settings, rounds=2, model="stateful", test_labels=truth, evaluate_rounds=[1, 2]
    )
    assert tiny.same(without, evaluated)


def test_a_fraction_samples_nodes_and_at_least_one() -> None:
    settings = tiny.plan(batch_size=4, local_steps=1)
    for fraction, expected in ((0.6, 3), (0.01, 1)):
        seen: list[Event] = []
        inner = tiny.ready(5, plan=settings)
        grid = DeterministicGrid(inner, stream=3, roster=inner.roster)
        tap = Wiretap(grid, [seen.append], roster=inner.roster, strict=True)
        strategy = tiny.split_strategy(settings=settings, fraction_train=fraction)
        tiny.train_split(tap, strategy, rounds=1)
        nodes = [event.node for event in seen if isinstance(event, SmashedUp)]
        assert len(nodes) == expected
        assert nodes == sorted(set(nodes))


def test_result_arrays_hold_the_top_and_nothing_else() -> None:
    settings = tiny.plan()
    strategy = tiny.split_strategy(settings=settings)
    result = strategy.start(tiny.ready(plan=settings), strategy.part.arrays(), num_rounds=1)
    top = strategy.part.module.state_dict()
    assert set(result.arrays) == set(top) == {"2.weight", "2.bias", "5.weight", "5.bias"}
    assert np.array_equal(result.arrays["5.bias"].numpy(), top["5.bias"].numpy())


def test_a_node_that_fails_stops_the_run() -> None:
    settings = tiny.plan()
    strategy = tiny.split_strategy(settings=settings)
    unready = tiny.LocalGrid(tiny.node_app, nodes=1)
    with pytest.raises(NodeFailed, match=r"node 0 failed on 'train.split': NoCellError"):
        strategy.start(unready, strategy.part.arrays(), num_rounds=1)
