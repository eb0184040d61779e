"""Defences of smashed data in training: a part of what the node computes, in every protocol."""

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any, ClassVar

import numpy as np
import pytest
import torch
from flwr.app import Context, Message, RecordDict
from torch import Tensor

from defenses import SmashedNoise
from leakbed.contracts import Defense, DefenseState, IllegalCombinationError, Protects
from leakbed.flower_internals import task_identity
from leakbed.mods import applied, defend
from leakbed.wire.messages import BACKWARD_STEP, SPLIT_STEP, SplitReply, SplitRequest
from leakbed.wire.records import GRADIENT, pack
from tests.support import double_models, guarded, several_nodes, tiny
from tests.support.several_nodes import OPTIMISERS, Weights, distance, plan, trained

CLIPPED = ("smashed-noise", {"sigma": 0.0, "clip": double_models.CLIP})


@dataclass(frozen=True, kw_only=True)
class Rounded(Defense):
    """Sends the sign of everything; how a node learns from that is its setting."""

    name: ClassVar[str] = "rounded"
    source: ClassVar[str] = "nowhere"
    protects: ClassVar[frozenset[Protects]] = frozenset({Protects.SMASHED})
    straight_through: bool = True

    def protect_smashed(self, state: DefenseState, smashed: Tensor) -> tuple[DefenseState, Tensor]:
        return state, torch.from_numpy(np.sign(smashed.detach().numpy()))


@dataclass(frozen=True, kw_only=True)
class Masked(Defense):
    """Drops half of the entries, others in every message; remembers how many it saw."""

    name: ClassVar[str] = "masked"
    source: ClassVar[str] = "nowhere"
    protects: ClassVar[frozenset[Protects]] = frozenset({Protects.SMASHED})

    def protect_smashed(self, state: DefenseState, smashed: Tensor) -> tuple[DefenseState, Tensor]:
        kept = torch.rand(smashed.shape, generator=state.generator()) < 1 / 2
        return state, smashed * kept.to(smashed)


@pytest.fixture(autouse=True)
def identity() -> Iterator[None]:
    with tiny.identity(), guarded.catalogued(rounded=Rounded, masked=Masked):
        yield


PROTOCOLS: dict[str, dict[str, Any]] = {
    "vanilla-split": {},
    "splitfed-v1": {},
    "splitfed-v2": {},
    "u-shaped": {"labels": "client"},
    "vertical-split": {"labels": "server", "nodes": 1},
    "parallel-split": {},
    "parallel-split step global": {"options": {"sync": "step"}},
    "parallel-split step local": {"options": {"sync": "step", "gradient_scale": "local"}},
}


def under(case: str, network: str, **more: Any) -> Weights:
    chosen = dict(PROTOCOLS[case])
    held, nodes = chosen.pop("labels", "shared"), chosen.setdefault("nodes", 2)
    settings = plan(**OPTIMISERS["momentum"], labels=held)
    upper = 6 if case == "u-shaped" else None
    if held == "server":
        more["labels"] = several_nodes.labels(nodes)
    model = double_models.architecture(network, cut=4, upper_cut=upper)
    return trained(case.partition(" ")[0], settings, model=model, **chosen, **more)


@pytest.mark.parametrize("case", PROTOCOLS)
def test_a_clip_trains_as_torch_does_with_the_clip_as_a_layer(case: str) -> None:
    defended = under(case, "double", at_nodes=[CLIPPED])
    assert distance(defended, under(case, "double_clipping")) < 1e-10
    assert distance(defended, under(case, "double")) > 1e-3
    assert tiny.same(defended, under(case, "double", at_nodes=[CLIPPED], resident=False))


@pytest.mark.parametrize("name", ["masked", "rounded"])
@pytest.mark.parametrize("model", ["plain", "stateful"])
def test_nodes_that_forget_differentiate_the_same_message(name: str, model: str) -> None:
    """The mask, and BatchNorm and dropout under it, are those of the message that was sent."""

    def weights(*, resident: bool) -> Weights:
        grid = tiny.ready(resident=resident, plan=PLAN, model=model, defenses=((name, {}),))
        return tiny.train_split(grid, tiny.split_strategy(model, settings=PLAN))

    assert tiny.same(weights(resident=True), weights(resident=False))


PLAN = tiny.plan(momentum=0.9)


def context() -> Context:
    return Context(run_id=1, node_id=1, node_config={}, state=RecordDict(), run_config={})


