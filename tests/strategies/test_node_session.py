from typing import Any

import numpy as np
import pytest
import torch
from flwr.app import Context, Message, RecordDict
from flwr.clientapp import ClientApp

from leakbed.grids import LocalGrid, NodeFailed
from leakbed.wire.messages import BackwardReply, HeadReply, SplitReply, SplitRequest
from strategies.node_channel import NodeChannel
from strategies.node_session import NodeSession, NoLabelsError

pytestmark = pytest.mark.usefixtures("identity")


SMASHED = np.random.default_rng(0).normal(size=(4, 5)).astype(np.float32)
LABELS = np.array([0, 1, 2, 0])
GRADIENT = torch.ones(4, 5)


def node(*answers: Any) -> LocalGrid:
    """A node that sends these replies, whatever it is asked."""
    app, waiting = ClientApp(), list(answers)

    def answer(message: Message, context: Context) -> Message:
        records = waiting.pop(0)
        records = records if isinstance(records, RecordDict) else records.records()
        return Message(records, reply_to=message)

    for action in ("split", "head", "backward"):
        app.train(action)(answer)
    return LocalGrid(app, nodes=1)


def batch(step: int = 0, steps: int = 2, **fields: Any) -> SplitReply:
    chosen = {"smashed": SMASHED, "labels": LABELS, "examples": 4 * steps} | fields
    return SplitReply(steps=steps, step=step, **chosen)


def session(grid: LocalGrid, **settings: Any) -> NodeSession:
    opened = NodeSession(NodeChannel(grid, timeout=None), 1, round_=3, **settings)
    opened.open({"w": SMASHED})
    return opened


def turn(grid: LocalGrid, **settings: Any) -> NodeSession:
    one = session(grid, **settings)
    while not one.done:
        one.receive()
        one.answer(GRADIENT)
    return one


def test_a_turn_ends_with_the_last_gradient_still_to_be_sent() -> None:
    done = turn(node(batch(), batch(1)))
    request = done.closing()
    assert (request.round, request.step, done.steps, done.examples) == (3, 2, 2, 8)
    assert np.array_equal(request.gradient, GRADIENT)
    assert request.bottom is None


def test_a_turn_cannot_be_closed_before_its_end() -> None:
    begun = session(node(batch()))
    begun.receive()
    with pytest.raises(RuntimeError, match="node 1 has 2 batches left"):
        begun.closing()


def test_the_first_message_brings_the_bottom_and_a_batch_comes_back() -> None:
    seen: list[Message] = []

    class Seeing(LocalGrid):
        def push_messages(self, messages: Any) -> Any:
            sent = list(messages)
            seen.extend(sent)
            return super().push_messages(sent)

    grid = node(batch(rows=np.arange(4)))
    grid.__class__ = Seeing
    received = session(grid, bottoms="relayed").receive()
    request = SplitRequest.of(seen[0])
    assert (request.round, request.step, request.bottoms) == (3, 0, "relayed")
    assert request.bottom is not None
    assert np.array_equal(request.bottom["w"], SMASHED)
    assert np.array_equal(received.smashed, SMASHED)
    assert received.labelled[1].tolist() == LABELS.tolist()
    assert received.rows is not None
    assert received.rows.tolist() == [0, 1, 2, 3]


def test_labels_come_from_the_server_where_nodes_do_not_share_them() -> None:
    unlabelled = batch(1, labels=None, rows=np.array([3, 0, 1, 2]))
    held = {1: torch.tensor([5, 6, 7, 8])}
    one = session(node(batch(), unlabelled), labels=held)
    one.receive()
    one.answer(GRADIENT)
    assert one.receive().labelled[1].tolist() == [8, 5, 6, 7]


@pytest.mark.parametrize("held", [None, {2: torch.tensor(LABELS)}])
def test_no_labels_at_all_say_what_to_set(held: Any) -> None:
    received = session(node(batch(labels=None, rows=np.arange(4))), labels=held).receive()
    with pytest.raises(NoLabelsError, match=r"a node sent no labels; give the strategy its labels"):
        _ = received.labelled


