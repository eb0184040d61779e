"""The console entry point ``leakbed``.

It holds no command itself: those need typer, which the package alone does not bring, and whose
absence should be a sentence rather than a traceback.
"""

import sys


def main() -> None:
    """Run the command line."""
    try:
        from leakbed.commands import app  # noqa: PLC0415  see above
    except ModuleNotFoundError as error:
        sys.exit(
            f"error: the command line needs the package {error.name!r}; run `make setup` in "
            "Leakbed's repository, or `pip install --editable '.[testbed]'` there"
        )
    app()
