"""What needs no evidence is scored like any guess."""

from dataclasses import replace

import pytest
import torch

from leakbed.contracts import Guess
from leakbed.contracts.attributes import Attribute, attribute_of
from leakbed.oracle import Truth, baselines, score
from leakbed.seeds import generator
from tests.leakbed.oracle.conftest import truth_of


def test_every_baseline_is_there_with_its_metrics(truth: Truth) -> None:
    found = baselines(truth)
    assert set(found) == {
        "constant",
        "public-intensity",
        "mean-public",
        "another-row",
        "nearest-public",
        "chance",
        "majority-label",
    }
    for name in ("constant", "public-intensity", "mean-public", "another-row", "nearest-public"):
        assert {"identification", "abs_pearson", "ssim", "mse"} <= set(found[name].means())


def test_constant_images_know_nothing(truth: Truth) -> None:
    means = baselines(truth)["constant"].means()
    assert means["identification"] == 0
    assert means["abs_pearson"] == 0
    assert means["mse"] == pytest.approx((truth.images - 0.5).square().mean().item(), abs=1e-6)


def test_each_image_baseline_is_what_it_says(truth: Truth) -> None:
    assert truth.public_images is not None
    found = baselines(truth)
    mean = truth.public_images.mean(0).expand_as(truth.images)
    assert found["mean-public"].means() == score(Guess(images=mean), truth).means()
    level = torch.full_like(truth.images, truth.public_images.mean().item())
    assert found["public-intensity"].means()["mse"] == pytest.approx(
        (level - truth.images).square().mean().item(), abs=1e-6
    )
    assert found["another-row"].means()["identification"] == 0
    nearest, others = found["nearest-public"].means(), found["another-row"].means()
    assert nearest["abs_pearson"] > others["abs_pearson"] + 0.2


def test_chance_and_majority(truth: Truth) -> None:
    found = baselines(truth)
    assert found["chance"].means() == {
        "identification": pytest.approx(1 / 100),
        "label_accuracy": pytest.approx(0.1),
        "balanced_accuracy": pytest.approx(1 / len(truth.labels.unique())),
    }
    most = truth.labels.flatten().bincount().max().item() / truth.targets
    assert found["majority-label"].means()["label_accuracy"] == pytest.approx(most)


@pytest.mark.parametrize("public", ["none", "of other shares"])
def test_no_constant_guess_has_skill_whatever_is_public(truth: Truth, public: str) -> None:
    labels = torch.ones_like(truth.labels)
    labels[0] = 0
    skewed = replace(truth, labels=labels, num_classes=2)
    if public == "none":
        skewed = replace(skewed, public_images=None, public_labels=None)
    found = baselines(skewed, unordered_labels=True)
    assert found["majority-label"].means()["label_accuracy"] == 15 / 16
    for label in (0, 1):
        constant = Guess(labels=torch.full_like(labels, label))
        scores = score(constant, skewed, baselines=found)
        assert scores.means()["label_accuracy_skill"] <= 0


@pytest.mark.parametrize("rows", [1, 2, 8])
def test_chance_of_identification_is_what_a_random_draw_of_candidates_reaches(rows: int) -> None:
    truth = truth_of(targets=600, rows=rows, private=100)
    drawn = torch.Generator().manual_seed(rows)
    chosen = torch.rand(600, 100, generator=drawn).argsort()[:, :rows]
    guess = Guess(images=truth.candidates[chosen])
    mean = score(guess, truth).means()["identification"]
    error = (mean * (1 - mean) / (600 * rows)) ** 0.5  # of draws; none of a target's rows repeat
    few = truth_of(targets=4, rows=rows, private=100)
    expected = baselines(few)["chance"].means()["identification"]
    assert expected == pytest.approx(rows / 100)
    assert mean == pytest.approx(expected, abs=4 * error)


