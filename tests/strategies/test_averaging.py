"""Averages are Flower's, whole numbers stay whole, and what does not fit is refused by name."""

from collections.abc import Iterator
from typing import Any

import numpy as np
import pytest
from flwr.app import ArrayRecord, Message, MetricRecord, RecordDict
from flwr.serverapp.strategy.strategy_utils import aggregate_arrayrecords

from leakbed.events import Bottom, Event
from leakbed.grids import NodeFailed
from leakbed.wire.records import BOTTOMS, pack, refuse_unlike, unpack
from strategies.averaging import SealedAverageError, average
from tests.support import tiny
from tests.support.several_nodes import NODES, built, plan, trained

PROTOCOLS: dict[str, tuple[str, dict[str, str]]] = {
    "splitfed-v1": ("splitfed-v1", {}),
    "splitfed-v2": ("splitfed-v2", {}),
    "parallel by rounds": ("parallel-split", {"sync": "round"}),
    "parallel in step": ("parallel-split", {"sync": "step"}),
}


@pytest.fixture(autouse=True)
def identity() -> Iterator[None]:
    with tiny.identity():
        yield


def sets() -> list[dict[str, Any]]:
    draw = np.random.default_rng(0)
    return [
        {"weight": draw.normal(size=(3, 2)).astype(np.float32), "scalar": np.array(draw.normal())}
        for _ in range(3)
    ]


def test_has_the_bits_of_flowers_own_sum() -> None:
    arrays, examples = sets(), [5, 10, 23]
    records = [
        RecordDict(
            {
                "arrays": ArrayRecord({n: _wire(v) for n, v in own.items()}),
                "metrics": MetricRecord({"num-examples": count}),
            }
        )
        for own, count in zip(arrays, examples, strict=True)
    ]
    expected = aggregate_arrayrecords(records, "num-examples")
    found = average(arrays, examples)
    assert list(found) == ["weight", "scalar"]
    for name, value in found.items():
        assert value.dtype == arrays[0][name].dtype
        assert value.tobytes() == expected[name].numpy().tobytes()


def _wire(value: Any) -> Any:
    return pack({"it": value})["it"]


def test_is_weighted_by_samples() -> None:
    found = average([{"w": np.array([1.0])}, {"w": np.array([5.0])}], [3, 1])
    assert found["w"] == 2.0


def test_one_node_keeps_its_bits() -> None:
    (own, *_) = sets()
    assert all(
        value.tobytes() == own[name].tobytes() for name, value in average([own], [7]).items()
    )


@pytest.mark.parametrize(
    ("counts", "examples", "expected"),
    [([3, 3, 3], [1, 1, 1], 3), ([49] * 7, [3, 1, 1, 5, 1, 1, 9], 49), ([2, 3], [1, 2], 3)],
)
def test_whole_numbers_are_rounded_to_whole_numbers(
    counts: list[int], examples: list[int], expected: int
) -> None:
    arrays = [{"n": np.array(count)} for count in counts]
    found = average(arrays, examples)["n"]
    assert found.dtype == np.int64
    assert found.shape == ()
    assert found == expected


def test_averaging_changes_nothing_it_was_given() -> None:
    arrays = sets()
    average(arrays, [1, 2, 3])
    assert all(
        np.array_equal(one[name], other[name])
        for one, other in zip(arrays, sets(), strict=True)
        for name in one
    )


def test_what_is_alike_passes() -> None:
    first, second, _ = sets()
    refuse_unlike(first, second, what="bottom")


WRONG: dict[str, tuple[dict[str, Any], str]] = {
    "missing": ({"3.bias": None}, r"the bottom lacks array '3\.bias'; expected \['1\.bias'"),
    "extra": ({"9.bias": np.zeros(1)}, r"an unknown array '9\.bias' in 'relayed\.bottom'"),
    "shape": ({"3.bias": np.zeros((3, 1))}, r"'3\.bias' is float64 of shape \(3, 1\), expected"),
    "type": ({"3.bias": np.zeros(3, np.float32)}, r"'3\.bias' is float32 .* expected float64"),
    "infinite": ({"3.bias": np.full(3, np.inf)}, r"bottom's '3\.bias' of round 1.* not finite"),
}


@pytest.mark.parametrize(
    ("wrong", "protocol", "steps"),
    [
        *[(wrong, "splitfed-v1", 2) for wrong in WRONG],
        *[("shape", protocol, None) for protocol in PROTOCOLS],
    ],
)
def test_a_bottom_that_does_not_fit_names_node_and_array(
    wrong: str, protocol: str, steps: int | None
) -> None:
    """Node 1 is done before the others where nodes go through all their rows."""
    name, options = PROTOCOLS[protocol]
    arrays, cause = WRONG[wrong]

    def alter(reply: Message) -> None:
        record = reply.content.get(BOTTOMS["relayed"])
        if reply.metadata.src_node_id == 2 and isinstance(record, ArrayRecord):
            whole = {**unpack(record), **arrays}
            kept = {n: value for n, value in whole.items() if value is not None}
            reply.content[BOTTOMS["relayed"]] = pack(kept)

    with pytest.raises(NodeFailed, match=r"node 1 failed on 'train\.split': .*" + cause):
        trained(name, plan(local_steps=steps), options=options, alter=alter)


@pytest.mark.parametrize("protocol", PROTOCOLS)
def test_sealed_bottoms_cannot_be_averaged(protocol: str) -> None:
    name, options = PROTOCOLS[protocol]
    with pytest.raises(SealedAverageError, match="'sealed', but whoever averages bottoms reads"):
        built(name, plan(bottoms="sealed"), options=options)


@pytest.mark.parametrize("protocol", PROTOCOLS)
def test_buffers_are_averaged_by_samples(protocol: str) -> None:
    name, options = PROTOCOLS[protocol]
    events = list[Event]()
    found = trained(
        name,
        plan(local_steps=None),
        rounds=1,
        options=options,
        events=events,
        model=tiny.architecture("stateful"),
    )
    up = {event.node: event.arrays for event in events if isinstance(event, Bottom) and event.up}
    samples = [5, 10, 16, 23]
    assert sorted(up) == list(range(NODES))
    assert [int(up[node]["1.num_batches_tracked"]) for node in range(NODES)] == [2, 3, 4, 6]
    means = [up[node]["1.running_mean"] * n for node, n in enumerate(samples)]
    assert np.allclose(found["1.running_mean"].numpy(), sum(means) / 54, rtol=1e-6)
    assert found["1.num_batches_tracked"] == round((2 * 5 + 3 * 10 + 4 * 16 + 6 * 23) / 54)
