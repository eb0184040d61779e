"""Steps of plain SGD are torch's own, bit for bit; every other optimiser takes its own."""

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from leakbed.optimizer_steps import take_step, zero_gradients

Optimizer = torch.optim.Optimizer
SGD, ADAM = torch.optim.SGD, torch.optim.Adam
MAKERS: dict[str, tuple[Callable[[Any], Optimizer], bool]] = {
    "plain": (lambda p: SGD(p, lr=0.1), True),
    "momentum": (lambda p: SGD(p, lr=0.1, momentum=0.9), False),
    "weight decay": (lambda p: SGD(p, lr=0.1, weight_decay=0.1), False),
    "maximised": (lambda p: SGD(p, lr=0.1, maximize=True), False),
    "foreach": (lambda p: SGD(p, lr=0.1, foreach=True), False),
    "rate in a tensor": (lambda p: SGD(p, lr=torch.tensor(0.1)), False),
    "two groups": (lambda p: SGD([{"params": [x]} for x in p], lr=0.1), False),
    "adam": (lambda p: ADAM(p, lr=0.1), False),
}


def trained(
    make: Callable[[Any], Optimizer], zero: Callable[[Any], Any], step: Callable[[Any], Any]
) -> list[Tensor]:
    torch.manual_seed(0)
    layer, unused = nn.Linear(7, 3), nn.Parameter(torch.ones(2))
    optimizer = make([*layer.parameters(), unused])
    for _ in range(5):
        zero(optimizer)
        layer(torch.rand(4, 7)).square().sum().backward()
        step(optimizer)
        optimizer.load_state_dict(optimizer.state_dict())  # as trainers do between rounds
    return [p.detach().clone() for p in [*layer.parameters(), unused]]


@pytest.mark.parametrize("name", MAKERS)
def test_every_optimiser_ends_in_torchs_own_bits(name: str) -> None:
    make, _ = MAKERS[name]
    expected = trained(make, lambda o: o.zero_grad(), lambda o: o.step())
    found = trained(make, zero_gradients, take_step)
    assert all(torch.equal(a, b) for a, b in zip(expected, found, strict=True))


@pytest.mark.parametrize("name", MAKERS)
def test_only_plain_sgd_takes_the_short_way(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    make, short = MAKERS[name]
    optimizer = make([nn.Parameter(torch.ones(2)), nn.Parameter(torch.ones(1))])
    taken: list[str] = []
    for method in ("step", "zero_grad"):
        monkeypatch.setattr(type(optimizer), method, lambda self, m=method: taken.append(m))
    zero_gradients(optimizer)
    take_step(optimizer)
    assert taken == ([] if short else ["zero_grad", "step"])


def test_whoever_waits_for_a_step_is_called() -> None:
    called: list[str] = []
    optimizer = SGD([nn.Parameter(torch.ones(2))], lr=0.1)
    optimizer.register_step_post_hook(lambda *_: called.append("hook"))
    take_step(optimizer)
    scheduled = SGD([nn.Parameter(torch.ones(2))], lr=0.1)
    scheduled.step = lambda: called.append("own")  # type: ignore[method-assign,assignment]
    take_step(scheduled)
    assert called == ["hook", "own"]
