"""Tests would check no type and no shape if the plug-in decorated otherwise than expected."""

from collections.abc import Callable
from typing import Any

import pytest
import torch

from attacks.building_blocks.likeness import kernel_distance
from clients.node import batches
from leakbed.models import Architecture
from strategies.averaging import refuse_sealed


@pytest.mark.parametrize(
    ("call", "said"),
    [
        (lambda: kernel_distance(torch.zeros(3, 4), torch.zeros(3, 5)), "Type-check error"),
        (lambda: batches("", round_=1, rows=3, batch_size=2, steps=None), "Type-check error"),
        (lambda: refuse_sealed(3), "violates"),  # type: ignore[arg-type]
        (lambda: Architecture(name=3, image_shape=(1, 2, 3), num_classes=2), "violates"),  # type: ignore[arg-type]
    ],
    ids=["shape", "type beside a shape", "type", "type of a field"],
)
def test_a_call_that_breaks_its_signature_is_refused(call: Callable[[], Any], said: str) -> None:
    with pytest.raises(Exception, match=said):
        call()
