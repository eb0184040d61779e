"""The app of `make test-flower-versions`, under the Flower that is installed here."""

import subprocess
import sys
from importlib.metadata import version
from pathlib import Path

from leakbed.tap.server_app import NEWEST

ROOT = Path(__file__).parents[3]


def test_an_app_is_tapped_under_this_flower(tmp_path: Path) -> None:
    command = [sys.executable, "-m", "tests.support.tapped_anywhere", str(tmp_path)]
    ended = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=False)  # noqa: S603
    assert ended.stdout.endswith(f"flwr {version('flwr')}: tapped\n"), ended.stderr


def test_tapping_imports_nothing_internal_of_flower() -> None:
    """Modules that moved between versions may only be imported when they are needed."""
    program = (
        "import sys\n"
        "import flwr.app, flwr.clientapp, flwr.serverapp\n"
        "before = set(sys.modules)\n"
        "import leakbed.tap\n"
        "import leakbed.mods\n"
        "print([name for name in set(sys.modules) - before if name.startswith('flwr')])"
    )
    ended = subprocess.run(  # noqa: S603
        [sys.executable, "-c", program], cwd=ROOT, capture_output=True, text=True, check=True
    )
    assert ended.stdout == "[]\n"


def test_ci_taps_an_app_under_the_oldest_and_the_newest_version_that_were_tested() -> None:
    script = (ROOT / ".ci" / "run").read_text()
    newest = ".".join(map(str, NEWEST))
    assert f'make test-flower-versions FLOWERS="1.21.0 {newest}.0"' in script
    assert '"flwr>=1.21"' in (ROOT / "pyproject.toml").read_text()
