"""A results folder: made, locked while a run writes there, and which cards are its last run's."""

import fcntl
import json
import os
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from experiments.results.cards import Card, written_whole

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


def write_private(path: Path, content: bytes) -> None:
    """Write a file for its owner alone, whole or not at all.

    Args:
        path: Where; its folder is made if absent.
        content: Of the file.
    """
    path.parent.mkdir(mode=0o700, parents=True, exist_ok=True)
    with written_whole(path) as partial:
        partial.touch(mode=0o600)
        partial.write_bytes(content)


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


def note_last_run(
    folder: Path,
    name: str,
    keys: Sequence[str],
    *,
    left_out: int = 0,
    settings: Mapping[str, Any] | None = None,
) -> None:
    """Write down which of the folder's cards belong together, whole or not at all.

    Args:
        folder: The results folder; made where it is missing.
        name: The run's.
        keys: Of its cards.
        left_out: How many cells it left out because their parts cannot fit.
        settings: What was run, as JSON values, so that it can be scored again.
    """
    folder.mkdir(parents=True, exist_ok=True)
    told = {"name": name, "keys": list(keys), "left_out": left_out, "settings": settings}
    with written_whole(folder / _NOTE) as partial:
        partial.write_text(json.dumps(told))


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


def noted_keys(folder: Path) -> list[str]:
    """Return the keys of a folder's last run in the order of its cells; none without a note.

    Args:
        folder: The results folder.

    Returns:
        Keys of cards, which need not be there.
    """
    return [str(key) for key in _noted(folder).get("keys", ())]


def noted_settings(folder: Path) -> dict[str, Any]:
    """Return what a folder's last run ran.

    Args:
        folder: The results folder.

    Returns:
        The settings, as JSON has them.

    Raises:
        ResultsFolderError: No run is noted, or by a version that did not note its settings.
    """
    settings = _noted(folder).get("settings")
    if not isinstance(settings, dict):
        raise ResultsFolderError(
            f"{folder} does not say what was run there ({_NOTE}): it holds no results, or those of "
            "an earlier version, whose guesses cannot be scored again; repeat `leakbed run` with "
            f"--out {folder}: the cards and guesses that are there stay"
        )
    return settings


def _noted(folder: Path) -> dict[str, Any]:
    try:
        noted = json.loads((folder / _NOTE).read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return {}
    return noted if isinstance(noted, dict) else {}


def remove_orphans(folder: Path, cards: Sequence[Card]) -> None:
    """Remove the guesses and truths whose cards were deleted; what has a card stays."""
    named = {card.guess_key for card in cards}
    for part in ("guesses", "truths"):
        for file in (folder / part).glob("*.safetensors"):
            if file.stem not in named:
                file.unlink(missing_ok=True)


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
