"""Parallel split learning in step is training on the concatenated batch; otherwise it is not."""

from dataclasses import dataclass
from typing import Any, ClassVar

import numpy as np
import pytest
import torch
from flwr.app import ArrayRecord, Message
from torch import Tensor

from leakbed.contracts import Defense, DefenseState, Protects
from leakbed.distance_correlation import distance_correlation
from leakbed.events import (
    Bottom,
    BottomGradientUp,
    CutGradientDown,
    Event,
    SmashedUp,
)
from leakbed.grids import NodeFailed
from leakbed.models import Architecture
from leakbed.seeds import derive
from leakbed.wire.records import BOTTOM_GRADIENT, SMASHED, pack, unpack
from tests.support import double_models, guarded, several_nodes, tiny
from tests.support.definitions import concatenated
from tests.support.several_nodes import NODES, OPTIMISERS, Weights, distance, plan, trained

pytestmark = pytest.mark.usefixtures("identity")

STEP, ROUND = {"sync": "step"}, {"sync": "round"}
LOCAL = {"gradient_scale": "local"}


def parallel(settings: Any, options: dict[str, str], **more: Any) -> Weights:
    return trained("parallel-split", settings, options=options, **more)


def uncut(
    settings: Any,
    *,
    rounds: int = 2,
    model: Architecture | None = None,
    present: list[list[int]] | None = None,
) -> Weights:
    """One network, one optimiser, and in each step all nodes' rows as one batch."""
    cells = several_nodes.cells(settings, model=model)
    return concatenated(cells, rounds=rounds, present=present)


@pytest.mark.parametrize(
    ("optimizer", "steps", "scale"),
    [
        ("plain", 1, "global"),
        ("plain", None, "local"),
        ("momentum", 3, "global"),
        ("momentum", None, "local"),
        ("adam", None, "global"),
        ("adam", 3, "local"),
    ],
)
def test_in_step_it_is_training_on_the_concatenated_batch(
    optimizer: str, steps: int | None, scale: str
) -> None:
    settings = plan(**OPTIMISERS[optimizer], local_steps=steps)
    found = parallel(settings, STEP | {"gradient_scale": scale})
    assert distance(found, uncut(settings)) < 1e-10


@pytest.mark.parametrize("state", ["fresh", "kept"])
def test_in_step_it_is_so_also_where_nodes_come_and_go(state: str) -> None:
    settings = plan(**OPTIMISERS["adam"], local_steps=None, optimizer_state=state)
    present = [[0, 1, 3], [2, 3], [0, 2]]
    found = parallel(settings, STEP, rounds=3, present=present)
    assert distance(found, uncut(settings, rounds=3, present=present)) < 1e-10


def test_in_step_every_cut_gives_the_same_model() -> None:
    settings = plan(**OPTIMISERS["momentum"], local_steps=2)
    models = [double_models.architecture(cut=cut) for cut in double_models.CUTS]
    first, *others = [parallel(settings, STEP, model=model) for model in models]
    assert all(distance(first, other) < 1e-10 for other in others)


def test_batch_norm_in_the_top_sees_all_rows_and_in_a_bottom_its_nodes() -> None:
    settings = plan(**OPTIMISERS["momentum"])
    above = double_models.architecture("double_normed", cut=1)
    assert distance(parallel(settings, STEP, model=above), uncut(settings, model=above)) < 1e-10
    below = double_models.architecture("double_normed", cut=3)
    found, together = parallel(settings, STEP, model=below), uncut(settings, model=below)
    assert distance(found, together) > 1e-3
    assert found["2.num_batches_tracked"] == together["2.num_batches_tracked"] == 6


@pytest.mark.parametrize("optimizer", ["plain", "momentum"])
def test_by_rounds_of_one_step_it_is_exact_for_sgd_in_the_local_scale(optimizer: str) -> None:
    settings = plan(**OPTIMISERS[optimizer], local_steps=1)
    found = parallel(settings, ROUND | LOCAL, rounds=4)
    assert distance(found, uncut(settings, rounds=4)) < 1e-10


def went(found: Weights, part: Any) -> Tensor:
    """The way the part's weights went, as one vector."""
    first = double_models.architecture().build(derive(tiny.SEED, "victim-init")).state_dict()
    names = sorted(part.state_dict())
    return torch.cat([(found[name] - first[name]).reshape(-1) for name in names])


@pytest.mark.parametrize("steps", [1, 10, 50])
def test_by_rounds_it_is_not_training_on_the_concatenated_batch(steps: int) -> None:
    """The module says by how much and why."""
    settings = plan(**OPTIMISERS["plain"], local_steps=steps)
    network = double_models.architecture().build(0)
    whole = went(uncut(settings, rounds=1), network)
    off = {
        scale: float(
            (went(parallel(settings, {"gradient_scale": scale}, rounds=1), network) - whole).norm()
            / whole.norm()
        )
        for scale in ("global", "local")
    }
    expected = {1: (0.21, 0.0), 10: (0.36, 0.084), 50: (0.69, 0.32)}[steps]
    assert (off["global"], off["local"]) == pytest.approx(expected, abs=0.005)


