from typing import Any

import pytest
import torch

from defenses import LocalDP, WeightNoise
from leakbed.seeds import derive, generator
from leakbed.tensors import TENSORS

# Largest rows: 5 before, 10 after; factors 25 and 50. Vectors below 0.2 keep the factor 1.
BEFORE = {
    "w": torch.tensor([[3.0, 4.0], [0.0, 0.0]]),
    "b": torch.tensor([0.1]),
    "n": torch.tensor(3),
}
AFTER = {
    "w": torch.tensor([[6.0, 8.0], [1.0, 0.0]]),
    "b": torch.tensor([0.0]),
    "n": torch.tensor(4),
}


def protected(defense: WeightNoise, before: Any = BEFORE, after: Any = AFTER) -> dict[str, Any]:
    _, sent = defense.protect_update(defense.begin(7), before, after)
    return dict(sent)


def test_published_factors_by_hand() -> None:
    assert TENSORS.factor(BEFORE["w"]).item() == pytest.approx(25)
    assert TENSORS.factor(AFTER["w"]).item() == pytest.approx(50)
    assert TENSORS.factor(BEFORE["b"]).item() == 1
    assert TENSORS.factor(torch.tensor([0.3, 0.4])).item() == pytest.approx(2.5)
    kernel = torch.zeros(2, 2, 1, 2)
    kernel[0, :, 0, 0] = torch.tensor([3.0, 4.0])  # over input channels: 5
    kernel[0, :, 0, 1] = torch.tensor([0.0, 12.0])
    assert TENSORS.factor(kernel).item() == pytest.approx(60)


def test_the_published_upload_carries_the_noise_of_both_snapshots() -> None:
    sent = protected(WeightNoise(scale=0.5))
    draw = generator(derive(7, "message/0"))
    of_before, of_after = (torch.randn(2, 2, generator=draw) for _ in range(2))
    expected = AFTER["w"] + 50 * 0.5 * of_after - 25 * 0.5 * of_before
    torch.testing.assert_close(sent["w"], expected)
    of_before, of_after = (torch.randn(1, generator=draw) for _ in range(2))
    torch.testing.assert_close(sent["b"], AFTER["b"] + 0.5 * of_after - 0.5 * of_before)


@pytest.mark.parametrize("distribution", ["normal", "laplace"])
def test_published_noise_of_zero_strength_changes_no_bit(distribution: Any) -> None:
    sent = protected(WeightNoise(scale=0.0, distribution=distribution))
    assert all(torch.equal(sent[name], AFTER[name]) for name in AFTER)


@pytest.mark.parametrize("form", ["published", "corrected"])
def test_integer_buffers_pass(form: Any) -> None:
    sent = protected(WeightNoise(scale=1.0, form=form))
    assert list(sent) == list(AFTER)
    assert sent["n"] is AFTER["n"]


VARIANCES = {"bn.running_var": torch.full((200,), 0.1), "bn.running_mean": torch.zeros(200)}


@pytest.mark.parametrize("form", ["published", "corrected"])
def test_a_running_variance_stays_one(form: Any) -> None:
    """A negative one makes every output NaN. What is cut off is the noise's, after the noise."""
    sent = protected(WeightNoise(scale=1.0, form=form), VARIANCES, VARIANCES)
    assert (sent["bn.running_mean"] < 0).any()
    noise = sent["bn.running_var"] - VARIANCES["bn.running_var"]
    assert sent["bn.running_var"].min() == 0
    assert noise.max() > 1


def drawn(distribution: Any) -> torch.Tensor:
    zeros = {"b": torch.zeros(200_000)}
    return protected(WeightNoise(scale=0.5, distribution=distribution), zeros, zeros)["b"]


def test_published_noise_has_the_distribution_it_says() -> None:
    """The difference of two draws: variance 2 s^2 when normal, 4 s^2 when Laplace of scale s."""
    normal, laplace = drawn("normal"), drawn("laplace")
    assert normal.var().item() == pytest.approx(2 * 0.25, rel=0.02)
    assert laplace.var().item() == pytest.approx(4 * 0.25, rel=0.02)
    assert abs(laplace.mean().item()) < 0.01
    # Kurtosis of a difference of two: 3 when normal, 3 + 3 / 2 when Laplace.
    assert (normal**4).mean() / normal.var() ** 2 == pytest.approx(3, rel=0.05)
    assert (laplace**4).mean() / laplace.var() ** 2 == pytest.approx(4.5, rel=0.1)


