"""The ceiling on cards: what it bounds, what it does not, and who is caught above it."""

import gc
import weakref
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch

import experiments.run.attack
import experiments.run.card_ceilings
from experiments.console import summary
from experiments.report.caveats import caveats
from experiments.report.rows import cells
from experiments.report.tables import tables
from experiments.results.cards import ABOVE, Bound, Card
from experiments.run.attack import Attacked, attack_run
from experiments.run.card_ceilings import Bounds, _refuse, _refuse_labels, _spread_over
from experiments.run.ceiling_results import RunCeiling
from experiments.run.runner import run
from experiments.settings.load import load_settings
from experiments.settings.schema import SettingsError
from leakbed.contracts import Evidence, Knowledge, KnowledgeKind, Seat, ThreatModel
from leakbed.contracts.noise_laws import NoCeilingError
from leakbed.events import Phase, Target
from leakbed.oracle.truth import AnswerKey

SPLIT: dict[str, Any] = {
    "name": "small",
    "keep_rounds": "all",
    "ceiling": {"candidates": 60, "messages": 4},
    "data": {"size": 300, "nodes": 2},
    "model": {"name": "mnistnet", "cut": 2},
    "protocol": {"name": "vanilla-split", "batch_size": 8, "local_steps": 2},
    "defense": [{"name": "smashed-noise", "sigma": 0.5, "clip": 1.0}],
    "attack": [{"name": "smashed-as-image", "targets": 12}],
}

READS = ThreatModel(seat=Seat.SERVER, evidence=frozenset({Evidence.SMASHED}))


def bound(card: Card) -> Bound:
    assert card.ceiling is not None
    return card.ceiling


def test_a_network_of_ones_own_has_a_ceiling(tmp_path: Path) -> None:
    own = {"name": "tests.support.own_model:Net", "cut": 2}
    (card,) = run({**SPLIT, "model": own}, out=tmp_path)
    assert bound(card).ceiling is not None


def test_of_rows_of_several_steps_the_ceilings_are_not_the_first_alone() -> None:
    first = Target(node=0, round=1, step=0, row=0, phase=Phase.TRAIN)
    assert _spread_over([first, replace(first, row=1), replace(first, node=1)]) is None
    assert _spread_over([first, replace(first, row=1), replace(first, step=1)]) == 3
    tested = replace(first, phase=Phase.EVALUATE)
    assert _spread_over([tested, replace(tested, step=256)]) is None


def test_a_ceiling_that_was_refused_is_refused_again_and_its_arrays_are_let_go() -> None:
    held: list[weakref.ref[torch.Tensor]] = []

    def refused() -> RunCeiling:
        messages = torch.zeros(3)
        held.append(weakref.ref(messages))
        raise NoCeilingError("no ceiling: no density")

    bounds = Bounds()
    for _ in range(2):
        with pytest.raises(NoCeilingError, match="no ceiling: no density"):
            bounds._once(("a run",), refused)
    gc.collect()
    assert [array() for array in held] == [None]


