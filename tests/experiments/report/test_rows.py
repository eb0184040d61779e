"""Cells pool seeds and nothing else, and say by what they differ."""

from collections.abc import Callable

import pytest

from experiments.report.rows import cells, family, superseded, unseeded
from experiments.results.cards import Card
from leakbed.contracts import Evidence

MakeCard = Callable[..., Card]


def test_cards_that_differ_in_the_seed_alone_are_one_cell(make_card: MakeCard) -> None:
    seeds = [make_card(seed=seed, case=f"split seed={seed}") for seed in (0, 1)]
    other = make_card(cut=2)
    found = cells([*seeds, other])
    assert [len(cell.cards) for cell in found] == [2, 1]
    assert found[0].case == "split"
    assert found[0].targets == 32
    assert len(found[0].cards) == 2


def test_attacks_of_one_trace_from_several_seeds_do_not_supersede_each_other(
    make_card: MakeCard,
) -> None:
    cards = [make_card(attack_seed=seed, key=f"{seed:016x}") for seed in (0, 1)]
    assert superseded(cards, {card.key: 0.0 for card in cards}) == []
    assert [len(cell.cards) for cell in cells(cards)] == [2]


@pytest.mark.parametrize(
    "changes", [{"source": "f" * 16}, {"nodes": 5}, {"settings": {"attack": {"steps": 9}}}]
)
def test_other_code_or_settings_are_another_cell(
    make_card: MakeCard, changes: dict[str, object]
) -> None:
    assert len(cells([make_card(), make_card(seed=1, **changes)])) == 2


def test_namesakes_say_the_settings_they_differ_in(make_card: MakeCard) -> None:
    weak = make_card(settings={"attack": {"steps": 9, "rate": 0.1}})
    strong = make_card(settings={"attack": {"steps": 90, "rate": 0.1}})
    assert sorted(cell.variant for cell in cells([weak, strong])) == ["steps 9", "steps 90"]
    assert [cell.variant for cell in cells([weak, make_card(cut=3)])] == ["", ""]
    usual = make_card(settings={"attack": {"steps": None, "rate": 0.1}})
    assert "steps unset" in [cell.variant for cell in cells([weak, usual])]
    older = make_card(settings={"attack": {"rate": 0.1}})
    assert sorted(cell.variant for cell in cells([weak, older])) == ["steps 9", "steps unset"]


def test_the_order_is_readable(make_card: MakeCard) -> None:
    cards = [
        make_card(cut=2),
        make_card(model="lenet-sigmoid"),
        make_card(attack="smashed-as-image"),
        make_card(protocol="fedavg", attack="dlm"),
        make_card(defense="smashed-noise"),
        make_card(),
    ]
    assert [
        (cell.first.model, cell.family, cell.cut, cell.first.defense, cell.first.attack)
        for cell in cells(cards)
    ] == [
        ("mnistnet", "weights", None, "none", "dlm"),
        ("mnistnet", "split", 1, "none", "unsplit"),
        ("mnistnet", "split", 1, "none", "smashed-as-image"),
        ("mnistnet", "split", 1, "smashed-noise", "unsplit"),
        ("mnistnet", "split", 2, "none", "unsplit"),
        ("lenet-sigmoid", "split", 1, "none", "unsplit"),
    ]


def test_the_best_baseline_is_evidence_free_and_knows_directions(make_card: MakeCard) -> None:
    (cell,) = cells([make_card()])
    assert cell.baseline("ssim") == ("another-row", 0.37)
    assert cell.baseline("mse") == ("mean-public", 0.07)
    assert cell.baseline("psnr") is None
    assert cell.baselines("ssim")["nearest-public"] == 0.77


def test_a_control_holds_only_if_every_seeds_does(make_card: MakeCard) -> None:
    failed = make_card(seed=1, control={"within": False, "above": ["ssim"]})
    unknown = make_card(seed=2, control={"within": None})
    assert cells([make_card(), failed])[0].control_within is False
    assert cells([make_card(), unknown])[0].control_within is True
    assert cells([make_card(control=None)])[0].control_within is None


def test_failures_costs_and_utility_are_over_all_seeds(make_card: MakeCard) -> None:
    first = make_card()
    second = make_card(
        seed=1,
        scores={**first.scores, "failures": 3},
        cost={"seconds": 14.0},
        utility={"test_accuracy": 0.85},
        unreliable="diverged",
    )
    (cell,) = cells([first, second])
    assert cell.failures == 3
    assert cell.cost("seconds") == 13.0
    assert cell.cost("attack_seconds") == 90.0
    assert cell.cost("joules") is None
    assert cell.unreliable == ["diverged"]
    name, utility = cell.utility() or ("", None)
    assert name == "test accuracy"
    assert utility is not None
    assert utility.mean == pytest.approx(0.9)


def test_a_foreign_protocol_is_judged_by_what_was_read(make_card: MakeCard) -> None:
    foreign = make_card().model_copy(update={"protocol": "mine"})
    assert family(foreign) == "split"
    assert family(foreign.model_copy(update={"cut": None})) == "weights"
    assert unseeded("split cut=1 seed=12") == "split cut=1"


def test_only_the_newest_card_of_a_cell_counts(make_card: MakeCard) -> None:
    old, new = make_card(source="a" * 16), make_card(source="b" * 16)
    other = make_card(seed=1)
    when = {old.key: 1.0, new.key: 2.0, other.key: 0.0}
    assert superseded([new, old, other], when) == [old]
    assert superseded([new, other], when) == []


def test_what_reads_no_message_is_no_attack_whatever_its_name(make_card: MakeCard) -> None:
    def is_attack(**changes: object) -> bool:
        return cells([make_card(**changes)])[0].is_attack

    assert is_attack()
    assert not is_attack(attack="tomorrows-baseline", reads=Evidence.NOTHING)
    assert not is_attack(attack="smashed-as-image")
    assert is_attack(attack="mean-image", reads=Evidence.SMASHED)
    assert is_attack(threat=None)
