import re

import pytest
import torch
from flwr.app import ArrayRecord, ConfigRecord, Message, RecordDict
from torch import nn

from leakbed.seeds import derive, scoped
from tests.support import tiny

pytestmark = pytest.mark.usefixtures("identity")


OPTIMISERS = {
    "sgd": {"momentum": 0.9, "weight_decay": 0.01, "learning_rate": 0.1},
    "adam": {"optimizer": "adam", "weight_decay": 0.01, "learning_rate": 0.01},
}
MODELS = ["plain", "stateful"]


def asked(weights: dict[str, torch.Tensor], *, round_: int) -> Message:
    records = {"arrays": ArrayRecord(weights), "config": ConfigRecord({"server-round": round_})}
    return Message(RecordDict(records), dst_node_id=1, message_type="train")


def rounds(grid: tiny.GridWrapper, model: str, *, count: int = 3) -> list[Message]:
    """Hand the node its own weights back, round after round."""
    weights = dict(tiny.architecture(model).build(derive(tiny.SEED, "victim-init")).state_dict())
    replies = []
    for round_ in range(1, count + 1):
        (reply,) = grid.send_and_receive([asked(weights, round_=round_)])
        assert not reply.has_error(), reply.error
        weights = reply.content.array_records["arrays"].to_torch_state_dict()
        replies.append(reply)
    return replies


@pytest.mark.parametrize("optimizer", OPTIMISERS)
@pytest.mark.parametrize("model", MODELS)
@pytest.mark.parametrize("steps", [4, None])
def test_a_round_is_a_plain_loop(optimizer: str, model: str, steps: int | None) -> None:
    plan = tiny.plan(**OPTIMISERS[optimizer], local_steps=steps)
    replies = rounds(tiny.ready(plan=plan, model=model), model)

    cell = tiny.cell(plan=plan)
    images, labels = cell.rows()
    network = tiny.architecture(model).build(derive(tiny.SEED, "victim-init"))
    for round_, reply in enumerate(replies, start=1):
        optimiser = plan.optimiser(network.parameters())  # afresh, as FedAvg's clients do
        batches = cell.batches(round_, len(images))
        with scoped(derive(cell.stream, f"train/{round_}")):
            for batch in batches:
                optimiser.zero_grad()
                loss = nn.functional.cross_entropy(network(images[batch]), labels[batch])
                loss.backward()
                optimiser.step()
        sent = reply.content.array_records["arrays"].to_torch_state_dict()
        assert tiny.same(sent, network.state_dict())
        metrics = reply.content.metric_records["metrics"]
        assert metrics["num-examples"] == sum(map(len, batches))
        assert metrics["train-loss"] == loss.item()


@pytest.mark.parametrize("optimizer", OPTIMISERS)
def test_a_node_that_forgets_sends_the_same_bits(optimizer: str) -> None:
    plan = tiny.plan(**OPTIMISERS[optimizer])
    resident = rounds(tiny.ready(plan=plan, model="stateful"), "stateful")
    rebuilt = rounds(tiny.ready(plan=plan, model="stateful", resident=False), "stateful")
    for one, two in zip(resident, rebuilt, strict=True):
        arrays = [m.content.array_records["arrays"].to_torch_state_dict() for m in (one, two)]
        assert tiny.same(*arrays)


@pytest.mark.parametrize("optimizer", OPTIMISERS)
def test_nodes_that_share_a_process_train_as_if_each_were_alone(optimizer: str) -> None:
    plan = tiny.plan(**OPTIMISERS[optimizer])
    weights = dict(
        tiny.architecture("stateful").build(derive(tiny.SEED, "victim-init")).state_dict()
    )
    both, trained = tiny.ready(2, plan=plan, model="stateful"), []
    for node in (1, 2, 1):
        message = asked(weights, round_=1)
        message.metadata.dst_node_id = node
        (reply,) = both.send_and_receive([message])
        trained.append(reply.content.array_records["arrays"].to_torch_state_dict())
    assert tiny.same(trained[0], trained[2])
    assert not tiny.same(trained[0], trained[1])  # it has other rows


def test_a_node_keeps_nothing_alive() -> None:
    grid = tiny.ready(plan=tiny.plan())
    rounds(grid, "plain", count=1)
    assert not grid._host._contexts[1].live


@pytest.mark.parametrize(
    ("steps", "bias", "where"),
    [
        (3, 3e38, r"step 0 \(loss inf\)"),
        (3, 0.0, r"step 1 \(loss nan\)"),
        (1, 0.0, r"step 0 \(loss 1\.\d+\)"),  # only the weights it would send are not finite
    ],
)
def test_training_that_diverges_says_where(steps: int, bias: float, where: str) -> None:
    plan = tiny.plan(learning_rate=3e38, weight_decay=1e3, local_steps=steps)
    network = tiny.architecture().build(0)
    with torch.no_grad():
        network[5].bias += bias * torch.tensor([-1, 1, 1])
    message = asked(dict(network.state_dict()), round_=2)
    (reply,) = tiny.ready(plan=plan).send_and_receive([message])
    said = "UnstableTrainingError: training at node 0 left the finite numbers in round 2, "
    assert re.match(f"{said}{where}; lower protocol.learning_rate", reply.error.reason)


def test_weights_of_another_network_are_an_error() -> None:
    weights = dict(tiny.architecture("stateful").build(0).state_dict())
    (reply,) = tiny.ready().send_and_receive([asked(weights, round_=1)])
    assert reply.has_error()


def test_a_counter_that_averaging_made_a_fraction_counts_on_from_the_nearest() -> None:
    """Seven nodes' count of 9 comes back as 8.999999999999998, which torch would cut to 8."""
    weights = dict(tiny.architecture("stateful").build(0).state_dict())
    sent = weights | {"1.num_batches_tracked": torch.tensor(8.999999999999998, dtype=torch.float64)}
    exact = weights | {"1.num_batches_tracked": torch.tensor(9)}
    grid = tiny.ready(model="stateful")
    found = []
    for each in (sent, exact):
        (reply,) = grid.send_and_receive([asked(each, round_=1)])
        found.append(reply.content.array_records["arrays"].to_torch_state_dict())
    assert found[0]["1.num_batches_tracked"] == 9 + tiny.plan().local_steps
    assert tiny.same(*found)
