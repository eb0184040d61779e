"""The scale benchmark counts memory and prints what it promises (a handful of nodes)."""

import subprocess
import sys
from contextlib import ExitStack
from typing import Any

import pytest
from flwr.app import Message

from benchmarks import scale
from benchmarks.scale import MEASURED, Scale, measured, memory
from clients import node_app
from leakbed.flower_internals import task_identity
from leakbed.grids import LocalGrid
from strategies import PROTOCOLS

HOLDS = (
    "import sys; held = bytearray(b'x') * (64 << 20); print('there', flush=True); sys.stdin.read()"
)

ANSWERS = "echo '{\"bytes\": 1000}'; while read _; do echo '{\"seconds\": 0.5}'; done"


def test_memory_counts_the_processes_that_were_started() -> None:
    before = memory()
    with subprocess.Popen(  # noqa: S603
        [sys.executable, "-c", HOLDS], stdin=subprocess.PIPE, stdout=subprocess.PIPE
    ) as child:
        assert child.stdout is not None
        child.stdout.readline()
        held = memory() - before
        child.communicate()
    assert 60 << 20 < held < 120 << 20


def test_a_node_must_keep_bottom_and_momenta() -> None:
    bottom = 4 * (scale.SIDE**2 * scale.HIDDEN + scale.HIDDEN)
    assert Scale(registered=100, protocol="fedavg").own_bytes == 0
    top = 4 * (scale.HIDDEN * 10 + 10)
    assert Scale(registered=100, protocol="splitfed-v1").own_bytes == 2 * bottom + top
    assert set(MEASURED) <= set(PROTOCOLS)


class Heard:
    """Two turns, and what was told in each."""

    def __init__(self) -> None:
        self.told: list[dict[str, Any]] = []

    def tell(self, **answer: Any) -> None:
        self.told.append(answer)

    def wait(self) -> bool:
        return len(self.told) < 3


@pytest.mark.parametrize("protocol", MEASURED)
def test_every_node_takes_part_before_the_memory_is_told(
    protocol: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("logging.Logger.handle", lambda *_: None)
    trained: set[int] = set()

    class Watched(LocalGrid):
        def _answer(self, message: Message, deadline: float | None) -> Message:
            if message.metadata.message_type.startswith("train"):
                trained.add(message.metadata.dst_node_id)
            return super()._answer(message, deadline)

    def told() -> int:
        assert trained == set(range(1, 7))
        trained.clear()
        return 5

    monkeypatch.setattr(scale, "memory", told)
    active_channels = Heard()
    with task_identity():
        few = Scale(registered=6, sampled=3, protocol=protocol)
        scale.serve(Watched(node_app, nodes=6), few, active_channels)  # type: ignore[arg-type]
    assert active_channels.told[0] == {"bytes": 5}
    assert [set(answer) for answer in active_channels.told[1:]] == [{"seconds"}] * 2
    assert 3 <= len(trained) <= 6  # three in each of two rounds


def test_groups_must_be_even() -> None:
    with pytest.raises(ValueError, match="multiple of 3"):
        Scale(registered=7, sampled=3)


@pytest.mark.runtime
def test_prints_memory_and_time_of_each_size(monkeypatch: pytest.MonkeyPatch) -> None:
    original = scale.together

    def one_on_ray(commands: dict[str, list[str]], stack: ExitStack) -> Any:
        """The larger size as it is; the smaller only says what it might have measured."""
        return original(commands | {"4": ["sh", "-c", ANSWERS]}, stack)

    monkeypatch.setattr(scale, "together", one_on_ray)
    lines = measured("splitfed-v1", registered=(4, 8), sampled=2, warm=0, runs=1)
    assert [str(line["unit"]) for line in lines] == ["kB", "s"]
    for line in lines:
        assert str(line["name"]).startswith("splitfed-v1, 8 registered nodes")
        assert set(line) == {"name", "ours", "other", "ratio", "unit", "runs"}
    assert lines[0]["other"] == scale.ALLOWED
    assert float(str(lines[1]["ours"])) > 0
    assert lines[1]["other"] == 0.5
