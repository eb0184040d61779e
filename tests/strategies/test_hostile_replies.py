"""A node that answers more than the plan allows is refused by name, and nothing it sent is read."""

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any

import numpy as np
import pytest
import torch
from flwr.app import ArrayRecord, ConfigRecord, Message, MetricRecord
from flwr.serverapp.strategy import Strategy

from clients import node_app
from leakbed.events import Event, Failed
from leakbed.grids import DeterministicGrid, LocalGrid, NodeFailed
from leakbed.tap.wiretap import Wiretap
from leakbed.wire import records
from leakbed.wire.records import SMASHED, pack
from tests.support import parties, several_nodes, tiny, u_shaped


@pytest.fixture(autouse=True)
def identity() -> Iterator[None]:
    with tiny.identity():
        yield


STEPS, BATCH = 3, 4
Alter = Callable[[Message], None]


class Hostile(several_nodes.Altered):
    """A grid whose second node alters its replies of one type, after a number of honest ones."""

    def __init__(self, inner: Any, alter: Alter, *, kind: str, honest: int = 0) -> None:
        super().__init__(inner, self._answer)
        self._change, self._kind, self._honest = alter, kind, honest
        self.sent: list[Any] = []

    def _answer(self, reply: Message) -> None:
        about = reply.metadata
        if (about.src_node_id, about.message_type) != (2, self._kind) or reply.has_error():
            return
        if self._honest:
            self._honest -= 1
            return
        self._change(reply)
        for record in reply.content.array_records.values():
            self.sent += record.values()


@dataclass
class Federation:
    """Two nodes that know their cell, and the server's part."""

    strategy: Strategy
    grid: Any


def federation(protocol: str, options: dict[str, str]) -> Federation:
    """Two nodes that know their cell, and a server that knows their plan."""
    common = {"batch_size": BATCH, "local_steps": STEPS}
    if protocol == "vertical-split":
        plan, model = parties.plan(**common), parties.network("joined", 1)
        grid = parties.ready(2, model, plan)
        bounds = several_nodes.bounds(plan)
        return Federation(parties.strategy(2, model, plan, bounds=bounds), grid)
    if protocol == "u-shaped":
        plan, model = u_shaped.at_home(**common), u_shaped.network()
    else:
        relayed = protocol not in {"vanilla-split", "fedavg"}
        plan = tiny.plan(**common, bottoms="relayed" if relayed else "sealed")
        model = tiny.architecture("plain")
    grid = LocalGrid(node_app, nodes=2)
    several_nodes.grid(plan, nodes=2, model=model, on=_canonical(grid))
    built = several_nodes.built(protocol, plan, nodes=2, model=model, options=options)
    return Federation(built.strategy, grid)


def _canonical(grid: Any) -> DeterministicGrid:
    return DeterministicGrid(grid, stream=0, roster=grid.roster)


def steps(reply: Message) -> None:
    reply.content["metrics"]["steps"] = 10**9
    reply.content["metrics"]["num-examples"] = 10**9 * BATCH


def rows(reply: Message) -> None:
    batch = records.unpack(reply.content.array_records[SMASHED])
    several = {name: np.concatenate([value] * 50) for name, value in batch.items()}
    reply.content[SMASHED] = pack(several)


def wide(reply: Message) -> None:
    batch = records.unpack(reply.content.array_records[SMASHED])
    other = np.float32 if batch["smashed"].dtype == np.float64 else np.float64
    reply.content[SMASHED] = pack(batch | {"smashed": batch["smashed"].astype(other)})


def whole_numbers(reply: Message) -> None:
    batch = records.unpack(reply.content.array_records[SMASHED])
    reply.content[SMASHED] = pack(batch | {"smashed": batch["smashed"].astype(np.int32)})


def lying_header(reply: Message) -> None:
    record = reply.content.array_records[SMASHED]
    record["smashed"].data += bytes(8)


def needless_array(reply: Message) -> None:
    for record in reply.content.array_records.values():
        record["junk"] = pack({"x": np.zeros(1, np.float32)})["x"]


