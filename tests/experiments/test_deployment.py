"""A deployment of Flower's own processes, with TLS, that serves every test here.

An experiment ends in the same cards and the same bits as on LocalGrid; an example app is tapped in
one line and attacked, then defended.
"""

import importlib
import shutil
from collections import Counter
from collections.abc import Iterator
from pathlib import Path
from typing import Any
from unittest.mock import ANY

import numpy as np
import pytest
import torch
from safetensors.torch import load_file
from sklearn.datasets import load_digits

from experiments.results.cards import Card, read_cards
from experiments.run.offline import attack_trace
from experiments.run.runner import run
from leakbed.events import UpdateUp
from leakbed.tap.trace import Trace
from tests.support.deployment import ROOT, Deployment

# An exchange takes about 4 s, and a run's start and end 15 s: these tests are short of messages.
pytestmark = pytest.mark.runtime
WITHIN = 1000.0  # seconds, of a machine that others keep busy

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
timeout = 600
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

DIGITS = ROOT / "experiments" / "studies" / "audit" / "digits"
CONFIG = "num-server-rounds=1 fraction-evaluate=0.0"  # which leave the learning rate at 0.05
TAPPED = "\nfrom leakbed.tap import tapped\n\napp = tapped(app, {folder!r})\n"
DEFENDED = (  # so faint that an attack sees past it, and far above what float32 rounds
    "from leakbed.mods import weight_noise\n\n"
    "app = ClientApp(mods=[weight_noise(stream=7, scale=1e-7)])"
)
FACTS = {
    "image_shape": (1, 8, 8),
    "num_classes": 10,
    "batch_size": 1,
    "local_steps": 1,
    "nodes": 2,
    "data": "digits",
    "mean": (0.3,),
    "std": (0.4,),
}


def numbers(card: Card) -> dict[str, Any]:
    """Everything a card says but seconds and memory."""
    said = card.model_dump(exclude={"cost"})
    return said | {way: card.cost[way] for way in ("bytes_up", "bytes_down")}


def trace_of(results: Path) -> Trace:
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
    deployment.flwr_run(experiment, tmp_path / "deployed", timeout=WITHIN)
    cards = read_cards(tmp_path / "deployed")
    assert len(cards) == 1, deployment.logs()
    assert numbers(cards[0]) == numbers(local)
    expected, found = trace_of(tmp_path / "local"), trace_of(tmp_path / "deployed")
    assert Counter(record.kind for record in found.records) >= RECORDED[protocol]
    assert found.records == expected.records  # a record has the SHA-256 of each of its arrays
    assert found.about == expected.about


def trace_of_app(deployment: Deployment, folder: Path) -> Trace:
    """What a copy of the app sent on a deployment: tapped by one line, defended by another."""
    app, traces = folder / "app", folder / "traces"
    shutil.copytree(DIGITS, app)
    server, client = (app / "digits" / f"{side}_app.py" for side in ("server", "client"))
    server.write_text(server.read_text() + TAPPED.format(folder=str(traces)))
    client.write_text(client.read_text().replace("app = ClientApp()", DEFENDED))
    deployment.flwr_run_app(app, CONFIG, timeout=WITHIN)
    assert traces.exists(), deployment.logs()
    (found,) = traces.iterdir()
    return Trace(found)


def sent_back(net: Any, task: Any, before: Any, partition: int) -> np.ndarray:
    """Return what a node's own training makes of the weights, as one vector."""
    net.load_state_dict({name: torch.from_numpy(value.copy()) for name, value in before.items()})
    task.train(net, task.load_data(partition, 2, batch_size=1, rows=1), epochs=1, lr=0.05)
    return np.concatenate([value.numpy().ravel() for value in net.state_dict().values()])


def test_an_app_is_attacked_and_its_nodes_noise_is_their_own(
    deployment: Deployment, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    trace = trace_of_app(deployment, tmp_path)
    updates: list[Any] = list(trace.events(UpdateUp))
    assert [(event.examples, event.train_loss) for event in updates] == [(1, ANY), (1, ANY)]
    monkeypatch.syspath_prepend(str(DIGITS))
    card = attack_trace(
        trace.folder,
        "dlm-plus",
        out=tmp_path / "out",
        model="digits.task:Net",
        about=FACTS,
        settings={"iterations": 150, "restarts": 1},
        seed=0,
    )
    assert card.objective["attack"] < 1e-2 * card.objective["noise"]
    (file,) = (tmp_path / "out" / "guesses").glob("*.safetensors")
    guessed = load_file(file)["images"].flatten(1)
    # No message says which node has which partition, so each digit is looked for in both guesses.
    digits = torch.tensor(load_digits().images[:2], dtype=torch.float32).flatten(1) / 16
    errors = (guessed[:, None] - digits[None]).square().mean(2).min(0).values
    assert errors.max() < 1e-2
    task = importlib.import_module("digits.task")
    noise = []
    for event in updates:
        sent = np.concatenate([value.ravel() for value in event.after.values()])
        own = [sent - sent_back(task.Net(), task, event.before, part) for part in (0, 1)]
        noise.append(min(own, key=np.std))
    assert all(1e-7 < each.std() < 1e-5 for each in noise)
    # Both nodes were given one secret; 2,000 weights and more: a standard error of 0.02.
    assert abs(np.corrcoef(noise)[0, 1]) < 0.12


def test_none_of_its_processes_is_overlooked(deployment: Deployment) -> None:
    commands = [each.split() for each in deployment.processes().values()]
    started = Counter(Path(word).name for words in commands for word in words[:2])
    assert started["flower-superlink"] == 1
    assert started["flower-supernode"] == 2
    assert started["flower-superexec"] == 3  # one beside each of them
