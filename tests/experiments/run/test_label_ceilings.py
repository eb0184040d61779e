"""The ceiling of canary labels: gradients are made again, noise is checked, games stay apart."""

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from typer.testing import CliRunner

import experiments.run.attack
from defenses import LabelDP
from experiments.cli import app
from experiments.report.rows import cells
from experiments.report.tables import tables
from experiments.results.cards import Card
from experiments.run import label_ceilings
from experiments.run.attack import Attacked, attack_run
from experiments.run.label_ceilings import answers_of, label_ceiling_of_run
from experiments.run.label_holders import begun, rows_of
from experiments.run.recorded import Recorded
from experiments.run.runner import run
from experiments.settings.schema import SettingsError
from leakbed.contracts.noise_laws import Channel, NoCeilingError, of_answers
from leakbed.events import Phase, Target
from leakbed.oracle.caps import budget_cap
from leakbed.oracle.truth import AnswerKey
from tests.support.canaries import FEDAVG, PLAIN, SMALL, STRIPS, TABLE, U_SHAPED, only, splitfed

NOISE = [{"name": "dp-cut-gradient", "epsilon": 2.0, "clip": 0.1, "horizon": 4}]


@pytest.fixture(scope="module")
def noised(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Card]:
    folder = tmp_path_factory.mktemp("noised")
    (card,) = run({**TABLE, "defense": NOISE}, out=folder)
    return only(folder), card


