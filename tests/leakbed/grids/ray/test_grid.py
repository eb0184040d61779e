import json
import os
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from types import ModuleType

import numpy as np
import pytest
import ray
from flwr.app import Array, ArrayRecord, ConfigRecord, Message, RecordDict
from flwr.clientapp import ClientApp

from leakbed.flower_internals import CLIENT_RAISED, NODE_UNAVAILABLE
from leakbed.grids.ray.actors import (
    AppNotImportableError,
    NoRoomError,
    NoWorkersError,
    app_path,
    fitting_workers,
    refuse_crowd,
    start_ray,
    stop_ray,
)
from leakbed.grids.ray.grid import RayGrid
from leakbed.grids.ray.parcels import opened
from tests.support import strange_nodes
from tests.support.strange_nodes import message, said
from tests.support.waiting import until

pytestmark = pytest.mark.usefixtures("identity")

ROOT = Path(__file__).parents[4]


@pytest.fixture(scope="module")
def running_ray() -> Iterator[None]:
    assert start_ray(None, cpus=4)
    yield
    stop_ray()


@pytest.fixture(scope="module")
def grid(running_ray: None) -> Iterator[RayGrid]:
    with RayGrid(strange_nodes.app, nodes=5, workers=2) as made:
        yield made


@pytest.fixture
def fragile(running_ray: None) -> Iterator[RayGrid]:
    """A grid to break, beside the other."""
    with RayGrid(strange_nodes.app, nodes=5, workers=2) as made:
        yield made


@pytest.mark.runtime
@pytest.mark.smoke
def test_nodes_stay_on_their_worker_and_keep_their_memory(grid: RayGrid) -> None:
    order = [1, 2, 3, 4, 5, 3, 1]
    sent = [message(node, "count") for node in order]
    replies = [said(reply) for reply in grid.send_and_receive(sent, timeout=60)]
    assert [reply["node"] for reply in replies] == order
    assert [reply["calls"] for reply in replies] == [1, 1, 1, 1, 1, 2, 2]
    process = {reply["node"]: reply["process"] for reply in replies}
    assert process[1] == process[3] == process[5] != process[2] == process[4]
    assert os.getpid() not in process.values()


@pytest.mark.runtime
@pytest.mark.parametrize("values", [3, 100_000], ids=["with the call", "through the store"])
def test_each_node_gets_its_own_copy_of_a_shared_record(grid: RayGrid, values: int) -> None:
    arrays = ArrayRecord({"x": Array(np.arange(float(values)))})
    records = RecordDict({"arrays": arrays, "config": ConfigRecord({"value": 1})})
    sent = [message(node, "change", records) for node in grid.get_node_ids()]
    replies = [said(reply) for reply in grid.send_and_receive(sent)]
    assert replies == [{"before": 1, "size": 1}] * 5
    assert records.config_records["config"]["value"] == 1


@pytest.mark.runtime
def test_a_large_shared_record_is_stored_once(
    grid: RayGrid, monkeypatch: pytest.MonkeyPatch
) -> None:
    stored: list[object] = []
    put = ray.put
    monkeypatch.setattr(ray, "put", lambda value: (stored.append(value), put(value))[1])
    arrays = ArrayRecord({"x": Array(np.arange(100_000.0))})
    records = RecordDict({"arrays": arrays, "config": ConfigRecord({"value": 1})})
    alone = RecordDict(dict(records))
    sent = [message(node, "change", records) for node in (1, 2, 3)]
    assert len(list(grid.send_and_receive([*sent, message(4, "change", alone)]))) == 4
    (parcel,) = stored
    outline, (values,) = opened(parcel)
    assert [key for key, *_ in outline] == ["arrays", "config"]
    assert bytes(values) == arrays["x"].data


@pytest.mark.runtime
def test_push_and_pull_give_each_reply_once(grid: RayGrid) -> None:
    first, second = grid.push_messages([message(1, "count"), message(2, "count")])
    found: list[int] = []

    def both() -> bool:
        found.extend(said(r)["node"] for r in grid.pull_messages([first, second, "unknown"]))
        return len(found) == 2

    until(both)
    assert sorted(found) == [1, 2]
    assert list(grid.pull_messages([first, second])) == []


@pytest.mark.runtime
def test_a_late_reply_is_missing_and_does_not_hold_the_others_up(fragile: RayGrid) -> None:
    started = time.monotonic()
    sent = [message(1, "hang"), message(2, "count")]
    replies = list(fragile.send_and_receive(sent, timeout=2))
    assert [said(reply)["node"] for reply in replies] == [2]
    assert time.monotonic() - started < 20
    assert not fragile._pending


