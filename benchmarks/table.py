"""Lines that benchmarks printed, kept with the day and the machine, as a table of docs/speed.md.

``python -m benchmarks.table show LINES`` prints the table of a file of JSON lines; ``save LINES``
puts them into ``benchmarks/measured.jsonl`` in place of older ones of the same name, with the day
and the machine's cores; ``write docs/speed.md`` writes the table of what is saved between its
markers. ``make bench`` does the first, ``make readme`` the last; a test asserts that docs/speed.md
is current.
"""

import json
import os
import sys
from collections.abc import Iterable, Mapping, Sequence
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

SAVED = Path(__file__).with_name("measured.jsonl")
BEGIN = "<!-- benchmarks: written by `make readme` from benchmarks/measured.jsonl -->"
END = "<!-- end of benchmarks -->"
KEYS = ("name", "ours", "other", "ratio", "unit", "runs")

Line = Mapping[str, Any]


class BadLineError(ValueError):
    """A line that no benchmark of ours prints."""


class MissingMarkersError(ValueError):
    """A text that does not say where the table belongs."""


def read(path: Path) -> list[Line]:
    """Return the lines of a file.

    Args:
        path: Of JSON lines.

    Returns:
        One mapping for each.

    Raises:
        BadLineError: A line is not JSON, or lacks a key.
    """
    found: list[Line] = []
    for number, text in enumerate(path.read_text().splitlines(), start=1):
        try:
            parsed = json.loads(text)
        except json.JSONDecodeError as error:
            raise BadLineError(f"{path}, line {number} is not JSON: {text[:80]!r}") from error
        if missing := [key for key in KEYS if key not in parsed]:
            raise BadLineError(f"{path}, line {number} lacks {', '.join(missing)}: {text[:80]!r}")
        found.append(parsed)
    return found


def table(lines: Iterable[Line]) -> str:
    """Return a table, one row per line, and below it when and where each was measured.

    Args:
        lines: As printed, or as saved.

    Returns:
        Markdown.
    """
    kept = list(lines)
    head = ("measured", "ours", "other", "ratio", "unit", "runs")
    rows = [tuple(_said(line[key]) for key in KEYS) for line in kept]
    text = ["| " + " | ".join(cells) + " |" for cells in (head, ("---",) * len(head), *rows)]
    places = sorted({f"{line['date']}, {line['machine']}" for line in kept if "date" in line})
    if places:
        text += ["", f"Measured {'; '.join(places)}."]
    return "\n".join(text)


def saved(old: Sequence[Line], new: Sequence[Line], *, date: str, machine: str) -> list[Line]:
    """Return saved lines with fresh ones among them.

    Args:
        old: As saved before.
        new: As printed.
        date: Of the new ones.
        machine: In words that name no host.

    Returns:
        The old ones in their order, each replaced by a new one of its name; the rest of the new.
    """
    fresh = {line["name"]: {**line, "date": date, "machine": machine} for line in new}
    return [fresh.pop(line["name"], line) for line in old] + list(fresh.values())


def current(text: str, lines: Iterable[Line]) -> str:
    """Return a text with the table between its markers written again.

    Args:
        text: Holds ``BEGIN`` and ``END`` once each, in this order.
        lines: As saved.

    Returns:
        The same text with that table.

    Raises:
        MissingMarkersError: The markers are not there.
    """
    before, begin, rest = text.partition(BEGIN)
    _, end, after = rest.partition(END)
    if not begin or not end:
        raise MissingMarkersError(f"no table can be written without the lines {BEGIN} and {END}")
    return f"{before}{BEGIN}\n\n{table(lines)}\n\n{END}{after}"


def _said(value: object) -> str:
    text = f"{value:,}" if isinstance(value, int) else str(value)
    return text.replace("|", "\\|")


def main(arguments: Sequence[str]) -> None:
    """Show, save or write.

    Args:
        arguments: Which of them, and its file.

    Raises:
        SystemExit: If they are something else.
    """
    match arguments:
        case ["show", path]:
            print(table(read(Path(path))))
        case ["save", path]:
            old = read(SAVED) if SAVED.exists() else []
            date, machine = f"{datetime.now(UTC):%Y-%m-%d}", f"{os.cpu_count()} cores"
            lines = saved(old, read(Path(path)), date=date, machine=machine)
            SAVED.write_text("".join(f"{json.dumps(line)}\n" for line in lines))
        case ["write", path]:
            page = Path(path)
            page.write_text(current(page.read_text(), read(SAVED)))
        case _:
            raise SystemExit("python -m benchmarks.table show LINES | save LINES | write PAGE")


if __name__ == "__main__":
    main(sys.argv[1:])
