"""A worker killed in the middle of a split round: the run ends and says so; nothing goes astray."""

import os
import signal

import pytest
import ray
from flwr.app import Message, RecordDict

from clients import node_app
from leakbed.events import Event, SmashedUp
from leakbed.grids import DeterministicGrid, LocalGrid, NodeFailed
from leakbed.grids.base import ResidentGrid
from leakbed.grids.ray.grid import RayGrid
from leakbed.tap.wiretap import Wiretap
from leakbed.wire.messages import SETUP
from strategies.vanilla_split import VanillaSplit
from tests.support import several_nodes, tiny

pytestmark = [pytest.mark.runtime, pytest.mark.usefixtures("identity")]
NODES, STEPS = 2, 3


class KillAt:
    """Kills the worker that served a certain smashed batch, once."""

    def __init__(self, grid: RayGrid, place: tuple[int, int] | None) -> None:
        self._grid, self._place = grid, place

    def __call__(self, event: Event) -> None:
        if isinstance(event, SmashedUp) and (event.round, event.step) == self._place:
            assert self._grid._pool is not None
            worker = self._grid._pool.workers[0].actor
            process = ray.get(worker.__ray_call__.remote(lambda _: os.getpid()))
            os.kill(process, signal.SIGKILL)
            self._place = None


def trained(grid: ResidentGrid, hooks: list[KillAt]) -> dict[str, tiny.Tensor]:
    plan = tiny.plan(local_steps=STEPS, momentum=0.9)
    canonical = DeterministicGrid(grid, stream=1, roster=grid.roster)
    cells = [
        Message(
            RecordDict({"cell": tiny.cell(partition, NODES, plan=plan).record()}),
            dst_node_id=node,
            message_type=SETUP,
        )
        for node, partition in grid.roster.items()
    ]
    canonical.send_and_receive(cells)
    strategy: VanillaSplit = tiny.split_strategy(settings=plan)
    tap = Wiretap(canonical, hooks, roster=grid.roster, strict=True)
    return tiny.train_split(tap, strategy, rounds=2)


def test_a_node_that_loses_its_place_ends_the_run_and_the_next_run_is_whole() -> None:
    expected = trained(LocalGrid(node_app, nodes=NODES), [])
    with RayGrid(node_app, nodes=NODES, workers=1) as grid:
        assert tiny.same(trained(grid, []), expected)
        with pytest.raises(NodeFailed, match="OutOfStepError"):
            trained(grid, [KillAt(grid, (2, 1))])
        # Told its cell anew, every node starts again, on the worker that took the dead one's place.
        assert tiny.same(trained(grid, []), expected)


def test_a_node_is_not_made_up_from_weights_alone() -> None:
    """In step each request brings weights; buffers and a defence's count are gone all the same."""
    plan = several_nodes.plan(local_steps=STEPS)
    chosen = {"nodes": NODES, "model": tiny.architecture("stateful")}
    with RayGrid(node_app, nodes=NODES, workers=1) as grid:
        canonical = several_nodes.grid(
            plan,
            on=DeterministicGrid(grid, stream=1, roster=grid.roster),
            at_nodes=[("smashed-noise", {"sigma": 1.0})],
            **chosen,
        )
        built = several_nodes.built("parallel-split", plan, options={"sync": "step"}, **chosen)
        tap = Wiretap(canonical, [KillAt(grid, (1, 1))], roster=grid.roster, strict=True)
        with pytest.raises(NodeFailed, match="OutOfStepError"):
            built.strategy.start(tap, built.arrays, num_rounds=1)
