"""From trace to guess to verdict, on evidence whose truth is known."""

import random
import shutil
from collections.abc import Iterator
from dataclasses import dataclass, replace
from pathlib import Path
from typing import ClassVar

import numpy as np
import pytest
import torch
from safetensors.torch import load_file, save_file

import experiments.run.attack
from clients import node_app
from experiments.run.attack import (
    Attacked,
    attack_run,
    keep_answer,
    kept_answer,
    make_attack,
)
from experiments.run.judge import judge, keep_truth
from experiments.run.prepare import prepare
from experiments.run.train import train
from experiments.run.training_run import TrainingRun
from experiments.settings.cells import cells
from experiments.settings.load import load_settings
from experiments.settings.plugins import AttackSettings
from leakbed.contracts import Evidence, Guess, Seat, ThreatModel, UnfitViewError, View
from leakbed.flower_internals import task_identity
from leakbed.grids import LocalGrid
from leakbed.oracle.truth import AnswerKey
from leakbed.seeds import derive, scoped
from leakbed.tap.trace import Trace

TABLE = {
    "name": "small",
    "data": {"size": 400, "nodes": 2},
    "model": {"name": "mnistnet", "cut": 1},
    "protocol": {"name": "vanilla-split", "batch_size": 16, "local_steps": 2},
    "attack": [{"name": "smashed-as-image", "targets": 6}],
}


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory) -> Iterator[TrainingRun]:
    with task_identity():
        prepared = prepare(cells(load_settings(TABLE))[0].training, root=None)
        grid = LocalGrid(node_app, nodes=2)
        folder = tmp_path_factory.mktemp("runs") / "one"
        yield train(prepared, grid, folder, roster=grid.roster)


def settings(**changes: object) -> AttackSettings:
    return load_settings({**TABLE, "attack": [{"name": "constant-image", **changes}]}).attack[0]


@dataclass(frozen=True, kw_only=True)
class Lottery:
    """Guesses noise; its objective tells how far one pixel is from a half."""

    name: ClassVar[str] = "constant-image"
    source: ClassVar[str] = "https://example.org"
    threat: ClassVar[ThreatModel] = ThreatModel(
        seat=Seat.SERVER, evidence=frozenset({Evidence.SMASHED})
    )

    def run(self, view: View, *, seed: int) -> Guess:
        noise = torch.Generator().manual_seed(seed % 1000)
        images = torch.rand(view.targets, 1, *view.image_shape, generator=noise)
        objective = (images[:, 0, 0, 0, 0] - 0.5).abs()
        return Guess(images=images, objective=objective, clones={"w": objective[:, None]})


