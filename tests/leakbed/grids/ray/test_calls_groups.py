import pytest

from leakbed.flower_internals import task_identity
from leakbed.grids.ray.calls import PendingMessage, Worker, groups
from tests.support.strange_nodes import message


def waiting(*shared: str | None) -> list[PendingMessage]:
    with task_identity():
        return [PendingMessage(message(1, "count"), (b"",), common) for common in shared]


@pytest.mark.parametrize(
    ("messages", "calls"),
    [(1, [1]), (8, [1] * 8), (15, [1] * 15), (25, [3] * 8 + [1]), (160, [16] * 10)],
)
def test_many_messages_to_one_worker_share_calls(messages: int, calls: list[int]) -> None:
    load = waiting(*[None] * messages)
    found = list(groups(load))
    assert [len(call) for _, call in found] == calls
    assert [pending for _, call in found for pending in call] == load
    assert [place for place, _ in found] == [sum(calls[:i]) for i in range(len(calls))]


def test_messages_of_different_broadcasts_never_share_a_call() -> None:
    load = waiting(*["a"] * 9, None, *["b"] * 10)
    found = [[pending.shared for pending in call] for _, call in groups(load)]
    assert found == [["a"] * 2] * 4 + [["a"], [None]] + [["b"] * 2] * 5


def test_a_worker_stuck_with_an_abandoned_message_is_the_last_to_get_another() -> None:
    idle, busy, stuck = Worker(0, None), Worker(1, None), Worker(2, None)
    busy.waiting, stuck.waiting = waiting(None, None), waiting(None)
    stuck.waiting[0].abandoned = True
    assert sorted([stuck, busy, idle], key=Worker.load_key) == [idle, busy, stuck]
