"""The ServerApp runs an experiment on the grid it is given, and writes the report."""

import sys
from collections.abc import Iterator
from pathlib import Path

import pytest
from flwr.app import Context, RecordDict

from clients import node_app
from experiments import server_app
from experiments.results.folder import ResultsFolderError, lock_folder
from leakbed import provenance
from leakbed.data import MissingDataError, sources
from leakbed.flower_internals import task_identity
from leakbed.grids import LocalGrid
from leakbed.provenance import CodeFolderError

TABLE = """
name = "through-flower"
[data]
size = 400
nodes = 2
[model]
name = "mlp2"
cut = 1
[protocol]
name = "vanilla-split"
batch_size = 16
local_steps = 2
[[attack]]
name = "constant-image"
"""


def context(**config: str) -> Context:
    run_config = {"experiment": "", "out": "", "data-root": "", "code": "", **config}
    return Context(run_id=1, node_id=0, node_config={}, state=RecordDict(), run_config=run_config)


@pytest.fixture
def experiment(tmp_path: Path) -> str:
    file = tmp_path / "settings.toml"
    file.write_text(TABLE)
    return str(file)


def run(told: Context, nodes: int = 2) -> None:
    with task_identity():
        server_app.main(LocalGrid(node_app, nodes=nodes), told)  # type: ignore[operator]


def test_cards_and_report_go_where_the_run_config_says(experiment: str, tmp_path: Path) -> None:
    run(context(experiment=experiment, out=str(tmp_path / "out")))
    assert len(list((tmp_path / "out" / "cards").iterdir())) == 1
    assert (tmp_path / "out" / "report.html").is_file()


def test_the_default_is_a_folder_of_the_users_home_named_for_the_experiment(
    experiment: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(server_app, "_HOME", tmp_path / "home")
    run(context(experiment=experiment))
    assert (tmp_path / "home" / "through-flower" / "report.html").is_file()


def test_a_folder_another_run_writes_to_is_refused(experiment: str, tmp_path: Path) -> None:
    with lock_folder(tmp_path), pytest.raises(ResultsFolderError, match="another run is writing"):
        run(context(experiment=experiment, out=str(tmp_path)))


def test_a_relative_folder_is_refused(experiment: str) -> None:
    with pytest.raises(ValueError, match="give an absolute path"):
        run(context(experiment=experiment, out="here"))


def test_another_number_of_nodes_says_what_to_type(experiment: str, tmp_path: Path) -> None:
    with pytest.raises(ValueError, match='--federation-config "num-supernodes=2"'):
        run(context(experiment=experiment, out=str(tmp_path / "out")), nodes=3)


OWN = """
name = "own"
[data]
name = "own_images:{function}"
nodes = 2
[model]
name = "mlp2"
[protocol]
name = "fedavg"
batch_size = 4
local_steps = 1
[[attack]]
name = "constant-image"
targets = 2
"""
IMAGES = """
import numpy
def {function}():
    return numpy.full((40, 4, 4), 0.5), numpy.arange(40) % 2
"""


@pytest.fixture
def projects(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Path]:
    """Two folders with a module of one name; the SuperLink keeps the first on its path."""
    for function in ("first", "second"):
        (tmp_path / function).mkdir()
        (tmp_path / function / "own_images.py").write_text(IMAGES.format(function=function))
    (tmp_path / "own.toml").write_text(OWN.format(function="second"))
    monkeypatch.setattr(server_app, "simulates", lambda grid: True)
    monkeypatch.syspath_prepend(str(tmp_path / "first"))
    path = list(sys.path)
    provenance._FIRST.clear()
    sources._load.cache_clear()
    yield tmp_path
    sys.path[:] = path
    sys.modules.pop("own_images", None)


def told(projects: Path, **config: str) -> Context:
    config = {"experiment": str(projects / "own.toml"), "out": str(projects / "out"), **config}
    return context(**config)


def test_a_module_that_the_superlink_kept_from_an_earlier_call_is_refused(projects: Path) -> None:
    with pytest.raises(CodeFolderError) as raised:
        run(told(projects))
    assert f"'own_images' would be {projects / 'first' / 'own_images.py'}, found by" in str(
        raised.value
    )
    assert "put it beside the settings file, or add code=" in str(raised.value)
    assert not (projects / "out").exists()


def test_a_folder_that_the_call_names_comes_first(projects: Path) -> None:
    run(told(projects, code=str(projects / "second")))
    assert len(list((projects / "out" / "cards").iterdir())) == 1


def test_a_module_beside_the_settings_comes_first(projects: Path) -> None:
    settings = projects / "second" / "own.toml"
    settings.write_text(OWN.format(function="second"))
    run(told(projects, experiment=str(settings)))
    assert len(list((projects / "out" / "cards").iterdir())) == 1


def test_a_deployments_superlink_is_its_operators(
    projects: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(server_app, "simulates", lambda grid: False)
    (projects / "own.toml").write_text(OWN.format(function="first"))
    run(told(projects))
    assert len(list((projects / "out" / "cards").iterdir())) == 1


def test_an_installed_plugin_is_the_environments(
    projects: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    site = (projects / "first").rename(projects / "site-packages")
    (site / "own-1.0.dist-info").mkdir()
    (site / "own-1.0.dist-info" / "METADATA").write_text("Name: own\nVersion: 1.0\n")
    offer = "[leakbed.data]\nown-data = own_images:first\n"
    (site / "own-1.0.dist-info" / "entry_points.txt").write_text(offer)
    monkeypatch.syspath_prepend(str(site))
    (projects / "own.toml").write_text(OWN.format(function="first"))
    run(told(projects))
    assert len(list((projects / "out" / "cards").iterdir())) == 1


@pytest.mark.parametrize("code", ["second", "/no/such/folder"])
def test_a_folder_that_is_none_is_refused(projects: Path, code: str) -> None:
    with pytest.raises(CodeFolderError, match="is no folder, or not an absolute path"):
        run(told(projects, code=code))


def test_images_that_the_superlinks_environment_names_are_refused(
    projects: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    text = OWN.replace("own_images:{function}", "image-folder")
    (projects / "own.toml").write_text(text)
    monkeypatch.setenv("LEAKBED_DATA", "/photos/of/somebody")
    with pytest.raises(CodeFolderError, match='add data-root="/photos/of/somebody", or yours'):
        run(told(projects))
    with pytest.raises(MissingDataError, match=r"no folder .*nowhere"):
        run(told(projects, **{"data-root": str(projects / "nowhere")}))