@pytest.mark.runtime
def test_a_pull_waits_a_moment_for_a_first_reply(grid: RayGrid) -> None:
    napping = list(grid.push_messages([message(1, "nap")]))
    started, pulls = time.monotonic(), 0
    while not (replies := list(grid.pull_messages(napping))):
        pulls += 1
    spent = time.monotonic() - started
    assert said(replies[0])["node"] == 1
    assert pulls < spent / 0.004  # each waited; polling would have been in the thousands
    assert pulls > 10  # but none for long


@pytest.mark.runtime
def test_a_pushed_message_whose_time_passes_is_an_error_and_not_awaited(fragile: RayGrid) -> None:
    hangs, quick = message(1, "hang"), message(2, "count")
    hangs.metadata.ttl = 0.5
    ids = list(fragile.push_messages([hangs, quick]))
    found, started = list[Message](), time.monotonic()
    while len(found) < 2:
        assert time.monotonic() - started < 20
        found += fragile.pull_messages(ids)
    assert said(found[0])["node"] == 2
    assert found[1].error.code == NODE_UNAVAILABLE
    assert found[1].error.reason == "no reply within 0.5 s"
    assert found[1].metadata.src_node_id == 1
    assert not fragile._pending
    others = fragile.send_and_receive([message(node, "remember") for node in (3, 5)], timeout=20)
    assert len(list(others)) == 2  # by the worker that does not hang


@pytest.mark.runtime
def test_what_cannot_be_sent_back_is_an_error_reply(grid: RayGrid) -> None:
    (reply,) = grid.send_and_receive([message(1, "unsendable")])
    assert reply.error.code == CLIENT_RAISED
    assert "lock" in str(reply.error.reason)
    (reply,) = grid.send_and_receive([message(1, "count")])
    assert not reply.has_error()


@pytest.mark.runtime
def test_an_unknown_node_is_an_error_reply(grid: RayGrid) -> None:
    (reply,) = grid.send_and_receive([message(9, "count")])
    assert reply.error.reason == "no such node; this grid has nodes 1 to 5"


@pytest.mark.runtime
def test_workers_use_one_thread_and_no_gpu_unless_given_a_share(grid: RayGrid) -> None:
    place = said(next(iter(grid.send_and_receive([message(1, "place")]))))
    assert (place["threads"], place["gpus"], place["cuda"]) == (1, 0, "")


@pytest.mark.runtime
def test_a_closed_grid_refuses_messages_and_closes_twice(running_ray: None) -> None:
    grid = RayGrid(strange_nodes.app, nodes=1)
    grid.close()
    grid.close()
    assert ray.is_initialized()  # it was running before
    with pytest.raises(RuntimeError, match="this RayGrid is closed"):
        grid.send_and_receive([message(1, "count")])


@pytest.mark.runtime
def test_a_grid_never_has_more_workers_than_nodes(running_ray: None) -> None:
    with RayGrid("tests.support.strange_nodes:app", nodes=1, workers=2) as grid:
        assert grid.workers == 1
        assert list(grid.get_node_ids()) == [1]


@pytest.mark.runtime
def test_an_app_the_workers_cannot_import_is_refused_with_the_reason(running_ray: None) -> None:
    with pytest.raises(NoWorkersError, match=r"unknown name in tests.support.strange_nodes 'ap'"):
        RayGrid("tests.support.strange_nodes:ap", nodes=1)


