from dataclasses import replace
from math import cos, exp, inf, log, nan, sqrt

import numpy as np
import pytest
import torch
from torch import Tensor, nn

from defenses import GradientsScrutinizer
from defenses.gradients_scrutinizer import likeness
from leakbed.contracts import DefenseState, IllegalCombinationError
from leakbed.contracts.defense import NO_ALARM, ReturnedGradient, Run
from tests.support.played import play, random_critic


def normal(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def literal_likeness(gradients: Tensor, labels: list[int]) -> list[float]:
    same, other = [], []
    for k, one in enumerate(gradients.flatten(1)):
        for l, two in enumerate(gradients.flatten(1)):  # noqa: E741  the paper's letter
            if k != l:
                c = 0.5 + 0.5 * float(one @ two) / float(one.norm() * two.norm())
                (same if labels[k] == labels[l] else other).append(c)
    return [np.mean(same), np.std(same), np.mean(other), np.std(other)]  # type: ignore[list-item]


def literal_score(history: list[list[float]]) -> float:
    """The published formulas, by numpy's own polynomial fit."""
    steps, same, same_sd, other, other_sd = (list(column) for column in zip(*history, strict=True))

    def error(values: list[float]) -> float:
        fitted = np.polyval(np.polyfit(steps, values, 2), steps)
        return float(np.sqrt(np.mean((fitted - np.array(values)) ** 2)))

    ms, md, ss, sd = same[-1], other[-1], same_sd[-1], other_sd[-1]
    g = (ms - md) / (ms + md)
    e = (error(same) + error(other)) / 2
    top, bottom = (ms + ss, md + sd), (ms - ss, md - sd)
    v = max(0.0, min(top) - max(bottom)) / (max(top) - min(bottom))
    big_g = float(np.sign(g)) * abs(g) ** 0.4
    big_e, big_v = -log(7 * e + exp(-2)), -log(v + exp(-1))
    return 1 / (1 + exp(-5 * (big_g * big_e * big_v - 0.7)))


def test_the_likeness_of_pairs_is_the_double_loop_s() -> None:
    gradients, labels = normal(7, 2, 3), [0, 1, 1, 0, 2, 2, 2]
    found = likeness(gradients, torch.tensor(labels))
    assert found is not None
    assert found.tolist() == pytest.approx(literal_likeness(gradients, labels))


@pytest.mark.parametrize("labels", [[1, 1, 1], [0, 1, 2]])
def test_a_batch_without_both_kinds_of_pairs_is_left_out(labels: list[int]) -> None:
    assert likeness(normal(3, 4), torch.tensor(labels)) is None


@pytest.mark.parametrize("gap", [-0.2, 0.0, 0.1, 0.4])
def test_the_score_is_the_published_one(gap: float) -> None:
    history = [
        [step, 0.5 + gap + 0.02 * cos(step), 0.1, 0.45 + 0.01 * sqrt(step), 0.08]
        for step in range(1, 60)
    ]
    found = GradientsScrutinizer().score(torch.tensor(history, dtype=torch.float64))
    assert found == pytest.approx(literal_score(history), abs=1e-9)


@pytest.mark.parametrize("slope", [1e4, 1e300])
def test_a_slope_of_any_size_gives_a_score(slope: float) -> None:
    history = [[step, 0.5, 0.1, 0.5, 0.1] for step in range(1, 60)]
    found = GradientsScrutinizer(slope=slope).score(torch.tensor(history, dtype=torch.float64))
    assert found == 0


@pytest.mark.parametrize(("overlap_width", "expected"), [(0.0, 0.506), (1.0, None)])
def test_a_known_value_of_the_score(overlap_width: float, expected: float | None) -> None:
    """A gap of 0.1, no overlap, error about .005: G E V just passes 0.7, as research has it."""
    wave = 0.005 * sqrt(2)
    history = torch.tensor(
        [
            [s, 0.55 + wave * (-1) ** s, overlap_width, 0.45 + wave * (-1) ** s, overlap_width]
            for s in range(1, 201)
        ],
        dtype=torch.float64,
    )
    history[-1, 1], history[-1, 3] = 0.55, 0.45
    score = GradientsScrutinizer().score(history)
    if expected is None:
        assert score < 0.1
    else:
        assert score == pytest.approx(expected, abs=0.05)


@pytest.mark.parametrize(("rows", "batch_size"), [(100, 1), (100, 2), (2, 64)])
def test_batches_too_small_for_both_kinds_of_pairs_are_refused(rows: int, batch_size: int) -> None:
    """Such a node never had a score, and nothing said so."""
    with pytest.raises(IllegalCombinationError, match=r"batches of [12] .* 3 rows or more"):
        GradientsScrutinizer().check(rows=rows, batch_size=batch_size)
    GradientsScrutinizer().check(rows=3, batch_size=64)


@pytest.mark.parametrize(
    ("changes", "why"), [({"steps": 49}, "every = 50 .* 49 steps"), ({"classes": 1}, "1 class")]
)
def test_a_run_in_which_there_can_be_no_verdict_is_refused(
    changes: dict[str, int], why: str
) -> None:
    run = Run(classes=10, rows=64, batch_size=8, steps=50, passes=7, top=nn.Identity())
    GradientsScrutinizer().check_run(run)
    with pytest.raises(IllegalCombinationError, match=why):
        GradientsScrutinizer().check_run(replace(run, **changes))


def inspected(defense: GradientsScrutinizer, steps: int, *, alike: bool) -> DefenseState:
    state, labels = defense.begin(1), torch.arange(16) % 4
    for step in range(steps):
        rows = normal(16, 8, seed=step) * (0.2 if alike else 1.0)
        rows += torch.eye(4, 8, dtype=torch.float64)[labels] if alike else 0
        seen = ReturnedGradient(cut_gradient=rows, labels=labels, first_gradient=torch.zeros(1, 1))
        state = defense.inspect(state, seen).next()
    return state


def test_gradients_that_know_labels_pass_and_others_raise_the_alarm_when_scored() -> None:
    honest = inspected(GradientsScrutinizer(every=10), 25, alike=True)
    assert (honest.alarm, honest.score > 0.5) == (NO_ALARM, True)
    forged = inspected(GradientsScrutinizer(every=10), 25, alike=False)
    assert (forged.alarm, forged.score < 0.2) == (10, True)


def test_a_server_that_answers_zeros_is_suspicious_not_an_error() -> None:
    defense, labels = GradientsScrutinizer(every=4), torch.arange(6) % 2
    state = defense.begin(1)
    for _ in range(4):
        seen = ReturnedGradient(
            cut_gradient=torch.zeros(6, 3), labels=labels, first_gradient=torch.zeros(1, 1)
        )
        state = defense.inspect(state, seen).next()
    assert state.alarm == 4


def test_honest_gradients_know_labels_and_a_forger_s_do_not() -> None:
    """The published constants suit another network: only the forger's alarm is sure here."""
    defense = GradientsScrutinizer(every=100)
    honest = play(defense, seed=0, steps=100)[-1]
    forged = play(defense, seed=0, steps=100, forge=random_critic(0))[-1]
    gaps = [
        (state.tensors["history"][50:, 1] - state.tensors["history"][50:, 3]).mean().item()
        for state in (honest, forged)
    ]
    assert gaps[0] > 0.1
    assert gaps[0] > 5 * abs(gaps[1])
    assert forged.alarm == 100
    assert honest.score > forged.score


@pytest.mark.parametrize(
    "wrong",
    [
        {"every": 3},
        {"slope": 0.0},
        {"threshold": -0.1},
        {"slope": inf},
        {"slope": nan},
        {"offset": inf},
        {"offset": nan},
        {"threshold": nan},
    ],
)
def test_settings_out_of_range_are_refused(wrong: dict[str, float]) -> None:
    with pytest.raises(ValueError, match="gradients-scrutinizer needs"):
        GradientsScrutinizer(**wrong)  # type: ignore[arg-type]
