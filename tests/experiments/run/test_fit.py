"""The misfits of a cell that need no training to be seen, and that its attack is made once."""

import re
from collections import Counter
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from attacks import ADVERSARIES, ConstantImage
from experiments.run.attack import Cell
from experiments.run.fit import unfit
from experiments.run.runner import run
from experiments.settings.cells import cells
from experiments.settings.load import load_settings
from strategies import PROTOCOLS
from tests.support.adversaries import Doubling
from tests.support.own_requests import LocalStep

TABLE: dict[str, Any] = {
    "name": "small",
    "data": {"name": "mnist-5k", "size": 400, "nodes": 2},
    "model": {"name": "mlp2", "cut": 1},
    "protocol": {"name": "vanilla-split", "batch_size": 16, "local_steps": 2},
    "attack": [{"name": "constant-image"}],
}


def said(
    *overrides: str, attack: dict[str, Any] = TABLE["attack"][0], defense: str = "none"
) -> dict[str, str]:
    """Return what does not fit of an experiment of one cell."""
    table = {**TABLE, "attack": [attack], "defense": [{"name": defense}]}
    return unfit(Cell.of(cells(load_settings(table, overrides))[0]))


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
    assert ("defenses" not in said(f"protocol.name={protocol}", defense=defense)) == fits


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
    why = said(f"protocol.name={protocol}", attack={"name": "fsha"}).get("attacks")
    assert why is None if told is None else re.search(told, str(why))


def test_a_detector_needs_labels_that_the_node_may_use() -> None:
    why = said("protocol.labels=server", defense="splitout")["defenses"]
    assert "splitout cannot work with protocol.labels = 'server'" in why
    assert "choose a protocol with labels = 'client' or 'shared'" in why


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
    assert told in said("protocol.name=fedavg", defense=defense)["defenses"]
    assert said("protocol.name=fedavg") == {}


@pytest.mark.parametrize(
    ("protocol", "own", "what"),
    [
        ("u-shaped", {}, None),
        ("fedavg", {}, None),
        ("vanilla-split", {}, "use 'u-shaped' or 'fedavg', or set epsilon = 1"),
        ("vanilla-split", {"epsilon": 1.0}, None),
        ("parallel-split", {"epsilon": 1.0}, None),
        ("vanilla-split\nprotocol.labels=server", {"epsilon": 1.0}, "the server has them"),
        ("vertical-split", {"epsilon": 1.0}, "use 'u-shaped', 'fedavg', or labels = 'shared'"),
    ],
)
def test_a_protocol_must_leave_it_its_labels_and_its_loss(
    protocol: str, own: dict[str, Any], what: str | None
) -> None:
    chosen = [*f"protocol.name={protocol}".splitlines(), "model.extra_classes=1"]
    why = said(*chosen, attack={"name": "client-gan", **own}).get("attacks")
    assert (why is None) == (what is None)
    assert what is None or what in str(why)


def test_each_choice_that_does_not_fit_says_why() -> None:
    found = said(attack={"name": "dlm"}, defense="weight-noise")
    assert set(found) == {"attacks", "defenses"}
    assert "exchanges smashed data and cut gradients" in found["attacks"]
    assert "weight-noise protects update messages" in found["defenses"]


def test_each_cell_makes_its_attack_once(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    made: Counter[str] = Counter()

    def count(kind: Any) -> None:
        plain = kind.__init__

        def counting(self: object, **own: Any) -> None:
            made[kind.name] += 1
            plain(self, **own)

        monkeypatch.setattr(kind, "__init__", counting)

    monkeypatch.setitem(ADVERSARIES, "fsha", Doubling)
    count(ConstantImage)
    count(Doubling)
    attacks = [{"name": "constant-image"}, {"name": "constant-image", "when": "inference"}]
    table = {
        **TABLE,
        "data": {"name": "tests.support.tiny:images", "nodes": 2, "public": 0.2},
        "protocol": {"name": "vanilla-split", "batch_size": 5, "local_steps": 2},
        "attack": [*attacks, {"name": "fsha", "targets": 2, "control": False}],
        "ceiling": {"messages": 1, "candidates": 10, "draws": 1},
    }
    cards = run(table, out=tmp_path)
    assert [card.status for card in cards] == ["done"] * 3
    # One for each passive cell; of who acts in a training its cell's, and one that acts.
    assert made == {ConstantImage.name: 2, Doubling.name: 2}
