"""The Flower app bundle is whole: it loads where nothing of this repository is installed."""

import subprocess
import sys
import sysconfig
import zipfile
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
PACKAGES = {"attacks", "clients", "defenses", "experiments", "leakbed", "strategies"}

# Runs under -I -S: no .pth file is read, so the editable install of this repository is not seen.
LOAD = """
import sys
bundle, site_packages = sys.argv[1:]
sys.path[:0] = [bundle, site_packages]
from flwr.clientapp import ClientApp
from flwr.serverapp import ServerApp
from experiments.client_app import app as client_app
from experiments.server_app import app as server_app
assert isinstance(client_app, ClientApp), client_app
assert isinstance(server_app, ServerApp), server_app
for name, module in list(sys.modules.items()):
    file = getattr(module, "__file__", None)
    if name.partition(".")[0] in {packages} and file:
        assert file.startswith(bundle), file
"""


@pytest.fixture(scope="module")
def bundle(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Build the bundle as `flwr run` does, and unpack it."""
    folder = tmp_path_factory.mktemp("bundle")
    flwr = Path(sys.executable).with_name("flwr")
    built = subprocess.run(  # noqa: S603
        [flwr, "build", "--app", ROOT], cwd=folder, check=False, capture_output=True, text=True
    )
    assert built.returncode == 0, built.stdout + built.stderr
    (archive,) = folder.glob("*.fab")
    with zipfile.ZipFile(archive) as file:
        file.extractall(folder / "app")
    return folder / "app"


@pytest.mark.runtime
def test_the_bundle_holds_the_packages_and_no_tests(bundle: Path) -> None:
    folders = {path.name for path in bundle.iterdir() if path.is_dir() and path.name[0] != "."}
    assert folders == PACKAGES
    packed = {file.relative_to(bundle) for file in bundle.rglob("*.py")}
    ours = {f.relative_to(ROOT) for name in PACKAGES for f in (ROOT / name).rglob("*.py")}
    assert packed == ours


@pytest.mark.runtime
def test_the_bundle_loads_with_nothing_of_ours_installed(bundle: Path) -> None:
    script = LOAD.replace("{packages}", repr(PACKAGES))
    loaded = subprocess.run(  # noqa: S603
        [sys.executable, "-I", "-S", "-c", script, bundle, sysconfig.get_path("purelib")],
        check=False,
        capture_output=True,
        text=True,
    )
    assert loaded.returncode == 0, loaded.stderr
