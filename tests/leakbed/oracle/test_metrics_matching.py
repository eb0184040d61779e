"""Matching finds the order in which an attack returned a batch."""

from itertools import permutations

import torch

from leakbed.oracle import Truth, match_images, match_labels


def test_a_permutation_is_recovered_whatever_its_scale_and_polarity(batches: Truth) -> None:
    order = torch.stack(
        [torch.randperm(5, generator=torch.Generator().manual_seed(t)) for t in range(6)]
    )
    guess = 2 - 3 * batches.images[torch.arange(6)[:, None], order]
    found = match_images(guess, batches.images)
    assert torch.equal(order.gather(1, found), torch.arange(5).expand(6, 5))


def test_labels_agree_as_often_as_any_order_allows() -> None:
    generator = torch.Generator().manual_seed(0)
    guess = torch.randint(0, 4, (20, 4), generator=generator)
    truth = torch.randint(0, 4, (20, 4), generator=generator)
    found = (guess.gather(1, match_labels(guess, truth)) == truth).sum(1)
    best = [
        max(int((row[list(order)] == true).sum()) for order in permutations(range(4)))
        for row, true in zip(guess, truth, strict=True)
    ]
    assert found.tolist() == best
