"""Whoever spends a claim of privacy counts, and stops where it ends."""

from dataclasses import dataclass
from typing import Any, ClassVar

import pytest
import torch
from torch import Tensor, nn

from defenses import DPSGD, DPCutGradient
from leakbed.contracts import Defense, DefenseState, Protects
from leakbed.contracts.gradient_defenses import GradientDefenses, Horizon, HorizonError, Origin
from strategies.server_model import TopTrainer


@dataclass(frozen=True, kw_only=True)
class Thrice(Defense):
    """Covers three of anything, and does nothing."""

    name: ClassVar[str] = "thrice"
    source: ClassVar[str] = "nowhere"
    protects: ClassVar[frozenset[Protects]] = frozenset({Protects.CUT_GRADIENT})

    @property
    def covers(self) -> int:
        return 3

    def protect_cut_gradient(
        self, state: DefenseState, gradient: Tensor
    ) -> tuple[DefenseState, Tensor]:
        return state, gradient


def origin(node: int = 0, step: int = 0, *, rows: tuple[int, ...] | None = None) -> Origin:
    return Origin(node=node, round=1, step=step, rows=rows)


def spent(unit: str = "gradient", **settings: Any) -> Horizon:
    return Horizon(Thrice(), protocol="some-split", unit=unit, **settings)


def test_steps_are_counted_for_each_node() -> None:
    steps = spent("step")
    for _ in range(3):
        steps.step([origin(0), origin(1)])
    steps.step([origin(2)])
    with pytest.raises(
        HorizonError,
        match=r"some-split took step 4 of 3 with rows of node 1: thrice claims its privacy for 3",
    ):
        steps.step([origin(1, step=3)])


def test_steps_of_nobody_known_are_counted_together() -> None:
    steps = spent("step")
    for _ in range(3):
        steps.step([None])
    with pytest.raises(HorizonError, match="took step 4 of 3"):
        steps.step([None])


def test_gradients_are_counted_for_each_row_where_rows_are_known() -> None:
    sent = spent()
    for step in range(3):
        sent.send(origin(0, step, rows=(1, 2)))
        sent.send(origin(1, step, rows=(1, 2)))  # another node's
    sent.send(origin(0, 3, rows=(3,)))
    with pytest.raises(HorizonError, match="took gradient 4 of 3 with row 2 of node 0"):
        sent.send(origin(0, 4, rows=(4, 2)))


def test_a_batch_of_unknown_rows_counts_for_all_batches_its_rows_may_be_in() -> None:
    once = spent(passes=2)  # each row is in two batches: 2 of 3 are planned, 2 more are too many
    once.send(origin(0, 0))
    once.send(origin(0, 1))
    with pytest.raises(HorizonError, match="took gradient 4 of 3 with a batch of node 0"):
        once.send(origin(0, 1))


def test_what_claims_no_horizon_is_never_counted() -> None:
    plain = Horizon(Defense(), protocol="some-split", unit="step")
    for _ in range(5):
        plain.step([origin()])
        plain.send(None)
    assert not plain.used


def test_a_gradient_beyond_the_horizon_is_not_protected() -> None:
    chain = GradientDefenses([DPCutGradient(horizon=2)], stream=3, protocol="some-split")
    gradient, at = torch.ones(2, 3), origin(rows=(0, 1))
    chain.protect(gradient, None, at)
    chain.protect(gradient, None, at)
    with pytest.raises(HorizonError, match="took gradient 3 of 2 with row 0 of node 0: dp-cut-gr"):
        chain.protect(gradient, None, at)


def test_a_private_step_beyond_the_horizon_is_not_taken() -> None:
    layers = nn.Sequential(nn.Linear(5, 3))
    private = DPSGD(epsilon=5.0, rate=0.5, steps=2)
    optimiser = torch.optim.SGD(layers.parameters(), lr=0.5)
    top = TopTrainer(layers, optimiser, defenses=(private,), defense_stream=3, protocol="again")
    smashed, labels = torch.ones(4, 5), torch.tensor([0, 1, 2, 0])
    for _ in range(2):
        top.train(smashed, labels, origin())
    top.train(smashed, labels, origin(node=1))
    before = layers[0].weight.detach().clone()
    with pytest.raises(HorizonError, match=r"again took step 3 of 2 .*: dp-sgd claims its privacy"):
        top.train(smashed, labels, origin())
    assert torch.equal(layers[0].weight, before)
