"""A passive hook cannot change the training, whatever it does with what it is given."""

import random
from collections.abc import Callable, Mapping
from dataclasses import replace
from typing import Any

import numpy as np
import pytest
import torch
from flwr.app import ArrayRecord
from flwr.serverapp.strategy import FedAvg
from torch import Tensor, nn

from leakbed.events import Event, SmashedUp, UpdateUp, WeightsDown, arrays_of
from leakbed.flower_internals import task_identity
from leakbed.seeds import derive, scoped
from leakbed.tap.wiretap import Wiretap
from strategies.server_model import TopTrainer
from strategies.vanilla_split import VanillaSplit
from tests.support import tiny

pytestmark = pytest.mark.usefixtures("identity")

NODES = 3
# Dropout and BatchNorm on both sides of the cut.
NETWORK = replace(tiny.architecture("stateful"), name="tests.support.slow_nodes:stateful")
PLAN = tiny.plan(batch_size=4)
Hooks = list[Callable[[Event], object]]


class Meddler:
    """Draws from every global generator, runs a live attack, and ruins all it was given."""

    def __init__(self) -> None:
        self.seen: list[str] = []

    def __call__(self, event: Event) -> Event:
        self.seen.append(type(event).__name__)
        random.random()
        random.seed(3)
        np.random.rand(7)  # noqa: NPY002  the global one is the point
        torch.rand(11)
        torch.manual_seed(12)
        if isinstance(event, SmashedUp):
            self._invert(event.smashed)
        for arrays in arrays_of(event).values():
            self._ruin(arrays)
        return event

    @staticmethod
    def _invert(smashed: Any) -> None:
        """Guess the inputs with a clone of the bottom: gradients, dropout, an optimiser."""
        clone = NETWORK.bottom(9)
        guess = torch.rand(len(smashed), *tiny.IMAGE_SHAPE, requires_grad=True)
        optimizer = torch.optim.Adam([guess, *clone.parameters()])
        for _ in range(3):
            optimizer.zero_grad()
            nn.functional.mse_loss(clone(guess), torch.from_numpy(smashed)).backward()
            optimizer.step()

    @staticmethod
    def _ruin(arrays: Mapping[str, Any]) -> None:
        for array in arrays.values():
            array[...] = 7
        if isinstance(arrays, dict):
            arrays.clear()


def trained(train: Callable[[Wiretap], Mapping[str, Tensor]], hooks: Hooks) -> Mapping[str, Tensor]:
    """Train on a bare grid: Flower's sampling and the top's dropout draw from the globals."""
    grid = tiny.ready(NODES, architecture=NETWORK, plan=PLAN)
    with scoped(2):
        return train(Wiretap(grid, hooks, roster=grid.roster, strict=True))


def split(grid: Wiretap) -> Mapping[str, Tensor]:
    parts = NETWORK.parts(derive(tiny.SEED, "victim-init"))
    trainer = TopTrainer(parts.top, PLAN.optimiser(parts.top.parameters()))
    bottom = {name: value.numpy() for name, value in parts.bottom.state_dict().items()}
    strategy = VanillaSplit(trainer, bottom, fraction_train=0.7)
    return tiny.train_split(grid, strategy, rounds=2)


def fedavg(grid: Wiretap) -> Mapping[str, Tensor]:
    model = NETWORK.build(derive(tiny.SEED, "victim-init"))
    strategy = FedAvg(fraction_train=0.7, fraction_evaluate=0.0, min_available_nodes=NODES)
    result = strategy.start(grid, ArrayRecord(model.state_dict()), num_rounds=2)
    return dict(result.arrays.to_torch_state_dict())


@pytest.fixture(autouse=True, scope="module")
def warm() -> None:
    """Call everything once: pytest's checks of types draw from ``random`` at a first call."""
    with task_identity():
        for train in (split, fedavg):
            trained(train, [Meddler()])


@pytest.mark.parametrize("train", [split, fedavg])
def test_a_hook_that_meddles_with_everything_changes_no_bit(
    train: Callable[[Wiretap], Mapping[str, Tensor]],
) -> None:
    meddler = Meddler()
    trained(train, [])  # loads data once; beartype, checking that, draws from `random`
    expected = trained(train, [])
    assert tiny.same(trained(train, [meddler]), expected)
    assert meddler.seen


@pytest.mark.parametrize("train", [split, fedavg])
def test_what_one_hook_ruins_the_next_still_reads(
    train: Callable[[Wiretap], Mapping[str, Tensor]],
) -> None:
    alone: list[dict[str, Any]] = []
    after: list[dict[str, Any]] = []

    def keep(into: list[dict[str, Any]]) -> Callable[[Event], None]:
        return lambda event: into.append(
            {k: v.copy() for arrays in arrays_of(event).values() for k, v in arrays.items()}
        )

    trained(train, [keep(alone)])
    trained(train, [Meddler(), keep(after), Meddler()])
    assert len(after) == len(alone) > 0
    for left, right in zip(alone, after, strict=True):
        assert left.keys() == right.keys()
        unlike = {n: (left[n], right[n]) for n in left if not np.array_equal(left[n], right[n])}
        assert unlike == {}


def test_the_meddler_met_what_it_should_ruin() -> None:
    """Or the tests above would prove nothing."""
    meddler = Meddler()
    trained(split, [meddler])
    assert meddler.seen.count(SmashedUp.__name__) == 2 * 2 * 3  # rounds, sampled nodes, steps
    meddler = Meddler()
    trained(fedavg, [meddler])
    assert {WeightsDown.__name__, UpdateUp.__name__} == set(meddler.seen)
