"""Images that should show a class: the judge, the three scores, and what stands beside them."""

from dataclasses import replace

import pytest
import torch
from torch import Tensor, nn

from leakbed.oracle import best_evidence_free, with_skill
from leakbed.oracle.metrics import binomial_interval
from leakbed.oracle.model_scores import Judge, NoSuchImagesError, Prototypes, train_judge
from tests.support import tiny

SHAPE = (1, 6, 6)


class Brightness(nn.Module):
    """Calls an image 1 where its upper half is brighter than its lower one, else 0."""

    def forward(self, images: Tensor) -> Tensor:
        up = images[:, :, :3].flatten(1).mean(1) - images[:, :, 3:].flatten(1).mean(1)
        return torch.stack([-up, up], 1)


def bright(count: int, seed: int, *, up: bool = True) -> Tensor:
    images = torch.rand(count, *SHAPE, generator=torch.Generator().manual_seed(seed)) / 4
    images[:, :, slice(0, 3) if up else slice(3, 6)] += 0.5
    return images


def prototypes() -> Prototypes:
    judge = Judge(network=Brightness(), accuracy=1.0, rows=20, held_out=8)
    return Prototypes(
        judge=judge,
        label=1,
        num_classes=4,
        real=bright(12, 0),
        held_out=bright(8, 1),
        others=bright(9, 2, up=False),
    )


def test_the_rate_is_the_judges_with_its_exact_interval() -> None:
    images = torch.cat([bright(6, 5), bright(2, 6, up=False)])
    scores = prototypes().score(images)
    rate = scores.metrics["class_rate"]
    assert rate.mean == 0.75
    assert rate.interval == binomial_interval(6, 8)
    assert (scores.targets, scores.rows, scores.candidates, scores.failures) == (8, 1, 12, 0)


def test_a_private_image_is_its_own_nearest_and_noise_has_none() -> None:
    known = prototypes()
    near = known.score(known.real[:3]).metrics["nearest_real"]
    assert near.values == pytest.approx([1.0] * 3)
    assert known.nearest(known.real[[4, 2]]).tolist() == [4, 2]
    noise = torch.rand(4, *SHAPE, generator=torch.Generator().manual_seed(9))
    assert known.score(noise).metrics["nearest_real"].mean < 0.8


def test_diversity_is_that_of_real_images_at_1_and_of_one_image_at_0() -> None:
    known = prototypes()
    assert known.score(known.real).metrics["diversity"].mean == pytest.approx(1.0)
    assert known.score(known.real[:1].expand(5, -1, -1, -1)).metrics["diversity"].mean == 0
    pair = torch.stack([torch.zeros(SHAPE), torch.ones(SHAPE)])
    flat = known.real.flatten(1).double()
    mean = float(torch.pdist(flat).mean())
    assert known.score(pair).metrics["diversity"].values == pytest.approx([6 / mean] * 2)


def test_images_are_clipped_and_broken_ones_count_as_misses() -> None:
    images = bright(4, 5)
    images[0] = torch.nan
    images[1] *= 2
    scores = prototypes().score(images)
    assert scores.failures == 1
    assert scores.metrics["class_rate"].mean == 0.75
    assert all(torch.tensor(each.values).isfinite().all() for each in scores.metrics.values())
    assert scores.metrics["diversity"].mean < 5


def test_baselines_are_chance_the_class_itself_and_the_others() -> None:
    found = prototypes().baselines()
    assert set(found) == {"chance", "real-images", "other-classes"}
    rates = {name: each.metrics["class_rate"].mean for name, each in found.items()}
    assert rates == pytest.approx({"chance": 0.25, "real-images": 1.0, "other-classes": 0.0})
    assert best_evidence_free(found, "class_rate") == pytest.approx(("chance", 0.25))
    skill = with_skill(prototypes().score(bright(4, 5)), found).metrics["class_rate_skill"]
    assert skill.mean == pytest.approx(1.0)


@pytest.fixture
def brief(monkeypatch: pytest.MonkeyPatch) -> None:
    """The tiny images need no more steps."""
    monkeypatch.setattr("leakbed.oracle.model_scores._STEPS", 100)


@pytest.mark.usefixtures("brief")
def test_a_judge_learns_from_private_rows_and_is_measured_on_others() -> None:
    images, labels = tiny.images()
    judge = train_judge(
        images[:45],
        labels[:45],
        test_images=images[45:],
        test_labels=labels[45:],
        num_classes=3,
        stream=4,
    )
    assert judge.accuracy > 0.9
    assert (judge.rows, judge.held_out) == (45, 15)
    told = torch.stack([judge.says(images[45:], label) for label in range(3)])
    assert told.sum(0).tolist() == [1] * 15
    right = told[labels[45:], torch.arange(15)].double().mean()
    assert float(right) == pytest.approx(judge.accuracy)


@pytest.mark.usefixtures("brief")
def test_labels_told_wrong_cost_the_judge_its_accuracy() -> None:
    images, labels = tiny.images()
    judge = train_judge(
        images[:45],
        labels[:45],
        test_images=images[45:],
        test_labels=(labels[45:] + 1) % 3,
        num_classes=3,
        stream=4,
    )
    assert judge.accuracy < 0.1


def test_nothing_held_out_is_refused() -> None:
    images, labels = tiny.images()
    with pytest.raises(NoSuchImagesError, match=r"leave data\.test to its default"):
        train_judge(
            images,
            labels,
            test_images=images[:0],
            test_labels=labels[:0],
            num_classes=3,
            stream=4,
        )


@pytest.mark.parametrize(("part", "what"), [("real", "1 private"), ("held_out", "1 held-out")])
def test_a_class_without_images_is_refused(part: str, what: str) -> None:
    with pytest.raises(NoSuchImagesError, match=f"there are {what} images of class 1"):
        replace(prototypes(), **{part: bright(1, 0)})


def test_without_other_classes_that_baseline_is_left_out() -> None:
    assert set(replace(prototypes(), others=bright(0, 0)).baselines()) == {"chance", "real-images"}
