"""A node's head: what it computes, what it keeps between messages, and what it refuses."""

from collections.abc import Iterator
from dataclasses import replace
from typing import Any

import numpy as np
import pytest
import torch
from flwr.app import Message
from torch import nn

from leakbed.seeds import derive, scoped
from leakbed.wire.messages import (
    HEAD_EVALUATE,
    HEAD_STEP,
    SPLIT_STEP,
    HeadEvaluateReply,
    HeadEvaluateRequest,
    HeadReply,
    HeadRequest,
    SplitReply,
    SplitRequest,
)
from tests.support import tiny
from tests.support.u_shaped import at_home, network

STREAM = derive(tiny.SEED, "victim-init")


@pytest.fixture(autouse=True)
def identity() -> Iterator[None]:
    with tiny.identity():
        yield


@pytest.fixture(params=[True, False], ids=["resident", "stateless"])
def resident(request: pytest.FixtureRequest) -> bool:
    chosen: bool = request.param
    return chosen


def part(model: str = "everywhere") -> dict[str, Any]:
    """The first weights of a node's part: bottom and head."""
    modules = network(model).bottom(STREAM), network(model).head(STREAM)
    return {name: value.numpy() for m in modules for name, value in m.state_dict().items()}


def ready(*, resident: bool, model: str = "everywhere", **plan: Any) -> Any:
    return tiny.ready(resident=resident, plan=at_home(**plan), architecture=network(model))


def send(grid: Any, kind: str, records: Any) -> Message:
    (reply,) = grid.send_and_receive([Message(records, dst_node_id=1, message_type=kind)])
    return reply


def smashed(grid: Any, *, round_: int = 1, step: int = 0, **fields: Any) -> SplitReply:
    """Open a round, or go on with it."""
    if step == 0:
        fields = {"bottom": part()} | fields
    request = SplitRequest(round=round_, step=step, **fields)
    reply = send(grid, SPLIT_STEP, request.records())
    assert not reply.has_error(), reply.error
    return SplitReply.of(reply)


def features(round_: int = 1, step: int = 0, *, rows: int = 8) -> Any:
    noise = torch.Generator().manual_seed(100 * round_ + step)
    return torch.randn(rows, 12, generator=noise).numpy()


def step(grid: Any, sent: Any = None, *, round_: int = 1, step: int = 0) -> HeadReply:
    reply = send(grid, HEAD_STEP, request(sent, round_=round_, step=step).records())
    assert not reply.has_error(), reply.error
    return HeadReply.of(reply)


def request(sent: Any = None, *, round_: int = 1, step: int = 0) -> HeadRequest:
    sent = features(round_, step) if sent is None else sent
    return HeadRequest(round=round_, step=step, features=sent)


def refused(grid: Any, sent: Any = None, *, round_: int = 1, step: int = 0) -> str:
    reply = send(grid, HEAD_STEP, request(sent, round_=round_, step=step).records())
    assert reply.has_error()
    return str(reply.error.reason)


def one_round(grid: Any, round_: int = 1, **opening: Any) -> tuple[list[Any], Any]:
    """Drive a round of three steps with made-up features; return gradients and the node's part."""
    made, replied = [], smashed(grid, round_=round_, **opening)
    for at in range(3):
        made.append(step(grid, round_=round_, step=at).gradient)
        gradient = np.zeros_like(replied.smashed)
        replied = smashed(grid, round_=round_, step=at + 1, gradient=gradient)
    return made, replied.bottom


@pytest.mark.parametrize("kept", ["kept", "fresh"])
def test_a_head_trains_as_a_plain_loop_does(resident: bool, kept: str) -> None:
    settings = {"momentum": 0.9, "weight_decay": 0.01, "optimizer_state": kept}
    grid = ready(resident=resident, **settings)
    _, first = one_round(grid, 1)
    made, second = one_round(grid, 2, bottom=first)

    cell = tiny.cell(plan=at_home(**settings))
    images, labels = cell.rows()
    head = network("everywhere").head(STREAM)
    expected: list[Any] = []
    optimiser = cell.plan.optimiser(head.parameters())
    for round_ in (1, 2):
        if kept == "fresh":
            optimiser = cell.plan.optimiser(head.parameters())
        for at, batch in enumerate(cell.batches(round_, len(images))):
            received = torch.from_numpy(features(round_, at)).requires_grad_()
            optimiser.zero_grad()
            with scoped(derive(cell.stream, f"head/{round_}/{at}")):
                nn.functional.cross_entropy(head(received), labels[batch]).backward()
            optimiser.step()
            expected.append(received.grad)
    assert [np.array_equal(a, b) for a, b in zip(made, expected[3:], strict=True)] == [True] * 3
    own = {name: value.numpy() for name, value in head.state_dict().items()}
    assert int(own["7.num_batches_tracked"]) == 6
    assert all(np.array_equal(second[name], own[name]) for name in own)


def test_a_node_may_go_on_with_the_head_it_holds(resident: bool) -> None:
    grid = ready(resident=resident, momentum=0.9)
    _, closed = one_round(grid, 1)
    held, _ = one_round(grid, 2, bottom=None)
    grid = ready(resident=resident, momentum=0.9)
    one_round(grid, 1)
    given, _ = one_round(grid, 2, bottom=closed)
    assert all(np.array_equal(a, b) for a, b in zip(held, given, strict=True))


def test_a_closed_round_leaves_all_in_the_nodes_state() -> None:
    grid = ready(resident=True, momentum=0.9)
    one_round(grid, 1)
    context = grid._host._contexts[1]
    assert context.live == {}
    assert {"leakbed.head", "leakbed.head-optimiser"} <= set(context.state)
    assert not context.state.config_records.get("leakbed.head-awaited")


