"""Processes that share an experiment: each takes the next training run that nobody has taken.

They are started afresh, as CUDA needs, and compute on one thread each, so that the numbers are
those of one process that does everything in turn.
"""

import logging
import shutil
from collections.abc import Iterator, Mapping, Sequence
from concurrent.futures import ProcessPoolExecutor, as_completed
from concurrent.futures.process import BrokenProcessPool
from dataclasses import dataclass, replace
from multiprocessing import get_context
from pathlib import Path

import torch

from experiments.cells import CellSettings
from experiments.group import Group
from experiments.lending import grids_of
from experiments.preparing import prepare
from experiments.settings import Settings
from leakbed.api import Progress
from leakbed.cards import Card
from leakbed.flower_internals import task_identity

_FLOWER = "flwr"


class JobGoneError(RuntimeError):
    """A process ended before its work did."""


@dataclass(frozen=True, kw_only=True)
class Task:
    """The cells of one training run, as another process is told of them.

    Attributes:
        settings: Of the experiment.
        cells: By the keys of their cards.
        folder: For results.
        source: Hash of the code.
        root: Folder of downloaded data sets.
        done: Cards that are there already, by their keys.
    """

    settings: Settings
    cells: Mapping[str, CellSettings]
    folder: Path
    source: str
    root: str | None
    done: Mapping[str, Card]

    @property
    def is_done(self) -> bool:
        """Whether every cell has its card."""
        return self.cells.keys() <= self.done.keys()

    @property
    def own(self) -> dict[str, Card]:
        """The cards of these cells that are there."""
        return {key: self.done[key] for key in self.cells if key in self.done}


def side_by_side(tasks: Sequence[Task], *, progress: Progress | None) -> dict[str, Card]:
    """Share tasks among processes.

    The first error ends it: what nobody took is dropped, what is under way is waited for.

    Args:
        tasks: Of one experiment.
        progress: Told of each cell, once all of its task are done.

    Returns:
        The cards of all cells, by their keys.
    """
    settings = tasks[0].settings
    cards: dict[str, Card] = {}
    for task, own in _finished(tasks, jobs=settings.jobs):
        cards |= own
        if progress is not None:
            for cell in task.cells.values():
                progress.advance(cell.label)
    if not settings.keep_runs:  # not sooner: runs of honest nodes serve several tasks
        shutil.rmtree(tasks[0].folder / "runs", ignore_errors=True)
    return cards


def _finished(tasks: Sequence[Task], *, jobs: int) -> Iterator[tuple[Task, dict[str, Card]]]:
    """Yield tasks with their cards, as they are done."""
    yield from ((task, task.own) for task in tasks if task.is_done)
    lacking = [replace(task, done=task.own) for task in tasks if not task.is_done]
    if not lacking:
        return
    level = logging.getLogger(_FLOWER).level
    pool = ProcessPoolExecutor(
        min(jobs, len(lacking)),
        mp_context=get_context("spawn"),
        initializer=_begin,
        initargs=(level,),
    )
    try:
        taken = {pool.submit(cards_of, task): task for task in lacking}
        for future in as_completed(taken):
            yield taken[future], future.result()
    except BrokenProcessPool as error:
        raise JobGoneError(
            f"one of {jobs} processes was killed, perhaps for want of memory; finished cells stay, "
            f"and the same command with -o jobs=1 goes on"
        ) from error
    finally:
        pool.shutdown(cancel_futures=True)


def _begin(level: int) -> None:
    """Make a fresh process compute on one thread, and log of Flower what its parent does."""
    torch.set_num_threads(1)
    logging.getLogger(_FLOWER).setLevel(level)


def cards_of(task: Task) -> dict[str, Card]:
    """Train and attack, in whatever process this is called.

    Args:
        task: What to do.

    Returns:
        The cards of its cells, by their keys.
    """
    (first, *_) = task.cells.values()
    group = Group(
        prepare(first.training, root=task.root),
        folder=task.folder,
        source=task.source,
        grids=grids_of(task.settings),
        progress=None,
    )
    with task_identity():
        return {card.key: card for card in group.cards(task.cells, task.done)}
