"""Runs an experiment: every cell once, resumable, one card each.

A case is crossed with every attack and defence that is tried everywhere. Of what that gives, the
cells whose parts cannot fit are left out and counted; those that a case asks for by name are cards
that say why.

``DIR/cards/<key>.json`` are the results, ``DIR/runs/<key>/`` the training runs they share,
``DIR/guesses/`` and ``DIR/truths/`` the reconstructions and what they should be.

Processes that share an experiment: each takes the next training run that nobody has taken.

They are started afresh, as CUDA needs, and compute on one thread each, so that the numbers are
those of one process that does everything in turn.
"""

import logging
import os
import pickle
from collections.abc import Iterable, Iterator, Mapping, Sequence
from concurrent.futures import FIRST_COMPLETED, Future, ProcessPoolExecutor, wait
from concurrent.futures.process import BrokenProcessPool
from dataclasses import dataclass, replace
from itertools import groupby, islice
from multiprocessing import get_context, parent_process
from pathlib import Path
from threading import Thread
from typing import Any

from experiments.results.cards import Card, read_cards
from experiments.results.folder import (
    default_folder,
    lock_folder,
    make_folder,
    note_last_run,
    noted_keys,
    remove_orphans,
)
from experiments.run.attack import make_attack
from experiments.run.defaults import resolve_defaults
from experiments.run.executor import Progress, RunCleanup, TrainingGroup
from experiments.run.prepare import make_defenses, misfit, prepare, unread
from experiments.run.train import Grids, grids_of
from experiments.settings.cells import CellSettings, cells
from experiments.settings.load import load_settings
from experiments.settings.schema import Settings
from leakbed.flower_internals import task_identity
from leakbed.provenance import EditedCodeError, RanOn
from leakbed.tensors import configure_torch

_FLOWER = "flwr"


class JobGoneError(RuntimeError):
    """A process ended before its work did."""


class JobError(RuntimeError):
    """An error of another process that cannot be handed on as it is: its name and message."""


@dataclass(frozen=True, kw_only=True)
class Task:
    """The cells of one training run, as another process is told of them.

    Attributes:
        settings: Of the experiment.
        cells: By the keys of their cards.
        folder: For results.
        root: Folder of downloaded data sets.
        ran_on: The run's data and the user's code, as the process that asks has them.
        done: Cards that are there already, by their keys.
    """

    settings: Settings
    cells: Mapping[str, CellSettings]
    folder: Path
    root: str | None
    ran_on: RanOn
    done: Mapping[str, Card]

    @property
    def is_done(self) -> bool:
        """Whether every cell has its card."""
        return self.cells.keys() <= self.done.keys()

    @property
    def own(self) -> dict[str, Card]:
        """The cards of these cells that are there."""
        return {key: self.done[key] for key in self.cells if key in self.done}


def side_by_side(tasks: Sequence[Task]) -> Iterator[tuple[int, dict[str, Card]]]:
    """Share tasks among processes; of those that are done already, none is started.

    The first error ends it: nothing more is begun, what is under way is waited for.

    Args:
        tasks: Of one experiment.

    Yields:
        The place of a task and the cards of all its cells, by their keys, as they are done.

    Raises:
        JobGoneError: A process ended before its work did.
    """
    yield from ((place, task.own) for place, task in enumerate(tasks) if task.is_done)
    lacking = {place: task for place, task in enumerate(tasks) if not task.is_done}
    if not lacking:
        return
    jobs = tasks[0].settings.jobs
    level = logging.getLogger(_FLOWER).level
    pool = ProcessPoolExecutor(
        min(jobs, len(lacking)),
        mp_context=get_context("spawn"),
        initializer=_begin,
        initargs=(level,),
    )
    waiting = iter(lacking.items())
    under_way: dict[Future[dict[str, Card]], int] = {}

    def begin(most: int) -> None:
        """Begin some more: the pool itself would begin what it holds even after an error."""
        for place, task in islice(waiting, most):
            under_way[pool.submit(_worked, replace(task, done=task.own))] = place

    try:
        begin(jobs)
        while under_way:
            ended, _ = wait(under_way, return_when=FIRST_COMPLETED)
            found = [(under_way.pop(future), future.result()) for future in ended]
            begin(len(found))
            yield from found
    except BrokenProcessPool as error:
        raise JobGoneError(
            f"one of {jobs} processes ended before its work did: killed, perhaps for want of "
            f"memory, or, started from a script, without `if __name__ == '__main__':` around its "
            f"call; finished cells stay, and jobs = 1 (-o jobs=1) goes on in one process"
        ) from error
    finally:
        pool.shutdown(cancel_futures=True)


