"""A passive attack that learns live: the run has the same bits, and it sees what was sent."""

from collections.abc import Iterator
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, ClassVar

import numpy as np
import pytest
import torch
from safetensors.torch import load_file
from torch import Tensor

from attacks import ATTACKS
from clients import node_app
from experiments.run.attack import Cell
from experiments.run.fit import unfit
from experiments.run.prepare import prepare
from experiments.run.runner import run
from experiments.run.train import train
from experiments.run.training_run import TrainingRun
from experiments.settings.cells import Hijacking, Training, cells
from experiments.settings.load import load_settings
from experiments.settings.schema import SettingsError
from leakbed.contracts import View
from leakbed.events import Phase, SmashedUp
from leakbed.flower_internals import task_identity
from leakbed.grids import LocalGrid
from leakbed.tap.trace import Trace
from tests.support.adversaries import Looking
from tests.support.tiny import same

NODES = 2
TABLE: dict[str, Any] = {
    "name": "watched",
    "data": {
        "name": "tests.support.tiny:images",
        "nodes": NODES,
        "partition": "linear",
        "public": 0.2,
    },
    "model": {"name": "tests.support.hijackable:blocks", "cut": 2},
    "protocol": {
        "name": "vanilla-split",
        "batch_size": 5,
        "rounds": 2,
        "learning_rate": 0.1,
        "momentum": 0.9,
    },
    "attack": [{"name": "constant-image"}],
}
LIVE: dict[str, Any] = {"name": "fora", "live": True, "targets": 4}


@dataclass(frozen=True, kw_only=True)
class Telling(Looking):
    """Keeps what it was shown where a test finds it."""

    name: ClassVar[str] = "telling"
    opened: ClassVar[list[View]] = []
    shown: ClassVar[list[Any]] = []

    def begin(self, view: View, *, seed: int) -> list[Any]:
        self.opened[:], self.shown[:] = [view], []
        return super().begin(view, seed=seed)

    def watch(self, state: list[Any], smashed: Tensor, **known: Any) -> list[Any]:
        self.shown[:] = super().watch(state, smashed, **known)
        return list(self.shown)


