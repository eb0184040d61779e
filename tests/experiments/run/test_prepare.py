"""A run's ingredients, and the misfits that need no training to be seen."""

import re
from dataclasses import replace

import pytest

import clients.node
import experiments.run.prepare
from attacks import ADVERSARIES
from defenses import SmashedNoise
from experiments.run.prepare import answer_key, make_defenses, misfit, prepare, unread
from experiments.settings.cells import Training, cells
from experiments.settings.load import load_settings
from experiments.settings.schema import SettingsError
from leakbed.contracts import IllegalCombinationError, Protects
from leakbed.contracts.hooks import UncalledHookError
from strategies import PROTOCOLS
from tests.support import tiny
from tests.support.own_requests import LocalStep

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


@pytest.mark.parametrize(
    ("protocol", "defense", "fits"),
    [
        ("fedavg", "weight-noise", True),
        ("fedavg", "smashed-noise", False),
        ("vanilla-split", "smashed-noise", True),
        ("vanilla-split", "weight-sparsification", False),
        ("vanilla-split", "none", True),
        ("fedavg", "nopeek", False),
        ("vanilla-split", "nopeek", True),
        ("u-shaped", "nopeek", True),
        ("vertical-split", "nopeek", True),
        ("fedavg", "adversarial-training", True),
        ("fedavg", "splitguard", False),
        ("vanilla-split", "splitguard", True),
        ("u-shaped", "splitguard", False),
        ("u-shaped", "splitout", True),
        ("u-shaped", "gradients-scrutinizer", True),
        ("vertical-split", "splitguard", False),
        ("vertical-split", "splitout", False),
        ("vertical-split", "gradients-scrutinizer", False),
    ],
)
def test_a_defense_must_protect_a_message_that_is_sent(
    protocol: str, defense: str, *, fits: bool
) -> None:
    why = misfit(training(f"protocol.name={protocol}", defense=defense))
    assert (why is None) == fits


@pytest.mark.parametrize(
    ("protocol", "told"),
    [
        ("vanilla-split", None),
        ("splitfed-v1", None),
        ("parallel-split", None),
        ("fedavg", "this protocol exchanges updates"),
        ("vertical-split", "holds a strip of every image.*use 'vanilla-split'"),
    ],
)
def test_an_adversary_forges_where_whole_images_are_smashed(
    protocol: str, told: str | None
) -> None:
    threat = ADVERSARIES["fsha"]().threat
    why = unread(threat, training(f"protocol.name={protocol}"))
    assert why is None if told is None else re.search(told, str(why))


def test_public_rows_are_the_adversarys_and_nobody_elses() -> None:
    prepared = prepare(training(), root=None)
    public, private = prepared.public, answer_key(prepared, None).images
    assert public is not None
    assert len(public["images"]) == len(public["labels"]) > 0
    own = {image.tobytes() for image in public["images"]}
    assert not own & {image.numpy().tobytes() for image in private}
    assert prepare(training("data.public=0.0"), root=None).public is None


def test_a_detector_needs_labels_that_the_node_may_use() -> None:
    why = misfit(training("protocol.labels=server", defense="splitout"))
    assert why is not None
    assert "splitout cannot work with protocol.labels = 'server'" in why
    assert "choose a protocol with labels = 'client' or 'shared'" in why


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
        make_defenses(chosen)
    with pytest.raises(UncalledHookError, match="noisy overrides protect_smashed but protects tra"):
        tiny.cell(defenses=(("smashed-noise", {}),)).chosen_defenses()


@pytest.mark.parametrize("defense", ["local-dp", "weight-noise", "weight-sparsification"])
def test_a_defense_of_updates_sees_no_reply_to_requests_of_one_s_own(
    monkeypatch: pytest.MonkeyPatch, defense: str
) -> None:
    asking = replace(PROTOCOLS["fedavg"], requests=(LocalStep,))
    monkeypatch.setitem(PROTOCOLS, "fedavg", asking)
    told = (
        f"{defense} protects the weights that nodes send back in FedAvg's own messages, but fedavg "
        "asks them requests of its own (LocalStep)"
    )
    assert told in str(misfit(training("protocol.name=fedavg", defense=defense)))
    assert misfit(training("protocol.name=fedavg")) is None
