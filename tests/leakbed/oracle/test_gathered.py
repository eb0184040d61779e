"""Messages read together are as far apart as one long message that holds them all."""

import pytest
import torch

from leakbed.contracts.noise_laws import Fixed, Laplace, NoCeilingError, Normal, alike
from leakbed.oracle.ceiling import Messages, beliefs
from leakbed.oracle.gathered import Gathered

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


def test_noise_that_follows_the_candidate_or_changes_kind_is_refused() -> None:
    means = drawn(4, 4)
    follows = Normal(mean={"smashed": means}, deviation={"smashed": torch.linspace(1, 2, COUNT)})
    pair = (torch.tensor(1.0), torch.tensor(1.0))
    laplace = Laplace(mean={"smashed": means}, scales={"smashed": pair})
    for law in (follows, laplace):
        with pytest.raises(NoCeilingError, match="not the same whatever the candidate"):
            Gathered().add(Messages.of_rows(law), means[0])
    gathered = Gathered()
    gathered.add(rows(means, 1.0), means[0])
    with pytest.raises(NoCeilingError, match="some are normal, some fixed"):
        gathered.add(Messages.of_rows(Fixed(mean={"smashed": means})), means[0])
