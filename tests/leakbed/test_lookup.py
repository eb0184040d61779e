import math
from pathlib import Path

import pytest

from leakbed.lookup import ImportPathError, import_object, unknown_name


def test_the_nearest_name_comes_first_then_all() -> None:
    assert unknown_name("data set", "mnsit", ["mnist", "cifar10"]) == (
        "unknown data set 'mnsit'; did you mean 'mnist'? legal: cifar10, mnist"
    )


def test_a_name_near_nothing_gets_no_hint() -> None:
    assert unknown_name("model", "zzz", ["mnistnet"]) == "unknown model 'zzz'; legal: mnistnet"


def test_nothing_legal_is_said_so() -> None:
    assert unknown_name("key", "x", []) == "unknown key 'x'; there is none to set"


@pytest.mark.parametrize(
    ("source", "told"),
    [
        (
            "raise RuntimeError('on import')",
            r"RuntimeError: on import \(strange_module.py, line 1\)",
        ),
        ("def (", r"SyntaxError: .*strange_module.py, line 1"),
    ],
)
def test_a_module_that_raises_is_named_with_its_line(
    source: str, told: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "strange_module.py").write_text(source)
    monkeypatch.syspath_prepend(str(tmp_path))
    with pytest.raises(ImportPathError, match=told):
        import_object("strange_module:x")


def test_imports_what_a_path_names() -> None:
    assert import_object("math:pi") == math.pi


@pytest.mark.parametrize(
    ("path", "message"),
    [
        ("math", "no import path"),
        (":pi", "no import path"),
        ("no_such_module:x", "cannot import 'no_such_module'.*PYTHONPATH"),
        ("math:squrt", "unknown name in math 'squrt'; did you mean 'sqrt'"),
    ],
)
def test_bad_paths_say_what_to_write(path: str, message: str) -> None:
    with pytest.raises(ImportPathError, match=message):
        import_object(path)
