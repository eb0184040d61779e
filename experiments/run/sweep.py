"""Training runs as tasks of Ray, on this machine or on a cluster: a card as each cell is done.

A task is one training run with its attacks. It takes one CPU and a share of a GPU, computes as a
process alone would, and hands over each card, with its guess and truth, before it begins the next
cell. So whatever ends it, what was finished is here. Where a process or a machine is lost, the
cells it still owed are tried once more, wherever there is room, and are cards of status ``failed``
after that; the other tasks go on.

A process on this machine writes into the experiment's own results folder. One that does not see
that folder keeps its training runs under the same path of its own disk, or, without ``keep_runs``,
in a temporary folder there, which it removes.
"""

import logging
import math
import os
import pickle
import re
from collections import deque
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from pathlib import Path
from tempfile import TemporaryDirectory
from time import monotonic, sleep
from typing import Any

import ray
from ray.util.scheduling_strategies import NodeAffinitySchedulingStrategy

from experiments.results.cards import Card
from experiments.results.folder import LOCK, make_folder, write_private
from experiments.run.attack import Cell
from experiments.run.executor import TrainingGroup, empty_card
from experiments.run.prepare import prepare
from experiments.run.train import grids_of
from experiments.settings.cells import CellSettings
from experiments.settings.schema import Settings
from leakbed.flower_internals import task_identity
from leakbed.grids.ray.actors import (
    NoRoomError,
    counted_gpus,
    here,
    hide_gpus,
    moving,
    refuse_crowd,
    room,
    start_ray,
    stop_ray,
    take_share,
)
from leakbed.provenance import EditedCodeError, RanOn
from leakbed.tensors import configure_torch, resolve_device

_log = logging.getLogger(__name__)

_ATTEMPTS = 2  # a cell that was under way as its process was lost is tried once more
_PROBE_SECONDS = 15.0  # to start an interpreter and read our sources; with Ray's own, under 30
_NO_ROOM_SECONDS = 60.0  # for which a cluster may have no CPU left: a machine may come back
_LOOK_SECONDS = 5.0  # how often to look whether the cluster still has room
_END_SECONDS = 5.0  # for tasks to remove what they have half done


class JobGoneError(RuntimeError):
    """A process or a machine was lost twice over the same cell."""


class JobError(RuntimeError):
    """An error of another process that cannot be handed on as it is: its name and message."""


class OtherCodeError(ValueError):
    """Machines of a cluster that do not have this process's code, or do not answer."""


class UnsharedError(ValueError):
    """A setting that makes sense only where training runs are not shared out."""


@dataclass(frozen=True, kw_only=True)
class Sweep:
    """What the tasks of an experiment have in common.

    Attributes:
        settings: Of the experiment.
        folder: For results, absolute.
        source: Hash of the code.
        root: Folder of downloaded data sets, absolute.
    """

    settings: Settings
    folder: Path
    source: str
    root: str | None


@dataclass(frozen=True, kw_only=True)
class Task:
    """The cells of one training run that have no card, as another process is told of them.

    Attributes:
        sweep: Of which it is one.
        cells: By the keys of their cards.
        ran_on: The run's data and the user's code, as the process that asks has them.
    """

    sweep: Sweep
    cells: Mapping[str, CellSettings]
    ran_on: RanOn


@dataclass(frozen=True)
class Finished:
    """A cell that came to its end.

    Attributes:
        card: Of it.
        files: Its guess and truth by their paths in the results folder; none where the process
            that made them wrote into the asker's own folder.
    """

    card: Card
    files: Mapping[str, bytes]


@dataclass(frozen=True)
class Trained:
    """What is said before the first cell where the training run was finished earlier."""


@dataclass(frozen=True)
class Ended:
    """An error that ended a task, and with it the experiment."""

    error: Exception


@dataclass
class _Run:
    """A task that is not done: where it stands, and what it takes."""

    number: int
    task: Task
    trained: bool = False  # whether it is known that the training does not end the process
    lost: int = 0  # processes in a row that ended before a card
    arrived: deque[Finished] = field(default_factory=deque)