def _begin(level: int) -> None:
    """Make a fresh process compute on one thread, log what its parent logs, and end with it."""
    configure_torch()
    logging.getLogger(_FLOWER).setLevel(level)
    Thread(target=_end_with_parent, daemon=True).start()


def _end_with_parent() -> None:
    """End this process once the one that started it is gone: nobody would read its work."""
    parent = parent_process()
    if parent is not None:
        parent.join()
        os._exit(1)


def _worked(task: Task) -> dict[str, Card]:
    """Do a task, with any error as one that the process which asked can read."""
    try:
        return cards_of(task)
    except Exception as error:
        try:
            pickle.loads(pickle.dumps(error))  # noqa: S301  of its own making
        except Exception:  # noqa: BLE001  whatever a plugin's exception raises on the way
            raise JobError(f"{type(error).__qualname__}: {error}") from None
        raise


def cards_of(task: Task) -> dict[str, Card]:
    """Train and attack, in whatever process this is called.

    Args:
        task: What to do.

    Returns:
        The cards of its cells, by their keys.

    Raises:
        EditedCodeError: This process has imported other code than the one that asks.
    """
    (first, *_) = task.cells.values()
    prepared = prepare(first.training, root=task.root)
    task.ran_on.check("another process", prepared.ran_on)
    group = TrainingGroup(
        prepared,
        folder=task.folder,
        grids=grids_of(task.settings),
        progress=None,
        on_error=task.settings.on_error,
    )
    if group.keyed(tuple(task.cells.values())).keys() != task.cells.keys():
        raise EditedCodeError(
            "the code was edited after the run began, and another process would train or attack "
            "with the new one; start the run anew"
        )
    with task_identity():
        return {card.key: card for card in group.cards(task.cells, task.done)}


def run(
    settings: Settings | Mapping[str, Any] | str | Path,
    *,
    out: Path | None = None,
    overrides: Sequence[str] = (),
    progress: Progress | None = None,
    grids: Grids | None = None,
    root: str | None = None,
) -> list[Card]:
    """Run every cell of an experiment that has no card yet, or one of status ``failed``.

    Args:
        settings: A settings file, or what it would hold.
        out: Where cards, runs and guesses go; ``runs/<name>`` if None.
        overrides: ``key=value`` pairs that replace settings.
        progress: Told how far the run is.
        grids: Where nodes are; by default the grid the settings name.
        root: Folder of downloaded data sets; by default the environment's ``LEAKBED_DATA``.

    Returns:
        The cards of all cells, old and new, in cell order; none of cells that are left out.
    """
    configure_torch()
    checked = load_settings(settings, overrides)
    folder = make_folder(default_folder(checked.name) if out is None else Path(out))
    root = root or os.environ.get("LEAKBED_DATA")
    root = str(Path(root).absolute()) if root else None  # workers may start elsewhere
    with lock_folder(folder):
        return _run(checked, folder=folder, progress=progress, grids=grids, root=root)


@dataclass(frozen=True, kw_only=True)
class Plan:
    """The cells of an experiment, by the training runs they share.

    Attributes:
        trainings: One for each run.
        keyed: Its cells by the keys of their cards.
        left_out: How many cells are left out, as their parts cannot fit.
    """

    trainings: list[TrainingGroup]
    keyed: list[dict[str, CellSettings]]
    left_out: int

    @property
    def cells(self) -> dict[str, CellSettings]:
        """All of them, in order."""
        return {key: cell for keys in self.keyed for key, cell in keys.items()}

    def note(self, folder: Path, checked: Settings, keys: Sequence[str]) -> None:
        """Write down which cards are the last run's, and what it ran."""
        settings = checked.model_dump(mode="json", exclude_unset=True)
        note_last_run(folder, checked.name, keys, left_out=self.left_out, settings=settings)


