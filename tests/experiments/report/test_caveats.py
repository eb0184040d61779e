"""What speaks against a number is said."""

from collections.abc import Callable
from typing import Any

import pytest

from experiments.report.caveats import (
    beats_guessing,
    caveats,
    doubts,
    misses,
    place,
    published,
    shortfall,
)
from experiments.report.rows import cells
from experiments.results.cards import Card

MakeCard = Callable[..., Card]


def fell_short(*cards: Card) -> str:
    found = cells(cards)
    return shortfall([cell for cell in found if cell.is_attack], found)


def test_an_attack_that_beats_everything_is_said_to(make_card: MakeCard) -> None:
    strong = {"identification": 1.0, "abs_pearson": 0.99, "ssim": 0.95}
    assert fell_short(make_card(means=strong)) == (
        "It beats everything that needs no attack, in every leading score."
    )


def test_the_picture_of_the_same_smashed_map_is_a_rival(make_card: MakeCard) -> None:
    attack = make_card(means={"abs_pearson": 0.74})
    picture = make_card(attack="smashed-as-image", means={"abs_pearson": 0.77})
    assert fell_short(attack, picture) == (
        "It does not beat, by two standard errors, the smashed map shown as a picture "
        "(|Pearson| 0.74 against 0.77)."
    )
    elsewhere = make_card(attack="smashed-as-image", cut=2, means={"abs_pearson": 0.77})
    assert fell_short(attack, elsewhere).startswith("It beats everything")


def test_baselines_and_the_nearest_public_image_are_rivals(make_card: MakeCard) -> None:
    text = fell_short(make_card(means={"abs_pearson": 0.5, "ssim": 0.6}))
    assert "the mean-public baseline (|Pearson| 0.50 against 0.55)" in text
    assert "the nearest public image (SSIM 0.60 against 0.77)" in text
    assert "another-row" not in text


def test_what_an_adversary_reads_of_honest_training_is_a_rival(
    make_card: MakeCard, scores: Callable[..., dict[str, Any]]
) -> None:
    def told(honest: float) -> str:
        control = {"within": True, "never_hijacked": scores(ssim=honest)}
        return fell_short(make_card(attack="fsha", means={"ssim": 0.9}, control=control))

    assert told(0.3).startswith("It beats everything")
    assert "a client that was never hijacked (SSIM 0.90 against 0.90)" in told(0.9)


@pytest.mark.parametrize(
    ("other", "seeds", "beaten"),
    [(0.19, 1, False), (0.05, 1, True), (0.19, 3, True)],  # of 100 inputs a seed, .26 are wrong
)
def test_altered_inputs_beat_nothing_that_other_messages_do_as_well(
    make_card: MakeCard,
    scores: Callable[..., dict[str, Any]],
    other: float,
    seeds: int,
    beaten: bool,
) -> None:
    """The control of altered inputs is the same attack on the messages of another bottom."""
    rival = {"random-signs": {"misclassification": 0.04, "misclassification_stderr": 0.02}}
    cards = [
        make_card(
            attack="spadv",
            seed=seed,
            scores=scores(targets=100, misclassification=0.26),
            baselines=rival,
            control={"within": True, "scores": {"misclassification": other}},
        )
        for seed in range(seeds)
    ]
    text = fell_short(*cards)
    if beaten:
        assert text == "It beats everything that needs no attack, in every leading score."
    else:
        assert text == (
            "It does not beat, by two standard errors, the same attack on the messages of another "
            "bottom (misclassified 26% against 19%)."
        )


def test_altered_inputs_whose_control_is_not_known_are_said_to_beat_nothing(
    make_card: MakeCard, scores: Callable[..., dict[str, Any]]
) -> None:
    rival = {"random-signs": {"misclassification": 0.04, "misclassification_stderr": 0.02}}
    found = scores(targets=100, misclassification=0.26)
    text = fell_short(make_card(attack="spadv", scores=found, baselines=rival, control=None))
    assert text == (
        "What it does on the messages of another bottom is not known, so it is not said to beat "
        "what needs no attack."
    )