def share(
    sweep: Sweep,
    runs: Mapping[int, tuple[Mapping[str, Cell], RanOn]],
    *,
    done: Mapping[str, Card],
    keep: Callable[[Card], None],
    tidy: Callable[[int], None],
    note: Callable[[str], None] | None,
) -> None:
    """Do training runs and their attacks: ``jobs`` at once, on a cluster what it has room for.

    The first error of a task ends it: no more are begun, what is under way is waited for. Ctrl-C
    ends it at once; cells that are finished by then are kept.

    Args:
        sweep: The experiment.
        runs: By any number: a training run's cells by the keys of their cards, and what it ran on
            in this process. Each lacks at least one card.
        done: Cards that stand.
        keep: Called with each card, old or new.
        tidy: Called with the number of each training run that is done.
        note: Told what is happening.
    """
    settings = sweep.settings
    _refuse_unfit(settings)
    tasks = {}
    for number, (keyed, ran_on) in runs.items():
        for key in keyed.keys() & done.keys():
            keep(done[key])
        cells = {key: cell.settings for key, cell in keyed.items() if key not in done}
        tasks[number] = Task(sweep=sweep, cells=cells, ran_on=ran_on)
    own = start_ray(settings.ray_address, cpus=min(settings.jobs, len(tasks)))
    try:
        if settings.ray_address is not None:
            _refuse_other_code(sweep.source)
        scheduler = _Scheduler(sweep, tasks, keep=keep, tidy=tidy)
        if note is not None:
            together = min(scheduler.places(), len(tasks))
            note(f"{together} processes share {len(tasks)} training runs")
        scheduler.run()
    finally:
        if own:
            stop_ray()


