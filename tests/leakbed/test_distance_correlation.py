import pytest
import torch
from torch import Tensor

from leakbed.distance_correlation import corrected_correlation, distance_correlation


def rows(count: int, width: int, seed: int) -> Tensor:
    draw = torch.Generator().manual_seed(seed)
    return torch.randn(count, width, generator=draw, dtype=torch.float64)


def literal(left: Tensor, right: Tensor) -> float:
    """The definition, entry by entry."""

    def centred(x: Tensor) -> list[list[float]]:
        n = len(x)
        d = [[float((x[i] - x[j]).norm()) for j in range(n)] for i in range(n)]
        means = [sum(row) / n for row in d]
        grand = sum(means) / n
        return [[d[i][j] - means[i] - means[j] + grand for j in range(n)] for i in range(n)]

    a, b = centred(left), centred(right)

    def mean(p: list[list[float]], q: list[list[float]]) -> float:
        return sum(x * y for r, s in zip(p, q, strict=True) for x, y in zip(r, s, strict=True))

    return float((mean(a, b) / (mean(a, a) * mean(b, b)) ** 0.5) ** 0.5)


def test_the_plain_estimate_is_the_definition() -> None:
    left, right = rows(7, 3, 0), rows(7, 2, 1)
    # a distance of zero is floored, on the diagonal, to the root of 1e-7
    assert float(distance_correlation(left, right)) == pytest.approx(literal(left, right), abs=1e-3)


def test_similar_data_correlate_by_one() -> None:
    left = rows(20, 5, 0)
    assert float(distance_correlation(left, 3 * left + 1)) == pytest.approx(1, abs=1e-3)
    assert float(corrected_correlation(left, 3 * left + 1)) == pytest.approx(1, abs=1e-6)


def test_independent_data_look_dependent_to_the_plain_estimate_alone() -> None:
    pairs = [(rows(64, 3072, 2 * k), rows(64, 64, 2 * k + 1)) for k in range(5)]
    plain = sum(float(distance_correlation(*pair)) for pair in pairs) / 5
    corrected = sum(float(corrected_correlation(*pair)) for pair in pairs) / 5
    assert plain == pytest.approx(0.946, abs=0.01)
    assert corrected == pytest.approx(0, abs=0.05)


def test_images_may_have_any_shape_and_equal_rows_have_a_gradient() -> None:
    left = torch.ones(6, 1, 2, 2, requires_grad=True)
    right = rows(6, 4, 1).float()
    value = distance_correlation(left * 1, right)
    (slope,) = torch.autograd.grad(value, left)
    assert slope.isfinite().all()


@pytest.mark.parametrize("count", [60, 64])
@pytest.mark.parametrize("scale", [1.0, 100.0])
def test_a_constant_side_correlates_with_nothing(scale: float, count: int) -> None:
    constant = (scale * rows(1, 300, 0)).float().expand(count, -1)
    varied = rows(count, 20, 1).float()
    for pair in ((constant, varied), (varied, constant), (constant, constant)):
        assert float(distance_correlation(*pair)) == 0
        assert float(corrected_correlation(*pair)) == 0
