"""What a key depends on: found by imports in a copy of the sources, and what an edit changes."""

import shutil
import time
from pathlib import Path

import pytest

from leakbed import reach as reaching
from leakbed.reach import digest, reach, read

ROOT = Path(__file__).resolve().parents[2]
PACKAGES = ("attacks", "clients", "defenses", "experiments", "leakbed", "strategies")
TRAIN, ATTACK, SCORE = (f"experiments.run.{name}" for name in ("train", "attack", "executor"))
USED = frozenset({"vanilla-split", "splitguard"})
EXPLOIT, ORACLE = "attacks/exploit.py", "leakbed/oracle/metrics.py"


@pytest.fixture
def copy(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    for name in PACKAGES:
        ignored = shutil.ignore_patterns("__pycache__", "studies")
        shutil.copytree(ROOT / name, tmp_path / name, ignore=ignored)
    monkeypatch.setattr(reaching, "_ROOT", tmp_path)
    return tmp_path


def keys(attack: str = "exploit", used: frozenset[str] = USED) -> tuple[str, str, str]:
    reaching.digest.cache_clear()  # as in a new process
    return (
        digest((TRAIN,), used),
        digest((TRAIN, ATTACK), used | {attack}),
        digest((SCORE,), used | {attack}),
    )


def edit(file: Path, before: str, after: str) -> None:
    text = file.read_text()
    assert before in text
    file.write_text(text.replace(before, after, 1))


def test_a_comment_or_a_docstring_changes_no_key(copy: Path) -> None:
    before = keys()
    for file in (EXPLOIT, ORACLE, "strategies/vanilla_split.py", "attacks/__init__.py"):
        edit(copy / file, '"""', '"""Said otherwise. ')
        (copy / file).write_text((copy / file).read_text() + "\n\n# a comment\n")
    assert keys() == before


def test_an_edit_of_an_attack_trains_nothing_again_and_leaves_other_attacks(copy: Path) -> None:
    trained, answered, scored = keys()
    other = keys("norm-score")
    (copy / EXPLOIT).write_text((copy / EXPLOIT).read_text() + "\nEDITED = 1\n")
    after = keys()
    assert after[0] == trained
    assert after[1] != answered
    assert after[2] != scored
    assert keys("norm-score") == other


@pytest.mark.parametrize("name", ["metrics", "scoring", "baselines", "model_scores"])
def test_an_edit_of_the_oracle_neither_trains_nor_attacks_again(copy: Path, name: str) -> None:
    trained, answered, scored = keys()
    file = copy / "leakbed" / "oracle" / f"{name}.py"
    file.write_text(file.read_text() + "\nEDITED = 1\n")
    after = keys()
    assert after[:2] == (trained, answered)
    assert after[2] != scored


def test_an_edit_of_what_trains_changes_all(copy: Path) -> None:
    before = keys()
    for file in ("strategies/vanilla_split.py", "clients/split.py", "defenses/splitguard.py"):
        (copy / file).write_text((copy / file).read_text() + "\nEDITED = 1\n")
        after = keys()
        assert not set(after) & set(before)
        before = after


def test_an_entry_of_a_catalogue_more_changes_no_key_of_another(copy: Path) -> None:
    before = keys()
    for package, sibling, kind in (
        ("attacks", "exploit", "Exploit"),
        ("defenses", "splitguard", "SplitGuard"),
    ):
        shutil.copy(copy / package / f"{sibling}.py", copy / package / "added.py")
        init = copy / package / "__init__.py"
        line = f"from {package}.{sibling} import {kind}\n"
        edit(init, line, f"from {package}.added import {kind} as Added\n{line}")
        edit(init, "] = {\n", '] = {\n    "added": Added,\n')
        edit(init, "__all__ = [\n", '__all__ = [\n    "Added",\n')
    assert keys() == before
    assert keys("added")[1] != before[1]


def test_the_entry_that_a_run_uses_counts_with_its_settings(copy: Path) -> None:
    before, other = keys(), keys(used=frozenset({"splitfed-v1"}))
    edit(copy / "strategies/__init__.py", 'optimizer_state=("fresh", "kept")', "parts=2")
    assert keys() == before
    assert not set(keys(used=frozenset({"splitfed-v1"}))) & set(other)


def test_what_a_catalogue_takes_from_another_dict_counts(copy: Path) -> None:
    added, init = copy / "attacks" / "added.py", copy / "attacks" / "__init__.py"
    added.write_text("MORE = {}\n")
    line = "from attacks.exploit import Exploit\n"
    edit(init, line, f"from attacks.added import MORE\n{line}")
    edit(init, "__all__ = [\n", '__all__ = [\n    "MORE",\n')
    edit(init, "] = {\n", "] = {\n    **MORE,\n")
    init.write_text(init.read_text() + "\nEVERY = {**ATTACKS, **INTRUDERS}\n")
    before, asked = keys(), reach(["attacks.EVERY"], used={"exploit"})
    assert {"attacks.added", "attacks.exploit"} <= asked.keys()
    assert "attacks.norm_score" not in asked
    added.write_text("MORE = {}\nEDITED = 1\n")
    assert keys()[1] != before[1]


@pytest.mark.parametrize("value", ["1", "{0: 1}", "str(1)"])
def test_a_dict_that_is_no_catalogue_counts_as_a_whole(copy: Path, value: str) -> None:
    init = copy / "leakbed" / "data" / "__init__.py"
    kept = init.read_text()
    init.write_text(f'{kept}\nLIMITS = {{"rows": {value}}}\n')
    before = keys()
    init.write_text(f'{kept}\nLIMITS = {{"rows": {value.replace("1", "2")}}}\n')
    assert not set(keys()) & set(before)


def test_who_hijacks_a_run_counts_for_that_run_alone(copy: Path) -> None:
    hijacked = USED | {"fsha", "adversary"}
    before, beside = keys(), keys(used=hijacked)
    file = copy / "attacks" / "feature_space_hijacking.py"
    file.write_text(file.read_text() + "\nEDITED = 1\n")
    assert keys() == before
    assert keys(used=hijacked)[0] != beside[0]


def test_imports_inside_functions_count_and_those_for_a_type_checker_do_not(copy: Path) -> None:
    (copy / "leakbed" / "seeds.py").write_text(
        "from typing import TYPE_CHECKING\nif TYPE_CHECKING:\n    from leakbed.cli import main\n"
        "if not TYPE_CHECKING:\n    from leakbed.oracle.rivals import UNTRAINED\n"
        "def later():\n    from leakbed.oracle.audit import audit\n    return audit\n"
    )
    found = reach([TRAIN], used=USED)
    assert {"leakbed.oracle.audit", "leakbed.oracle.rivals"} <= found.keys()
    assert "leakbed.cli" not in found


def test_a_users_module_counts_with_what_it_takes_from_ours(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "mine_reached.py").write_text("from attacks import Exploit\nimport mine_block\n")
    (tmp_path / "mine_block.py").write_text("ONE = 1\n")
    monkeypatch.syspath_prepend(str(tmp_path))
    found = reach(["mine_reached"])
    assert {"mine_reached", "mine_block", "attacks.exploit"} <= found.keys()
    assert "attacks.norm_score" not in found


def test_what_is_no_python_counts_by_its_bytes(tmp_path: Path) -> None:
    file = tmp_path / "broken.py"
    file.write_text("this is no Python # 1")
    before = read(file)
    file.write_text("this is no Python # 2")
    assert read(file).digest != before.digest


def test_keys_are_cheap() -> None:
    reaching._read.cache_clear()
    reaching._package.cache_clear()
    reaching.digest.cache_clear()
    started = time.process_time()
    digest((SCORE,), USED | {"exploit"})
    first = time.process_time() - started
    started = time.process_time()
    digest((SCORE,), USED | {"exploit"})
    assert time.process_time() - started < 0.001
    assert first < 2  # of the processor, on a slow machine; about half a second on an idle one
