"""Audit a defence by its name: is the claim that it states refuted by draws from it?"""

from collections.abc import Mapping
from dataclasses import fields
from typing import Any

from defenses import DEFENSES
from leakbed.contracts import Defense
from leakbed.contracts.defense import refuse_uncalled
from leakbed.lookup import import_object, unknown_name
from leakbed.oracle.audit import Audit, NoAuditError, audit


def audit_defense(name: str, *, settings: Mapping[str, Any], draws: int | None) -> list[Audit]:
    """Audit one defence.

    Args:
        name: Its catalogue key, or ``package.module:Class``.
        settings: Its own.
        draws: Of each input; None for the audit's default.

    Returns:
        What was found for each kind of input.

    Raises:
        NoAuditError: If there is no such defence, or no such setting.
    """
    kind = import_object(name) if ":" in name else DEFENSES.get(name)
    if kind is None:
        raise NoAuditError(unknown_name("defence", name, DEFENSES))
    if not (isinstance(kind, type) and issubclass(kind, Defense)):
        raise NoAuditError(f"{name} is no defence; name a class that inherits Defense")
    refuse_uncalled(kind)
    legal = [each.name for each in fields(kind)]  # type: ignore[arg-type]
    for key in settings:
        if key not in legal:
            raise NoAuditError(unknown_name(f"setting of {name}", key, legal))
    return audit(kind(**settings), draws=draws)
