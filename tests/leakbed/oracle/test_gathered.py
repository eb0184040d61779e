"""Messages read together are as far apart as one long message that holds them all."""

from math import log

import pytest
import torch
from scipy.stats import chi2, norm

import leakbed.oracle.gathered
from leakbed.contracts.noise_laws import Axial, Fixed, Laplace, NoCeilingError, Normal, alike
from leakbed.oracle.ceiling import beliefs, ceiling
from leakbed.oracle.gathered import Gathered
from leakbed.oracle.messages import Messages

COUNT = 12


def drawn(entries: int, seed: int) -> torch.Tensor:
    return torch.randn(COUNT, entries, generator=torch.Generator().manual_seed(seed))


def rows(means: torch.Tensor, sigma: float) -> Messages:
    return Messages.of_rows(alike({"smashed": means}, sigma))


def test_several_messages_are_one_long_one() -> None:
    one, two = drawn(40, 0), drawn(7, 1)
    labels = torch.arange(COUNT) % 3
    seen = torch.cat([one[0] + 0.9, two[0] - 0.4])
    gathered = Gathered()
    first = gathered.add(rows(one, 0.5).beside(labels), seen[:40])
    gathered.add(rows(two, 2.0), seen[40:])
    assert torch.allclose(first, torch.full((40,), 0.9 / 0.5, dtype=torch.float64), atol=1e-5)
    made, point = gathered.together()
    long = torch.cat([one / 0.5, two / 2.0], 1).double()
    assert gathered.count == 2
    assert torch.allclose(torch.cdist(made.means, made.means), torch.cdist(long, long), atol=1e-5)
    whole = Messages.of_rows(
        Normal(mean={"smashed": long}, deviation={"smashed": torch.tensor(1.0)})
    ).beside(labels)
    scaled = torch.cat([seen[:40] / 0.5, seen[40:] / 2.0]).double().unsqueeze(0)
    clear = torch.zeros(1, 1, dtype=torch.float64)
    wanted = beliefs(whole, scaled, clear=clear)
    assert torch.allclose(beliefs(made, point, clear=clear), wanted, atol=1e-6)
    assert wanted[0, 1] == 0  # another label


def test_without_noise_rows_that_differ_in_any_message_are_told_apart() -> None:
    one, two = drawn(5, 2), drawn(5, 3)
    one[1], two[1] = one[0], two[0]
    one[2] = one[0]
    gathered = Gathered()
    for means in (one, two):
        gathered.add(Messages.of_rows(Fixed(mean={"smashed": means})), means[0])
    believed = beliefs(*gathered.together())[0]
    assert believed[:2].tolist() == pytest.approx([0.5, 0.5])
    gathered.add(Messages.of_rows(Fixed(mean={"smashed": one})), one[3])
    with pytest.raises(NoCeilingError, match="not what the row sends"):
        gathered.together()


@pytest.mark.parametrize("wide", [2, 5])
def test_a_difference_small_beside_another_and_large_beside_the_noise_counts(wide: int) -> None:
    places = torch.zeros(3, wide)
    places[1, 0], places[2, 1] = 4.0, 1e5
    wanted = (2 * float(norm.cdf(2)) + 1) / 3
    gathered = Gathered()
    gathered.add(rows(places, 1.0), places[0])
    for messages in (rows(places, 1.0), gathered.together()[0]):
        found = ceiling(messages, draws=4000, stream=0)[1]
        assert found.value == pytest.approx(wanted, abs=3 * found.error + 1e-9)


def following(means: torch.Tensor, scales: torch.Tensor) -> Messages:
    return Messages.of_rows(Normal(mean={"smashed": means}, deviation={"smashed": scales}))


def test_noise_that_follows_the_candidate_is_one_long_message() -> None:
    sizes = 40, 3, 25
    means = [0.2 * drawn(size, 5 + place)[:6] for place, size in enumerate(sizes)]
    scales = [1 + 0.15 * torch.rand(6, generator=torch.Generator().manual_seed(9)) for _ in sizes]
    seen = [one[0] + 0.9 * drawn(size, 8)[0] for one, size in zip(means, sizes, strict=True)]
    gathered = Gathered()
    for one, scale, got in zip(means, scales, seen, strict=True):
        residual = gathered.add(following(one, scale), got)
        assert torch.allclose(residual, ((got - one[0]) / scale[0]).double(), atol=1e-5)
    made, point = gathered.together()
    assert point.shape[1] < sum(sizes)
    long = Messages.of(
        [
            Normal(
                mean={str(part): each[one] for part, each in enumerate(means)},
                deviation={str(part): each[one] for part, each in enumerate(scales)},
            )
            for one in range(6)
        ]
    )
    wanted = beliefs(long, torch.cat(seen).unsqueeze(0))
    assert torch.allclose(beliefs(made, point), wanted, atol=1e-5)
    short, whole = (ceiling(m, draws=2000, stream=s)[1] for m, s in ((made, 1), (long, 2)))
    assert max(short.error, whole.error) < 0.004
    assert abs(short.value - whole.value) < 3 * (short.error**2 + whole.error**2) ** 0.5


def test_the_size_of_the_noise_alone_tells_candidates_apart_by_a_chi_square() -> None:
    entries, messages, scales = 30, 4, torch.tensor([1.0, 1.1])
    gathered = Gathered()
    for _ in range(messages):
        gathered.add(following(torch.zeros(2, entries), scales), torch.zeros(entries))
    found = ceiling(gathered.together()[0], draws=10_000, stream=3)[1]
    freedom, (small, large) = entries * messages, scales.double().square().tolist()
    threshold = freedom * log(large / small) / (1 / small - 1 / large)
    apart = chi2.cdf(threshold / small, freedom) - chi2.cdf(threshold / large, freedom)
    assert found.error < 0.004
    assert abs(found.value - (1 + apart) / 2) < 3 * found.error


def test_messages_of_several_noises_are_read_together() -> None:
    means = 0.5 * drawn(4, 4)
    pair = (torch.tensor(1.0), torch.tensor(0.5))
    axial = Messages.of(
        [
            Axial(
                mean={"cut-gradient": each.reshape(2, 2)},
                axis=torch.eye(2),
                along=torch.tensor([1.0, 2.0]),
                across=torch.tensor([0.5, 0.7]),
            )
            for each in means
        ]
    )
    parts = [
        rows(means, 1.0),
        Messages.of_rows(Laplace(mean={"smashed": means}, scales={"smashed": pair})),
        axial,
        following(means, torch.linspace(1, 2, COUNT)),
        Messages.of_rows(Fixed(mean={"smashed": torch.zeros(COUNT, 4)})),
    ]
    gathered, seen = Gathered(), means[0] + 0.3
    for part in parts:
        gathered.add(part, torch.zeros(4) if part.family == "fixed" else seen)
    likely = sum(beliefs(part, seen.unsqueeze(0))[0].log() for part in parts[:-1])
    made, point = gathered.together()
    assert torch.allclose(beliefs(made, point)[0], torch.as_tensor(likely).softmax(0), atol=1e-5)
    assert made.mu is None
    level = ceiling(made, draws=200, stream=1, level=1e3)[1]
    assert ceiling(made, draws=200, stream=1)[1].value > level.value


def test_what_is_kept_of_messages_is_bounded(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(leakbed.oracle.gathered, "_MEMORY", 10)
    with pytest.raises(NoCeilingError, match="ask for fewer candidates"):
        Gathered().add(following(torch.eye(4), torch.arange(1.0, 5.0)), torch.ones(4))
