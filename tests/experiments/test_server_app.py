"""The ServerApp runs an experiment on the grid it is given, and writes the report."""

from pathlib import Path

import pytest
from flwr.app import Context, RecordDict

from clients import node_app
from experiments import server_app
from leakbed.api import ResultsFolderError, alone
from leakbed.flower_internals import task_identity
from leakbed.grids import LocalGrid

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
    run_config = {"experiment": "", "out": "", "data-root": "", **config}
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
    with alone(tmp_path), pytest.raises(ResultsFolderError, match="another run is writing"):
        run(context(experiment=experiment, out=str(tmp_path)))


def test_a_relative_folder_is_refused(experiment: str) -> None:
    with pytest.raises(ValueError, match="give an absolute path"):
        run(context(experiment=experiment, out="here"))


def test_another_number_of_nodes_says_what_to_type(experiment: str, tmp_path: Path) -> None:
    with pytest.raises(ValueError, match='--federation-config "num-supernodes=2"'):
        run(context(experiment=experiment, out=str(tmp_path / "out")), nodes=3)
