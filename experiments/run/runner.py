"""Runs an experiment: every cell once, resumable, one card each.

A case is crossed with every attack and defence that is tried everywhere. Of what that gives, the
cells whose parts cannot fit are left out and counted; those that a case asks for by name are cards
that say why.

``DIR/cards/<key>.json`` are the results, ``DIR/runs/<key>/`` the training runs they share,
``DIR/guesses/`` and ``DIR/truths/`` the reconstructions and what they should be.

With ``jobs`` or ``ray_address`` the training runs are shared out, by
:mod:`experiments.run.sweep`, which alone of the two imports Ray. The numbers are those of one
process that does everything in turn.
"""

import os
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from itertools import groupby
from pathlib import Path
from typing import Any

from experiments.results.cards import Card, read_cards, source_hash, write_card
from experiments.results.folder import (
    default_folder,
    lock_folder,
    make_folder,
    note_last_run,
    noted_keys,
    remove_orphans,
)
from experiments.run.attack import Cell
from experiments.run.executor import Progress, RunCleanup, TrainingGroup
from experiments.run.fit import fitting
from experiments.run.prepare import prepare
from experiments.run.train import Grids, grids_of
from experiments.settings.cells import cells
from experiments.settings.load import load_settings
from experiments.settings.objects import refuse_elsewhere
from experiments.settings.schema import Settings
from leakbed.flower_internals import task_identity
from leakbed.tensors import configure_torch


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
    refuse_elsewhere(checked)
    folder = make_folder(default_folder(checked.name) if out is None else Path(out))
    root = root or os.environ.get("LEAKBED_DATA")
    root = str(Path(root).absolute()) if root else None  # workers may start elsewhere
    with lock_folder(folder):
        done = finished(folder)
        plan = planned(checked, folder=folder, grids=grids, progress=progress, root=root)
        plan.begin(folder, checked, done, progress)

        def keep(card: Card) -> None:
            """Write a card that is new, and say that its cell is done."""
            if card.key not in done:
                write_card(card, folder)
                done[card.key] = card
            if progress is not None:
                progress.advance(plan.cells[card.key].settings.label)

        cleanup = RunCleanup(plan.trainings, keep=checked.keep_runs)
        shared = plan.lacking(done) if grids is None else set()
        shared = shared if _is_shared(checked, len(shared)) else set()
        with task_identity():
            for place, (group, keyed) in enumerate(zip(plan.trainings, plan.keyed, strict=True)):
                if place not in shared:
                    for card in group.cards(keyed, done):
                        keep(card)
                    cleanup.after(group)
        if shared:
            from experiments.run import sweep  # noqa: PLC0415  Ray takes seconds to import

            sweep.share(
                sweep.Sweep(
                    settings=checked, folder=folder.absolute(), source=source_hash(), root=root
                ),
                {
                    place: (plan.keyed[place], plan.trainings[place].ran_on)
                    for place in sorted(shared)
                },
                done=dict(done),
                keep=keep,
                tidy=lambda place: cleanup.after(plan.trainings[place]),
                note=None if progress is None else progress.note,
            )
        return [done[key] for key in plan.cells]


@dataclass(frozen=True, kw_only=True)
class Plan:
    """The cells of an experiment, by the training runs they share.

    Attributes:
        trainings: One for each run.
        keyed: Its cells by the keys of their cards.
        left_out: How many cells are left out, as their parts cannot fit.
    """

    trainings: list[TrainingGroup]
    keyed: list[dict[str, Cell]]
    left_out: int

    @cached_property
    def cells(self) -> dict[str, Cell]:
        """All of them, in order."""
        return {key: cell for keys in self.keyed for key, cell in keys.items()}

    def lacking(self, done: Mapping[str, Card]) -> set[int]:
        """Return which training runs have a cell without a card."""
        return {place for place, keys in enumerate(self.keyed) if not keys.keys() <= done.keys()}

    def begin(
        self, folder: Path, checked: Settings, done: Mapping[str, Card], progress: Progress | None
    ) -> None:
        """Note what is run; say how much it is, and how much of the last run is no part of it."""
        gone = sum(key in done and key not in self.cells for key in noted_keys(folder))
        self.note(folder, checked, list(self.cells))
        if progress is None:
            return
        progress.start(len(self.cells), left_out=self.left_out)
        if gone:
            progress.note(
                f"{gone} results of the last run here are of other settings, data or code, or were "
                "named by an earlier version; they stay in cards/ and are no part of this run"
            )

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
    asked = [Cell.of(cell) for cell in cells(checked)]
    wanted = fitting(asked)
    groups = [list(group) for _, group in groupby(wanted, key=lambda cell: cell.settings.training)]
    trainings = [
        TrainingGroup(
            prepare(group[0].settings.training, root=root),
            folder=folder,
            grids=grids or grids_of(checked),
            progress=progress,
            on_error=checked.on_error,
            rescores=rescores,
        )
        for group in groups
    ]
    keyed = [group.keyed(own) for group, own in zip(trainings, groups, strict=True)]
    return Plan(trainings=trainings, keyed=keyed, left_out=len(asked) - len(wanted))


def _is_shared(checked: Settings, lacking: int) -> bool:
    """Say whether training runs that lack cards are shared out; one alone is not, on this machine.

    Nodes on Ray's workers are not: their tasks would wait, each with a CPU of its own, for workers
    that wait for those CPUs.
    """
    if checked.grid != "local" or not lacking:
        return False
    return checked.ray_address is not None or min(checked.jobs, lacking) > 1


def finished(folder: Path) -> dict[str, Card]:
    """Return the cards that stand, by their keys; what failed is to be tried again.

    A guess whose card was deleted goes with it, so that its cell is attacked anew.
    """
    cards = read_cards(folder) if (folder / "cards").is_dir() else []
    remove_orphans(folder, cards)
    return {card.key: card for card in cards if card.status != "failed"}
