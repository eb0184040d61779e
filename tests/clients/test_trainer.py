from typing import Any

import pytest
import torch
from flwr.app import Context, RecordDict
from torch import Tensor

from clients.trainer import PartTrainer
from leakbed.seeds import derive
from tests.support import tiny
from tests.support.u_shaped import OPTIMISERS, at_home, network

pytestmark = pytest.mark.usefixtures("identity")


def trainer(part: Any = "bottom", model: str = "everywhere", **plan: Any) -> PartTrainer:
    cell = tiny.cell(architecture=network(model), plan=at_home(**plan))
    made = PartTrainer(cell, part)
    whole = network(model).build(derive(tiny.SEED, "victim-init")).state_dict()
    made.load({name: value.numpy() for name, value in whole.items()})
    return made


def context() -> Context:
    return Context(run_id=1, node_id=1, node_config={}, state=RecordDict(), run_config={})


def images(count: int = 8) -> Tensor:
    return tiny.images()[0][:count]


def trained(own: PartTrainer, rounds: int) -> dict[str, Tensor]:
    for round_ in range(rounds):
        own.optimiser.zero_grad()
        own.output(images(), role=f"forward/{round_}").square().sum().backward()
        own.optimiser.step()
    return {name: torch.from_numpy(value) for name, value in own.arrays().items()}


def test_a_part_takes_its_own_weights_and_leaves_the_others() -> None:
    whole = network("everywhere").build(derive(tiny.SEED, "victim-init")).state_dict()
    parts: dict[str, tuple[int, ...]] = {"bottom": (0, 1), "head": (7, 9), "whole": (0, 1, 3)}
    for part, layers in parts.items():
        own = {n: torch.from_numpy(v) for n, v in trainer(part).arrays().items()}
        assert tiny.same(own, {name: whole[name] for name in own})
        assert {f"{layer}.weight" for layer in layers} <= set(own)


def test_arrays_are_copies() -> None:
    own = trainer()
    before = own.arrays()
    trained(own, 1)
    assert not (before["0.weight"] == own.arrays()["0.weight"]).all()


def test_some_weights_may_be_loaded_alone() -> None:
    own, before = trainer(), trainer().arrays()
    own.load({"0.bias": before["0.bias"] + 1})
    assert (own.arrays()["0.bias"] == before["0.bias"] + 1).all()
    assert (own.arrays()["0.weight"] == before["0.weight"]).all()


@pytest.mark.parametrize("optimizer", OPTIMISERS)
def test_what_was_stored_goes_on_as_if_never_stored(optimizer: str) -> None:
    kept, stored = trainer(**OPTIMISERS[optimizer]), context()
    expected = trained(kept, 2)
    kept.store(stored)
    restored = trainer(**OPTIMISERS[optimizer])
    assert restored.restore(stored)
    found = {name: torch.from_numpy(value) for name, value in restored.arrays().items()}
    assert tiny.same(found, expected)
    assert tiny.same(trained(restored, 2), trained(kept, 2))


def test_parts_of_one_node_are_stored_apart() -> None:
    stored = context()
    trainer("bottom").store(stored)
    assert not trainer("head").restore(stored)
    trainer("head").store(stored)
    assert trainer("bottom").restore(stored)
    assert trainer("bottom").arrays().keys().isdisjoint(trainer("head").arrays())


def test_forgetting_drops_momenta() -> None:
    one, two = trainer(momentum=0.9), trainer(momentum=0.9)
    trained(one, 1)
    two.load(one.arrays())
    one.forget()
    assert tiny.same(trained(one, 1), trained(two, 1))


def test_randomness_comes_from_the_role_alone() -> None:
    torch.manual_seed(1)
    one = trainer().output(images(), role="a")
    torch.manual_seed(2)
    assert torch.equal(trainer().output(images(), role="a"), one)
    assert not torch.equal(trainer().output(images(), role="b"), one)


def test_batches_are_the_cells() -> None:
    own, cell = trainer(), tiny.cell(plan=at_home())
    expected = cell.batches(2, len(cell.rows()[0]))
    assert own.steps(2) == (3, 24)
    assert [own.batch(2, at).tolist() for at in range(3)] == [b.tolist() for b in expected]
