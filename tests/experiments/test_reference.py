"""The reference page is current, and the JSON schema takes what reading a settings file takes."""

import json
import tomllib
from pathlib import Path
from typing import Any

import pytest
from typer.testing import CliRunner

from experiments.cli import app
from experiments.reference import page, schema
from experiments.settings.catalogues import plugin_fields
from experiments.settings.cells import cells
from experiments.settings.load import load_settings
from experiments.settings.schema import Settings, SettingsError
from strategies import PROTOCOLS

ROOT = Path(__file__).resolve().parents[2]
FILES = sorted((ROOT / "experiments" / "studies").glob("*/*.toml"))
TABLE: dict[str, Any] = {
    "name": "strengths",
    "attack": [{"name": "constant-image"}],
    "defense": [{"name": "weight-noise", "scale": 0.1}],
}


@pytest.fixture(scope="module")
def checked() -> Any:
    jsonschema = pytest.importorskip("jsonschema")  # comes with Ray, where Ray is
    jsonschema.Draft202012Validator.check_schema(made := schema())
    return jsonschema.Draft202012Validator(made)


def test_the_page_is_current() -> None:
    written = (ROOT / "docs" / "settings.md").read_text()
    assert written == page(), "run `make readme`"


def test_every_key_has_its_meaning_on_the_page() -> None:
    rows = [line for line in page().splitlines() if line.startswith("| `")]
    assert len(rows) > 100
    assert [row for row in rows if row.endswith("|  |")] == []
    told = [row for row in rows if row.removeprefix("| `").split("`")[0] not in PROTOCOLS]
    assert [row for row in told if not row.endswith((". |", ".) |")) or ":`" in row] == []
    for package in ("attacks", "defenses"):
        for name in plugin_fields(package):
            assert f"### `{name}`" in page()


@pytest.mark.parametrize("file", FILES, ids=lambda file: f"{file.parent.name}/{file.name}")
def test_every_settings_file_fits_the_schema(file: Path, checked: Any) -> None:
    table = tomllib.loads(file.read_text())
    if "attack" not in table:
        pytest.skip("no experiment")
    checked.validate(table)


@pytest.mark.parametrize("file", FILES, ids=lambda file: f"{file.parent.name}/{file.name}")
def test_every_key_of_every_settings_file_is_one_of_the_schema(file: Path) -> None:
    made, table = schema(), tomllib.loads(file.read_text())
    assert "attack" not in table or table.keys() <= made["properties"].keys()
    for section, kind in (("data", "Data"), ("model", "Model"), ("protocol", "Protocol")):
        known = made["$defs"][f"{kind}Settings"]["properties"]
        assert table.get(section, {}).keys() <= known.keys()


@pytest.mark.parametrize(
    "wrong",
    [
        {"rounds": 3},
        {"protocol": {"round": 3}},
        {"protocol": {"rounds": 0}},
        {"protocol": {"labels": "sever"}},
        {"protocol": {"name": "vanilla-split", "sync": "step"}},
        {"protocol": {"name": "parallel-split", "sync": "never"}},
        {"model": {"cut": ""}},
        {"attack": [{"name": "constant-image", "step": 3}]},
        {"attack": [{"name": "no-such"}]},
        {"attack": []},
        {"defense": [{"name": "weight-noise", "scale": "much"}]},
        {"defense": [{"stack": [{"name": "weight-noise", "scales": 1.0}]}]},
    ],
)
def test_what_reading_refuses_the_schema_refuses(wrong: dict[str, Any], checked: Any) -> None:
    checked.validate(TABLE)
    with pytest.raises(SettingsError):
        load_settings({**TABLE, **wrong})
    assert not checked.is_valid({**TABLE, **wrong})


def test_the_command_prints_it() -> None:
    done = CliRunner().invoke(app, ["schema"])
    assert done.exit_code == 0, done.output
    assert json.loads(done.output) == schema()


def stacks(table: dict[str, Any]) -> list[Any]:
    return [each.stack for each in load_settings(table).defense]


def test_a_list_where_a_setting_is_one_value_is_several_strengths(
    checked: Any,
) -> None:
    table = {**TABLE, "defense": [{"name": "weight-noise", "scale": [0.1, 0.5, 0.9]}]}
    checked.validate(table)
    apart = [{"name": "weight-noise", "scale": each} for each in (0.1, 0.5, 0.9)]
    assert stacks(table) == stacks({**TABLE, "defense": apart})
    assert len(cells(load_settings(table))) == 3
    assert load_settings(load_settings(table)) == load_settings(table)
    chosen = load_settings(TABLE, ["defense.scale=[0.1, 0.5]"]).defense
    assert [each.stack for each in chosen] == stacks({**TABLE, "defense": apart[:2]})


def test_lists_in_a_stack_and_in_an_attack_give_every_combination() -> None:
    noise = {"name": "weight-noise", "scale": [0.1, 0.5]}
    table = {**TABLE, "defense": [{"stack": [noise, noise], "called": "both"}]}
    assert [tuple(own["scale"] for _, own in stack) for stack in stacks(table)] == [
        (0.1, 0.1),
        (0.1, 0.5),
        (0.5, 0.1),
        (0.5, 0.5),
    ]
    attack = {"name": "unsplit", "outer_steps": [1, 2], "input_steps": [3, 4]}
    attacks = load_settings({**TABLE, "attack": [attack]}).attack
    assert [tuple(each.own.values()) for each in attacks] == [(1, 3), (1, 4), (2, 3), (2, 4)]


def test_strengths_are_checked_one_by_one() -> None:
    with pytest.raises(SettingsError, match=r"scale = \[\] has no values"):
        load_settings({**TABLE, "defense": [{"name": "weight-noise", "scale": []}]})
    with pytest.raises(SettingsError, match=r"weight-noise: scale: .*much"):
        load_settings({**TABLE, "defense": [{"name": "weight-noise", "scale": [0.1, "much"]}]})


def test_every_top_key_is_described() -> None:
    told = schema()["properties"]
    assert told.keys() == Settings.model_fields.keys()
    assert [key for key, each in told.items() if not each.get("description")] == []
