"""Rival label attacks on real training, from settings to cards: a table, two parties, a head."""

from pathlib import Path
from typing import Any

import pytest

from experiments.results.cards import Card
from experiments.run.runner import run

TABLE: dict[str, Any] = {
    "name": "rivals",
    "data": {"name": "breast-cancer", "nodes": 1},
    "model": {"name": "tabular-mlp", "cut": 3},
    "protocol": {
        "name": "vanilla-split",
        "labels": "server",
        "rounds": 5,
        "optimizer": "adam",
        "learning_rate": 0.005,
    },
}
NORM, COSINE = {"name": "norm-score", "targets": 286}, {"name": "cosine-score", "targets": 286}
EXPLOIT = {"name": "exploit", "targets": 286, "steps": 60, "naming": "prior", "prior": [0.9, 0.1]}
COMPLETION = {"name": "model-completion", "targets": 286, "steps": 100, "known_per_class": 2}
RARER = {**COSINE, "reference": "rarer"}


def ran(folder: Path, *attacks: dict[str, Any], **changes: dict[str, Any]) -> list[Card]:
    sections = {key: TABLE[key] | changes.get(key, {}) for key in ("data", "model", "protocol")}
    return run({**TABLE, **sections, "attack": list(attacks)}, out=folder)


def area(card: Card) -> float:
    assert card.status == "done", card.why
    assert card.control is not None
    assert card.baselines["chance"]["leak_auc"] == 0.5
    return float(card.scores["leak_auc"]["mean"])  # type: ignore[index,call-overload,arg-type]


def test_a_node_ranks_its_own_samples_by_what_comes_back(tmp_path: Path) -> None:
    norm, cosine, rarer, exploit, completion = ran(
        tmp_path, NORM, COSINE, RARER, EXPLOIT, COMPLETION
    )
    assert area(norm) > 0.6
    for card in (cosine, rarer, exploit):
        assert area(card) > 0.9
    assert area(completion) > 0.6
    assert cosine.scores["targets"] == 286 - 2  # one of each label was told
    assert completion.scores["targets"] == 286 - 4
    best = completion.baselines["public-label-classifier"]["leak_auc"]
    assert best is not None
    assert best > 0.9, "the measurements themselves say as much"
    skill = (area(completion) - best) / (1 - best)
    assert completion.scores["leak_auc_skill"]["mean"] == pytest.approx(skill)  # type: ignore[index,call-overload]


def test_so_does_one_of_two_parties(tmp_path: Path) -> None:
    vertical = {"name": "vertical-split", "merge": "sum", "labels": None}
    cards = ran(
        tmp_path,
        COSINE,
        RARER,
        data={"nodes": 2, "partition": "aligned"},
        protocol=vertical,
    )
    for card in cards:
        assert area(card) > 0.9


def test_and_a_server_whose_nodes_keep_the_head(tmp_path: Path) -> None:
    u_shaped = {"name": "u-shaped", "labels": "client"}
    (card,) = ran(tmp_path, {**COSINE, "seat": "server"}, model={"upper_cut": 5}, protocol=u_shaped)
    assert area(card) > 0.9


def test_too_few_positives_are_said_to_have_no_leak_auc(tmp_path: Path) -> None:
    (card,) = ran(tmp_path, {**NORM, "targets": 4}, protocol={"rounds": 1})
    assert card.status == "done", card.why
    assert "leak_auc" not in card.scores
    assert "leak AUC needs 2 of each of two labels" in str(card.unreliable)


def test_ten_classes_are_not_two(tmp_path: Path) -> None:
    digits = {"name": "mnist-5k", "size": 200}
    (card,) = ran(tmp_path, NORM, data=digits, protocol={"rounds": 1, "local_steps": 1})
    assert card.status == "unfit"
    assert "here are 10 classes" in str(card.why)


def test_inference_sends_no_gradient(tmp_path: Path) -> None:
    (card,) = ran(tmp_path, {**NORM, "when": "inference"}, protocol={"rounds": 1})
    assert card.status == "unfit"
    assert "no gradient crosses the wire at inference" in str(card.why)