@pytest.mark.runtime
def test_more_workers_than_fit_are_refused_instead_of_awaited(
    running_ray: None, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("leakbed.grids.ray.grid.Recipe", None)  # none is started
    with pytest.raises(NoRoomError, match=r"5 workers of 1 CPU and 0.0 GPU have no room"):
        RayGrid(strange_nodes.app, nodes=5, workers=5)
    with pytest.raises(NoRoomError, match=r"1 workers of 1 CPU and 0.5 GPU.*CPUs and no GPU; set"):
        RayGrid(strange_nodes.app, nodes=3, num_gpus=0.5)
    with pytest.raises(NoRoomError, match=r"num_gpus = 1\.5: beyond 1, Ray knows whole GPUs only"):
        RayGrid(strange_nodes.app, nodes=3, num_gpus=1.5)


def test_workers_fit_cpus_gpu_shares_and_nodes(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(ray, "cluster_resources", lambda: {"CPU": 16.0, "GPU": 2.0})
    assert fitting_workers(100, num_gpus=0) == 16
    assert fitting_workers(100, num_gpus=0.25) == 8
    assert fitting_workers(3, num_gpus=0.25) == 3
    assert fitting_workers(100, num_gpus=0.4) == 4  # two on each GPU, although 0.8 is left
    assert fitting_workers(100, num_gpus=0.1) == 16
    assert fitting_workers(100, num_gpus=2.0) == 1
    refuse_crowd(4, num_gpus=0.4)
    with pytest.raises(NoRoomError, match=r"5 workers of 1 CPU and 0\.4 GPU .* 16 CPUs and 2 GPUs"):
        refuse_crowd(5, num_gpus=0.4)
    monkeypatch.setattr(ray, "cluster_resources", lambda: {"CPU": 16.0, "GPU": 1.0})
    refuse_crowd(3, num_gpus=0.33)
    with pytest.raises(NoRoomError, match=r"4 workers of 1 CPU and 0\.33 GPU .* and 1 GPUs"):
        refuse_crowd(4, num_gpus=0.33)
    monkeypatch.setattr(ray, "cluster_resources", dict)
    assert fitting_workers(3, num_gpus=0.25) == 1


def test_no_nodes_or_no_workers_are_refused_before_ray_starts() -> None:
    with pytest.raises(ValueError, match="at least one node"):
        RayGrid(strange_nodes.app, nodes=0)
    with pytest.raises(ValueError, match="at least one worker, got workers=0"):
        RayGrid(strange_nodes.app, nodes=1, workers=0)


def test_the_app_is_found_by_name() -> None:
    assert app_path(strange_nodes.app) == "tests.support.strange_nodes:app"


def test_an_app_of_the_running_script_is_refused_with_the_reason(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    app = ClientApp()
    script = ModuleType("__main__")
    monkeypatch.setitem(sys.modules, "__main__", script)
    with pytest.raises(AppNotImportableError, match=r"of the modules that have it \(none\)"):
        app_path(app)
    script.app = app  # type: ignore[attr-defined]
    with pytest.raises(AppNotImportableError, match=r"the script that is running \(__main__\)"):
        app_path(app)


def test_an_app_of_a_module_that_is_nowhere_on_the_path_is_refused(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    ghost = ModuleType("no_such_module_anywhere")
    ghost.app = ClientApp()  # type: ignore[attr-defined]
    monkeypatch.setitem(sys.modules, "no_such_module_anywhere", ghost)
    with pytest.raises(AppNotImportableError, match=r"none is on sys.path"):
        app_path(ghost.app)


def test_the_grids_package_imports_without_ray() -> None:
    code = "import leakbed.grids, sys; assert not {'ray', 'torch'} & set(sys.modules)"
    subprocess.run([sys.executable, "-c", code], check=True, cwd=ROOT)  # noqa: S603


SCRIPT = """
import json, sys
sys.path.insert(0, {root!r})
import ray
from leakbed.flower_internals import task_identity
from leakbed.grids.ray.grid import RayGrid
from tests.support.strange_nodes import app, message, said

with task_identity(), RayGrid(app, nodes=2, workers=1) as grid:
    place = said(list(grid.send_and_receive([message(1, "place")], timeout=60))[0])
assert not ray.is_initialized()
print(json.dumps(place))
"""


@pytest.mark.runtime
def test_workers_run_the_drivers_own_files_wherever_it_was_started(tmp_path: Path) -> None:
    """A package of ours that only looks like it lies in the folder the driver is started in."""
    for name in ("leakbed", "tests"):
        (tmp_path / name).mkdir()
        (tmp_path / name / "__init__.py").write_text("raise ImportError('the wrong one')")
    (tmp_path / "scripts").mkdir()
    script = tmp_path / "scripts" / "driver.py"
    script.write_text(SCRIPT.format(root=str(ROOT)))
    environment = dict(os.environ) | {"LEAKBED_DATA": "/some/folder"}
    environment.pop("PYTHONPATH", None)
    run = subprocess.run(  # noqa: S603
        [sys.executable, str(script)],
        cwd=tmp_path,
        env=environment,
        check=False,
        capture_output=True,
        text=True,
    )
    assert run.returncode == 0, run.stderr
    place = json.loads(run.stdout.splitlines()[-1])
    assert place["data"] == "/some/folder"
    assert Path(place["leakbed"]).parent == ROOT / "leakbed"
    assert Path(place["app"]) == ROOT / "tests" / "support" / "strange_nodes.py"
    assert Path(place["folder"]) == tmp_path
