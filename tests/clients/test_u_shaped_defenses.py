"""Defences of a U-shaped node's labels: the same on any runtime, from round to round."""

from typing import Any

import pytest
import torch
from torch import Tensor

from leakbed.grids import DeterministicGrid, NodeFailed
from leakbed.seeds import derive, scoped
from tests.support import tiny
from tests.support.u_shaped import at_home, network, strategy_of

pytestmark = pytest.mark.usefixtures("identity")


def trained(*defenses: tuple[str, dict[str, Any]], resident: bool = True) -> dict[str, Tensor]:
    """Two rounds of two nodes in turn; the middle and the part that nodes hold."""
    plan = at_home(momentum=0.9)
    inner = tiny.ready(2, resident=resident, plan=plan, architecture=network(), defenses=defenses)
    strategy = strategy_of(network(), plan, nodes=2)
    grid = DeterministicGrid(inner, stream=0, roster=inner.roster)
    with scoped(derive(tiny.SEED, "server")):
        strategy.start(grid, strategy.part.arrays(), num_rounds=2)
    held = {name: torch.from_numpy(value) for name, value in strategy.bottom.items()}
    return held | strategy.part.module.state_dict()


@pytest.mark.parametrize(
    "defense", [("iso-noise", {}), ("label-dp", {"epsilon": 0.5})], ids=lambda pair: pair[0]
)
def test_a_heads_defense_is_the_same_in_memory_and_from_the_nodes_state(defense: Any) -> None:
    defended = trained(defense)
    assert tiny.same(defended, trained(defense, resident=False))
    assert not tiny.same(defended, trained())


@pytest.mark.parametrize("resident", [True, False])
def test_a_head_counts_its_rows_gradients_in_every_process_and_stops(resident: bool) -> None:
    """Three rounds of one pass each, and a claim for two."""

    def rounds(number: int) -> None:
        plan = at_home(local_steps=None)
        defense = (("dp-cut-gradient", {"horizon": 2}),)
        grid = tiny.ready(plan=plan, architecture=network(), defenses=defense, resident=resident)
        strategy = strategy_of(network(), plan)
        with scoped(derive(tiny.SEED, "server")):
            strategy.start(grid, strategy.part.arrays(), num_rounds=number)

    rounds(2)
    with pytest.raises(NodeFailed, match=r"node 0 took gradient 3 of 2 with row \d+ of node 0"):
        rounds(3)


def test_a_heads_noise_is_drawn_anew_for_every_message_of_every_round() -> None:
    """Noise that began again in each process or round would be the same in both runtimes, too."""
    plan = at_home()
    grid = tiny.ready(plan=plan, architecture=network(), defenses=(("iso-noise", {}),))
    strategy = strategy_of(network(), plan)
    strategy.start(grid, strategy.part.arrays(), num_rounds=2)
    (state,) = [node.state for node in grid._host._contexts.values()]
    assert state["leakbed.head-defence.0"]["messages"] == 6
