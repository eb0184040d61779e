"""An index is read only if it is whole; what damage does to a trace is tested beside the trace."""

import hashlib
import json
from pathlib import Path
from typing import Any

import pytest

from leakbed.tap.trace_index import FORMAT, VERSION, TraceError, parse

HEADER: dict[str, Any] = {"format": FORMAT, "version": VERSION, "about": {}}
FIELDS: dict[str, Any] = {"node": 3, "round": 2, "message_type": "train", "reason": "late"}
RECORD: dict[str, Any] = {"number": 0, "kind": "failed", **FIELDS, "arrays": {}}


def index(*lines: dict[str, Any]) -> list[bytes]:
    """Return lines, each with the checksum of those before it."""
    written: list[bytes] = []
    for line in lines:
        chained = {**line, "before": hashlib.sha256(b"".join(written)).hexdigest()}
        written.append(json.dumps(chained).encode() + b"\n")
    return written


def test_a_closed_index_gives_its_header_and_records() -> None:
    header, (record,), why = parse(index(HEADER, RECORD, {"end": 1}), Path("trace"))
    assert (header["about"], why) == ({}, None)
    assert (record.kind, record.fields, record.arrays) == ("failed", FIELDS, {})
    assert str(record) == "record 0 (failed, node 3, round 2)"


@pytest.mark.parametrize(
    ("lines", "message"),
    [
        (index(HEADER, RECORD), "trace is truncated: record 1 should follow"),
        (index(HEADER), "trace is truncated: record 0 should follow"),
        (
            index(HEADER, RECORD, {"aborted": "OSError: full", "number": 1}),
            "trace was aborted after 1 records: OSError: full",
        ),
        (index(HEADER, {"aborted": "no", "number": 0}), "aborted after 0 records: no"),
        (index(HEADER, RECORD, {"end": 2}), "record 1 is missing"),
        (index({**HEADER, "format": "tar"}, {"end": 0}), "is format 'tar'"),
    ],
)
def test_others_are_refused(lines: list[bytes], message: str) -> None:
    with pytest.raises(TraceError, match=message):
        parse(lines, Path("trace"))
