"""FedAvg is Flower's own, with the settings a run asks for."""

import logging
from typing import Any

import pytest
import torch
from flwr.serverapp.strategy import FedAvg

from leakbed.models import Architecture
from strategies import PROTOCOLS
from strategies.protocol import ProtocolSetup

ARCHITECTURE = Architecture(name="mlp2", image_shape=(1, 4, 4), num_classes=3)


def setup(**changes: Any) -> ProtocolSetup:
    fields: dict[str, Any] = {
        "architecture": ARCHITECTURE,
        "init_stream": 3,
        "optimiser": torch.optim.SGD,
        "nodes": 5,
        "fraction": 1.0,
        "chosen": {},
        "labels": None,
        "test_labels": torch.zeros(0, dtype=torch.long),
        "evaluate_rounds": (),
        "defenses": (),
        "defense_stream": 0,
        "timeout": None,
        "device": torch.device("cpu"),
        **changes,
    }
    return ProtocolSetup(**fields)


@pytest.mark.parametrize(("nodes", "fraction", "least"), [(5, 1.0, 5), (5, 0.4, 2), (1, 0.5, 1)])
def test_is_flowers_strategy_with_the_share_asked_for(
    nodes: int, fraction: float, least: int
) -> None:
    built = PROTOCOLS["fedavg"].build(setup(nodes=nodes, fraction=fraction))
    own = {name for name in vars(type(built.strategy)) if not name.startswith("_")}
    assert isinstance(built.strategy, FedAvg)
    assert own == {"configure_train", "aggregate_train"}  # which end in Flower's own
    assert built.strategy.fraction_train == fraction
    assert built.strategy.min_train_nodes == least
    assert built.strategy.min_available_nodes == nodes
    assert built.bottom is None


def test_starts_from_the_victims_own_stream() -> None:
    arrays = PROTOCOLS["fedavg"].build(setup()).arrays.to_torch_state_dict()
    expected = ARCHITECTURE.build(3).state_dict()
    assert all(torch.equal(arrays[name], expected[name]) for name in expected)


def test_no_warning_reaches_the_user(caplog: pytest.LogCaptureFixture) -> None:
    with caplog.at_level(logging.WARNING, logger="flwr"):
        PROTOCOLS["fedavg"].build(setup())
    assert not caplog.records