def test_a_sample_that_stands_behind_a_target_twice_is_found_by_chance_once() -> None:
    images = torch.rand(3, 1, 12, 12, generator=torch.Generator().manual_seed(1))
    positions = torch.tensor([[0, 1, 0, 1, 2, 2]])
    twice = Truth(
        images=images[positions],
        labels=positions,
        num_classes=3,
        candidates=images,
        positions=positions,
    )
    found = baselines(twice)["chance"].means()["identification"]
    assert found == pytest.approx(3 / 6)  # three images, each found once, of six rows


def test_what_stands_beside_is_scored_like_any_guess_and_grouped_where_groups_are(
    truth: Truth,
) -> None:
    right = Guess(labels=truth.labels)
    grouped = Guess(clusters=(truth.labels + 3) % 10)
    found = baselines(
        truth, unordered_labels=True, clusters=True, beside={"own": right, "blind": grouped}
    )
    assert found["own"].means()["label_accuracy"] == 1
    assert (
        found["own"].means()["cluster_accuracy"] == found["blind"].means()["cluster_accuracy"] == 1
    )
    assert "label_accuracy" not in found["blind"].means()


@pytest.mark.parametrize(
    ("metric", "classes", "slack"), [("label_accuracy", 10, 0.012), ("balanced_accuracy", 4, 0.015)]
)
def test_chance_of_a_multiset_is_what_random_labels_reach(
    batches: Truth, metric: str, classes: int, slack: float
) -> None:
    labels = batches.labels.clamp(max=classes - 1)
    truth = replace(batches, labels=labels, num_classes=classes)
    expected = baselines(truth, unordered_labels=True)["chance"].means()[metric]
    often = replace(
        truth,
        images=truth.images.repeat(400, 1, 1, 1, 1),
        labels=labels.repeat(400, 1),
        positions=truth.positions.repeat(400, 1),
    )
    guess = Guess(labels=torch.randint(0, classes, (2400, 5), generator=generator(0)))
    assert score(guess, often).means()[metric] == pytest.approx(expected, abs=slack)
    assert expected > 0.3  # five guesses for five labels: not one over the number of classes


def test_what_is_not_known_is_left_out(truth: Truth) -> None:
    bare = replace(truth, public_images=None, public_labels=None)
    assert set(baselines(bare)) == {"constant", "another-row", "majority-label", "chance"}


def test_a_single_target_borrows_another_candidate(truth: Truth) -> None:
    single = replace(
        truth, images=truth.images[:1], labels=truth.labels[:1], positions=truth.positions[:1]
    )
    found = baselines(single)["another-row"]
    assert found.means()["identification"] == 0
    alone = replace(
        single, candidates=single.images[0], positions=torch.zeros_like(single.positions)
    )
    assert "another-row" not in baselines(alone)


def test_an_inferred_attribute_has_baselines_of_its_own(truth: Truth) -> None:
    zero = Attribute(name="zero", values=("zero", "other"), of_class=(0, *[1] * 9))
    asked = replace(truth, attribute=zero)
    found = baselines(asked)
    means = {name: scores.means().get("attribute_accuracy") for name, scores in found.items()}
    shown = truth.labels > 0
    assert means["chance"] == 0.5
    most = max(shown.float().mean().item(), 1 - shown.float().mean().item())
    assert means["majority-attribute"] == pytest.approx(most)
    assert means["majority-attribute"] != pytest.approx(0.5)
    other = ((asked.deranged().labels > 0) == shown).float().mean().item()
    assert means["another-row"] == pytest.approx(other)
    assert means["nearest-public"] is not None
    assert means["majority-label"] is means["constant"] is None
    bare = baselines(replace(asked, public_images=None, public_labels=None))
    assert bare["majority-attribute"].means() == found["majority-attribute"].means()
    assert found["majority-label"].means() == baselines(truth)["majority-label"].means()


def test_an_attribute_of_many_values_is_a_multiset_too(batches: Truth) -> None:
    asked = replace(batches, attribute=attribute_of("label", tuple(map(str, range(10)))))
    chance = baselines(asked, unordered_labels=True)["chance"].means()
    assert chance["attribute_accuracy"] == chance["label_accuracy"] > 0.3
