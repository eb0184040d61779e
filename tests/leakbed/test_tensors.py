import numpy as np
import pytest
import torch

from leakbed.tensors import finite, predicted, view


@pytest.mark.parametrize("dtype", [np.float32, np.float64, np.int64, np.uint8])
def test_a_view_shares_the_memory_of_a_read_only_array(dtype: type) -> None:
    data = bytearray(np.arange(6, dtype=dtype).tobytes())
    array = np.frombuffer(bytes(data), dtype).reshape(2, 3)
    seen = view(array)
    assert np.array_equal(seen.numpy(), array)
    assert seen.data_ptr() == array.__array_interface__["data"][0]


def test_a_view_of_a_writable_array_writes_through() -> None:
    array = np.zeros(3)
    view(array)[1] = 2
    assert array.tolist() == [0, 2, 0]


@pytest.mark.parametrize("bad", [torch.inf, -torch.inf, torch.nan])
def test_one_number_that_is_not_finite_is_found(bad: float) -> None:
    tensor = torch.zeros(50, 7)
    assert finite(tensor)
    tensor[31, 4] = bad
    assert not finite(tensor)


def test_numbers_whose_sum_overflows_are_finite_all_the_same() -> None:
    large = torch.full((4,), torch.finfo(torch.float32).max)
    assert not torch.isfinite(large.sum())
    assert finite(large)
    assert finite(torch.zeros(0))


def test_complex_numbers_are_looked_at_too() -> None:
    """No part of a model has them, but a node may send them."""
    assert finite(torch.zeros(2, dtype=torch.complex64))
    assert not finite(torch.tensor([1.0, complex(0, torch.inf)]))


@pytest.mark.parametrize("bad", [torch.inf, -torch.inf, torch.nan])
def test_logits_that_are_not_finite_predict_no_class(bad: float) -> None:
    logits = torch.tensor([[0.0, 2.0], [bad, 1.0], [3.0, bad], [bad, bad], [1.0, 0.0]])
    assert predicted(logits).tolist() == [1, -1, -1, -1, 0]
