"""The ServerApp that `flwr run` starts: the same experiments, on Flower's own grids."""

from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path

from flwr.app import Context
from flwr.common.logger import log
from flwr.serverapp import Grid, ServerApp

from experiments.settings_file import load_settings
from leakbed.api import testbed

app = ServerApp()

_BUNDLE = Path(__file__).resolve().parents[1]
_HOME = Path.home() / ".leakbed" / "runs"
_INFO = 20


@app.main()
def main(grid: Grid, context: Context) -> None:
    """Run the experiment that the run config names, then write its report.

    Args:
        grid: Flower's own.
        context: Its run config has ``experiment`` (a file of the bundle, or an absolute path),
            ``out`` (absolute; a folder in the user's home if empty) and ``data-root``.
    """
    config = {key: str(value) for key, value in context.run_config.items()}
    experiment = _BUNDLE / config["experiment"]  # an absolute path replaces the bundle's
    settings = load_settings(experiment)
    out = Path(config["out"]) if config.get("out") else _HOME / settings.name
    _refuse_relative(out)

    @contextmanager
    def flower(nodes: int) -> Iterator[tuple[Grid, Mapping[int, int] | None]]:
        del nodes  # the federation has as many as it has; the run checks
        yield grid, None

    cards = testbed("experiments.runner").run(
        settings, out=out, progress=_Log(), grids=flower, root=config.get("data-root") or None
    )
    report = testbed("experiments.report").write_report(out)
    log(_INFO, "%d cards in %s; report: %s", len(cards), out, report)


def _refuse_relative(out: Path) -> None:
    if not out.is_absolute():
        raise ValueError(
            f"out = {str(out)!r} is relative, but the ServerApp runs in the SuperLink's folder; "
            "give an absolute path"
        )


class _Log:
    """Tells the run's log how far the experiment is."""

    def __init__(self) -> None:
        self._done = self._total = 0

    def start(self, total: int) -> None:
        """Say how many cells there are."""
        self._total = total

    def advance(self, label: str) -> None:
        """Say that one more cell is done."""
        self._done += 1
        log(_INFO, "[%d/%d] %s", self._done, self._total, label)

    def note(self, text: str) -> None:
        """Say what is happening."""
        log(_INFO, "%s", text)
