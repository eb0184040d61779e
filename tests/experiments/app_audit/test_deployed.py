"""An example app on a deployment with TLS: tapped in one line and attacked, then defended."""

import importlib
import shutil
from pathlib import Path
from typing import Any
from unittest.mock import ANY

import numpy as np
import pytest
import torch
from safetensors.torch import load_file
from sklearn.datasets import load_digits

from experiments.run.offline import attack_trace
from leakbed.events import UpdateUp
from leakbed.tap import Trace
from tests.support.deployment import ROOT, Deployment

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


@pytest.fixture(scope="module")
def trace(tmp_path_factory: pytest.TempPathFactory) -> Trace:
    """What a copy of the app sent on a deployment: tapped by one line, defended by another."""
    folder = tmp_path_factory.mktemp("deployed")
    app, traces = folder / "app", folder / "traces"
    shutil.copytree(DIGITS, app)
    server, client = (app / "digits" / f"{side}_app.py" for side in ("server", "client"))
    server.write_text(server.read_text() + TAPPED.format(folder=str(traces)))
    client.write_text(client.read_text().replace("app = ClientApp()", DEFENDED))
    with Deployment(folder / "deployment", nodes=2, encrypted=True) as started:
        started.flwr_run_app(app, CONFIG, timeout=300)
        assert traces.exists(), started.logs()
    (found,) = traces.iterdir()
    return Trace(found)


def sent_back(net: Any, task: Any, before: Any, partition: int) -> np.ndarray:
    """Return what a node's own training makes of the weights, as one vector."""
    net.load_state_dict({name: torch.from_numpy(value.copy()) for name, value in before.items()})
    task.train(net, task.load_data(partition, 2, batch_size=1, rows=1), epochs=1, lr=0.05)
    return np.concatenate([value.numpy().ravel() for value in net.state_dict().values()])


@pytest.mark.runtime
@pytest.mark.timeout(600)
def test_an_app_on_a_deployment_with_tls_is_attacked_and_its_nodes_noise_is_their_own(
    trace: Trace, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
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
