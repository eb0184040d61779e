"""The law of a stack of defences: functions before noise, and nothing behind it."""

import pytest
import torch

from defenses import DPSGD, DPCutGradient, GradientCompression, IsoNoise, NoPeek, SmashedNoise
from leakbed.contracts import Defense, DefenseState, Protects
from leakbed.contracts.noise_laws import (
    Clean,
    Fixed,
    Laplace,
    NoCeilingError,
    Normal,
    alike,
    floating,
    sent_law,
    weighted_sum,
)

GRADIENT = torch.randn(6, 20, generator=torch.Generator().manual_seed(0))
CUT = Clean(kind=Protects.CUT_GRADIENT, arrays={Protects.CUT_GRADIENT: GRADIENT})


class Silent(Defense):
    """Noises the cut gradient and says nothing of it."""

    name = "silent"
    source = "none"
    protects = frozenset({Protects.CUT_GRADIENT})


def test_what_has_no_noise_is_part_of_the_message() -> None:
    compression, noise = GradientCompression(per="sample"), DPCutGradient()
    law = sent_law([compression, noise], CUT)
    assert isinstance(law, Normal)
    _, sparse = compression.protect_cut_gradient(DefenseState(stream=0), GRADIENT)
    alone = noise.law(Clean(kind=CUT.kind, arrays={CUT.kind: sparse}))
    assert isinstance(alone, Normal)
    assert torch.equal(law.mean[CUT.kind], alone.mean[CUT.kind])


def test_defenses_of_other_things_are_passed_over() -> None:
    law = sent_law([NoPeek(), SmashedNoise(), DPSGD()], CUT)
    assert isinstance(law, Fixed)
    assert torch.equal(law.mean[CUT.kind], GRADIENT)


def test_what_is_not_covered_says_so() -> None:
    for stack in ([Silent()], [Silent(), IsoNoise()], [GradientCompression(), Silent()]):
        with pytest.raises(NoCeilingError, match="silent does not state the law"):
            sent_law(stack, CUT)
    with pytest.raises(NoCeilingError, match="gradient-compression changes what iso-noise has"):
        sent_law([IsoNoise(), GradientCompression()], CUT)


def test_counters_are_left_out() -> None:
    arrays = {"weight": torch.zeros(2), "count": torch.tensor(3)}
    assert list(floating(arrays)) == ["weight"]


def test_noise_of_a_sum_adds_up_by_its_variance() -> None:
    ones = {"a": torch.ones(3)}
    law = weighted_sum([(0.75, alike(ones, 2.0)), (0.25, alike({"a": torch.zeros(3)}, 4.0))])
    assert isinstance(law, Normal)
    assert torch.equal(law.mean["a"], torch.full((3,), 0.75))
    assert float(law.deviation["a"]) == pytest.approx((1.5**2 + 1.0**2) ** 0.5)
    half = weighted_sum([(0.5, Fixed(mean=ones)), (0.5, alike(ones, 2.0))])
    assert isinstance(half, Normal)
    assert float(half.deviation["a"]) == pytest.approx(1.0)
    assert isinstance(weighted_sum([(0.5, Fixed(mean=ones))] * 2), Fixed)


def test_a_sum_of_other_noise_has_no_ceiling() -> None:
    scale = torch.tensor(1.0)
    laplace = Laplace(mean={"a": torch.ones(3)}, scales={"a": (scale, scale)})
    with pytest.raises(NoCeilingError, match="density of a sum of messages of laws Laplace"):
        weighted_sum([(0.5, laplace), (0.5, laplace)])
