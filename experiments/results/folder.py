"""A results folder: made, locked while a run writes there, and which cards are its last run's."""

import fcntl
import json
import os
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path

from experiments.results.cards import Card
from leakbed.errors import naming_folder

LOCK = ".lock"
"""The file of a results folder that a run holds locked; made anew, so dated, by each run."""

_NOTE = "last-run.json"


class ReportError(ValueError):
    """There is nothing to report in a folder, or its last run cannot be told; says what to do."""


class ResultsFolderError(ValueError):
    """Results cannot be written where they should go."""


def default_folder(name: str) -> Path:
    """Return where an experiment's results go unless told otherwise: ``runs/<name>``."""
    return Path("runs") / name


def make_folder(folder: Path) -> Path:
    """Make a results folder, or refuse it before anything has run.

    Args:
        folder: Where results should go.

    Returns:
        The same folder, which exists.

    Raises:
        ResultsFolderError: It cannot be made or written.
    """
    try:
        folder.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise ResultsFolderError(
            f"results cannot go to {folder}: {error.strerror}; name another folder"
        ) from error
    if not os.access(folder, os.W_OK):
        raise ResultsFolderError(f"results cannot go to {folder}: it is not writable by you")
    return folder


@contextmanager
def lock_folder(folder: Path) -> Iterator[None]:
    """Keep other runs out of a results folder; the lock ends with the process, however that ends.

    Args:
        folder: Exists and is writable.

    Yields:
        Nothing.

    Raises:
        ResultsFolderError: Another run is writing there.
    """
    with (folder / LOCK).open("w") as lock:
        try:
            fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            raise ResultsFolderError(
                f"another run is writing to {folder}; wait until it ends, or name another folder"
            ) from None
        yield


def note_last_run(folder: Path, name: str, keys: Sequence[str], *, left_out: int = 0) -> None:
    """Write down which of the folder's cards belong together, whole or not at all.

    Args:
        folder: The results folder; made where it is missing.
        name: The run's.
        keys: Of its cards.
        left_out: How many cells it left out because their parts cannot fit.
    """
    folder.mkdir(parents=True, exist_ok=True)
    partial = folder / f"last-run.{os.getpid()}.partial"
    with naming_folder(folder):
        partial.write_text(json.dumps({"name": name, "keys": list(keys), "left_out": left_out}))
    partial.replace(folder / _NOTE)


def last_run(folder: Path, cards: Sequence[Card]) -> tuple[str, list[Card]]:
    """Return the name and the cards of a folder's last run.

    Args:
        folder: The results folder.
        cards: All that it holds.

    Returns:
        The folder's own name and all of its cards where no run is noted.

    Raises:
        ReportError: The note cannot be read, or none of its cards is there.
    """
    note = folder / _NOTE
    if not note.is_file():
        return folder.resolve().name, list(cards)
    try:
        noted = json.loads(note.read_text(encoding="utf-8"))
        name, keys = str(noted["name"]), {str(key) for key in noted["keys"]}
    except (ValueError, LookupError, TypeError) as error:
        raise ReportError(
            f"{note} does not tell the last run ({error}); delete it to report every card"
        ) from error
    found = [card for card in cards if card.key in keys]
    if not found:
        raise ReportError(
            f"none of the last run's {len(keys)} results is in {folder}: repeat the run, or delete "
            f"{note.name} to report the {len(cards)} cards that are there"
        )
    return name, found


def left_out(folder: Path) -> int:
    """Return how many cells a folder's last run left out because their parts cannot fit.

    Args:
        folder: The results folder, whose note :func:`last_run` has read.

    Returns:
        The count; 0 where no run is noted, or one of an earlier version, which left out none.
    """
    note = folder / _NOTE
    return (
        int(json.loads(note.read_text(encoding="utf-8")).get("left_out", 0))
        if note.is_file()
        else 0
    )
