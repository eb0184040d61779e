"""Malicious nodes and settings that cannot be are refused before anything is trained."""

from typing import Any

import pytest

from experiments.run.prepare import prepare
from experiments.settings.cells import Training, cells
from experiments.settings.load import load_settings
from experiments.settings.schema import SettingsError
from leakbed.contracts.attack import UnfitNodeError

TABLE: dict[str, Any] = {
    "name": "small",
    "data": {"name": "mnist-5k", "size": 400, "nodes": 3},
    "model": {"name": "lenet-sigmoid", "cut": 1, "upper_cut": 5, "extra_classes": 1},
    "protocol": {"name": "u-shaped", "batch_size": 16, "local_steps": 2},
    "attack": [{"name": "client-gan"}],
}


def training(*overrides: str, **own: Any) -> Training:
    table = {**TABLE, "attack": [{"name": "client-gan", "width": 8, **own}]}
    return cells(load_settings(table, overrides))[0].training


@pytest.mark.parametrize("nodes", [[3], [-1], [0, 0], [0, 1, 2]])
def test_nodes_that_are_not_there_or_leave_nobody_honest_are_named(nodes: list[int]) -> None:
    with pytest.raises(SettingsError, match="name some of the nodes 0 to 2, each once") as caught:
        prepare(training(nodes=nodes), root=None)
    assert str(nodes) in str(caught.value)


@pytest.mark.parametrize("nodes", [[0], [2, 1]])
def test_chosen_nodes_are_malicious_and_no_others(nodes: list[int]) -> None:
    prepared = prepare(training(nodes=nodes), root=None)
    cells_ = [prepared.cell(partition) for partition in range(3)]
    assert [cell.intruder is not None for cell in cells_] == [node in nodes for node in range(3)]
    streams = {cell.intruder_stream for cell in cells_ if cell.intruder is not None}
    assert len(streams) == len(nodes)
    assert 0 not in streams
    assert {cell.architecture.num_classes for cell in cells_} == {11}


def test_the_first_node_is_malicious_where_none_is_named() -> None:
    intruder = training().intruder
    assert intruder is not None
    assert intruder.nodes == (0,)


def test_a_malicious_node_does_not_defend_itself() -> None:
    table = {**TABLE, "defense": [{"name": "smashed-noise"}]}
    prepared = prepare(cells(load_settings(table))[0].training, root=None)
    assert prepared.cell(0).defenses == ()
    assert prepared.cell(1).defenses


@pytest.mark.parametrize(
    ("own", "override", "what"),
    [
        ({"target_class": 10}, "model.extra_classes=1", "the labels are 0 to 9"),
        ({"dummy_class": 11}, "model.extra_classes=1", "the network's outputs, 0 to 10"),
        ({}, "model.extra_classes=0", r"set model\.extra_classes = 1, or dummy_class"),
    ],
)
def test_classes_that_are_not_there_are_refused(
    own: dict[str, Any], override: str, what: str
) -> None:
    with pytest.raises(UnfitNodeError, match=what):
        prepare(training(override, **own), root=None)


@pytest.mark.parametrize("key", ["restarts", "checkpoint_every", "when"])
def test_keys_of_other_attacks_are_refused(key: str) -> None:
    with pytest.raises(ValueError, match=key):
        training(**{key: 2})


def test_nodes_are_for_malicious_clients_alone() -> None:
    with pytest.raises(ValueError, match="nodes"):
        load_settings({**TABLE, "attack": [{"name": "constant-image", "nodes": [0]}]})
