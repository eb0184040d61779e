"""Every protocol leaves the same trace, bottom and utility in a new process, bit for bit.

tests/experiments/test_on_grids.py adds Ray and Flower's runtime.

Networks have dropout and BatchNorm on both sides of every cut, nodes have unequal numbers of rows,
answer after random times, and do not all take part.
"""

from collections.abc import Callable, Mapping, Sequence
from functools import cache
from pathlib import Path
from typing import Any

import pytest
from flwr.serverapp import Grid

from experiments.run.prepare import prepare
from experiments.run.train import train
from experiments.settings.cells import cells
from experiments.settings.load import load_settings
from leakbed.grids import LocalGrid
from leakbed.oracle.truth import AnswerKey
from leakbed.tap.trace import Trace
from strategies import PROTOCOLS
from tests.support import tiny

pytestmark = pytest.mark.usefixtures("identity")

NODES = 3
TABLE: dict[str, Any] = {
    "name": "same",
    "keep_rounds": "all",
    "data": {
        "name": "tests.support.tiny:images",
        "nodes": NODES,
        "partition": "linear",
        "public": 0.0,
    },
    "model": {"name": "tests.support.slow_nodes:stateful", "cut": 3},
    "protocol": {
        "batch_size": 5,
        "rounds": 2,
        "fraction": 0.7,
        "learning_rate": 0.1,
        "momentum": 0.9,
    },
    "attack": [{"name": "constant-image"}],
}
# A clip that is differentiated, noise, a penalty that weighs a node's share of the rows, and own
# plug-ins in the training step, one of them with weights that it trains.
DEFENDED = [
    {
        "stack": [
            {"name": "smashed-noise", "sigma": 0.1, "clip": 1.0},
            {"name": "nopeek", "alpha": 1.0},
            {"name": "tests.support.stepping:Proximal"},
            {"name": "tests.support.stepping:AuxiliaryHead"},
        ]
    }
]
OWN: dict[str, dict[str, dict[str, Any]]] = {
    "u-shaped": {"model": {"upper_cut": 5}},
    "vertical-split": {
        "data": {"partition": "iid"},
        "model": {"name": "tests.support.slow_nodes:dense"},
        "protocol": {"fraction": 1.0, "merge": "sum"},
    },
    "fedavg defended": {
        "protocol": {"name": "fedavg"},
        "defense": [
            {
                "stack": [
                    {"name": "tests.support.stepping:Mixup"},
                    {"name": "tests.support.stepping:Proximal"},
                ]
            }
        ],
    },
    "splitfed-v2 defended": {
        "model": {"name": "tests.support.slow_nodes:apart"},
        "protocol": {"name": "splitfed-v2"},
        "defense": DEFENDED,
    },
    "vertical-split defended": {
        "data": {"partition": "iid"},
        "model": {"name": "tests.support.slow_nodes:dense"},
        "protocol": {"name": "vertical-split", "fraction": 1.0, "merge": "sum"},
        "defense": [{"name": "tests.support.stepping:Proximal"}],
    },
    "parallel-split step": {"protocol": {"name": "parallel-split", "sync": "step"}},
    "requests of one's own": {"protocol": {"name": "tests.support.own_requests:LOCAL_LOSS"}},
    "vanilla-split defended": {
        "model": {"name": "tests.support.slow_nodes:apart"},
        "protocol": {"name": "vanilla-split"},
        "defense": DEFENDED,
    },
    "parallel-split defended": {
        "model": {"name": "tests.support.slow_nodes:apart"},
        "protocol": {"name": "parallel-split"},
        "defense": DEFENDED,
    },
    "u-shaped defended": {
        "model": {"name": "tests.support.slow_nodes:apart", "upper_cut": 5},
        "protocol": {"name": "u-shaped"},
        "defense": DEFENDED,
    },
}
# Own plug-ins in the training step of the other protocols, where they need a change of process.
STEPPED = ["fedavg defended", "splitfed-v2 defended", "vertical-split defended"]
CASES = [*PROTOCOLS, *(name for name in OWN if name not in {*PROTOCOLS, *STEPPED})]