def needless_record(reply: Message) -> None:
    reply.content["junk"] = MetricRecord({"x": 1})


def heavy_words(reply: Message) -> None:
    reply.content["metrics"]["x" * (1 << 20)] = 1


def heavy_config(reply: Message) -> None:
    key = next(iter(reply.content.array_records))
    reply.content[key] = ConfigRecord({"x": bytes(1 << 20)})


def early_bottom(reply: Message) -> None:
    del reply.content[SMASHED]
    reply.content["relayed.bottom"] = reply.content["sealed.bottom"] = pack({"w": np.zeros(1)})


def large_arrays(reply: Message) -> None:
    for key, record in reply.content.array_records.items():
        several = records.unpack(record)
        reply.content[key] = pack({name: np.tile(v, (2000, 1)) for name, v in several.items()})


def doubled(reply: Message) -> None:
    for key, record in reply.content.array_records.items():
        several = records.unpack(record)
        reply.content[key] = pack({n: v.astype(np.float64) for n, v in several.items()})


def turned(reply: Message) -> None:
    for key, record in reply.content.array_records.items():
        several = records.unpack(record)
        reply.content[key] = pack({n: v[None] for n, v in several.items()})


ON_STEPS: list[tuple[Alter, str]] = [
    (steps, r"1000000000 steps with 4000000000 samples a round, where the plan is 3 steps with 12"),
    (rows, r"array '\w+' of 'smashed' has \d+ bytes, where the plan allows \d+"),
    (wide, r"'smashed' of 'smashed' (has \d+ bytes, where the plan|is float.., the server's part)"),
    (whole_numbers, "'smashed' of 'smashed' is int32, no floating-point numbers"),
    (lying_header, r"array 'smashed' has \d+ bytes, not those of"),
    (needless_array, "an unknown array 'junk' in 'smashed'; expected"),
    (needless_record, "an unknown record 'junk'; expected"),
    (heavy_words, r"\d+ bytes, where the plan allows \d+"),
    (heavy_config, r"\d+ bytes, where the plan allows \d+"),
    (early_bottom, "an unknown record '(sealed|relayed).bottom'; expected"),
]
ON_OTHERS: list[tuple[Alter, str]] = [
    (large_arrays, r"has \d+ bytes, where the plan allows \d+"),
    (needless_array, "an unknown array 'junk'"),
    (needless_record, "an unknown record 'junk'"),
    (heavy_words, r"\d+ bytes, where the plan allows \d+"),
]
ON_UPDATES = [
    *ON_OTHERS,
    (doubled, "(has .* bytes, where the plan allows|is float64 of shape .*, expected float32)"),
    (turned, r"is float32 of shape \(1, .*, expected float32 of shape"),
]
SPLIT: dict[str, dict[str, str]] = {
    "vanilla-split": {},
    "u-shaped": {},
    "splitfed-v1": {},
    "splitfed-v2": {},
    "parallel-split": {},
    "parallel-split in step": {"sync": "step"},
    "vertical-split": {},
}
Case = tuple[str, str, int, Alter, str]
CASES: list[Case] = [
    *[(name, "train.split", 1, *case) for name in SPLIT for case in ON_STEPS],
    *[(name, "train.split", STEPS, *case) for name in SPLIT for case in ON_OTHERS],
    *[("u-shaped", "train.head", 1, *case) for case in ON_OTHERS],
    *[("parallel-split in step", "train.backward", 1, *case) for case in ON_OTHERS],
    *[("fedavg", "train", 0, *case) for case in ON_UPDATES],
]


# All protocols check in one place above the grid, which two of them try.
SEATS = [
    *[(case, "node") for case in CASES],
    *[(c, "grid") for c in CASES if c[0] in {"vanilla-split", "fedavg"} and c[3] is needless_array],
]


def named(value: Case | str) -> str:
    return value if isinstance(value, str) else f"{value[0]}-{value[2]}-{value[3].__name__}"


