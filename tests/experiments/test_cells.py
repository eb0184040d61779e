"""Cells are the product of cases, sweeps, defences and attacks."""

from experiments.cells import cells
from experiments.settings_file import load_settings

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


def test_without_cases_the_experiment_is_one() -> None:
    plain = {"name": "alone", "attack": [{"name": "constant-image"}]}
    assert [cell.case for cell in cells(load_settings(plain))] == ["alone"]


def test_the_reported_figure_is_not_part_of_a_cells_identity() -> None:
    told = {"name": "x", "attack": [{"name": "constant-image", "reported": 0.5}]}
    untold = {"name": "x", "attack": [{"name": "constant-image"}]}
    assert cells(load_settings(told))[0].as_json() == cells(load_settings(untold))[0].as_json()
