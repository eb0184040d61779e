"""The page on methods and data of one's own, done as it says in a folder outside the repository."""

import json
import os
import re
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]


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
        subprocess.run(  # noqa: S603  the page's own commands
            [sys.executable, "-m", "leakbed.cli", *arguments],
            cwd=tmp_path,
            env={**os.environ, "PYTHONPATH": str(ROOT)},
            check=True,
        )
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


def _results(folder: Path) -> dict[tuple[str, str], str]:
    """Return what became of each cell, by attack and defence."""
    cards = [json.loads(file.read_text()) for file in (folder / "cards").iterdir()]
    return {(card["attack"], card["defense"]): card["status"] for card in cards}