def handed(
    defense: Defense, smashed: Tensor, gradient: Tensor, *, kind: str = SPLIT_STEP
) -> SplitRequest:
    """What a stranger's node is handed for the gradient of what the mod sent in its place."""
    got: list[SplitRequest] = []

    def handler(message: Message, context: Context) -> Message:
        got.append(SplitRequest.of(message))
        reply = SplitReply(steps=2, examples=2, smashed=smashed.numpy())
        return Message(reply.records(), reply_to=message)

    mod, kept = defend(defense, stream=7), context()
    for step, given, asked in ((0, None, SPLIT_STEP), (1, gradient.numpy(), kind)):
        request = SplitRequest(round=1, step=step, gradient=given)
        message = Message(request.records(), dst_node_id=1, message_type=asked)
        mod(message, kept, handler)
    return got[1]


ROWS = torch.tensor([[3.0, 4.0], [0.3, 0.4], [0.0, 0.0]])
UP = torch.tensor([[1.0, 2.0], [1.0, 2.0], [1.0, 2.0]])


@pytest.mark.parametrize("kind", [SPLIT_STEP, BACKWARD_STEP])
def test_a_mod_hands_a_strangers_node_the_gradient_of_what_it_computed(kind: str) -> None:
    clip = handed(tiny_clip(), ROWS, UP, kind=kind)
    # Of z / |z|: what is along the row goes, the rest is shorter by its length.
    along = torch.tensor([0.6, 0.8])
    expected = (UP[0] - (UP[0] @ along) * along) / 5
    assert clip.gradient is not None
    torch.testing.assert_close(torch.tensor(clip.gradient[0]), expected)
    assert clip.gradient[1:].tolist() == UP[1:].tolist()  # rows that were not clipped
    assert clip.received is not None
    assert clip.received.tolist() == UP.tolist()


def tiny_clip() -> Defense:

    return SmashedNoise(sigma=0.0, clip=1.0)


def test_noise_alone_hands_on_the_gradient_bit_for_bit() -> None:

    got = handed(SmashedNoise(sigma=3.0), ROWS, UP)
    assert got.gradient is not None
    assert np.array_equal(got.gradient, UP.numpy())


def test_straight_through_hands_on_the_gradient_and_sends_what_was_made() -> None:
    got = handed(Rounded(), ROWS, UP)
    assert got.gradient is not None
    assert np.array_equal(got.gradient, UP.numpy())
    stage = ("here", Rounded(), DefenseState(stream=7))
    ((state,), sent) = applied([stage], ROWS.clone().requires_grad_())
    assert torch.equal(sent.detach(), ROWS.sign())
    assert state.messages == 1


def test_what_no_gradient_passes_and_does_not_say_so_is_refused() -> None:
    with pytest.raises(IllegalCombinationError, match=r"rounded returns .* straight_through = Tru"):
        handed(Rounded(straight_through=False), ROWS, UP)


def test_a_gradient_that_does_not_fit_is_left_for_the_node_to_refuse() -> None:
    got = handed(tiny_clip(), ROWS, UP[:2])
    assert got.gradient is not None
    assert np.array_equal(got.gradient, UP[:2].numpy())
    assert got.received is None


def test_a_detector_sees_the_gradient_as_it_came_and_what_it_makes_of_the_bottom() -> None:
    hooks = (("witness", {}), ("smashed-noise", {"sigma": 0.0, "clip": 0.1}))
    plan_ = tiny.plan(local_steps=1)
    grid = tiny.ready(plan=plan_, defenses=hooks)
    strategy = tiny.split_strategy(settings=plan_)
    sent: list[Tensor] = []
    train = strategy.part.train

    def noted(*given: Any) -> Tensor:
        sent.append(train(*given))
        return sent[-1]

    strategy.part.train = noted  # type: ignore[method-assign]
    tiny.train_split(grid, strategy, rounds=1)
    ((_, seen),) = guarded.called("inspect")
    assert torch.equal(seen.cut_gradient, sent[0])
    ((images, smashed),) = guarded.called("train_step")
    bottom = tiny.architecture().bottom(tiny.derive(tiny.SEED, "victim-init"))
    made = bottom(images)
    assert torch.equal(made.detach(), smashed)
    norms = made.flatten(1).norm(dim=1).reshape(-1, 1, 1, 1)
    clipped = made * (0.1 / norms).clamp_max(1.0)
    (expected,) = torch.autograd.grad(clipped, [bottom[0].weight], sent[0])
    torch.testing.assert_close(seen.first_gradient, expected)


def test_a_server_cannot_show_detectors_another_gradient() -> None:
    """Of what comes beside a gradient, the node reads only what its own mod has put there."""
    arrays = {"gradient": np.ones((2, 3), np.float32), "received": np.zeros((2, 3), np.float32)}
    sent = SplitRequest(round=1, step=1, gradient=arrays["gradient"]).records()
    sent[GRADIENT] = pack(arrays)
    with task_identity():
        message = Message(sent, dst_node_id=1, message_type=SPLIT_STEP)
    assert SplitRequest.of(message).received is None
