"""U-shaped training is vanilla training bit for bit, on either execution path."""

import pytest
import torch
from torch import nn

from leakbed.models import IllegalCutError
from leakbed.seeds import derive
from tests.support import tiny
from tests.support.u_shaped import OPTIMISERS, at_home, network, strategy_of, train, vanilla

pytestmark = pytest.mark.usefixtures("identity")


@pytest.mark.parametrize("optimizer", OPTIMISERS)
@pytest.mark.parametrize(
    ("model", "kept"), [("plain", "kept"), ("normed", "kept"), ("normed", "fresh")]
)
def test_is_vanilla_split_learning_bit_for_bit(optimizer: str, model: str, kept: str) -> None:
    plan = at_home(**OPTIMISERS[optimizer], optimizer_state=kept)
    trained, _ = train(network(model), plan)
    assert tiny.same(trained, vanilla(network(model), plan))


def test_nodes_in_turn_are_vanillas_nodes_in_turn() -> None:
    plan = at_home(weight_decay=0.01)  # an optimiser's own state stays at its node, in either
    trained, _ = train(network("normed"), plan, nodes=3)
    assert tiny.same(trained, vanilla(network("normed"), plan, nodes=3))


@pytest.mark.parametrize("optimizer", OPTIMISERS)
def test_each_node_keeps_the_optimizer_of_its_own_two_parts(optimizer: str) -> None:
    plan = at_home(**OPTIMISERS[optimizer])
    trained, _ = train(network(), plan, nodes=2)

    whole = network().build(derive(tiny.SEED, "victim-init"))
    middle = plan.optimiser(whole[2:4].parameters())
    ends = [plan.optimiser([*whole[:2].parameters(), *whole[4:].parameters()]) for _ in range(2)]
    for round_ in (1, 2):
        for node, own in enumerate(ends):
            cell = tiny.cell(node, 2, plan=plan)
            images, labels = cell.rows()
            for batch in cell.batches(round_, len(images)):
                whole.zero_grad()
                nn.functional.cross_entropy(whole(images[batch]), labels[batch]).backward()
                own.step()
                middle.step()
    assert tiny.same(trained, dict(whole.state_dict()))


def pairs(model: str, *, lowest: int) -> list[tuple[int, int]]:
    """Every pair of cuts that leaves each of the three parts something to learn."""
    layers = list(network(model).build(0))
    learns = [any(True for _ in layer.parameters()) for layer in layers]
    return [
        (low, high)
        for low in range(lowest, len(layers) - 2)
        for high in range(low + 1, len(layers) - 1)
        if any(learns[: low + 1]) and any(learns[low + 1 : high + 1]) and any(learns[high + 1 :])
    ]


# Dropout stays below the cut: in another part it draws from that part's own stream.
@pytest.mark.parametrize(("model", "lowest", "legal"), [("plain", 0, 6), ("normed", 2, 12)])
def test_every_pair_of_cuts_gives_the_same_trained_model(
    model: str, lowest: int, legal: int
) -> None:
    plan = at_home(momentum=0.9, local_steps=2)
    expected = vanilla(network(model), plan, rounds=1)
    found = pairs(model, lowest=lowest)
    assert len(found) == legal
    for cut, upper_cut in found:
        trained, _ = train(network(model, cut=cut, upper_cut=upper_cut), plan, rounds=1)
        assert tiny.same(trained, expected), (cut, upper_cut)


@pytest.mark.parametrize(("optimizer", "kept"), [("sgd", "fresh"), ("adam", "kept")])
def test_nodes_that_forget_train_to_the_same_bits(optimizer: str, kept: str) -> None:
    plan = at_home(**OPTIMISERS[optimizer], optimizer_state=kept)
    data = tiny.recipe(2)
    truth = data.dataset().labels[data.split().test]
    results = [
        train(
            network("everywhere"),
            plan,
            nodes=2,
            resident=resident,
            test_labels=truth,
            evaluate_rounds=[1],
        )
        for resident in (True, False)
    ]
    assert tiny.same(results[0][0], results[1][0])
    assert results[0][1] == results[1][1]
    counted = {name: int(n) for name, n in results[0][0].items() if name.endswith("tracked")}
    assert counted == dict.fromkeys(
        ("1.num_batches_tracked", "4.num_batches_tracked", "7.num_batches_tracked"), 12
    )  # 2 rounds of 2 nodes with 3 batches, each batch counted once in each part


def test_dropout_in_the_head_draws_from_the_nodes_own_stream() -> None:
    plan = at_home()
    one, _ = train(network("everywhere"), plan, rounds=1)
    torch.manual_seed(99)  # no generator but the named ones decides
    two, _ = train(network("everywhere"), plan, rounds=1)
    assert tiny.same(one, two)
    assert not tiny.same(one, vanilla(network("everywhere"), plan, rounds=1))


def test_evaluation_goes_through_all_three_parts_in_evaluation_mode() -> None:
    data = tiny.recipe()
    rows = data.split().test
    truth, images = data.dataset().labels[rows], data.dataset().images[rows]
    trained, metrics = train(
        network("everywhere"), at_home(), test_labels=truth, evaluate_rounds=[2]
    )
    whole = network("everywhere").build(0)
    whole.load_state_dict(trained)
    expected = (whole.eval()(images).argmax(1) == truth).float().mean().item()
    assert metrics == {2: {"accuracy": pytest.approx(expected), "num-examples": len(rows)}}


def test_held_out_rows_come_in_chunks(monkeypatch: pytest.MonkeyPatch) -> None:
    truth = tiny.recipe().dataset().labels[tiny.recipe().split().test]
    whole = train(network(), at_home(), test_labels=truth, evaluate_rounds=[2])
    monkeypatch.setattr("strategies.split_strategy._EVALUATION_ROWS", 4)
    assert len(truth) == 6
    assert train(network(), at_home(), test_labels=truth, evaluate_rounds=[2])[1] == whole[1]


def test_evaluating_changes_no_bit_of_the_training() -> None:
    plan, truth = at_home(momentum=0.9), torch.zeros(4, dtype=torch.long)
    without, _ = train(network("normed"), plan)
    evaluated, _ = train(network("normed"), plan, test_labels=truth, evaluate_rounds=[1, 2])
    assert tiny.same(without, evaluated)


def test_result_arrays_hold_the_middle_and_nothing_else() -> None:
    strategy = strategy_of(network(), at_home())
    grid = tiny.ready(plan=at_home(), architecture=network())
    result = strategy.start(grid, strategy.part.arrays(), num_rounds=1)
    assert set(result.arrays) == {"2.weight", "2.bias"}
    assert set(strategy.bottom) == {"0.weight", "0.bias", "5.weight", "5.bias"}


def test_a_model_cut_once_cannot_be_u_shaped() -> None:
    with pytest.raises(IllegalCutError, match=r"cut twice, with cut < upper_cut < 5.*None"):
        strategy_of(tiny.architecture(), at_home())
