"""Training runs that are shared out: the same numbers, resuming, errors, lost processes."""

import os
import pickle
import signal
import subprocess
import sys
from collections import deque
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from ray.cluster_utils import Cluster

from experiments.results.cards import Card
from experiments.run import runner, sweep
from experiments.run.keys import score_key
from experiments.run.prepare import prepare
from experiments.run.runner import run
from experiments.run.train import grids_of
from experiments.settings.cells import cells
from experiments.settings.load import load_settings
from experiments.settings.schema import SettingsError
from leakbed.contracts import BrokenPluginError
from leakbed.errors import came_to_nothing
from leakbed.flower_internals import FlowerMovedError
from leakbed.grids import NodeFailed
from leakbed.grids.ray.actors import NoClusterError, NoRoomError, start_ray, stop_ray
from tests.support.ray_cluster import cluster_here
from tests.support.waiting import ADOPTS, blocks_interrupts, running, until

TABLE: dict[str, Any] = {
    "name": "shared",
    "jobs": 2,
    "data": {"name": "tests.support.tiny:images", "nodes": 2},
    "model": {"name": "mlp2", "cut": 1},
    "protocol": {"name": "vanilla-split", "batch_size": 8, "local_steps": 3},
    "attack": [{"name": "smashed-as-image", "targets": 4}, {"name": "constant-image"}],
    "sweep": {"seed": [0, 1, 2]},
}
CONSTANT = {"name": "constant-image"}

PLUGINS = '''
"""An attack and a defence that note where they are, and then wait, fail or end their process."""
import os
from dataclasses import dataclass
from pathlib import Path
from typing import ClassVar
import torch
from leakbed.contracts import Defense, Evidence, Guess, Protects, Seat, ThreatModel
from tests.support.waiting import until

TRIAL_SEED, TRIAL_ROWS = 3, 3  # of leakbed.contract_trials, which each process makes first


def act(folder, who, does):
    before = len(list(Path(folder).glob(f"{who}-*")))
    Path(folder, f"{who}-{os.getpid()}").touch()
    if does == "fail":
        raise ValueError("as asked")
    while does in ("wait", "go on") and not Path(folder, "go").exists():
        try:
            until(Path(folder, "go").exists)
        except KeyboardInterrupt:
            if does == "wait":
                raise
    if does.startswith("end") and before < int(does[3:]):
        os._exit(1)


@dataclass(frozen=True, kw_only=True)
class Busy:
    name: ClassVar[str] = "busy"
    source: ClassVar[str] = "own"
    folder: str = "."
    does: str = ""

    @property
    def threat(self):
        return ThreatModel(seat=Seat.SERVER, evidence=frozenset({Evidence.SMASHED}))

    def run(self, view, *, seed):
        if seed != TRIAL_SEED:
            act(self.folder, f"attack-{seed}", self.does)
        return Guess(images=torch.full((view.targets, 1, *view.image_shape), 0.5))


@dataclass(frozen=True, kw_only=True)
class Slow(Defense):
    name: ClassVar[str] = "slow"
    source: ClassVar[str] = "own"
    protects: ClassVar[frozenset] = frozenset({Protects.SMASHED})
    folder: str = "."
    does: str = ""

    def protect_smashed(self, state, smashed):
        if len(smashed) != TRIAL_ROWS:
            act(self.folder, "defence", self.does)
        return state, smashed * 1.0
'''


@pytest.fixture(scope="module")
def mine(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Path]:
    """Return a folder on the path, outside of the repository, with plug-ins."""
    folder = tmp_path_factory.mktemp("mine")
    (folder / "busy_of_mine.py").write_text(PLUGINS)
    with pytest.MonkeyPatch.context() as patch:
        patch.syspath_prepend(str(folder))
        yield folder


@pytest.fixture(scope="module")
def two_processes() -> Iterator[None]:
    """Let sweeps use a Ray that was started once, as in the background of a script: no Ctrl-C."""
    before = signal.signal(signal.SIGINT, signal.SIG_IGN)
    try:
        assert start_ray(None, cpus=2)
    finally:
        signal.signal(signal.SIGINT, before)
    yield
    stop_ray()


