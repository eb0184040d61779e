"""A worker that dies at any message of any protocol: the same bits in the end, or the run stops.

RayGrid in small: a node is what it last handed in, and its memory lives in a worker. Before one
message, chosen in turn, the worker is replaced, so that its nodes go on from what they handed in.
"""

from collections import Counter
from collections.abc import Iterable, Iterator
from dataclasses import dataclass, field
from typing import Any

import pytest
import torch
from flwr.app import Message, RecordDict
from flwr.serverapp import Grid
from flwr.serverapp.strategy import FedAvg

from clients import node_app
from leakbed.contracts import DefenseState
from leakbed.events import Event
from leakbed.grids import DeterministicGrid, LocalGrid, NodeFailed
from leakbed.seeds import derive, scoped
from leakbed.tap.wiretap import GridWrapper, Wiretap
from leakbed.wire.messages import SETUP
from leakbed.wire.records import copy_records
from strategies import PROTOCOLS
from strategies.split_strategy import SplitStrategy
from tests.support import parties, several_nodes, tiny, u_shaped

pytestmark = pytest.mark.usefixtures("identity")

NODES, ROUNDS, STEPS = 2, 2, 1
TRUTH = torch.zeros(4, dtype=torch.long)
NOISE = ("smashed-noise", {"sigma": 0.1})
HELD = {"test_labels": TRUTH, "evaluate_rounds": (1, 2)}
CASES = [*PROTOCOLS, "parallel-split step"]
# Where several nodes are in the middle of a round, one may be gone and the other not.
ABREAST = ["parallel-split", "parallel-split step", "splitfed-v1", "splitfed-v2"]


class Replacing(GridWrapper):
    """A grid one of whose workers is replaced before a message that is not the harness's."""

    def __init__(self, grid: LocalGrid, *, at: int | None, alone: bool) -> None:
        super().__init__(grid)
        self._host, self._at, self._alone = grid._host, at, alone
        self._home: dict[int, RecordDict] = {}
        self.sent: list[tuple[str, int]] = []

    def push_messages(self, messages: Iterable[Message]) -> Iterable[str]:
        return self._grid.push_messages(self._noted(messages))

    def pull_messages(self, message_ids: Iterable[str]) -> Iterable[Message]:
        replies = self._grid.pull_messages(message_ids)
        self._take_home()
        return replies

    def send_and_receive(
        self, messages: Iterable[Message], *, timeout: float | None = None
    ) -> Iterable[Message]:
        return self.pull_messages(self.push_messages(list(messages)))

    def _noted(self, messages: Iterable[Message]) -> Iterator[Message]:
        for message in messages:
            about = message.metadata
            if about.message_type != SETUP:
                if len(self.sent) == self._at:
                    self._replace(about.dst_node_id)
                self.sent.append((about.message_type, about.dst_node_id))
            yield message

    def _take_home(self) -> None:
        for node, context in self._host._contexts.items():
            if not context.live:
                self._home[node] = copy_records(context.state)

    def _replace(self, node: int) -> None:
        """Put the node, or all of them, where a worker that knows nothing of them has them."""
        for each in [node] if self._alone else list(self._host._contexts):
            self._host.settle(each, copy_records(self._home[each]))


@dataclass
class Ended:
    """How a run ended, and what left the nodes until then."""

    weights: dict[str, torch.Tensor] | None
    failed: NodeFailed | None
    alarms: dict[int, Any]
    events: list[Event]
    draws: Counter[tuple[int, int]]
    sent: list[tuple[str, int]] = field(default_factory=list)


