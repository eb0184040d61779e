"""A family is named as leaking more only where it is ahead, and ahead of guessing."""

from collections.abc import Callable
from typing import Any

import pytest

from experiments.report.findings import conclusions
from experiments.results.cards import Card

MakeCard = Callable[..., Card]
Scores = Callable[..., dict[str, Any]]


@pytest.fixture
def weights(make_card: MakeCard) -> Callable[..., Card]:
    """A FedAvg card."""

    def made(**changes: Any) -> Card:
        return make_card(**({"protocol": "fedavg", "attack": "dlm", "cut": None} | changes))

    return made


def said(cards: list[Card], **more: Any) -> str:
    return "\n".join(conclusions(cards, **more))


def test_the_families_are_compared_on_the_same_samples(
    make_card: MakeCard, weights: Callable[..., Card]
) -> None:
    cards = [
        weights(means={"identification": 1.0, "abs_pearson": 0.97, "ssim": 0.9}),
        make_card(cut=1, means={"identification": 1.0, "abs_pearson": 0.97, "ssim": 0.5}),
        make_card(cut=3, means={"identification": 0.0, "abs_pearson": 0.3, "ssim": 0.1}),
    ]
    first = conclusions(cards)[0]
    assert first == (
        "On the same private samples and the same network (mnistnet, mnist-5k), without a defence, "
        "dlm on weight exchange and unsplit on split learning: at cut 1 weight exchange leaks more "
        "(SSIM 0.90 against 0.50), no clear difference (identification 100% against 100%, "
        "|Pearson| 0.97 against 0.97); at cut 3 weight exchange leaks more (identification 100% "
        "against 0%, |Pearson| 0.97 against 0.30, SSIM 0.90 against 0.10)."
    )


@pytest.mark.parametrize(
    ("own", "verdict"),
    [
        (0.2, "split learning leaks more (SSIM 0.50 against 0.20)"),
        (0.5, "no clear difference (SSIM 0.50 against 0.50)"),
        (0.9, "weight exchange leaks more (SSIM 0.90 against 0.50)"),
    ],
)
def test_the_verdict_follows_the_numbers(
    make_card: MakeCard, weights: Callable[..., Card], own: float, verdict: str
) -> None:
    text = conclusions([weights(means={"ssim": own}), make_card(means={"ssim": 0.5})])[0]
    assert text.endswith(f"on split learning: {verdict}.")


def test_a_mixed_verdict_names_both(make_card: MakeCard, weights: Callable[..., Card]) -> None:
    cards = [
        weights(means={"abs_pearson": 0.9, "ssim": 0.2}),
        make_card(means={"abs_pearson": 0.5, "ssim": 0.6}),
    ]
    text = conclusions(cards)[0]
    assert "weight exchange leaks more (|Pearson| 0.90 against 0.50)" in text
    assert "split learning leaks more (SSIM 0.60 against 0.20)" in text


def test_other_samples_or_another_network_are_not_compared(
    make_card: MakeCard, weights: Callable[..., Card]
) -> None:
    cards = [weights(), make_card()]
    same = dict.fromkeys([card.key for card in cards], "samples")
    assert "On the same private samples" in said(cards, samples=same)
    apart = {card.key: card.key for card in cards}
    assert "attacked different private samples without a defence" in said(cards, samples=apart)
    relu = make_card(settings={"model": {"name": "mnistnet", "activation": "relu"}})
    assert "On the same private samples" not in said([weights(), relu], samples=None)


def test_without_truths_equal_seeds_and_counts_stand_for_equal_samples(
    make_card: MakeCard, weights: Callable[..., Card], scores: Scores
) -> None:
    assert "On the same" in said([weights(), make_card()])
    assert "On the same" not in said([weights(), make_card(seed=1)])
    fewer = make_card(scores=scores(targets=8, ssim=0.5))
    assert "On the same" not in said([weights(), fewer])


