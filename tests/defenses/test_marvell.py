from dataclasses import replace
from math import log, sqrt
from typing import Any

import numpy as np
import pytest
import torch
from scipy.stats import multivariate_normal
from sklearn.metrics import roc_auc_score
from torch import Tensor, nn

import defenses.marvell
from defenses import Marvell
from defenses.marvell import divergence, least_divergence, measured
from leakbed.contracts import IllegalCombinationError, Protects
from leakbed.contracts.defense import Run
from leakbed.contracts.noise_laws import Clean, NoCeilingError, sent_law

ROWS = 4000
LABELS = (torch.arange(ROWS) % 4 == 0).long()


def gaussian(entries: int = 5) -> torch.Tensor:
    """Two classes of rows, one in four positive, well apart."""
    noise = torch.randn(ROWS, entries, generator=torch.Generator().manual_seed(0))
    spread = torch.where(LABELS == 1, 1.0, 0.5)[:, None]
    return 0.3 * spread * noise + LABELS[:, None] * torch.eye(entries)[0]


def sent(gradient: torch.Tensor, labels: torch.Tensor = LABELS, **settings: Any) -> Any:
    defense = Marvell(**settings)
    return defense.protect_labelled_gradient(defense.begin(7), gradient, labels)


def best_auc(rows: torch.Tensor) -> float:
    """Of the score that knows both perturbed classes: the ratio of their densities."""
    values, labels = rows.double().numpy(), LABELS.numpy()
    densities = [
        multivariate_normal(each.mean(0), np.cov(each.T)).logpdf(values)
        for each in (values[labels == 1], values[labels == 0])
    ]
    return float(roc_auc_score(labels, densities[0] - densities[1]))


def test_the_leak_falls_with_the_power_and_stays_under_its_bound() -> None:
    rows = gaussian()
    found = measured(rows, LABELS == 1)
    leaks, bounds = [best_auc(rows)], []
    for scale in (1.0, 10.0, 100.0):
        _, protected = sent(rows, scale=scale)
        noise = least_divergence(found, power=scale * found.distance)
        apart = min(divergence(found, noise), 4.0)  # where the bound on the AUC is 1
        bounds.append(0.5 + sqrt(apart) / 2 - apart / 8)
        leaks.append(best_auc(protected))
    assert leaks[0] > 0.97
    assert leaks == sorted(leaks, reverse=True)
    # 1,000 positives: a standard error of 0.01.
    assert all(leak < bound + 0.02 for leak, bound in zip(leaks[1:], bounds, strict=True))
    assert bounds[-1] < 0.65


def test_the_noise_sent_is_the_noise_solved() -> None:
    rows = gaussian()
    found = measured(rows, LABELS == 1)
    noise = least_divergence(found, power=2 * found.distance)
    added = sent(rows, scale=2.0)[1] - rows
    line = rows[LABELS == 1].mean(0) - rows[LABELS == 0].mean(0)
    on_line = added @ (line / line.norm())
    for label, along, across in (
        (1, noise.positive_along, noise.positive_across),
        (0, noise.negative_along, noise.negative_across),
    ):
        own = label == LABELS
        assert on_line[own].var().item() == pytest.approx(along, rel=0.15)
        rest = added[own].square().sum(1).mean().item() - on_line[own].square().mean().item()
        assert rest == pytest.approx(4 * across, rel=0.1, abs=1e-6)
    assert added.square().sum(1).mean().item() == pytest.approx(2 * found.distance, rel=0.1)


def test_a_batch_of_one_class_gets_noise_of_the_last_power_solved() -> None:
    rows = gaussian()
    state, _ = sent(rows)
    found = measured(rows, LABELS == 1)
    alone, ones = torch.zeros(2000, 5), torch.ones(2000, dtype=torch.long)
    after, noisy = Marvell().protect_labelled_gradient(state, alone, ones)
    assert after is state
    # Half as many rows, each twice as large: four times the power.
    assert noisy.square().sum(1).mean().item() == pytest.approx(4 * found.distance, rel=0.05)
    assert noisy.std(0).min().item() == pytest.approx(noisy.std(0).max().item(), rel=0.1)


def test_a_batch_of_one_class_has_no_law_and_says_which_message_it_needs() -> None:
    clean = Clean(
        kind=Protects.CUT_GRADIENT,
        arrays={Protects.CUT_GRADIENT: torch.ones(4, 5)},
        labels=torch.ones(4, dtype=torch.long),
    )
    with pytest.raises(NoCeilingError, match="the power of the last batch that had two"):
        sent_law([Marvell()], clean)


def test_before_any_solved_one_the_missing_class_is_taken_for_the_opposite() -> None:
    alone, ones = torch.ones(2000, 5), torch.ones(2000, dtype=torch.long)
    state, noisy = sent(alone, ones, scale=0.5)
    power = (noisy - alone).square().sum(1).mean().item()
    assert power == pytest.approx(0.5 * 4 * 5, rel=0.05)
    assert not state.tensors


def test_classes_with_the_same_mean_need_no_noise() -> None:
    rows = torch.tensor([[1.0, 0.0], [1.0, 0.0]])
    state, passed = sent(rows, torch.tensor([0, 1]))
    assert torch.equal(passed, rows)
    assert not state.tensors


