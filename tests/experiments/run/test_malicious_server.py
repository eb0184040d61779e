"""An adversary in a run: passive where it forges nothing, and never more than forged gradients."""

from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from safetensors.torch import load_file

from attacks import ADVERSARIES
from clients import node_app
from experiments.run.prepare import prepare
from experiments.run.targets import MisfitError
from experiments.run.train import train
from experiments.run.training_run import TrainingRun
from experiments.settings.cells import Hijacking, Training, cells
from experiments.settings.load import load_settings
from leakbed.events import CutGradientDown, Event, SmashedUp, arrays_of
from leakbed.flower_internals import task_identity
from leakbed.grids import LocalGrid
from leakbed.tap.trace import Trace
from tests.support import slow_nodes
from tests.support.adversaries import Doubling, Echo
from tests.support.tiny import Forgetful, same

NODES = 2
PROTOCOLS = [
    "vanilla-split",
    "u-shaped",
    "splitfed-v1",
    "splitfed-v2",
    "parallel-split",
    "lockstep",
]
TABLE: dict[str, Any] = {
    "name": "hijacked",
    "keep_rounds": "all",
    "data": {
        "name": "tests.support.tiny:images",
        "nodes": NODES,
        "partition": "linear",
        "public": 0.2,
    },
    "model": {"name": "tests.support.slow_nodes:stateful", "cut": 3},
    "protocol": {"batch_size": 7, "rounds": 2, "learning_rate": 0.1, "momentum": 0.9},
    "attack": [{"name": "constant-image"}],
}


