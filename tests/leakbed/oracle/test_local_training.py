"""Candidates' updates, trained side by side, are those of torch's own training one by one."""

from collections.abc import Callable
from functools import partial
from typing import Any

import pytest
import torch
from torch import nn

from leakbed.contracts.noise_laws import NoCeilingError
from leakbed.oracle.local_training import LocalTraining
from tests.support import tiny

Made = Callable[[Any], torch.optim.Optimizer]
SGD: Made = partial(torch.optim.SGD, lr=0.1)
MOMENTUM: Made = partial(torch.optim.SGD, lr=0.1, momentum=0.9, weight_decay=0.01)
ADAM: Made = partial(torch.optim.Adam, lr=0.01, weight_decay=0.01)


def training(
    network: nn.Module, optimiser: Made, *batches: list[int], stream: int | None = None
) -> LocalTraining:
    images, labels = tiny.images()
    return LocalTraining(
        network=network,
        before={name: value.clone() for name, value in network.state_dict().items()},
        batches=[torch.tensor(batch) for batch in batches],
        images=images,
        labels=labels,
        optimiser=optimiser,
        stream=stream,
    )


@pytest.mark.parametrize("optimiser", [SGD, MOMENTUM, ADAM], ids=["sgd", "momentum", "adam"])
@pytest.mark.parametrize(
    "batches",
    [
        ([3, 4, 5],),
        ([7, 8], [3, 9], [10, 11]),
        ([3, 3, 1], [2, 3, 5]),
        ([3],),
    ],
    ids=["one step", "several steps", "a row that comes again", "alone"],
)
def test_side_by_side_is_one_by_one(optimiser: Made, batches: tuple[list[int], ...]) -> None:
    torch.manual_seed(0)
    given = training(tiny.plain(), optimiser, *batches)
    candidates = torch.tensor([3, 20, 21, 40])
    slow, slow_losses = given._one_by_one(3, candidates)
    fast, losses = given.of(3, candidates)
    assert torch.allclose(losses, slow_losses, atol=1e-6)
    for one, other in zip(fast, slow, strict=True):
        assert set(one) == set(other)
        for name, value in one.items():
            assert torch.allclose(value, other[name], atol=2e-6), name
    assert any(not torch.equal(fast[0][name], fast[1][name]) for name in fast[0])


def test_a_network_with_state_is_trained_one_by_one() -> None:
    torch.manual_seed(0)
    network = nn.Sequential(nn.Conv2d(1, 2, 3), nn.BatchNorm2d(2), nn.Flatten(), nn.Linear(32, 3))
    given = training(network, SGD, [1, 2, 3], [4, 5, 6])
    made, _ = given.of(2, torch.tensor([2, 30]))
    assert made[0]["1.num_batches_tracked"] == 2
    assert not torch.equal(made[0]["1.running_mean"], made[1]["1.running_mean"])


def test_what_is_not_known_is_refused() -> None:
    dropping = nn.Sequential(nn.Flatten(), nn.Dropout(), nn.Linear(36, 3))
    with pytest.raises(NoCeilingError, match="answer key does not say the run's seed"):
        training(dropping, SGD, [1, 2]).of(1, torch.tensor([1, 2]))
    seeded = training(dropping, SGD, [1, 2], stream=4)
    weights = [seeded.of(1, torch.tensor([1, 9]))[0][0]["2.weight"] for _ in range(2)]
    assert torch.equal(*weights)
    with pytest.raises(NoCeilingError, match="row 7 is in none"):
        training(tiny.plain(), SGD, [1, 2]).of(7, torch.tensor([1]))
    for made, said in (
        (partial(torch.optim.RMSprop, lr=0.1), "optimiser is RMSprop"),
        (partial(torch.optim.SGD, lr=0.1, momentum=0.5, nesterov=True), "'nesterov': True"),
        (partial(torch.optim.Adam, lr=0.1, amsgrad=True), "'amsgrad': True"),
    ):
        with pytest.raises(NoCeilingError, match=said):
            training(tiny.plain(), made, [1, 2]).of(1, torch.tensor([1]))