class _Scheduler:
    """Tasks that wait, and those under way."""

    def __init__(
        self,
        sweep: Sweep,
        tasks: Mapping[int, Task],
        *,
        keep: Callable[[Card], None],
        tidy: Callable[[int], None],
    ) -> None:
        """Begin nothing yet."""
        self._keep, self._tidy = keep, tidy
        self._waiting = deque(_Run(number, task) for number, task in tasks.items())
        self._under_way: dict[Any, _Run] = {}
        self._ending = False
        self._settings, self._mark = sweep.settings, _mark(sweep.folder)
        self._share = _gpu_share(self._settings)
        refuse_crowd(1, num_gpus=self._share)
        self._remote = ray.remote(_task()).options(
            num_cpus=1,
            num_gpus=self._share,
            max_retries=0,  # Ray's would begin anew, with cells that have their cards
            # A task goes on after each card only once this process has it.
            _generator_backpressure_num_objects=1,
        )
        self._place = *here(), os.getcwd()  # noqa: PTH109  a string, for what has yet to find code

    def places(self) -> int:
        """Return how many tasks may be under way."""
        places, _ = room(self._share)
        return places if self._settings.ray_address else min(places, self._settings.jobs)

    def run(self) -> None:
        """Do every task."""
        try:
            try:
                self._work()
            except NoRoomError:
                raise
            except Exception:
                self._await_end()
                raise
        except (KeyboardInterrupt, NoRoomError):
            self._cut_short()
            raise

    def _work(self) -> None:
        seen = monotonic()
        while self._waiting or self._under_way:
            places = self.places()
            while self._waiting and len(self._under_way) < places:
                self._begin(self._waiting.popleft())
            ready: list[Any] = []
            if self._under_way:
                ready, _ = ray.wait(list(self._under_way), timeout=_LOOK_SECONDS)
            else:
                sleep(_LOOK_SECONDS)
            for generator in ready:
                self._receive(generator)
            seen = monotonic() if ready or places else seen
            if monotonic() - seen > _NO_ROOM_SECONDS:
                raise NoRoomError(
                    f"the cluster has had no room for {_NO_ROOM_SECONDS:g} s, and "
                    f"{len(self._waiting) + len(self._under_way)} training runs wait for 1 CPU and "
                    f"{self._share:g} GPU each; finished cells stay, and the same command goes on"
                )

    def _begin(self, run: _Run) -> None:
        packed = pickle.dumps((run.task, self._mark, self._share))
        self._under_way[self._remote.remote(*self._place, packed)] = run

    def _receive(self, generator: Any) -> None:  # noqa: ANN401  Ray is untyped
        """Take in what a task has come to; one whose cards cannot be kept is cancelled."""
        try:
            self._take_in(generator, self._under_way[generator])
        except Exception:
            if self._under_way.pop(generator, None) is not None:
                ray.cancel(generator)
            raise

    def _take_in(self, generator: Any, run: _Run) -> None:  # noqa: ANN401  Ray is untyped
        self._store(run)  # what an interrupt kept from it
        try:
            found = ray.get(next(generator))
        except StopIteration:
            del self._under_way[generator]
            self._tidy(run.number)
            return
        except ray.exceptions.RayTaskError as error:  # our own code never began
            del self._under_way[generator]
            raise JobError(f"{type(error.cause).__qualname__}: {error.cause}") from None
        except ray.exceptions.RayError as error:
            del self._under_way[generator]
            self._lose(run, error)
            return
        if isinstance(found, Ended):
            del self._under_way[generator]
            raise found.error
        run.trained = True
        if isinstance(found, Finished):
            run.arrived.append(found)
            self._store(run)
            run.lost = 0

    def _store(self, run: _Run) -> None:
        """Keep what has arrived."""
        while run.arrived:
            card = run.arrived[0].card
            for part, content in run.arrived[0].files.items():
                write_private(_kept(run.task.sweep.folder, part, card.guess_key), content)
            self._keep(card)
            cells = {key: cell for key, cell in run.task.cells.items() if key != card.key}
            run.task = replace(run.task, cells=cells)
            run.arrived.popleft()

    def _lose(self, run: _Run, error: Exception) -> None:
        """Let the cells that a lost process owed be tried again, or give them up."""
        if self._ending:
            return
        run.lost += 1
        why = f"{type(error).__name__}: {str(error).partition(chr(10))[0]}"
        _log.warning("a process is gone (%s) that owed %d cells", why, len(run.task.cells))
        if run.lost == _ATTEMPTS:
            self._give_up(run, why)
        if run.task.cells:
            self._waiting.appendleft(run)
        else:
            self._tidy(run.number)

    def _give_up(self, run: _Run, why: str) -> None:
        """Make failed cards: of the cell that was under way, or, before the training was, of all.

        Until a cell has its card, or the run is found finished, it may be the training that ends
        the process.
        """
        said = (
            f"{_ATTEMPTS} processes were lost over it ({why}): killed, perhaps for want of memory, "
            "or with their machine; smaller targets, or fewer jobs at once, need less"
        )
        if self._settings.on_error == "stop":
            raise JobGoneError(f"{said}; finished cells stay")
        for key, cell in list(run.task.cells.items())[: 1 if run.trained else None]:
            card = empty_card(Cell.of(cell), key, status="failed", why=said)
            run.arrived.append(Finished(card, {}))
        self._store(run)
        run.lost = 0

    def _await_end(self) -> None:
        """Keep what tasks under way still finish, and begin nothing more.

        What a cluster without any CPU or GPU has not begun by then never ends: it is cut short.
        """
        self._ending, seen = True, monotonic()
        if waits := len(self._under_way):
            _log.warning("an error: ends after %d runs that Ray was given, or by Ctrl-C", waits)
        while self._under_way:
            ready, _ = ray.wait(list(self._under_way), timeout=_LOOK_SECONDS)
            for generator in ready:
                self._receive_late(generator)
            seen = monotonic() if ready or self.places() else seen
            if monotonic() - seen > _NO_ROOM_SECONDS:
                self._cut_short()
                return

    def _cut_short(self) -> None:
        """Interrupt tasks under way, which then remove what is half done; end those that go on.

        Of a task that was interrupted but goes on, the next card would be waited for without end:
        so what came is taken in only once a task has ended.
        """
        self._ending = True
        for force in (False, True):
            for generator in self._under_way:
                ray.cancel(generator, force=force)
            ends = {generator.completed(): generator for generator in self._under_way}
            if not ends:
                return
            ended, _ = ray.wait(list(ends), num_returns=len(ends), timeout=_END_SECONDS)
            for ref in ended:
                while ends[ref] in self._under_way:
                    self._receive_late(ends[ref])

    def _receive_late(self, generator: Any) -> None:  # noqa: ANN401  Ray is untyped
        """Take in what a task has come to when another has ended the experiment already."""
        try:
            self._receive(generator)
        except Exception as error:  # noqa: BLE001
            _log.warning("a task ended as well: %s", error)


