"""A run's ingredients, and what is refused before it."""

import pytest

import clients.node
import experiments.run.prepare
from defenses import SmashedNoise
from experiments.run.prepare import answer_key, prepare
from experiments.settings.cells import Training, cells
from experiments.settings.load import load_settings
from experiments.settings.schema import SettingsError
from leakbed.contracts import IllegalCombinationError, Protects
from leakbed.contracts.hooks import UncalledHookError
from tests.support import tiny

TABLE = {
    "name": "small",
    "data": {"size": 400, "nodes": 2},
    "model": {"name": "mlp2", "cut": 1},
    "protocol": {"name": "vanilla-split", "batch_size": 16, "local_steps": 2},
    "attack": [{"name": "constant-image"}],
}


def training(*overrides: str, defense: str = "none") -> Training:
    table = {**TABLE, "defense": [{"name": defense}]}
    return cells(load_settings(table, overrides))[0].training


def test_public_rows_are_the_adversarys_and_nobody_elses() -> None:
    prepared = prepare(training(), root=None)
    public, private = prepared.public, answer_key(prepared, None).images
    assert public is not None
    assert len(public["images"]) == len(public["labels"]) > 0
    own = {image.tobytes() for image in public["images"]}
    assert not own & {image.numpy().tobytes() for image in private}
    assert prepare(training("data.public=0.0"), root=None).public is None


def test_fewer_gradients_than_the_window_are_refused_before_training() -> None:
    # 400 digits at 2 nodes: 140 rows each, so 9 batches of 16
    with pytest.raises(IllegalCombinationError, match=r"simulates 9 .* window of 10 needs 10"):
        prepare(training(defense="splitout"), root=None)
    fitting = ["protocol.batch_size=8", "protocol.local_steps=10"]
    prepare(training(*fitting, defense="splitout"), root=None)


def test_no_stream_of_a_run_is_another_or_the_seed() -> None:
    prepared = prepare(training("seed=12345"), root=None)
    roles = ["data", "victim-init", "server", "sampling", "node/0", "node/1", "adversary/unsplit"]
    streams = [prepared.stream(role) for role in roles]
    assert len({*streams, 12345}) == len(roles) + 1


def test_the_answer_key_covers_every_batch_of_every_node() -> None:
    prepared = prepare(training("protocol.rounds=3"), root=None)
    key = answer_key(prepared, None)
    assert set(key.order) == {(n, r, s) for n in (0, 1) for r in (1, 2, 3) for s in (0, 1)}
    rows = [row for batch in key.order.values() for row in batch]
    assert max(rows) < len(key.images)
    split = prepared.data.split()
    second = set(range(len(split.nodes[0]), len(key.images)))
    assert set(key.order[1, 1, 0]) <= second


def test_the_answer_key_holds_a_protocols_options_apart() -> None:
    prepared = prepare(training("protocol.name=parallel-split", "protocol.sync=step"), root=None)
    told = answer_key(prepared, None).training
    assert set(told) == {"plan", "defenses", "intruder", "rows", "partition", "options"}
    assert told["options"]["sync"] == "step"


def test_a_momentum_that_adam_would_ignore_is_refused() -> None:
    with pytest.raises(SettingsError, match="Adam has none"):
        prepare(training("protocol.optimizer=adam", "protocol.momentum=0.9"), root=None)


def test_a_defense_whose_hook_nobody_would_call_is_refused_before_training(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    body = {"name": "noisy", "source": "own", "protects": frozenset({Protects.TRAINING})}
    noisy = type("Noisy", (SmashedNoise,), body)
    chosen = training(defense="smashed-noise")
    for catalogue in (experiments.run.prepare.DEFENSES, clients.node.DEFENSES):
        monkeypatch.setitem(catalogue, "smashed-noise", noisy)
    with pytest.raises(UncalledHookError, match="noisy overrides protect_smashed but protects tra"):
        prepare(chosen, root=None)
    with pytest.raises(UncalledHookError, match="noisy overrides protect_smashed but protects tra"):
        tiny.cell(defenses=(("smashed-noise", {}),)).chosen_defenses()
