"""Each defence's law is that of its own hook: recorded noise has the density that it states."""

import math
from collections.abc import Mapping

import numpy as np
import pytest
import torch
from numpy.typing import NDArray
from scipy.stats import kstest
from torch import Tensor

from defenses import DEFENSES
from leakbed.contracts import Defense, DefenseState, Protects
from leakbed.contracts.noise_laws import (
    Axial,
    Channel,
    Clean,
    Fixed,
    Laplace,
    Law,
    Normal,
    floating,
)

SETTINGS: Mapping[str, tuple[dict[str, object], ...]] = {
    "dp-cut-gradient": ({"epsilon": 2.0, "clip": 0.5},),
    "gradient-compression": ({}, {"per": "sample"}),
    "iso-noise": ({"ratio": 3.0},),
    "label-dp": (
        {"epsilon": 1.5},
        {"mechanism": "rr-with-prior", "prior": (0.5, 0.3, 0.2)},
        {"mechanism": "rr-with-prior", "prior": (0.5, 0.3, 0.2), "form": "published"},
    ),
    "local-dp": ({"clip": 0.7}, {"sensitivity": 0.0}),
    "marvell": ({"scale": 2.0},),
    "max-norm": ({},),
    "smashed-noise": ({"sigma": 0.3}, {"sigma": 0.3, "clip": 0.5}, {"sigma": 0.0, "clip": 0.5}),
    "weight-noise": (
        {"scale": 0.2},
        {"scale": 0.2, "distribution": "laplace"},
        {"scale": 0.2, "form": "corrected", "clip": 0.7},
        {"scale": 0.0},
    ),
    "weight-sparsification": ({}, {"form": "corrected"}),
}
WITHOUT = {
    "adversarial-training",
    "dp-sgd",
    "gradients-scrutinizer",
    "nopeek",
    "splitguard",
    "splitout",
}
CASES = [(name, own) for name, settings in SETTINGS.items() for own in settings]


def drawn(size: int, *shape: int) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(size))


def clean_of(defense: Defense) -> Clean:
    (kind,) = defense.protects
    if kind == Protects.UPDATE:
        before = {"a": drawn(1, 20, 30), "b": drawn(2, 40), "count": torch.tensor([3])}
        after = {"a": drawn(3, 20, 30), "b": drawn(4, 40), "count": torch.tensor([5])}
        return Clean(kind=kind, arrays=after, before=before)
    return Clean(
        kind=kind,
        arrays={kind: drawn(5, 12, 3, 40)},
        labels=torch.arange(12) % 2 if kind == Protects.CUT_GRADIENT else None,
        classes=3,
    )


def sent(defense: Defense, clean: Clean, message: int) -> Mapping[str, Tensor]:
    state = DefenseState(stream=9, messages=message)
    if clean.kind == Protects.UPDATE:
        return floating(defense.protect_update(state, clean.before, clean.arrays)[1])
    if clean.kind == Protects.SMASHED:
        return {clean.kind: defense.protect_smashed(state, clean.array)[1]}
    assert clean.labels is not None
    hook = defense.protect_labelled_gradient
    return {clean.kind: hook(state, clean.array, clean.labels)[1]}


def test_every_defense_has_a_law_or_says_that_it_has_none() -> None:
    assert set(SETTINGS) | WITHOUT == set(DEFENSES)
    for name in WITHOUT:
        (kind,) = {*DEFENSES[name].protects} or {Protects.TRAINING}
        clean = Clean(kind=kind, arrays={kind: drawn(5, 12, 40)})
        assert DEFENSES[name]().law(clean) is None


@pytest.mark.parametrize(("name", "own"), CASES)
def test_what_is_sent_follows_the_law(name: str, own: dict[str, object]) -> None:
    defense = DEFENSES[name](**own)
    clean = clean_of(defense)
    law = defense.law(clean)
    assert law is not None
    if isinstance(law, Channel):
        labels = torch.arange(3).repeat_interleave(20_000)
        found = defense.noised_labels(4, labels, classes=3).reshape(3, -1)
        counted = torch.stack([torch.bincount(row, minlength=3) for row in found]) / 20_000
        assert torch.allclose(counted.double(), law.answers, atol=0.015)
        assert torch.allclose(law.answers.sum(1), torch.ones(3).double())
        return
    residuals = torch.cat([_residual(law, sent(defense, clean, at)) for at in range(6)])
    if isinstance(law, Fixed):
        assert float(residuals.abs().max()) < 1e-6
        return
    law_of_one = {Laplace: _laplace_distribution}.get(type(law), "norm")
    assert kstest(residuals.numpy(), law_of_one).pvalue > 1e-3
    if law_of_one == "norm":
        count = len(residuals)
        assert abs(float(residuals.var()) - 1) < 4 / math.sqrt(count / 2)


def _residual(law: Law, message: Mapping[str, Tensor]) -> Tensor:
    assert not isinstance(law, Channel)
    assert list(law.mean) == list(message)
    gaps = {name: (message[name] - law.mean[name]).double() for name in law.mean}
    if isinstance(law, Normal):
        assert law.radius is None or law.radius > 0
        return torch.cat([(gaps[name] / law.deviation[name]).flatten() for name in gaps])
    if isinstance(law, Laplace):  # of which the larger tensor is looked at, whose scales differ
        first, second = (float(each) for each in law.scales["a"])
        return (gaps["a"] / math.sqrt(2 * (first**2 + second**2))).flatten()
    if isinstance(law, Axial):
        (gap,) = (gap.flatten(1) for gap in gaps.values())
        on_axis = (gap * law.axis).sum(1)
        off = gap - on_axis.unsqueeze(1) * law.axis
        assert torch.allclose(off[law.across == 0], torch.zeros(1).double(), atol=1e-5)
        shown = law.along > 0
        return on_axis[shown] / law.along[shown].double()
    return torch.cat([gap.flatten() for gap in gaps.values()])


def _laplace_distribution(x: NDArray[np.float64]) -> NDArray[np.float64]:
    """Of the difference of two Laplace variables, scaled to a variance of 1: scales as below."""
    defense = DEFENSES["weight-noise"](scale=0.2, distribution="laplace")
    law = defense.law(clean_of(defense))
    assert isinstance(law, Laplace)
    a, b = (float(each) for each in law.scales["a"])
    size = np.abs(x) * math.sqrt(2 * (a * a + b * b))
    tail = (a * a * np.exp(-size / a) - b * b * np.exp(-size / b)) / (2 * (a * a - b * b))
    return np.where(x > 0, 1 - tail, tail)
