"""What every split protocol refuses, whichever node sends it and whenever nodes come and go."""

from collections.abc import Callable, Iterator
from typing import Any

import numpy as np
import pytest
import torch
from flwr.app import ArrayRecord, Message, MetricRecord
from flwr.serverapp import Grid

from leakbed.events import Event, SmashedUp
from leakbed.grids import NodeFailed
from leakbed.wire.messages import SPLIT_EVALUATE, SPLIT_STEP
from leakbed.wire.records import BOTTOMS, METRICS, SMASHED, pack, unpack
from strategies import PROTOCOLS
from tests.support import several_nodes

pytestmark = pytest.mark.usefixtures("identity")

# The two that give a node a head or a strip have their own tests.
PLAIN = [name for name, e in PROTOCOLS.items() if e.parts == 2 and e.divides == "rows"]
NODES = 3


def trained(protocol: str, *, rounds: int = 2, **changes: Any) -> several_nodes.Weights:
    settings = several_nodes.plan(local_steps=2)
    return several_nodes.trained(protocol, settings, rounds=rounds, nodes=NODES, **changes)


def spoiled(
    protocol: str, alter: Callable[[Message], None], *, kind: str = SPLIT_STEP, **changes: Any
) -> NodeFailed:
    """The failure after partition 1's replies of a type are altered."""

    def only(reply: Message) -> None:
        about = reply.metadata
        if about.src_node_id == 2 and about.message_type == kind and reply.has_content():
            alter(reply)

    with pytest.raises(NodeFailed) as failed:
        trained(protocol, alter=only, **changes)
    assert failed.value.node == 1
    return failed.value


def smashed(reply: Message, change: Callable[[np.ndarray], np.ndarray]) -> None:
    if SMASHED in reply.content:
        batch = unpack(reply.content.array_records[SMASHED])
        reply.content[SMASHED] = pack({**batch, "smashed": change(batch["smashed"])})


@pytest.mark.parametrize("protocol", PLAIN)
@pytest.mark.parametrize(
    ("change", "match"),
    [
        (lambda array: array[:, :1], "smashed data of shape"),
        (lambda array: array[:-1], "labels of shape"),
        (lambda array: array.astype(np.float32), "is float32, the server's part is float64"),
        (lambda array: array.astype(np.int64), "no floating-point numbers"),
        (lambda array: array * np.nan, "is not finite"),
    ],
)
def test_a_smashed_batch_that_does_not_fit_is_its_nodes_failure(
    protocol: str, change: Callable[[np.ndarray], np.ndarray], match: str
) -> None:
    failure = spoiled(protocol, lambda reply: smashed(reply, change))
    assert match in failure.cause
    assert failure.message_type == SPLIT_STEP


@pytest.mark.parametrize("protocol", PLAIN)
def test_a_reply_of_another_step_or_without_its_records_is_its_nodes_failure(protocol: str) -> None:
    def late(reply: Message) -> None:
        reply.content.metric_records[METRICS]["step"] = 7

    assert "a reply of step 7 came while step" in spoiled(protocol, late).cause

    def bare(reply: Message) -> None:
        reply.content[METRICS] = ArrayRecord()

    assert "needs a MetricRecord under 'metrics'" in spoiled(protocol, bare).cause


@pytest.mark.parametrize("protocol", PLAIN)
def test_a_round_that_ends_without_its_bottom_is_its_nodes_failure(protocol: str) -> None:
    def bare(reply: Message) -> None:
        if BOTTOMS["relayed"] in reply.content:
            del reply.content[BOTTOMS["relayed"]]

    assert "no relayed bottom in the closing reply" in spoiled(protocol, bare).cause

    def resealed(reply: Message) -> None:
        if BOTTOMS["relayed"] in reply.content:
            reply.content[BOTTOMS["sealed"]] = reply.content[BOTTOMS["relayed"]]
            del reply.content[BOTTOMS["relayed"]]

    assert "no relayed bottom in the closing reply" in spoiled(protocol, resealed).cause


@pytest.mark.parametrize(
    ("change", "match"),
    [
        (lambda array: array[1:], "finite numbers"),
        (lambda array: array * np.inf, "finite numbers"),
        (lambda array: array.astype(np.float32), "is float32, the server's part is float64"),
    ],
)
def test_an_evaluation_that_does_not_fit_is_its_nodes_failure(
    change: Callable[[np.ndarray], np.ndarray], match: str
) -> None:
    truth = several_nodes.data(2).dataset().labels[several_nodes.data(2).split().test]
    settings = several_nodes.plan(local_steps=1)

    def alter(reply: Message) -> None:
        if reply.metadata.message_type == SPLIT_EVALUATE:
            smashed(reply, change)

    with pytest.raises(NodeFailed, match=match) as failed:
        several_nodes.trained(
            "vanilla-split",
            settings,
            rounds=1,
            nodes=2,
            alter=alter,
            test_labels=truth,
            evaluate_rounds=(1,),
        )
    assert (failed.value.node, failed.value.message_type) == (1, SPLIT_EVALUATE)


def test_an_evaluation_without_smashed_data_is_its_nodes_failure() -> None:
    def alter(reply: Message) -> None:
        if reply.metadata.message_type == SPLIT_EVALUATE:
            del reply.content[SMASHED]

    with pytest.raises(NodeFailed, match="no smashed data in the reply"):
        trained(
            "splitfed-v1",
            rounds=1,
            alter=alter,
            test_labels=torch.zeros(6, dtype=torch.long),
            evaluate_rounds=(1,),
        )


def test_who_trains_is_looked_up_in_one_pass_over_the_sampled(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    passes: list[int] = []

    class Sampled(list[int]):
        def __iter__(self) -> Iterator[int]:
            passes.append(len(self))
            return super().__iter__()

    def sampling(grid: Grid, *_: int) -> tuple[Sampled, list[int]]:
        everyone = list(grid.get_node_ids())
        return Sampled(everyone), everyone

    monkeypatch.setattr("strategies.split_strategy.sample_nodes", sampling)
    trained("splitfed-v1", rounds=1)
    assert passes == [NODES]


@pytest.mark.parametrize("protocol", PLAIN)
def test_nodes_may_join_and_leave_between_rounds(protocol: str) -> None:
    events: list[Event] = []
    present = [[0, 1], [0, 1, 2], [2]]
    trained(protocol, rounds=3, present=present, events=events)
    for round_, nodes in enumerate(present, start=1):
        sent = {e.node for e in events if isinstance(e, SmashedUp) and e.round == round_}
        assert sent == set(nodes)


@pytest.mark.parametrize("protocol", PLAIN)
def test_a_node_that_is_gone_when_it_is_sampled_is_a_failure(protocol: str) -> None:
    with pytest.raises(NodeFailed, match="no such node"):
        trained(protocol, present=[[0, 1], [0, 6]])


@pytest.mark.parametrize("protocol", PLAIN)
def test_a_round_counts_the_samples_it_trained_on(protocol: str) -> None:
    settings = several_nodes.plan(local_steps=2)
    grid = several_nodes.grid(settings, nodes=NODES)
    server = several_nodes.built(protocol, settings, nodes=NODES)
    result = server.strategy.start(grid, server.arrays, num_rounds=2)
    counted = [metrics["num-examples"] for metrics in result.train_metrics_clientapp.values()]
    assert counted == [NODES * 2 * 4] * 2
    assert all(isinstance(m, MetricRecord) for m in result.train_metrics_clientapp.values())