def planned(
    checked: Settings,
    *,
    folder: Path,
    root: str | None,
    progress: Progress | None = None,
    grids: Grids | None = None,
    rescores: bool = False,
) -> Plan:
    """Prepare every training run of an experiment, and train none.

    Args:
        checked: The experiment.
        folder: For results.
        root: Folder of downloaded data sets.
        progress: Told how far it is.
        grids: Where nodes are; by default the grid that the settings name.
        rescores: Whether kept guesses are to be scored, and nothing else is to be done.

    Returns:
        What is to be run.
    """
    wanted, left_out = _wanted(checked)
    groups = [list(group) for _, group in groupby(wanted, key=lambda cell: cell.training)]
    trainings = [
        TrainingGroup(
            prepare(group[0].training, root=root),
            folder=folder,
            grids=grids or grids_of(checked),
            progress=progress,
            on_error=checked.on_error,
            rescores=rescores,
        )
        for group in groups
    ]
    keyed = [group.keyed(own) for group, own in zip(trainings, groups, strict=True)]
    return Plan(trainings=trainings, keyed=keyed, left_out=left_out)


def _run(
    checked: Settings,
    *,
    folder: Path,
    progress: Progress | None,
    grids: Grids | None,
    root: str | None,
) -> list[Card]:
    """Run every cell that has no card yet, in a folder that is this run's alone."""
    done = finished(folder)
    plan = planned(checked, folder=folder, grids=grids, progress=progress, root=root)
    trainings, keyed, keys_of_all = plan.trainings, plan.keyed, list(plan.cells)
    gone = [key for key in noted_keys(folder) if key in done and key not in plan.cells]
    plan.note(folder, checked, keys_of_all)
    if progress is not None:
        progress.start(len(keys_of_all), left_out=plan.left_out)
        if gone:
            progress.note(
                f"{len(gone)} results of the last run here are of other settings, data or code, or "
                "were named by an earlier version; they stay in cards/ and are no part of this run"
            )
    tidying = RunCleanup(trainings, keep=checked.keep_runs)
    if checked.jobs > 1 and grids is None and checked.grid == "local":
        tasks = [
            Task(
                settings=checked,
                cells=keys,
                folder=folder,
                root=root,
                ran_on=group.ran_on,
                done=done,
            )
            for keys, group in zip(keyed, trainings, strict=True)
        ]
        if progress is not None:
            progress.note(f"{checked.jobs} processes share {len(tasks)} training runs")
        for place, cards in side_by_side(tasks):
            done |= cards
            _advance(keyed[place].values(), progress)
            tidying.after(trainings[place])
        return [done[key] for keys in keyed for key in keys]
    found: list[Card] = []
    with task_identity():
        for group, keys in zip(trainings, keyed, strict=True):
            found += group.cards(keys, done)
            tidying.after(group)
    return found


def finished(folder: Path) -> dict[str, Card]:
    """Return the cards that stand, by their keys; what failed is to be tried again.

    A guess whose card was deleted goes with it, so that its cell is attacked anew.

    Args:
        folder: For results.

    Returns:
        Cards.
    """
    cards = read_cards(folder) if (folder / "cards").is_dir() else []
    remove_orphans(folder, cards)
    return {card.key: card for card in cards if card.status != "failed"}


def _wanted(checked: Settings) -> tuple[list[CellSettings], int]:
    """Return the cells to run, and how many were left out."""
    asked = [resolve_defaults(cell) for cell in cells(checked)]
    for cell in asked:
        make_attack(cell.attack)  # bad values are refused before anything is trained
        make_defenses(cell.training)
    fitting = _fitting(asked)
    return fitting, len(asked) - len(fitting)


def _fitting(wanted: Sequence[CellSettings]) -> list[CellSettings]:
    """Leave out cells that cannot fit and that no case asks for by name.

    An attack or a defence that fits nowhere stays: its cards say why, and nothing else would.
    """
    fit = [cell for cell in wanted if not _is_crossed(cell)]
    attacks = {cell.attack.choice for cell in fit}
    defenses = {cell.training.defense.choice for cell in fit}
    return [
        cell
        for cell in wanted
        if cell.attack.choice not in attacks
        or cell.training.defense.choice not in defenses
        or not _is_crossed(cell)
    ]


def _is_crossed(cell: CellSettings) -> bool:
    """Say whether an attack or a defence that its case does not name cannot fit it."""
    training = cell.training
    honest = misfit(replace(training, intruder=None))
    if honest is not None and "defenses" not in cell.named:
        return True
    threat = make_attack(cell.attack).threat
    why = unread(threat, training) or (misfit(training) if honest is None else None)
    return why is not None and "attacks" not in cell.named


def _advance(done: Iterable[CellSettings], progress: Progress | None) -> None:
    if progress is not None:
        for cell in done:
            progress.advance(cell.label)