@pytest.fixture
def worked_here(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """Let a task without a share of a GPU be done in this process, which goes on seeing its own."""
    hidden: list[bool] = []
    monkeypatch.setattr(sweep, "hide_gpus", lambda: hidden.append(True))
    yield
    assert hidden == [True]


def busy(folder: Path, does: str) -> dict[str, Any]:
    return {"name": "busy_of_mine:Busy", "folder": str(folder), "does": does, "targets": 2}


def slow(folder: Path, does: str) -> dict[str, Any]:
    return {"name": "busy_of_mine:Slow", "folder": str(folder), "does": does}


def statuses(cards: list[Card]) -> list[tuple[str, str]]:
    return [(card.attack.removeprefix("busy_of_mine:"), card.status) for card in cards]


def same(found: list[Card], alone: list[Card]) -> None:
    """Hold cards against those of one process."""
    assert [card.key for card in found] == [card.key for card in alone]
    assert [card.scores for card in found] == [card.scores for card in alone]
    assert [card.utility for card in found] == [card.utility for card in alone]


class Told:
    def __init__(self) -> None:
        self.total, self.done, self.notes = 0, list[str](), list[str]()

    def start(self, total: int, *, left_out: int = 0) -> None:
        self.total = total

    def advance(self, label: str) -> None:
        self.done.append(label)

    def note(self, text: str) -> None:
        self.notes.append(text)


def a_sweep(folder: Path, *overrides: str) -> tuple[sweep.Sweep, sweep.Task]:
    """Return an experiment and its first task, as the runner makes them."""
    settings = load_settings(TABLE, overrides)
    own = [cell for cell in cells(settings) if cell.training.seed == 0]
    prepared = prepare(own[0].training, root=None)
    made = sweep.Sweep(settings=settings, folder=folder, source="code", root=None)
    keyed = {score_key(cell, prepared): cell for cell in own}
    return made, sweep.Task(sweep=made, cells=keyed, ran_on=prepared.ran_on)


@pytest.mark.usefixtures("worked_here")
def test_code_that_was_edited_since_the_run_began_is_refused(tmp_path: Path) -> None:
    _, task = a_sweep(tmp_path)
    stale = dict(zip(("a" * 16, "b" * 16), task.cells.values(), strict=True))
    (ended,) = sweep.worked(replace(task, cells=stale), None, 0.0)
    assert "the code was edited after the run began" in str(ended.error)  # type: ignore[union-attr]


@pytest.mark.runtime
@pytest.mark.usefixtures("two_processes")
def test_two_processes_find_what_one_does_and_go_on_where_they_stopped(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    told = Told()
    alone = run(TABLE, out=tmp_path / "a", overrides=["jobs=1"])
    beside = run(TABLE, out=tmp_path / "b", progress=told)
    same(beside, alone)
    assert told.total == len(told.done) == len(set(told.done)) == 6
    assert told.notes == ["2 processes share 3 training runs"]
    assert len(list((tmp_path / "b" / "guesses").iterdir())) == 6

    for lost in (beside[2], beside[5]):
        (tmp_path / "b" / "cards" / f"{lost.key}.json").unlink()
    told = Told()
    again = run(TABLE, out=tmp_path / "b", overrides=["keep_runs=false"], progress=told)
    same(again, alone)
    assert [again[place] == beside[place] for place in range(6)] == [
        place not in {2, 5} for place in range(6)
    ]
    assert told.total == len(told.done) == len(set(told.done)) == 6
    assert list((tmp_path / "b" / "runs").iterdir()) == []
    monkeypatch.setattr(sweep, "share", pytest.fail)
    assert run(TABLE, out=tmp_path / "b") == again, "nothing is left to share"
    (tmp_path / "b" / "cards" / f"{again[2].key}.json").unlink()
    same(run(TABLE, out=tmp_path / "b"), alone)  # one training run alone is shared with nobody


def test_one_process_never_imports_ray(tmp_path: Path) -> None:
    asked = {**TABLE, "jobs": 1, "attack": [CONSTANT], "sweep": {"seed": [0, 1]}}
    text = (
        "import sys\nfrom pathlib import Path\nfrom experiments.run.runner import run\n"
        f"cards = run({asked!r}, out=Path({str(tmp_path)!r}))\n"
        "assert [card.status for card in cards] == ['done'] * 2\n"
        "print(sorted(name for name in sys.modules if name.partition('.')[0] == 'ray'))\n"
    )
    command = [sys.executable, "-c", text]
    ended = subprocess.run(command, capture_output=True, text=True, check=True)  # noqa: S603
    assert ended.stdout == "[]\n"


@pytest.mark.runtime
@pytest.mark.usefixtures("two_processes")
def test_a_lost_process_loses_no_finished_cell_and_its_others_are_tried_again(
    tmp_path: Path, mine: Path
) -> None:
    table = {**TABLE, "attack": [CONSTANT, busy(tmp_path, "end1"), TABLE["attack"][0]]}
    table["sweep"] = {"seed": [0, 1]}
    cards = run(table, out=tmp_path / "out")
    assert {card.status for card in cards} == {"done"}
    assert len(list(tmp_path.glob("attack-*"))) == 4, "each was begun twice"
    same(cards, run(table, out=tmp_path / "alone", overrides=["jobs=1"]))


@pytest.mark.runtime
@pytest.mark.usefixtures("two_processes")
def test_what_ends_two_processes_is_a_failed_card_and_the_others_go_on(
    tmp_path: Path, mine: Path
) -> None:
    attacks = [busy(tmp_path, "end9"), CONSTANT, TABLE["attack"][0]]
    table = {**TABLE, "attack": attacks, "sweep": {}}
    table["defense"] = [{"name": "none"}, slow(tmp_path, "end9")]
    cards = run(table, out=tmp_path / "out")
    assert statuses(cards) == [
        ("Busy", "failed"),  # the second process found the training run finished
        ("constant-image", "done"),
        ("smashed-as-image", "done"),
        ("Busy", "failed"),  # here it is the training that ends its process
        ("constant-image", "failed"),
        ("smashed-as-image", "failed"),
    ]
    assert "2 processes were lost over it (WorkerCrashedError" in str(cards[0].why)
    assert len(list(tmp_path.glob("attack-*"))) == len(list(tmp_path.glob("defence-*"))) == 2
    assert came_to_nothing([card.status for card in cards]) == 1


def test_a_process_lost_twice_ends_the_run_where_that_is_asked_for(tmp_path: Path) -> None:
    _, task = a_sweep(tmp_path, "on_error=stop")
    scheduler = object.__new__(sweep._Scheduler)
    scheduler._settings, scheduler._ending = task.sweep.settings, False
    scheduler._waiting = deque()
    lost = sweep._Run(0, task)
    scheduler._lose(lost, RuntimeError("first line\nsecond"))
    assert scheduler._waiting.popleft() is lost, "it is tried once more"
    said = r"^2 processes were lost over it \(RuntimeError: first line\).*finished cells stay"
    with pytest.raises(sweep.JobGoneError, match=said):
        scheduler._lose(lost, RuntimeError("first line\nsecond"))


def test_of_a_finished_training_the_cell_under_way_is_given_up_alone(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(sweep, "hide_gpus", lambda: None)  # of this process, for both tasks
    made, task = a_sweep(tmp_path)
    first, _ = sweep.worked(task, None, 0.0)
    assert isinstance(first, sweep.Finished), "it was not trained before"
    again = sweep.worked(task, None, 0.0)
    assert isinstance(next(again), sweep.Trained)
    assert [each.card.key for each in again] == list(task.cells)  # type: ignore[union-attr]

    kept: list[Card] = []
    scheduler = object.__new__(sweep._Scheduler)
    scheduler._settings, scheduler._ending = made.settings, False
    scheduler._waiting, scheduler._keep = deque(), kept.append
    lost = sweep._Run(0, task)
    lost.trained = True
    for _ in range(2):
        scheduler._lose(lost, RuntimeError("gone"))
    assert [card.status for card in kept] == ["failed"]
    assert list(lost.task.cells) == list(task.cells)[1:], "the others are tried"


@pytest.mark.runtime
@pytest.mark.usefixtures("two_processes")
def test_an_error_ends_the_run_and_nothing_more_is_begun(tmp_path: Path, mine: Path) -> None:
    table = {**TABLE, "attack": [CONSTANT, busy(tmp_path, "fail")], "on_error": "stop"}
    with pytest.raises(BrokenPluginError, match="as asked"):
        run(table, out=tmp_path / "out")
    assert len(list(tmp_path.glob("attack-*"))) == 2, "the third of three was never begun"
    assert len(list((tmp_path / "out" / "cards").iterdir())) == 2, "what was under way went on"


@pytest.mark.runtime
@pytest.mark.usefixtures("two_processes")
def test_ctrl_c_keeps_what_is_finished_and_leaves_nothing_half_done(
    tmp_path: Path, mine: Path
) -> None:
    table, out = interrupted(tmp_path, "wait")
    (kept,) = cards_in(out)
    written = kept.stat().st_mtime_ns
    assert len(list((out / "runs").iterdir())) == 1, "the finished run, and no other"
    (tmp_path / "go").touch()
    assert [card.status for card in run(table, out=out)] == ["done", "done"]
    assert kept.stat().st_mtime_ns == written


@pytest.mark.runtime
@pytest.mark.usefixtures("two_processes")
def test_ctrl_c_ends_by_force_what_goes_on(
    tmp_path: Path, mine: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(sweep, "_END_SECONDS", 1.0)
    _, out = interrupted(tmp_path, "go on")
    assert len(cards_in(out)) == 1
    (process,) = (int(each.name.rpartition("-")[2]) for each in tmp_path.glob("defence-*"))
    until(lambda: not running(process))


def interrupted(folder: Path, does: str) -> tuple[dict[str, Any], Path]:
    """Press Ctrl-C when one cell is finished and one is under way; return settings and results."""
    table = {**TABLE, "attack": [CONSTANT], "sweep": {}}
    table["defense"] = [{"name": "none"}, slow(folder, does)]
    out = folder / "out"

    def interrupt() -> None:
        until(lambda: bool(list(folder.glob("defence-*"))) and len(cards_in(out)) == 1)
        os.kill(os.getpid(), signal.SIGINT)

    # Started in the background of a script, Python leaves Ctrl-C ignored.
    before = signal.signal(signal.SIGINT, signal.default_int_handler)
    try:
        with ThreadPoolExecutor(1) as beside:
            told = beside.submit(interrupt)
            with pytest.raises(KeyboardInterrupt):
                run(table, out=out)
            told.result()
    finally:
        signal.signal(signal.SIGINT, before)
    return table, out


def cards_in(folder: Path) -> list[Path]:
    return list((folder / "cards").glob("*.json"))


@pytest.mark.runtime
def test_processes_end_with_the_one_that_asked_also_where_a_session_adopts_orphans(
    tmp_path: Path, mine: Path
) -> None:
    table = {**TABLE, "attack": [busy(tmp_path, "wait")], "sweep": {"seed": [0, 1]}}
    text = (
        f"import os, sys\nsys.path.insert(0, {str(mine)!r})\nfrom pathlib import Path\n"
        f"Path({str(tmp_path / 'driver')!r}).write_text(str(os.getpid()))\n"
        f"from experiments.run.runner import run\nrun({table!r}, out=Path({str(tmp_path / 'o')!r}))"
    )
    command = [sys.executable, "-c", ADOPTS, text]
    with subprocess.Popen(command, stdin=subprocess.PIPE):  # noqa: S603
        until(lambda: len(list(tmp_path.glob("attack-*"))) == 2)
        processes = [int(each.name.rpartition("-")[2]) for each in tmp_path.glob("attack-*")]
        assert all(map(running, processes))
        assert all(os.getpriority(os.PRIO_PROCESS, each) == 0 for each in processes)
        assert all(map(blocks_interrupts, processes)), "Ctrl-C on a terminal is the driver's alone"
        os.kill(int((tmp_path / "driver").read_text()), signal.SIGKILL)
        until(lambda: not any(map(running, processes)), within=60)


@pytest.fixture(scope="module")
def cluster() -> Iterator[Cluster]:
    with cluster_here() as made:
        yield made


@pytest.mark.runtime
def test_a_cluster_that_loses_a_machine_does_every_cell(
    cluster: Cluster, tmp_path: Path, mine: Path
) -> None:
    stop_ray()  # that of the tests before
    second = cluster.add_node(num_cpus=1)
    cluster.wait_for_nodes()
    table = {**TABLE, "attack": [CONSTANT, busy(tmp_path, "wait")], "sweep": {"seed": [0, 1]}}
    out = tmp_path / "out"

    def take_away() -> None:
        until(lambda: len(list(tmp_path.glob("attack-*"))) == 2)
        processes = [int(each.name.rpartition("-")[2]) for each in tmp_path.glob("attack-*")]
        until(lambda: len(cards_in(out)) == 2)  # what is finished comes before the rest
        cluster.remove_node(second, allow_graceful=False)
        until(lambda: not all(map(running, processes)))
        (tmp_path / "go").touch()

    with ThreadPoolExecutor(1) as beside:
        taken = beside.submit(take_away)
        cards = run(table, out=out, overrides=["ray_address=auto", "jobs=1"])
        taken.result()
    assert [card.status for card in cards] == ["done"] * 4
    assert len(list(tmp_path.glob("attack-*"))) == 3, "one cell was tried again"
    same(cards, run(table, out=tmp_path / "alone", overrides=["jobs=1"]))


@pytest.mark.runtime
def test_a_cluster_without_our_code_is_refused_before_anything_is_trained(
    cluster: Cluster, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "experiments").mkdir()
    (tmp_path / "experiments" / "__init__.py").touch()
    with monkeypatch.context() as patch:
        patch.setattr(sweep, "here", lambda: ([str(tmp_path)], {}))
        with pytest.raises(sweep.OtherCodeError, match=r"lacks Leakbed \(No module.*same files"):
            run(TABLE, out=tmp_path / "out", overrides=["ray_address=auto"])
    monkeypatch.setattr(runner, "source_hash", lambda: "0123")
    with pytest.raises(sweep.OtherCodeError, match=r"has other sources of Leakbed .*, here 0123"):
        run(TABLE, out=tmp_path / "out", overrides=["ray_address=auto"])
    assert not cards_in(tmp_path / "out")


def test_a_cluster_that_is_not_there_is_named(tmp_path: Path) -> None:
    with pytest.raises(
        NoClusterError, match=r"no Ray cluster answers at ray_address '127.0.0.1:1'"
    ):
        run(TABLE, out=tmp_path, overrides=["ray_address=127.0.0.1:1"])
    assert not cards_in(tmp_path)


class TwoPartsError(ValueError):
    """As a plugin may raise: it pickles, and then cannot be made from its one argument."""

    def __init__(self, name: str, value: int) -> None:
        super().__init__(f"{name} is {value}")


@pytest.mark.usefixtures("worked_here")
@pytest.mark.parametrize(
    ("raised", "seen", "said"),
    [
        (NodeFailed(0, "train", "disk full"), NodeFailed, "disk full"),
        (FlowerMovedError("it"), FlowerMovedError, "it is not what it was"),
        (TwoPartsError("rows", 3), sweep.JobError, "TwoPartsError: rows is 3"),
    ],
)
def test_an_error_of_a_task_can_be_read_elsewhere(
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    raised: Exception,
    seen: type[Exception],
    said: str,
) -> None:
    def fail(*_: Any) -> None:
        raise raised

    monkeypatch.setattr(sweep, "_group", fail)
    (ended,) = sweep.worked(a_sweep(tmp_path)[1], None, 0.0)
    there = pickle.loads(pickle.dumps(ended)).error  # noqa: S301  of its own making
    assert type(there) is seen
    assert said in str(there)


@pytest.mark.usefixtures("worked_here")
@pytest.mark.parametrize("keep", [True, False], ids=["kept", "removed"])
def test_a_machine_with_a_disk_of_its_own_hands_over_pictures_and_keeps_or_removes_runs(
    tmp_path: Path, *, keep: bool
) -> None:
    (tmp_path / sweep.LOCK).touch()
    there = tmp_path / "there"
    _, task = a_sweep(there, f"keep_runs={str(keep).lower()}")
    found = list(sweep.worked(task, sweep._mark(tmp_path), 0.0))
    assert [type(each) for each in found] == [sweep.Finished] * 2
    assert all(each.files.keys() == {"guesses", "truths"} for each in found)
    left = [path for path in there.rglob("*") if path.is_file()]
    assert bool(left) == keep
    assert not [path for path in left if path.parent.name in {"guesses", "truths", "cards"}]

    made, _ = a_sweep(tmp_path / "here")
    kept: list[Card] = []
    mine = sweep._Run(0, replace(task, sweep=made))
    mine.arrived.extend(found)  # type: ignore[arg-type]
    scheduler = object.__new__(sweep._Scheduler)
    scheduler._keep = kept.append
    scheduler._store(mine)
    assert not mine.task.cells
    for each in found:
        for part, content in each.files.items():
            file = tmp_path / "here" / part / f"{each.card.guess_key}.safetensors"
            assert file.read_bytes() == content
            assert file.stat().st_mode & 0o777 == 0o600


def test_only_the_folder_itself_is_the_askers(tmp_path: Path) -> None:
    for name in ("a", "b"):
        (tmp_path / name).mkdir()
        (tmp_path / name / sweep.LOCK).touch()
    assert sweep._mark(tmp_path / "a") == sweep._mark(tmp_path / "a")
    assert sweep._mark(tmp_path / "a") != sweep._mark(tmp_path / "b")
    assert sweep._mark(tmp_path / "c") is None


def test_a_cluster_without_room_is_named_and_nothing_waits_for_it(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(sweep, "_NO_ROOM_SECONDS", 0.0)
    monkeypatch.setattr(sweep, "_LOOK_SECONDS", 0.0)
    monkeypatch.setattr("ray.cluster_resources", lambda: {"node:10.0.0.1": 1.0})
    made, task = a_sweep(tmp_path, "ray_address=auto")
    scheduler = object.__new__(sweep._Scheduler)
    scheduler._settings, scheduler._share = made.settings, 0.0
    scheduler._waiting, scheduler._under_way = deque([sweep._Run(0, task)]), {}
    with pytest.raises(NoRoomError, match="no room for 0 s, and 1 training runs wait for 1 CPU"):
        scheduler.run()


@pytest.mark.parametrize(
    ("overrides", "there", "share"),
    [
        (["gpus_per_worker=0.3"], {"CPU": 8.0, "GPU": 2.0}, 0.3),
        (["jobs=4"], {"CPU": 8.0, "GPU": 2.0}, 0.5),
        (["jobs=4", "ray_address=auto"], {"CPU": 8.0, "GPU": 2.0}, 0.25),
        (["jobs=1", "ray_address=auto"], {"CPU": 2.0, "GPU": 8.0}, 1.0),
    ],
)
def test_gpus_are_shared_equally(
    monkeypatch: pytest.MonkeyPatch, overrides: list[str], there: dict[str, float], share: float
) -> None:
    monkeypatch.setattr("ray.cluster_resources", lambda: there)
    monkeypatch.setattr("torch.cuda.is_available", lambda: True)
    monkeypatch.setattr("torch.cuda.device_count", lambda: 1)
    assert sweep._gpu_share(load_settings(TABLE, overrides)) == share


@pytest.mark.parametrize("override", ["device=cpu", "gpus_per_worker=0.5"])
def test_a_task_takes_no_gpu_where_the_keys_say_cpu(
    monkeypatch: pytest.MonkeyPatch, override: str
) -> None:
    monkeypatch.setattr("ray.cluster_resources", lambda: {"CPU": 8.0, "GPU": 2.0})
    monkeypatch.setattr("torch.cuda.is_available", lambda: override == "device=cpu")
    monkeypatch.setattr("torch.cuda.device_count", lambda: 1)
    assert sweep._gpu_share(load_settings(TABLE, [override])) == 0.0


@pytest.mark.parametrize(
    ("override", "said"),
    [("gpus_per_worker=0", r"'auto' is a GPU here; leave"), ("jobs=2", r"Ray counts none; set")],
)
def test_a_task_without_a_gpu_is_refused_where_the_keys_say_cuda(
    monkeypatch: pytest.MonkeyPatch, override: str, said: str
) -> None:
    monkeypatch.setattr("ray.cluster_resources", lambda: {"CPU": 8.0})
    monkeypatch.setattr("torch.cuda.is_available", lambda: True)
    monkeypatch.setattr("torch.cuda.device_count", lambda: 1)
    with pytest.raises((sweep.UnsharedError, NoRoomError), match=said):
        sweep._gpu_share(load_settings(TABLE, [override]))


@pytest.mark.parametrize(
    ("override", "said"),
    [
        ("device=cuda:1", r"'cuda:1' names one GPU.*CUDA_VISIBLE_DEVICES=1"),
        ("ray_address=ray://10.0.0.1:10001", r"Ray's client.*on a machine of the cluster"),
    ],
)
def test_what_cannot_be_shared_out_is_refused(tmp_path: Path, override: str, said: str) -> None:
    settings = load_settings(TABLE, [override])
    made = sweep.Sweep(settings=settings, folder=tmp_path, source="", root=None)
    with pytest.raises(sweep.UnsharedError, match=said):
        sweep.share(made, {}, done={}, keep=pytest.fail, tidy=pytest.fail, note=None)


def test_nodes_on_ray_and_runs_on_ray_are_one_too_many() -> None:
    with pytest.raises(SettingsError, match=r"jobs = 2 shares.*grid = 'ray'.*set jobs = 1"):
        load_settings(TABLE, ["grid=ray"])
    assert load_settings(TABLE, ["grid=ray", "jobs=1"]).jobs == 1


def test_a_lent_grid_is_not_shared_out(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sweep, "share", pytest.fail)
    lent = grids_of(load_settings(TABLE, []))
    assert len(run(TABLE, out=tmp_path, grids=lent, overrides=["sweep={}"])) == 2
