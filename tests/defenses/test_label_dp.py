from math import exp
from typing import Any

import pytest
import torch
from torch import nn

from defenses import LabelDP
from leakbed.contracts import IllegalCombinationError
from leakbed.contracts.defense import Run

ROWS = 200_000
LABELS = torch.randint(10, (ROWS,), generator=torch.Generator().manual_seed(0))
ERROR = 4 * (0.25 / ROWS) ** 0.5  # four standard errors of a share, at most


def noised(labels: torch.Tensor = LABELS, classes: int = 10, **settings: Any) -> torch.Tensor:
    return LabelDP(**settings).noised_labels(7, labels, classes=classes)


@pytest.mark.parametrize("epsilon", [0.1, 1.0, 5.0])
@pytest.mark.parametrize("classes", [2, 10])
def test_labels_are_kept_as_often_as_randomised_response_says(epsilon: float, classes: int) -> None:
    made = noised(LABELS % classes, classes, epsilon=epsilon)
    kept = (made == LABELS % classes).float().mean().item()
    assert kept == pytest.approx(exp(epsilon) / (exp(epsilon) + classes - 1), abs=ERROR)


def test_every_other_label_is_as_likely() -> None:
    made = noised(torch.full((ROWS,), 3), 5, epsilon=1.0)
    shares = torch.bincount(made, minlength=5) / ROWS
    other = 1 / (exp(1.0) + 4)
    expected = torch.tensor([other, other, other, exp(1.0) * other, other])
    torch.testing.assert_close(shares, expected, atol=ERROR, rtol=0)


def test_a_samples_label_is_drawn_once() -> None:
    assert torch.equal(noised(), noised())
    other = LabelDP().noised_labels(8, LABELS, classes=10)
    assert not torch.equal(noised(), other)
    assert noised().dtype == LABELS.dtype


@pytest.mark.parametrize(
    ("prior", "epsilon", "expected"),
    [
        # w_k = e^eps / (e^eps + k - 1) * (sum of the k largest shares), by hand
        ([0.25] * 4, 1.0, 4),  # e / (e + 3) = 0.475 beats 0.25, 0.366, 0.432
        ([0.7, 0.2, 0.05, 0.05], 1.0, 1),  # 0.7 beats 0.731 * 0.9 = 0.658
        ([0.45, 0.45, 0.05, 0.05], 1.0, 2),  # 0.658 beats 0.45, 0.547, 0.475
        ([0.05, 0.45, 0.05, 0.45], 1.0, 2),  # in any order
        ([0.7, 0.2, 0.05, 0.05], 3.0, 4),  # 0.870 beats 0.7, 0.857, 0.864
    ],
)
def test_the_prior_says_how_many_classes_are_answered(
    prior: list[float], epsilon: float, expected: int
) -> None:
    assert LabelDP(epsilon=epsilon).answered(torch.tensor(prior)) == expected


PRIOR = (0.05, 0.45, 0.05, 0.45)


def answers(label: int, **settings: Any) -> torch.Tensor:
    """How often each class is answered for one label, under a prior of two likely classes."""
    chosen = {"mechanism": "rr-with-prior", "prior": PRIOR, **settings}
    return torch.bincount(noised(torch.full((ROWS,), label), 4, **chosen), minlength=4) / ROWS


def test_a_label_among_the_likely_ones_is_one_of_them_after_all() -> None:
    keep = exp(1.0) / (exp(1.0) + 1)
    expected = torch.tensor([0, keep, 0, 1 - keep])
    torch.testing.assert_close(answers(1), expected, atol=ERROR, rtol=0)


def test_any_other_label_becomes_one_of_the_likely_ones() -> None:
    expected = torch.tensor([0, 0.5, 0, 0.5])
    torch.testing.assert_close(answers(0), expected, atol=ERROR, rtol=0)


def test_the_published_form_betrays_labels_outside_and_the_corrected_one_does_not() -> None:
    published = answers(0, form="published")
    torch.testing.assert_close(published, torch.full((4,), 0.25), atol=ERROR, rtol=0)
    assert answers(1, form="published")[0] == 0  # so an answer of 0 proves that the label was not 1
    pairs = [(answers(a), answers(b)) for a, b in ((0, 1), (1, 3), (0, 2))]
    for one, two in pairs:
        likely = one[[1, 3]] / two[[1, 3]]
        assert torch.maximum(likely, 1 / likely).max().item() <= exp(1.0) * 1.03


def test_without_a_prior_the_labels_frequencies_are_taken() -> None:
    skewed = torch.tensor([2] * 900 + [0] * 50 + [1] * 50)
    assert noised(skewed, 3, mechanism="rr-with-prior").unique().tolist() == [2]


def test_a_prior_of_other_classes_is_refused_before_training() -> None:
    run = Run(classes=10, rows=9, batch_size=3, steps=3, passes=1, top=nn.Identity())
    defense = LabelDP(mechanism="rr-with-prior", prior=PRIOR)
    with pytest.raises(IllegalCombinationError, match="a prior of 4 classes, this task has 10"):
        defense.check_run(run)
    LabelDP().check_run(run)


def test_labels_that_are_no_classes_are_refused() -> None:
    with pytest.raises(IllegalCombinationError, match=r"noises classes, .* torch.float32"):
        LabelDP().noised_labels(7, torch.tensor([0.5, 1.5]), classes=2)


@pytest.mark.parametrize("epsilon", [0.0, -1.0, float("inf"), float("nan")])
def test_an_epsilon_that_is_not_above_0_is_refused(epsilon: float) -> None:
    with pytest.raises(ValueError, match=r"label-dp needs a finite epsilon > 0, got"):
        LabelDP(epsilon=epsilon)


@pytest.mark.parametrize(
    ("settings", "told"),
    [
        ({"mechanism": "rr"}, "rr-with-prior"),
        ({"form": "right"}, "corrected"),
        ({"prior": (0.5, 0.5)}, "are rr-with-prior's alone"),
        ({"form": "published"}, "are rr-with-prior's alone"),
        ({"mechanism": "rr-with-prior", "prior": (0.5, 0.6)}, "shares that add up to 1"),
        ({"mechanism": "rr-with-prior", "prior": (1.5, -0.5)}, "shares that add up to 1"),
    ],
)
def test_illegal_settings_are_refused(settings: dict[str, Any], told: str) -> None:
    with pytest.raises(ValueError, match=told):
        LabelDP(**settings)