@pytest.fixture(autouse=True)
def known(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    for kind in (Echo, Doubling):
        monkeypatch.setitem(ADVERSARIES, kind.name, kind)
    with task_identity():
        yield


Kept = Callable[..., TrainingRun]


def training(protocol: str, *overrides: str) -> Training:
    name, model = protocol, []
    if protocol == "lockstep":
        name, model = "parallel-split", ['protocol.sync="step"']
    if protocol == "u-shaped":
        model = ["model.upper_cut=5"]
    chosen = [f'protocol.name="{name}"', *model, *overrides]
    return cells(load_settings(TABLE, chosen))[0].training


def trained(
    folder: Path,
    settings: Training,
    adversary: str | None = None,
    *,
    wrap: Callable[[LocalGrid], Any] = lambda grid: grid,
    **changes: Any,
) -> TrainingRun:
    if adversary is not None:
        plan = Hijacking(name=adversary, own={}, checkpoint_every=3)
        settings = replace(settings, adversary=replace(plan, **changes))
    grid = LocalGrid(node_app, nodes=NODES)
    prepared = prepare(settings, root=None)
    return train(prepared, wrap(grid), folder, roster=grid.roster)


@pytest.fixture(scope="module")
def kept(tmp_path_factory: pytest.TempPathFactory) -> Kept:
    """Runs that several tests look at, each trained once."""
    folder = tmp_path_factory.mktemp("kept")
    runs: dict[tuple[str, str | None], TrainingRun] = {}

    def run(protocol: str, adversary: str | None = None) -> TrainingRun:
        if (protocol, adversary) not in runs:
            own = folder / f"{protocol} {adversary}"
            runs[protocol, adversary] = trained(own, training(protocol), adversary)
        return runs[protocol, adversary]

    return run


def events(run: TrainingRun) -> list[Event]:
    return list(Trace(run.trace).events())


def shapes(event: Event) -> list[tuple[str, str, tuple[int, ...], str]]:
    return sorted(
        (field, name, array.shape, str(array.dtype))
        for field, arrays in arrays_of(event).items()
        for name, array in arrays.items()
    )


def equal(one: Event, two: Event) -> bool:
    left, right = arrays_of(one), arrays_of(two)
    return all(
        np.array_equal(array, right[field][name])
        for field, arrays in left.items()
        for name, array in arrays.items()
    )


@pytest.mark.parametrize("protocol", PROTOCOLS)
def test_a_forge_that_returns_its_gradient_changes_no_bit(kept: Kept, protocol: str) -> None:
    honest, echoed = kept(protocol), kept(protocol, "echo")
    assert Trace(echoed.trace).records == Trace(honest.trace).records  # sums of every array
    assert echoed.utility == honest.utility
    bottoms = [load_file(run.answers / "bottom.safetensors") for run in (honest, echoed)]
    assert same(*bottoms)


@pytest.mark.parametrize("protocol", PROTOCOLS)
def test_only_gradients_and_what_follows_from_them_differ(kept: Kept, protocol: str) -> None:
    honest, forged = events(kept(protocol)), events(kept(protocol, "doubling"))
    assert [type(event) for event in forged] == [type(event) for event in honest]
    for one, two in zip(honest, forged, strict=True):
        assert (one.node, one.round, one.step) == (two.node, two.round, two.step)
        assert shapes(one) == shapes(two)
    first = next(n for n, event in enumerate(honest) if isinstance(event, CutGradientDown))
    assert any(isinstance(event, SmashedUp) for event in honest[:first])
    assert all(map(equal, honest[:first], forged[:first]))
    one, two = honest[first], forged[first]
    assert isinstance(one, CutGradientDown)
    assert isinstance(two, CutGradientDown)
    assert np.array_equal(one.gradient * 2, two.gradient)
    later = [n for n, event in enumerate(honest) if n > first and isinstance(event, SmashedUp)]
    assert not all(equal(honest[n], forged[n]) for n in later), "the nodes learnt from it"


@pytest.mark.parametrize("protocol", ["vanilla-split", "u-shaped"])
def test_a_node_that_forgets_is_hijacked_all_the_same(
    kept: Kept, tmp_path: Path, protocol: str
) -> None:
    live = kept(protocol, "doubling")
    reborn = trained(tmp_path / "reborn", training(protocol), "doubling", wrap=Forgetful)
    assert Trace(live.trace).records == Trace(reborn.trace).records
    assert live.checkpoints == reborn.checkpoints
    assert live.decoded.read_bytes() == reborn.decoded.read_bytes()


def test_the_control_run_trains_the_adversary_and_hijacks_nobody(
    kept: Kept, tmp_path: Path
) -> None:
    honest = kept("vanilla-split")
    control = trained(tmp_path / "run", training("vanilla-split"), "doubling", forges=False)
    assert Trace(control.trace).records == Trace(honest.trace).records
    assert control.checkpoints
    assert load_file(control.decoded)


def test_checkpoints_come_every_so_many_gradients_and_touch_nothing(tmp_path: Path) -> None:
    settings = training("vanilla-split")
    often = trained(tmp_path / "often", settings, "doubling", checkpoint_every=2)
    never = trained(tmp_path / "never", settings, "doubling", checkpoint_every=10**6)
    gradients = sum(isinstance(event, CutGradientDown) for event in events(often))
    steps = [point["step"] for point in often.checkpoints]
    assert steps == list(range(2, gradients + 1, 2))
    assert {"mse", "abs_pearson", "identification"} <= set(often.checkpoints[0])
    assert "ssim" not in often.checkpoints[0]  # images of 6 x 6 have none
    assert never.checkpoints == []
    assert Trace(often.trace).records == Trace(never.trace).records
    assert often.decoded.read_bytes() == never.decoded.read_bytes()


def test_every_row_of_the_last_round_is_decoded_and_nobody_else_may_read_it(tmp_path: Path) -> None:
    run = trained(tmp_path / "run", training("vanilla-split", 'keep_rounds="last"'), "echo")
    decoded = load_file(run.decoded)
    smashed = [event for event in events(run) if isinstance(event, SmashedUp)]
    assert len(decoded) == len(smashed)
    for event in smashed:
        images = decoded[f"{event.phase}/{event.node}/{event.step}/images"]
        assert images.shape == (len(event.smashed), 1, 1, 6, 6)
    assert run.decoded.stat().st_mode & 0o077 == 0


def test_the_adversary_has_a_stream_of_its_own(kept: Kept, tmp_path: Path) -> None:
    one = kept("vanilla-split", "echo")
    two = trained(tmp_path / "two", training("vanilla-split"), "doubling", own={"scale": 1.0})
    assert Trace(one.trace).records == Trace(two.trace).records
    assert one.decoded.read_bytes() != two.decoded.read_bytes()


def test_what_it_does_not_get_it_says_before_anything_is_trained(tmp_path: Path) -> None:
    settings = training("vanilla-split", "data.public=0.0")
    with pytest.raises(MisfitError, match=r"set data\.public above 0"):
        trained(tmp_path / "run", settings, "echo")
    assert not list(tmp_path.iterdir())


def test_the_seed_is_not_the_adversarys(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    seen: list[int] = []

    class Listening(Echo):
        def begin(self, view: Any, *, seed: int) -> Any:
            seen.append(seed)
            assert view.public_images is not None
            assert view.smashed is None
            assert torch.isfinite(view.public_images).all()
            return super().begin(view, seed=seed)

    monkeypatch.setitem(ADVERSARIES, "echo", Listening)
    settings = training("vanilla-split", "seed=7")
    trained(tmp_path / "run", settings, "echo")
    prepared = prepare(settings, root=None)
    assert seen == [prepared.stream("adversary/echo")]
    assert not {7, *(prepared.stream(role) for role in ("victim-init", "data"))} & set(seen)


# Flower 1.41 leaves files open and Ray announces a default it will change: neither is ours.
@pytest.mark.runtime
@pytest.mark.filterwarnings("ignore::ResourceWarning", "ignore:Tip:FutureWarning")
def test_ray_is_hijacked_as_one_process_is(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from leakbed.grids.ray.grid import RayGrid  # noqa: PLC0415  Ray takes seconds to import

    monkeypatch.setenv("PYTHONPATH", "")
    on_the_cpu = 'device="cpu"'  # as workers without a share of a GPU: one device, the same bits
    found: dict[str, TrainingRun] = {}
    with RayGrid(slow_nodes.app, nodes=NODES, workers=2) as grid:
        for protocol in PROTOCOLS:
            settings = training(protocol, on_the_cpu)
            hijacking = Hijacking(name="doubling", own={}, checkpoint_every=3)
            prepared = prepare(replace(settings, adversary=hijacking), root=None)
            found[protocol] = train(prepared, grid, tmp_path / protocol, roster=grid.roster)
    for protocol, there in found.items():
        settings = training(protocol, on_the_cpu)
        here = trained(tmp_path / f"{protocol} here", settings, "doubling")
        assert Trace(here.trace).records == Trace(there.trace).records, protocol
        assert here.checkpoints == there.checkpoints
        assert here.decoded.read_bytes() == there.decoded.read_bytes()
