"""Processes that share an experiment: each takes the next training run that nobody has taken.

They are started afresh, as CUDA needs, and compute on one thread each, so that the numbers are
those of one process that does everything in turn.
"""

import logging
import os
from collections.abc import Iterator, Mapping, Sequence
from concurrent.futures import FIRST_COMPLETED, Future, ProcessPoolExecutor, wait
from concurrent.futures.process import BrokenProcessPool
from dataclasses import dataclass, replace
from itertools import islice
from multiprocessing import get_context, parent_process
from pathlib import Path
from threading import Thread

import torch

from experiments.cells import CellSettings
from experiments.group import Group
from experiments.lending import grids_of
from experiments.preparing import prepare
from experiments.settings import Settings
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
            under_way[pool.submit(cards_of, replace(task, done=task.own))] = place

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
    torch.set_num_threads(1)
    logging.getLogger(_FLOWER).setLevel(level)
    Thread(target=_end_with_parent, daemon=True).start()


def _end_with_parent() -> None:
    """End this process once the one that started it is gone: nobody would read its work."""
    parent = parent_process()
    if parent is not None:
        parent.join()
        os._exit(1)


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
