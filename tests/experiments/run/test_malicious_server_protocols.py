"""Feature-space hijacking itself over every protocol it works on: its decoder reads the nodes."""

from dataclasses import replace
from pathlib import Path
from statistics import mean
from typing import Any

import pytest

from attacks.feature_space_hijacking import SMALL
from clients import node_app
from experiments.run.prepare import prepare
from experiments.run.train import train
from experiments.run.training_run import TrainingRun
from experiments.settings.cells import Hijacking, cells
from experiments.settings.load import load_settings
from leakbed.events import CutGradientDown
from leakbed.grids import LocalGrid
from leakbed.tap.trace import Trace

pytestmark = pytest.mark.usefixtures("identity")

ROUNDS = 16
NODES = {"vanilla-split": 4, "u-shaped": 2, "splitfed-v1": 2, "splitfed-v2": 2}
TABLE: dict[str, Any] = {
    "name": "hijacked",
    "keep_rounds": "all",
    "data": {"name": "tests.support.tiny:images", "public": 0.2},
    "model": {"name": "tests.support.hijackable:blocks", "cut": 2},
    "protocol": {"batch_size": 5, "rounds": ROUNDS, "optimizer": "adam", "learning_rate": 0.01},
    "attack": [{"name": "constant-image"}],
}


def trained(folder: Path, protocol: str, *, forges: bool) -> TrainingRun:
    nodes = NODES[protocol]
    model = ["model.upper_cut=4"] if protocol == "u-shaped" else []
    overrides = [f'protocol.name="{protocol}"', f"data.nodes={nodes}", *model]
    hijacking = Hijacking(name="fsha", own=SMALL, checkpoint_every=32, forges=forges)
    training = cells(load_settings(TABLE, overrides))[0].training
    grid = LocalGrid(node_app, nodes=nodes)
    prepared = prepare(replace(training, adversary=hijacking), root=None)
    return train(prepared, grid, folder, roster=grid.roster)


@pytest.mark.reproduces
@pytest.mark.parametrize("protocol", NODES)
def test_the_decoder_reads_nodes_that_were_hijacked_and_no_others(
    tmp_path: Path, protocol: str
) -> None:
    errors = []
    for forges in (True, False):
        run = trained(tmp_path / str(forges), protocol, forges=forges)
        answered = [event.node for event in Trace(run.trace).events(CutGradientDown)]
        assert set(answered) == set(range(NODES[protocol]))
        assert run.checkpoints[-1]["step"] == len(answered) // 32 * 32
        errors.append(mean(point["mse"] for point in run.checkpoints[-2:]))
    assert errors[0] < 0.7 * errors[1]
