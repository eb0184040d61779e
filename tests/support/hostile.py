"""Whatever a hostile client may put into a message, for hypothesis to draw from."""

import pickle
from typing import Any

import pytest
from flwr.app import Array as WireArray
from flwr.app import ArrayRecord, ConfigRecord, MetricRecord
from hypothesis import HealthCheck, settings
from hypothesis import strategies as st

from leakbed.wire.records import ROUND, pack
from tests.support import tiny

NAMES = ["smashed", "labels", "rows", "gradient", "features", "0.weight"]
FINE = pack({"a": tiny.images()[0][:2].numpy()})["a"].data


class Bomb:
    """Unpickling it would be noticed."""

    def __reduce__(self) -> tuple[Any, ...]:
        return pytest.fail, ("a received message was unpickled",)


def damaged() -> st.SearchStrategy[bytes]:
    """An array's bytes with some of them changed, cut off or appended."""
    change = st.tuples(st.integers(0, len(FINE) - 1), st.integers(0, 255))

    def apply(changes: list[tuple[int, int]], length: int, more: bytes) -> bytes:
        data = bytearray(FINE)
        for place, value in changes:
            data[place] = value
        return bytes(data[:length]) + more

    lengths = st.integers(0, len(FINE)) | st.just(len(FINE))
    return st.builds(apply, st.lists(change, max_size=4), lengths, st.binary(max_size=8))


HEADERS = st.sampled_from(
    [
        b"{'descr': '|O', 'fortran_order': False, 'shape': (1,), }",
        b"{'descr': '<f4', 'fortran_order': False, 'shape': (-1,), }",
        b"{'descr': '<f4', 'fortran_order': False, 'shape': (99999999999,), }",
        b"{'descr': [('a', '<f4')], 'fortran_order': False, 'shape': (1,), }",
        b"{'descr': '<f4', 'fortran_order': False, 'shape': 3, }",
        b"__import__('os').system('true')",
        b"(" * 5000,
    ]
).map(lambda header: b"\x93NUMPY\x01\x00" + len(header).to_bytes(2, "little") + header)
DATA = st.one_of(
    st.just(FINE),
    damaged(),
    st.binary(max_size=64),
    st.just(pickle.dumps(Bomb())),
    st.tuples(HEADERS, st.just(pickle.dumps(Bomb()))).map(b"".join),
)
SHAPES = st.lists(st.integers(-2, 2**40), max_size=3).map(tuple)
ARRAYS = st.builds(
    WireArray,
    st.sampled_from(["float32", "object", ""]),
    SHAPES,
    st.sampled_from(["numpy.ndarray", "numpy.ndarray", "pickle", ""]),
    DATA,
)
NUMBERS = st.integers(-(2**62), 2**62) | st.floats()
CONFIGS = st.dictionaries(
    st.sampled_from([ROUND, "step", "start", "stop", "by"]), NUMBERS | st.text(max_size=3)
).map(ConfigRecord)
COUNTS = st.dictionaries(
    st.sampled_from(["steps", "step", "num-examples", "correct", "d.alarm", "d.score"]),
    NUMBERS | st.lists(st.integers(0, 9), max_size=2),
).map(MetricRecord)
ARRAY_RECORDS = st.dictionaries(st.sampled_from(NAMES), ARRAYS, min_size=1, max_size=3)
ANY = st.one_of(CONFIGS, COUNTS, ARRAY_RECORDS.map(ArrayRecord))


def fuzz(examples: int) -> settings:
    """The same examples in every run, on a machine however slow.

    Args:
        examples: How many; more, and drawn anew, are for a campaign by hand.
    """
    return settings(
        max_examples=examples,
        derandomize=True,
        deadline=None,
        database=None,
        suppress_health_check=list(HealthCheck),
    )
