"""A truth holds its own images among the candidates, and can be exchanged for another's."""

from dataclasses import replace

import jaxtyping
import pytest
import torch

from leakbed.oracle import Truth, TruthError, derange


def test_the_candidates_hold_every_true_image_once(batches: Truth) -> None:
    assert len(batches.candidates) == 100
    assert torch.equal(batches.candidates[batches.positions], batches.images)
    assert len(batches.candidates.unique(dim=0)) == 100


def test_the_draw_is_a_function_of_its_stream() -> None:
    def draw(stream: int) -> torch.Tensor:
        private = torch.arange(50.0).view(50, 1, 1, 1).expand(50, 1, 2, 2) / 50
        rows = torch.tensor([[40], [3], [40]])
        return Truth.among(
            private, torch.zeros(50).long(), rows=rows, num_classes=2, stream=stream, limit=10
        ).candidates

    assert torch.equal(draw(1), draw(1))
    assert not torch.equal(draw(1), draw(2))


def test_true_images_beyond_the_limit_are_all_candidates() -> None:
    private = torch.rand(8, 1, 2, 2)
    truth = Truth.among(
        private,
        torch.zeros(8).long(),
        rows=torch.arange(6)[:, None],
        num_classes=2,
        stream=0,
        limit=3,
    )
    assert len(truth.candidates) == 6


def test_parts_that_contradict_each_other_are_refused(
    truth: Truth, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(jaxtyping.config, "jaxtyping_disable", True)  # as outside of tests
    with pytest.raises(TruthError, match="labels of shape"):
        replace(truth, labels=truth.labels[:3])
    with pytest.raises(TruthError, match="do not hold the true images"):
        replace(truth, positions=truth.positions.flip(0))
    with pytest.raises(TruthError, match="holds nothing"):
        replace(truth, images=truth.images[:0], labels=truth.labels[:0])


@pytest.mark.parametrize("count", [2, 3, 4, 7, 64])
def test_a_derangement_leaves_nothing_in_place(count: int) -> None:
    order = derange(count)
    assert (order != torch.arange(count)).all()
    assert order.sort().values.tolist() == list(range(count))
    if count > 2:
        assert (order[order] != torch.arange(count)).all()  # no two trade places


def test_a_single_target_has_no_control() -> None:
    with pytest.raises(TruthError, match="two or more"):
        derange(1)


def test_deranged_truth_is_another_targets(truth: Truth) -> None:
    other = truth.deranged()
    assert torch.equal(other.images, truth.images[derange(truth.targets)])
    assert not (other.images == truth.images).flatten(1).all(1).any()
