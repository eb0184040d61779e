from dataclasses import replace
from typing import Any

import pytest
import torch
from torch import nn

from defenses import DPSGD
from leakbed.contracts import IllegalCombinationError
from leakbed.contracts.defense import Run

RUN = Run(classes=3, rows=100, batch_size=10, steps=30, passes=3, top=nn.Linear(2, 3))
FITTING = DPSGD(epsilon=4.0, clip=0.5, rate=0.1, steps=30)


def samples() -> dict[str, torch.Tensor]:
    draw = torch.Generator().manual_seed(0)
    quiet = torch.tensor([0.01] + [1.0] * 7)  # one sample is below the clip
    return {
        "weight": torch.randn(8, 3, 2, generator=draw) * quiet[:, None, None],
        "bias": torch.randn(8, 3, generator=draw) / 100,
    }


def test_clipping_is_opacus_own(monkeypatch: pytest.MonkeyPatch) -> None:
    layer = nn.Linear(2, 3)
    for name, weight in layer.named_parameters():
        weight.grad_sample = samples()[name]
    from opacus.optimizers import DPOptimizer  # noqa: PLC0415  seconds to import

    optimiser = DPOptimizer(
        torch.optim.SGD(layer.parameters(), lr=1.0),
        noise_multiplier=0.0,
        max_grad_norm=0.5,
        expected_batch_size=8,
    )
    optimiser.pre_step()
    monkeypatch.setattr(DPSGD, "noise_multiplier", 0.0)
    _, made = FITTING.protect_weight_gradients(FITTING.begin(7), samples())
    for name, weight in layer.named_parameters():
        assert weight.grad is not None
        torch.testing.assert_close(made[name], weight.grad, atol=1e-5, rtol=1e-4)


def test_noise_has_the_multiplier_times_the_clip_on_the_sum() -> None:
    zeros = {"weight": torch.zeros(4, 300, 200)}
    _, made = FITTING.protect_weight_gradients(FITTING.begin(7), zeros)
    deviation = FITTING.noise_multiplier * 0.5 / 4
    assert made["weight"].std().item() == pytest.approx(deviation, rel=0.02)
    _, other = FITTING.protect_weight_gradients(FITTING.begin(7).next(), zeros)
    assert not torch.equal(made["weight"], other["weight"])


def test_opacus_finds_the_epsilon_it_claims() -> None:
    from opacus.accountants import RDPAccountant  # noqa: PLC0415

    accountant = RDPAccountant()
    accountant.history = [(FITTING.noise_multiplier, 0.1, 30)]
    assert accountant.get_epsilon(1e-5) == pytest.approx(4.0, abs=0.05)


def test_a_run_beyond_the_horizon_is_refused() -> None:
    FITTING.check_run(RUN)
    with pytest.raises(IllegalCombinationError, match=r"this run takes 31 of 0\.1; set steps"):
        FITTING.check_run(replace(RUN, steps=31))
    with pytest.raises(IllegalCombinationError, match=r"this run takes 30 of 0\.11; set steps"):
        FITTING.check_run(replace(RUN, batch_size=11))


def test_batches_that_straddle_two_passes_are_refused() -> None:
    """A row that is twice in a batch moves the clipped sum by two clips, not by one."""
    draw = torch.randn(4, 3, 2, generator=torch.Generator().manual_seed(0))
    twice, once = draw[[0, 1, 2, 0]], draw[[1, 2]]
    quiet = type("Quiet", (DPSGD,), {"noise_multiplier": 0.0})(clip=0.5)
    sums = [
        quiet.protect_weight_gradients(quiet.begin(7), {"w": each})[1]["w"] * len(each)
        for each in (twice, once)
    ]
    assert (sums[0] - sums[1]).norm().item() == pytest.approx(2 * 0.5)
    with pytest.raises(
        IllegalCombinationError, match=r"sample twice, .* set protocol\.local_steps"
    ):
        FITTING.check_run(replace(RUN, straddles=True))


def test_an_epsilon_below_what_the_accountant_certifies_is_refused_before_training() -> None:
    for epsilon, steps in ((0.1, 30), (0.001, 1)):
        tiny = replace(FITTING, epsilon=epsilon, steps=steps)
        with pytest.raises(IllegalCombinationError, match=r"no noise .* at least 0\.10\d"):
            tiny.check_run(replace(RUN, steps=steps))
    replace(FITTING, epsilon=0.12).check_run(RUN)


def test_batchnorm_in_the_top_is_refused_before_training() -> None:
    top = nn.Sequential(nn.Linear(2, 3), nn.BatchNorm1d(3))
    with pytest.raises(IllegalCombinationError, match="layer 1 of the top is a BatchNorm1d"):
        FITTING.check_run(replace(RUN, top=top))


@pytest.mark.parametrize(
    ("settings", "told"),
    [
        ({"epsilon": 0.0}, "finite epsilon > 0"),
        ({"delta": 0.0}, "0 < delta < 1"),
        ({"delta": 1.5}, "0 < delta < 1"),
        ({"clip": 0.0}, "clip > 0"),
        ({"rate": 0.0}, "0 < rate <= 1"),
        ({"rate": 1.5}, "0 < rate <= 1"),
        ({"steps": 0}, "steps of 1 or more"),
    ],
)
def test_illegal_settings_are_refused(settings: dict[str, Any], told: str) -> None:
    with pytest.raises(ValueError, match=told):
        DPSGD(**settings)
