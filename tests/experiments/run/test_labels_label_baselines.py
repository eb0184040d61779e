"""Every attack on labels stands beside what its party tells of them without a message."""

from dataclasses import replace
from functools import cache
from pathlib import Path
from typing import Any

import pytest
import torch
from sklearn.linear_model import LogisticRegression
from sklearn.neighbors import KNeighborsClassifier

from attacks import ATTACKS
from experiments.report.findings import conclusions
from experiments.results.cards import Card
from experiments.run.attack import make_attack
from experiments.run.labels import applicable, classified, infers_labels, nearest, untrained
from experiments.run.offline import attack_trace
from experiments.run.runner import run
from experiments.settings.plugins import AttackSettings
from leakbed.contracts import Evidence, Knowledge, Seat, ThreatModel, View
from leakbed.models import Architecture
from leakbed.oracle import SEES_SAMPLES
from leakbed.seeds import derive
from tests.support.attack_views import quick_attack, view_for

OWN = {"own-inputs-classifier", "own-inputs-nearest"}
PUBLIC = {"public-label-classifier", "public-label-nearest"}
FRESH = {"untrained-bottom"}

QUICK: dict[str, dict[str, Any]] = {
    "exploit": {"steps": 10},
    "model-completion": {"steps": 20},
    "similarity-transfer": {"epochs": 1},
}
DIGITS = {
    "name": "labels",
    "data": {"name": "mnist-5k", "size": 600, "nodes": 1},
    "model": {"name": "mnistnet", "cut": 5},
    "protocol": {"name": "vanilla-split", "labels": "server", "rounds": 1},
}
TABLE = {
    **DIGITS,
    "data": {"name": "breast-cancer", "nodes": 1},
    "model": {"name": "tabular-mlp", "cut": 3},
}
WEIGHTS = {
    **DIGITS,
    "data": {"name": "mnist-5k", "size": 300, "nodes": 40},
    "model": {"name": "mnistnet", "cut": 9},
    "protocol": {"name": "fedavg", "rounds": 1, "batch_size": 1, "local_steps": 1},
}


@cache
def label_attacks() -> list[str]:
    found = []
    for name in sorted(ATTACKS):
        attack = quick_attack(name)
        if infers_labels(attack.run(view_for(attack), seed=0), attack.threat):
            found.append(name)
    return found


def beside(card: Card) -> set[str]:
    """The new baselines that a card has, each with a number of what the attack is scored by."""
    assert card.status == "done", card.why
    score = next(name for name in ("label_accuracy", "cluster_accuracy") if name in card.scores)
    return {name for name in SEES_SAMPLES if score in card.baselines.get(name, {})}


def mean(card: Card, baseline: str, metric: str = "label_accuracy") -> float:
    return float(card.baselines[baseline][metric] or 0.0)


def score(card: Card, metric: str = "label_accuracy") -> float:
    return float(card.scores[metric]["mean"])  # type: ignore[index,call-overload,arg-type]


@pytest.fixture(scope="module")
def cards(tmp_path_factory: pytest.TempPathFactory) -> list[Card]:
    """Of every attack on labels where it fits: digits, a table of two classes, whole weights."""
    found = []
    few = {**DIGITS, "data": {"name": "mnist-5k", "size": 200, "nodes": 1}}
    for number, table in enumerate((few, TABLE, WEIGHTS)):
        attacks = [{"name": n, "targets": 60, **QUICK.get(n, {})} for n in label_attacks()]
        found += run({**table, "attack": attacks}, out=tmp_path_factory.mktemp(str(number)))
    return [card for card in found if card.status == "done"]


def test_the_catalogue_has_attacks_on_labels_and_others() -> None:
    assert {"exploit", "norm-score", "unsplit-labels"} < set(label_attacks()) < set(ATTACKS)


@pytest.mark.parametrize("name", label_attacks())
def test_every_label_attacks_card_has_what_its_threat_model_allows(
    name: str, cards: list[Card]
) -> None:
    own = [card for card in cards if card.attack == name]
    assert own, "some case above must fit it"
    for card in own:
        chosen = AttackSettings(name=name, own=QUICK.get(name, {}))
        threat = make_attack(chosen).threat
        assert beside(card) == set(applicable(threat, known=True, public=True))


