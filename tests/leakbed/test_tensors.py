import os
import subprocess
import sys

import numpy as np
import pytest
import torch

from leakbed.tensors import as_tensor, finite, load, placed, predicted


@pytest.mark.parametrize("dtype", [np.float32, np.float64, np.int64, np.uint8])
def test_a_view_shares_the_memory_of_a_read_only_array(dtype: type) -> None:
    data = bytearray(np.arange(6, dtype=dtype).tobytes())
    array = np.frombuffer(bytes(data), dtype).reshape(2, 3)
    seen = as_tensor(array)
    assert np.array_equal(seen.numpy(), array)
    assert seen.data_ptr() == array.__array_interface__["data"][0]


def test_a_view_of_a_writable_array_writes_through() -> None:
    array = np.zeros(3)
    as_tensor(array)[1] = 2
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


@pytest.mark.parametrize(
    ("sent", "loaded"), [(8.999999999999998, 9), (2.0000000000000004, 2), (3.0, 3), (0.4, 0)]
)
def test_a_counter_that_an_average_made_a_fraction_is_rounded(sent: float, loaded: int) -> None:
    norm = torch.nn.BatchNorm1d(2)
    arrays = {name: value.numpy().copy() for name, value in norm.state_dict().items()}
    arrays["running_mean"] += 0.25
    arrays["num_batches_tracked"] = np.array(sent)
    load(norm, arrays)
    assert int(norm.num_batches_tracked) == loaded
    assert norm.running_mean.tolist() == [0.25, 0.25], "weights are as they came"


def test_names_are_checked_unless_some_may_stay() -> None:
    layer = torch.nn.Linear(2, 1)
    before = layer.bias.detach().clone()
    with pytest.raises(RuntimeError, match="bias"):
        load(layer, {"weight": np.ones((1, 2), np.float32)})
    load(layer, {"weight": torch.zeros(1, 2), "more": torch.zeros(1)}, strict=False)
    assert layer.weight.tolist() == [[0, 0]]
    assert torch.equal(layer.bias, before)


CONFIGURED = """
import os, torch
from leakbed import tensors
for cuda in (False, True):
    torch.cuda.is_available = lambda: cuda
    tensors._compute_exactly.cache_clear()  # as in a new process
    tensors.configure_torch()
    print(torch.get_num_threads(), torch.backends.cudnn.allow_tf32,
          torch.backends.cuda.matmul.allow_tf32, torch.are_deterministic_algorithms_enabled(),
          torch.is_deterministic_algorithms_warn_only_enabled(), torch.backends.cudnn.benchmark,
          os.environ.get("CUBLAS_WORKSPACE_CONFIG"))
"""


def test_a_process_computes_on_one_thread_in_whole_float32_and_in_one_order() -> None:
    environment = {k: v for k, v in os.environ.items() if k != "CUBLAS_WORKSPACE_CONFIG"}
    found = subprocess.run(  # noqa: S603  of our own making
        [sys.executable, "-c", CONFIGURED],
        env=environment,
        capture_output=True,
        text=True,
        check=True,
    )
    assert found.stdout.splitlines() == [
        "1 False False False False False None",
        "1 False False True True False :4096:8",
    ]


def test_on_the_same_device_nothing_is_copied() -> None:
    tensor = torch.ones(3)
    assert placed(tensor, torch.device("cpu")) is tensor
    assert placed(tensor.to("meta"), torch.device("meta")).device.type == "meta"


def test_a_gpu_is_sent_a_pinned_copy_that_nobody_waits_for(monkeypatch: pytest.MonkeyPatch) -> None:
    asked = []

    class Pinned:
        def to(self, device: torch.device, *, non_blocking: bool) -> str:
            asked.append((device.type, non_blocking))
            return "there"

    monkeypatch.setattr(torch.Tensor, "pin_memory", lambda self: Pinned())
    assert placed(torch.ones(3), torch.device("cuda")) == "there"
    assert asked == [("cuda", True)]
