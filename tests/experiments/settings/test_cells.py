"""Cells are the product of cases, sweeps, defences and attacks."""

from typing import Any

import pytest
import torch

from experiments.settings.cells import CellSettings, cells
from experiments.settings.load import load_settings
from experiments.settings.schema import SettingsError

TABLE = {
    "name": "x",
    "seed": 5,
    "attack": [{"name": "constant-image"}, {"name": "mean-image"}],
    "defense": [{"name": "none"}, {"name": "smashed-noise", "sigma": 0.1}],
    "case": [{"name": "fl", "protocol.name": "fedavg"}, {"name": "sl", "model.cut": 2}],
    "protocol": {"name": "vanilla-split"},
    "sweep": {"model.cut": [1, 2], "seed": [0, 1]},
}


def test_every_combination_is_one_cell() -> None:
    found = cells(load_settings(TABLE))
    assert len(found) == 2 * 4 * 2 * 2
    assert len({cell.training.key("source") + cell.attack.name + cell.case for cell in found}) == 32


def test_a_sweep_overrides_a_case_and_a_case_the_file() -> None:
    found = cells(load_settings(TABLE))
    assert {cell.training.protocol.name for cell in found if cell.case.startswith("fl")} == {
        "fedavg"
    }
    assert {cell.training.model.cut for cell in found if cell.case.startswith("sl")} == {1, 2}
    assert {cell.training.seed for cell in found} == {0, 1}
    assert found[0].case == "fl cut=1 seed=0"


def test_cells_that_differ_in_the_attack_share_a_training_run() -> None:
    first, second = cells(load_settings(TABLE))[:2]
    assert first.training == second.training
    assert first.training.key("a") == second.training.key("a")
    assert first.training.key("a") != first.training.key("b")
    assert first.as_json() != second.as_json()


def collecting(*attacks: dict[str, Any], **changes: Any) -> list[CellSettings]:
    tables = [{"name": "constant-image", **attack} for attack in attacks]
    return cells(load_settings({"name": "x", "attack": tables, **changes}))


def test_a_run_keeps_the_rounds_its_attacks_read_and_is_shared_by_them() -> None:
    five = {"protocol": {"rounds": 5}}
    both = collecting({}, {"collect": "middle"}, {"collect": 2}, **five)
    assert {cell.training.keep_rounds for cell in both} == {(2, 3, 5)}
    assert collecting({}, {"collect": 5}, **five)[0].training.keep_rounds == "last"
    all_of_them = collecting({"collect": "first"}, keep_rounds="all", **five)
    assert all_of_them[0].training.keep_rounds == "all"


def test_a_round_beyond_the_last_is_refused_before_training() -> None:
    with pytest.raises(SettingsError, match=r"collect = 6, but protocol\.rounds is 5"):
        collecting({"collect": 6}, protocol={"rounds": 5})


def test_test_rows_are_those_of_the_last_round() -> None:
    inference = {"when": "inference", "collect": "first"}
    with pytest.raises(SettingsError, match="collect = 'first' is round 1 of 5"):
        collecting(inference, protocol={"rounds": 5})
    collecting(inference, protocol={"rounds": 1})


def test_without_cases_the_experiment_is_one() -> None:
    plain = {"name": "alone", "attack": [{"name": "constant-image"}]}
    assert [cell.case for cell in cells(load_settings(plain))] == ["alone"]


def test_the_reported_figure_is_not_part_of_a_cells_identity() -> None:
    told = {"name": "x", "attack": [{"name": "constant-image", "reported": 0.5}]}
    untold = {"name": "x", "attack": [{"name": "constant-image"}]}
    assert cells(load_settings(told))[0].as_json() == cells(load_settings(untold))[0].as_json()


def hijacked(*tables: dict[str, Any]) -> list[CellSettings]:
    return cells(load_settings({"name": "x", "attack": list(tables)}))


def test_a_hijacked_run_is_never_a_passive_attacks() -> None:
    active, passive = {"name": "fsha"}, {"name": "mean-image"}
    found = hijacked(active, passive)
    assert [cell.attack.name for cell in found] == ["mean-image", "fsha"], "passive ones first"
    assert found[0].training.adversary is None
    assert found[1].training.key("s") != found[0].training.key("s")
    alone = hijacked(passive)[0].training
    assert alone.key("s") == found[0].training.key("s"), "as if no adversary were there"


def test_a_hijacked_run_is_its_adversarys_settings_and_not_its_targets() -> None:
    plain, aimed, other, often = hijacked(
        {"name": "fsha"},
        {"name": "fsha", "targets": 3, "when": "inference", "control": False, "reported": 1},
        {"name": "fsha", "gradient_scale": 2.0},
        {"name": "fsha", "checkpoint_every": 7},
    )
    keys = [cell.training.key("s") for cell in (plain, aimed, other, often)]
    assert keys[0] == keys[1]
    assert len(set(keys)) == 3
    assert plain.as_json() != aimed.as_json()


def test_the_control_run_differs_in_what_nodes_get_alone() -> None:
    training = hijacked({"name": "fsha", "gradient_scale": 2.0})[0].training
    control = training.never_hijacked()
    assert training.adversary is not None
    assert control.adversary is not None
    assert (training.adversary.forges, control.adversary.forges) == (True, False)
    assert control.adversary.own == training.adversary.own == {"gradient_scale": 2.0}
    assert control.key("s") != training.key("s")
    honest = hijacked({"name": "mean-image"})[0].training
    assert honest.never_hijacked() == honest


