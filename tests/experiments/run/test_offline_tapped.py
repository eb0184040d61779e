"""A stranger's Flower app, tapped: its trace is attacked as our own are, without answers."""

import json
import sys
from collections.abc import Callable, Sequence
from pathlib import Path

import numpy as np
import pytest
from flwr.app import ArrayRecord, Context
from flwr.serverapp import Grid, ServerApp
from flwr.serverapp.strategy import FedAvg
from safetensors.torch import load_file
from typer.testing import CliRunner

from experiments.cli import app as commands
from experiments.run.offline import attack_trace
from experiments.run.targets import MisfitError
from leakbed.events import UpdateUp
from leakbed.tap.facts import UnpermittedModelError, about
from leakbed.tap.segments import TraceError
from leakbed.tap.trace import Recorder
from leakbed.tap.wiretap import Wiretap
from tests.support.small_app import CLASSES, NODES, ROWS, network, run

MODEL, SHAPE = "tests.support.own_model:Net", (1, 4, 4)
SAID = about(
    model=MODEL,
    image_shape=SHAPE,
    num_classes=CLASSES,
    batch_size=ROWS,
    local_steps=1,
    nodes=NODES,
    data="theirs",
)
Tapped = Callable[..., Path]


@pytest.fixture
def tapped(tmp_path: Path) -> Tapped:
    def train(said: dict[str, object] | None, *, public: bool = False) -> Path:
        server, folder = ServerApp(), tmp_path / "trace"

        @server.main()
        def main(grid: Grid, context: Context) -> None:
            with Recorder(folder, about=said) as recorder:
                if public:
                    owned = {"images": np.full((3, *SHAPE), 0.25, np.float32)}
                    recorder.hold("adversary", "public", {**owned, "labels": np.arange(3)})
                weights = ArrayRecord(network(MODEL, SHAPE).state_dict())
                FedAvg().start(Wiretap(grid, [recorder]), weights, num_rounds=2)

        run(server, MODEL, SHAPE)
        return folder

    return train


def test_it_is_attacked_from_the_command_line(tapped: Tapped) -> None:
    trace = tapped(SAID)
    command = ["attack", str(trace), "--with", "dlm-plus", "--model", MODEL, "-o", "iterations=2"]
    ended = CliRunner().invoke(commands, command)
    assert ended.exit_code == 0, ended.output
    (card,) = (trace.parent / "trace-attacked" / "cards").iterdir()
    said = json.loads(card.read_text())
    assert (said["status"], said["model"], said["data"]) == ("unscored", MODEL, "theirs")
    assert said["stopped_on_budget"] == 1


@pytest.mark.parametrize("name", ["dlm", "constant-image"])
def test_other_attacks_read_it_too(tapped: Tapped, name: str) -> None:
    settings = {"iterations": 2} if name == "dlm" else {}
    card = attack_trace(tapped(SAID), name, model=MODEL, settings=settings)
    assert card.status == "unscored"


def test_public_images_are_optional(tapped: Tapped) -> None:
    with pytest.raises(MisfitError, match=r"recorder\.hold\('adversary', 'public'"):
        attack_trace(tapped(SAID), "mean-image", model=MODEL)


def test_public_images_are_used(tapped: Tapped) -> None:
    trace = tapped(SAID, public=True)
    card = attack_trace(trace, "mean-image", model=MODEL)
    (guess,) = (trace.parent / "trace-attacked" / "guesses").iterdir()
    assert guess.stem == card.key
    assert load_file(guess)["images"].unique().tolist() == [0.25]


def test_a_trace_that_says_nothing_of_its_run_is_refused(tapped: Tapped) -> None:
    with pytest.raises(TraceError, match=r"does not say architecture, .*about\(model="):
        attack_trace(tapped(None), "constant-image")


def test_results_lie_beside_a_trace_named_by_a_dot(
    tapped: Tapped, monkeypatch: pytest.MonkeyPatch
) -> None:
    trace = tapped(SAID)
    before = sorted(trace.rglob("*"))
    monkeypatch.chdir(trace)
    attack_trace(Path(), "constant-image", model=MODEL)
    ended = CliRunner().invoke(
        commands, ["attack", ".", "--with", "constant-image", "--model", MODEL]
    )
    assert ended.exit_code == 0, ended.output
    assert sorted(trace.rglob("*")) == before
    assert (trace.parent / "trace-attacked" / "cards").is_dir()


def test_it_computes_in_one_thread_as_runs_do(
    tapped: Tapped, monkeypatch: pytest.MonkeyPatch
) -> None:
    asked: list[int] = []
    monkeypatch.setattr("torch.get_num_threads", lambda: 4)
    monkeypatch.setattr("torch.set_num_threads", asked.append)
    attack_trace(tapped(SAID), "constant-image", model=MODEL)
    assert asked == [1]


@pytest.fixture
def theirs(tapped: Tapped, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A stranger's trace that names a module which the reader's Python would find."""
    trace = tapped(_named("planted:Net"))
    (tmp_path / "planted.py").write_text("raise SystemExit('the stranger code has run')")
    monkeypatch.syspath_prepend(tmp_path)
    return trace


def test_a_network_that_a_trace_names_is_not_imported_unasked(theirs: Path) -> None:
    with pytest.raises(UnpermittedModelError, match=r"'planted:Net'.*--model planted:Net"):
        attack_trace(theirs, "constant-image")
    ended = CliRunner().invoke(commands, ["attack", str(theirs), "--with", "constant-image"])
    assert ended.exit_code == 2
    assert "--model planted:Net" in ended.output
    assert "planted" not in sys.modules


def test_what_permission_would_not_mend_is_told_before_it_is_asked_for(
    theirs: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def uncounted(updates: Sequence[UpdateUp]) -> None:
        raise MisfitError(f"{len(updates)} updates without num-examples")

    monkeypatch.setattr("experiments.run.offline.refuse_uncounted", uncounted)
    with pytest.raises(MisfitError, match="2 updates without num-examples"):
        attack_trace(theirs, "constant-image")


def test_a_network_that_the_reader_names_is_imported(theirs: Path) -> None:
    with pytest.raises(SystemExit, match="the stranger code has run"):
        attack_trace(theirs, "constant-image", model="planted:Net")


def _named(model: str) -> dict[str, object]:
    return {**SAID, "architecture": {**SAID["architecture"], "name": model}}


@pytest.mark.parametrize(
    ("key", "value"),
    [
        ("architecture", ["mlp2"]),
        ("architecture", {"name": "mlp2"}),
        ("architecture", {**SAID["architecture"], "name": ["mlp2"]}),
        ("architecture", {**SAID["architecture"], "cut": 1.5}),
        ("architecture", {**SAID["architecture"], "image_shape": [1, 4, 4.5]}),
        ("architecture", {**SAID["architecture"], "seed": 1}),
        ("nodes", "two"),
        ("batch_size", True),
        ("local_steps", {}),
        ("protocol", None),
        ("data", []),
    ],
)
def test_what_a_trace_says_of_its_run_is_of_the_types_that_runs_say(
    tapped: Tapped, key: str, value: object
) -> None:
    trace = tapped({**SAID, key: value})
    with pytest.raises(TraceError, match=f"says {key} = "):
        attack_trace(trace, "dlm-plus", model=MODEL, settings={"iterations": 2})
