"""What crosses the wire in U-shaped training: four tensors a step, and never a label."""

from typing import Any

import numpy as np
import pytest
import torch
from flwr.app import Array, Message
from torch import Tensor

from clients.node import TrainingPlan
from leakbed.events import (
    Bottom,
    CutGradientDown,
    Event,
    FeaturesDown,
    Phase,
    Sealed,
    SmashedUp,
    UpperGradientUp,
)
from leakbed.grids import NodeFailed
from leakbed.tap.trace import Recorder, Trace
from leakbed.tap.wiretap import Wiretap
from leakbed.wire.messages import (
    HEAD_EVALUATE,
    HEAD_STEP,
    SPLIT_EVALUATE,
    SPLIT_STEP,
    HeadEvaluateReply,
)
from tests.support import tiny
from tests.support.u_shaped import Ear, Liar, at_home, network, strategy_of, train

pytestmark = pytest.mark.usefixtures("identity")


def recorded(tmp_path: Any, **settings: Any) -> tuple[list[Event], Trace]:
    """All events of two nodes' training and evaluation, as hooks and as a trace have them."""
    seen: list[Event] = []
    data = tiny.recipe(2)
    truth = data.dataset().labels[data.split().test]
    with Recorder(tmp_path / "trace") as recorder:
        train(
            network(),
            at_home(**settings),
            nodes=2,
            hooks=[seen.append, recorder],
            test_labels=truth,
            evaluate_rounds=[2],
        )
    return seen, Trace(tmp_path / "trace")


def test_a_step_is_smashed_up_features_down_and_both_gradients(tmp_path: Any) -> None:
    seen, trace = recorded(tmp_path)
    kinds = [type(event) for event in seen if event.node == 0 and event.round == 1]
    step = [SmashedUp, FeaturesDown, UpperGradientUp, CutGradientDown]
    assert kinds == [Sealed, *step * 3, Sealed]
    read = list(trace.events())
    assert [type(event) for event in read] == [type(event) for event in seen]
    for ours, theirs in zip(seen, read, strict=True):
        for name, value in vars(ours).items():
            np.testing.assert_array_equal(value, getattr(theirs, name))
    features = [event for event in read if isinstance(event, FeaturesDown)]
    upper = [event for event in read if isinstance(event, UpperGradientUp)]
    training = [event for event in features if event.phase == Phase.TRAIN]
    places = [(event.round, event.node, event.step) for event in training]
    assert places == [(r, n, s) for r in (1, 2) for n in (0, 1) for s in range(3)]
    assert places == [(event.round, event.node, event.step) for event in upper]
    assert all(f.features.shape == g.gradient.shape for f, g in zip(training, upper, strict=True))
    assert [event.phase for event in features[len(training) :]] == [Phase.EVALUATE]


@pytest.mark.parametrize("bottoms", ["sealed", "relayed"])
def test_labels_never_leave_the_node(tmp_path: Any, bottoms: str) -> None:
    plan, data = at_home(bottoms=bottoms), tiny.recipe(2)
    truth = data.dataset().labels[data.split().test]
    inner = tiny.ready(2, plan=plan, architecture=network())
    ear = Ear(inner)
    strategy = strategy_of(network(), plan, nodes=2, test_labels=truth, evaluate_rounds=[1, 2])
    with Recorder(tmp_path / "trace") as recorder:
        tap = Wiretap(ear, [recorder], roster=inner.roster, strict=True)
        strategy.start(tap, strategy.part.arrays(), num_rounds=2)
    kinds = {message.metadata.message_type for message in ear.active_channels}
    assert kinds == {SPLIT_STEP, HEAD_STEP, SPLIT_EVALUATE, HEAD_EVALUATE}

    records = [record for m in ear.active_channels for record in m.content.array_records.values()]
    arrays = [array.numpy() for record in records for array in record.values()]
    assert len(arrays) == 4 * 20 + 2 * 10  # turns: a node's part twice, 3 steps; evaluations
    assert {array.dtype.kind for array in arrays} == {"f"}  # no whole numbers at all
    vectors = secrets(plan, truth)
    assert not any(hides(array, vector) for array in arrays for vector in vectors)
    for message in ear.active_channels:  # and none among the plain numbers of a message
        plain = [*message.content.config_records.values(), *message.content.metric_records.values()]
        assert not any(isinstance(value, list) for record in plain for value in record.values())
    for path in (tmp_path / "trace").rglob("*.safetensors"):
        content = path.read_bytes()
        assert not any(vector.tobytes() in content for vector in vectors)
    assert not torch.isin(strategy._test_labels, truth).any()


def secrets(plan: TrainingPlan, truth: Tensor) -> list[np.ndarray[Any, Any]]:
    """Every label vector there is: each batch's, each node's and the held-out rows'."""
    vectors = [truth]
    for node in range(2):
        cell = tiny.cell(node, 2, plan=plan)
        images, labels = cell.rows()
        batches = [b for round_ in (1, 2) for b in cell.batches(round_, len(images))]
        vectors += [labels, *(labels[batch] for batch in batches)]
    return [vector.numpy() for vector in vectors]


def hides(array: np.ndarray[Any, Any], vector: np.ndarray[Any, Any]) -> bool:
    """Whether an array holds a label vector in any type, one number after the other."""
    flat = array.reshape(-1)
    if len(flat) < len(vector):
        return False
    windows = np.lib.stride_tricks.sliding_window_view(flat, len(vector))
    return bool((windows == vector).all(1).any())


