"""Optimiser steps without torch's wrapping, where that is all they would do besides.

``SGD.step`` and ``zero_grad`` enter a profiler's record and look for hooks at every call, which for
a small network costs a tenth of a training step. Plain SGD on the CPU is one sum for each
parameter: the same one, with the same bits. Every other optimiser takes its own step.
"""

from typing import Any

import torch
from torch.optim import optimizer as torch_optimizer

_ADDING_NOTHING = ("momentum", "weight_decay", "maximize", "differentiable", "fused", "foreach")
_PATCHED = ("step", "zero_grad")  # on the object itself, as learning-rate schedulers do


def zero_gradients(optimizer: torch.optim.Optimizer) -> None:
    """Drop the gradients of an optimiser's parameters, as its ``zero_grad`` does.

    Args:
        optimizer: Any.
    """
    group = _plain_group(optimizer)
    if group is None:
        optimizer.zero_grad()
        return
    for parameter in group["params"]:
        parameter.grad = None


def take_step(optimizer: torch.optim.Optimizer) -> None:
    """Take one step, as an optimiser's ``step`` does.

    Args:
        optimizer: Any.
    """
    group = _plain_group(optimizer)
    if group is None:
        optimizer.step()
        return
    rate = -group["lr"]
    with torch.no_grad():
        for parameter in group["params"]:
            if parameter.grad is not None:
                parameter.add_(parameter.grad, alpha=rate)


def _plain_group(optimizer: torch.optim.Optimizer) -> dict[str, Any] | None:
    """Return the one group of plain SGD on the CPU; None of anything else."""
    if type(optimizer) is not torch.optim.SGD or len(optimizer.param_groups) != 1:
        return None
    held, group = vars(optimizer), optimizer.param_groups[0]
    if any(group[setting] for setting in _ADDING_NOTHING) or not isinstance(group["lr"], float):
        return None
    if any(name in held for name in _PATCHED) or _hooked(optimizer):
        return None
    return group if all(p.device.type == "cpu" for p in group["params"]) else None


def _hooked(optimizer: torch.optim.Optimizer) -> bool:
    """Say whether somebody is called before or after a step."""
    own = optimizer._optimizer_step_pre_hooks or optimizer._optimizer_step_post_hooks  # noqa: SLF001
    everywhere = (
        torch_optimizer._global_optimizer_pre_hooks  # noqa: SLF001
        or torch_optimizer._global_optimizer_post_hooks  # noqa: SLF001
    )
    return bool(own or everywhere)
