"""The page on methods of one's own, done as it says in a folder outside the repository."""

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
    assert [name for name, _ in files] == ["grey.py", "mask.py", "settings.toml"]
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
    assert len(list((tmp_path / "results" / "cards").iterdir())) == 2
