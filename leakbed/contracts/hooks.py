"""Which hooks of a defence are called for what it protects; those that nobody calls are refused.

A defence whose hook is misspelt, or is of something that it does not say it protects, would run as
no defence under its name. Importing this module needs neither torch nor Flower.
"""

from __future__ import annotations

from difflib import get_close_matches
from typing import TYPE_CHECKING

from leakbed.contracts.defense import Defense, Protects

if TYPE_CHECKING:
    from collections.abc import Mapping

HOOKS: Mapping[Protects, tuple[str, ...]] = {
    Protects.UPDATE: ("protect_update",),
    Protects.SMASHED: ("protect_smashed",),
    Protects.CUT_GRADIENT: ("protect_cut_gradient", "protect_labelled_gradient"),
    Protects.TRAINING: (
        "train_step",
        "protect_labels",
        "inspect",
        "alter_images",
        "follow_gradient",
    ),
    Protects.LABELS: ("noised_labels",),
    Protects.TOP: ("protect_weight_gradients",),
}
"""The hooks that are called for each thing a defence may protect, and for nothing else."""

_OF_CUTS = ("protect_labels", "inspect")  # training hooks that FedAvg has no use for
_FORMER = {"penalty": "train_step"}  # a hook of earlier versions that nobody calls any more
_PREPARES = {"prepare": Protects.TRAINING}  # is called with those hooks, and protects nothing alone
_ALIKE = 0.85  # of two names, from which on one is taken for a typing mistake of the other


class UncalledHookError(ValueError):
    """A defence has a hook that nobody would call, or none of what it says it protects."""


def untrained(kind: type[Defense], exchanges: str) -> str | None:
    """Say why a defence cannot take part in the training of a kind of protocol.

    Args:
        kind: Its class, which has ``Protects.TRAINING``.
        exchanges: What the protocol exchanges: ``"weights"`` or ``"split"``.

    Returns:
        What does not fit and what would; None where it can.
    """
    if exchanges not in kind.exchanges:
        fitting = " or ".join(map(repr, sorted(kind.exchanges))) or "nothing"
        return (
            f"{kind.name} takes part in training where nodes exchange {fitting}, and this protocol "
            f"exchanges {exchanges!r}; choose one that does, or say in `exchanges` that it fits"
        )
    for hook in _OF_CUTS if exchanges == "weights" else ():
        if getattr(kind, hook) is not getattr(Defense, hook):
            return (
                f"{kind.name} overrides {hook}, which is called where a network is split, and this "
                "protocol exchanges 'weights', so that nobody would call it; choose a split "
                "protocol, or drop the hook"
            )
    return None


def refuse_uncalled(kind: type[Defense]) -> None:
    """Refuse a defence that would never run, or run in part, under its name.

    Whoever is about to use a defence calls this: the harness before training, a mod, a server part.

    Args:
        kind: Its class.

    Raises:
        UncalledHookError: If it overrides a hook that its ``protects`` does not name, protects
            something without a hook of it, or has a method whose name is nearly a hook's.
    """
    protects = ", ".join(sorted(kind.protects)) or "nothing"
    owners = {hook: each for each, hooks in HOOKS.items() for hook in hooks} | _PREPARES
    overridden = {hook for hook in owners if getattr(kind, hook) is not getattr(Defense, hook)}
    own = sorted(
        name
        for each in kind.__mro__[: kind.__mro__.index(Defense)]
        for name, value in vars(each).items()
        if callable(value) and not name.startswith("_") and not hasattr(Defense, name)
    )
    for hook in sorted(overridden):
        if owners[hook] not in kind.protects:
            raise UncalledHookError(
                f"{kind.name} overrides {hook} but protects {protects}; nobody would call it: add "
                f"{owners[hook]} to `protects`, or drop the hook"
            )
    for each in sorted(kind.protects):
        hooks = HOOKS[each]
        if not overridden & {*hooks}:
            near = [_FORMER[name] for name in own if _FORMER.get(name) in hooks] or [
                found for name in own for found in get_close_matches(name, hooks, n=1)
            ]
            hint = f"did you mean {near[0]}?" if near else f"override {' or '.join(hooks)}"
            raise UncalledHookError(
                f"{kind.name} protects {each} but overrides no hook of it; {hint}"
            )
    for name in own:
        former = [hook for hook in [_FORMER.get(name)] if hook and hook not in overridden]
        if near := former or get_close_matches(
            name, owners.keys() - overridden, n=1, cutoff=_ALIKE
        ):
            raise UncalledHookError(
                f"{kind.name} has a method {name}, which nobody would call; did you mean "
                f"{near[0]}? Else give it another name"
            )
