"""Every block of README.md is executed: here, or, where it is a `make`, by a line of .ci/run.

A block whose first line is a comment that names a file becomes that file.
"""

import json
import os
import re
import subprocess
import sys
from dataclasses import dataclass
from itertools import count
from pathlib import Path

import pytest
from PIL import Image

from leakbed.data.sources import read_digits
from tests.support.deployment import free_ports, kill_all

ROOT = Path(__file__).parents[1]
FENCE = re.compile(r"^```(\w+)\n(.*?)^```$", re.MULTILINE | re.DOTALL)
MAKE, FLWR_RUN = "make ", "flwr run "
NOT_STARTED, LATE = "Failed to start local SuperLink within", "too slow for Flower"


@dataclass(frozen=True)
class Block:
    """One fenced block of the README."""

    language: str
    text: str

    @property
    def file(self) -> str | None:
        """The file this block shows, if its first line names one."""
        named = re.match(r"# ([\w/]+\.(?:py|toml))\n", self.text)
        return named and named[1]

    @property
    def commands(self) -> list[str]:
        """The lines of a shell block."""
        return self.text.splitlines() if self.language == "shell" else []


BLOCKS = [Block(*fence) for fence in FENCE.findall((ROOT / "README.md").read_text())]
COMMANDS = [command for block in BLOCKS for command in block.commands]


def test_every_block_has_a_language_that_is_executed() -> None:
    assert {block.language for block in BLOCKS} == {"shell", "python", "toml"}
    assert all(block.file for block in BLOCKS if block.language == "toml")


@pytest.mark.parametrize("command", [c for c in COMMANDS if c.startswith(MAKE)])
def test_make_commands_stand_in_the_ci_script(command: str) -> None:
    ran = set((ROOT / ".ci/run").read_text().splitlines())
    assert ran & {command, f"{command}-all"}  # `make test` is a part of `make test-all`


@pytest.mark.parametrize("command", [c for c in COMMANDS if c.startswith(MAKE)])
def test_make_commands_are_targets(command: str) -> None:
    target = command.removeprefix("make ")
    assert re.search(rf"^{target}:", (ROOT / "Makefile").read_text(), re.MULTILINE)


def test_experiments_shown_are_those_of_the_repository() -> None:
    for block in BLOCKS:
        if block.file and (ROOT / block.file).exists():
            _, _, shown = block.text.partition("\n")
            assert shown == (ROOT / block.file).read_text()


@pytest.mark.runtime
def test_every_other_block_runs_in_order(tmp_path: Path) -> None:
    (tmp_path / ".venv").symlink_to(sys.prefix)
    write_photos(tmp_path / "photos")
    for block in BLOCKS:
        if block.file:
            (tmp_path / block.file).parent.mkdir(parents=True, exist_ok=True)
            (tmp_path / block.file).write_text(block.text)
        if block.language == "python":
            run([sys.executable, *arguments(block)], tmp_path)
        for command in block.commands:
            if not command.startswith((MAKE, FLWR_RUN)):
                run(["bash", "-c", command], tmp_path)


@pytest.mark.runtime
@pytest.mark.smoke
def test_flwr_run_completes(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """It ends with 0 even where the run failed, and leaves its SuperLink running."""
    (command,) = [c for c in COMMANDS if c.startswith(FLWR_RUN)]
    attempts = (flower_run(command, tmp_path / str(each), monkeypatch) for each in count())
    said, status = next(each for each in attempts if each[1] != LATE)
    assert status == "finished:completed", said


def flower_run(command: str, folder: Path, monkeypatch: pytest.MonkeyPatch) -> tuple[str, str]:
    """Return what a run printed, and its status: ``LATE`` where it missed a limit of Flower's.

    Flower gives its SuperLink 15 s to start, and a process that is done 5 s to say so. They are too
    few where other programs keep the machine busy.
    """
    home = folder / "flwr"
    folder.mkdir()
    monkeypatch.setenv("FLWR_HOME", str(home))
    for name, port in zip(("SUPERLINK_HTTP", "CONTROL"), free_ports(2), strict=True):
        monkeypatch.setenv(f"FLWR_LOCAL_{name}_API_PORT", str(port))
    try:
        said = run(["bash", "-c", command], ROOT, home=folder, unless=NOT_STARTED)
        if NOT_STARTED in said:
            return said, LATE
        (listed,) = json.loads(run(["flwr", "ls", "--format", "json"], ROOT, home=folder))["runs"]
    finally:
        kill_all(home)
    unsaid = listed["status-details"] == "No heartbeat received from the task"
    return said, LATE if unsaid and "2 cards in " in said else listed["status"]


def arguments(block: Block) -> list[str]:
    """Return how Python runs a block; a ServerApp meets the nodes of a small app."""
    if block.file == "server_app.py":
        return [str(ROOT / "tests/support/small_app.py"), block.file, "mine:Net", "1,28,28"]
    return [block.file] if block.file else ["-c", block.text]


def write_photos(folder: Path) -> None:
    """Write a tree of class folders, as the README asks the reader to have."""
    digits = read_digits()
    for row in range(0, len(digits.images), 10):
        file = folder / str(int(digits.labels[row])) / f"{row}.png"
        file.parent.mkdir(parents=True, exist_ok=True)
        Image.fromarray(digits.images[row].numpy()).save(file)


def run(
    command: list[str], folder: Path, *, home: Path | None = None, unless: str | None = None
) -> str:
    """Return what a command prints; it may fail where it says what ``unless`` is."""
    path = f"{Path(sys.prefix) / 'bin'}{os.pathsep}{os.environ['PATH']}"
    ended = subprocess.run(  # noqa: S603
        command,
        cwd=folder,
        env=os.environ | {"PATH": path, "HOME": str(home or folder)},
        check=False,
        capture_output=True,
        text=True,
    )
    said = ended.stdout + ended.stderr
    excused = unless is not None and unless in said
    assert ended.returncode == 0 or excused, f"{command}\n{said}"
    return said if excused else ended.stdout