Found = dict[str, Any]


def table(case: str) -> dict[str, Any]:
    """The experiment of one protocol."""
    own = OWN.get(case, {})
    merged = {key: {**value, **own.get(key, {})} for key, value in TABLE.items() if key in SECTIONS}
    merged["protocol"].setdefault("name", case)
    defended = {"defense": own["defense"]} if "defense" in own else {}
    return {**TABLE, **merged, **defended}


SECTIONS = ("data", "model", "protocol")


def outcome(
    grid: Grid,
    case: str,
    folder: Path,
    roster: Mapping[int, int] | None,
    overrides: Sequence[str] = (),
) -> Found:
    """Everything a run leaves that may be compared."""
    prepared = prepare(cells(load_settings(table(case), overrides))[0].training, root=None)
    run = train(prepared, grid, folder, roster=roster)
    bottom = AnswerKey.read(run.answers).bottom or {}
    return {
        "records": Trace(run.trace).records,  # in them: a SHA-256 of every array
        "bottom": {name: array.tobytes() for name, array in bottom.items()},
        "accuracy": run.utility["test_accuracy"],
        "bytes": (run.cost["bytes_up"], run.cost["bytes_down"]),
    }


def locally(case: str, folder: Path) -> Found:
    grid = LocalGrid(tiny.node_app, nodes=NODES)
    return outcome(grid, case, folder, grid.roster)


@pytest.fixture(scope="module")
def here(tmp_path_factory: pytest.TempPathFactory) -> Callable[[str], Found]:
    """What each case leaves on LocalGrid, where each is trained once."""
    return cache(lambda case: locally(case, tmp_path_factory.mktemp("here") / "run"))


@pytest.mark.parametrize("case", [*CASES, *STEPPED])
def test_a_new_process_at_every_message_changes_no_bit(
    case: str, tmp_path: Path, here: Callable[[str], Found]
) -> None:
    expected = here(case)
    roster = {node: node - 1 for node in range(1, NODES + 1)}
    swapped = tiny.Forgetful(LocalGrid(tiny.node_app, nodes=NODES))
    found = outcome(swapped, case, tmp_path / "swapped", roster)
    assert len(expected["records"]) > NODES
    assert found == expected


@pytest.mark.parametrize("case", PROTOCOLS)
def test_another_seed_is_another_run(
    case: str, tmp_path: Path, here: Callable[[str], Found]
) -> None:
    settings = load_settings(table(case), ("seed=1",))
    grid = LocalGrid(tiny.node_app, nodes=NODES)
    prepared = prepare(cells(settings)[0].training, root=None)
    run = train(prepared, grid, tmp_path / "other", roster=grid.roster)
    assert Trace(run.trace).records != here(case)["records"]


@pytest.mark.parametrize(
    ("kind", "case"),
    [
        *(("written" if "defense" in OWN.get(case, {}) else "rectified", case) for case in CASES),
        *(("written", case) for case in ("fedavg", "vanilla-split", "u-shaped")),
    ],
)
def test_layers_that_work_in_place_change_no_bit(case: str, kind: str, tmp_path: Path) -> None:
    """They are the first above the cut and the first of the head."""
    own = {
        "fedavg": ["model.cut=0"],
        "u-shaped": ["model.upper_cut=2"],
        "u-shaped defended": ["model.upper_cut=2"],
        "vertical-split": ["data.nodes=1", "protocol.merge=concat"],
    }
    found = []
    for network in ("in_place", "apart"):
        overrides = [
            f"model.name=tests.support.strange_networks:{kind}_{network}",
            "model.cut=0",
            *own.get(case, []),
        ]
        nodes = 1 if "data.nodes=1" in overrides else NODES
        grid = LocalGrid(tiny.node_app, nodes=nodes)
        found.append(outcome(grid, case, tmp_path / network, grid.roster, overrides))
    assert found[0] == found[1]