@pytest.mark.parametrize(("case", "seat"), SEATS, ids=named)
def test_what_the_plan_does_not_allow_is_refused_and_never_decoded(
    case: Case, seat: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    name, kind, honest, alter, match = case
    made = federation(name.partition(" ")[0], SPLIT.get(name, {}))
    below = seat == "node"
    inner = made.grid if below else _canonical(made.grid)
    hostile = Hostile(inner, alter, kind=kind, honest=honest)
    events: list[Event] = []
    grid = (
        Wiretap(_canonical(hostile), [events.append], roster=made.grid.roster, strict=True)
        if below
        else hostile
    )
    decoded: list[Any] = []
    honestly = records._viewed

    def spied(called: str, array: Any) -> Any:
        if any(array is each for each in hostile.sent):
            decoded.append(called)
        return honestly(called, array)

    monkeypatch.setattr(records, "_viewed", spied)
    strategy: Any = made.strategy
    arrays = strategy.part.arrays() if name != "fedavg" else first_model()
    with pytest.raises(NodeFailed, match=match) as failed:
        strategy.start(grid, arrays, num_rounds=1)
    assert (failed.value.node, failed.value.message_type) == (1, kind)
    assert decoded == []
    assert hostile.sent or alter is heavy_config
    # Whoever taps the wire sees that a pulled reply failed, and nothing of what it held.
    pulled = below and kind != "train" and honest < STEPS
    assert [event.node for event in events if isinstance(event, Failed)] == [1] * pulled


def first_model() -> ArrayRecord:
    return ArrayRecord(dict(tiny.architecture("plain").build(1).state_dict()))


def test_without_a_plan_names_and_sizes_of_the_model_still_bound_a_reply() -> None:
    plan = tiny.plan(batch_size=BATCH, local_steps=STEPS)
    grid = several_nodes.grid(plan, nodes=2, model=tiny.architecture())
    built = several_nodes.built(
        "vanilla-split",
        plan,
        nodes=2,
        model=tiny.architecture(),
        batch_size=None,
        local_steps=None,
    )
    hostile = Hostile(grid, needless_array, kind="train.split")
    with pytest.raises(NodeFailed, match="an unknown array 'junk' in 'smashed'"):
        built.strategy.start(hostile, built.arrays, num_rounds=1)


def test_honest_nodes_of_one_pass_are_held_to_their_rows() -> None:
    plan = tiny.plan(batch_size=BATCH, local_steps=None)
    grid = several_nodes.grid(plan, nodes=2, model=tiny.architecture())
    rows = {node: len(own) for node, own in several_nodes.labels(2).items()}
    changes: dict[str, Any] = {"nodes": 2, "model": tiny.architecture()}
    for told, fits in ((rows, True), ({**rows, 2: rows[2] + 1}, False)):
        built = several_nodes.built("vanilla-split", plan, **changes, rows=told)
        if fits:
            built.strategy.start(grid, built.arrays, num_rounds=1)
            continue
        with pytest.raises(NodeFailed, match="samples a round, where the plan is") as failed:
            built.strategy.start(grid, built.arrays, num_rounds=1)
        assert failed.value.node == 1


def test_an_evaluation_brings_no_more_rows_than_were_asked_for() -> None:
    plan = tiny.plan(batch_size=BATCH, local_steps=STEPS)
    model = tiny.architecture()
    grid = several_nodes.grid(plan, nodes=2, model=model)
    labels = torch.zeros(3, dtype=torch.long)
    changes: dict[str, Any] = {"test_labels": labels, "evaluate_rounds": (1,)}
    built = several_nodes.built("vanilla-split", plan, nodes=2, model=model, **changes)
    hostile = Hostile(grid, rows, kind="evaluate.split")
    with pytest.raises(NodeFailed, match=r"of 'smashed' has \d+ bytes, where the plan allows"):
        built.strategy.start(hostile, built.arrays, num_rounds=1)


def test_a_reason_is_cut_wherever_it_comes_from() -> None:
    error = NodeFailed(1, "train", "x" * 10**6)
    assert len(str(error)) < 1100
    assert "(1000000 characters)" in error.cause