def test_maps_are_rows_of_all_their_entries() -> None:
    maps = torch.randn(6, 2, 3, 3, generator=torch.Generator().manual_seed(1))
    labels = torch.tensor([0, 1, 0, 1, 1, 0])
    _, one = sent(maps, labels)
    _, flat = sent(maps.flatten(1), labels)
    assert torch.equal(one.flatten(1), flat)


def test_more_classes_are_refused_before_training_and_after() -> None:
    run = Run(classes=10, rows=9, batch_size=3, steps=3, passes=1, top=nn.Identity())
    with pytest.raises(IllegalCombinationError, match=r"this task has 10; use 'iso-noise', "):
        Marvell().check_run(run)
    Marvell().check_run(replace(run, classes=2))
    with pytest.raises(IllegalCombinationError, match=r"labels 0 and 1, here is 2"):
        sent(torch.ones(3, 2), torch.tensor([0, 1, 2]))


def test_a_sender_without_labels_is_told_what_to_use() -> None:
    with pytest.raises(IllegalCombinationError, match=r"needs the labels .* apply it where the"):
        Marvell().protect_cut_gradient(Marvell().begin(7), torch.ones(3, 2))


def test_batches_of_one_row_are_refused_where_no_batch_ever_has_both_classes() -> None:
    """Noise of the row's own norm leaves the norm to tell the label."""
    run = Run(classes=2, rows=9, batch_size=1, steps=9, passes=1, top=nn.Identity())
    with pytest.raises(IllegalCombinationError, match=r"marvell .* every batch .* one row"):
        Marvell().check_run(run)
    with pytest.raises(IllegalCombinationError, match="marvell got a cut gradient of one row"):
        sent(torch.ones(1, 2), torch.tensor([1]))
    Marvell().check_run(replace(run, batch_size=4, smallest_batch=1))
    state, _ = sent(torch.tensor([[1.0, 0.0], [0.0, 1.0]]), torch.tensor([0, 1]))
    ones = torch.tensor([1])  # the last of a pass, after batches of both
    _, noisy = Marvell().protect_labelled_gradient(state, torch.ones(1, 2), ones)
    assert not torch.equal(noisy, torch.ones(1, 2))


def informed_labels(
    message: Tensor, ways: tuple[Tensor, Tensor], labels: Tensor, *, scale: float
) -> Tensor:
    """The best guess of every row's label by a party that can compute both of its gradients.

    It knows the rows' gradients under either label, and the noise: the same for every row of a
    class, drawn along the line between the class means and across it. It takes the likelier label.
    """
    rows = torch.where(labels[:, None] == 1, ways[1], ways[0]).double()
    found = measured(rows, labels == 1)
    noise = least_divergence(found, power=scale * found.distance)
    line = rows[labels == 1].mean(0) - rows[labels == 0].mean(0)
    line = line / line.norm()
    likelihoods = []
    for label, along, across in (
        (0, noise.negative_along, noise.negative_across),
        (1, noise.positive_along, noise.positive_across),
    ):
        rest = message.double() - ways[label].double()
        on_line = rest @ line
        off_line = rest.square().sum(1) - on_line.square()
        tiny = 1e-9 * float(rows.square().sum(1).mean())  # float32 rounds what has no noise
        for_line, for_rest = max(along, tiny), max(across, tiny)
        entries = message.shape[1] - 1
        squares = on_line.square() / for_line + off_line / for_rest
        likelihoods.append(-(squares + log(for_line) + entries * log(for_rest)) / 2)
    return (likelihoods[1] > likelihoods[0]).long()


@pytest.mark.parametrize("scale", [1.0, 4.0, 16.0])
def test_a_party_that_knows_the_top_reads_the_labels_whatever_the_scale(scale: float) -> None:
    """The bound is of Marvell's model: rows drawn from two round clouds, nothing else known.

    A row's own two possible gradients are known to whoever holds the input and the top, and one
    class's noise keeps to the line between the means: off it, the message is the gradient itself.
    """
    torch.manual_seed(0)
    top = torch.nn.Sequential(nn.Linear(16, 32), nn.ReLU(), nn.Linear(32, 2))
    smashed, labels = torch.randn(256, 16), (torch.arange(256) % 4 == 0).long()

    def gradient(of: Tensor) -> Tensor:
        leaf = smashed.clone().requires_grad_()
        nn.functional.cross_entropy(top(leaf), of).backward()
        assert leaf.grad is not None
        return leaf.grad

    ways = gradient(torch.zeros_like(labels)), gradient(torch.ones_like(labels))
    rows = torch.where(labels[:, None] == 1, ways[1], ways[0])
    _, message = sent(rows, labels, scale=scale)
    named = informed_labels(message, ways, labels, scale=scale)
    assert (named == labels).float().mean() > 0.99
    # The published score of one row, the norm, is hidden meanwhile.
    auc = roc_auc_score(labels.numpy(), message.norm(dim=1).numpy())
    assert max(auc, 1 - auc) < 0.9
    for text in (Marvell.__doc__, defenses.marvell.__doc__):
        assert "knows the top" in " ".join((text or "").split())


@pytest.mark.parametrize("scale", [0.0, -1.0])
def test_a_scale_that_is_not_above_0_is_refused(scale: float) -> None:
    with pytest.raises(ValueError, match=r"marvell needs a finite scale > 0, got"):
        Marvell(scale=scale)
