"""Score the kept guesses of a results folder again, with the oracle as it is now.

Nothing is trained and nothing is attacked: training runs and answers are those that the last run
left, and count only as far as the code that made them is the code that is here.
"""

import os
from dataclasses import dataclass
from pathlib import Path

from experiments.results.cards import Card, read_cards, write_card
from experiments.results.folder import (
    ResultsFolderError,
    lock_folder,
    noted_keys,
    noted_settings,
)
from experiments.run.executor import Progress
from experiments.run.runner import finished, planned
from experiments.settings.load import load_settings
from leakbed.tensors import configure_torch


@dataclass(frozen=True, kw_only=True)
class Rescored:
    """What scoring again came to.

    Attributes:
        cards: Of the folder's last run, those that stand as they were among them.
        changed: How many of them are new.
        lacking: Why cells could not be scored from what is kept, by what a user calls the cell.
    """

    cards: list[Card]
    changed: int
    lacking: dict[str, str]


def rescore(folder: Path, *, progress: Progress | None = None, root: str | None = None) -> Rescored:
    """Score the kept guesses of a folder's last run again.

    A cell whose guess or training run is not there, or of other code, keeps the card it has.

    Args:
        folder: The results folder.
        progress: Told how far it is.
        root: Folder of downloaded data sets; by default the environment's ``LEAKBED_DATA``.

    Returns:
        The cards, and what is lacking.

    Raises:
        ResultsFolderError: The folder's last run cannot be told, or has other cells by now.
    """
    configure_torch()
    checked = load_settings(noted_settings(folder))
    root = root or os.environ.get("LEAKBED_DATA")
    with lock_folder(folder):
        done, before = finished(folder), noted_keys(folder)
        plan = planned(checked, folder=folder, root=root, progress=progress, rescores=True)
        if len(plan.cells) != len(before):
            raise ResultsFolderError(
                f"the last run in {folder} had {len(before)} results, and its settings now make "
                f"{len(plan.cells)}; repeat `leakbed run` with --out {folder}"
            )
        if progress is not None:
            progress.start(len(before), left_out=plan.left_out)
        found: dict[str, Card] = {}
        for group, keys in zip(plan.trainings, plan.keyed, strict=True):
            for card in group.cards(keys, done):
                found[card.key] = card
                if card.key not in done:
                    write_card(card, folder)
                if progress is not None:
                    progress.advance(keys[card.key].settings.label)
        stay = [key if key in found else old for key, old in zip(plan.cells, before, strict=True)]
        plan.note(folder, checked, stay)
        every = {card.key: card for card in read_cards(folder)}
    lacking = {key: why for group in plan.trainings for key, why in group.lacking.items()}
    return Rescored(
        cards=[every[key] for key in stay if key in every],
        changed=len(found.keys() - done.keys()),
        lacking={plan.cells[key].settings.label: why for key, why in lacking.items()},
    )
