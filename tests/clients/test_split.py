from typing import Any

import numpy as np
import pytest
from flwr.app import Message

from leakbed.grids import DeterministicGrid
from leakbed.seeds import derive
from leakbed.wire.messages import (
    BACKWARD_STEP,
    SPLIT_EVALUATE,
    SPLIT_STEP,
    EvaluateRequest,
    SplitReply,
    SplitRequest,
)
from tests.support import tiny

pytestmark = pytest.mark.usefixtures("identity")


def bottom(model: str = "plain") -> dict[str, Any]:
    state = tiny.architecture(model).bottom(derive(tiny.SEED, "victim-init")).state_dict()
    return {name: value.numpy() for name, value in state.items()}


def ask(grid: Any, **fields: Any) -> Message:
    request = SplitRequest(**({"round": 1, "step": 0} | fields))
    message = Message(request.records(), dst_node_id=1, message_type=SPLIT_STEP)
    (reply,) = grid.send_and_receive([message])
    return reply


def answer(grid: Any, **fields: Any) -> SplitReply:
    reply = ask(grid, **fields)
    assert not reply.has_error(), reply.error
    return SplitReply.of(reply)


def flat(smashed: Any) -> Any:
    return np.full_like(smashed, 0.01)


@pytest.mark.parametrize(
    "optimizer",
    [
        {"momentum": 0.9, "weight_decay": 0.01},
        {"optimizer": "adam", "learning_rate": 0.01},
    ],
)
def test_nodes_that_forget_train_to_the_same_bits(optimizer: dict[str, Any]) -> None:
    settings = tiny.plan(**optimizer)
    truth = tiny.recipe(2).dataset().labels[tiny.recipe(2).split().test]

    def trained(*, resident: bool) -> Any:
        inner = tiny.ready(2, resident=resident, plan=settings, model="stateful")
        grid = DeterministicGrid(inner, stream=0, roster=inner.roster)
        strategy = tiny.split_strategy(
            "stateful", settings=settings, test_labels=truth, evaluate_rounds=[1]
        )
        return tiny.train_split(grid, strategy, rounds=2)

    assert tiny.same(trained(resident=True), trained(resident=False))


@pytest.mark.parametrize("resident", [True, False])
@pytest.mark.parametrize("labels", ["shared", "server"])
def test_a_round_sends_the_nodes_batches_in_order(resident: bool, labels: str) -> None:
    plan = tiny.plan(labels=labels)
    grid = tiny.ready(plan=plan, resident=resident)
    images, true = tiny.cell().rows()
    expected = tiny.cell(plan=plan).batches(1, len(images))
    reply = answer(grid, bottom=bottom())
    for step, batch in enumerate(expected):
        assert (reply.steps, reply.examples) == (3, 24)
        if labels == "shared":
            assert reply.labels.tolist() == true[batch].tolist()
            assert reply.rows is None
        else:
            assert reply.rows.tolist() == batch.tolist()
            assert reply.labels is None
        reply = answer(grid, step=step + 1, gradient=flat(reply.smashed))
    assert reply.smashed is None
    assert set(reply.bottom) == {"0.weight", "0.bias"}


def test_the_first_smashed_batch_is_the_bottoms_output() -> None:
    reply = answer(tiny.ready(), bottom=bottom())
    images, _ = tiny.cell().rows()
    network = tiny.architecture().bottom(derive(tiny.SEED, "victim-init"))
    expected = network(images[tiny.cell().batches(1, len(images))[0]])
    assert np.array_equal(reply.smashed, expected.detach().numpy())


@pytest.mark.parametrize("resident", [True, False])
def test_a_node_may_go_on_with_the_bottom_it_holds(resident: bool) -> None:
    def second_round(**given: Any) -> Any:
        grid = tiny.ready(resident=resident, plan=tiny.plan(local_steps=1))
        reply = answer(grid, bottom=bottom())
        closing = answer(grid, step=1, gradient=flat(reply.smashed))
        given = {"bottom": closing.bottom} if given else {}
        return answer(grid, round=2, **given).smashed

    assert np.array_equal(second_round(), second_round(given=True))


@pytest.mark.parametrize("resident", [True, False])
def test_a_node_without_a_bottom_refuses_to_make_one_up(resident: bool) -> None:
    reply = ask(tiny.ready(resident=resident))
    assert "OutOfStepError: node 0 was sent no bottom and holds none" in reply.error.reason


