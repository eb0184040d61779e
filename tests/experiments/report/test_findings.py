"""The sentences claim what the numbers bear, and no more."""

from collections.abc import Callable
from typing import Any

from experiments.report.findings import conclusions
from experiments.results.cards import Card

MakeCard = Callable[..., Card]


def said(cards: list[Card], **more: Any) -> str:
    return "\n".join(conclusions(cards, **more))


def test_every_attack_is_stated_with_its_errors(make_card: MakeCard) -> None:
    text = said([make_card(means={"identification": 0.5, "abs_pearson": 0.7, "ssim": 0.8})])
    assert (
        "unsplit on split learning (vanilla-split; mnistnet, mnist-5k), no defence: identification "
        "50% (25 to 75%) among 1,000 candidates, |Pearson| 0.70 ± 0.005, SSIM 0.80 ± 0.005."
    ) in text


def test_a_few_settings_are_told_one_by_one_and_many_by_their_range(make_card: MakeCard) -> None:
    few = said([make_card(cut=cut, means={"ssim": 0.1 * cut}) for cut in (1, 2)])
    assert "at cut 1, SSIM 0.10 ± 0.005; at cut 2, SSIM 0.20 ± 0.005." in few
    many = said([make_card(cut=cut, means={"ssim": 0.1 * cut}) for cut in range(1, 7)])
    assert "over 6 settings: SSIM from 0.10 ± 0.005 (at cut 1) to 0.60 ± 0.005 (at cut 6)." in many
    alike = said([make_card(cut=cut, means={"ssim": 0.5}) for cut in range(1, 7)])
    assert "no more apart than chance allows" in alike
    mixed = [make_card(cut=cut, means={"ssim": 0.5}) for cut in range(1, 6)]
    assert "no score that all of them have" in said(
        [*mixed, make_card(cut=9, means={"label_accuracy": 0.5})]
    )


def test_a_defense_is_set_beside_its_price(make_card: MakeCard) -> None:
    bare = make_card(means={"identification": 1.0, "ssim": 0.8})
    noisy = make_card(
        defense="smashed-noise",
        means={"identification": 1.0, "ssim": 0.2},
        utility={"test_accuracy": 0.71},
    )
    assert (
        "With smashed-noise on vanilla-split, unsplit at cut 1: SSIM falls from 0.80 to 0.20 "
        "(test accuracy 71% with it, 95% without)."
    ) in conclusions([bare, noisy])
    useless = make_card(defense="smashed-noise", means={"identification": 1.0, "ssim": 0.801})
    assert "unsplit at cut 1 changes by no more than two standard errors" in said([bare, useless])
    assert "With smashed-noise" not in said([noisy])


def test_strengths_of_one_defense_are_told_apart(make_card: MakeCard) -> None:
    strengths = [
        make_card(
            defense="smashed-noise",
            settings={"defense": {"stack": [["smashed-noise", {"sigma": sigma}]], "sigma": sigma}},
            means={"ssim": 0.5 - sigma},
        )
        for sigma in (0.1, 0.4)
    ]
    text = said([make_card(means={"ssim": 0.8}), *strengths])
    assert "SSIM falls from 0.80 to 0.40" in text
    assert "SSIM falls from 0.80 to 0.10" in text


def test_runs_that_diverged_are_told(make_card: MakeCard) -> None:
    lost = make_card(seed=1, defense="nopeek", status="diverged", why="node 0")
    where = "(split, vanilla-split, mnistnet on mnist-5k, cut 1, nopeek)"
    said = "Runs that diverged have no score and are in no average: {} " + where + "."
    assert conclusions([lost])[-1] == said.format("1 of 1")
    another = make_card(seed=1, defense="nopeek", attack="exploit", status="diverged", why="it")
    beside = conclusions([make_card(), make_card(defense="nopeek"), lost, another])
    assert said.format("1 of 2") in beside, "two attacks on one run are one run"


def test_strengths_of_a_defense_diverge_apart(make_card: MakeCard) -> None:
    def runs(alpha: float, status: str) -> list[Card]:
        settings = {"defense": {"stack": [["nopeek", {"alpha": alpha}]]}}
        made = {"defense": "nopeek", "settings": settings, "status": status, "why": status}
        return [make_card(seed=seed, **made) for seed in range(3)]

    lost, kept = runs(100.0, "diverged"), runs(10.0, "done")
    for cards in ([*lost, *kept], [*kept, *lost]):
        (said,) = [each for each in conclusions(cards) if "diverged" in each]
        assert "3 of 3 (split, vanilla-split, mnistnet on mnist-5k, cut 1, nopeek, alpha" in said
        assert "alpha 100.0)" in said
        assert "alpha 10.0" not in said.replace("alpha 100.0", "")


def test_entries_without_an_attack_are_not_called_attacks(make_card: MakeCard) -> None:
    assert conclusions([make_card(attack="smashed-as-image")]) == [
        "No attack was scored, so nothing can be said about leakage."
    ]
    assert conclusions([make_card(status="unfit", why="no")]) == conclusions([])
