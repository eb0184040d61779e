"""The console entry answers at once, and says which package is missing."""

import importlib
import os
import subprocess
import sys
from pathlib import Path
from types import ModuleType

import pytest

from leakbed import __version__
from leakbed.cli import main

OVERRUN = """
import atexit, signal, sys, time
from experiments import cli as commands
from leakbed.cli import main
from leakbed.grids.local import CallThread

signal.signal(signal.SIGALRM, signal.SIG_IGN)  # so that the call runs in a thread

def app():
    try:
        CallThread().run(lambda: time.sleep({sleep}), seconds=0.05, what="node 3")
    except TimeoutError:
        print("one line", end="")
    {end}

commands.app = app
atexit.register(print, "torn down")
main()
"""
OWN_CODE = """
from experiments import cli as commands
from leakbed.cli import main
commands.app = lambda: None
main()
import attacks
from mine import found
"""
DASH = r"""
import sys
from experiments import cli as commands
from leakbed.cli import main
text = "\N{EN DASH}\N{SNOWMAN}\udce9."
commands.app = lambda: [print(text, file=file) for file in (sys.stdout, sys.stderr)]
main()
"""
SHADOWED = """
from leakbed.testbed import testbed
assert testbed("attacks").ATTACKS
assert testbed("experiments.settings.plugins").plugin_fields
"""

ROOT = Path(__file__).parents[2]
HEAVY = ("torch", "ray", "torchvision", "flwr", "matplotlib")
CODE = """
import sys
from leakbed.cli import main
sys.argv = {argv!r}
try:
    main()
except SystemExit as end:
    code = end.code
loaded = [name for name in {heavy!r} if name in sys.modules]
sys.exit(f"{{code}} {{loaded}}")
"""


def started(*argv: str) -> subprocess.CompletedProcess[str]:
    code = CODE.format(argv=["leakbed", *argv], heavy=HEAVY)
    return subprocess.run(  # noqa: S603
        [sys.executable, "-c", code], cwd=ROOT, check=False, capture_output=True, text=True
    )


def scripted(
    code: str, folder: Path, environment: dict[str, str] | None = None
) -> subprocess.CompletedProcess[str]:
    """Run a script that lies elsewhere, as the installed command does, in a folder."""
    script = folder / "bin" / "leakbed"
    script.parent.mkdir()
    script.write_text(code)
    return subprocess.run(  # noqa: S603
        [sys.executable, str(script)],
        cwd=folder,
        env={**os.environ, **(environment or {})},
        check=False,
        capture_output=True,
        text=True,
    )


def test_help_loads_nothing_heavy() -> None:
    ended = started("--help")
    assert ended.stderr.splitlines()[-1] == "0 []"
    assert "compare" in ended.stdout


def test_the_module_runs_as_the_command_does() -> None:
    """It would otherwise be imported, do nothing and say that all went well."""
    ended = subprocess.run(
        [sys.executable, "-m", "leakbed.cli", "--version"],
        cwd=ROOT,
        check=False,
        capture_output=True,
        text=True,
    )
    assert ended.stdout == f"{__version__}\n"


def test_a_typing_mistake_is_answered_without_torch(tmp_path: Path) -> None:
    file = tmp_path / "bad.toml"
    file.write_text('name = "bad"\n[protocol]\nruonds = 2\n[[attack]]\nname = "unsplit"\n')
    lines = started("run", str(file)).stderr.splitlines()
    assert lines[-1] == "2 []"
    assert "did you mean 'rounds'" in lines[0]


def test_an_unknown_option_is_bad_input() -> None:
    assert started("compare", "--bogus").stderr.splitlines()[-1] == "2 []"


def test_a_missing_typer_is_named_with_the_command(monkeypatch: pytest.MonkeyPatch) -> None:
    def without_typer(name: str) -> ModuleType:
        raise ModuleNotFoundError("No module named 'typer'", name="typer")

    monkeypatch.setattr(importlib, "import_module", without_typer)
    with pytest.raises(SystemExit, match=r"error: .* package 'typer', .*run `make setup`"):
        main()


@pytest.mark.parametrize(
    ("end", "code", "error"),
    [
        ("sys.exit(1)", 1, ""),
        ("sys.exit()", 0, ""),
        ("raise OSError('disk')", 1, "OSError: disk"),
    ],
)
def test_a_call_that_overran_is_left_behind_without_a_crash(
    tmp_path: Path, end: str, code: int, error: str
) -> None:
    left = scripted(OVERRUN.format(sleep=60, end=end), tmp_path)
    assert (left.returncode, left.stdout) == (code, "one line")
    assert error in left.stderr


def test_without_an_overrun_the_way_out_is_the_ordinary_one(tmp_path: Path) -> None:
    ended = scripted(OVERRUN.format(sleep=0, end="sys.exit(1)"), tmp_path)
    assert (ended.returncode, ended.stdout) == (1, "torn down\n")


def test_code_of_the_working_directory_is_found_after_ours(tmp_path: Path) -> None:
    (tmp_path / "attacks").mkdir()
    (tmp_path / "attacks" / "__init__.py").write_text("raise RuntimeError")
    (tmp_path / "mine.py").write_text("found = True")
    ended = scripted(OWN_CODE, tmp_path)
    assert (ended.returncode, ended.stderr) == (0, "")


@pytest.mark.parametrize(
    ("encoding", "shown"),
    [("latin-1", "-??."), ("ascii", "-??."), ("utf-8", "\N{EN DASH}\N{SNOWMAN}?.")],
)
def test_an_encoding_without_a_character_shows_the_nearest(
    tmp_path: Path, encoding: str, shown: str
) -> None:
    ended = scripted(DASH, tmp_path, {"PYTHONIOENCODING": encoding, "PYTHONPATH": str(ROOT)})
    assert (ended.returncode, ended.stdout, ended.stderr) == (0, f"{shown}\n", f"{shown}\n")


def test_ones_own_modules_do_not_hide_packages_of_their_names(tmp_path: Path) -> None:
    as_module, as_package = "{}.py", "{}/__init__.py"
    for name, file in {
        "attacks": as_module,
        "clients": as_package,
        "defenses": as_module,
        "experiments": as_package,
        "strategies": as_module,
    }.items():
        own = tmp_path / "own" / file.format(name)
        own.parent.mkdir(parents=True, exist_ok=True)
        own.write_text("raise RuntimeError")
    path = os.pathsep.join([str(tmp_path / "own"), str(ROOT)])
    ended = scripted(SHADOWED, tmp_path, {"PYTHONPATH": path})
    assert (ended.returncode, ended.stderr) == (0, "")


def test_one_that_was_imported_already_is_named(tmp_path: Path) -> None:
    (tmp_path / "attacks.py").write_text("")
    path = os.pathsep.join([str(tmp_path), str(ROOT)])
    ended = scripted(f"import attacks\n{SHADOWED}", tmp_path, {"PYTHONPATH": path})
    assert ended.stderr.splitlines()[-1].endswith(
        f"{tmp_path / 'attacks.py'} was imported as 'attacks', a name that Leakbed's own package "
        "has; rename it"
    )
