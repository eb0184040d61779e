"""Objects of a process have import paths there, and elsewhere an error that says so."""

import subprocess
import sys
from types import ModuleType

import pytest

from leakbed.lookup import ImportPathError, import_object
from leakbed.objects import lend, lend_data, lent, own_path, steady
from leakbed.plugins import form_breaches


def made() -> type:
    class Inner:
        """Of a function."""

    return Inner


def test_what_is_lent_is_found_by_its_path_and_twice_by_two() -> None:
    kind = made()
    first, second = (lend(kind, "Inner", why="a class of a test") for _ in range(2))
    assert import_object(first) is import_object(second) is kind
    assert first != second
    assert lent([first, "dlg", "mine:Grey"]) == {first: "a class of a test"}


def test_what_is_drawn_by_a_name_is_the_same_in_every_process() -> None:
    path = lend(made(), "Inner", why="a class of a test")
    assert steady(path) == "leakbed.objects:Inner"
    assert [steady(each) for each in ("dlg", "mine:Grey_0f0f0f0f_1")] == [
        "dlg",
        "mine:Grey_0f0f0f0f_1",
    ]


def test_equal_data_have_one_name() -> None:
    paths = [lend_data(lambda: 1, content=each) for each in ("sum-a", "sum-b", "sum-a")]
    assert paths[0] == paths[2] != paths[1]
    assert lend_data(lambda: 1, content="0f" * 32) == "leakbed.objects:data_0f0f0f0f0f0f"
    assert steady("leakbed.objects:data_0f0f0f0f0f0f") == "leakbed.objects:data"


def test_only_what_another_process_can_import_has_a_path_of_its_own(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    assert own_path(form_breaches) == "leakbed.plugins:form_breaches"
    assert own_path(made()) is None
    script = ModuleType("__main__")
    script.Grey = type("Grey", (), {"__module__": "__main__"})  # type: ignore[attr-defined]
    monkeypatch.setitem(sys.modules, "__main__", script)
    assert own_path(script.Grey) is None
    replaced = type("form_breaches", (), {"__module__": "leakbed.plugins"})
    assert own_path(replaced) is None  # as after a module was loaded anew


def test_a_name_of_another_process_says_what_to_do() -> None:
    with pytest.raises(ImportPathError, match=r"another process was handed.*'package.module:name'"):
        import_object("leakbed.objects:Grey_0f0f0f0f_7")
    assert "another process" in lent(["leakbed.objects:Grey_0f0f0f0f_7"]).popitem()[1]
    with pytest.raises(ImportPathError, match=r"unknown name in leakbed.objects 'Grey'"):
        import_object("leakbed.objects:Grey")
    with pytest.raises(ImportPathError, match="name of the program that runs"):
        import_object("__main__:NobodyHasThis")


def test_it_imports_without_torch_or_flower() -> None:
    code = "import sys, leakbed.objects; print({'torch', 'flwr'} & sys.modules.keys())"
    done = subprocess.run(  # noqa: S603  our own code
        [sys.executable, "-c", code], check=True, capture_output=True, text=True
    )
    assert done.stdout == "set()\n"