def _mark(folder: Path) -> tuple[int, int] | None:
    """Return what tells a results folder from another machine's of the same path: its lock file."""
    try:
        found = (folder / LOCK).stat()
    except OSError:
        return None
    return found.st_ino, found.st_mtime_ns


def _kept(folder: Path, part: str, key: str) -> Path:
    return folder / part / f"{key}.safetensors"


def _gpu_share(settings: Settings) -> float:
    """Return the share of a GPU that each task takes, 0 where this process computes on a CPU.

    A task computes on the type of device that the keys of its cells name. Ray is started.
    """
    if resolve_device(settings.device).type == "cpu":
        return 0.0
    if settings.gpus_per_worker == 0:
        raise UnsharedError(
            f"gpus_per_worker = 0 leaves training runs that are shared out no GPU, but device = "
            f"{settings.device!r} is a GPU here; leave gpus_per_worker out for equal shares, or "
            "set device = 'cpu'"
        )
    if settings.gpus_per_worker is not None:
        return settings.gpus_per_worker
    at_once, _ = room(0.0)
    if settings.ray_address is None:
        at_once = min(at_once, settings.jobs)
    return 1 / math.ceil(max(1, at_once) / counted_gpus())


def _refuse_unfit(settings: Settings) -> None:
    """Refuse settings that make sense only where nothing is shared out."""
    if re.fullmatch(r"cuda:\d+", settings.device):
        number = settings.device.partition(":")[2]
        raise UnsharedError(
            f"device = {settings.device!r} names one GPU, but Ray gives each training run that is "
            f"shared out its own; set device = 'cuda', with CUDA_VISIBLE_DEVICES={number} before "
            "the command to use that one alone, or jobs = 1 without a ray_address"
        )
    if (settings.ray_address or "").startswith("ray://"):
        raise UnsharedError(
            f"ray_address = {settings.ray_address!r} is of Ray's client, which cannot hand over "
            "cards one by one; run the command on a machine of the cluster, with ray_address = "
            "'auto', or give host:port"
        )


def _refuse_other_code(source: str) -> None:
    """Refuse machines that lack our sources, or have others, before anything is begun there."""
    place = here()
    asked = {}
    for node in ray.nodes():
        if node["Alive"] and node["Resources"].get("CPU", 0) >= 1:
            where = NodeAffinitySchedulingStrategy(node["NodeID"], soft=False)
            probe = ray.remote(_probe()).options(
                num_cpus=0, max_retries=0, scheduling_strategy=where
            )
            asked[probe.remote(*place)] = node["NodeManagerAddress"]
    answered, _ = ray.wait(list(asked), num_returns=len(asked), timeout=_PROBE_SECONDS)
    found = {}
    for ref, machine in asked.items():
        if (why := _other(ref, source) if ref in answered else _LATE) is not None:
            found[machine] = why
    if found:
        folder = Path(__file__).parents[2]
        raise OtherCodeError(
            f"machines of the cluster cannot run this experiment: "
            f"{'; '.join(f'{machine} {why}' for machine, why in found.items())}. Every machine "
            f"needs the same files under the same path, {folder}: a shared disk, or "
            "a copy of the repository with its environment"
        )


_LATE = f"has not answered within {_PROBE_SECONDS:g} s"


def _other(ref: Any, source: str) -> str | None:  # noqa: ANN401  Ray is untyped
    """Return what is wrong with a machine's code, if anything."""
    try:
        there = ray.get(ref)
    except ray.exceptions.RayTaskError as error:
        return f"lacks Leakbed ({error.cause})"
    except (ray.exceptions.TaskUnschedulableError, ray.exceptions.NodeDiedError):
        return None  # the machine was lost meanwhile, which Ray may take a while to notice
    except ray.exceptions.RayError as error:
        return f"could not be asked ({type(error).__name__})"
    return None if there == source else f"has other sources of Leakbed ({there}, here {source})"


