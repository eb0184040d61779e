import copy

import pytest
import torch
from torch import Tensor, nn

from attacks.building_blocks.hijacking import EPSILON, Critic, Penalty, Shares
from leakbed.models.networks import FlattenLinear
from leakbed.seeds import generator, scoped

STREAM, RATE, BETA = 5, 0.01, 0.5


def network() -> nn.Sequential:
    with scoped(0):
        return nn.Sequential(
            nn.Conv2d(2, 3, 3, stride=2, padding=1),
            nn.Tanh(),
            nn.Conv2d(3, 3, 3, padding=1),
            nn.Tanh(),
            FlattenLinear(12, 1),
        )


def maps(seed: int) -> Tensor:
    return torch.randn(4, 2, 4, 4, generator=torch.Generator().manual_seed(seed))


def made(over: str = "channel", weight: float = 500.0) -> Critic:
    penalty = Penalty(over=over, weight=weight)
    return Critic(network(), rate=RATE, beta=BETA, penalty=penalty, stream=STREAM)


def published(
    model: nn.Module, private: Tensor, public: Tensor, mixing: torch.Generator, *, over: str
) -> tuple[Tensor, Tensor, Tensor]:
    """The losses of the published code, read literally: client's, critic's and the penalty."""
    share = torch.rand(4, 1, 1, 1, generator=mixing)
    between = (share * private.detach() + (1 - share) * public).requires_grad_()
    (slope,) = torch.autograd.grad(model(between).sum(), between, create_graph=True)
    maps_ = [each for row in slope for each in (row if over == "channel" else [row])]
    norms = torch.stack([torch.linalg.vector_norm(each) for each in maps_])
    score = model(private).mean()
    return score, model(public).mean() - score, ((norms - 1) ** 2).mean()


@pytest.mark.parametrize("over", ["channel", "sample"])
def test_ten_steps_are_the_published_ones(over: str) -> None:
    """Losses apart, backward passes apart, and Adam one tensor at a time."""
    critic, model, mixing = made(over), network(), generator(STREAM)
    adam = torch.optim.Adam(
        model.parameters(), lr=RATE, betas=(BETA, 0.999), eps=EPSILON, foreach=False, fused=False
    )
    for step in range(10):
        private, public = maps(2 * step).requires_grad_(), maps(2 * step + 1)
        forged = critic.answer(private.detach(), public)
        client, difference, penalty = published(model, private, public, mixing, over=over)
        (expected,) = torch.autograd.grad(client, private, retain_graph=True)
        loss = difference + 500 * penalty
        adam.zero_grad()
        loss.backward(inputs=list(model.parameters()))
        adam.step()
        assert torch.allclose(forged, expected, rtol=1e-4, atol=1e-6)
        assert torch.allclose(critic.loss, loss.detach(), rtol=1e-4)
        assert torch.allclose(critic.client_loss, client.detach(), rtol=1e-3, atol=1e-5)


@pytest.mark.parametrize("over", ["channel", "sample"])
def test_the_penalty_is_the_published_formula(over: str) -> None:
    private, public = maps(0), maps(1)
    critic = made(over, weight=7.0)
    score, difference, penalty = published(network(), private, public, generator(STREAM), over=over)
    critic.answer(private, public)
    assert torch.allclose(critic.loss, difference + 7 * penalty)
    assert torch.allclose(critic.client_loss, score)


def test_the_penalty_over_samples_sees_all_channels_at_once() -> None:
    linear = nn.Sequential(nn.Flatten(), nn.Linear(2 * 9, 1, bias=False))
    nn.init.ones_(linear[1].weight)  # type: ignore[arg-type]
    points = torch.zeros(3, 2, 3, 3)
    per_channel = Penalty(over="channel", weight=1.0)(linear, points)
    per_sample = Penalty(over="sample", weight=2.0)(linear, points)
    assert per_channel.item() == pytest.approx((3 - 1) ** 2)
    assert per_sample.item() == pytest.approx(2 * (18**0.5 - 1) ** 2)


def test_a_flat_critic_has_a_finite_gradient() -> None:
    model = nn.Sequential(nn.Flatten(), nn.Linear(2 * 16, 1))
    nn.init.zeros_(model[1].weight)  # type: ignore[arg-type]
    penalty = Penalty(over="sample", weight=1.0)
    critic = Critic(model, rate=RATE, beta=BETA, penalty=penalty, stream=STREAM)
    assert critic.answer(maps(0), maps(1)).isfinite().all()
    assert all(weight.isfinite().all() for weight in model.parameters())


def test_the_client_descends_towards_the_pilot() -> None:
    """The critic learns to score the pilot low, and its gradient moves the client there."""
    critic = made("sample", weight=10.0)
    private, public = maps(0) + 2, maps(1)
    for _ in range(100):
        forged = critic.answer(private, public)
    scores = [critic.network(each).mean() for each in (private - 0.1 * forged, private, public)]
    assert scores[1] > scores[2]
    assert scores[0] < scores[1]


def test_a_forgery_is_of_the_weights_before_the_step_and_stays_as_it_is() -> None:
    critic = made()
    before = copy.deepcopy(critic.network)
    private, public = maps(0), maps(1)
    given = private.clone(), public.clone()
    forged = critic.answer(private, public)
    kept = forged.clone()
    variable = private.clone().requires_grad_()
    (expected,) = torch.autograd.grad(before(variable).mean(), variable)
    assert torch.allclose(forged, expected, atol=1e-7)
    for seed in range(3):
        critic.answer(maps(seed), public)
    assert torch.equal(forged, kept)
    assert torch.equal(private, given[0])
    assert torch.equal(public, given[1])
    assert private.grad is None


def test_nothing_reaches_the_pilot() -> None:
    public = maps(1).requires_grad_()
    made().answer(maps(0), public * 1)
    assert public.grad is None


@pytest.mark.parametrize("sizes", [[4] * 230, [7, 1, 5] * 80, [64, 9]])
def test_shares_drawn_ahead_are_those_of_a_draw_for_each_batch(sizes: list[int]) -> None:
    draw, shares = generator(STREAM), Shares(stream=STREAM)
    for rows in sizes:
        expected = torch.rand(rows, 1, 1, 1, generator=draw).flatten()
        assert torch.equal(shares.next(rows, device=torch.device("cpu")), expected)