def test_each_card_has_the_ceiling_of_its_run_and_one_run_computes_it_once(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    asked: list[dict[str, Any]] = []
    honest = experiments.run.card_ceilings.ceiling_of_run

    def counted(folder: Path, **settings: Any) -> Any:
        asked.append(settings)
        return honest(folder, **settings)

    monkeypatch.setattr(experiments.run.card_ceilings, "ceiling_of_run", counted)
    attacks = [
        *SPLIT["attack"],
        {"name": "unsplit", "targets": 2, "outer_steps": 1, "input_steps": 1, "model_steps": 1},
    ]
    images, clone = run({**SPLIT, "attack": attacks, "sweep": {"seed": [0, 1]}}, out=tmp_path)[:2]
    found = bound(images)
    assert (found.guesses, found.seat, found.round, found.messages) == (1, "server", 1, 4)
    assert found.candidates == 60
    assert found.ceiling is not None
    assert found.chance is not None
    assert found.cap is not None
    assert found.chance < found.ceiling < found.cap
    assert found.error is not None
    assert 0 < found.error < 0.2
    assert "where later ones may tell of it too" in str(found.told)  # two batches
    assert found.p is not None
    assert found.p > ABOVE
    assert images.above_ceiling is None
    assert found.targets == 12
    assert bound(clone).ceiling == found.ceiling
    assert len(asked) == 2  # once for each seed
    (row, *_) = tables(cells([images]))[0]["rows"]
    assert any(note.startswith("ceiling ") for each in row["metrics"] for note in each["notes"])


def test_an_attack_that_reads_the_answer_key_is_marked(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def cheating(trace: Path, *given: Any, answers: Path, **more: Any) -> Attacked:
        honest = attack_run(trace, *given, answers=answers, **more)
        truth = AnswerKey.read(answers).truth(honest.targets)
        return replace(honest, guess=replace(honest.guess, images=truth.images))

    monkeypatch.setattr(experiments.run.attack, "attack_run", cheating)
    (card,) = run(SPLIT, out=tmp_path)
    assert card.above_ceiling is not None
    assert card.above_ceiling.startswith("above its ceiling: 12 of 12 identified")
    (said,) = [each for each in caveats(cells([card])) if "above its ceiling" in each]
    assert said.startswith("Do not trust smashed-as-image")
    (row,) = tables(cells([card]))[0]["rows"]
    assert "above its ceiling" in row["doubts"]
    assert any("above its ceiling" in str(each) for each in summary([card]))


@pytest.mark.parametrize(
    ("changes", "why"),
    [
        ({"attack": [{"name": "majority-label"}]}, "rows are identified by guessed images"),
        ({"protocol": {**SPLIT["protocol"], "rounds": 2}, "keep_rounds": "last"}, "keep_rounds"),
        ({"defense": [{"name": "nopeek"}]}, "changes the node's own training steps"),
        (
            {
                "protocol": {"name": "fedavg", "batch_size": 4, "local_steps": 1},
                "attack": [{"name": "constant-image", "targets": 2}],
                "defense": [{"name": "tests.support.stepping:Proximal"}],
            },
            "changes the node's own training steps",
        ),
    ],
)
def test_without_a_bound_there_is_a_reason_and_no_number(
    changes: dict[str, Any], why: str, tmp_path: Path
) -> None:
    (card,) = run({**SPLIT, **changes}, out=tmp_path)
    assert card.status == "done"
    assert bound(card).why is not None
    assert why in str(bound(card).why)
    assert bound(card).ceiling is None


@pytest.mark.parametrize(
    ("threat", "why"),
    [
        (ThreatModel(seat=Seat.CLIENT, evidence=frozenset({Evidence.SMASHED})), "seat is client"),
        (ThreatModel(seat=Seat.SERVER, evidence=frozenset({Evidence.ROUND_SMASHED})), "single"),
        (replace(READS, active=True), "follow the protocol"),
        (replace(READS, needs=frozenset({Knowledge.KNOWN_LABELS})), "not told known-labels"),
        (replace(READS, needs=frozenset({Knowledge.SERVER_PART})), "not told server-part"),
    ],
)
def test_who_reads_or_knows_more_is_not_bounded(threat: ThreatModel, why: str) -> None:
    with pytest.raises(NoCeilingError, match=why):
        _refuse(threat, {"identification": {}}, when="training")
    _refuse(READS, {"identification": {}}, when="training")
    blind = ThreatModel(seat=Seat.EAVESDROPPER, evidence=frozenset({Evidence.NOTHING}))
    _refuse(blind, {"identification": {}}, when="training")  # whoever reads nothing knows less


def test_an_attack_on_labels_that_is_granted_knowledge_of_its_own_is_not_bounded() -> None:
    reads = ThreatModel(seat=Seat.CLIENT, evidence=frozenset({Evidence.CUT_GRADIENT}))
    _refuse_labels(reads, {"label_accuracy": {}}, when="training", reader=Seat.CLIENT)
    kind = KnowledgeKind(
        name="every-label", in_words="all labels", grant=lambda secrets: secrets.labels
    )
    told = replace(reads, needs=frozenset({kind}))
    with pytest.raises(NoCeilingError, match="its guesser is not told every-label"):
        _refuse_labels(told, {"label_accuracy": {}}, when="training", reader=Seat.CLIENT)


def test_an_attack_that_is_told_labels_is_held_against_one_who_is_told_them_too(
    tmp_path: Path,
) -> None:
    attack = {"name": "dlm", "targets": 2, "labels": "given", "iterations": 1}
    own = {"name": "fedavg", "batch_size": 4, "local_steps": 1}
    noise = [{"name": "weight-noise", "scale": 0.3, "form": "corrected"}]
    few = {"candidates": 30, "messages": 2}
    table = {**SPLIT, "ceiling": few, "protocol": own, "defense": noise, "attack": [attack]}
    (card,) = run(table, out=tmp_path)
    assert "the row's label" in str(bound(card).told)
    blind = {**attack, "labels": "inferred"}
    (other,) = run({**table, "attack": [blind]}, out=tmp_path)
    assert "the row's label" not in str(bound(other).told)
    assert "later ones may tell" not in str(bound(other).told)  # one round
    assert float(bound(other).ceiling or 0) < float(bound(card).ceiling or 0)


def test_without_the_table_there_is_no_ceiling_and_a_wrong_key_is_refused(tmp_path: Path) -> None:
    plain = {key: value for key, value in SPLIT.items() if key != "ceiling"}
    (card,) = run(plain, out=tmp_path)
    assert card.ceiling is None
    assert "ceiling" not in card.settings
    with pytest.raises(SettingsError, match=r"ceiling.*did you mean 'candidates'"):
        load_settings({**SPLIT, "ceiling": {"candidate": 3}})
    with pytest.raises(SettingsError, match=r"ceiling\.candidates"):
        load_settings({**SPLIT, "ceiling": {"candidates": 1}})


def test_a_bound_is_a_number_or_a_reason() -> None:
    with pytest.raises(ValueError, match="or `why` there is none"):
        Bound()
    with pytest.raises(ValueError, match="or `why` there is none"):
        Bound(why="no law", ceiling=0.3)