def _probe() -> Callable[[list[str], dict[str, str]], str]:
    """Return what says which sources a machine has; sent by value, as that has yet to find them."""
    move = moving()

    def probe(path: list[str], environment: dict[str, str]) -> str:
        move(path, environment)
        from experiments.results.cards import source_hash  # noqa: PLC0415

        return source_hash()

    return probe


def _task() -> Callable[
    [list[str], dict[str, str], str, bytes], Iterator[Finished | Trained | Ended]
]:
    """Return what a process of Ray's does with a packed task; sent by value as well."""
    move = moving()

    def task(
        path: list[str], environment: dict[str, str], folder: str, packed: bytes
    ) -> Iterator[Finished | Trained | Ended]:
        import os  # noqa: PLC0415  this code arrives before its imports can be found
        import pickle  # noqa: PLC0415
        import signal  # noqa: PLC0415

        # Where the command was started with Ctrl-C ignored, as a script's background is, Ray could
        # not interrupt this either. On a terminal Ray has Ctrl-C blocked here.
        signal.signal(signal.SIGINT, signal.default_int_handler)
        move(path, environment)
        if os.path.isdir(folder):  # noqa: PTH112
            os.chdir(folder)  # what a user's code opens by a relative path
        from experiments.run.sweep import worked  # noqa: PLC0415
        from leakbed.grids.ray.actors import end_with_ray  # noqa: PLC0415

        end_with_ray()
        yield from worked(*pickle.loads(packed))  # noqa: S301  of the asker's making

    return task


def worked(
    task: Task, mark: tuple[int, int] | None, share: float
) -> Iterator[Finished | Trained | Ended]:
    """Train and attack, in a process of Ray's.

    Args:
        task: What to do.
        mark: Of the asker's results folder.
        share: Of a GPU; of 0, none is seen.

    Yields:
        That the training run is there, if it is; each cell's card as it is there; last, where one
        ends the task, an error.
    """
    if not share:
        hide_gpus()
    try:
        if share:
            take_share(share)
        configure_torch()
        with _results(task, mark) as (folder, is_askers), task_identity():
            group, keyed = _group(task, folder)
            if group.is_trained:
                yield Trained()
            for card in group.cards(keyed, {}):
                yield Finished(card, {} if is_askers else _taken(folder, card.guess_key))
    except Exception as error:  # noqa: BLE001  the asker raises it
        yield Ended(_readable(error))


def _group(task: Task, folder: Path) -> tuple[TrainingGroup, dict[str, Cell]]:
    """Return the training run of a task and its cells, which this process has the same code for."""
    made = [Cell.of(cell) for cell in task.cells.values()]
    prepared = prepare(made[0].settings.training, root=task.sweep.root)
    task.ran_on.check("another process", prepared.ran_on)
    group = TrainingGroup(
        prepared,
        folder=folder,
        grids=grids_of(task.sweep.settings),
        progress=None,
        on_error=task.sweep.settings.on_error,
    )
    if (keyed := group.keyed(made)).keys() != task.cells.keys():
        raise EditedCodeError(
            "the code was edited after the run began, and another process would train or attack "
            "with the new one; start the run anew"
        )
    return group, keyed


@contextmanager
def _results(task: Task, mark: tuple[int, int] | None) -> Iterator[tuple[Path, bool]]:
    """Yield the folder to write into, and whether it is the asker's own."""
    if mark is not None and _mark(task.sweep.folder) == mark:
        yield task.sweep.folder, True
        return
    folder = make_folder(task.sweep.folder)
    if task.sweep.settings.keep_runs:
        yield folder, False
        return
    with TemporaryDirectory(prefix=".runs-", dir=folder) as removed:
        yield Path(removed), False


def _taken(folder: Path, key: str) -> dict[str, bytes]:
    """Return a cell's guess and truth, where it has them, and leave neither behind."""
    found = {}
    for part in ("guesses", "truths"):
        path = _kept(folder, part, key)
        if path.exists():
            found[part] = path.read_bytes()
            path.unlink()
    return found


def _readable(error: Exception) -> Exception:
    """Return an error as one that another process can read."""
    try:
        pickle.loads(pickle.dumps(error))  # noqa: S301  of its own making
    except Exception:  # noqa: BLE001  whatever a plugin's exception raises on the way
        return JobError(f"{type(error).__qualname__}: {error}")
    return error