def move(sent: Any, before: Any = BEFORE) -> torch.Tensor:
    return torch.cat([(sent[k] - before[k]).flatten() for k in ("w", "b")])


def test_the_corrected_form_clips_the_whole_update() -> None:
    whole = move(AFTER)
    assert whole.norm().item() == pytest.approx((9 + 16 + 1 + 0.01) ** 0.5)
    for clip in (0.5, 2.0):
        clipped = move(protected(WeightNoise(scale=0.0, form="corrected", clip=clip)))
        assert clipped.norm().item() == pytest.approx(clip, rel=1e-5)
        torch.testing.assert_close(clipped, whole * clip / whole.norm())
    kept = protected(WeightNoise(scale=0.0, form="corrected", clip=100.0))
    torch.testing.assert_close(move(kept), whole)


def test_the_corrected_noise_has_scale_times_clip_and_does_not_depend_on_the_data() -> None:
    size = 200_000
    before = {"b": torch.zeros(size)}
    still, moved = before, {"b": torch.full((size,), 1e-3)}
    defense = WeightNoise(scale=1.5, form="corrected", clip=0.2)
    noise = protected(defense, before, still)["b"]
    assert noise.std().item() == pytest.approx(1.5 * 0.2, rel=0.01)
    other = protected(defense, before, moved)["b"]
    shift = 0.2 / size**0.5  # the clipped update: norm 0.2, spread evenly
    torch.testing.assert_close(other - noise, torch.full((size,), shift), rtol=1e-3, atol=1e-7)


def test_an_update_of_nothing_is_not_divided_by_zero() -> None:
    sent = protected(WeightNoise(scale=0.0, form="corrected"), BEFORE, BEFORE)
    assert all(torch.equal(sent[name], BEFORE[name]) for name in BEFORE)


@pytest.mark.parametrize(
    ("wrong", "message"),
    [
        ({"scale": -1.0}, "needs a finite scale >= 0 and a finite clip > 0, got -1.0 and 1.0"),
        ({"scale": float("nan")}, "needs a finite scale >= 0 and a finite clip > 0, got nan"),
        ({"clip": 0.0}, "needs a finite scale >= 0 and a finite clip > 0"),
        ({"form": "corrected", "distribution": "laplace"}, "the corrected form is normal"),
        ({"form": "correct"}, "unknown form 'correct'; did you mean 'corrected'"),
        ({"distribution": "gauss"}, "unknown distribution 'gauss'; legal: laplace, normal"),
    ],
)
def test_illegal_settings_are_refused(wrong: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        WeightNoise(**wrong)


def test_other_data_at_a_node_are_two_clips_away_and_its_absence_one() -> None:
    """An auditor's two worst updates, each sent with the same noise."""
    before = {"w": torch.zeros(50)}
    ways = [{"w": sign * torch.ones(50)} for sign in (1, -1, 0)]
    defense = WeightNoise(form="corrected", scale=4.0, clip=0.5)
    one, opposite, absent = (protected(defense, before, each)["w"] for each in ways)
    assert (one - opposite).norm().item() == pytest.approx(2 * 0.5, rel=1e-4)
    assert (one - absent).norm().item() == pytest.approx(0.5, rel=1e-4)
    from dp_accounting import get_epsilon_gaussian  # noqa: PLC0415  a second

    worth = [get_epsilon_gaussian(multiplier, 1e-5) for multiplier in (4.0 / 2, 4.0)]
    assert worth == [pytest.approx(1.99, abs=0.01), pytest.approx(0.93, abs=0.01)]
    assert "scale / 2 for other data" in WeightNoise.claims
    assert "epsilon 1.99" in (WeightNoise.__doc__ or "")


@pytest.mark.parametrize("defense", [WeightNoise, LocalDP])
def test_the_claim_names_what_is_sent_beside_the_weights(defense: Any) -> None:
    assert "number of samples" in defense.claims
    assert "no other metric" in defense.claims
