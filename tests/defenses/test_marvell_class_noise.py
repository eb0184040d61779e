import numpy as np
import pytest
import torch

from defenses.marvell import Classes, divergence, least_divergence, measured

CASES = {
    "even": Classes(share=0.5, positive=1.0, negative=1.0, distance=4.0, entries=3),
    "wide positives": Classes(share=0.1, positive=2.0, negative=0.1, distance=3.0, entries=4),
    "wide negatives": Classes(share=0.3, positive=0.05, negative=1.0, distance=1.0, entries=8),
    "one entry": Classes(share=0.2, positive=0.3, negative=0.7, distance=5.0, entries=1),
    "no spread": Classes(share=0.4, positive=1e-9, negative=2e-9, distance=1.0, entries=6),
}


def brute_force(classes: Classes, power: float) -> float:
    """The least divergence on grids of all four variances, each finer about the last one's best."""
    across, share, rest = classes.entries - 1, classes.share, 1 - classes.share
    scales = np.array([power / share, power / share, power / rest, power / rest])
    coarse = np.array([0.0, 1e-9, 1e-6, 1e-3, 0.03, 0.1, 0.3, 1.0])
    best, least, reach = np.zeros(4), np.inf, 10.0
    while reach > 1.001:
        fine = np.geomspace(1 / reach, reach, 7)
        axes = [
            np.concatenate([scale * coarse, value * fine])
            for value, scale in zip(best, scales, strict=True)
        ]
        grid = np.meshgrid(*axes, indexing="ij", sparse=True)
        along1, across1, along0, across0 = grid
        spent = share * (along1 + across * across1) + rest * (along0 + across * across0)
        legal = (spent <= power * (1 + 1e-9)) & (along1 >= across1) & (along0 >= across0)
        b1, b0 = classes.positive + across1, classes.negative + across0
        a1, a0, g = classes.positive + along1, classes.negative + along0, classes.distance
        total = across * (b0 / b1 + b1 / b0) + (a0 + g) / a1 + (a1 + g) / a0
        values = np.where(legal, total, np.inf) / 2 - classes.entries
        place = np.unravel_index(values.argmin(), values.shape)
        if values[place] < least:
            least = float(values[place])
            best = np.array([axis[at] for axis, at in zip(axes, place, strict=True)])
        reach = reach**0.7
    return least


@pytest.mark.parametrize("scale", [0.1, 1.0, 10.0])
@pytest.mark.parametrize("classes", CASES.values(), ids=list(CASES))
def test_no_noise_of_the_same_power_makes_classes_more_alike(
    classes: Classes, scale: float
) -> None:
    power = scale * classes.distance
    noise = least_divergence(classes, power=power)
    assert noise.power(classes) <= power * (1 + 1e-9)
    assert noise.positive_along >= noise.positive_across >= 0
    assert noise.negative_along >= noise.negative_across >= 0
    found, grid = divergence(classes, noise), brute_force(classes, power)
    assert found <= grid * (1 + 1e-9)
    assert grid <= found * 1.02  # the grid is no strawman


def test_the_closed_case_by_hand() -> None:
    # One entry, even classes: all power goes along the line, alike to both: (1 + s + g) / (1 + s).
    classes = Classes(share=0.5, positive=1.0, negative=1.0, distance=4.0, entries=1)
    noise = least_divergence(classes, power=3.0)
    assert noise.positive_along == pytest.approx(3.0, rel=1e-4)
    assert noise.negative_along == pytest.approx(3.0, rel=1e-4)
    assert divergence(classes, noise) == pytest.approx((1 + 3 + 4) / (1 + 3) - 1)


def test_the_mirrored_problem_has_the_mirrored_answer() -> None:
    classes = CASES["wide positives"]
    one = least_divergence(classes, power=2.0)
    assert least_divergence(classes.mirrored(), power=2.0) == one.mirrored()


def test_classes_are_measured() -> None:
    rows = torch.tensor([[1.0, 0.0], [3.0, 0.0], [0.0, 2.0]])
    found = measured(rows, torch.tensor([True, True, False]))
    assert found.share == pytest.approx(2 / 3)
    assert found.positive == pytest.approx(0.5)  # 1 in one entry, 0 in the other
    assert found.negative == pytest.approx(4e-9)  # one row has none of its own
    assert (found.distance, found.entries) == (pytest.approx(8.0), 2)