def test_in_the_global_scale_equal_nodes_bottoms_move_a_share_of_the_way() -> None:
    settings = plan(**OPTIMISERS["plain"], local_steps=1)
    bottom = double_models.architecture().bottom(0)
    apart = went(parallel(settings, ROUND, rounds=1), bottom)
    together = went(parallel(settings, STEP, rounds=1), bottom)
    assert together.abs().max() > 1e-3
    assert apart.allclose(together / NODES, atol=1e-12)


def test_by_rounds_the_cut_matters() -> None:
    settings = plan(**OPTIMISERS["plain"])
    models = [double_models.architecture(cut=cut) for cut in (1, 6)]
    assert distance(*[parallel(settings, ROUND, model=model) for model in models]) > 1e-4


@pytest.mark.parametrize(
    ("optimizer", "state"), [("momentum", "kept"), ("momentum", "fresh"), ("adam", "kept")]
)
def test_one_node_is_vanilla_bit_for_bit(optimizer: str, state: str) -> None:
    settings = plan(**OPTIMISERS[optimizer], optimizer_state=state)
    chosen: dict[str, Any] = {"nodes": 1, "model": tiny.architecture("stateful")}
    vanilla = trained("vanilla-split", settings, **chosen)
    for sync in ("round", "step"):
        for scale in ("global", "local"):
            options = {"sync": sync, "gradient_scale": scale}
            assert tiny.same(parallel(settings, options, **chosen), vanilla), options


@pytest.mark.parametrize("sync", ["round", "step"])
def test_any_process_may_serve_any_message(sync: str) -> None:
    settings = plan(**OPTIMISERS["adam"], local_steps=3)
    chosen: dict[str, Any] = {
        "options": {"sync": sync},
        "nodes": 2,
        "model": tiny.architecture("stateful"),
    }
    resident = trained("parallel-split", settings, **chosen)
    assert tiny.same(resident, trained("parallel-split", settings, resident=False, **chosen))


@pytest.mark.parametrize(("sync", "exchanges"), [("round", 4), ("step", 7)])
def test_a_round_of_three_steps_costs_four_exchanges_or_seven(sync: str, exchanges: int) -> None:
    sent = list[int]()
    parallel(plan(local_steps=3), {"sync": sync}, rounds=1, alter=lambda _: sent.append(1))
    assert len(sent) == NODES * exchanges


def test_in_step_nodes_send_gradients_and_get_weights() -> None:
    events = list[Event]()
    parallel(plan(local_steps=2), STEP, rounds=1, events=events)
    own = [event for event in events if event.node == 0]
    assert [type(event) for event in own] == [
        Bottom,  # the first, with its buffers
        SmashedUp,
        CutGradientDown,
        BottomGradientUp,
        Bottom,
        SmashedUp,
        CutGradientDown,
        BottomGradientUp,
        Bottom,
        Bottom,  # and what the node ends with
    ]
    after = [e.arrays["1.weight"] for e in events if isinstance(e, Bottom) and e.up]
    assert all(np.array_equal(each, after[0]) for each in after)


@dataclass(frozen=True, kw_only=True)
class Ones(Defense):
    """Replaces a gradient by ones, which no scale may touch afterwards."""

    name: ClassVar[str] = "ones"
    source: ClassVar[str] = "-"
    protects: ClassVar[frozenset[Protects]] = frozenset({Protects.CUT_GRADIENT})

    def protect_cut_gradient(
        self, state: DefenseState, gradient: Tensor
    ) -> tuple[DefenseState, Tensor]:
        return state, torch.ones_like(gradient)


@pytest.mark.parametrize("sync", ["round", "step"])
def test_a_defense_has_the_last_word_on_a_gradient(sync: str) -> None:
    events = list[Event]()
    parallel(plan(), LOCAL | {"sync": sync}, events=events, defenses=(Ones(),))
    sent = [event.gradient for event in events if isinstance(event, CutGradientDown)]
    assert len(sent) == 2 * 3 * NODES
    assert all((gradient == 1).all() for gradient in sent)


def replaced(message: Message, key: str, **arrays: Any) -> None:
    """Put other arrays, or none, in place of a record's own."""
    record = message.content.get(key)
    if message.metadata.src_node_id == 3 and isinstance(record, ArrayRecord):
        whole = {**unpack(record), **arrays}
        message.content[key] = pack({n: value for n, value in whole.items() if value is not None})


