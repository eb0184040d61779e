"""The ceiling against closed forms, and each shortcut against the long way."""

import math

import pytest
import torch
from scipy.integrate import quad
from scipy.stats import binom, norm

from leakbed.contracts.noise_laws import (
    Channel,
    Fixed,
    Laplace,
    Law,
    NoCeilingError,
    Normal,
    alike,
    of_answers,
)
from leakbed.oracle.caps import cap
from leakbed.oracle.ceiling import beliefs, ceiling, label_ceiling, points
from leakbed.oracle.messages import Messages, flat


def rows(means: torch.Tensor, sigma: float) -> Messages:
    return Messages.of_rows(alike({"smashed": means}, sigma))


def orthogonal(count: int, mu: float, guesses: int = 1) -> float:
    def density(t: float) -> float:
        others = binom.cdf(guesses - 1, count - 1, norm.sf(t))
        return float(norm.pdf(t - mu) * others)

    return float(quad(density, mu - 9, mu + 9, epsabs=1e-9)[0])


@pytest.mark.parametrize(
    ("count", "mu", "guesses", "value"),
    [
        (10, 2, 1, 0.6736),
        (100, 3, 1, 0.6779),
        (1000, 4, 1, 0.7640),
        (100, 2, 8, 0.7129),
        (1000, 3, 40, 0.8928),
    ],
)
def test_orthogonal_candidates_reach_the_integral(
    count: int, mu: float, guesses: int, value: float
) -> None:
    assert orthogonal(count, mu, guesses) == pytest.approx(value, abs=2e-4)
    draws = max(8, 12000 // count)
    found = ceiling(rows(mu * torch.eye(count), 1.0), guesses=(guesses,), draws=draws, stream=1)
    assert found[guesses].error < 0.004
    assert abs(found[guesses].value - orthogonal(count, mu, guesses)) < 3 * found[guesses].error
    assert found[guesses].chance == guesses / count


def test_two_candidates_on_a_line_reach_the_arctangent() -> None:
    generator = torch.Generator().manual_seed(5)
    sigma, spread, weight, values = 0.7, 1.0, 1.0, []
    for context in range(1500):
        pair = weight * spread * torch.randn(2, 1, generator=generator)
        values.append(ceiling(rows(pair, sigma), draws=8, stream=10_000 + context)[1].value)
    found = torch.tensor(values)
    error = float(found.std()) / math.sqrt(len(values))
    wanted = 0.5 + math.atan(weight * spread / (math.sqrt(2) * sigma)) / math.pi
    assert wanted == pytest.approx(0.7516, abs=5e-4)
    assert error < 0.004
    assert abs(float(found.mean()) - wanted) < 3 * error


@pytest.mark.parametrize(
    ("count", "axes", "sigma", "value", "contexts"),
    [(200, 8, 1.0, 0.3127, 40), (1000, 16, 0.5, 0.9871, 3)],
)
def test_normal_data_reach_the_known_value(
    count: int, axes: int, sigma: float, value: float, contexts: int
) -> None:
    found = []
    for context in range(contexts):
        data = torch.randn(count, axes, generator=torch.Generator().manual_seed(context))
        found.append(ceiling(rows(data, sigma), draws=4, stream=900 + context)[1])
    values = torch.tensor([each.value for each in found])
    error = float(values.std()) / math.sqrt(contexts)  # of the data and of the draws
    assert error < 0.004
    assert abs(float(values.mean()) - value) < 3 * error


def test_long_messages_are_points_of_few_axes_with_the_same_ceiling() -> None:
    means = torch.randn(40, 3000, generator=torch.Generator().manual_seed(0)) * 0.05
    messages = rows(means, 1.0)
    places = points(messages).places
    assert places.shape[1] < 40
    wanted = torch.cdist(means.double(), means.double())
    assert torch.allclose(torch.cdist(places, places), wanted, atol=1e-3)
    short = ceiling(messages, guesses=(1, 5), draws=60, stream=1)
    uneven = Normal(mean={"smashed": means}, deviation={"smashed": torch.linspace(1, 1 + 1e-9, 40)})
    long = ceiling(Messages.of_rows(uneven), guesses=(1, 5), draws=60, stream=2)
    for length in (1, 5):
        both = math.hypot(short[length].error, long[length].error)
        assert abs(short[length].value - long[length].value) < 4 * both
        # The posterior mass is the optimal guess's hit rate, candidate by candidate on the mean.
        assert float(short[length].records.mean()) == pytest.approx(short[length].value, abs=0.05)


def test_no_noise_names_what_differs_and_endless_noise_nothing() -> None:
    means = torch.eye(12)
    means[1] = means[0]
    exact = ceiling(Messages.of_rows(Fixed(mean={"smashed": means})), draws=1, stream=0)[1]
    assert exact.value == pytest.approx(11 / 12)
    labels = torch.arange(12) % 4
    blind = rows(means, 1e6)
    assert ceiling(blind, guesses=(2,), stream=0)[2].value == pytest.approx(2 / 12, abs=1e-3)
    told = ceiling(blind.beside(labels), guesses=(2,), stream=0)[2].value
    assert told == pytest.approx(2 * 4 / 12, abs=1e-3)


def test_a_loss_in_the_clear_is_in_the_message() -> None:
    losses = torch.linspace(2.1, 2.4, 100)
    named = ceiling(rows(torch.eye(100), 1e6).beside(losses), stream=0)[1].value
    assert named == pytest.approx(1.0)


def test_noise_that_follows_the_candidate_tells_it() -> None:
    means, count, entries = torch.zeros(2, 4000), 2, 4000
    law = Normal(mean={"smashed": means}, deviation={"smashed": torch.tensor([1.0, 1.1])})
    assert ceiling(Messages.of_rows(law), draws=20, stream=3)[1].value > 0.999
    assert (count, entries) == tuple(means.shape)


def test_laplace_noise_is_told_by_its_own_density() -> None:
    """Two candidates on a line: the ceiling is 1/2 plus half the total variation distance."""
    gap, first, second = 1.5, 1.0, 0.6
    laws = [
        Laplace(
            mean={"w": torch.tensor([place])},
            scales={"w": (torch.tensor(first), torch.tensor(second))},
        )
        for place in (0.0, gap)
    ]

    def density(x: float) -> float:
        a, b = first, second
        x = abs(x)
        return (a * math.exp(-x / a) - b * math.exp(-x / b)) / (2 * (a * a - b * b))

    assert quad(density, -40, 40)[0] == pytest.approx(1, abs=1e-6)
    wanted = 0.5 * quad(lambda x: max(density(x), density(x - gap)), -40, 40, limit=400)[0]
    found = ceiling(Messages.of(laws), draws=4000, stream=4)[1]
    assert abs(found.value - wanted) < 4 * found.error
    assert found.error < 0.004


def test_labels_behind_answers_at_random_are_told_by_both_noises() -> None:
    answers, prior = torch.tensor([[0.8, 0.2], [0.3, 0.7]]), torch.tensor([0.6, 0.4])
    joint = prior.unsqueeze(1) * answers
    shares = joint.sum(0)
    of = (joint / shares).T
    clear = Messages.of_rows(Fixed(mean={"smashed": torch.eye(2)}))
    assert label_ceiling(clear, of, stream=1, prior=shares)[0] == pytest.approx(
        of_answers(Channel(answers=answers), prior), abs=1e-6
    )
    means, sigma = torch.tensor([[0.0], [1.0]]), 0.7
    found, error = label_ceiling(rows(means, sigma), of, draws=40_000, stream=2, prior=shares)
    assert error < 0.004

    def best(x: float) -> float:
        sent = [norm.pdf(x, float(mean), sigma) for mean in means]
        return max(sum(float(joint[y, a]) * sent[a] for a in range(2)) for y in range(2))

    assert found == pytest.approx(quad(best, -6, 7)[0], abs=3 * error)


def test_a_recorded_message_names_its_candidate_and_a_strange_one_is_refused() -> None:
    means = 5 * torch.eye(6)
    messages = rows(means, 1.0)
    believed = beliefs(messages, means + 0.1)
    assert torch.equal(believed.argmax(1), torch.arange(6))
    fixed = Messages.of_rows(Fixed(mean={"smashed": means}))
    assert torch.equal(beliefs(fixed, means).argmax(1), torch.arange(6))
    with pytest.raises(NoCeilingError, match="could have been sent by no candidate"):
        beliefs(fixed, means + 1)


def test_labels_answered_at_random_have_a_closed_form() -> None:
    classes, epsilon = 10, 1.0
    keep = 1 / (1 + (classes - 1) * math.exp(-epsilon))
    answers = torch.full((classes, classes), (1 - keep) / (classes - 1))
    answers.fill_diagonal_(keep)
    even = torch.full((classes,), 1 / classes)
    assert of_answers(Channel(answers=answers), even) == pytest.approx(0.23197, abs=1e-5)


def test_a_pool_of_labelled_candidates_tells_labels_by_their_posterior() -> None:
    messages, labels = (
        rows(torch.tensor([[0.0], [0.0], [1.0], [1.0]]), 0.6),
        torch.eye(2)[[0, 0, 1, 1]],
    )
    value, error = label_ceiling(messages, labels, draws=20_000, stream=3)
    # Two points at distance d: the nearer one is right with chance Phi(d / 2 sigma).
    assert error < 0.002
    assert value == pytest.approx(norm.cdf(1 / 1.2), abs=3 * error)
    assert label_ceiling(messages, torch.ones(4, 1), stream=3)[0] == 1.0
    alone = ceiling(messages, draws=20_000, stream=4)[1]
    assert alone.value == pytest.approx(value / 2, abs=0.004)  # equal rows cannot be told apart
    mixed = label_ceiling(messages, torch.eye(2)[[0, 1, 0, 1]], stream=3)
    assert mixed[0] == pytest.approx(0.5)


def test_caps_follow_from_the_radius() -> None:
    assert cap(0.0, chance=0.01) == pytest.approx(0.01)
    assert cap(4.0, chance=0.001) == pytest.approx(0.819, abs=5e-4)
    assert rows(torch.eye(4), 1.0).mu is None
    clipped = Messages.of_rows(alike({"smashed": torch.eye(4)}, 0.5, radius=1.0))
    assert clipped.mu == 2.0
    found = ceiling(Messages.of_rows(alike({"smashed": torch.eye(50)}, 0.5, radius=1.0)), stream=0)
    assert found[1].value < cap(2.0, chance=0.02)


def test_flat_keeps_the_order_of_names() -> None:
    assert flat({"b": torch.tensor([1.0]), "a": torch.tensor([[2.0, 3.0]])}).tolist() == [1, 2, 3]


def test_the_error_counts_the_truths_that_were_not_looked_at() -> None:
    """Half of the candidates are always named, half never: a few truths do not say how many."""
    means = torch.cat([100 * torch.eye(100), torch.zeros(100, 100)])
    messages = Messages.of([alike({"w": mean}, 1.0) for mean in means])
    random = torch.Generator().manual_seed(3)
    chosen = [torch.randperm(200, generator=random)[:20] for _ in range(100)]
    found = [ceiling(messages, stream=i, truths=c)[1] for i, c in enumerate(chosen)]
    spread = torch.tensor([each.value for each in found]).std()
    assert sum(each.error for each in found) / 100 == pytest.approx(float(spread), rel=0.2)
    assert ceiling(messages, stream=1)[1].error < 0.001


def test_losses_that_differ_by_units_in_the_last_place_are_told_apart() -> None:
    """Who trains again as the node does has the very loss: rounding alone hides what differs."""
    law = [alike({"w": torch.zeros(2)}, 1.0)] * 3
    losses = 2.3 * (1 + torch.tensor([0.0, 5e-7, 1.0], dtype=torch.float64))
    messages = Messages.of(law).beside(losses)
    assert ceiling(messages, stream=1)[1].value > 0.99
    seen = losses[:1].reshape(1, 1) * (1 + 6e-8)  # made again, but for one rounding
    assert beliefs(messages, torch.zeros(1, 2), clear=seen)[0, 0] > 0.99
    with pytest.raises(NoCeilingError, match="could have been sent by no candidate"):
        beliefs(messages, torch.zeros(1, 2), clear=seen + 1)


@pytest.mark.parametrize("kind", ["noisy", "fixed", "laplace"])
def test_who_makes_losses_again_to_the_last_bit_tells_each_from_the_next_float(kind: str) -> None:
    zero, one = {"w": torch.zeros(2)}, torch.tensor(1.0)
    laws: dict[str, Law] = {
        "noisy": alike(zero, 1.0),
        "fixed": Fixed(mean=zero),
        "laplace": Laplace(mean=zero, scales={"w": (one, one)}),
    }
    losses = [torch.tensor(2.3)]
    for _ in range(7):
        losses.append(torch.nextafter(losses[-1], torch.tensor(9.0)))
    messages = Messages.of([laws[kind]] * 8).beside(torch.stack(losses))
    assert ceiling(messages, stream=1)[1].value == pytest.approx(1.0)