def test_the_search_for_labels_finds_them_where_they_are() -> None:
    assert hides(np.array([[0.5, 2.0], [1.0, 0.0]]), np.array([2, 1, 0]))
    assert not hides(np.array([2.0, 0.0, 1.0]), np.array([2, 1, 0]))


@pytest.mark.parametrize("bottoms", ["sealed", "relayed"])
def test_the_head_travels_with_the_bottom(tmp_path: Any, bottoms: str) -> None:
    seen, _ = recorded(tmp_path, bottoms=bottoms)
    names = {"0.weight", "0.bias", "5.weight", "5.bias"}
    relayed = [event for event in seen if isinstance(event, Bottom)]
    sealed = [event for event in seen if isinstance(event, Sealed)]
    assert all(set(event.arrays) == names for event in relayed)
    # Down and up at each turn; then down with the held-out rows to the bottom, and to the head.
    assert [event.up for event in relayed or sealed] == [False, True] * 4 + [False, False]
    assert bool(relayed) == (bottoms == "relayed") != bool(sealed)


def test_a_round_of_n_steps_costs_2n_plus_1_exchanges() -> None:
    plan = at_home()
    ear = Ear(tiny.ready(plan=plan, architecture=network()))
    strategy = strategy_of(network(), plan)
    strategy.start(ear, strategy.part.arrays(), num_rounds=1)
    sent = [
        m.metadata.message_type for m in ear.active_channels if not m.metadata.reply_to_message_id
    ]
    assert sent == [SPLIT_STEP, HEAD_STEP] * 3 + [SPLIT_STEP]


def test_a_node_that_sends_its_labels_is_refused() -> None:
    shared = tiny.plan()
    grid = tiny.ready(plan=shared, architecture=network())
    strategy = strategy_of(network(), shared)
    with pytest.raises(NodeFailed, match="labels came with the smashed data of a node that should"):
        strategy.start(grid, strategy.part.arrays(), num_rounds=1)


def spoiled(kind: str, change: Any, **more: Any) -> NodeFailed:
    """How training ends when replies of one type are changed."""
    grid = Liar(tiny.ready(plan=at_home(), architecture=network()), kind, change)
    strategy = strategy_of(network(), at_home(), **more)
    with pytest.raises(NodeFailed) as caught:
        strategy.start(grid, strategy.part.arrays(), num_rounds=1)
    return caught.value


def gradient_of(change: Any) -> Any:
    """A reply whose gradient of the features is changed."""

    def changed(reply: Message) -> None:
        record = reply.content.array_records["upper-gradient"]
        array = record["gradient"].numpy()
        record["gradient"] = Array(change(array))

    return changed


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda g: g[:-1], r"a gradient of \(7, 3, 2, 2\) torch.float32 came for features of \(8,"),
        (lambda g: g.astype(np.float64), r"torch.float64 came for features of"),
        (lambda g: g * np.nan, "gradient of the features of round 1, step 0 is not finite"),
    ],
)
def test_an_upper_gradient_that_does_not_fit_is_the_nodes_failure(
    change: Any, message: str
) -> None:
    failure = spoiled(HEAD_STEP, gradient_of(change))
    assert failure.message_type == HEAD_STEP
    with pytest.raises(NodeFailed, match=message):
        raise failure


@pytest.mark.parametrize("counts", [(7, 6), (-1, 6), (3, 5)])
def test_counts_that_cannot_be_are_the_nodes_failure(counts: tuple[int, int]) -> None:
    correct, examples = counts
    truth = tiny.recipe().dataset().labels[tiny.recipe().split().test]

    def changed(reply: Message) -> None:
        lie = HeadEvaluateReply(correct=correct, examples=examples)
        reply.content.update(lie.records())

    failure = spoiled(HEAD_EVALUATE, changed, test_labels=truth, evaluate_rounds=[1])
    assert f"{correct} of {examples} test rows right, 6 were asked for" in failure.cause


def test_a_reply_without_counts_is_the_nodes_failure() -> None:
    truth = tiny.recipe().dataset().labels[tiny.recipe().split().test]

    def changed(reply: Message) -> None:
        del reply.content["metrics"]

    failure = spoiled(HEAD_EVALUATE, changed, test_labels=truth, evaluate_rounds=[1])
    assert "needs a MetricRecord under 'metrics'" in failure.cause


def test_held_out_rows_that_are_missing_are_the_nodes_failure() -> None:
    truth = tiny.recipe().dataset().labels[tiny.recipe().split().test]

    def changed(reply: Message) -> None:
        record = reply.content.array_records["smashed"]
        record["smashed"] = Array(record["smashed"].numpy()[:-2])

    failure = spoiled(SPLIT_EVALUATE, changed, test_labels=truth, evaluate_rounds=[1])
    assert failure.cause.startswith("smashed data of shape (4, 4, 4, 4); expected 6 rows")


def test_a_defense_of_smashed_data_leaves_the_heads_messages_alone() -> None:
    plan, seen = at_home(local_steps=1), list[Event]()
    noise = (("smashed-noise", {"sigma": 0.5}),)
    for defenses in ((), noise):
        inner = tiny.ready(plan=plan, architecture=network(), defenses=defenses)
        strategy = strategy_of(network(), plan)
        tap = Wiretap(inner, [seen.append], roster=inner.roster, strict=True)
        strategy.start(tap, strategy.part.arrays(), num_rounds=1)
    plain, noised = (event.smashed for event in seen if isinstance(event, SmashedUp))
    assert not np.array_equal(plain, noised)
    assert [type(event) for event in seen].count(UpperGradientUp) == 2
