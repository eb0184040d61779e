"""Whatever one node answers, a round ends in that node's failure, and in nothing else.

Every split protocol trains and evaluates with two nodes, of which the second is silent, answers
twice, or answers what hypothesis makes of its honest answer.
"""

from collections.abc import Callable, Iterable, Iterator
from typing import Any

import numpy as np
import pytest
import torch
from flwr.app import ArrayRecord, Message, MetricRecord, RecordDict
from flwr.serverapp import Grid
from flwr.serverapp.strategy import Strategy
from hypothesis import given
from hypothesis import strategies as st

from leakbed.flower_internals import with_content
from leakbed.grids import DeterministicGrid, NodeFailed
from leakbed.tap.wiretap import GridWrapper
from leakbed.wire.messages import (
    BACKWARD_STEP,
    HEAD_EVALUATE,
    HEAD_STEP,
    SPLIT_EVALUATE,
    SPLIT_STEP,
)
from leakbed.wire.records import BOTTOMS, copy_records, pack, unpack
from strategies import PROTOCOLS
from tests.support import parties, several_nodes, tiny, u_shaped
from tests.support.hostile import ANY, ARRAYS, NUMBERS, fuzz

SPLIT = [name for name, entry in PROTOCOLS.items() if entry.exchanges == "split"]
CASES = [*SPLIT, "parallel-split step"]
HOSTILE, NODES = 2, 2
KINDS = {
    **dict.fromkeys(CASES, (SPLIT_STEP, SPLIT_EVALUATE)),
    "u-shaped": (SPLIT_STEP, HEAD_STEP, SPLIT_EVALUATE, HEAD_EVALUATE),
    "parallel-split step": (SPLIT_STEP, BACKWARD_STEP, SPLIT_EVALUATE),
}
EXCHANGES = [(case, kind) for case in CASES for kind in KINDS[case]]
TRUTH = torch.zeros(4, dtype=torch.long)


@pytest.fixture(autouse=True, scope="module")
def identity() -> Iterator[None]:
    with tiny.identity():
        yield


def server(case: str, timeout: float | None) -> tuple[Grid, Strategy]:
    """Two nodes that know their cell, and the strategy that trains them."""
    more: dict[str, Any] = {"test_labels": TRUTH, "evaluate_rounds": (1,)}
    if case == "u-shaped":
        network, at_home = u_shaped.network(), u_shaped.at_home(local_steps=1)
        inner = tiny.ready(NODES, plan=at_home, architecture=network)
        strategy: Strategy = u_shaped.strategy_of(
            network, at_home, nodes=NODES, timeout=timeout, **more
        )
    elif case == "vertical-split":
        network, plan = parties.network("joined", 1), parties.plan(local_steps=1)
        inner = parties.ready(NODES, network, plan)
        strategy = parties.strategy(NODES, network, plan, step_timeout=timeout, **more)
    else:
        protocol, _, sync = case.partition(" ")
        options = {"options": {"sync": sync}} if sync else {}
        plan = several_nodes.plan(local_steps=1)
        strategy = several_nodes.built(
            protocol, plan, nodes=NODES, timeout=timeout, **more, **options
        ).strategy
        inner = several_nodes.grid(plan, nodes=NODES)
    return DeterministicGrid(inner, stream=1, roster=inner.roster), strategy


class Hostile(GridWrapper):
    """A grid that does something to the second node's replies of one type."""

    def __init__(self, inner: Grid, kind: str, act: Callable[[Message], list[Message]]) -> None:
        super().__init__(inner)
        self._kind, self._act = kind, act

    def pull_messages(self, message_ids: Iterable[str]) -> Iterable[Message]:
        return self._acted(self._grid.pull_messages(message_ids))

    def send_and_receive(
        self, messages: Iterable[Message], *, timeout: float | None = None
    ) -> Iterable[Message]:
        return self._acted(self._grid.send_and_receive(messages, timeout=timeout))

    def _acted(self, replies: Iterable[Message]) -> list[Message]:
        return [sent for reply in replies for sent in self._sent(reply)]

    def _sent(self, reply: Message) -> list[Message]:
        about = reply.metadata
        ours = about.src_node_id == HOSTILE and about.message_type == self._kind
        return self._act(reply) if ours else [reply]


def failure(
    case: str, kind: str, act: Callable[[Message], list[Message]], *, timeout: float | None = None
) -> NodeFailed | None:
    """How a round ends; None where it ends as it should."""
    grid, strategy = server(case, timeout)
    try:
        strategy.start(Hostile(grid, kind, act), strategy.part.arrays(), num_rounds=1)  # type: ignore[attr-defined]
    except NodeFailed as failed:
        return failed
    return None