WRONG_GRADIENTS: dict[str, tuple[dict[str, Any], str]] = {
    "missing": ({"1.bias": None}, r"lacks array '1\.bias'"),
    "extra": ({"9.bias": np.zeros(1)}, r"an unknown array '9\.bias'"),
    "shape": ({"1.bias": np.zeros(5)}, r"'1\.bias' is float64 of shape \(5,\), expected .*\(4,\)"),
    "type": ({"1.bias": np.zeros(4, np.float32)}, r"'1\.bias' is float32"),
    "nan": ({"1.bias": np.full(4, np.nan)}, r"'1\.bias' of round 1, step 0 is not finite"),
}


@pytest.mark.parametrize("wrong", WRONG_GRADIENTS)
def test_a_gradient_that_does_not_fit_names_its_node(wrong: str) -> None:
    arrays, cause = WRONG_GRADIENTS[wrong]
    with pytest.raises(NodeFailed, match=r"node 2 failed on 'train\.backward': .*" + cause):
        parallel(plan(), STEP, alter=lambda reply: replaced(reply, BOTTOM_GRADIENT, **arrays))


@pytest.mark.parametrize("sync", ["round", "step"])
@pytest.mark.parametrize(
    ("arrays", "cause"),
    [
        ({"labels": np.array([0, 1, 2, 3])}, "labels from 0 to 3"),
        ({"labels": np.array([0, -1, 2, 0])}, "labels from -1 to 2"),
        ({"smashed": np.zeros((4, 3, 2, 2), np.float32)}, "float32, the server's part is"),
    ],
)
def test_a_batch_that_does_not_fit_names_its_node(
    sync: str, arrays: dict[str, Any], cause: str
) -> None:
    with pytest.raises(NodeFailed, match=r"node 2 failed on 'train\.split': .*" + cause):
        parallel(plan(), {"sync": sync}, alter=lambda reply: replaced(reply, SMASHED, **arrays))


@pytest.mark.parametrize("sync", ["round", "step"])
def test_labels_may_be_at_the_server(sync: str) -> None:
    shared = parallel(plan(local_steps=None), {"sync": sync})
    settings = plan(local_steps=None, labels="server")
    at_server = parallel(settings, {"sync": sync}, labels=several_nodes.labels())
    assert tiny.same(shared, at_server)


@pytest.mark.parametrize(("scale", "steps"), [("global", None), ("local", 3)])
def test_a_penalty_weighs_the_same_in_both_scales_and_as_in_uncut_training(
    scale: str, steps: int | None
) -> None:
    """Slow reading: uncut training on task + alpha * the mean of the nodes' penalties by rows."""
    settings = plan(**OPTIMISERS["momentum"], local_steps=steps)
    nopeek = ("nopeek", {"alpha": 2.0})
    options = STEP | {"gradient_scale": scale}
    found = parallel(settings, options, at_nodes=[nopeek])
    expected = concatenated(
        several_nodes.cells(settings),
        rounds=2,
        penalty=lambda images, smashed: 2.0 * distance_correlation(images.to(smashed), smashed),
    )
    assert distance(found, expected) < 1e-10
    assert distance(found, uncut(settings)) > 1e-3


def test_in_the_global_scale_a_round_of_one_node_s_penalty_is_scaled_with_its_gradient() -> None:
    """Of K equal nodes each bottom steps along 1/K of what it does in the local scale, whole."""
    settings = plan(local_steps=1, learning_rate=0.1)
    nopeek = ("nopeek", {"alpha": 2.0})

    def moved(scale: str) -> dict[str, Tensor]:
        options = ROUND | {"gradient_scale": scale}
        found = parallel(settings, options, rounds=1, at_nodes=[nopeek])
        first = double_models.architecture().build(derive(tiny.SEED, "victim-init")).state_dict()
        bottom = double_models.architecture().bottom(0).state_dict()
        return {name: found[name] - first[name] for name in bottom}

    whole, own = moved("global"), moved("local")
    for name, way in own.items():
        torch.testing.assert_close(whole[name] * NODES, way)


@pytest.mark.parametrize("sync", ["round", "step"])
def test_detectors_are_shown_the_gradient_of_the_node_s_own_loss_in_either_scale(sync: str) -> None:
    """In the global scale one that looks at sizes saw nothing outlying, whatever was sent."""

    def shown(scale: str) -> list[Tensor]:
        options = {"sync": sync, "gradient_scale": scale}
        with guarded.catalogued():
            parallel(plan(local_steps=1), options, rounds=1, at_nodes=[("witness", {})])
            return [step.first_gradient for _, step in guarded.called("inspect")]

    whole, own = shown("global"), shown("local")
    assert len(whole) == len(own) == NODES
    for left, right in zip(whole, own, strict=True):
        assert left.abs().max() > 0
        torch.testing.assert_close(left, right)
