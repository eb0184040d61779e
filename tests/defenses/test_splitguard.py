from dataclasses import replace
from math import acos, exp, inf, nan, pi

import pytest
import torch
from torch import Tensor, nn

from defenses import SplitGuard
from leakbed.contracts import DefenseState, IllegalCombinationError
from leakbed.contracts.defense import NO_ALARM, ReturnedGradient, Run
from tests.support.played import play, random_critic


def literal(fake: list[Tensor], first: list[Tensor], second: list[Tensor]) -> float:
    """The published formula over lists of gradients, a = 5, b = 2."""

    def mean(vectors: list[Tensor]) -> Tensor:
        return torch.stack(vectors).mean(0)

    def norm(vectors: list[Tensor]) -> float:
        return sum(float(v.norm()) for v in vectors) / len(vectors)

    def angle(a: Tensor, b: Tensor) -> float:
        return acos(float(a @ b) / float(a.norm() * b.norm()))

    d_f = abs(norm(fake) - (norm(first) + norm(second)) / 2)
    d_r = abs(norm(first) - norm(second))
    s = angle(mean(fake), (mean(first) + mean(second)) / 2) * d_f / (d_f + d_r)
    s -= angle(mean(first), mean(second)) * d_r / (d_f + d_r)
    return (1 / (1 + exp(-5 * s))) ** 2


def seen(gradient: Tensor) -> ReturnedGradient:
    return ReturnedGradient(
        cut_gradient=torch.zeros(2, 3), labels=torch.tensor([0, 1]), first_gradient=gradient
    )


def inspected(guard: SplitGuard, gradients: list[Tensor], fakes: set[int]) -> DefenseState:
    state = guard.begin(3)
    for index, gradient in enumerate(gradients):
        state = replace(state, probing=index in fakes)
        state = replace(guard.inspect(state, seen(gradient)), probing=False).next()
    return state


def test_the_score_is_the_published_one_of_all_gradients_so_far() -> None:
    guard = SplitGuard(warm_up=0, fakes=1, threshold=0.0)
    draws = torch.Generator().manual_seed(1)
    gradients = [torch.randn(2, 3, generator=draws, dtype=torch.float64) for _ in range(12)]
    fakes = {11}
    state = inspected(guard, gradients, fakes)
    sets: dict[str, list[Tensor]] = {"fake": [gradients[11].flatten()], "first": [], "second": []}
    for index, gradient in enumerate(gradients[:11]):
        place = guard.inspect(replace(guard.begin(3), messages=index), seen(gradient)).tensors
        (name,) = {key.split(".")[0] for key in place}
        sets[name].append(gradient.flatten())
    assert min(len(each) for each in sets.values()) > 0
    assert state.score == pytest.approx(literal(**sets))


@pytest.mark.parametrize(("apart", "score"), [(0.0, 0.25), (pi, 1.0)])
def test_known_values_of_the_score(apart: float, score: float) -> None:
    """Opposite fakes of twice the size, regulars alike: S = pi; no difference at all: S = 0."""
    one = torch.tensor([1.0, 0.0], dtype=torch.float64)
    fake = one if apart == 0 else -2 * one
    tensors = {}
    for name, vector in {"fake": fake, "first": one, "second": one}.items():
        tensors |= {f"{name}.sum": vector, f"{name}.norms": vector.norm()}
        tensors[f"{name}.count"] = torch.tensor(1.0)
    assert SplitGuard().score(tensors) == pytest.approx(score, abs=1e-6)


def test_fakes_come_as_often_as_they_should_and_not_before_the_warm_up() -> None:
    guard, labels = SplitGuard(), torch.arange(10)
    states = [replace(guard.begin(5), messages=step) for step in range(4000)]
    sent = [guard.protect_labels(state, labels, classes=10) for state in states]
    assert not any(state.probing for state, _ in sent[:20])
    assert sum(state.probing for state, _ in sent[20:]) / 3980 == pytest.approx(0.1, abs=0.015)
    for state, given in sent:
        assert torch.equal(given, labels) != state.probing
    shifts = {int(given[0]) for state, given in sent if state.probing}
    assert shifts == set(range(1, 10))  # all rows of a batch by the same, and never by none
    assert all(len(set(((given - labels) % 10).tolist())) == 1 for _, given in sent)


