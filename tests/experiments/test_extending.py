"""The page on methods and data of one's own, done as it says in a folder outside the repository.

Each command has a process of its own, forked from one that has imported torch; that commands work
from a shell, tests/test_readme.py shows.
"""

import json
import os
import re
import sys
from multiprocessing import get_context
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]
FORKED = get_context("forkserver")
FORKED.set_forkserver_preload(["torch._dynamo", "experiments.run.runner", "experiments.report"])


@pytest.mark.runtime
def test_the_page_works_as_it_stands(tmp_path: Path) -> None:
    page = (ROOT / "docs" / "extending.md").read_text()
    files = re.findall(
        r"^`(\w+\.(?:py|toml))`:\n\n```\w+\n(.*?)```", page, re.DOTALL | re.MULTILINE
    )
    assert page.count("```python") + page.count("```toml") == len(files) + 1  # and the entry points
    for name, text in files:
        (tmp_path / name).write_text(text)
    (commands,) = re.findall(r"```sh\n(.*?)```", page, re.DOTALL)
    for command in commands.splitlines():
        program, *arguments = command.split()
        assert program == "leakbed"
        process = FORKED.Process(target=_leakbed, args=(arguments, tmp_path))
        process.start()
        process.join()
        assert process.exitcode == 0, command
    assert _results(tmp_path / "results") == {
        (attack, defense): "done"
        for attack in ("grey:Grey", "nearest:NearestGradient")
        for defense in ("none", "mask:RandomMask", "shown:NoisyInputs", "near:FedProx")
    }
    assert "far-pixels" in (tmp_path / "results" / "report.html").read_text()
    assert _results(tmp_path / "updates") == {
        ("constant-image", defense): "done"
        for defense in ("halved:Shrunk", "near:FedProx", "mixed:Mixup+near:FedProx")
    }
    assert _results(tmp_path / "local") == {
        ("grey:Grey", defense): "done" for defense in ("none", "head:AuxiliaryHead")
    }
    own = ("relayed:LinearInput", "history:WhiteBox", "means:PrivateMean")
    assert _results(tmp_path / "evidence") == {(name, "none"): "done" for name in own}


def _leakbed(arguments: list[str], folder: Path) -> None:
    """Be the command line, in a folder."""
    from leakbed.cli import main  # noqa: PLC0415  in the new process only

    os.chdir(folder)
    sys.argv = ["leakbed", *arguments]
    main()


def _results(folder: Path) -> dict[tuple[str, str], str]:
    """Return what became of each cell, by attack and defence."""
    cards = [json.loads(file.read_text()) for file in (folder / "cards").iterdir()]
    return {(card["attack"], card["defense"]): card["status"] for card in cards}