@pytest.mark.parametrize(
    ("second", "match"),
    [
        (batch(1, smashed=None), "no batch 1 in round 3"),
        (batch(0), "a reply of step 0 came while step 1 was awaited"),
        (batch(1, steps=3), "step 1 of 3 with 12 samples, after it began with 2 and 8"),
        (batch(1, examples=9), "step 1 of 2 with 9 samples, after it began with 2 and 8"),
        (batch(1, smashed=SMASHED[:, :4]), r"shape \(4, 4\), expected batch x 5"),
        (batch(1, smashed=SMASHED[0]), r"shape \(5,\), expected batch x 5"),
        (batch(1, smashed=SMASHED[:0], labels=LABELS[:0]), r"shape \(0, 5\), expected batch x 5"),
        (batch(1, smashed=SMASHED.astype(int)), "are int64, no floating-point numbers"),
        (batch(1, labels=LABELS[:3]), r"labels of shape \(3,\).*expected 4 numbers"),
        (batch(1, labels=LABELS / 2), r"labels of shape \(4,\) and type float64"),
        (batch(1, rows=np.arange(5)), r"rows of shape \(5,\)"),
        (batch(1, smashed=SMASHED * np.float32(np.nan)), "smashed batch of round 3, step 1 is not"),
        (RecordDict(), "needs a MetricRecord under 'metrics'"),
    ],
)
def test_a_reply_that_does_not_fit_is_a_failure_of_its_node(second: Any, match: str) -> None:
    begun = session(node(batch(), second))
    begun.receive()
    begun.answer(GRADIENT)
    with pytest.raises(NodeFailed, match=match) as failed:
        begun.receive()
    assert failed.value.node == 0


def test_a_shape_that_is_known_is_insisted_on_from_the_first_batch() -> None:
    with pytest.raises(NodeFailed, match=r"smashed data of shape \(4, 5\), expected batch x 2 x 3"):
        session(node(batch()), smashed_shape=(2, 3)).receive()


def test_rows_that_the_server_has_no_labels_for_are_a_failure() -> None:
    strange = batch(labels=None, rows=np.array([0, 1, 2, 7]))
    with pytest.raises(NodeFailed, match=r"rows \[0, 1, 2, 7\] of a node with 4 samples"):
        session(node(strange), labels={1: torch.tensor(LABELS)}).receive()


def test_a_node_that_sends_fewer_samples_than_it_announced_is_a_failure() -> None:
    short = batch(1, smashed=SMASHED[:2], labels=LABELS[:2])
    with pytest.raises(NodeFailed, match="sent 6 samples in round 3, announced 8"):
        turn(node(batch(), short))


def test_a_gradient_that_is_not_finite_is_not_sent() -> None:
    begun = session(node(batch()))
    begun.receive()
    with pytest.raises(NodeFailed, match="cut gradient of round 3, step 0 is not finite; lower"):
        begun.answer(GRADIENT * torch.inf)


def test_features_and_their_gradient_make_an_exchange_of_their_own() -> None:
    upper = np.full((4, 2), 0.5, dtype=np.float32)
    begun = session(node(batch(), HeadReply(step=0, gradient=upper)))
    begun.receive()
    begun.send_features(torch.ones(4, 2))
    assert np.array_equal(begun.receive_upper(), upper)


@pytest.mark.parametrize(
    ("reply", "match"),
    [
        (HeadReply(step=1, gradient=SMASHED), "a reply of step 1 came while step 0 was awaited"),
        (HeadReply(step=0, gradient=SMASHED * np.float32(np.inf)), "gradient of the features of"),
        (batch(), "needs the gradient of the features"),
    ],
)
def test_a_wrong_gradient_of_the_features_is_a_failure(reply: Any, match: str) -> None:
    begun = session(node(batch(), reply))
    begun.receive()
    begun.send_features(torch.ones(4, 2))
    with pytest.raises(NodeFailed, match=match) as failed:
        begun.receive_upper()
    assert failed.value.message_type == "train.head"


def test_a_bottom_may_answer_with_its_gradient_and_go_on_from_given_weights() -> None:
    own = {"w": np.ones(2, dtype=np.float32)}
    begun = session(node(batch(), BackwardReply(step=0, gradient=own), batch(1)))
    begun.receive()
    begun.send_backward(GRADIENT)
    assert begun.receive_backward()["w"].tolist() == [1, 1]
    begun.resume({"w": SMASHED})
    assert begun.receive().labelled[1].tolist() == LABELS.tolist()
    begun.resume({"w": SMASHED})
    assert begun.closing().bottom is not None