@pytest.fixture
def lottery(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(experiments.run.attack.ATTACKS, "constant-image", Lottery)


@pytest.mark.usefixtures("lottery")
def test_of_several_restarts_each_target_keeps_its_lowest_objective(run: TrainingRun) -> None:
    view = View(seat=Seat.SERVER, image_shape=(1, 28, 28), num_classes=10, targets=5)
    once = [Lottery().run(view, seed=derive(7, f"restart/{k}")) for k in range(3)]
    best = attack_run(run.trace, settings(targets=5, restarts=3), stream=7, device="cpu").guess
    objectives = torch.stack([guess.objective for guess in once if guess.objective is not None])
    assert best.objective is not None
    assert torch.equal(best.objective, objectives.min(0).values)
    assert best.clones is not None
    assert torch.equal(best.clones["w"][:, 0], best.objective)
    winner = int(objectives[:, 0].argmin())
    assert best.images is not None
    assert torch.equal(best.images[0], once[winner].images[0])  # type: ignore[index]


def test_an_attacks_own_restarts_are_its_own_business() -> None:
    dlm = load_settings({**TABLE, "attack": [{"name": "dlm", "restarts": 7}]}).attack[0]
    assert make_attack(dlm).restarts == 7  # type: ignore[attr-defined]


def test_the_truth_itself_scores_one_and_the_control_does_not(run: TrainingRun) -> None:
    guessed = attack_run(run.trace, settings(targets=6), stream=1, device="cpu")
    answers = AnswerKey.read(run.answers)
    truth = answers.truth(guessed.targets)
    cheat = Attacked(
        attack=guessed.attack,
        targets=guessed.targets,
        guess=Guess(images=truth.images.clone(), labels=truth.labels.clone()),
        seconds=0.0,
    )
    verdict, _ = judge(cheat, answers, run.trace, stream=3)
    assert verdict.scores["identification"]["mean"] == 1
    assert verdict.scores["label_accuracy"]["mean"] == 1
    assert verdict.control is not None
    assert verdict.control["within"]
    honest, _ = judge(guessed, answers, run.trace, stream=3)
    assert honest.scores["identification"]["mean"] == 0


def test_failures_make_a_result_unreliable_and_are_not_dropped(run: TrainingRun) -> None:
    guessed = attack_run(run.trace, settings(targets=4), stream=1, device="cpu")
    images = torch.full((4, 1, 1, 28, 28), torch.nan)
    broken = Attacked(
        attack=guessed.attack, targets=guessed.targets, guess=Guess(images=images), seconds=0.0
    )
    verdict, _ = judge(broken, AnswerKey.read(run.answers), run.trace, stream=3)
    assert verdict.unreliable is not None
    assert "4 of 4 targets failed" in verdict.unreliable
    assert len(verdict.scores["mse"]["values"]) == 4


def test_the_share_that_stopped_on_the_budget_is_counted(run: TrainingRun) -> None:
    short = settings(name="unsplit", targets=2, outer_steps=1, input_steps=9, model_steps=9)
    falling = attack_run(run.trace, short, stream=1, device="cpu")
    answers = AnswerKey.read(run.answers)
    verdict, _ = judge(falling, answers, run.trace, stream=3)
    assert verdict.stopped_on_budget == 1
    blind = attack_run(run.trace, settings(targets=2), stream=1, device="cpu")
    assert judge(blind, answers, run.trace, stream=3)[0].stopped_on_budget is None


def test_the_victims_own_bottom_as_stolen_model_is_the_victim(run: TrainingRun) -> None:
    guessed = attack_run(run.trace, settings(targets=2), stream=1, device="cpu")
    answers = AnswerKey.read(run.answers)
    assert answers.bottom is not None
    clones = {k: torch.from_numpy(v).expand(2, *v.shape) for k, v in answers.bottom.items()}
    thief = Attacked(
        attack=guessed.attack,
        targets=guessed.targets,
        guess=Guess(images=guessed.guess.images, clones=clones),
        seconds=0.0,
    )
    verdict, _ = judge(thief, answers, run.trace, stream=3)
    stolen = verdict.scores["stolen_model"]
    assert stolen["agreement"]["mean"] == 1
    assert stolen["accuracy"]["mean"] == pytest.approx(stolen["victim_accuracy"])


def test_a_single_target_has_no_control(run: TrainingRun) -> None:
    guessed = attack_run(run.trace, settings(targets=1), stream=1, device="cpu")
    verdict, _ = judge(guessed, AnswerKey.read(run.answers), run.trace, stream=3)
    assert verdict.control is None
    assert "no negative control" in str(verdict.unreliable)


def test_an_answer_survives_the_disk_and_scores_the_same(run: TrainingRun, tmp_path: Path) -> None:
    chosen, answers = settings(targets=2), AnswerKey.read(run.answers)
    guessed = attack_run(run.trace, chosen, stream=1, device="cpu")
    assert answers.bottom is not None
    clones = {k: torch.from_numpy(v).expand(2, *v.shape) for k, v in answers.bottom.items()}
    guessed = replace(guessed, guess=replace(guessed.guess, clones=clones))
    path = tmp_path / "guess.safetensors"
    assert keep_answer(guessed, path) is None
    assert path.stat().st_mode & 0o077 == 0
    kept = kept_answer(path, make_attack(chosen))
    assert kept is not None
    assert kept.guess.images is not None
    assert torch.equal(kept.guess.images, guessed.guess.images)  # type: ignore[arg-type]
    assert list(kept.targets) == list(guessed.targets)
    assert (kept.exposure, kept.notes) == (guessed.exposure, guessed.notes)
    (first, truth), (again, _) = (
        judge(each, answers, run.trace, stream=3) for each in (guessed, kept)
    )
    assert first == again
    assert "stolen_model" in again.scores
    keep_truth(truth, tmp_path / "truth.safetensors")
    assert torch.equal(load_file(tmp_path / "truth.safetensors")["images"], truth.images)


def test_what_was_kept_otherwise_is_not_taken_for_an_answer(
    run: TrainingRun, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    chosen, path = settings(targets=2), tmp_path / "guess.safetensors"
    assert kept_answer(path, make_attack(chosen)) is None
    guessed = attack_run(run.trace, chosen, stream=1, device="cpu")
    save_file({"images": guessed.guess.images}, path)  # type: ignore[dict-item]
    assert kept_answer(path, make_attack(chosen)) is None, "an earlier version kept no targets"
    path.write_bytes(b"damaged")
    assert kept_answer(path, make_attack(chosen)) is None
    monkeypatch.setattr(experiments.run.attack, "KEPT_BYTES", 100)
    assert "to score it again is to attack anew" in str(keep_answer(guessed, path))
    assert not path.exists()


def test_the_attack_reads_the_trace_alone(run: TrainingRun, tmp_path: Path) -> None:
    copied = tmp_path / "trace"
    shutil.copytree(run.trace, copied)
    here = attack_run(run.trace, settings(targets=2), stream=1, device="cpu")
    there = attack_run(copied, settings(targets=2), stream=1, device="cpu")
    assert torch.equal(here.guess.images, there.guess.images)  # type: ignore[arg-type]
    assert Trace(copied).about == Trace(run.trace).about


def test_restarts_need_an_objective_to_choose_by(run: TrainingRun) -> None:
    with pytest.raises(UnfitViewError, match="leave restarts out"):
        attack_run(run.trace, settings(restarts=3), stream=1, device="cpu")


@dataclass(frozen=True, kw_only=True)
class Careless(Lottery):
    """Draws from every global generator, as most code does."""

    def run(self, view: View, *, seed: int) -> Guess:
        drawn = torch.rand(view.targets, 1, *view.image_shape)
        drawn[0] = random.random()
        drawn[1] = float(np.random.rand())  # noqa: NPY002  the global one is the point
        return Guess(images=drawn, objective=drawn.flatten(1).mean(1))


@pytest.mark.parametrize("restarts", [1, 2])
def test_an_attack_that_draws_from_the_global_generators_is_the_same_again(
    run: TrainingRun, monkeypatch: pytest.MonkeyPatch, restarts: int
) -> None:
    monkeypatch.setitem(experiments.run.attack.ATTACKS, "constant-image", Careless)

    def found(*, ambient: int, stream: int = 7) -> torch.Tensor:
        with scoped(ambient):
            chosen = settings(targets=4, restarts=restarts)
            images = attack_run(run.trace, chosen, stream=stream, device="cpu").guess.images
            after.append((torch.rand(1).item(), random.random(), np.random.rand()))  # noqa: NPY002
        assert images is not None
        return images

    after: list[object] = []
    once = found(ambient=1)
    assert torch.equal(found(ambient=2), once)
    assert not torch.equal(found(ambient=1, stream=8), once)
    monkeypatch.setitem(experiments.run.attack.ATTACKS, "constant-image", Lottery)
    found(ambient=1)  # draws from its own seed alone; the tests' type checks draw as before
    assert after[0] == after[-1]  # they are put back
