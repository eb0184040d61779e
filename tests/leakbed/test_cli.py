"""The console entry answers at once, and says which package is missing."""

import builtins
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from leakbed.cli import main

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


def test_help_loads_nothing_heavy() -> None:
    ended = started("--help")
    assert ended.stderr.splitlines()[-1] == "0 []"
    assert "compare" in ended.stdout


def test_a_typing_mistake_is_answered_without_torch(tmp_path: Path) -> None:
    file = tmp_path / "bad.toml"
    file.write_text('name = "bad"\n[protocol]\nruonds = 2\n[[attack]]\nname = "unsplit"\n')
    lines = started("run", str(file)).stderr.splitlines()
    assert lines[-1] == "2 []"
    assert "did you mean 'rounds'" in lines[0]


def test_an_unknown_option_is_bad_input() -> None:
    assert started("compare", "--bogus").stderr.splitlines()[-1] == "2 []"


def test_a_missing_typer_is_named_with_the_command(monkeypatch: pytest.MonkeyPatch) -> None:
    real = builtins.__import__

    def without_typer(name: str, *args: Any, **kwargs: Any) -> Any:
        if name == "leakbed.commands":
            raise ModuleNotFoundError("No module named 'typer'", name="typer")
        return real(name, *args, **kwargs)

    monkeypatch.setattr(builtins, "__import__", without_typer)
    with pytest.raises(SystemExit, match=r"needs the package 'typer'; run `make setup`"):
        main()
