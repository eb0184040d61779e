"""What a trace holds, for whoever was given one: its app, rounds, nodes, kinds, bytes, gaps."""

from collections import Counter
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from leakbed.tap.trace import Trace
from leakbed.tap.trace_index import HOLDING, Record

_MASKED = "secaggplus"  # how the keys of Flower's secure aggregation begin, both ways
_SHOWN = 5


@dataclass(frozen=True, kw_only=True)
class Summary:
    """What a trace holds.

    Attributes:
        folder: Where it lies.
        tapped: Which app and run it is of, and under which versions; empty where nobody said so.
        about: The keys of what is said of the run.
        incomplete: Why there may have been more to record; None of a closed trace.
        rounds: Their numbers; 0 stands for messages that name none.
        nodes: Partition ids, or Flower's ids of nodes.
        kinds: Records by kind.
        bytes: Of all files that hold arrays, equal ones counted once.
        skipped: What could not be kept, and of which record.
        masked: Whether nodes sent masked vectors (Flower's SecAgg+): a single node's says nothing
            to the server, and only the sum of all can be attacked.
    """

    folder: str
    tapped: Mapping[str, Any]
    about: tuple[str, ...]
    incomplete: str | None
    rounds: tuple[int, ...]
    nodes: tuple[int, ...]
    kinds: Mapping[str, int]
    bytes: int
    skipped: tuple[str, ...]
    masked: bool

    def lines(self) -> list[str]:
        """Return it as text."""
        told = ", ".join(f"{key} {value}" for key, value in self.tapped.items())
        kinds = ", ".join(f"{number} {kind}" for kind, number in sorted(self.kinds.items()))
        lines = [
            f"{self.folder}: {told or 'recorded without the name of an app'}",
            f"rounds: {_listed(self.rounds)}",
            f"nodes: {_listed(self.nodes)}",
            f"records: {kinds or 'none'}",
            f"arrays: {self.bytes} bytes",
            f"says of its run: {', '.join(self.about) or 'nothing; who attacks it must say it'}",
        ]
        if self.masked:
            lines.append(
                "secure aggregation (SecAgg+): what a single node sent is masked and cannot be "
                "attacked; only the sum of all nodes can"
            )
        lines += [f"not kept: {each}" for each in self.skipped]
        if self.incomplete is not None:
            lines.append(f"incomplete: {self.incomplete}")
        return [_printable(line) for line in lines]


def summary(trace: Trace) -> Summary:
    """Return what a trace holds, read from its index.

    Args:
        trace: Opened, in part or whole.

    Returns:
        All that can be said without a look at the arrays themselves.
    """
    events = [record for record in trace.records if record.kind != HOLDING]
    distinct = {extent for record in trace.records for extent in record.arrays.values()}
    return Summary(
        folder=str(trace.folder),
        tapped=trace.tapped,
        about=tuple(key for key, value in trace.about.items() if value is not None),
        incomplete=trace.incomplete,
        rounds=tuple(sorted({int(record.fields["round"]) for record in events})),
        nodes=tuple(sorted({int(record.fields["node"]) for record in events})),
        kinds=dict(Counter(record.kind for record in trace.records)),
        bytes=sum(extent.size for extent in distinct),
        skipped=tuple(_gaps(events)),
        masked=any(
            key.startswith(_MASKED) for record in events for key in record.fields.get("values", {})
        ),
    )


def _gaps(events: list[Record]) -> list[str]:
    """Return what could not be kept, each with how often it was met."""
    found: Counter[str] = Counter()
    for record in events:
        said = record.fields.get("skipped") or (
            f"{record.fields['size']} bytes of arrays" if record.fields.get("size") else None
        )
        if said:
            found[f"{said} ({record.kind})"] += 1
    return [f"{said}, {times} times" for said, times in found.most_common()]


def _printable(line: str) -> str:
    """Return a line whose names, which are a stranger's, cannot command a terminal."""
    return "".join(each if each.isprintable() else "?" for each in line)


def _listed(numbers: tuple[int, ...]) -> str:
    shown = ", ".join(map(str, numbers[:_SHOWN]))
    more = len(numbers) - _SHOWN
    return f"{shown or 'none'}{f' and {more} more' if more > 0 else ''}"
