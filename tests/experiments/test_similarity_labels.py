"""Labels read off the messages of real training, from settings to cards, in every seat."""

from pathlib import Path
from typing import Any

import pytest

from experiments.results.cards import Card
from experiments.run.runner import run

DISTANCE, CLUSTERING = "similarity-distance", "similarity-clustering"
FEW = {"collect": "first", "targets": 320}
TABLE: dict[str, Any] = {
    "name": "labels",
    "data": {"name": "mnist-5k", "size": 800, "nodes": 1},
    "model": {"name": "mnistnet", "cut": 5},
    "protocol": {
        "name": "vanilla-split",
        "labels": "server",
        "rounds": 2,
        "batch_size": 64,
        "local_steps": 5,
        "learning_rate": 0.005,
    },
    "attack": [
        {"name": DISTANCE, **FEW},
        {"name": CLUSTERING, **FEW},
        {"name": CLUSTERING, **FEW, "known_per_class": 0},
        {"name": DISTANCE, "evidence": "smashed", "when": "inference", "targets": 80},
    ],
}


def other(protocol: dict[str, Any], *attacks: dict[str, Any], **changes: Any) -> dict[str, Any]:
    return TABLE | {"protocol": TABLE["protocol"] | protocol, "attack": list(attacks)} | changes


@pytest.fixture(scope="module")
def cards(tmp_path_factory: pytest.TempPathFactory) -> list[Card]:
    return run(TABLE, out=tmp_path_factory.mktemp("labels"))


def mean(card: Card, metric: str = "label_accuracy") -> float:
    assert card.status == "done", card.why
    return float(card.scores[metric]["mean"])  # type: ignore[index,call-overload,arg-type]


def test_first_gradients_give_the_labels_away(cards: list[Card]) -> None:
    for card in cards[:2]:
        assert mean(card) >= 0.99
        assert card.scores["targets"] == 320 - 10
        assert card.control is not None
        assert card.control["within"]
        assert float(card.baselines["chance"]["label_accuracy"] or 0) == pytest.approx(0.1)
        assert card.settings["attack"]["known_per_class"] == 1  # type: ignore[index,call-overload]


def test_without_a_known_label_the_score_is_an_upper_bound_and_says_so(cards: list[Card]) -> None:
    blind = cards[2]
    assert "label_accuracy" not in blind.scores
    assert mean(blind, "cluster_accuracy") >= 0.99
    assert "upper bound" in str(blind.scores["upper_bound"])
    assert blind.scores["targets"] == 320
    assert float(blind.baselines["another-row"]["cluster_accuracy"] or 0) < 0.2


def test_smashed_data_of_an_untrained_model_say_less(cards: list[Card]) -> None:
    assert 0.1 < mean(cards[3]) < 0.9


def test_the_server_of_a_u_shaped_run_reads_the_upper_cut(tmp_path: Path) -> None:
    table = other(
        {"name": "u-shaped", "labels": None, "local_steps": 5},
        {"name": DISTANCE, "seat": "server", **FEW},
        model={"name": "mnistnet", "cut": 5, "upper_cut": 7},
    )
    (card,) = run(table, out=tmp_path)
    assert mean(card) >= 0.99
    assert card.scores["targets"] == 320 - 10


def test_a_feature_party_of_vertical_training_reads_its_own_gradients(tmp_path: Path) -> None:
    table = other(
        {"name": "vertical-split", "labels": None, "local_steps": 5, "merge": "sum"},
        {"name": CLUSTERING, **FEW},
        data=TABLE["data"] | {"nodes": 2},
        model={"name": "mlp2", "cut": 1},
    )
    (card,) = run(table, out=tmp_path)
    assert mean(card) >= 0.99


def test_a_party_that_has_the_labels_has_nothing_to_infer(tmp_path: Path) -> None:
    table = other(
        {"labels": "shared", "rounds": 1, "local_steps": 1},
        {"name": DISTANCE, "targets": 64},
        {"name": DISTANCE, "evidence": "smashed", "seat": "server", "targets": 64},
    )
    node, server = run(table, out=tmp_path)
    for card in (node, server):
        assert card.status == "unfit"
        assert f"the {card.threat.seat} holds every label itself" in str(card.why)


@pytest.mark.parametrize("labels", ["shared", "server"])
def test_of_new_samples_nobody_holds_the_labels(labels: str, tmp_path: Path) -> None:
    new = {"name": CLUSTERING, "evidence": "smashed", "when": "inference", "targets": 300}
    table = other({"labels": labels, "rounds": 1}, new, {**new, "seat": "server"})
    node, server = run(table, out=tmp_path)
    assert mean(node) == mean(server) > 0.15
    assert node.control is not None
    assert node.control["within"]


def test_a_u_shaped_server_reads_new_samples_above_its_own_layers(tmp_path: Path) -> None:
    new = {"name": CLUSTERING, "evidence": "smashed", "when": "inference", "targets": 300}
    table = other(
        {
            "name": "u-shaped",
            "labels": None,
            "local_steps": None,
            "optimizer": "adam",
            "learning_rate": 0.002,
        },
        new,
        {**new, "seat": "server"},
        data=TABLE["data"] | {"size": 1500},
        model={"name": "mnistnet", "cut": 2, "upper_cut": 9},
    )
    node, server = run(table, out=tmp_path)
    assert mean(server) > mean(node) + 0.1


def test_a_party_embeds_its_own_inputs_and_nobody_elses(tmp_path: Path) -> None:
    table = other(
        {"rounds": 1, "local_steps": 5},
        {"name": "similarity-transfer", "targets": 320, "epochs": 4},
    )
    (card,) = run(table, out=tmp_path)
    assert mean(card) > 0.3
    assert card.scores["targets"] == 320 - 10
    assert card.control is not None
    assert card.control["within"]
