"""Files and overrides become checked settings, or one line per fault."""

from pathlib import Path

import pytest

from experiments.settings.load import FLAGSHIP, load_settings
from experiments.settings.schema import SettingsError

TEXT = """
name = "small"
seed = 3
[data]
nodes = 2
[[attack]]
name = "constant-image"
[[attack]]
name = "mean-image"
"""


@pytest.fixture
def file(tmp_path: Path) -> Path:
    path = tmp_path / "settings.toml"
    path.write_text(TEXT)
    return path


def test_reads_a_file(file: Path) -> None:
    settings = load_settings(file)
    assert (settings.seed, settings.data.nodes, len(settings.attack)) == (3, 2, 2)


def test_overrides_replace_values_of_every_kind(file: Path) -> None:
    settings = load_settings(
        file, ["seed=7", "data.nodes=5", "data.name=mnist", "attack.targets=2", "model.cut=1"]
    )
    assert settings.seed == 7
    assert (settings.data.nodes, settings.data.name) == (5, "mnist")
    assert [attack.targets for attack in settings.attack] == [2, 2]
    assert settings.model.cut == 1


def test_settings_load_as_themselves(file: Path) -> None:
    settings = load_settings(file)
    assert load_settings(settings) == settings
    assert load_settings(settings, ["seed=9"]).seed == 9


@pytest.mark.parametrize(
    ("overrides", "told"),
    [
        (["seed"], "must be key=value"),
        (["seed=-1"], "seed: Input should be greater than or equal to 0 (got -1)"),
        (["data.nodes=none"], "data.nodes"),
        (["protocol.nme=3"], "unknown key of protocol fedavg 'nme'; did you mean 'name'"),
    ],
)
def test_bad_overrides_are_told_apart(file: Path, overrides: list[str], told: str) -> None:
    with pytest.raises(SettingsError) as error:
        load_settings(file, overrides)
    assert told in str(error.value)


@pytest.mark.parametrize(
    ("value", "wrong"),
    [
        ("-1", "Input should be greater than or equal to 0 (got -1)"),
        ("1.5", "Input should be a valid integer (got 1.5)"),
        ("", "String should have at least 1 character (got '')"),
        ("[2]", "Input should be a valid integer"),
    ],
)
def test_a_key_of_two_kinds_says_what_is_wrong_once(file: Path, value: str, wrong: str) -> None:
    with pytest.raises(SettingsError) as error:
        load_settings(file, [f"model.cut={value}"])
    assert str(error.value) == f"model.cut: {wrong}"


def test_says_every_fault_on_a_line(file: Path) -> None:
    with pytest.raises(SettingsError) as error:
        load_settings(file, ["seed=-1", "data.nodes=0"])
    assert len(str(error.value).splitlines()) == 2


def test_missing_and_broken_files_are_named(tmp_path: Path) -> None:
    with pytest.raises(SettingsError, match=r"absent\.toml is no file"):
        load_settings(tmp_path / "absent.toml")
    broken = tmp_path / "broken.toml"
    broken.write_text("name = ")
    with pytest.raises(SettingsError, match=r"broken\.toml is not TOML"):
        load_settings(broken)
    broken.write_bytes(b'name = "\xff"')
    with pytest.raises(SettingsError, match=r"broken\.toml is not TOML: 'utf-8'"):
        load_settings(broken)


def test_a_faulty_entry_is_one_fault_and_its_value_is_shown(file: Path) -> None:
    with pytest.raises(SettingsError) as error:
        load_settings(file, ["attack.when=test"])
    assert "attack.0.when: " in str(error.value)
    assert "(got 'test')" in str(error.value)
    assert "at least 1 item" not in str(error.value)


@pytest.mark.parametrize("section", ["data", "attack"])
def test_an_override_inside_what_is_no_table_is_a_fault(section: str) -> None:
    with pytest.raises(SettingsError, match=section):
        load_settings({"name": "x", section: [3]}, [f"{section}.name=y"])


def test_an_override_reaches_the_attacks_that_have_the_key(file: Path) -> None:
    text = file.read_text() + '[[attack]]\nname = "unsplit"\n'
    file.write_text(text)
    own = [attack.own for attack in load_settings(file, ["attack.outer_steps=7"]).attack]
    assert own == [{}, {}, {"outer_steps": 7}]
    tries = [attack.restarts for attack in load_settings(file, ["attack.restarts=4"]).attack]
    assert tries == [None, None, 4], "a baseline has nothing to choose by"
    with pytest.raises(SettingsError, match="outer_stepps"):
        load_settings(file, ["attack.outer_stepps=7"])


def test_a_file_that_an_editor_marked_as_unicode_is_read(tmp_path: Path) -> None:
    file = tmp_path / "settings.toml"
    file.write_text('name = "marked"\n[[attack]]\nname = "unsplit"\n', encoding="utf-8-sig")
    assert load_settings(file).name == "marked"


def test_the_flagship_is_there() -> None:
    assert load_settings(FLAGSHIP).name == "fl-vs-split"
