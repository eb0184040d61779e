"""A line reads what a line separates, from rows it was not fitted to, and nothing else."""

import pytest
import torch
from torch import Tensor

from leakbed.oracle import linear_probe

ROWS = 400


def smashed(seed: int = 0) -> Tensor:
    return torch.randn(ROWS, 3, 4, 4, generator=torch.Generator().manual_seed(seed))


def accuracy(rows: Tensor, values: Tensor, samples: Tensor | None = None) -> float:
    own = torch.arange(len(rows)) if samples is None else samples
    found = linear_probe(rows, values, samples=own, stream=1)
    return float(found["attribute_accuracy"]["mean"])


def test_what_a_line_separates_is_read() -> None:
    rows = smashed()
    values = (rows.flatten(1)[:, :3].sum(1) > 0).long()
    found = linear_probe(rows, values, samples=torch.arange(ROWS), stream=1)
    assert found["attribute_accuracy"]["mean"] > 0.8
    low, high = found["attribute_accuracy"]["interval"]
    assert low < found["attribute_accuracy"]["mean"] < high
    assert (found["fitted"], found["targets"], found["rows"]) == (200, 200, 1)
    assert len(found["attribute_accuracy"]["values"]) == 200


def test_several_values_are_told_apart_at_any_scale() -> None:
    values = torch.arange(ROWS) % 3
    rows = 1e-3 * smashed()
    rows[torch.arange(ROWS), values, 0, 0] += 1
    assert accuracy(rows, values) > 0.95


def test_what_is_not_there_is_not_read() -> None:
    values = torch.randint(2, (ROWS,), generator=torch.Generator().manual_seed(5))
    assert accuracy(smashed(), values) == pytest.approx(0.5, abs=0.1)


def test_rows_of_one_sample_are_on_one_side() -> None:
    rows = smashed()[: ROWS // 2].repeat(2, 1, 1, 1)
    values = torch.randint(2, (ROWS // 2,), generator=torch.Generator().manual_seed(5)).repeat(2)
    samples = torch.arange(ROWS // 2).repeat(2)
    assert accuracy(rows, values) > 0.6  # noise, known from its twin
    assert accuracy(rows, values, samples) == pytest.approx(0.5, abs=0.12)


def test_the_halves_come_from_the_stream() -> None:
    values = (smashed().mean((1, 2, 3)) > 0).long()
    samples = torch.arange(ROWS)
    found = [linear_probe(smashed(), values, samples=samples, stream=each) for each in (1, 1, 2)]
    assert found[0] == found[1]
    assert found[0] != found[2]


def test_one_value_alone_and_a_single_sample() -> None:
    assert accuracy(smashed(), torch.ones(ROWS, dtype=torch.long)) == 1
    one = torch.zeros(ROWS, dtype=torch.long)
    assert linear_probe(smashed(), one, samples=one, stream=1) == {}
