"""One line taps any ServerApp: of the message API, or of the older one."""

import logging
import os
from collections.abc import Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
from flwr.app import Context, Message, MetricRecord, RecordDict
from flwr.clientapp import ClientApp
from flwr.serverapp import Grid, ServerApp
from flwr.serverapp.strategy import FedAvg

from leakbed.events import UpdateUp
from leakbed.flower_internals import task_identity
from leakbed.grids import LocalGrid
from leakbed.tap import Recorder, Trace, tapped
from leakbed.tap.server_app import warn_of_newer
from leakbed.tap.wiretap import GridWrapper
from leakbed.wire.records import pack, unpack

WEIGHTS = {"w": np.arange(6, dtype=np.float32).reshape(2, 3)}


@pytest.fixture(autouse=True)
def identity() -> Iterator[None]:
    with task_identity():
        yield


def client() -> ClientApp:
    """Add a node's number to the weights it gets."""
    app = ClientApp()

    @app.train()
    def train(message: Message, context: Context) -> Message:
        more = 1 + int(context.node_config["partition-id"])
        arrays = {k: v + more for k, v in unpack(message.content["arrays"]).items()}
        content = RecordDict({"arrays": pack(arrays), "metrics": MetricRecord({"num-examples": 1})})
        return Message(content, reply_to=message)

    return app


def server(found: list[Any], *, ends_with: BaseException | None = None) -> ServerApp:
    app = ServerApp()

    @app.main()
    def main(grid: Grid, context: Context) -> None:
        strategy = FedAvg(fraction_evaluate=0.0)
        result = strategy.start(grid, pack(WEIGHTS), num_rounds=2)
        found.append(result.arrays.to_numpy_ndarrays())
        if ends_with is not None:
            raise ends_with

    return app


def run(app: ServerApp, grid: Grid | None = None, *, run_id: int = 7) -> None:
    context = Context(run_id=run_id, node_id=0, node_config={}, state=RecordDict(), run_config={})
    app(grid or LocalGrid(client(), nodes=2), context)


def test_one_line_records_a_run_and_changes_no_bit_of_it(tmp_path: Path) -> None:
    plain: list[Any] = []
    taped: list[Any] = []
    run(server(plain))
    run(tapped(server(taped), tmp_path))
    assert [np.array_equal(a, b) for a, b in zip(plain[0], taped[0], strict=True)] == [True]
    assert len(list(Trace(tmp_path / "7").events(UpdateUp))) == 4


def test_an_app_may_be_run_again(tmp_path: Path) -> None:
    app = tapped(server([]), tmp_path)
    for run_id in (7, 8, 7):
        run(app, run_id=run_id)
    assert sorted(folder.name for folder in tmp_path.iterdir()) == ["7", "7-2", "8"]
    assert [len(Trace(folder).records) for folder in tmp_path.iterdir()] == [8, 8, 8]


class Running(GridWrapper):
    """A grid that knows of its run what the older strategies ask for."""

    @property
    def run(self) -> Any:
        return SimpleNamespace(run_id=7)


def test_an_app_of_the_older_api_is_tapped(tmp_path: Path) -> None:
    from flwr.client import NumPyClient  # noqa: PLC0415  deprecated, and slow to import
    from flwr.common import ndarrays_to_parameters  # noqa: PLC0415
    from flwr.server import ServerAppComponents, ServerConfig  # noqa: PLC0415
    from flwr.server.strategy import FedAvg as OldFedAvg  # noqa: PLC0415

    class Client(NumPyClient):
        def fit(self, parameters: Any, config: Any) -> Any:
            return [value + 1 for value in parameters], 3, {}

    def server_fn(context: Context) -> ServerAppComponents:
        initial = ndarrays_to_parameters(list(WEIGHTS.values()))
        strategy = OldFedAvg(fraction_evaluate=0.0, initial_parameters=initial)
        return ServerAppComponents(strategy=strategy, config=ServerConfig(num_rounds=2))

    grid = Running(LocalGrid(ClientApp(client_fn=lambda _: Client().to_client()), nodes=2))
    run(tapped(ServerApp(server_fn=server_fn), tmp_path), grid)
    updates = list(Trace(tmp_path / "7").events(UpdateUp))
    assert [float((u.after["0"] - u.before["0"]).mean()) for u in updates] == [1.0] * 4  # type: ignore[attr-defined]