@pytest.mark.parametrize(("case", "kind"), EXCHANGES)
def test_a_node_that_never_answers_is_named_in_time(
    case: str, kind: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    late: list[Message] = []  # each makes a minute pass
    for module in ("leakbed.grids.base", "strategies.node_channel"):
        monkeypatch.setattr(f"{module}.monotonic", lambda: 60.0 * len(late))
    failed = failure(case, kind, lambda reply: late.append(reply) or [], timeout=60.0)
    assert failed is not None
    assert (failed.node, failed.message_type) == (HOSTILE - 1, kind)
    assert "no reply" in failed.cause


@pytest.mark.parametrize(("case", "kind"), EXCHANGES)
def test_a_node_that_answers_twice_is_named(case: str, kind: str) -> None:
    failed = failure(case, kind, lambda reply: [reply, reply])
    assert failed is not None
    assert (failed.node, failed.message_type) == (HOSTILE - 1, kind)
    assert failed.cause == "answered 2 times"


@pytest.mark.parametrize("case", CASES)
@pytest.mark.parametrize("change", ["wider", "more channels", "flat"])
def test_held_out_rows_of_another_shape_are_a_failure_of_their_node(case: str, change: str) -> None:
    def reshaped(reply: Message) -> list[Message]:
        records = copy_records(reply.content)
        arrays = unpack(records["smashed"])
        rows = arrays["smashed"]
        axis = {"wider": rows.ndim - 1, "more channels": 1}.get(change)
        if axis is None:
            rows = rows[..., None] if rows.ndim == 2 else rows.reshape(len(rows), -1)
        else:
            rows = np.concatenate([rows, rows.take([0], axis)], axis)
        records["smashed"] = pack({**arrays, "smashed": rows})
        return [with_content(reply, records)]

    failed = failure(case, SPLIT_EVALUATE, reshaped)
    assert failed is not None
    assert (failed.node, failed.message_type) == (HOSTILE - 1, SPLIT_EVALUATE)
    assert "expected" in failed.cause
    assert "shape" in failed.cause or " x " in failed.cause


TYPES = st.sampled_from(
    ["float32", "float64", "float16", "int64", "bool", "complex64", ">f4", "U2"]
)
SIZES = st.lists(st.integers(0, 5), max_size=4).map(tuple)


def numbers(draw: st.DataObject) -> np.ndarray[Any, Any]:
    """A sound array of any type and shape, with numbers that may not be finite."""
    value = draw.draw(st.sampled_from([0.0, 1.0, -7.0, 1e30, np.inf, np.nan]))
    with np.errstate(all="ignore"):
        return np.full(draw.draw(SIZES), value).astype(draw.draw(TYPES))


def other(record: object, draw: st.DataObject) -> object:
    """A record with one of its entries changed or gone."""
    if not isinstance(record, ArrayRecord | MetricRecord) or not record:
        return draw.draw(ANY)
    changed, key = record.copy(), draw.draw(st.sampled_from(sorted(record)))
    del changed[key]
    change = draw.draw(st.sampled_from(["gone", "strange", "sound"]))
    if change == "strange":
        changed[key] = draw.draw(ARRAYS if isinstance(record, ArrayRecord) else NUMBERS)
    elif change == "sound" and isinstance(changed, ArrayRecord):
        changed[key] = pack({key: numbers(draw)})[key]
    return changed


def malformed(reply: Message, draw: st.DataObject) -> list[Message]:
    """A node's honest answer with one of its records changed, replaced or gone."""
    records = RecordDict(dict(reply.content))
    key = draw.draw(st.sampled_from(sorted(records)))
    change = draw.draw(st.sampled_from(["gone", "another", "altered", "altered"]))
    record = records.pop(key)
    if change == "another":
        records[key] = draw.draw(ANY)
    elif change == "altered":
        records[key] = other(record, draw)  # type: ignore[assignment]
    return [Message(records, reply_to=_asked(reply))]


def _asked(reply: Message) -> Message:
    """A message that the reply answers, as far as its answer can tell."""
    about = reply.metadata
    asked = Message(RecordDict(), dst_node_id=about.src_node_id, message_type=about.message_type)
    tiny.set_message_id(asked, about.reply_to_message_id)
    return asked


@pytest.mark.parametrize("case", CASES)
@fuzz(6)
@given(draw=st.data())
def test_a_malformed_answer_is_its_nodes_failure_or_changes_nothing(
    case: str, draw: st.DataObject
) -> None:
    kind = draw.draw(st.sampled_from(KINDS[case]))
    failed = failure(case, kind, lambda reply: malformed(reply, draw))
    assert failed is None or failed.node == HOSTILE - 1


Bottom = dict[str, Any]
CHANGES: dict[str, Callable[[Bottom], Bottom]] = {
    "empty": lambda bottom: {},
    "first missing": lambda bottom: dict(list(bottom.items())[1:]),
    "last missing": lambda bottom: dict(list(bottom.items())[:-1]),  # a head's, where there is one
    "one more": lambda bottom: bottom | {"more": np.zeros(1, np.float32)},
    "reshaped": lambda bottom: {name: value.reshape(-1, 1) for name, value in bottom.items()},
    "of another type": lambda bottom: {k: v.astype(np.float16) for k, v in bottom.items()},
    "first not finite": lambda bottom: _spoiled(bottom, 0),
    "last not finite": lambda bottom: _spoiled(bottom, -1),
}


def _spoiled(bottom: Bottom, place: int) -> Bottom:
    name = list(bottom)[place]
    return bottom | {name: np.full_like(bottom[name], np.nan)}


@pytest.mark.parametrize(
    ("sender", "change"), [(1, "first not finite"), *((2, change) for change in CHANGES)]
)
@pytest.mark.parametrize("case", CASES)
def test_a_bottom_that_does_not_fit_is_the_failure_of_the_node_that_sent_it(
    case: str, sender: int, change: str
) -> None:
    """Whoever receives it next: another node, the server that averages, or its sender again."""
    grid, strategy = server(case, None)

    def alter(reply: Message) -> None:
        if reply.metadata.src_node_id == sender and reply.metadata.message_type == SPLIT_STEP:
            for key in BOTTOMS.values():
                if key in reply.content:
                    bottom = unpack(reply.content.array_records[key])
                    reply.content[key] = pack(CHANGES[change](bottom))

    altered = several_nodes.Altered(grid, alter)
    with pytest.raises(NodeFailed) as failed:
        strategy.start(altered, strategy.part.arrays(), num_rounds=2)  # type: ignore[attr-defined]
    assert failed.value.node == sender - 1, failed.value
