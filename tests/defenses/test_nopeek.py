from math import sqrt

import pytest
import torch
from torch import Tensor

from defenses import NoPeek
from leakbed.distance_correlation import corrected_correlation, distance_correlation
from tests.support import stepping


def normal(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def penalised(defense: NoPeek, images: Tensor, smashed: Tensor) -> Tensor | None:
    state = defense.begin(0)
    after, penalty = defense.train_step(state, stepping.step(images, smashed))
    assert after is state
    return penalty


def distances(rows: Tensor) -> list[list[float]]:
    flat = rows.flatten(1).tolist()
    return [
        [sqrt(sum((a - b) ** 2 for a, b in zip(x, y, strict=True))) for y in flat] for x in flat
    ]


def literal_plain(left: Tensor, right: Tensor) -> float:
    """Szekely, Rizzo, Bakirov 2007, definition 2.4, one sum after the other."""
    n = len(left)

    def centred(d: list[list[float]]) -> list[list[float]]:
        row = [sum(d[i]) / n for i in range(n)]
        column = [sum(d[i][j] for i in range(n)) / n for j in range(n)]
        mean = sum(row) / n
        return [[d[i][j] - row[i] - column[j] + mean for j in range(n)] for i in range(n)]

    a, b = centred(distances(left)), centred(distances(right))

    def covariance(x: list[list[float]], y: list[list[float]]) -> float:
        return sqrt(sum(x[i][j] * y[i][j] for i in range(n) for j in range(n)) / n**2)

    return covariance(a, b) / sqrt(covariance(a, a) * covariance(b, b))


def literal_corrected(left: Tensor, right: Tensor) -> float:
    """Szekely, Rizzo 2014, equations 1.2 and 1.3: U-centred distances, off the diagonal."""
    n = len(left)

    def centred(d: list[list[float]]) -> list[list[float]]:
        total = sum(map(sum, d)) / ((n - 1) * (n - 2))
        return [
            [
                d[i][j] - sum(d[i]) / (n - 2) - sum(d[k][j] for k in range(n)) / (n - 2) + total
                if i != j
                else 0.0
                for j in range(n)
            ]
            for i in range(n)
        ]

    a, b = centred(distances(left)), centred(distances(right))

    def product(x: list[list[float]], y: list[list[float]]) -> float:
        return sum(x[i][j] * y[i][j] for i in range(n) for j in range(n)) / (n * (n - 3))

    return product(a, b) / sqrt(product(a, a) * product(b, b))


@pytest.mark.parametrize("related", [True, False])
def test_both_estimates_are_their_definitions(related: bool) -> None:
    left = normal(9, 1, 2, 2)
    right = left.flatten(1)[:, :3].square() if related else normal(9, 3, seed=1)
    # Published code floors squared distances, the diagonal's zeros among them, at 1e-7.
    assert float(distance_correlation(left, right)) == pytest.approx(
        literal_plain(left, right), abs=1e-3
    )
    assert float(corrected_correlation(left, right)) == pytest.approx(
        literal_corrected(left, right), abs=1e-9
    )


def test_independent_data_read_095_plain_and_0_corrected() -> None:
    plain, corrected = [], []
    for seed in range(20):
        left, right = normal(64, 3072, seed=2 * seed), normal(64, 64, seed=2 * seed + 1)
        plain.append(float(distance_correlation(left, right)))
        corrected.append(float(corrected_correlation(left, right)))
    assert sum(plain) / 20 == pytest.approx(0.946, abs=0.005)
    deviation = torch.tensor(corrected).std().item() / sqrt(20)
    assert abs(sum(corrected) / 20) < 3 * deviation
    assert deviation < 0.01


def test_plain_cannot_tell_a_projection_from_independence_and_corrected_can() -> None:
    left = normal(64, 3072)
    projected = left @ normal(3072, 64, seed=1)
    assert float(distance_correlation(left, projected)) == pytest.approx(0.943, abs=0.01)
    assert float(corrected_correlation(left, projected)) > 0.1


@pytest.mark.parametrize("estimate", [distance_correlation, corrected_correlation])
def test_scaled_and_shifted_copies_read_1_and_constants_0(estimate: object) -> None:
    assert callable(estimate)
    left = normal(16, 5)
    assert float(estimate(left, 3 * left + 2)) == pytest.approx(1, abs=1e-6)
    assert float(estimate(left, torch.ones(16, 2, dtype=torch.float64))) == pytest.approx(
        0, abs=1e-3
    )


@pytest.mark.parametrize("estimator", ["plain", "corrected"])
def test_descending_the_penalty_makes_smashed_data_forget_the_images(estimator: str) -> None:
    defense, images = NoPeek(alpha=10.0, estimator=estimator), normal(32, 6)
    weights = normal(6, 6, seed=1).requires_grad_()
    target = normal(32, 6, seed=2)
    found = []
    for _ in range(300):
        smashed = images @ weights + target
        penalty = penalised(defense, images, smashed)
        assert penalty is not None
        found.append(float(corrected_correlation(images, smashed).detach()))
        (slope,) = torch.autograd.grad(penalty, [weights])
        assert slope.isfinite().all()
        weights = (weights - 0.05 * slope).detach().requires_grad_()
    assert found[-1] < found[0] / 2


def test_alpha_is_a_factor_and_the_inputs_stay() -> None:
    images, smashed = normal(8, 4), normal(8, 3, seed=1)
    kept = images.clone(), smashed.clone()
    one, five = (penalised(NoPeek(alpha=a), images, smashed) for a in (1.0, 5.0))
    assert one is not None
    assert five is not None
    assert float(five) == pytest.approx(5 * float(one))
    assert torch.equal(images, kept[0])
    assert torch.equal(smashed, kept[1])


@pytest.mark.parametrize(("estimator", "least"), [("plain", 2), ("corrected", 4)])
def test_a_batch_too_small_for_an_estimate_has_no_penalty(estimator: str, least: int) -> None:
    defense = NoPeek(estimator=estimator)
    assert penalised(defense, normal(least - 1, 2), normal(least - 1, 2)) is None
    assert penalised(defense, normal(least, 2), normal(least, 2, seed=1)) is not None


def test_rows_that_coincide_have_a_finite_slope() -> None:
    images, smashed = torch.zeros(6, 4), torch.zeros(6, 3, requires_grad=True)
    penalty = penalised(NoPeek(), images, smashed)
    assert penalty is not None
    penalty.backward()  # type: ignore[no-untyped-call]
    assert smashed.grad is not None
    assert smashed.grad.isfinite().all()


def test_settings_out_of_range_are_refused() -> None:
    with pytest.raises(ValueError, match="alpha >= 0, got -1"):
        NoPeek(alpha=-1.0)
    with pytest.raises(ValueError, match="plain"):
        NoPeek(estimator="plane")