def test_an_environment_variable_names_the_folder(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("HOME", str(tmp_path / "home"))
    run(tapped(server([])))
    monkeypatch.setenv("LEAKBED_TRACES", str(tmp_path / "said"))
    run(tapped(server([])))
    run(tapped(server([]), tmp_path / "given"))
    for folder in ("home/leakbed-traces/7", "said/7", "given/7"):
        assert Trace(tmp_path / folder).records
        assert (tmp_path / folder).stat().st_mode & 0o777 == 0o700


def test_a_tapped_app_is_tapped_once(tmp_path: Path) -> None:
    run(tapped(tapped(server([]), tmp_path / "first"), tmp_path / "second", about={"a": 1}))
    assert [folder.name for folder in tmp_path.iterdir()] == ["second"]
    assert Trace(tmp_path / "second/7").about == {"a": 1}


def test_what_is_no_server_app_is_refused() -> None:
    with pytest.raises(TypeError, match=r"takes a flwr\.serverapp\.ServerApp, got function; write"):
        tapped(lambda grid, context: None)  # type: ignore[arg-type]


def test_no_place_for_a_trace_ends_a_strict_run_only(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    (tmp_path / "file").write_text("")
    found: list[Any] = []
    with caplog.at_level(logging.WARNING, logger="leakbed"):
        run(tapped(server(found), tmp_path / "file"))
    assert len(found) == 1
    (warning,) = [r.getMessage() for r in caplog.records if r.name == "leakbed"]
    assert "records nothing of run 7" in warning
    assert str(tmp_path / "file") in warning
    with pytest.raises(FileExistsError):
        run(tapped(server(found), tmp_path / "file", strict=True))
    assert len(found) == 1


@pytest.mark.skipif(os.geteuid() == 0, reason="root writes where it likes")
def test_a_folder_that_may_not_be_written_does_not_end_the_run(tmp_path: Path) -> None:
    tmp_path.chmod(0o500)
    found: list[Any] = []
    try:
        run(tapped(server(found), tmp_path))
    finally:
        tmp_path.chmod(0o700)
    assert len(found) == 1


def test_a_trace_that_cannot_be_closed_ends_a_strict_run_only(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    write = Recorder._write

    def full(recorder: Recorder, line: Any) -> None:
        if "end" in line:
            raise OSError(28, "No space left on device")
        write(recorder, line)

    monkeypatch.setattr(Recorder, "_write", full)
    found: list[Any] = []
    run(tapped(server(found), tmp_path))
    assert "has no closing line: " in caplog.text
    with pytest.raises(OSError, match="No space"):
        run(tapped(server(found), tmp_path, strict=True))
    assert len(found) == 2


def test_a_flower_that_was_never_tested_is_warned_of_once(
    caplog: pytest.LogCaptureFixture,
) -> None:
    warn_of_newer.cache_clear()
    with caplog.at_level(logging.WARNING, logger="leakbed"):
        for flower in ("1.21.0", "1.42.7", "1.43.0.dev1", "1.43.0.dev1", "2.0"):
            warn_of_newer(flower)
    assert [message[:21] for message in caplog.messages] == [
        "flwr 1.43.0.dev1 is n",
        "flwr 2.0 is newer tha",
    ]
    warn_of_newer.cache_clear()


def test_a_trace_says_which_app_it_is_of(tmp_path: Path) -> None:
    run(tapped(server([]), tmp_path))
    said = Trace(tmp_path / "7").tapped
    assert said["run"] == "7"
    assert said["app"].endswith("test_server_app")
    assert said["flower"].startswith("1.")