def test_who_gets_which() -> None:
    reads = frozenset({Evidence.SMASHED})
    told = frozenset({Knowledge.KNOWN_LABELS})
    client = ThreatModel(seat=Seat.CLIENT, evidence=reads, needs=told)
    assert set(applicable(client, known=True, public=True)) == OWN | PUBLIC | FRESH
    assert set(applicable(client, known=True, public=False)) == OWN | FRESH
    assert set(applicable(client, known=False, public=True)) == PUBLIC | FRESH
    blind = replace(client, needs=frozenset())
    assert set(applicable(blind, known=True, public=True)) == PUBLIC | FRESH
    server = replace(client, seat=Seat.SERVER)
    assert set(applicable(server, known=True, public=True)) == FRESH
    silent = replace(client, evidence=frozenset({Evidence.NOTHING}))
    assert set(applicable(silent, known=True, public=True)) == OWN | PUBLIC
    nobody = ThreatModel(seat=Seat.EAVESDROPPER, evidence=frozenset({Evidence.NOTHING}))
    assert applicable(nobody, known=True, public=True) == ()


def test_smashed_data_that_say_no_more_than_their_inputs_have_no_skill(tmp_path: Path) -> None:
    attack = {"name": "model-completion", "targets": 400, "known_per_class": 5}
    protocol = {**DIGITS["protocol"], "learning_rate": 1e-6}  # type: ignore[dict-item]
    (card,) = run({**DIGITS, "protocol": protocol, "attack": [attack]}, out=tmp_path)
    assert score(card) > 0.4, "far above chance,"
    assert mean(card, "own-inputs-classifier") > 0.5
    assert mean(card, "untrained-bottom") > 0.4
    assert score(card, "label_accuracy_skill") <= 0, "and yet no leak of the protocol"
    said = " ".join(conclusions([card]))
    assert "beats everything" not in said
    assert "a classifier (logistic regression) of the party's own inputs" in said


def test_gradients_of_real_labels_keep_their_skill_and_the_control_its_limit(
    tmp_path: Path,
) -> None:
    attack = {"name": "similarity-clustering", "targets": 400}
    data = {**DIGITS["data"], "public": 0.0}  # type: ignore[dict-item]
    (card,) = run({**DIGITS, "data": data, "attack": [attack]}, out=tmp_path)
    assert beside(card) == OWN | FRESH
    assert score(card) > 0.99
    assert mean(card, "untrained-bottom") < 0.6, "gradients of no label are no message"
    assert score(card, "label_accuracy_skill") > 0.9
    assert card.control is not None
    limit = card.control["baseline"]["label_accuracy"]  # type: ignore[index,call-overload]
    assert limit["limit"] < 0.25
    assert "majority-label" in card.baselines


def test_without_a_known_label_groups_stand_beside_groups(tmp_path: Path) -> None:
    attack = {"name": "similarity-clustering", "targets": 200, "known_per_class": 0}
    (card,) = run({**DIGITS, "attack": [attack]}, out=tmp_path)
    assert beside(card) == PUBLIC | FRESH
    assert mean(card, "untrained-bottom", "cluster_accuracy") < 0.6


def test_a_server_has_no_inputs_and_a_party_its_strip(tmp_path: Path) -> None:
    u_shaped = {"name": "u-shaped", "rounds": 1}
    attack = {"name": "similarity-distance", "seat": "server", "targets": 200}
    model = {**DIGITS["model"], "upper_cut": 7}  # type: ignore[dict-item]
    table = {**DIGITS, "model": model, "protocol": u_shaped, "attack": [attack]}
    (server,) = run(table, out=tmp_path / "server")
    assert beside(server) == FRESH
    vertical = {"name": "vertical-split", "rounds": 1, "merge": "sum"}
    mine = {"name": "similarity-distance", "targets": 200}
    (party,) = run(
        {
            **DIGITS,
            "data": {**DIGITS["data"], "nodes": 2},  # type: ignore[dict-item]
            "model": {"name": "mlp2", "cut": 1},
            "protocol": vertical,
            "attack": [mine],
        },
        out=tmp_path / "party",
    )
    assert beside(party) == OWN | PUBLIC | FRESH


def test_a_trace_attacked_elsewhere_has_them_too(tmp_path: Path) -> None:
    run({**DIGITS, "attack": [{"name": "similarity-distance"}]}, out=tmp_path / "here")
    (recorded,) = (tmp_path / "here" / "runs").iterdir()
    card = attack_trace(
        recorded / "trace",
        "model-completion",
        answers=recorded / "answers",
        out=tmp_path / "there",
        settings={"targets": 200, "steps": 20},
    )
    assert beside(card) == OWN | PUBLIC | FRESH