def test_a_case_chooses_among_namesakes_by_what_they_are_called() -> None:
    table: dict[str, Any] = {
        "name": "x",
        "protocol": {"name": "vanilla-split"},
        "attack": [
            {"name": "fsha", "gradient_scale": 2.0, "called": "strong", "everywhere": False},
            {"name": "fsha", "called": "plain", "everywhere": False},
            {"name": "mean-image"},
        ],
        "defense": [
            {"name": "none"},
            {"stack": [{"name": "smashed-noise", "sigma": 2.0}], "called": "loud"},
            {"name": "smashed-noise", "called": "soft", "everywhere": False},
        ],
        "case": [
            {"name": "a", "attacks": ["plain"], "defenses": ["soft"]},
            {"name": "b", "attacks": ["strong"], "defenses": ["none"]},
            {"name": "c"},
        ],
    }
    (plain, strong, *others) = cells(load_settings(table))
    assert plain.attack.own == {}
    assert plain.training.defense.stack == (("smashed-noise", {}),)
    assert strong.attack.own == {"gradient_scale": 2.0}
    assert [cell.training.defense.name for cell in others] == ["none", "smashed-noise"]

    uncalled = {**table, "attack": [{"name": "fsha"}], "defense": [{"name": "smashed-noise"}]}
    (same,) = cells(load_settings({**uncalled, "case": [{"name": "a"}]}))
    assert same.as_json() == plain.as_json(), "no result depends on it"


def test_a_case_may_name_the_attacks_and_defenses_it_is_for() -> None:
    found = cells(
        load_settings(
            {
                "name": "x",
                "attack": [{"name": "mean-image"}, {"name": "fsha", "everywhere": False}],
                "defense": [
                    {"name": "none"},
                    {"name": "smashed-noise"},
                    {"name": "splitout", "everywhere": False},
                ],
                "protocol": {"name": "vanilla-split"},
                "case": [
                    {"name": "plain"},
                    {"name": "active", "attacks": ["fsha"], "defenses": ["none", "splitout"]},
                ],
            }
        )
    )
    told = [(cell.case, cell.training.defense.name, cell.attack.name) for cell in found]
    assert told == [
        ("plain", "none", "mean-image"),
        ("plain", "smashed-noise", "mean-image"),
        ("active", "none", "fsha"),
        ("active", "splitout", "fsha"),
    ]
    alone = cells(load_settings({"name": "x", "attack": [{"name": "mean-image"}]}))
    assert "everywhere" not in str([cell.as_json() for cell in (*found, *alone)])


def tuned(told: object, **attack: object) -> list[CellSettings]:
    table = {"name": "mean-image", "tuned_on": told, **attack}
    return cells(load_settings({"name": "x", "attack": [table], "sweep": {"seed": [0, 1]}}))


def test_what_settings_were_chosen_on_is_said_and_changes_no_result() -> None:
    plain, chosen = (
        cell.as_json()
        for cell in (tuned("default")[0], tuned({"seeds": [100], "rows": "private"})[0])
    )
    assert plain == chosen
    kept = tuned({"seeds": [100], "rows": "test"})[0].attack
    dumped = kept.model_dump(mode="json")
    assert dumped["tuned_on"] == {"seeds": [100], "rows": "test"}
    again = {"name": "mean-image", "tuned_on": dumped["tuned_on"]}
    assert load_settings({"name": "x", "attack": [again]}).attack[0] == kept


def test_an_attack_is_not_reported_on_the_rows_its_settings_were_chosen_on() -> None:
    with pytest.raises(SettingsError, match=r"private rows of seed 1 .*than 1, 100$"):
        tuned({"seeds": [1, 100], "rows": "private"})
    with pytest.raises(SettingsError, match="test rows of seed 0"):
        tuned({"seeds": [0], "rows": "test"}, when="inference")
    assert tuned({"seeds": [0], "rows": "test"})
    assert tuned({"seeds": [0], "rows": "public"}, when="inference")
    assert tuned({"seeds": [0], "rows": "elsewhere"})


@pytest.mark.parametrize(
    "told",
    [
        "publised",
        100,
        [100],
        {"seeds": [], "rows": "private"},
        {"seeds": [-1], "rows": "private"},
        {"seeds": [100]},
        {"seeds": [100], "rows": "all"},
        {"seeds": [100], "rows": "private", "colour": 1},
    ],
)
def test_what_says_nothing_of_where_settings_come_from_is_refused_in_one_line(told: object) -> None:
    with pytest.raises(SettingsError) as caught:
        tuned(told)
    assert len(str(caught.value).splitlines()) == 1
    assert "private, public, test, elsewhere" in str(caught.value)


def test_the_type_of_the_device_is_part_of_the_result(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    (cell,) = collecting({})
    assert cell.training.device == "auto"
    on_cpu, folder = cell.as_json(), cell.training.key("a")
    assert on_cpu["device"] == "cpu"
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 1)
    assert cell.as_json()["device"] == "cuda"
    assert cell.training.key("a") != folder
    assert collecting({}, device="cpu")[0].as_json() == on_cpu
