"""Tensors over received bytes: a view where nothing writes, and a cheap test for finite numbers."""

from math import isfinite

import numpy as np
import torch
import torch.utils.dlpack
from jaxtyping import Shaped
from torch import Tensor

from leakbed.events import Array


def view(array: Array) -> Shaped[Tensor, "..."]:
    """Return a tensor over an array's own memory, also where that is read-only.

    Args:
        array: Numbers; typically a view into a received record.

    Returns:
        The tensor. Whoever writes to it writes to the array: clone it first.
    """
    if array.flags.writeable:
        return torch.from_numpy(array)
    try:
        return torch.utils.dlpack.from_dlpack(array)
    except (BufferError, TypeError, RuntimeError):  # an older NumPy exports nothing read-only
        return torch.from_numpy(np.array(array))


def finite(tensor: Shaped[Tensor, "..."]) -> bool:
    """Return whether every number is finite.

    The sum of finite numbers is finite unless it overflows, and takes a tenth of the time; so only
    a sum that is not has its numbers looked at.

    Args:
        tensor: Of any type.

    Returns:
        False where one is infinite or no number.
    """
    return isfinite(tensor.sum().item()) or bool(tensor.isfinite().all())
