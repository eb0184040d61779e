"""Measures pool seeds without losing their spread, and differ only beyond two errors."""

import pytest

from experiments.report.statistics import (
    Measure,
    difference,
    error_text,
    number,
    pooled,
    text,
    value_text,
)
from leakbed.oracle.metrics import binomial_interval


def table(values: list[float], **more: object) -> dict[str, object]:
    return {"m": {"mean": sum(values) / len(values), "values": values}, **more}


def test_one_seed_keeps_its_mean_and_spread() -> None:
    found = pooled([table([0.0, 1.0, 2.0, 3.0])], "m")
    assert found is not None
    assert found.mean == 1.5
    assert found.std == pytest.approx(1.29099, abs=1e-5)
    assert found.stderr == pytest.approx(1.29099 / 2, abs=1e-5)
    assert found.interval is None


def test_seeds_that_differ_widen_the_error_of_targets_that_do_not() -> None:
    found = pooled([table([0.1] * 100), table([0.9] * 100)], "m")
    assert found is not None
    assert found.mean == pytest.approx(0.5)
    # Over 200 targets alone it would be 0.028.
    assert found.stderr == pytest.approx(0.4)


def test_a_rate_of_all_hits_still_has_an_error() -> None:
    entry = {"mean": 1.0, "values": [1.0] * 8}
    found = pooled([{"identification": entry, "rows": 1}], "identification")
    assert found is not None
    assert found.stderr == 0
    assert found.interval == pytest.approx((0.631, 1.0), abs=1e-3)
    assert found.error == pytest.approx(0.092, abs=1e-3)


def test_the_rows_of_a_target_count_in_a_rates_interval() -> None:
    entry = {"mean": 0.5, "values": [0.5] * 4}
    few = pooled([{"identification": entry, "rows": 1}], "identification")
    many = pooled([{"identification": entry, "rows": 64}], "identification")
    assert few is not None
    assert many is not None
    assert few.error is not None
    assert many.error is not None
    assert many.error < few.error / 4


def test_numbers_alone_have_no_error_and_nothing_is_no_measure() -> None:
    assert pooled([{"m": 0.25}], "m") == Measure(mean=0.25)
    assert pooled([{"m": 0.25}, {"m": 0.75}], "m") == Measure(
        mean=0.5, std=pytest.approx(0.35355, abs=1e-5), stderr=pytest.approx(0.25)
    )
    for value in (None, True, "0.5", {"mean": None, "values": [None]}):
        assert pooled([{"m": value}], "m") is None


def test_zero_is_a_number() -> None:
    assert pooled([{"m": 0.0}], "m") == Measure(mean=0.0)
    assert number(0) == 0.0
    assert number(False) is None


def test_a_difference_needs_two_standard_errors_and_known_errors() -> None:
    low, high = Measure(mean=0.5, stderr=0.1), Measure(mean=0.8, stderr=0.1)
    assert difference(high, low) == pytest.approx(0.3)
    assert difference(low, high) == pytest.approx(-0.3)
    assert difference(Measure(mean=0.78, stderr=0.1), low) is None
    assert difference(Measure(mean=0.8), low) is None
    exact = Measure(mean=1.0, stderr=0.0)
    assert difference(exact, exact) is None


@pytest.mark.parametrize(
    ("metric", "value", "shown"),
    [
        ("identification", 0.936, "94%"),
        ("abs_pearson", 0.936, "0.94"),
        ("ssim_skill", -0.27, "\N{MINUS SIGN}0.27"),
        ("ssim", -0.001, "0.00"),
        ("mse", 0.00031, "0.00031"),
        ("psnr", 31.44, "31.4 dB"),
    ],
)
def test_values_are_printed_in_their_unit(metric: str, value: float, shown: str) -> None:
    assert value_text(metric, value) == shown


def test_errors_are_printed_beside_values() -> None:
    assert text("ssim", Measure(mean=0.5, stderr=0.02)) == "0.50 ± 0.04"
    assert text("label_accuracy", Measure(mean=0.5, stderr=0.1, interval=(0.25, 0.75))) == (
        "50% (25 to 75%)"
    )
    assert error_text("ssim", Measure(mean=1.0, stderr=0.0004)) == "± 0.0008"
    assert text("ssim", Measure(mean=1.0)) == "1.00 (one target)"


def rates(*shares: float, targets: int = 3600) -> list[dict[str, object]]:
    """Seeds of a rate, each of as many targets."""
    counts = [round(share * targets) for share in shares]
    hits = [[1.0] * count + [0.0] * (targets - count) for count in counts]
    return [
        {"label_accuracy": {"mean": sum(own) / targets, "values": own}, "rows": 1} for own in hits
    ]


def test_a_rates_printed_interval_covers_the_spread_between_seeds() -> None:
    found = pooled(rates(0.606, 0.66, 0.72, 0.77, 0.89), "label_accuracy")
    assert found is not None
    assert text("label_accuracy", found) == "73% (63 to 83%)"  # not 72 to 74%
    assert found.error == pytest.approx(0.049, abs=1e-3)
    alike = pooled(rates(0.5, 0.5, 0.5, targets=20), "label_accuracy")
    assert alike is not None
    assert alike.interval == pytest.approx(binomial_interval(30, 60))
    one = pooled(rates(0.72), "label_accuracy")
    assert one is not None
    assert one.interval == pytest.approx(binomial_interval(2592, 3600))


def test_a_rates_interval_ends_at_none_and_all() -> None:
    found = pooled(rates(0.9, 1.0), "label_accuracy")
    assert found is not None
    assert found.interval == (pytest.approx(0.85), 1.0)
    assert found.error == pytest.approx(0.05)
    low = pooled(rates(0.0, 0.1), "label_accuracy")
    assert low is not None
    assert low.interval == (0.0, pytest.approx(0.15))


def test_seeds_that_differ_decide_no_comparison() -> None:
    apart, alike = (pooled(rates(*each), "label_accuracy") for each in ((0.6, 0.9), (0.65, 0.66)))
    assert apart is not None
    assert alike is not None
    assert difference(apart, alike) is None


def test_an_error_bounded_from_below_survives_pooling() -> None:
    entry = {"mean": 1.0, "values": [1.0] * 8, "stderr": 0.06}
    found = pooled([{"balanced_accuracy": entry}] * 4, "balanced_accuracy")
    assert found is not None
    assert found.stderr == pytest.approx(0.03)
    assert text("balanced_accuracy", found) == "100% ± 6%"
    assert error_text("balanced_accuracy", Measure(mean=0.5, stderr=0.002)) == "± 0.4%"
