"""A deployment of Flower's own processes ends in the same cards and the same bits as LocalGrid."""

from collections import Counter
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from experiments.results.cards import Card, read_cards
from experiments.run.runner import run
from leakbed.tap.trace import Trace
from tests.support.deployment import Deployment

# An exchange takes about 4 s, and a run's start and end 15 s: these tests are short of messages.
pytestmark = [pytest.mark.runtime, pytest.mark.timeout(600)]

# Momentum, dropout and BatchNorm: every message is served by a new process, which must find them.
SETTINGS = """
name = "deployed"
[data]
name = "mnist-5k"
size = 400
nodes = 2
[model]
name = "tests.support.deployed_network:network"
cut = 3
[protocol]
name = "{protocol}"
batch_size = 16
local_steps = 2
fraction = {fraction}
learning_rate = 0.1
momentum = 0.9
timeout = 90
[[attack]]
name = "{attack}"
targets = 2
"""
# Where nodes train in turn, one of them does: each of its two steps is served by a new process.
FRACTIONS = {"fedavg": 1.0, "vanilla-split": 0.5}
ATTACKS = {"fedavg": "mean-image", "vanilla-split": "smashed-as-image"}
RECORDED = {
    "fedavg": Counter({"update-up": 2}),
    "vanilla-split": Counter({"smashed-up": 3, "cut-gradient-down": 2, "sealed": 3}),
}


def numbers(card: Card) -> dict[str, Any]:
    """Everything a card says but seconds and memory."""
    said = card.model_dump(exclude={"cost"})
    return said | {way: card.cost[way] for way in ("bytes_up", "bytes_down")}


def trace(results: Path) -> Trace:
    """The only trace of a results folder, its every tensor checked against its checksum."""
    (folder,) = (results / "runs").glob("*/trace")
    return Trace(folder)


@pytest.fixture(scope="module")
def deployment(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Deployment]:
    with Deployment(tmp_path_factory.mktemp("deployment"), nodes=2) as started:
        yield started


@pytest.mark.parametrize(
    "protocol", [pytest.param("fedavg", marks=pytest.mark.smoke), "vanilla-split"]
)
def test_a_deployment_ends_as_the_local_grid_does(
    protocol: str, deployment: Deployment, tmp_path: Path
) -> None:
    experiment = tmp_path / "settings.toml"
    experiment.write_text(
        SETTINGS.format(protocol=protocol, attack=ATTACKS[protocol], fraction=FRACTIONS[protocol])
    )
    (local,) = run(experiment, out=tmp_path / "local")
    assert (local.status, local.unreliable) == ("done", None)
    deployment.flwr_run(experiment, tmp_path / "deployed", timeout=300)
    cards = read_cards(tmp_path / "deployed")
    assert len(cards) == 1, deployment.logs()
    assert numbers(cards[0]) == numbers(local)
    expected, found = trace(tmp_path / "local"), trace(tmp_path / "deployed")
    assert Counter(record.kind for record in found.records) >= RECORDED[protocol]
    assert found.records == expected.records  # a record has the SHA-256 of each of its arrays
    assert found.about == expected.about


def test_none_of_its_processes_is_overlooked(deployment: Deployment) -> None:
    commands = [each.split() for each in deployment.processes().values()]
    started = Counter(Path(word).name for words in commands for word in words[:2])
    assert started["flower-superlink"] == 1
    assert started["flower-supernode"] == 2
    assert started["flower-superexec"] == 3  # one beside each of them
