"""What a trace says of its run: the same mapping from our runner and from a stranger's app."""

import json
import subprocess
import sys
from dataclasses import asdict
from pathlib import Path

import pytest

from experiments.run.prepare import prepare
from experiments.run.train import _about
from experiments.run.view import architecture_of
from experiments.settings.cells import cells
from experiments.settings.load import load_settings
from leakbed.models import Architecture
from leakbed.tap.facts import about, require
from leakbed.tap.segments import TraceError


def test_it_says_what_our_own_runs_say() -> None:
    said = about(
        model="mlp2", image_shape=(1, 4, 4), num_classes=3, batch_size=8, nodes=2, data="digits"
    )
    architecture = Architecture(name="mlp2", image_shape=(1, 4, 4), num_classes=3)
    assert said == {
        "protocol": "fedavg",
        "labels": "shared",
        "bottoms": "sealed",
        "rounds": None,
        "batch_size": 8,
        "local_steps": None,
        "nodes": 2,
        "data": "digits",
        "defense": "defence not known",
        "architecture": {
            k: v for k, v in asdict(architecture).items() if k not in {"mean", "std", "settings"}
        },
        "modes": None,
    }
    assert architecture_of(json.loads(json.dumps(said))) == architecture


def test_it_has_the_keys_of_our_own_runs() -> None:
    table = {"name": "keys", "data": {"size": 400, "nodes": 2}, "attack": [{"name": "unsplit"}]}
    training = next(iter(cells(load_settings(table)))).training
    ours = _about(prepare(training, root=None))
    said = about(
        model="mnistnet", image_shape=(1, 28, 28), num_classes=10, batch_size=8, nodes=2, data="x"
    )
    assert list(said) == list(ours)
    assert list(said["architecture"]) == list(ours["architecture"])


@pytest.mark.parametrize(
    ("wrong", "message"),
    [
        ({"image_shape": (28, 28)}, r"image_shape is \(28, 28\).*channels, height, width"),
        ({"image_shape": (1, 0, 28)}, "image_shape"),
        ({"num_classes": 0}, "num_classes is 0"),
        ({"batch_size": 0}, "batch_size is 0"),
        ({"nodes": 0}, "nodes is 0"),
        ({"local_steps": 0}, "local_steps is 0"),
        ({"modes": {"train": "training"}}, "each 'train' or 'eval'"),
        ({"modes": {"training": "train"}}, "for 'train' and for 'evaluate'"),
    ],
)
def test_what_no_run_can_be_is_refused(wrong: dict[str, object], message: str) -> None:
    given = {"image_shape": (1, 4, 4), "num_classes": 3, "batch_size": 8, "nodes": 2} | wrong
    with pytest.raises(TraceError, match=message):
        about(model="mlp2", data="digits", **given)  # type: ignore[arg-type]


def test_the_modes_of_a_tapped_apps_networks_can_be_said() -> None:
    modes = {"train": "eval", "evaluate": "eval"}
    said = about(
        model="mlp2",
        image_shape=(1, 4, 4),
        num_classes=3,
        batch_size=8,
        nodes=2,
        data="x",
        modes=modes,
    )
    assert said["modes"] == modes


def test_what_is_missing_is_named_with_the_call_that_says_it() -> None:
    require({"nodes": 2, "data": "x"}, "nodes", "data")
    with pytest.raises(TraceError, match=r"does not say architecture, nodes.*about=about\(model="):
        require({"data": "x"}, "architecture", "data", "nodes")


def test_an_app_without_torch_can_say_it() -> None:
    program = "import sys, leakbed.tap.facts, leakbed.tap.trace; sys.exit('torch' in sys.modules)"
    root = Path(__file__).parents[3]
    subprocess.run([sys.executable, "-c", program], check=True, cwd=root)  # noqa: S603
