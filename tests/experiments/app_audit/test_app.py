"""A stranger's Flower app is audited as it stands."""

import re
import shutil
import sys
import zipfile
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from typer.testing import CliRunner

from experiments.app_audit.app import (
    ModelNotFoundError,
    NoNetworkError,
    audit_app,
    network_of,
    unsearched,
)
from experiments.app_audit.app_run import AppError
from experiments.cli import app as commands
from experiments.results.cards import read_cards
from leakbed.events import UpdateUp
from tests.support.normalising_app import Net

AUDITED = Path(__file__).resolve().parents[3] / "experiments" / "studies" / "audit"
DIGITS = AUDITED / "digits"
SENT = {name: value.numpy() for name, value in Net().state_dict().items()}
THEIRS = """
from torch import nn
class Near(nn.Module):
    def __init__(self):
        super().__init__()
        self.second, self.first = nn.Linear(16, 4), nn.Linear(35, 16)
class Sized(nn.Module):
    def __init__(self, hidden_size):
        super().__init__()
        self.second, self.first = nn.Linear(hidden_size, 4), nn.Linear(36, hidden_size)
class Demanding(nn.Module):
    def __init__(self, depth):
        super().__init__()
"""


def bundle(folder: Path, name: str, *, code: str = THEIRS, **files: str) -> Path:
    (folder / name).mkdir(parents=True)
    (folder / name / "__init__.py").write_text("")
    (folder / name / "task.py").write_text(code)
    for file, text in files.items():
        (folder / name / f"{file}.py").write_text(text)
    (folder / "pyproject.toml").write_text(
        "[tool.flwr.app.components]\n"
        f'serverapp = "{name}.server:app"\nclientapp = "{name}.client:app"\n'
        "[tool.flwr.app.config]\nrounds = 1\nnested.rate = 0.5\n"
    )
    return folder


def found(folder: Path, monkeypatch: pytest.MonkeyPatch, sent: Any = None, **config: Any) -> str:
    monkeypatch.syspath_prepend(str(folder))
    return network_of([], SENT if sent is None else sent, config, folder)


