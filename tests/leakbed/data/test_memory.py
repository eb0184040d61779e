import resource
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from leakbed.data import TooLargeError, memory
from leakbed.data.dataset import Decoded, finished

LIMITED = """
import resource
from leakbed.data import memory
before = memory.available()
taken = bytearray(2**28)
resource.setrlimit(resource.RLIMIT_AS, (2**33, resource.RLIM_INFINITY))
print(before, memory.available(), 2**33)
"""


def test_a_limit_on_the_process_counts_and_what_it_holds_is_taken_off() -> None:
    ended = subprocess.run(  # noqa: S603
        [sys.executable, "-c", LIMITED],
        cwd=Path(__file__).parents[3],
        check=True,
        capture_output=True,
        text=True,
    )
    before, limited, limit = map(int, ended.stdout.split())
    assert before > 0
    assert limited < limit - 2**28


def test_what_the_system_does_not_tell_limits_nothing(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    monkeypatch.setattr(memory, "_MACHINE", tmp_path / "meminfo")
    monkeypatch.setattr(memory, "_CGROUP", tmp_path)
    monkeypatch.setattr(resource, "getrlimit", lambda _: (resource.RLIM_INFINITY,) * 2)
    assert memory.available() is None
    memory.refuse_too_large("some", (10**9, 3, 1000, 1000), kept=None)
    (tmp_path / "memory.max").write_text("max\n")
    assert memory.available() is None
    (tmp_path / "memory.max").write_text("5000\n")
    (tmp_path / "memory.stat").write_text("anon 1200\nfile 3000\n")
    assert memory.available() == 3800


def test_bytes_copies_and_what_is_left_are_told(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(memory, "available", lambda: 10**10)
    with pytest.raises(TooLargeError) as raised:
        memory.refuse_too_large("photos", (80, 3, 2000, 3000), kept=None)
    assert str(raised.value) == (
        "photos: 80 images of 3 x 2000 x 3000 need about 18.7 GB of memory, and 10 GB are left; "
        "set data.image_size to make them smaller, or data.size to keep fewer"
    )
    memory.refuse_too_large("photos", (80, 3, 2000, 3000), kept=20)


def test_arrays_of_ones_own_are_refused_before_they_become_floats(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    images = torch.full((1,), 128, dtype=torch.uint8).expand(100, 3, 10, 10)
    decoded = Decoded(images=images, labels=torch.zeros(100, dtype=torch.int64), classes=("a",))
    monkeypatch.setattr(memory, "available", lambda: 100_000)
    with pytest.raises(TooLargeError, match="'own': 100 images of 3 x 10 x 10 need about"):
        finished("own", decoded)
    assert len(finished("own", decoded, size=10)) == 10