def test_a_lead_within_two_errors_is_no_lead(make_card: MakeCard) -> None:
    text = fell_short(make_card(means={"ssim": 0.774}))
    assert "the nearest public image (SSIM 0.77 against 0.77)" in text


def test_the_baselines_own_error_counts(make_card: MakeCard) -> None:
    control = {"within": True, "baseline": {"abs_pearson": {"value": 0.55, "limit": 0.65}}}
    assert fell_short(make_card(means={"abs_pearson": 0.6})).startswith("It beats")
    assert "mean-public" in fell_short(make_card(means={"abs_pearson": 0.6}, control=control))


WITHOUT_A_MESSAGE = {
    "own-inputs-classifier": "a classifier (logistic regression) of the party's own inputs",
    "own-inputs-nearest": "the nearest known one among the party's own inputs",
    "public-label-classifier": "learned from public labelled images without any message",
    "public-label-nearest": "the label of the public image nearest to the party's own input",
    "untrained-bottom": "the same attack on a network that was never trained",
}


@pytest.mark.parametrize("name", WITHOUT_A_MESSAGE)
def test_what_a_party_tells_of_labels_by_itself_is_a_rival_in_plain_words(
    make_card: MakeCard, name: str
) -> None:
    beside = {"chance": {"label_accuracy": 0.1}, name: {"label_accuracy": 0.7}}
    card = make_card(means={"label_accuracy": 0.66}, baselines=beside)
    text = fell_short(card)
    assert WITHOUT_A_MESSAGE[name] in text
    assert "(label accuracy 69% against 70%)" in text
    (cell,) = cells([card])
    assert not beats_guessing(cell, "label_accuracy")


def test_every_rival_that_is_not_beaten_is_named_not_the_best_alone(make_card: MakeCard) -> None:
    beside = {name: {"label_accuracy": 0.9} for name in WITHOUT_A_MESSAGE}
    text = fell_short(make_card(means={"label_accuracy": 0.5}, baselines=beside))
    assert all(words in text for words in WITHOUT_A_MESSAGE.values())
    weak = {name: {"label_accuracy": 0.1} for name in WITHOUT_A_MESSAGE}
    assert fell_short(make_card(means={"label_accuracy": 1.0}, baselines=weak)) == (
        "It beats everything that needs no attack, in every leading score."
    )


def test_a_baselines_error_is_its_own_and_that_between_seeds(make_card: MakeCard) -> None:
    def beside(mean: float) -> dict[str, dict[str, float]]:
        return {"untrained-bottom": {"ssim": mean, "ssim_stderr": 0.03}}

    cards = [make_card(seed=seed, baselines=beside(mean)) for seed, mean in enumerate((0.3, 0.34))]
    (one,), (both,) = cells(cards[:1]), cells(cards)
    for cell, mean, error in ((one, 0.3, 0.03), (both, 0.32, 0.03 / 2**0.5)):
        found = cell.baseline_measure("ssim", "untrained-bottom")
        assert found is not None
        assert (found.mean, found.stderr) == pytest.approx((mean, error))
    apart = cells(
        [make_card(seed=seed, baselines=beside(mean)) for seed, mean in ((0, 0.1), (1, 0.5))]
    )
    found = apart[0].baseline_measure("ssim", "untrained-bottom")
    assert found is not None
    assert found.stderr == pytest.approx(0.2)
    assert one.baseline_measure("ssim", "chance") is None


def test_a_controls_wide_limit_does_not_make_a_perfect_attack_doubtful(make_card: MakeCard) -> None:
    control = {"within": True, "baseline": {"ssim": {"value": 0.5, "limit": 0.7}}}
    beside = {"untrained-bottom": {"ssim": 0.9, "ssim_stderr": 0.01}}
    card = make_card(means={"ssim": 1.0}, control=control, baselines=beside)
    assert fell_short(card).startswith("It beats everything")


def test_what_is_not_cut_is_told_from_what_is(make_card: MakeCard) -> None:
    lost = {"means": {"ssim": 0.1}}
    text = fell_short(*(make_card(protocol=name, **lost) for name in ("fedavg", "vanilla-split")))
    assert "with weights exchanged whole" in text
    assert "at cut 1" in text