def test_a_family_that_does_not_beat_guessing_is_not_named(
    make_card: MakeCard, weights: Callable[..., Card]
) -> None:
    cards = [
        weights(means={"identification": 0.9, "abs_pearson": 0.54, "ssim": 0.29}),
        make_card(means={"identification": 0.0, "abs_pearson": 0.27, "ssim": 0.36}),
    ]
    assert conclusions(cards)[0].endswith(
        "weight exchange leaks more (identification 88% against 0%), neither beats guessing "
        "(|Pearson| 0.54 against 0.27 where guessing has 0.55, SSIM 0.29 against 0.36 where "
        "guessing has 0.37)."
    )


def test_the_baselines_own_error_counts_against_a_winner(
    make_card: MakeCard, weights: Callable[..., Card]
) -> None:
    control = {"within": True, "baseline": {"abs_pearson": {"value": 0.55, "limit": 0.65}}}
    cards = [
        weights(means={"abs_pearson": 0.6}, control=control),
        make_card(means={"abs_pearson": 0.3}),
    ]
    assert "neither beats guessing (|Pearson| 0.60 against 0.30" in conclusions(cards)[0]
    surer = [weights(means={"abs_pearson": 0.6}), cards[1]]
    assert "weight exchange leaks more (|Pearson| 0.60 against 0.30)" in conclusions(surer)[0]


def test_two_families_of_unlike_guesses_show_both(
    make_card: MakeCard, weights: Callable[..., Card]
) -> None:
    other = {"constant": {"abs_pearson": 0.6}}
    cards = [weights(means={"abs_pearson": 0.5}), make_card(means={"abs_pearson": 0.4})]
    cards[1] = cards[1].model_copy(update={"baselines": other})
    assert "0.50 against 0.40 where guessing has 0.55 and 0.60)" in conclusions(cards)[0]


def test_without_a_known_guess_nobody_is_named(
    make_card: MakeCard, weights: Callable[..., Card]
) -> None:
    unknown = {"chance": {"label_accuracy": 0.1}}
    cards = [
        make(means={"ssim": mean}, baselines=unknown)
        for make, mean in ((weights, 0.9), (make_card, 0.5))
    ]
    assert "no clear difference (SSIM 0.90 against 0.50)" in conclusions(cards)[0]


def test_a_cut_has_three_clauses_at_most(make_card: MakeCard, weights: Callable[..., Card]) -> None:
    means = {"identification": 0.9, "abs_pearson": 0.6, "ssim": 0.3, "label_accuracy": 0.5}
    others = {"identification": 0.0, "abs_pearson": 0.9, "ssim": 0.1, "label_accuracy": 0.5}
    assert conclusions([weights(means=means), make_card(means=others)])[0].endswith(
        "weight exchange leaks more (identification 88% against 0%), split learning leaks more "
        "(|Pearson| 0.90 against 0.60), no verdict in the rest (label accuracy 50% against 50%, "
        "SSIM 0.30 against 0.10 where guessing has 0.37)."
    )


def test_victims_that_learnt_unequally_are_said_to(
    make_card: MakeCard, weights: Callable[..., Card]
) -> None:
    poor = weights(utility={"test_accuracy": 0.18})
    told = "The victims' test accuracy is 18% under weight exchange and {} under split learning"
    assert told.format("95%") in conclusions([poor, make_card()])[0]
    cuts = [make_card(cut=1), make_card(cut=2, utility={"test_accuracy": 0.63})]
    assert told.format("63% to 95%") in conclusions([poor, *cuts])[0]
    for close in ({"test_accuracy": 0.92}, {}, {"loss": 2.0}):
        assert "victims" not in conclusions([weights(utility=close), make_card()])[0]


def test_a_leader_that_does_not_beat_its_own_guess_is_not_named(
    make_card: MakeCard, weights: Callable[..., Card]
) -> None:
    hard = {"constant": {"ssim": 0.95}}
    cards = [weights(means={"ssim": 0.9}, baselines=hard), make_card(means={"ssim": 0.6})]
    assert "no clear difference (SSIM 0.90 against 0.60)" in conclusions(cards)[0]
    cards = [weights(means={"ssim": 0.9}), make_card(means={"ssim": 0.6}, baselines=hard)]
    assert "weight exchange leaks more (SSIM 0.90 against 0.60)" in conclusions(cards)[0]
