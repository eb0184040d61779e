import functools
import operator

import pytest
import torch

from clients.node import BatchTooLargeError, batches, smallest_batch, straddles


def order(**settings: object) -> list[list[int]]:
    chosen = {"round_": 1, "rows": 10, "batch_size": 4, "steps": None} | settings
    stream = chosen.pop("stream", 3)
    return [batch.tolist() for batch in batches(stream, **chosen)]  # type: ignore[arg-type]


def test_one_pass_visits_every_row_once_and_ends_in_a_smaller_batch() -> None:
    passed = order()
    assert [len(batch) for batch in passed] == [4, 4, 2]
    assert sorted(functools.reduce(operator.iadd, passed, [])) == list(range(10))


@pytest.mark.parametrize("steps", [1, 2, 3, 7])
def test_steps_are_full_batches_and_a_new_pass_follows_a_finished_one(steps: int) -> None:
    passed = order(steps=steps)
    assert [len(batch) for batch in passed] == [4] * steps
    rows = functools.reduce(operator.iadd, passed, [])
    for start in range(0, len(rows) - 9, 10):
        assert sorted(rows[start : start + 10]) == list(range(10))


def test_fewer_steps_are_the_start_of_more() -> None:
    assert order(steps=7)[:2] == order(steps=2) == order()[:2]


def test_the_order_is_a_pure_function_of_stream_and_round() -> None:
    torch.manual_seed(0)
    first = order()
    torch.manual_seed(1)
    assert order() == first
    assert order(round_=2) != first
    assert order(stream=4) != first


def test_a_full_batch_is_legal_and_one_more_is_not() -> None:
    assert [len(batch) for batch in order(batch_size=10)] == [10]
    for steps in (None, 2):
        with pytest.raises(
            BatchTooLargeError, match=r"batch_size is 11 .*only 10 samples.*most 10"
        ):
            order(batch_size=11, steps=steps)


SHAPES = [(rows, size, steps) for rows in (5, 8, 9) for size in (1, 2, 4) for steps in (None, 2, 6)]


@pytest.mark.parametrize(("rows", "size", "steps"), SHAPES)
def test_what_is_said_of_batches_beforehand_is_so(rows: int, size: int, steps: int | None) -> None:
    seen = [order(rows=rows, batch_size=size, steps=steps, stream=seed) for seed in range(40)]
    assert {min(map(len, passed)) for passed in seen} == {
        smallest_batch(rows=rows, batch_size=size, steps=steps)
    }
    twice = any(len(set(batch)) < len(batch) for passed in seen for batch in passed)
    assert twice == straddles(rows=rows, batch_size=size, steps=steps)