def test_a_network_built_from_the_run_config_is_found(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = found(bundle(tmp_path, "sized_app"), monkeypatch, **{"hidden-size": 16})
    module, _, name = path.partition(":")
    made = getattr(sys.modules[module], name)()
    assert {key: value.shape for key, value in made.state_dict().items()} == {
        key: value.shape for key, value in SENT.items()
    }


def test_numbered_arrays_of_an_older_client_find_it_too(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    numbered = dict(zip("0123", SENT.values(), strict=True))
    path = found(bundle(tmp_path, "older_app"), monkeypatch, numbered, hidden_size=16)
    assert path.endswith(":Sized")


def test_a_network_that_is_not_found_names_the_nearest(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    with pytest.raises(
        ModelNotFoundError,
        match=r"\(lost_app.task:Near: 'first.weight' has shape \(16, 35\), and \(16, 36\) was "
        r"sent; .*Demanding wants arguments.*--model package.module:Name",
    ):
        found(bundle(tmp_path, "lost_app"), monkeypatch)


@pytest.mark.parametrize(
    ("text", "message"),
    [
        (None, "cannot be read: .*name the folder of a Flower app"),
        ("[project]\nname = 'x'\n", "names no serverapp; a Flower app has"),
    ],
)
def test_what_is_no_app_is_refused(tmp_path: Path, text: str | None, message: str) -> None:
    (tmp_path / "app").mkdir()
    if text is not None:
        (tmp_path / "app" / "pyproject.toml").write_text(text)
    with pytest.raises(AppError, match=message):
        audit_app(tmp_path / "app", tmp_path / "out")
    with pytest.raises(AppError, match="is no folder and no bundle"):
        audit_app(tmp_path / "nowhere", tmp_path / "out")


@pytest.mark.runtime
def test_an_app_that_fails_says_so_in_its_own_words(tmp_path: Path) -> None:
    app = bundle(tmp_path / "app", "failing_app", client="import a_package_nobody_has")
    (tmp_path / "out").mkdir()
    with pytest.raises(AppError, match="No module named 'a_package_nobody_has'"):
        audit_app(app, tmp_path / "out")
    endless = bundle(tmp_path / "more", "endless_app", client="while True: pass")
    (tmp_path / "ended").mkdir()
    with pytest.raises(AppError, match="did not end within 5 s; give it longer with --limit"):
        audit_app(endless, tmp_path / "ended", limit=5)


@pytest.mark.runtime
def test_an_app_written_as_flowers_template_is_audited_as_it_stands(tmp_path: Path) -> None:
    out = tmp_path / "out"
    before = {file: file.read_bytes() for file in DIGITS.rglob("*.py")}
    command = ["audit", str(DIGITS), "--out", str(out), "--with", "dlm-plus", "--with", "unsplit"]
    ended = CliRunner().invoke(commands, command)
    assert ended.exit_code == 0, ended.output
    assert "the network is digits.task:Net" in ended.output
    assert "normalised by mean [0.3] and std [0.4]" in ended.output
    assert "every node's training loss travels in the clear" in ended.output
    assert "do not fit: unsplit" in ended.output
    (card,) = read_cards(out)
    scores: Any = card.scores
    assert scores["mse"]["mean"] < 1e-4
    assert scores["label_accuracy"]["mean"] == 1
    assert card.objective["solved"] == 2
    assert (out / "report.html").is_file()
    assert before == {file: file.read_bytes() for file in DIGITS.rglob("*.py")}
    again = CliRunner().invoke(commands, command)
    assert again.exit_code == 2
    assert "holds an audit already" in again.output


def test_arrays_of_another_kind_are_no_network(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    with pytest.raises(ModelNotFoundError):
        found(bundle(tmp_path, "tree_app"), monkeypatch, {"0": np.zeros(3, np.uint8)})


def test_what_is_read_without_a_search() -> None:
    tree = np.frombuffer(b'{"sum_hessian": [3.0]}', np.uint8)
    ones = {"w": np.ones(4, np.float32)}
    clipped = [
        UpdateUp(node=n, round=1, step=0, before=ones, after={"w": ones["w"] * (1 + sign)})
        for n, sign in ((1, 0.5), (2, -0.5))
    ]
    assert unsearched(clipped) == ["updates all have norm 1: they are clipped"]
    moved = {"w": np.array([1, 2, 3, 4], np.float32)}
    said = UpdateUp(node=1, round=1, step=0, before=ones, after=moved, examples=3, train_loss=0.5)
    lines = unsearched([*clipped, said])
    assert len(lines) == 4
    assert "loss travels" in lines[0]
    assert "number of samples" in lines[1]
    assert "no clipping seen" in lines[2]
    assert "no noise seen" in lines[3]
    trees = UpdateUp(node=1, round=1, step=0, before={}, after={"0": tree})
    assert "sum_hessian" in unsearched([trees])[-1]


SERVES = """
from flwr.app import ArrayRecord, ConfigRecord, Message, RecordDict
from flwr.serverapp import ServerApp
import numpy as np
app = ServerApp()
@app.main()
def main(grid, context):
    def content():
        arrays = ArrayRecord({"weight": WEIGHT, "bias": BIAS})
        return RecordDict({"NAME": arrays, "config": ConfigRecord({"server-round": 1})} if SENDS
            else {"secaggplus_configs": ConfigRecord({"stage": "setup"})} if MASKS else {})
    grid.send_and_receive([Message(content(), n, "KIND") for n in grid.get_node_ids()])
"""
SERVES = SERVES.replace("WEIGHT", "Array(np.zeros((1, 4), np.float32))")
SERVES = SERVES.replace("BIAS", "Array(np.zeros(1, np.float32))")
SERVES = SERVES.replace("import ArrayRecord", "import Array, ArrayRecord").replace("NAME", "arrays")
ANSWERS = """
from flwr.app import Message, RecordDict, ArrayRecord, ConfigRecord
from flwr.clientapp import ClientApp
import torch
app = ClientApp()
@app.query()
def query(message, context):
    return Message(message.content, reply_to=message)
@app.train()
def train(message, context):
    if "secaggplus_configs" in message.content:
        return Message(message.content, reply_to=message)
    net = torch.nn.Linear(4, 1)
    net.load_state_dict(message.content["arrays"].to_torch_state_dict())
    torch.nn.functional.mse_loss(net(torch.ones(2, 4)), torch.ones(2, 1)).backward()
    torch.optim.SGD(net.parameters(), 0.1).step()
    return Message(RecordDict({"arrays": ArrayRecord(net.state_dict())}), reply_to=message)
"""


@pytest.mark.runtime
@pytest.mark.parametrize(
    ("kind", "sends", "masks", "why"),
    [
        ("train", True, False, "Linear, but no cross entropy over class labels was seen"),
        ("query", False, False, "sent no updates of weights, .* query"),
        ("train", False, True, r"aggregates securely \(SecAgg\+\)"),
    ],
)
def test_an_app_that_no_attack_fits_is_refused_by_name(
    tmp_path: Path, kind: str, sends: bool, masks: bool, why: str
) -> None:
    server = SERVES.replace("KIND", kind).replace("SENDS", str(sends)).replace("MASKS", str(masks))
    name = f"refused_{kind}_{int(masks)}"
    app = bundle(tmp_path / "app", name, server=server, client=ANSWERS)
    if sends:  # the one that trains comes as a bundle
        packed = shutil.make_archive(str(tmp_path / "packed"), "zip", app)
        app = Path(packed).rename(tmp_path / "app.fab")
        assert zipfile.is_zipfile(app)
    ended = CliRunner().invoke(commands, ["audit", str(app), "--out", str(tmp_path / "out")])
    assert ended.exit_code == 0, ended.output
    assert re.search(f"Not attacked: .*{why}", ended.output), ended.output
    assert not read_cards(tmp_path / "out")


def test_an_app_without_any_network_is_not_told_to_name_one(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    app = bundle(tmp_path, "numpy_app", code="import numpy as np\n")
    with pytest.raises(NoNetworkError, match=r"defines no nn.Module: its weights") as refused:
        found(app, monkeypatch)
    assert "--model" not in str(refused.value)
