"""Which errors are one line at the command line, and with which exit code.

An error whose class is ours says all there is to say, so it is shown without a traceback; so is one
that the machine makes (no space, no permission). Anything else is a bug and keeps its traceback.
"""

from __future__ import annotations

import errno
import sys
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from pydantic import ValidationError

OURS = frozenset({"attacks", "clients", "defenses", "experiments", "leakbed", "strategies"})

FAILED = 1
"""A run failed."""

BAD_INPUT = 2
"""What was asked for cannot be done."""

INTERRUPTED = 130
"""Ctrl-C: 128 and the signal's number, as shells have it."""

_MACHINE = frozenset({errno.EACCES, errno.EPERM, errno.EROFS, errno.ENOSPC, errno.EDQUOT})
_WRONG_PLACE = frozenset({errno.EEXIST, errno.ENOTDIR, errno.EISDIR})


def verdict(error: BaseException) -> tuple[int, list[str]] | None:
    """Return exit code and lines of an expected error.

    Args:
        error: What a command raised.

    Returns:
        ``None`` for an unexpected one, which should keep its traceback.
    """
    if isinstance(error, KeyboardInterrupt):
        return INTERRUPTED, ["interrupted: finished cells stay; the same command resumes"]
    if _is_validation(error):
        return BAD_INPUT, [f"error: {_fault(fault)}" for fault in error.errors()]
    if type(error).__module__.partition(".")[0] in OURS:
        code = BAD_INPUT if isinstance(error, (ValueError, LookupError, OSError)) else FAILED
        return code, [f"error: {line}" for line in str(error).splitlines()]
    if isinstance(error, ValueError) and _raised_by_settings(error):
        return BAD_INPUT, [f"error: {error}"]
    if isinstance(error, OSError) and error.filename is not None:
        line = f"error: {error.strerror}: {error.filename}"
        code = FAILED if error.errno in _MACHINE else BAD_INPUT
        return (code, [line]) if error.errno in _MACHINE | _WRONG_PLACE else None
    return None


if TYPE_CHECKING:
    from typing import TypeGuard


def _is_validation(error: BaseException) -> TypeGuard[ValidationError]:
    """Say whether an error is pydantic's, without importing it for that."""
    pydantic = sys.modules.get("pydantic")
    return pydantic is not None and isinstance(error, pydantic.ValidationError)


def _fault(fault: object) -> str:
    """Return one of pydantic's faults as one line: where, what, and the value seen."""
    table = fault if isinstance(fault, dict) else {}
    place = ".".join(map(str, table.get("loc", ())))
    message = str(table.get("msg", fault)).removeprefix("Value error, ")
    return f"{place}: {message} (got {table.get('input')!r})" if place else message


def _raised_by_settings(error: ValueError) -> bool:
    """Say whether one of our dataclasses refused its own settings."""
    trace = error.__traceback__
    while trace is not None and trace.tb_next is not None:
        trace = trace.tb_next
    if trace is None or trace.tb_frame.f_code.co_name != "__post_init__":
        return False
    return str(trace.tb_frame.f_globals.get("__name__")).partition(".")[0] in OURS
