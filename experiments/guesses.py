"""Guesses as wholes, whatever fields they have: chosen among restarts, picked, brought home."""

from collections.abc import Callable, Mapping
from dataclasses import fields, replace
from typing import Any

import torch
from jaxtyping import Bool
from torch import Tensor

from leakbed.contracts import Guess


def better(first: Guess, second: Guess) -> Guess:
    """Return target by target the guess with the lower objective; failures lose.

    Args:
        first: A guess; without an objective it is returned as it is.
        second: Another of the same targets.

    Returns:
        The better of both.
    """
    if first.objective is None or second.objective is None:
        return first
    wins = second.objective < first.objective.nan_to_num(torch.inf)
    changes: dict[str, Any] = {}
    for each in fields(Guess):
        a, b = getattr(first, each.name), getattr(second, each.name)
        if isinstance(a, Mapping) and isinstance(b, Mapping):
            changes[each.name] = {name: _where(wins, b[name], a[name]) for name in a}
        elif a is not None and b is not None:
            changes[each.name] = _where(wins, b, a)
    return replace(first, **changes)


def on_cpu(guess: Guess) -> Guess:
    """Return a guess whose tensors lie on the CPU and remember no computation."""
    return _mapped(guess, lambda tensor: tensor.detach().cpu())


def picked(guess: Guess, wanted: Bool[Tensor, " targets"]) -> Guess:
    """Return a guess of the wanted targets only."""
    return _mapped(guess, lambda tensor: tensor[wanted])


def _mapped(guess: Guess, change: Callable[[Tensor], Tensor]) -> Guess:
    """Return a guess with every tensor changed."""
    changes: dict[str, Any] = {}
    for each in fields(Guess):
        value = getattr(guess, each.name)
        if isinstance(value, Mapping):
            changes[each.name] = {name: change(tensor) for name, tensor in value.items()}
        elif value is not None:
            changes[each.name] = change(value)
    return replace(guess, **changes)


def _where(wins: Tensor, better: Tensor, worse: Tensor) -> Tensor:
    return torch.where(wins.reshape(-1, *[1] * (better.dim() - 1)), better, worse)