@pytest.fixture(scope="module")
def bare(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("bare")
    run(TABLE, out=folder)
    return only(folder)


def test_a_top_stepped_again_makes_the_recorded_gradients(noised: tuple[Path, Card]) -> None:
    found = label_ceiling_of_run(noised[0], targets=2, draws=200, kappa=0.6)
    assert all(each.sound for each in found.findings), list(map(str, found.findings))
    assert {each.check for each in found.findings} >= {"mean", "variance", "noise of two messages"}
    assert found.chance < found.value < 1
    assert found.cap is not None
    alone = label_ceiling_of_run(noised[0], targets=2, draws=200, span="message")
    for each, own in zip(found.messages, alone.messages, strict=True):
        assert own.read == 1 < each.read
        assert own.ceiling <= float(own.cap or 0) + 3 * own.error
        assert each.alone == own.ceiling
        assert each.ceiling > own.ceiling - 4 * own.error
        assert 0.6 < float(each.inputs or 0) < 1
    assert "With the inputs" in found.lines()[-len(found.findings) - 1]


def test_a_canary_that_is_first_used_later_is_reached_with_adams_memory(
    noised: tuple[Path, Card], monkeypatch: pytest.MonkeyPatch
) -> None:
    honest = label_ceilings._first_uses

    def later(*given: Any, **more: Any) -> list[Any]:
        return [target for target in honest(*given, **more) if target.round == 2]

    monkeypatch.setattr(label_ceilings, "_first_uses", later)
    found = label_ceiling_of_run(noised[0], targets=3, draws=2, span="message")
    assert {each.round for each in found.messages} == {2}
    assert all(each.sound for each in found.findings), list(map(str, found.findings))


def test_a_canary_that_is_in_its_batch_twice_has_a_cap_of_both_rows(
    noised: tuple[Path, Card],
) -> None:
    run_ = Recorded.open(noised[0])
    (at, batch), row = next(iter(run_.key.order.items())), run_.key.canaries[0]
    once, twice = ([row, *batch[1:]], [row, row, *batch[2:]])
    target = Target(node=at[0], round=at[1], step=at[2], row=0, phase=Phase.TRAIN)
    caps = []
    for rows in (once, twice):
        key = replace(run_.key, order={**run_.key.order, at: rows})
        game = label_ceilings._Game(replace(run_, key=key), draws=200, kappa=None)
        found = game.of_gradients(target, until=at[1], one=True)
        assert found.ceiling <= float(found.cap or 0) + 3 * found.error
        caps.append(float(found.cap or 0))
    assert caps[0] < caps[1] < 1


def test_noise_that_follows_the_batch_tells_more_with_every_gradient(tmp_path: Path) -> None:
    noise = [{"name": "iso-noise", "ratio": 12.0}]
    run({**TABLE, "attack": [{"name": "majority-label"}], "defense": noise}, out=tmp_path)
    found = label_ceiling_of_run(only(tmp_path), targets=2, draws=100)
    assert all(each.sound for each in found.findings), list(map(str, found.findings))
    assert {each.read for each in found.messages} == {8}
    for each in found.messages:
        assert found.chance < each.alone < each.ceiling < 1
        assert each.error < 0.03
        assert each.cap is None


def test_without_noise_every_label_is_named(bare: Path) -> None:
    found = label_ceiling_of_run(bare, targets=1, kappa=0.5)
    assert found.value == pytest.approx(1.0)
    assert {each.hit for each in found.messages} == {1.0}
    assert found.cap is None
    assert any("With the inputs there is no bound" in line for line in found.lines())
    labels = AnswerKey.read(bare / "answers").labels
    shares = torch.bincount(labels).double() / len(labels)
    assert found.chance == pytest.approx(float(shares.max()))


def test_a_card_is_held_against_its_canaries_alone(
    noised: tuple[Path, Card], monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    bound = noised[1].ceiling
    assert bound is not None
    assert (bound.game, bound.seat, bound.candidates) == ("canary label", "client", 10)
    assert 0 < int(bound.targets or 0) < 48  # some attacked rows are canaries
    assert noised[1].above_ceiling is None
    (row, *_) = tables(cells([noised[1]]))[0]["rows"]
    assert any("canaries" in note for each in row["metrics"] for note in each["notes"])

    def cheating(trace: Path, *given: Any, answers: Path, **more: Any) -> Attacked:
        honest = attack_run(trace, *given, answers=answers, **more)
        labels = AnswerKey.read(answers).labels_of(honest.targets)
        return replace(honest, guess=replace(honest.guess, labels=labels))

    monkeypatch.setattr(experiments.run.attack, "attack_run", cheating)
    (card,) = run({**TABLE, "defense": NOISE}, out=tmp_path)
    assert "canary labels named" in str(card.above_ceiling)


@pytest.mark.parametrize("changes", [{}, U_SHAPED, STRIPS])
def test_labels_answered_at_random_are_guessed_through_the_answers(
    changes: dict[str, Any], tmp_path: Path
) -> None:
    defense = [{"name": "label-dp", "epsilon": 1.0}]
    run({**SMALL, "defense": defense, **changes}, out=tmp_path)
    span = "message" if changes is STRIPS else "training"
    found = label_ceiling_of_run(only(tmp_path), targets=2, kappa=0.5, span=span)
    labels = AnswerKey.read(only(tmp_path) / "answers").labels
    shares = torch.bincount(labels, minlength=10).double() / len(labels)
    answers = answers_of([LabelDP(epsilon=1.0)], classes=10)
    assert answers is not None
    wanted = of_answers(Channel(answers=answers), shares)
    assert found.value == pytest.approx(wanted)
    assert float(found.cap or 0) == pytest.approx(budget_cap(1.0, 0.0, chance=found.chance))
    assert [each.alone for each in found.messages] == [pytest.approx(wanted)] * 2
    assert 0.5 < float(found.messages[0].inputs or 0) < 1


def test_a_head_noises_its_gradients_and_the_servers_attack_is_held_against_them(
    tmp_path: Path,
) -> None:
    attack = {"name": "similarity-distance", "seat": "server", "collect": "first", "partial": True}
    changes = {**U_SHAPED, "defense": NOISE, "attack": [{**attack, "targets": 32}]}
    (card,) = run({**SMALL, **changes, "ceiling": {"messages": 2, "draws": 4}}, out=tmp_path)
    bound = card.ceiling
    assert bound is not None, card
    assert (bound.game, bound.seat, bound.doubts) == ("canary label", "server", ()), bound.why
    recorded = Recorded.open(only(tmp_path))
    holder, steps = begun(recorded, 1, until=2)
    for step in steps:
        holder.train(step, [recorded.key.labels[rows_of(recorded, batch)] for batch in step])
    right = sum(holder.right(2)) / len(recorded.key.test_labels)
    assert right == pytest.approx(card.utility["test_accuracy"])  # which the server is told
    found = label_ceiling_of_run(only(tmp_path), targets=2, draws=100)
    assert {"variance", "mean"} <= {each.check for each in found.findings}
    assert found.chance < found.messages[0].alone < found.value


def test_updates_with_noise_and_a_loss_beside_them_tell_labels(tmp_path: Path) -> None:
    noise = [{"name": "local-dp", "epsilon": 8.0, "clip": 0.1}]
    run({**SMALL, **FEDAVG, "defense": noise}, out=tmp_path)
    found = label_ceiling_of_run(only(tmp_path), targets=2, draws=20)
    assert all(each.sound for each in found.findings), list(map(str, found.findings))
    assert "variance" in {each.check for each in found.findings}


def test_a_run_without_canaries_has_no_game(tmp_path: Path) -> None:
    run({**SMALL, "data": {"size": 130, "nodes": 2}}, out=tmp_path)
    with pytest.raises(NoCeilingError, match=r"set data\.canaries"):
        label_ceiling_of_run(only(tmp_path))


@pytest.mark.parametrize(
    ("changes", "why"),
    [
        (splitfed("splitfed-v2", labels="shared"), "both sides have them"),
        (
            {"defense": [{"name": "label-dp", "mechanism": "rr-with-prior"}]},
            "label-dp states no chances of its answers",
        ),
        (
            {**U_SHAPED, "protocol": {**U_SHAPED["protocol"], "bottoms": "relayed"}},
            "heads pass the server in the clear",
        ),
        (
            {**U_SHAPED, "defense": [{"name": "adversarial-training"}]},
            "is handed labels at the node",
        ),
        ({**FEDAVG, "defense": [{"name": "adversarial-training"}]}, "adversarial-training changes"),
        ({"protocol": {**PLAIN, "name": "tests.support.own_requests:LOCAL_LOSS"}}, "is not repeat"),
    ],
)
def test_canaries_nobody_could_be_held_against_are_refused_before_training(
    changes: dict[str, Any], why: str, tmp_path: Path
) -> None:
    with pytest.raises(SettingsError, match=rf"data\.canaries is 40, but .*{why}"):
        run({**SMALL, **changes}, out=tmp_path)
    assert not (tmp_path / "runs").exists()


def test_the_command_prints_text_or_json(noised: tuple[Path, Card]) -> None:
    few = ["label-ceiling", str(noised[0]), "--targets", "1", "--span", "message"]
    text = CliRunner().invoke(app, few)
    assert text.exit_code == 0, text.output
    assert "of a canary's label" in text.output
    table = json.loads(CliRunner().invoke(app, [*few, "--json"]).output)
    assert table["game"] == "canary"
    for wrong in (["--span", "round"], ["--kappa", "1.5"]):
        refused = CliRunner().invoke(app, [*few, *wrong])
        assert refused.exit_code == 2
        assert wrong[1] in refused.output
