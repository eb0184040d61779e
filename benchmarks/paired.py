"""Paired runs: every side waits, ready, in a process of its own, and they take turns.

What one side does a second after the other meets the same machine, so that ratios of neighbours
hold where medians of two long runs would not. A side is a command that speaks JSON lines: one when
it is ready, then one for each line it is sent. Needs only the standard library, since a side may
run in another environment.
"""

import json
import os
import signal
import subprocess
import sys
from collections.abc import Mapping, Sequence
from contextlib import ExitStack
from pathlib import Path
from statistics import median
from tempfile import TemporaryFile
from typing import IO, Any, Self

ROOT = Path(__file__).parents[1]
_PATIENCE = 60.0  # seconds to end: Ray takes a few to stop its own processes


class SideFailedError(RuntimeError):
    """A side ended, or said something that is no answer."""


class Side:
    """One side of a comparison; a context manager that ends its process."""

    def __init__(
        self, command: Sequence[str], *, environment: Mapping[str, str] | None = None
    ) -> None:
        """Start the process; :meth:`turn` waits until it is ready.

        Args:
            command: Its program and arguments.
            environment: Variables set besides this process's own.
        """
        self._command = list(command)
        self._log: IO[bytes] = TemporaryFile()  # noqa: SIM115  closed with the side
        own = {"PYTHONPATH": str(ROOT), "FLWR_TELEMETRY_ENABLED": "0", "OMP_NUM_THREADS": "1"}
        self._process = subprocess.Popen(  # noqa: S603  our own benchmarks
            self._command,
            cwd=ROOT,
            env={**os.environ, **own, **(environment or {})},
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=self._log,
            text=True,
            start_new_session=True,
        )
        self._ready: dict[str, Any] | None = None

    def ready(self) -> dict[str, Any]:
        """Return what the side said once it could begin; the first call waits for it."""
        if self._ready is None:
            self._ready = self._answer()
        return self._ready

    def turn(self) -> dict[str, Any]:
        """Let the side do its work once and return what it says of it."""
        self.ready()
        assert self._process.stdin is not None  # noqa: S101  opened above
        try:
            self._process.stdin.write("\n")
            self._process.stdin.flush()
        except BrokenPipeError:
            pass  # it has ended; the missing answer says so with its log
        return self._answer()

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        """Tell the side that there is no further turn, and end it and its processes."""
        for pipe in (self._process.stdin, self._process.stdout):
            if pipe is not None:
                pipe.close()
        try:
            self._process.wait(_PATIENCE)
        except subprocess.TimeoutExpired:
            os.killpg(self._process.pid, signal.SIGKILL)
            self._process.wait()
        self._log.close()

    def _answer(self) -> dict[str, Any]:
        assert self._process.stdout is not None  # noqa: S101  opened above
        line = self._process.stdout.readline()
        try:
            answer: dict[str, Any] = json.loads(line)
        except json.JSONDecodeError as error:
            self._log.seek(0)
            end = self._log.read().decode(errors="replace")[-2000:]
            raise SideFailedError(
                f"{self._command} answered {line!r}; it logged:\n{end}"
            ) from error
        return answer


class Turns:
    """A side's own end of the conversation."""

    def __init__(self) -> None:
        """Keep standard output for answers: whatever else is printed goes to the log."""
        self._answers = os.fdopen(os.dup(1), "w")
        os.dup2(2, 1)

    def tell(self, **answer: Any) -> None:  # noqa: ANN401  whatever JSON can say
        """Answer the last turn or, at first, say that the side is ready."""
        self._answers.write(json.dumps(answer) + "\n")
        self._answers.flush()

    def wait(self) -> bool:
        """Wait for the next turn; False if there is none."""
        return bool(sys.stdin.readline())


def rounds(sides: Mapping[str, Side], *, warm: int, runs: int) -> list[dict[str, dict[str, Any]]]:
    """Let all sides take turns.

    Args:
        sides: By name, in the order of their turns.
        warm: Turns of each that do not count.
        runs: Turns of each that do.

    Returns:
        What each side said, turn after turn.
    """
    for side in sides.values():
        side.ready()
    taken = [{name: side.turn() for name, side in sides.items()} for _ in range(warm + runs)]
    return taken[warm:]


def together(commands: Mapping[str, Sequence[str]], stack: ExitStack) -> dict[str, Side]:
    """Start sides one after the other, each ready before the next, and end them with the stack.

    Args:
        commands: By name.
        stack: Ends them.

    Returns:
        The sides by name.
    """
    sides = {}
    for name, command in commands.items():
        sides[name] = stack.enter_context(Side(command))
        sides[name].ready()
    return sides


def line(name: str, pairs: Sequence[tuple[float, float]], *, unit: str) -> dict[str, object]:
    """Return the line of a result: medians of both sides, and the median of the pairs' ratios.

    Args:
        name: What was measured, as ``what: ours / other``.
        pairs: Ours and the other's, neighbours in time.
        unit: Of both.

    Returns:
        What one JSON line says.
    """
    return {
        "name": name,
        "ours": _rounded(median(a for a, _ in pairs)),
        "other": _rounded(median(b for _, b in pairs)),
        "ratio": _rounded(median(a / b for a, b in pairs)),
        "unit": unit,
        "runs": len(pairs),
    }


def show(result: Mapping[str, object]) -> None:
    """Print one result as one JSON line."""
    print(json.dumps(result), flush=True)


def _rounded(number: float) -> float:
    """Return a count as it is, else four significant digits: more than a time is known to."""
    return int(number) if number == int(number) else float(f"{number:.4g}")
