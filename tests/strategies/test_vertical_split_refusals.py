"""Vertical split learning refuses parties that are not aligned, do not fit or are not there."""

from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
import torch
from flwr.app import ArrayRecord, ConfigRecord, Context, Message
from flwr.clientapp import ClientApp

from leakbed.grids import LocalGrid, NodeFailed
from leakbed.wire.messages import SplitReply, SplitRequest
from strategies.node_channel import NodeChannel
from strategies.node_session import NodeSession
from tests.support.parties import ORDER, network, plan, ready, strategy, train

pytestmark = pytest.mark.usefixtures("identity")


def test_parties_that_shuffle_differently_are_refused() -> None:
    settings, architecture = plan(), network("joined", 1)
    grid = ready(2, architecture, settings, orders=(ORDER, ORDER + 1))
    with pytest.raises(NodeFailed, match=r"node 1 failed .*rows \[.*\] at step 0, while the first"):
        train(grid, strategy(2, architecture, settings))


def test_a_party_that_is_not_there_is_named() -> None:
    settings, architecture = plan(), network("joined", 1)
    grid = ready(1, architecture, settings)
    with pytest.raises(NodeFailed, match=r"node 1 failed .*1 nodes are there for 2 parties"):
        train(grid, strategy(2, architecture, settings))


def test_a_fraction_of_the_parties_cannot_train() -> None:
    with pytest.raises(ValueError, match=r"fraction of 0\.5 of the parties"):
        strategy(2, network("joined", 1), plan(), fraction_train=0.5)


def answering(odd: Callable[[SplitRequest, dict[str, Any]], dict[str, Any]]) -> LocalGrid:
    """Two parties of made-up batches, of which the second answers as it likes."""
    app = ClientApp()

    @app.train("split")
    def step(message: Message, context: Context) -> Message:
        request = SplitRequest.of(message)
        reply: dict[str, Any] = {
            "steps": 2,
            "examples": 6,
            "step": request.step,
            "smashed": np.ones((3, 4, 1, 3)),
            "rows": np.arange(3) + 3 * request.step,
        }
        if context.node_config["partition-id"] == 1:
            reply = odd(request, reply)
        return Message(SplitReply(**reply).records(), reply_to=message)

    return LocalGrid(app, nodes=2)


@pytest.mark.parametrize(
    ("change", "cause"),
    [
        ({"rows": np.array([0, 2, 1])}, r"rows \[0, 2, 1\] at step 1.* sent \[3, 4, 5\]"),
        ({"rows": None}, "no row ids at step 1"),
        ({"smashed": np.ones((3, 4, 1, 2))}, r"smashed data of shape \(3, 4, 1, 2\)"),
        (
            {"smashed": np.ones((3, 4, 1, 3), np.float32)},
            "is float32, the server's part is float64",
        ),
        ({"smashed": np.ones((2, 4, 1, 3)), "rows": np.arange(2)}, r"rows \[0, 1\] at step 1"),
        ({"rows": np.array([3, 4, 1000])}, "samples"),
    ],
)
def test_a_party_whose_batch_does_not_fit_is_named(change: dict[str, Any], cause: str) -> None:
    def odd(request: SplitRequest, reply: dict[str, Any]) -> dict[str, Any]:
        return reply | change if request.step == 1 else reply

    with pytest.raises(NodeFailed, match=f"node 1 failed on 'train.split': .*{cause}"):
        train(answering(odd), strategy(2, network("joined", 1), plan()))


def test_a_party_with_more_rows_is_refused_at_once() -> None:
    def odd(request: SplitRequest, reply: dict[str, Any]) -> dict[str, Any]:
        return reply | {"steps": 3, "examples": 9}

    with pytest.raises(NodeFailed, match=r"node 1 .*9 samples in 3 steps.* first party has 6 in 2"):
        train(answering(odd), strategy(2, network("joined", 1), plan()))


def test_a_party_that_is_evaluated_on_other_rows_is_named() -> None:
    app = ClientApp()

    @app.evaluate("split")
    def evaluate(message: Message, context: Context) -> Message:
        rows = 4 - int(context.node_config["partition-id"])
        smashed = np.ones((rows, 4, 1, 3))
        return Message(SplitReply(steps=0, examples=4, smashed=smashed).records(), reply_to=message)

    grid = LocalGrid(app, nodes=2)
    chosen = strategy(
        2, network("joined", 1), plan(), test_labels=torch.zeros(4).long(), evaluate_rounds=[1]
    )
    chosen._grid = grid
    chosen._sessions = [
        NodeSession(NodeChannel(grid, timeout=None), node, round_=1) for node in (1, 2)
    ]
    messages = chosen.configure_evaluate(1, ArrayRecord(), ConfigRecord(), grid)
    replies = grid.send_and_receive(messages)
    with pytest.raises(NodeFailed, match=r"node 1 failed on 'evaluate\.split': .*\(3, 4, 1, 3\)"):
        chosen.aggregate_evaluate(1, replies)