def server(case: str, grid: Grid) -> tuple[Any, Any]:
    """Nodes told their cell, with noise, a detector where one fits, and BatchNorm in the bottom."""
    if case == "u-shaped":
        network, plan = u_shaped.network("everywhere"), u_shaped.at_home(local_steps=STEPS)
        guarded = (NOISE, ("iso-noise", {}), ("gradients-scrutinizer", {"every": 4}))
        tiny.set_up(grid, NODES, plan=plan, architecture=network, defenses=guarded)
        strategy: Any = u_shaped.strategy_of(network, plan, nodes=NODES, **HELD)
        return strategy, strategy.part.arrays()
    if case == "vertical-split":
        network, plan = parties.network("stateful", 3), parties.plan(local_steps=STEPS)
        parties.told(grid, network, plan, defenses=(NOISE,))
        strategy = parties.strategy(NODES, network, plan, **HELD)
        return strategy, strategy.part.arrays()
    protocol, _, sync = case.partition(" ")
    plan = several_nodes.plan(local_steps=STEPS, momentum=0.9)
    model = tiny.architecture("stateful")
    chosen = (("weight-noise", {"scale": 0.1}),)
    more: dict[str, Any] = {}
    if protocol != "fedavg":
        chosen = (NOISE, ("gradients-scrutinizer", {"every": 4}))
        more = HELD | ({"options": {"sync": sync}} if sync else {})
    known = several_nodes.cells(plan, nodes=NODES, model=model, at_nodes=chosen)
    for cell in known:
        message = Message(RecordDict({"cell": cell.record()}), cell.partition + 1, SETUP)
        (reply,) = grid.send_and_receive([message])
        assert not reply.has_error(), reply.error
    built = several_nodes.built(protocol, plan, nodes=NODES, model=model, **more)
    return built.strategy, built.arrays


def ended(case: str, *, at: int | None = None, alone: bool = False) -> Ended:
    """Train; ``at`` is the message before which a worker is replaced, None for none."""
    local = LocalGrid(node_app, nodes=NODES)
    grid = Replacing(local, at=at, alone=alone)
    events: list[Event] = []
    with pytest.MonkeyPatch.context() as patched:
        draws: Counter[tuple[int, int]] = Counter()
        generator = DefenseState.generator

        def drawn(state: DefenseState) -> torch.Generator:
            draws[state.stream, state.messages] += 1
            return generator(state)

        patched.setattr(DefenseState, "generator", drawn)
        canonical = DeterministicGrid(grid, stream=1, roster=local.roster)
        strategy, arrays = server(case, canonical)
        tap = Wiretap(canonical, [events.append], roster=local.roster, strict=True)
        weights, failed, alarms = None, None, {}
        try:
            with scoped(derive(tiny.SEED, "server")):
                result = strategy.start(tap, arrays, num_rounds=ROUNDS)
        except NodeFailed as error:
            failed = error
        else:
            weights = dict(result.arrays.to_torch_state_dict()) | bottoms(strategy)
            alarms = getattr(strategy, "alarms", {})
    return Ended(weights, failed, alarms, events, draws, grid.sent)


def bottoms(strategy: Any) -> dict[str, torch.Tensor]:
    """The nodes' parts in the end, BatchNorm's buffers among them."""
    if isinstance(strategy, FedAvg):
        return {}
    assert isinstance(strategy, SplitStrategy)
    parts = dict(enumerate(getattr(strategy, "weights", [strategy.bottom])))
    return {
        f"{party}/{name}": torch.tensor(value)
        for party, part in parts.items()
        for name, value in part.items()
    }


@pytest.mark.parametrize(
    ("case", "alone"), [(case, False) for case in CASES] + [(case, True) for case in ABREAST]
)
def test_a_replaced_worker_ends_the_run_or_changes_no_bit_and_repeats_no_noise(
    case: str, alone: bool
) -> None:
    truth = ended(case)
    assert truth.weights is not None, truth.failed
    assert any("running_mean" in name for name in truth.weights)
    assert truth.draws
    assert max(truth.draws.values()) == 1
    stopped = 0
    for at, (kind, node) in enumerate(truth.sent):
        found = ended(case, at=at, alone=alone)
        where = f"replaced before message {at}, {kind} to node {node}"
        assert max(found.draws.values()) == 1, where
        if found.failed is None:
            assert found.weights is not None
            assert tiny.same(found.weights, truth.weights), where
            assert str(found.alarms) == str(truth.alarms), where  # a score may be no number
        else:
            stopped += 1
            assert "OutOfStepError" in found.failed.cause, where
    assert bool(stopped) == (case != "fedavg")
