"""Runs an experiment: every cell once, resumable, one card each.

``DIR/cards/<key>.json`` are the results, ``DIR/runs/<key>/`` the training runs they share,
``DIR/guesses/`` and ``DIR/truths/`` the reconstructions and what they should be.
"""

import os
from collections.abc import Mapping, Sequence
from itertools import groupby
from pathlib import Path
from typing import Any

import torch

from experiments.attacking import make_attack
from experiments.cells import cells
from experiments.group import Group
from experiments.jobs import Task, side_by_side
from experiments.last_run import note_last_run
from experiments.lending import Grids, grids_of
from experiments.preparing import make_defenses, prepare
from experiments.settings import Settings
from experiments.settings_file import load_settings
from experiments.settling import settled
from leakbed.api import Progress
from leakbed.cards import Card, read_cards, source_hash
from leakbed.flower_internals import task_identity


def run(
    settings: Settings | Mapping[str, Any] | str | Path,
    *,
    out: Path | None = None,
    overrides: Sequence[str] = (),
    progress: Progress | None = None,
    grids: Grids | None = None,
    root: str | None = None,
) -> list[Card]:
    """Run every cell of an experiment that has no card yet.

    Args:
        settings: A settings file, or what it would hold.
        out: Where cards, runs and guesses go; ``runs/<name>`` if None.
        overrides: ``key=value`` pairs that replace settings.
        progress: Told how far the run is.
        grids: Where nodes are; by default the grid the settings name.
        root: Folder of downloaded data sets; by default the environment's ``LEAKBED_DATA``.

    Returns:
        The cards of all cells, old and new, in cell order.
    """
    torch.set_num_threads(1)  # same bits everywhere, and small models are faster so
    checked = load_settings(settings, overrides)
    folder = Path("runs") / checked.name if out is None else Path(out)
    wanted = [settled(cell) for cell in cells(checked)]
    for cell in wanted:
        make_attack(cell.attack)  # bad values are refused before anything is trained
        make_defenses(cell.training)
    root = root or os.environ.get("LEAKBED_DATA")
    root = str(Path(root).absolute()) if root else None  # workers may start elsewhere
    groups = [list(group) for _, group in groupby(wanted, key=lambda cell: cell.training)]
    prepared = [prepare(group[0].training, root=root) for group in groups]
    source = source_hash()
    done = {card.key: card for card in read_cards(folder)} if (folder / "cards").is_dir() else {}
    lent = grids or grids_of(checked)
    trainings = [
        Group(each, folder=folder, source=source, grids=lent, progress=progress)
        for each in prepared
    ]
    keyed = [group.keyed(own) for group, own in zip(trainings, groups, strict=True)]
    note_last_run(folder, checked.name, [key for keys in keyed for key in keys])
    if progress is not None:
        progress.start(sum(map(len, keyed)))
    if checked.jobs > 1 and grids is None and checked.grid == "local":
        tasks = [
            Task(settings=checked, cells=keys, folder=folder, source=source, root=root, done=done)
            for keys in keyed
        ]
        made = side_by_side(tasks, progress=progress)
        return [made[key] for keys in keyed for key in keys]
    found: list[Card] = []
    with task_identity():
        for group, keys in zip(trainings, keyed, strict=True):
            found += group.cards(keys, done)
            if not checked.keep_runs:
                group.tidy()
    return found