@pytest.mark.parametrize("resident", [True, False])
@pytest.mark.parametrize("wrong", ["repeated", "skipped", "reshaped", "early"])
def test_a_gradient_out_of_step_is_refused(resident: bool, wrong: str) -> None:
    grid = tiny.ready(resident=resident)
    reply = answer(grid, bottom=bottom())
    gradient = flat(reply.smashed)
    if wrong == "repeated":
        answer(grid, step=1, gradient=gradient)
        reply = ask(grid, step=1, gradient=gradient)
    elif wrong == "skipped":
        reply = ask(grid, step=2, gradient=gradient)
    elif wrong == "reshaped":
        reply = ask(grid, step=1, gradient=gradient[:-1])
    else:
        reply = ask(tiny.ready(resident=resident), step=1, gradient=gradient, bottom=bottom())
    assert "OutOfStepError: a gradient of shape" in reply.error.reason
    assert "a message was lost, repeated or changed" in reply.error.reason


@pytest.mark.parametrize("resident", [True, False])
@pytest.mark.parametrize(
    "wrong", ["of a new process", "without the gradient", "after another step's gradient"]
)
def test_weights_alone_do_not_take_a_node_to_the_next_step(resident: bool, wrong: str) -> None:
    grid = tiny.ready(resident=resident)
    if wrong != "of a new process":
        reply = answer(grid, bottom=bottom())
    if wrong == "after another step's gradient":
        backward(grid, reply, round=1, step=0)
    step = 2 if wrong == "after another step's gradient" else 1
    reply = ask(grid, step=step, bottom=bottom())
    assert "OutOfStepError: round 1, step" in reply.error.reason
    assert "came without a gradient" in reply.error.reason


@pytest.mark.parametrize("resident", [True, False])
def test_a_gradient_that_came_before_lets_weights_follow(resident: bool) -> None:
    grid = tiny.ready(resident=resident)
    backward(grid, answer(grid, bottom=bottom()), round=1, step=0)
    assert answer(grid, step=1, bottom=bottom()).smashed is not None


def backward(grid: Any, reply: SplitReply, **place: int) -> None:
    request = SplitRequest(**place, gradient=flat(reply.smashed))
    message = Message(request.records(), dst_node_id=1, message_type=BACKWARD_STEP)
    (reply_,) = grid.send_and_receive([message])
    assert not reply_.has_error(), reply_.error


@pytest.mark.parametrize("resident", [True, False])
def test_values_that_are_not_finite_say_where(resident: bool) -> None:
    grid = tiny.ready(resident=resident)
    reply = answer(grid, bottom=bottom())
    reply = ask(grid, step=1, gradient=flat(reply.smashed) * np.float32(np.nan))
    assert "UnstableTrainingError" in reply.error.reason
    assert "node 0 left the finite numbers (its smashed data) in round 1, step 1" in (
        reply.error.reason
    )


def test_a_last_bottom_that_is_not_finite_is_not_sent() -> None:
    grid = tiny.ready(plan=tiny.plan(local_steps=1))
    reply = answer(grid, bottom=bottom())
    reply = ask(grid, step=1, gradient=flat(reply.smashed) * np.float32(np.inf))
    assert "left the finite numbers (its bottom) in round 1, step 1" in reply.error.reason


@pytest.mark.parametrize("bottoms", ["sealed", "relayed"])
def test_the_closing_reply_carries_the_bottom_as_the_cell_says(bottoms: str) -> None:
    grid = tiny.ready(plan=tiny.plan(local_steps=1, bottoms=bottoms))
    reply = answer(grid, bottom=bottom(), bottoms=bottoms)
    closing = ask(grid, step=1, gradient=flat(reply.smashed))
    assert set(closing.content) == {"metrics", f"{bottoms}.bottom"}


def test_evaluation_sends_test_rows_through_the_bottom_it_was_given() -> None:
    grid = tiny.ready(model="stateful")
    request = EvaluateRequest(round=1, start=1, stop=4, bottom=bottom("stateful"))
    message = Message(request.records(), dst_node_id=1, message_type=SPLIT_EVALUATE)
    (reply,) = grid.send_and_receive([message])
    network = tiny.architecture("stateful").bottom(derive(tiny.SEED, "victim-init")).eval()
    images = tiny.recipe().dataset().images[tiny.recipe().split().test[1:4]]
    found = SplitReply.of(reply)
    assert np.array_equal(found.smashed, network(images).detach().numpy())
    assert found.examples == 3
    assert found.labels is None
