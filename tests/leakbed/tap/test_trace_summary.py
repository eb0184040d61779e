"""What `leakbed trace` says of a trace."""

import json
from dataclasses import asdict
from pathlib import Path

import numpy as np
from flwr.app import Array, ArrayRecord, ConfigRecord, RecordDict
from typer.testing import CliRunner

from experiments.cli import app
from leakbed.events import Foreign, UpdateUp, WeightsDown
from leakbed.tap.trace import Recorder, Trace
from leakbed.tap.trace_summary import summary

X = {"w": np.arange(4, dtype=np.float32)}


def recorded(folder: Path) -> Path:
    recorder = Recorder(folder, about={"a": 1, "b": None}, tapped={"app": "mine", "run": "7"})
    for node in (4, 9):
        recorder(WeightsDown(node=node, round=2, arrays=X))
        recorder(UpdateUp(node=node, round=2, before=X, after=X))
    masked = ConfigRecord({"masked_parameters": [b"abc"]})
    strange = ArrayRecord({"t": Array("int8", (2,), "mine.zip", b"ab")})
    content = RecordDict({"secaggplus": masked, "names": strange})
    recorder(Foreign(node=9, round=3, message_type="train", up=True, content=content))
    recorder.hold("adversary", "public", X)
    return folder


def test_it_says_what_a_trace_holds(tmp_path: Path) -> None:
    folder = recorded(tmp_path / "trace")
    found = summary(Trace(folder, partial=True))
    assert asdict(found) | {"bytes": 0} == {
        "folder": str(folder),
        "tapped": {"app": "mine", "run": "7"},
        "about": ("a",),
        "incomplete": f"{folder} is truncated: record 6 should follow",
        "rounds": (2, 3),
        "nodes": (4, 9),
        "kinds": {"weights-down": 2, "update-up": 2, "foreign": 1, "holding": 1},
        "bytes": 0,
        "skipped": ("names/t (int8 of mine.zip, 2 bytes) (foreign), 1 times",),
        "masked": True,
    }
    assert found.bytes == sum(each.stat().st_size for each in folder.rglob("*.bin")) > 0


def test_the_command_prints_it(tmp_path: Path) -> None:
    folder = recorded(tmp_path / "trace")
    ended = CliRunner().invoke(app, ["trace", str(folder)])
    assert ended.exit_code == 0, ended.output
    assert "app mine, run 7" in ended.output
    assert "rounds: 2, 3\nnodes: 4, 9\n" in ended.output
    assert "secure aggregation (SecAgg+)" in ended.output
    assert "not kept: names/t" in ended.output
    assert "incomplete: " in ended.output
    told = CliRunner().invoke(app, ["trace", str(folder), "--json"])
    assert json.loads(told.output)["kinds"]["update-up"] == 2


def test_a_folder_that_holds_no_trace_is_refused(tmp_path: Path) -> None:
    ended = CliRunner().invoke(app, ["trace", str(tmp_path)])
    assert ended.exit_code == 2
    assert "holds no trace" in ended.output


def test_a_strangers_names_cannot_command_a_terminal(tmp_path: Path) -> None:
    with Recorder(tmp_path / "trace", tapped={"app": "\x1b[2J"}) as recorder:
        recorder(WeightsDown(node=0, round=1, arrays=X))
    assert "\x1b" not in "".join(summary(Trace(tmp_path / "trace")).lines())