def test_both_classifiers_are_scikit_learns() -> None:
    drawn = torch.Generator().manual_seed(0)
    images = torch.rand(60, 1, 4, 4, generator=drawn)
    inputs = torch.rand(50, 1, 4, 4, generator=drawn)
    labels = (images.flatten(1).sum(1) > 8).long() + 2 * (images[:, 0, 0, 0] > 0.5).long()
    for guess, twin in (
        (classified(images, labels, inputs), LogisticRegression(max_iter=200)),
        (nearest(images, labels, inputs), KNeighborsClassifier(1)),
    ):
        twin.fit(images.flatten(1).double().numpy(), labels.numpy())
        expected = torch.from_numpy(twin.predict(inputs.flatten(1).double().numpy()))
        assert guess.labels is not None
        assert torch.equal(guess.labels[:, 0], expected)
        assert guess.scores is None, "of four classes nothing is ranked"
    binary = (labels % 2).long()
    for guess in (classified(images, binary, inputs), nearest(images, binary, inputs)):
        assert guess.labels is not None
        assert guess.scores is not None
        ones = guess.labels == 1
        assert guess.scores[ones].min() >= guess.scores[~ones].max()


def test_one_known_class_is_guessed_everywhere() -> None:
    images, labels = torch.rand(3, 1, 2, 2), torch.full((3,), 4)
    for guess in (classified(images, labels, images), nearest(images, labels, images)):
        assert guess.labels is not None
        assert guess.labels.flatten().tolist() == [4, 4, 4]
        assert guess.scores is None


def view_of(count: int) -> View:
    rows = torch.zeros(count, 256)
    return View(
        seat=Seat.CLIENT,
        image_shape=(1, 28, 28),
        num_classes=10,
        targets=count,
        smashed=rows,
        cut_gradient=rows,
        known_labels=torch.arange(count)[:, None] % 10,
    )


def test_what_a_fresh_network_sends_says_nothing_of_labels_and_reads_no_message() -> None:
    architecture = Architecture(name="mnistnet", image_shape=(1, 28, 28), num_classes=10, cut=5)
    inputs = torch.rand(30, 1, 28, 28, generator=torch.Generator().manual_seed(0))
    found = untrained(view_of(30), architecture, inputs, training=True, stream=5)
    other = replace(view_of(30), cut_gradient=torch.rand(30, 256), smashed=torch.rand(30, 256))
    again = untrained(other, architecture, inputs, training=True, stream=5)
    for name in ("smashed", "cut_gradient"):
        assert torch.equal(getattr(found, name), getattr(again, name))
        assert getattr(found, name).abs().sum() > 0
    assert found.head_gradient is None
    assert torch.equal(found.known_labels, view_of(30).known_labels)  # type: ignore[arg-type]
    twin = inputs.clone()
    twin[1] = twin[0]
    same = untrained(view_of(30), architecture, twin, training=True, stream=5)
    assert torch.equal(same.cut_gradient[0], same.cut_gradient[1])  # type: ignore[index]
    elsewhere = untrained(view_of(30), architecture, inputs, training=True, stream=6)
    assert not torch.equal(found.smashed, elsewhere.smashed)  # type: ignore[arg-type]


def test_gradients_of_a_fresh_network_are_the_mean_over_every_label() -> None:
    architecture = Architecture(name="mnistnet", image_shape=(1, 28, 28), num_classes=10, cut=9)
    inputs = torch.rand(4, 1, 28, 28, generator=torch.Generator().manual_seed(0))
    width = int(architecture.smashed_shape[0])
    view = replace(
        view_of(4),
        smashed=torch.zeros(4, width),
        cut_gradient=torch.zeros(4, width),
        head_gradient=torch.zeros(4, 10, width),
    )
    found = untrained(view, architecture, inputs, training=False, stream=5)
    assert found.smashed is not None
    top = architecture.top(derive(5, "weights"))
    rows = found.smashed.clone().requires_grad_()
    losses = [torch.nn.functional.cross_entropy(top(rows), torch.full((4,), c)) for c in range(10)]
    (expected,) = torch.autograd.grad(4 * sum(losses) / 10, rows)  # type: ignore[arg-type]
    assert torch.allclose(found.cut_gradient, expected, atol=1e-6)  # type: ignore[arg-type]
    weight = next(top.parameters())
    (first,) = torch.autograd.grad(
        sum(torch.nn.functional.cross_entropy(top(rows[:1]), torch.tensor([c])) for c in range(10)),  # type: ignore[arg-type]
        weight,
    )
    assert torch.allclose(found.head_gradient[0], first / 10, atol=1e-6)  # type: ignore[index]


def test_normalisation_layers_and_a_single_row_pass() -> None:
    architecture = Architecture(name="two-blocks", image_shape=(1, 28, 28), num_classes=10, cut=3)
    shape = architecture.smashed_shape
    for count in (1, 2, 513):
        inputs = torch.rand(count, 1, 28, 28, generator=torch.Generator().manual_seed(0))
        view = replace(view_of(count), smashed=torch.zeros(count, *shape), cut_gradient=None)
        found = untrained(view, architecture, inputs, training=True, stream=1)
        assert found.smashed is not None
        assert found.smashed.isfinite().all()
        assert found.cut_gradient is None