def test_two_classes_are_swapped() -> None:
    guard = SplitGuard(probability=0.99, warm_up=0)
    state, given = guard.protect_labels(guard.begin(1), torch.tensor([0, 1, 1]), classes=2)
    assert state.probing
    assert given.tolist() == [1, 0, 0]


def test_nothing_is_noted_before_the_warm_up_is_over() -> None:
    guard = SplitGuard(warm_up=3)
    state = inspected(guard, [torch.ones(2, 2)] * 3, set())
    assert state.tensors == {}
    assert guard.inspect(state, seen(torch.ones(2, 2))).tensors


def test_no_verdict_before_enough_fakes() -> None:
    guard = SplitGuard(warm_up=0, fakes=3)
    gradients = [torch.ones(2, 2)] * 20  # a server that never tells anything apart
    assert inspected(guard, gradients, {17, 18}).alarm == NO_ALARM
    state = inspected(guard, gradients, {17, 18, 19})
    assert (state.alarm, state.score) == (20, pytest.approx(0.25))


@pytest.mark.parametrize("slope", [1e4, 1e300])
def test_a_slope_of_any_size_gives_a_score(slope: float) -> None:
    """S is negative here: fakes like regulars, regulars unlike each other."""
    one = torch.tensor([1.0, 0.0], dtype=torch.float64)
    tensors = {}
    for name, vector in {"fake": one, "first": -2 * one, "second": one}.items():
        tensors |= {f"{name}.sum": vector, f"{name}.norms": vector.norm()}
        tensors[f"{name}.count"] = torch.tensor(1.0)
    assert 0 <= SplitGuard(slope=slope).score(tensors) < 1e-6


@pytest.mark.parametrize(
    ("changes", "why"),
    [
        ({"steps": 29}, "29 batches .* 20 .* 10 fake batches"),
        ({"classes": 1}, "1 class"),
    ],
)
def test_a_run_in_which_there_can_be_no_verdict_is_refused(
    changes: dict[str, int], why: str
) -> None:
    run = Run(classes=10, rows=64, batch_size=8, steps=30, passes=4, top=nn.Identity())
    SplitGuard().check_run(run)
    with pytest.raises(IllegalCombinationError, match=why):
        SplitGuard().check_run(replace(run, **changes))


def test_gradients_of_zeros_are_suspicious_not_an_error() -> None:
    guard = SplitGuard(warm_up=0, fakes=1)
    assert inspected(guard, [torch.zeros(2, 2)] * 20, {19}).score == pytest.approx(0.25)


def test_honest_training_is_let_be_and_a_forger_is_caught() -> None:
    guard = SplitGuard(probability=0.3)
    honest = play(guard, seed=0, steps=70)[-1]
    assert (honest.alarm, honest.score > 0.9) == (NO_ALARM, True)
    forged = play(guard, seed=0, steps=70, forge=random_critic(0))[-1]
    assert 20 < forged.alarm <= 70
    assert forged.score < 0.5


@pytest.mark.parametrize(
    "wrong",
    [
        {"probability": 0.0},
        {"probability": 1.0},
        {"warm_up": -1},
        {"fakes": 0},
        {"threshold": 1.1},
        {"slope": 0.0},
        {"exponent": 0.0},
        {"slope": inf},
        {"slope": nan},
        {"exponent": inf},
        {"threshold": nan},
    ],
)
def test_settings_out_of_range_are_refused(wrong: dict[str, float]) -> None:
    with pytest.raises(ValueError, match="splitguard needs"):
        SplitGuard(**wrong)  # type: ignore[arg-type]
