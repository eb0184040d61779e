"""A run's ingredients, and the misfits that need no training to be seen."""

import pytest

from experiments.cells import Training, cells
from experiments.preparing import answer_key, misfit, prepare
from experiments.settings import SettingsError
from experiments.settings_file import load_settings

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
    ],
)
def test_a_defence_must_protect_a_message_that_is_sent(
    protocol: str, defense: str, *, fits: bool
) -> None:
    why = misfit(training(f"protocol.name={protocol}", defense=defense))
    assert (why is None) == fits


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