def test_features_are_never_written_to(resident: bool) -> None:
    grid, sent = ready(resident=resident), features()
    kept = sent.copy()
    smashed(grid)
    step(grid, sent)
    assert np.array_equal(sent, kept)


@pytest.mark.parametrize("wrong", ["before", "repeated", "step", "round", "closed"])
def test_features_out_of_step_are_refused(resident: bool, wrong: str) -> None:
    grid = ready(resident=resident)
    if wrong == "closed":
        one_round(grid, 1)
        reason = refused(grid, step=3)
    elif wrong == "before":
        reason = refused(grid)
    else:
        smashed(grid)
        if wrong == "repeated":
            step(grid)
        place = {"repeated": (1, 0), "step": (1, 1), "round": (2, 0)}[wrong]
        reason = refused(grid, round_=place[0], step=place[1])
    assert reason.startswith("OutOfStepError: features came for round")
    waits = "round 1, step 0 waits" if wrong in {"step", "round"} else "no batch waits"
    assert f"but {waits} for them; a message was lost, repeated or changed" in reason


@pytest.mark.parametrize(
    ("sent", "words"),
    [
        (features(rows=7), r"(7, 12) and type torch.float32 came; the head expects (8, 12) of"),
        (features()[:, :11], r"(8, 11) and type"),
        (features()[..., None], r"(8, 12, 1) and type"),
        (features().astype(np.float64), r"(8, 12) and type torch.float64 came; the head expects"),
    ],
)
def test_features_that_do_not_fit_are_refused(resident: bool, sent: Any, words: str) -> None:
    grid = ready(resident=resident)
    smashed(grid)
    reason = refused(grid, sent)
    assert f"OutOfStepError: features of shape {words}" in reason
    step(grid)  # the batch still waits


@pytest.mark.parametrize("value", [np.nan, np.inf])
def test_features_that_are_not_finite_are_refused(resident: bool, value: float) -> None:
    grid = ready(resident=resident)
    smashed(grid)
    sent = features()
    sent[3, 5] = value
    reason = refused(grid, sent)
    assert "UnstableTrainingError" in reason
    assert "(the features it was sent) in round 1, step 0; lower protocol" in reason


def test_a_gradient_that_is_not_finite_is_not_sent() -> None:
    grid = ready(resident=True, model="plain")
    weights = part("plain")
    weights["5.weight"] = np.full_like(weights["5.weight"], 3e38)
    smashed(grid, bottom=weights)
    sent = np.full((8, 3, 2, 2), 1e30, dtype=np.float32)
    assert "UnstableTrainingError" in refused(grid, sent)


@pytest.mark.parametrize("last", [False, True])
def test_a_batch_whose_features_never_came_is_not_passed_over(resident: bool, last: bool) -> None:
    grid = ready(resident=resident, local_steps=1 if last else 3)
    replied = smashed(grid)
    request = SplitRequest(round=1, step=1, gradient=np.zeros_like(replied.smashed))
    reason = send(grid, SPLIT_STEP, request.records()).error.reason
    assert "OutOfStepError: the features of round 1, step 0 never came" in reason


def test_a_model_that_is_cut_once_has_no_head(resident: bool) -> None:
    grid = tiny.ready(resident=resident)
    assert "IllegalCutError: a U-shaped network is cut twice" in refused(grid)
    once = replace(tiny.cell(), plan=at_home())
    assert once.architecture.upper_cut is None


def evaluated(grid: Any, sent: Any, *, start: int, stop: int) -> Message:
    request = HeadEvaluateRequest(
        round=1, start=start, stop=stop, features=sent, bottom=part(), bottoms="sealed"
    )
    return send(grid, HEAD_EVALUATE, request.records())


def test_evaluation_answers_with_counts_alone(resident: bool) -> None:
    grid, sent = ready(resident=resident), features(rows=4)
    reply = evaluated(grid, sent, start=1, stop=5)
    assert list(reply.content) == ["metrics"]
    found = HeadEvaluateReply.of(reply)
    data = tiny.recipe()
    truth = data.dataset().labels[data.split().test[1:5]]
    head = network("everywhere").head(STREAM).eval()
    right = int((head(torch.from_numpy(sent)).argmax(1) == truth).sum())
    assert (found.correct, found.examples) == (right, 4)


def test_a_head_without_finite_logits_is_never_right(resident: bool) -> None:
    """Class 0 is among the rows; a network that says nothing must not be taken to say it."""
    grid, stop = ready(resident=resident), 5
    data = tiny.recipe()
    assert (data.dataset().labels[data.split().test[:stop]] == 0).any()
    largest = np.finfo(np.float32).max  # finite, as a node insists, but what comes of it is not
    broken = {k: v * 0 + largest if v.dtype.kind == "f" else v for k, v in part().items()}
    request = HeadEvaluateRequest(
        round=1, start=0, stop=stop, features=features(rows=stop), bottom=broken, bottoms="sealed"
    )
    found = HeadEvaluateReply.of(send(grid, HEAD_EVALUATE, request.records()))
    assert (found.correct, found.examples) == (0, stop)


@pytest.mark.parametrize(("start", "stop", "rows"), [(0, 4, 3), (4, 8, 4)])
def test_evaluation_of_rows_that_are_not_there_is_refused(start: int, stop: int, rows: int) -> None:
    reply = evaluated(ready(resident=True), features(rows=rows), start=start, stop=stop)
    there = len(range(start, min(stop, 6)))
    assert f"the head expects ({there}, 12) of torch.float32" in reply.error.reason
