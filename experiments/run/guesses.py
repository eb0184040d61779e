"""Whole guesses, whatever fields they have: the best of restarts, of some targets, on the CPU."""

import math
from collections.abc import Callable, Mapping
from dataclasses import fields, replace
from typing import Any

import torch
from jaxtyping import Bool
from torch import Tensor

from leakbed.contracts import Guess


def best_restart(first: Guess, second: Guess) -> Guess:
    """Return target by target the guess with the lower objective; failures lose.

    Numbers of clusters mean nothing in another guess: of two such, the one that is lower on average
    over what it did not fail on is kept as a whole.

    Args:
        first: A guess; without an objective it is returned as it is.
        second: Another of the same targets.

    Returns:
        The better of both.
    """
    if first.objective is None or second.objective is None:
        return first
    if first.clusters is not None:
        return second if _mean(second.objective) < _mean(first.objective) else first
    wins = second.objective < first.objective.nan_to_num(torch.inf)
    changes: dict[str, Any] = {}
    for each in fields(Guess):
        a, b = getattr(first, each.name), getattr(second, each.name)
        if isinstance(a, Mapping) and isinstance(b, Mapping):
            changes[each.name] = {name: _where(wins, b[name], a[name]) for name in a}
        elif isinstance(a, Tensor) and isinstance(b, Tensor):
            changes[each.name] = _where(wins, b, a)
    return replace(first, **changes)


def on_cpu(guess: Guess) -> Guess:
    """Return a guess whose tensors lie on the CPU and remember no computation."""
    return _mapped(guess, lambda tensor: tensor.detach().cpu())


def picked(guess: Guess, wanted: Bool[Tensor, " targets"]) -> Guess:
    """Return a guess of the wanted targets only."""
    return _mapped(guess, lambda tensor: tensor[wanted])


def share_on_budget(guess: Guess) -> float | None:
    """Return the share of targets at which the attack stopped on its budget.

    Args:
        guess: A guess.

    Returns:
        ``None`` where the attack says nothing of a budget.
    """
    stopped = guess.stopped_on_budget
    return None if stopped is None else float(stopped.double().mean())


def _mapped(guess: Guess, change: Callable[[Tensor], Tensor]) -> Guess:
    """Return a guess with every tensor changed."""
    changes: dict[str, Any] = {}
    for each in fields(Guess):
        value = getattr(guess, each.name)
        if isinstance(value, Mapping):
            changes[each.name] = {name: change(tensor) for name, tensor in value.items()}
        elif isinstance(value, Tensor):
            changes[each.name] = change(value)
    return replace(guess, **changes)


def _mean(objective: Tensor) -> float:
    """Return the mean over what is finite; of nothing, infinity."""
    usable = objective[objective.isfinite()]
    return float(usable.mean()) if len(usable) else math.inf


def _where(wins: Tensor, better: Tensor, worse: Tensor) -> Tensor:
    return torch.where(wins.reshape(-1, *[1] * (better.dim() - 1)), better, worse)
