"""Recorded noise is checked in every run whose defence states a normal law, ceiling or none."""

from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from torch import Tensor

from defenses import DPCutGradient, SmashedNoise, WeightNoise
from experiments.console import summary
from experiments.report.rows import cells
from experiments.results.cards import Card
from experiments.run.ceilings import ceiling_of_run
from experiments.run.label_ceilings import recorded_gradients
from experiments.run.noise_of_run import noise_of_run
from experiments.run.recorded import Recorded
from experiments.run.runner import run
from experiments.run.training_run import TrainingRun
from leakbed.contracts import Defense, DefenseState
from leakbed.contracts.noise_laws import NoCeilingError
from leakbed.oracle.noise_checks import Finding
from strategies import PROTOCOLS, Protocol

SMASHED = {"name": "smashed-noise", "sigma": 0.5, "clip": 1.0}
GRADIENT = {"name": "dp-cut-gradient", "epsilon": 8.0, "clip": 0.1, "horizon": 4}
WEIGHTS = {"name": "weight-noise", "form": "corrected", "scale": 0.01}


OWN = Protocol(exchanges="weights", build=PROTOCOLS["fedavg"].build, parts=1)
OWN_SPLIT = Protocol(exchanges="split", build=PROTOCOLS["vanilla-split"].build, in_turn=True)


def ran(folder: Path, defense: dict[str, Any] | None, protocol: str = "vanilla-split") -> Card:
    table: dict[str, Any] = {
        "name": "small",
        "data": {"size": 200, "nodes": 2},
        "model": {"name": "mnistnet", "cut": 2},
        "protocol": {"name": protocol, "batch_size": 8, "local_steps": 3},
        "attack": [{"name": "mean-image", "targets": 2}],
        "defense": [] if defense is None else [defense],
    }
    if defense is None:
        del table["defense"]
    (card,) = run(table, out=folder)
    return card


def checked(folder: Path, *, forged: bool = False) -> list[Finding]:
    run = TrainingRun(folder=folder, utility={}, cost={})
    return noise_of_run(run.open_trace(), run.answer_key(), forged=forged)


@pytest.mark.parametrize(
    ("defense", "hook", "protocol"),
    [
        (SMASHED, (SmashedNoise, "protect_smashed"), "vanilla-split"),
        (GRADIENT, (DPCutGradient, "protect_cut_gradient"), "vanilla-split"),
        (WEIGHTS, (WeightNoise, "protect_update"), "fedavg"),
    ],
)
def test_noise_that_repeats_is_on_the_card_and_sound_noise_is_not(
    defense: dict[str, Any],
    hook: tuple[type[Defense], str],
    protocol: str,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    sound = ran(tmp_path / "sound", defense, protocol)
    (folder,) = (tmp_path / "sound" / "runs").iterdir()
    assert {each.check for each in checked(folder)} >= {"variance", "noise of two messages"}
    assert sound.noise == ()
    honest = getattr(*hook)

    def planted(self: Defense, state: DefenseState, *given: Tensor) -> Any:
        return honest(self, replace(state, messages=0, stream=1), *given)

    monkeypatch.setattr(*hook, planted)
    card = ran(tmp_path / "planted", defense, protocol)
    pairs = "recorded noise, noise of two messages: NOT what the law says"
    (said,) = [each for each in card.noise if each.startswith(pairs)]
    assert said in cells([card])[0].above_ceiling
    assert any("noise of two messages" in str(line) for line in summary([card]))


def test_what_has_no_noise_or_forged_gradients_has_nothing_to_check(tmp_path: Path) -> None:
    assert ran(tmp_path / "none", None).noise == ()
    (folder,) = (tmp_path / "none" / "runs").iterdir()
    assert checked(folder) == []
    ran(tmp_path / "forged", GRADIENT)
    (folder,) = (tmp_path / "forged" / "runs").iterdir()
    assert checked(folder, forged=True) == []


@pytest.mark.parametrize(
    ("defense", "protocol", "again"),
    [
        (WEIGHTS, "OWN", lambda run: ceiling_of_run(run, candidates=60, targets=1, draws=1)),
        (GRADIENT, "OWN_SPLIT", lambda run: next(recorded_gradients(Recorded.open(run), most=1))),
    ],
)
def test_how_nodes_of_a_protocol_of_ones_own_train_is_not_known(
    defense: dict[str, Any], protocol: str, again: Callable[[Path], object], tmp_path: Path
) -> None:
    ran(tmp_path, defense, f"{__name__}:{protocol}")
    (folder,) = (tmp_path / "runs").iterdir()
    assert checked(folder) == []
    with pytest.raises(NoCeilingError, match=rf"nodes of .*:{protocol}' train is not repeated"):
        again(folder)
