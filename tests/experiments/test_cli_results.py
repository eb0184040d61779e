"""The page on papers: its commands and its code, on two small folders."""

import re
import shlex
from collections.abc import Callable
from pathlib import Path

import pytest
from typer.testing import CliRunner

from experiments.cli import app
from experiments.results.cards import Card, write_card

MakeCard = Callable[..., Card]
PAGE = (Path(__file__).resolve().parents[2] / "docs" / "papers.md").read_text()


@pytest.fixture
def folders(make_card: MakeCard, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """Two results folders below the working directory."""
    for name, rate in (("mine", 0.1), ("other", 0.2)):
        settings = {"protocol": {"learning_rate": rate}}
        write_card(make_card(settings=settings), tmp_path / "runs" / name)
    monkeypatch.chdir(tmp_path)
    return tmp_path


def test_the_commands_work_as_they_stand(folders: Path) -> None:
    (commands,) = re.findall(r"```sh\n(.*?)```", PAGE, re.DOTALL)
    said = {}
    for command in commands.splitlines():
        program, *arguments = shlex.split(command)
        assert program == "leakbed"
        result = CliRunner().invoke(app, arguments)
        assert (result.exit_code, result.stderr) == (0, ""), command
        said[command] = result.stdout
    assert said["leakbed results runs/mine"].startswith("case,protocol,data,")
    assert r"\midrule" in said["leakbed results runs/mine --latex"]
    assert "@inproceedings{" in said["leakbed results runs/mine --bibtex"]
    files = list((folders / "figures").iterdir())
    assert sorted(file.suffix for file in files) == [".pdf"] * 3 + [".svg"] * 3
    assert len({file.stem for file in files}) == 3  # one panel and two scores
    assert all(file.stat().st_size > 0 for file in files)
    compared = said["leakbed diff runs/mine runs/other"]
    assert compared.startswith("Differs everywhere: protocol.learning_rate: 0.1 | 0.2\n")


def test_the_code_works_as_it_stands(folders: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (code,) = re.findall(r"```python\n(.*?)```", PAGE, re.DOTALL)
    exec(code, {})  # noqa: S102  the page's own
    assert "unsplit" in capsys.readouterr().out


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        (["results", "runs/none"], "no results in runs/none"),
        (["results", "runs/mine", "--latex", "--bibtex"], "one of --by-seed, --latex"),
        (["results", "runs/mine", "--metric", "ssim"], "--metric chooses what --latex shows"),
        (["diff", "runs/mine", "runs/none"], "no results in runs/none"),
    ],
)
def test_bad_input_is_one_line(folders: Path, arguments: list[str], said: str) -> None:
    result = CliRunner().invoke(app, arguments)
    assert result.exit_code == 2
    assert said in result.stderr
    assert len(result.stderr.splitlines()) == 1