@pytest.fixture(autouse=True)
def known(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    monkeypatch.setitem(ATTACKS, Telling.name, Telling)
    with task_identity():
        yield


def training(protocol: str, *overrides: str) -> Training:
    chosen = [f'protocol.name="{protocol}"', 'keep_rounds="all"', *overrides]
    if protocol == "u-shaped":
        chosen.append("model.upper_cut=4")
    return cells(load_settings(TABLE, chosen))[0].training


def trained(folder: Path, settings: Training, watcher: str | None = None) -> TrainingRun:
    if watcher is not None:
        own = {"meddles": True}
        plan = Hijacking(name=watcher, own=own, checkpoint_every=3, forges=False, watches=True)
        settings = replace(settings, adversary=plan)
    grid = LocalGrid(node_app, nodes=NODES)
    return train(prepare(settings, root=None), grid, folder, roster=grid.roster)


def sent(trace: Trace) -> list[SmashedUp]:
    events = [event for event in trace.events(SmashedUp) if isinstance(event, SmashedUp)]
    return [event for event in events if event.phase == Phase.TRAIN]


@pytest.mark.parametrize(
    "protocol", ["vanilla-split", "u-shaped", "splitfed-v1", "splitfed-v2", "parallel-split"]
)
def test_all_messages_are_the_same_bits_with_and_without(tmp_path: Path, protocol: str) -> None:
    """Of a watcher that writes over all it is shown and draws from every global generator."""
    settings = training(protocol)
    plain = trained(tmp_path / "plain", settings)
    watched = trained(tmp_path / "watched", settings, "telling")
    assert Trace(watched.trace).records == Trace(plain.trace).records  # sums of every array
    assert watched.utility == plain.utility
    bottoms = [load_file(each.answers / "bottom.safetensors") for each in (plain, watched)]
    assert same(*bottoms)
    assert len(Telling.shown) == len(sent(Trace(plain.trace))) > 0
    assert watched.checkpoints
    assert load_file(watched.decoded)


def test_it_sees_what_was_sent_and_begins_with_the_first_weights(tmp_path: Path) -> None:
    trace = Trace(trained(tmp_path / "run", training("vanilla-split"), "telling").trace)
    order = {(event.round, event.node, event.step): event for event in sent(trace)}
    assert len(Telling.shown) == len(order)
    batches = sorted(event.smashed.tobytes() for event in order.values())
    assert sorted(shown.cpu().numpy().tobytes() for shown, *_ in Telling.shown) == batches
    opened = Telling.opened[0]
    assert opened.server_part is not None
    assert opened.smashed is None
    assert same(opened.server_part.state_dict(), held(trace, 0))
    assert same(Telling.shown[-1][2], held(trace, 2))


def held(trace: Trace, round_: int) -> dict[str, Tensor]:
    arrays = trace.holding("server", f"model/round-{round_}")
    assert arrays is not None
    return {name: torch.from_numpy(value) for name, value in arrays.items()}


def test_where_every_node_has_a_copy_of_the_part_it_sees_the_nodes_own(tmp_path: Path) -> None:
    """SplitFed v1 averages the copies by rows: so do those that were shown last, of each node."""
    trace = Trace(trained(tmp_path / "run", training("splitfed-v1"), "telling").trace)
    events = [event for event in sent(trace) if event.round == 2]
    owners = {event.smashed.tobytes(): event.node for event in events}
    rows = {node: sum(len(e.smashed) for e in events if e.node == node) for node in range(NODES)}
    last = {
        owners[shown.cpu().numpy().tobytes()]: part
        for shown, _, part, _ in Telling.shown
        if shown.cpu().numpy().tobytes() in owners
    }
    assert last.keys() == rows.keys()
    assert not same(last[0], last[1])
    for name, mean in held(trace, 2).items():
        weighed = sum(last[node][name].cpu() * rows[node] for node in rows) / sum(rows.values())
        np.testing.assert_allclose(weighed, mean, rtol=1e-5, atol=1e-6)


def test_a_settings_file_starts_one(tmp_path: Path) -> None:
    replayed = {**LIVE, "live": False, "steps": 4, "batch_rows": 5}
    table = {**TABLE, "attack": [LIVE, replayed, {"name": "sdar", "live": True, "targets": 4}]}
    found = run(table, out=tmp_path)
    cards = {(card.attack, card.settings["attack"]["live"]): card for card in found}
    assert [card.status for card in found] == ["done"] * 3
    assert not cards["fora", True].threat.active
    assert "never_hijacked" not in (cards["fora", True].control or {})
    assert cards["fora", True].scores != cards["fora", False].scores
    assert cards["fora", True].utility == cards["fora", False].utility
    assert "adversary" not in cards["fora", False].settings


def test_too_few_images_of_its_own_are_refused_before_training(tmp_path: Path) -> None:
    scarce = ["data.public=0.05"]  # 3 images, and batches of 5
    attacks = [LIVE, {"name": "fora"}, {"name": "sdar"}]
    cards = run({**TABLE, "attack": attacks}, out=tmp_path, overrides=scarce)
    assert [card.status for card in cards] == ["unfit"] * 3
    assert all("3 public images cannot fill a batch" in str(card.why) for card in cards)
    assert not (tmp_path / "runs").exists()


@pytest.mark.parametrize(
    ("changes", "told"),
    [
        ({"restarts": 2}, "restarts = 2 beside live = true: .* leave restarts out, or live"),
        ({"collect": "first"}, "collect = 'first' beside live = true"),
        ({"name": "unsplit"}, "unsplit: live = true, but .* leave live out, or use fora or sdar"),
        ({"name": "fsha"}, "live"),
    ],
)
def test_what_needs_a_run_that_is_over_is_refused(
    changes: dict[str, Any], told: str, tmp_path: Path
) -> None:
    with pytest.raises(SettingsError, match=told):
        run({**TABLE, "attack": [{**LIVE, **changes}]}, out=tmp_path)
    assert not list(tmp_path.rglob("cards"))


def test_strips_are_not_watched() -> None:
    chosen = ['protocol.name="vertical-split"']
    cell = cells(load_settings({**TABLE, "attack": [LIVE]}, chosen))[0]
    why = unfit(Cell.of(cell))["attacks"]
    assert "no adversary here watches the smashed data of strips; use 'vanilla-split'" in why
