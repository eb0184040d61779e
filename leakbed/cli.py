"""The console entry point ``leakbed``.

It holds no command itself: those need typer, which the package alone does not bring, and whose
absence should be a sentence rather than a traceback.
"""

import os
import sys
import traceback
from pathlib import Path
from typing import NoReturn


def main() -> None:
    """Run the command line."""
    _find_own_code()
    try:
        from leakbed.commands import app  # noqa: PLC0415  see above
    except ModuleNotFoundError as error:
        sys.exit(
            f"error: the command line needs the package {error.name!r}; run `make setup` in "
            "Leakbed's repository, or `pip install --editable '.[testbed]'` there"
        )
    try:
        app()
    except BaseException as end:
        if _overran():
            _leave(end)
        raise


def _find_own_code() -> None:
    """Let settings name ``package.module:Class`` of the working directory, as ``python -m`` does.

    The directory comes last rather than first, so that a folder of the user's called ``attacks``
    does not replace ours.
    """
    here = str(Path.cwd())
    if here not in sys.path and not sys.flags.safe_path:
        sys.path.append(here)


def _overran() -> bool:
    """Say whether a node that took too long is still running, without importing grids for that."""
    deadlines = sys.modules.get("leakbed.grids.deadlines")
    return deadlines is not None and deadlines.overran() is not None


def _leave(end: BaseException) -> NoReturn:
    """End the process at once, beside a thread that Python can neither stop nor wait for.

    The ordinary way out tears torch down under that thread, and the process aborts.
    """
    if not isinstance(end, SystemExit):
        traceback.print_exception(end)
    sys.stdout.flush()
    sys.stderr.flush()
    code = end.code if isinstance(end, SystemExit) else 1
    os._exit(code if isinstance(code, int) else int(code is not None))
