"""A ServerApp around any other, which records what crosses the wire.

Only Flower's public behaviour is used: whatever a ServerApp is made of (``@app.main()``, or a
``server_fn`` of older Flower), it is called with a grid and a context.
"""

import inspect
import logging
import os
import re
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from functools import cache
from importlib.metadata import version
from pathlib import Path
from typing import Any

from flwr.app import Context
from flwr.serverapp import Grid, ServerApp

from leakbed import __version__
from leakbed.tap.trace import Recorder
from leakbed.tap.wiretap import Wiretap

FOLDER_VARIABLE = "LEAKBED_TRACES"
"""The environment variable that names the folder of all traces."""

NEWEST = (1, 42)
"""The newest Flower that `make test-flower-versions` passed with."""

_log = logging.getLogger("leakbed")


def tapped(
    app: ServerApp,
    folder: str | Path | None = None,
    *,
    about: Mapping[str, Any] | None = None,
    strict: bool = False,
) -> ServerApp:
    """Return a ServerApp that trains as the given one does and records every exchange.

    Each run gets a trace of its own, in a folder named by Flower's run id, so that an app may be
    run again and again. Training ends in the same bits with it as without.

    Args:
        app: Any, of Flower's message API or made with a ``server_fn``. One that is tapped already
            is tapped anew, by what is said here.
        folder: Where the traces go; what the environment variable ``LEAKBED_TRACES`` says if None,
            and ``leakbed-traces`` in the user's home without that. Flower may start a ServerApp in
            any folder, so a relative one is seldom what is meant.
        about: What the adversary may know of the run, from :func:`leakbed.tap.facts.about`.
        strict: Let a trace that cannot be written end the run. By default the app goes on without
            one, and a warning says so.

    Returns:
        To stand where the app stood: ``app = tapped(app)``.

    Raises:
        TypeError: If it is no ServerApp.
    """
    if not isinstance(app, ServerApp):
        raise TypeError(
            f"tapped() takes a flwr.serverapp.ServerApp, got {type(app).__name__}; write "
            "`app = tapped(app)` as the last line of server_app.py, under the functions of the app"
        )
    inner = app.inner if isinstance(app, TappedApp) else app
    caller = inspect.currentframe()
    module = caller.f_back.f_globals if caller and caller.f_back else {}
    return TappedApp(inner, folder, about, strict=strict, name=str(module.get("__name__", "")))


class TappedApp(ServerApp):
    """What :func:`tapped` returns.

    Attributes:
        inner: The app as it was.
    """

    def __init__(
        self,
        inner: ServerApp,
        folder: str | Path | None,
        about: Mapping[str, Any] | None,
        *,
        strict: bool,
        name: str,
    ) -> None:
        """Wrap an app; see :func:`tapped`.

        Args:
            inner: Runs as it would by itself.
            folder: Of all traces, or None.
            about: For the trace, or None.
            strict: Whether a trace that cannot be written ends the run.
            name: What the trace calls the app: the module that tapped it.
        """
        super().__init__()
        self.inner = inner
        self._folder = folder
        self._about = about
        self._strict = strict
        self._name = name

    def __call__(self, grid: Grid, context: Context) -> None:
        """Run the app on a tapped grid."""
        warn_of_newer(version("flwr"))
        recorder = self._recorder(context.run_id)
        if recorder is None:
            self.inner(grid, context)
            return
        with self._ended(recorder):
            self.inner(Wiretap(grid, [recorder], strict=self._strict), context)

    def _recorder(self, run: int) -> Recorder | None:
        """Start the trace of a run; None where there is no place for one."""
        traces = Path(
            self._folder or os.environ.get(FOLDER_VARIABLE) or Path.home() / "leakbed-traces"
        ).absolute()
        try:
            recorder = Recorder(
                new_folder(traces, str(run)), about=self._about, tapped=self._said(run)
            )
        except OSError as error:
            if self._strict:
                raise
            _log.warning(
                "leakbed records nothing of run %s, since %s cannot be written: %s; name another "
                "folder in %s, or tapped(app, folder)",
                run,
                traces,
                error,
                FOLDER_VARIABLE,
            )
            return None
        _log.info("leakbed records run %s in %s", run, recorder.folder)
        return recorder

    def _said(self, run: int) -> dict[str, str]:
        """Return which app and run a trace is of, and under which versions."""
        return {
            "app": self._name,
            "run": str(run),
            "flower": version("flwr"),
            "leakbed": __version__,
        }

    @contextmanager
    def _ended(self, recorder: Recorder) -> Iterator[None]:
        """End the trace with the run; a last line that cannot be written ends a strict run only."""
        try:
            yield
        except BaseException as error:
            recorder.__exit__(type(error), error, error.__traceback__)
            raise
        try:
            recorder.close()
        except OSError as error:
            if self._strict:
                raise
            _log.warning("%s has no closing line: %s", recorder.folder, error)


@cache
def warn_of_newer(flower: str) -> None:
    """Warn once of a Flower under which no app was ever tapped in a test."""
    found = tuple(int(part) for part in re.findall(r"\d+", flower)[:2])
    if found > NEWEST:
        _log.warning(
            "flwr %s is newer than %d.%d, the newest that Leakbed was tested with; compare the "
            "trace with what your app should send (`leakbed trace FOLDER`)",
            flower,
            *NEWEST,
        )


def new_folder(parent: Path, name: str) -> Path:
    """Make a folder that nobody else has made, and return it.

    Args:
        parent: Made where it is missing, readable by its owner only.
        name: What it is called; ``name-2`` and so on where that is taken.

    Returns:
        The folder, which is empty.
    """
    parent.mkdir(parents=True, exist_ok=True, mode=0o700)
    number = 1
    while True:
        folder = parent / (name if number == 1 else f"{name}-{number}")
        try:
            folder.mkdir(mode=0o700)
        except FileExistsError:
            number += 1
        else:
            return folder
