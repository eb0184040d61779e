import pytest
from flwr.app import Context, Message
from flwr.clientapp import ClientApp

from leakbed.flower_internals import CLIENT_RAISED, NODE_UNAVAILABLE
from leakbed.grids.base import (
    MessageIds,
    NodeHost,
    StickyContext,
    describe,
    expired,
    node_ids,
    unavailable,
)
from tests.support import strange_nodes

pytestmark = pytest.mark.usefixtures("identity")


def test_a_node_keeps_its_memory_and_shares_it_with_nobody() -> None:
    host = NodeHost(strange_nodes.app, node_ids(2))
    replies = [host.handle(strange_nodes.message(node, "count")) for node in (1, 1, 2)]
    assert [strange_nodes.said(reply)["calls"] for reply in replies] == [1, 2, 1]
    assert [reply.metadata.src_node_id for reply in replies] == [1, 1, 2]


def test_contexts_say_which_partition_of_how_many_a_node_is() -> None:
    context = StickyContext(node_id=4, partition=3, partitions=7)
    assert context.node_config == {"partition-id": 3, "num-partitions": 7}
    assert isinstance(context, Context)


def test_nodes_come_to_life_with_their_first_message() -> None:
    host = NodeHost(strange_nodes.app, node_ids(1000))
    assert not host._contexts
    host.handle(strange_nodes.message(7, "count"))
    assert list(host._contexts) == [7]


def test_a_node_that_keeps_nothing_alive_may_go_and_go_on_elsewhere() -> None:
    here, there = (NodeHost(strange_nodes.app, node_ids(3)) for _ in range(2))
    here.handle(strange_nodes.message(2, "remember"))
    state = here.depart(2)
    assert state is not None
    assert not here._contexts
    there.settle(2, state)
    reply = there.handle(strange_nodes.message(2, "remember"))
    assert strange_nodes.said(reply)["calls"] == 2


def test_a_node_that_keeps_something_alive_cannot_go() -> None:
    host = NodeHost(strange_nodes.app, node_ids(3))
    host.handle(strange_nodes.message(2, "count"))
    assert host.depart(2) is None
    assert list(host._contexts) == [2]


def test_an_expired_message_says_how_long_it_had() -> None:
    sent = strange_nodes.message(1, "count")
    sent.metadata.ttl = 2.5
    assert expired(sent).error.reason == "no reply within 2.5 s"


def test_an_exception_becomes_an_error_reply_that_names_its_place() -> None:
    host = NodeHost(strange_nodes.app, node_ids(1))
    sent = strange_nodes.message(1, "raise")
    MessageIds("x").stamp(sent)
    reply = host.handle(sent)
    assert reply.error.code == CLIENT_RAISED
    assert str(reply.error.reason).startswith("ZeroDivisionError: no reason at all (strange_nodes")
    assert reply.metadata.reply_to_message_id == "x-0"


def test_an_app_without_the_handler_is_an_error_reply() -> None:
    reply = NodeHost(ClientApp(), node_ids(1)).handle(strange_nodes.message(1, "count"))
    assert reply.has_error()


def test_no_node_has_flowers_number_for_none() -> None:
    assert node_ids(3) == {1: 0, 2: 1, 3: 2}


def test_ids_are_unique_and_carry_their_prefix() -> None:
    ids = MessageIds("here")
    sent = [strange_nodes.message(1, "count") for _ in range(3)]
    assert [ids.stamp(message) for message in sent] == ["here-0", "here-1", "here-2"]
    assert [message.metadata.message_id for message in sent] == ["here-0", "here-1", "here-2"]


def test_unavailable_is_an_error_reply_to_its_message() -> None:
    sent = strange_nodes.message(5, "count")
    reply = unavailable(sent, "gone")
    assert isinstance(reply, Message)
    assert (reply.error.code, reply.error.reason) == (NODE_UNAVAILABLE, "gone")
    assert reply.metadata.src_node_id == 5


def test_an_exception_that_was_never_raised_is_described_too() -> None:
    assert describe(KeyError("a")) == "KeyError: 'a' (?, line 0)"