def test_long_lists_are_counted(make_card: MakeCard) -> None:
    cards = [make_card(cut=cut, means={"ssim": 0.1}) for cut in range(1, 6)]
    assert "and 3 more comparisons" in fell_short(*cards)


def test_a_score_without_a_rival_says_nothing(make_card: MakeCard) -> None:
    assert fell_short(make_card(means={"ssim": 0.5}, baselines={"x": {"psnr": 1.0}})) == ""


@pytest.mark.parametrize(
    ("figure", "verb"), [(0.99, "misses"), (0.8, "reaches"), (0.804, "may reach")]
)
def test_published_figures_are_missed_or_reached(
    make_card: MakeCard, figure: float, verb: str
) -> None:
    (cell,) = cells([make_card(means={"ssim": 0.8}, reported={"ssim": figure})])
    assert misses([cell]) == [
        f"unsplit (split, mnistnet on mnist-5k, cut 1) {verb} the published SSIM of "
        f"{figure:.2f}: 0.80 ± 0.005."
    ]


def test_a_lower_error_reaches_a_published_error(make_card: MakeCard) -> None:
    (cell,) = cells([make_card(means={"mse": 0.05}, reported={"mse": 0.5})])
    assert "reaches the published MSE" in misses([cell])[0]


@pytest.mark.parametrize("reported", [None, "see the paper", 0.9, {"speed": 3, "ssim": "high"}])
def test_figures_that_are_no_metric_are_left_to_the_table(
    make_card: MakeCard, reported: Any
) -> None:
    card = make_card(reported=reported)
    assert misses(cells([card])) == []
    assert set(published(card)) <= {"speed"}


def test_defended_cells_are_not_held_against_the_source(make_card: MakeCard) -> None:
    assert misses(cells([make_card(defense="smashed-noise", reported={"ssim": 1.0})])) == []


def test_doubts_and_failures_are_named(make_card: MakeCard) -> None:
    card = make_card(
        unreliable="diverged; 3 of 16 targets failed",
        control={"within": False, "above": ["abs_pearson"]},
    )
    card = card.model_copy(update={"scores": {**card.scores, "failures": 3}})
    (cell,) = cells([card])
    assert doubts(cell) == ["diverged", "the negative control beats its baseline in |Pearson|"]
    name = "unsplit (split, mnistnet on mnist-5k, cut 1)"
    assert caveats([cell]) == [
        f"Do not trust {name}: diverged.",
        f"Do not trust {name}: the negative control beats its baseline in |Pearson|.",
        f"Targets that broke down count as failures: 3 of 16 in {name}.",
    ]


def test_budget_bound_scores_are_named(make_card: MakeCard) -> None:
    assert caveats(cells([make_card(stopped_on_budget=0.1)])) == []
    assert caveats(cells([make_card(stopped_on_budget=0.2)])) == [
        "A larger budget of the attack may change budget-bound scores: "
        "unsplit (split, mnistnet on mnist-5k, cut 1)."
    ]


def test_a_control_that_the_card_names_is_not_named_twice(make_card: MakeCard) -> None:
    reason = "the negative control beats its baseline in ssim"
    (cell,) = cells([make_card(unreliable=reason, control={"within": False, "above": ["ssim"]})])
    assert doubts(cell) == ["the negative control beats its baseline in SSIM"]


def test_places_name_only_what_tells_apart(make_card: MakeCard) -> None:
    one, two = cells([make_card(cut=1), make_card(cut=2)])
    assert place(one, [one]) == ""
    assert place(two, [one, two]) == "at cut 2"
    named = cells([make_card(case="a"), make_card(case="b")])
    assert [place(cell, named) for cell in named] == ["in a", "in b"]
    varied = cells([make_card(settings={"steps": 1}), make_card(settings={"steps": 2})])
    assert sorted(place(cell, varied) for cell in varied) == ["with steps 1", "with steps 2"]
