"""Every attack, protocol and defence once on a GPU: the same numbers as on the CPU.

Where there is no GPU, one test runs this file in a process of its own on two pretended ones, and
what needs a GPU is skipped here. On a real one the numbers are rounded otherwise, which an
optimiser may carry far: there the same must be done, without a failure, and the first numbers be
near.
"""

import dataclasses
import json
import math
import os
import subprocess
import sys
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor, nn

from attacks import ADVERSARIES, ATTACKS, INTRUDERS
from clients.node import NodeConfig
from defenses import DEFENSES
from experiments.results.cards import Card
from experiments.run.offline import attack_trace
from experiments.run.runner import run
from leakbed.contracts import Guess, View
from leakbed.events import SmashedUp
from leakbed.hijack import Hijack, Watch
from strategies import PROTOCOLS
from tests.support import adversaries, adversary_views, intruder_views, pretended_cuda
from tests.support.attack_views import quick_attack, view_for

ROOT = Path(__file__).parents[1]
PRETENDED = torch.Generator.__module__ == pretended_cuda.__name__
ON_TWO_GPUS = (
    "test_on_cuda.py",
    "support/test_pretended_cuda.py",
    "benchmarks/test_launches.py",
)
ROUNDING = 5e-7 if PRETENDED else math.inf

MEANT = pretended_cuda.GPUS in os.environ  # to pretend, in this process

pytestmark = pytest.mark.cuda
on_gpu = pytest.mark.skipif(
    not (MEANT or torch.cuda.is_available()), reason="runs on the pretended GPUs below"
)


