"""Two results folders side by side: nothing is told apart that may be chance."""

from collections.abc import Callable
from pathlib import Path

import pytest

from experiments.report.differences import Differences, Pair, differences
from experiments.results.cards import Card, write_card
from experiments.results.folder import ReportError

MakeCard = Callable[..., Card]
Compare = Callable[[list[Card], list[Card]], Differences]


@pytest.fixture
def compare(tmp_path: Path) -> Compare:
    """Write both lists of cards and compare the folders."""

    def compared(first: list[Card], second: list[Card]) -> Differences:
        for name, cards in (("first", first), ("second", second)):
            for card in cards:
                write_card(card, tmp_path / name)
        return differences(tmp_path / "first", tmp_path / "second")

    return compared


def learned_at(rate: float) -> dict[str, object]:
    return {"protocol": {"name": "vanilla-split", "learning_rate": rate}}


def verdicts(pair: Pair) -> dict[str, str]:
    return {change.metric: change.verdict for change in pair.scores}


def test_what_exceeds_its_spread_is_told_apart_and_the_rest_is_not(
    make_card: MakeCard, compare: Compare
) -> None:
    means = {"identification": 0.5, "ssim": 0.8, "mse": 0.05}
    found = compare(
        [make_card(means=means, settings=learned_at(0.1))],
        [make_card(means=means | {"ssim": 0.6, "mse": 0.02}, settings=learned_at(0.2))],
    )
    assert found.everywhere == [("protocol.learning_rate", 0.1, 0.2)]
    (pair,) = found.pairs
    assert verdicts(pair) == {
        "identification": "not told apart",
        "SSIM": "the second leaks less",
        "MSE": "the second leaks more",  # less error is more leakage
        "test accuracy": "not told apart",  # of one seed each
    }
    assert found.lines()[-1] == (
        "2 of 4 scores are told apart; about one score in 20 differs that much by chance."
    )
    assert "  SSIM: 0.80 ± 0.005 | 0.60 ± 0.005: the second leaks less" in found.lines()
    assert "  test accuracy: 95% | 95%: not told apart" in found.lines()


def test_seeds_that_scatter_more_than_targets_decide(make_card: MakeCard, compare: Compare) -> None:
    first = [make_card(means={"ssim": mean}, seed=i) for i, mean in enumerate((0.5, 0.9))]
    second = [make_card(means={"ssim": mean}, seed=i) for i, mean in enumerate((0.4, 0.6))]
    (pair,) = compare(first, second).pairs
    assert verdicts(pair)["SSIM"] == "not told apart"


def test_results_pair_by_attack_and_the_fewest_differences(
    make_card: MakeCard, compare: Compare
) -> None:
    def noised(sigma: float) -> Card:
        stack = {"stack": [["smashed-noise", {"sigma": sigma}]]}
        return make_card(defense="smashed-noise", settings={"defense": stack})

    found = compare(
        [make_card(), noised(0.1), make_card(attack="mean-image")],
        [noised(0.2), make_card(source="f" * 16), make_card(attack="sdar")],
    )
    first, second = found.pairs
    assert (first.settings, first.notes) == (
        [],
        ["computed by other code, which may be why scores differ"],
    )
    assert second.settings == [("defense.smashed-noise.sigma", 0.1, 0.2)]
    assert [name.split(",")[0] for name in found.only_first] == ["mean-image"]
    assert [name.split(",")[0] for name in found.only_second] == ["sdar"]


def test_two_attacks_on_one_victim_are_compared_where_no_attack_is_in_both(
    make_card: MakeCard, compare: Compare
) -> None:
    found = compare([make_card()], [make_card(attack="sdar", unreliable="few targets")])
    assert found.everywhere == [("attack", "unsplit", "sdar")]
    assert found.pairs[0].notes == ["second: few targets"]
    assert found.only_first == found.only_second == []


def test_equal_folders_differ_in_nothing(make_card: MakeCard, compare: Compare) -> None:
    lines = compare([make_card()], [make_card()]).lines()
    assert lines[0] == "No setting differs."
    assert lines[-1].startswith("0 of 4 scores")


@pytest.mark.parametrize(
    ("changes", "said"),
    [
        (
            {"attack": "sdar", "data": "mnist"},
            r"nothing in common.*first unsplit attacked mnistnet on mnist-5k.*sdar.*on mnist",
        ),
        ({"means": {"label_accuracy": 0.5}}, r"no score in common.*SSIM|ssim.*label_accuracy"),
        ({"status": "unfit", "why": "no"}, r"nothing was scored in .*second"),
    ],
)
def test_folders_that_cannot_be_compared_say_why(
    make_card: MakeCard, compare: Compare, changes: dict[str, object], said: str
) -> None:
    first = make_card(utility={})
    with pytest.raises(ReportError, match=said):
        compare([first], [make_card(**{"utility": {}} | changes)])
