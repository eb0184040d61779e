"""A process whose data or code are not the experiment's ends the run, which says so."""

import sys
from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from flwr.app import Message

from clients import node_app
from experiments.run.prepare import Prepared, answer_key, prepare
from experiments.run.runner import run
from experiments.run.train import train
from experiments.settings.cells import cells
from experiments.settings.load import load_settings
from leakbed import provenance
from leakbed.data import sources
from leakbed.grids import LocalGrid
from leakbed.provenance import OtherInputsError
from leakbed.tap.wiretap import GridWrapper
from leakbed.wire.messages import RAN_ON

pytestmark = pytest.mark.usefixtures("identity")

TABLE: dict[str, Any] = {
    "name": "other",
    "data": {"name": "tests.support.changing_data:shuffled", "nodes": 2},
    "model": {"name": "mlp2"},
    "protocol": {"name": "fedavg", "batch_size": 5, "local_steps": 1},
    "attack": [{"name": "constant-image", "targets": 2}],
}

SAID = (
    r"node 0 has other data than the experiment: "
    r"data.name = 'tests.support.changing_data:shuffled' gave"
)


def prepared(*overrides: str) -> Prepared:
    return prepare(cells(load_settings(TABLE, overrides))[0].training, root=None)


def forget() -> None:
    """Make this process another one, as far as its data go."""
    sources._load.cache_clear()


def test_data_that_change_before_the_nodes_ask_for_them_end_the_run(tmp_path: Path) -> None:
    grid, ready = LocalGrid(node_app, nodes=2), prepared()
    forget()
    with pytest.raises(OtherInputsError, match=SAID):
        train(ready, grid, tmp_path / "run", roster=grid.roster)
    assert not (tmp_path / "run").exists()


def test_data_that_change_before_the_answers_are_kept_end_the_run() -> None:
    ready = prepared()
    forget()
    with pytest.raises(OtherInputsError, match="the answer key has other data"):
        answer_key(ready, None)


@pytest.mark.runtime
def test_processes_that_share_the_work_are_asked_too(tmp_path: Path) -> None:
    with pytest.raises(OtherInputsError, match="another process has other data"):
        run({**TABLE, "sweep": {"seed": [0, 1]}}, out=tmp_path, overrides=["jobs=2"])
    assert not (tmp_path / "cards").exists()


def test_data_that_stay_the_same_are_let_through(tmp_path: Path) -> None:
    cards = run(TABLE, out=tmp_path, overrides=["data.name=tests.support.tiny:images"])
    assert [card.status for card in cards] == ["done"]


class Mute(GridWrapper):
    """Nodes of an earlier version, which say nothing of what they have."""

    def send_and_receive(self, messages: Any, *, timeout: float | None = None) -> list[Message]:
        replies = list(self._grid.send_and_receive(messages, timeout=timeout))
        for reply in replies:
            reply.content.pop(RAN_ON, None)
        return replies


def test_a_node_that_does_not_say_what_it_has_is_refused(tmp_path: Path) -> None:
    grid = LocalGrid(node_app, nodes=2)
    with pytest.raises(OtherInputsError, match="node 0 does not say which data it has"):
        train(prepared(), Mute(grid), tmp_path / "run", roster=grid.roster)


def test_a_node_with_another_module_of_the_same_name_is_refused(tmp_path: Path) -> None:
    grid, ready = LocalGrid(node_app, nodes=2), prepared("data.name=tests.support.tiny:images")
    other = replace(ready, ran_on=replace(ready.ran_on, code="another"))
    with pytest.raises(
        OtherInputsError,
        match=r"node 0 has other code of yours .*tests.support.tiny \(.*/tests/support/tiny.py\)",
    ):
        train(other, grid, tmp_path / "run", roster=grid.roster)


@pytest.mark.parametrize("edited", ["helper_of_own", "net_of_own"])
def test_an_edited_file_of_ones_own_is_trained_again(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, edited: str
) -> None:
    files: Mapping[str, str] = {
        "net_of_own": "from nets_of_own import Net",  # defined elsewhere
        "nets_of_own": "from helper_of_own import ACT\nfrom torch import nn\n"
        "def Net(image_shape, num_classes):\n"
        "    return nn.Sequential(nn.Flatten(), ACT(), nn.Linear(36, num_classes))\n",
        "helper_of_own": "from torch import nn\nACT = nn.Sigmoid\n",
    }
    for name, text in files.items():
        (tmp_path / f"{name}.py").write_text(text)
    monkeypatch.syspath_prepend(str(tmp_path))

    def keys() -> list[str]:
        provenance._FIRST.clear()
        for name in files:
            sys.modules.pop(name, None)
        names = ["data.name=tests.support.tiny:images", "model.name=net_of_own:Net"]
        return [card.key for card in run(TABLE, out=tmp_path / "out", overrides=names)]

    before = keys()
    assert keys() == before
    with (tmp_path / f"{edited}.py").open("a") as file:
        file.write("\nEDITED = True\n")
    assert keys() != before