@pytest.mark.skipif(MEANT or torch.cuda.is_available(), reason="this process has a GPU")
def test_everything_once_on_pretended_gpus() -> None:
    """What is meant to pretend never starts another, not even where it sees no GPU."""
    environment = {
        **{name: value for name, value in os.environ.items() if name != "CUDA_VISIBLE_DEVICES"},
        "PYTHONPATH": f"{ROOT}{os.pathsep}{ROOT / 'tests' / 'support'}",
        pretended_cuda.GPUS: "2",
    }
    command = [
        sys.executable,
        "-m",
        "pytest",
        *(str(ROOT / "tests" / each) for each in ON_TWO_GPUS),
        "-q",
        "-m",
        "cuda",
        "-p",
        "no:cacheprovider",
    ]
    done = subprocess.run(  # noqa: S603
        command,
        cwd=ROOT,
        env=environment,
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stdout[-6000:] + done.stderr[-2000:]


def there(value: Any) -> Any:
    """The same on the GPU: a view, or anything in one."""
    if isinstance(value, View):
        fields = {f.name: there(getattr(value, f.name)) for f in dataclasses.fields(value)}
        return dataclasses.replace(value, **fields)
    if isinstance(value, Tensor | nn.Module):
        return value.to("cuda")
    if isinstance(value, dict):
        return {name: there(each) for name, each in value.items()}
    return torch.device("cuda", 0) if isinstance(value, torch.device) else value


def parts(guess: Guess) -> dict[str, Tensor]:
    """Every tensor of a guess, by name."""
    found = {}
    for field in dataclasses.fields(guess):
        value = getattr(guess, field.name)
        named = value if isinstance(value, dict) else {"": value}
        found |= {field.name + n: each for n, each in named.items() if isinstance(each, Tensor)}
    return found


def assert_near(here: Mapping[str, Tensor], on_there: Mapping[str, Tensor]) -> None:
    assert here.keys() == on_there.keys()
    for name, expected in here.items():
        found = on_there[name].detach().cpu()
        assert (found.shape, found.dtype) == (expected.shape, expected.dtype), name
        if expected.is_floating_point():
            gap = (found - expected).abs().nan_to_num(0.0).max() if found.numel() else 0.0
            assert gap <= ROUNDING, name
        else:
            assert not PRETENDED or torch.equal(found, expected), name


@on_gpu
@pytest.mark.parametrize("name", sorted(ATTACKS))
def test_an_attack(name: str) -> None:
    attack = quick_attack(name)
    guess = parts(attack.run(there(view_for(attack)), seed=3))
    assert {str(each.device) for each in guess.values()} == {"cuda:0"}
    assert_near(parts(attack.run(view_for(attack), seed=3)), guess)


@on_gpu
@pytest.mark.parametrize("name", sorted(ADVERSARIES))
def test_an_adversary(name: str) -> None:
    found = []
    for view in (adversary_views.view(), there(adversary_views.view())):
        adversary, made = adversary_views.quick(name), {}
        state = adversary.begin(view, seed=3)
        for step in range(3):
            batch = adversary_views.batch(step).to(view.device)
            state, made[f"forged {step}"] = adversary.forge(state, batch, batch)
        found.append(made | parts(adversary.guess(state, batch)))
    assert_near(*found)


class Placing(adversaries.Echo):
    """Writes down where its batches lie, and takes them together with its image as they come."""

    def forge(self, state: Any, smashed: Tensor, cut_gradient: Tensor) -> tuple[Any, Tensor]:
        seen.extend(str(each.device) for each in (smashed, cut_gradient))
        return state, cut_gradient * state.image.mean() + smashed

    def guess(self, state: Any, smashed: Tensor) -> Guess:
        seen.append(str(smashed.device))
        return Guess(images=state.image * smashed.flatten(1).mean(1)[:, None, None, None, None])


class Beside(adversaries.Looking):
    """The same of a watcher."""

    def watch(
        self, state: Any, smashed: Tensor, *, labels: Tensor | None, part: nn.Module | None
    ) -> Any:
        del part
        assert labels is not None
        seen.extend(str(each.device) for each in (smashed, labels))
        return state

    def guess(self, state: Any, smashed: Tensor) -> Guess:
        seen.append(str(smashed.device))
        return super().guess(state, smashed)


seen: list[str] = []


@on_gpu
@pytest.mark.parametrize("view_at", ["cpu", "cuda:0"])
@pytest.mark.parametrize("node_at", ["cpu", "cuda:0"])
def test_an_adversary_has_batches_where_its_view_lies_and_the_node_its_gradient(
    view_at: str, node_at: str
) -> None:
    view = dataclasses.replace(adversary_views.view(), device=torch.device(view_at))
    assert view.public_images is not None
    view = dataclasses.replace(view, public_images=view.public_images.to(view_at))
    sent = adversary_views.batch(0).to(node_at)
    seen.clear()
    hijack = Hijack(Placing(), view, seed=0)
    assert str(hijack.forge(sent, sent).device) == node_at
    assert hijack.guess(sent).images is not None
    batch = adversary_views.batch(0).numpy()
    came = SmashedUp(node=0, round=1, step=0, smashed=batch, labels=np.zeros(4, int))
    watch = Watch(Beside(reads_part=False), view, seed=0)
    watch.show(came)
    watch.guess(sent)
    assert seen == [view_at] * 6


@on_gpu
@pytest.mark.parametrize("name", sorted(INTRUDERS))
def test_an_intruder(name: str) -> None:
    found = []
    for device in ("cpu", "cuda:0"):
        view = dataclasses.replace(intruder_views.view(), device=torch.device(device))
        intruder, made = intruder_views.quick(name), {}
        state = intruder.begin(view, seed=3)
        for step in range(intruder_views.CYCLE):
            turn = intruder.turn(view, state, rows=intruder_views.ROWS)
            if turn.images is not None:
                made[f"turn {step}"] = turn.images.detach()
            back = None if turn.images is None else intruder_views.gradient(step).to(device)
            state = intruder.learn(state, turn, back)
        found.append({**made, "samples": intruder.samples(view, state, count=2)})
    assert_near(*found)


SHOWN = {"name": "smashed-as-image", "targets": 4}
FEDAVG = {"protocol": {"name": "fedavg"}, "attack": [{"name": "mean-image", "targets": 2}]}
U_SHAPED = {"protocol": {"name": "u-shaped"}, "model": {"upper_cut": 5}}
AT_SERVER = {"protocol": {"name": "vanilla-split", "labels": "server"}}
HIJACKED = {
    "protocol": {"name": "vanilla-split", "local_steps": 6},
    "model": {"name": "tests.support.hijackable:network", "cut": 4},
    "data": {"nodes": 1},
    "attack": [{"name": "fsha", "targets": 4, "checkpoint_every": 2, "nets": "small"}, SHOWN],
}
PLAIN = {"model": {"name": "tests.support.slow_nodes:apart", "cut": 3}}
STATELESS = {"model": {"name": "tests.support.tiny:plain", "cut": 1}}
PROTOCOL_CELLS: dict[str, dict[str, Any]] = {
    "fedavg": FEDAVG,
    "u-shaped": U_SHAPED,
    "vertical-split": {
        "model": {"name": "tests.support.slow_nodes:dense"},
        "protocol": {"merge": "sum"},
    },
}
DEFENSE_CELLS: dict[str, dict[str, Any]] = {
    "dp-cut-gradient": {**AT_SERVER, **STATELESS, "own": {"horizon": 100}},
    "dp-sgd": {**AT_SERVER, **STATELESS, "own": {"rate": 0.9, "steps": 100}},
    "gradients-scrutinizer": {**HIJACKED, "own": {"every": 4}},
    "label-dp": AT_SERVER,
    "local-dp": FEDAVG,
    "marvell": {
        **AT_SERVER,
        "data": {"name": "tests.test_on_cuda:two_classes"},
        "model": {"name": "tests.test_on_cuda:two_outputs", "cut": 1},
        "attack": [{"name": "norm-score", "targets": 10}],
    },
    "smashed-noise": {**PLAIN, "own": {"clip": 1.0}},
    "splitguard": {**HIJACKED, "own": {"warm_up": 2, "probability": 0.5, "fakes": 1}},
    "splitout": {**HIJACKED, "own": {"window": 2}},
    "weight-noise": FEDAVG,
    "weight-sparsification": FEDAVG,
}


def two_classes() -> tuple[Tensor, Tensor]:
    images = torch.rand(60, 1, 6, 6, generator=torch.Generator().manual_seed(1))
    return images, (images.mean((1, 2, 3)) > images.mean()).long()


def two_outputs() -> nn.Sequential:
    return nn.Sequential(nn.Flatten(), nn.Linear(36, 8), nn.ReLU(), nn.Linear(8, 2))


def table(cell: Mapping[str, Any], *, defense: Mapping[str, Any] | None = None) -> dict[str, Any]:
    """The settings of one small cell, its dropout on both sides of the cut unless it says so."""
    base: dict[str, dict[str, Any]] = {
        "data": {"name": "tests.support.tiny:images", "nodes": 2, "public": 0.2, "test": 0.1},
        "model": {"name": "tests.support.slow_nodes:stateful", "cut": 3},
        "protocol": {"rounds": 2, "batch_size": 5, "local_steps": 3, "learning_rate": 0.05},
    }
    sections = {name: {**own, **cell.get(name, {})} for name, own in base.items()}
    return {
        "name": "cuda",
        **sections,
        "attack": cell.get("attack", [SHOWN]),
        "defense": [dict(defense or {"name": "none"})],
    }


def numbers(card: Card) -> Iterator[tuple[str, float]]:
    """Every number of what a card says of a result, by its place."""
    shown = ("scores", "baselines", "control", "utility", "detection", "smashed")
    left = [(name, json.loads(json.dumps(getattr(card, name), default=str))) for name in shown]
    while left:
        place, value = left.pop()
        if isinstance(value, dict):
            left += [(f"{place}.{name}", each) for name, each in value.items()]
        elif isinstance(value, list):
            left += [(f"{place}.{index}", each) for index, each in enumerate(value)]
        elif isinstance(value, int | float):
            yield place, float(value)


def assert_the_same_on_both(settings: Mapping[str, Any], folder: Path) -> None:
    here, on_there = (
        run({**settings, "device": device}, out=folder / device) for device in ("cpu", "cuda")
    )
    for left, right in zip(here, on_there, strict=True):
        assert (left.status, right.status) == ("done", "done"), (left.why, right.why)
        assert right.device["type"] == "cuda"
        expected, found = dict(numbers(left)), dict(numbers(right))
        assert len(expected) > 5
        assert expected.keys() == found.keys()
        gaps = {at: abs(found[at] - value) / max(1, abs(value)) for at, value in expected.items()}
        assert max(gaps.values()) <= ROUNDING, sorted(gaps.items(), key=lambda each: -each[1])[:5]


@on_gpu
def test_a_trace_recorded_on_one_device_is_attacked_on_the_other(tmp_path: Path) -> None:
    for recorded, attacked in (("cuda", "cpu"), ("cpu", "cuda")):
        folder = tmp_path / recorded
        (card,) = run({**table(AT_SERVER), "device": recorded}, out=folder)
        (work,) = (folder / "runs").iterdir()
        again = attack_trace(
            work / "trace",
            SHOWN["name"],
            answers=work / "answers",
            out=folder / "again",
            settings={"targets": SHOWN["targets"]},
            device=attacked,
            model="tests.support.slow_nodes:stateful",
        )
        assert (card.device["type"], again.device["type"]) == (recorded, attacked)
        before, after = card.scores["mse"]["mean"], again.scores["mse"]["mean"]
        assert after == pytest.approx(before, abs=min(ROUNDING, 1e-3))


@pytest.mark.skipif(not PRETENDED, reason="a real one would stay broken")
def test_a_gpu_that_breaks_down_under_a_run_is_one_error(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    monkeypatch.setattr(pretended_cuda.DRIVER, "broken", False)
    of = NodeConfig.batches

    def breaks(cell: NodeConfig, *args: Any) -> Any:
        pretended_cuda.DRIVER.broken = pretended_cuda.DRIVER.started and cell.partition == 1
        return of(cell, *args)

    monkeypatch.setattr(NodeConfig, "batches", breaks)
    with pytest.raises(RuntimeError, match="CUDA error"):
        run({**table(AT_SERVER), "device": "cuda"}, out=tmp_path)


@on_gpu
@pytest.mark.skipif(torch.cuda.device_count() < 2, reason="needs two GPUs")
def test_nodes_of_one_process_are_dealt_over_its_gpus(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    asked, of = set[tuple[int, str]](), NodeConfig.torch_device

    def told(cell: NodeConfig) -> torch.device:
        asked.add((cell.partition, str(of(cell))))
        return of(cell)

    monkeypatch.setattr(NodeConfig, "torch_device", told)
    (card,) = run({**table(AT_SERVER), "device": "cuda"}, out=tmp_path)
    assert card.status == "done", card.why
    assert asked == {(0, "cuda"), (1, "cuda:1")}


@on_gpu
@pytest.mark.parametrize("name", PROTOCOLS)
def test_a_protocol(name: str, tmp_path: Path) -> None:
    cell = PROTOCOL_CELLS.get(name, {})
    named = {**cell, "protocol": {"name": name, **cell.get("protocol", {})}}
    assert_the_same_on_both(table(named), tmp_path)


@on_gpu
@pytest.mark.parametrize("name", DEFENSES)
def test_a_defense(name: str, tmp_path: Path) -> None:
    cell = dict(DEFENSE_CELLS.get(name, {"protocol": {"name": "vanilla-split"}}))
    own = cell.pop("own", {})
    cell.setdefault("protocol", {"name": "vanilla-split"})
    assert_the_same_on_both(table(cell, defense={"name": name, **own}), tmp_path)


@on_gpu
@pytest.mark.parametrize("name", [*ADVERSARIES, *INTRUDERS])
def test_an_active_attack_in_training(name: str, tmp_path: Path) -> None:
    if name in INTRUDERS:
        own = {"width": 4, "latent": 3, "nodes": [0]}
        cell = {**U_SHAPED, "model": {**U_SHAPED["model"], "extra_classes": 1}}
        cell["model"]["name"] = "tests.support.intruded:everywhere"
        cell["model"] |= {"cut": 2, "upper_cut": 6}
        cell["attack"] = [{"name": name, "targets": 4, **own}]
    else:
        attack = {"name": name, "targets": 4, "checkpoint_every": 2, "nets": "small"}
        cell = {**HIJACKED, "attack": [attack]}
    assert_the_same_on_both(table(cell), tmp_path)
