from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any, ClassVar

import numpy as np
import pytest
import torch
from flwr.app import Context, Error, Message, RecordDict
from flwr.clientapp import ClientApp
from torch import Tensor, nn

from leakbed.contracts import Defense, DefenseState, Protects
from leakbed.grids import LocalGrid, NodeFailed
from leakbed.wire.messages import SPLIT_STEP, SplitReply, SplitRequest
from strategies.split_loop import NoLabelsError, TopTrainer, checked, exchange, take_turn
from tests import tiny


@pytest.fixture(autouse=True)
def identity() -> Iterator[None]:
    with tiny.identity():
        yield


SMASHED = np.random.default_rng(0).normal(size=(4, 5)).astype(np.float32)
LABELS = torch.tensor([0, 1, 2, 0])


def top(**settings: Any) -> TopTrainer:
    torch.manual_seed(0)
    layers = nn.Sequential(nn.Linear(5, 3))
    return TopTrainer(layers, torch.optim.SGD(layers.parameters(), lr=0.5), **settings)


def test_a_step_returns_the_gradient_of_the_weights_before_it() -> None:
    trainer, twin = top(), top()
    gradient = trainer.step(SMASHED, LABELS)
    received = torch.from_numpy(SMASHED).requires_grad_()
    nn.functional.cross_entropy(twin.top(received), LABELS).backward()
    assert received.grad is not None
    assert np.array_equal(gradient, received.grad.numpy())
    moved = twin.top[0].weight - 0.5 * twin.top[0].weight.grad
    assert torch.equal(trainer.top[0].weight, moved)


def test_a_step_does_not_change_what_it_received() -> None:
    smashed = SMASHED.copy()
    top().step(smashed, LABELS)
    assert np.array_equal(smashed, SMASHED)


def test_weights_load_and_come_back_the_same() -> None:
    one, two = top(), top()
    one.step(SMASHED, LABELS)
    two.load(one.arrays())
    assert tiny.same(one.top.state_dict(), two.top.state_dict())
    assert one.predict(SMASHED).tolist() == one.top(torch.from_numpy(SMASHED)).argmax(1).tolist()


@dataclass(frozen=True, kw_only=True)
class Count(Defense):
    """Adds the number of messages so far, then multiplies."""

    name: ClassVar[str] = "count"
    source: ClassVar[str] = "nowhere"
    protects: ClassVar[frozenset[Protects]] = frozenset({Protects.CUT_GRADIENT})
    times: float = 1.0

    def protect_cut_gradient(
        self, state: DefenseState, gradient: Tensor
    ) -> tuple[DefenseState, Tensor]:
        return state, (gradient + state.messages) * self.times


def test_cut_gradients_are_protected_in_order_and_the_state_advances() -> None:
    plain, defended = top(), top(defences=(Count(times=2.0), Count()), defence_stream=3)
    for message in range(3):
        gradient = plain.step(SMASHED, LABELS)
        protected = defended.step(SMASHED, LABELS)
        np.testing.assert_allclose(protected, (gradient + message) * 2 + message, rtol=1e-6)
    assert tiny.same(plain.top.state_dict(), defended.top.state_dict())  # only what is sent


def message(node: int = 1) -> Message:
    request = SplitRequest(round=1, step=0, bottom={"w": SMASHED})
    return Message(request.records(), dst_node_id=node, message_type=SPLIT_STEP)


def numbered(count: int) -> list[Message]:
    messages = [message(node) for node in range(1, count + 1)]
    for sent in messages:
        tiny.set_message_id(sent, f"id-{sent.metadata.dst_node_id}")
    return messages


def test_replies_are_put_in_the_order_of_the_messages() -> None:
    sent = numbered(3)
    replies = [Message(RecordDict(), reply_to=one) for one in sent]
    assert checked([replies[2], replies[0], replies[1]], sent) == replies


def test_an_error_or_a_silence_stops_the_run() -> None:
    sent = numbered(2)
    fine = Message(RecordDict(), reply_to=sent[0])
    with pytest.raises(NodeFailed, match=r"node 2 failed on 'train\.split': no reply"):
        checked([fine], sent)
    bad = Message(Error(0, "out of memory"), reply_to=sent[1])
    with pytest.raises(NodeFailed, match=r"node 2 failed on 'train\.split': out of memory"):
        checked([bad, fine], sent)


def node(*answers: SplitReply) -> LocalGrid:
    """A node that sends these replies, whatever it is asked."""
    app, waiting = ClientApp(), list(answers)

    @app.train("split")
    def step(message: Message, context: Context) -> Message:
        return Message(waiting.pop(0).records(), reply_to=message)

    return LocalGrid(app, nodes=1)


def batch(steps: int = 2, **fields: Any) -> SplitReply:
    fields = {"smashed": SMASHED, "labels": LABELS.numpy()} | fields
    return SplitReply(steps=steps, examples=4 * steps, **fields)


def turn(grid: LocalGrid, **settings: Any) -> Any:
    chosen = {"round_": 3, "bottom": {"w": SMASHED}, "bottoms": "sealed"} | settings
    return take_turn(grid, 1, top(), **({"labels": None, "timeout": None} | chosen))


def test_a_turn_ends_with_the_last_gradient_still_to_be_sent() -> None:
    found = turn(node(batch(), batch()))
    request = SplitRequest.of(found.closing)
    assert (request.round, request.step, found.examples) == (3, 2, 8)
    trainer = top()
    trainer.step(SMASHED, LABELS)
    assert np.array_equal(request.gradient, trainer.step(SMASHED, LABELS))
    assert request.bottom is None


def test_a_node_that_ends_its_turn_early_is_a_failure() -> None:
    with pytest.raises(NodeFailed, match="no batch 1 in round 3"):
        turn(node(batch(), batch(smashed=None)))


def test_labels_come_from_the_server_where_nodes_do_not_share_them() -> None:
    unlabelled = batch(1, labels=None, rows=np.array([3, 0, 1, 2]))
    held = {1: LABELS[torch.tensor([1, 2, 3, 0])]}
    one, two = turn(node(unlabelled), labels=held), turn(node(batch(1)))
    gradients = [SplitRequest.of(found.closing).gradient for found in (one, two)]
    assert np.array_equal(*gradients)


@pytest.mark.parametrize("held", [None, {2: LABELS}])
def test_no_labels_at_all_say_what_to_set(held: Any) -> None:
    with pytest.raises(NoLabelsError, match=r"node 1 sent no labels; give the strategy its labels"):
        turn(node(batch(labels=None, rows=np.arange(4))), labels=held)


def test_a_gradient_that_is_not_finite_is_not_sent() -> None:
    nothing = batch(smashed=SMASHED * np.float32(np.nan))
    with pytest.raises(NodeFailed, match="cut gradient of round 3, step 1 is not finite; lower"):
        turn(node(batch(), nothing))


def test_an_exchange_that_takes_too_long_is_a_failure() -> None:
    class Deaf(LocalGrid):
        def send_and_receive(self, messages: Any, *, timeout: float | None = None) -> Any:
            assert timeout == 0.5
            return []

    with pytest.raises(NodeFailed, match="no reply"):
        exchange(Deaf(ClientApp(), nodes=1), message(), timeout=0.5)
