import gc
import os
import stat
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest

from leakbed.grids.ray import shelf as shelves
from leakbed.grids.ray.shelf import Shelf, make_shelf, remove_shelf, take
from leakbed.wire.records import Buffer

BUFFERS: list[Buffer] = [b"a" * 100, b"", memoryview(b"b" * 7), b"c" * 5000]
SIZES = [len(buffer) for buffer in BUFFERS]


@pytest.fixture
def folder() -> Iterator[Path]:
    made = make_shelf()
    assert made is not None
    yield Path(made)
    remove_shelf(made)


def left(folder: Path) -> str:
    path = Shelf(str(folder)).leave(BUFFERS)
    assert path is not None
    return path


def test_what_is_left_can_be_taken_once_and_is_off_the_shelf(folder: Path) -> None:
    path = left(folder)
    assert [Path(path)] == list(folder.iterdir())
    assert [bytes(view) for view in take(path, SIZES)] == [bytes(b) for b in BUFFERS]
    assert list(folder.iterdir()) == []
    with pytest.raises(FileNotFoundError):
        take(path, SIZES)


def test_what_lies_on_a_shelf_that_keeps_can_be_taken_many_times(folder: Path) -> None:
    path = Shelf(str(folder), keeps=True).leave(BUFFERS)
    assert path is not None
    for _ in range(2):
        assert [bytes(view) for view in take(path, SIZES)] == [bytes(b) for b in BUFFERS]
    assert [Path(path)] == list(folder.iterdir())


def test_buffers_lie_where_arrays_want_them(folder: Path) -> None:
    views = take(left(folder), SIZES)
    places = [np.frombuffer(view, np.uint8).ctypes.data for view in views if view.nbytes]
    assert [place % 64 for place in places] == [0, 0, 0]


def test_views_are_read_only_and_outlive_file_and_folder(folder: Path) -> None:
    views = take(left(folder), SIZES)
    kept = views[3]
    del views
    remove_shelf(str(folder))
    gc.collect()
    assert not folder.exists()
    assert bytes(kept) == b"c" * 5000
    assert kept.readonly
    with pytest.raises(TypeError, match="read-only"):
        kept[0] = 1


def test_two_things_left_never_meet(folder: Path) -> None:
    first, second = left(folder), left(folder)
    assert first != second


def test_a_full_device_leaves_nothing_behind(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    class Full:
        """A file on a device that takes a part of what is written."""

        def __init__(self, path: str, mode: str) -> None:
            Path(path).touch()

        def __enter__(self) -> "Full":
            return self

        def __exit__(self, *_: object) -> None:
            raise OSError(28, "No space left on device")

        def write(self, data: bytes) -> int:
            return len(data)

    monkeypatch.setattr(shelves, "open", Full, raising=False)
    assert Shelf(str(folder)).leave(BUFFERS) is None
    assert list(folder.iterdir()) == []


def test_a_shelf_that_was_taken_down_has_no_room(folder: Path) -> None:
    remove_shelf(str(folder))
    assert Shelf(str(folder)).leave(BUFFERS) is None
    remove_shelf(str(folder))  # the second time, nothing happens
    remove_shelf(None)


def test_only_its_owner_can_enter(folder: Path) -> None:
    assert stat.S_IMODE(folder.stat().st_mode) == 0o700
    assert folder.stat().st_uid == os.getuid()


def test_without_folders_in_memory_there_is_no_shelf(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(shelves, "_MEMORY", tmp_path / "nowhere")
    assert make_shelf() is None


def test_a_shelf_ends_with_its_process() -> None:
    code = (
        "from leakbed.grids.ray.shelf import *; f = make_shelf(); Shelf(f).leave([b'x']); print(f)"
    )
    run = subprocess.run([sys.executable, "-c", code], check=True, capture_output=True, text=True)  # noqa: S603
    folder = Path(run.stdout.strip())
    assert folder.name.startswith("leakbed-")
    assert not folder.exists()
