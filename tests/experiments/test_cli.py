"""Every command, against a testbed that only notes what it was asked."""

import logging
import sys
from collections.abc import Callable
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest
from click.testing import Result
from typer.testing import CliRunner

from experiments.cli import app
from experiments.results.cards import Bound, Card, CardError
from experiments.settings import load
from leakbed import __version__
from leakbed.grids.base import NodeFailed

Invoke = Callable[..., Result]
CARD = Card(
    key="0" * 16,
    case="tried",
    protocol="fedavg",
    data="mnist-5k",
    model="mnistnet",
    nodes=4,
    attack="constant-image",
    seed=0,
    status="unfit",
    why="the parts do not fit",
    version="0.1.0",
    source="f" * 16,
)
DONE = CARD.model_copy(update={"status": "unscored", "why": None})

NOTHING_SAID = {"model": None, "about": None, "truth": None}


class Testbed:
    """Stands for the runner, the offline attack and the report."""

    __test__ = False

    def __init__(self) -> None:
        self.asked: list[tuple[str, tuple[Any, ...], dict[str, Any]]] = []
        self.fails: BaseException | None = None
        self.came = [CARD, CARD, DONE]

    def run(self, *args: Any, progress: Any, **kwargs: Any) -> list[Card]:
        self._asked("run", args, kwargs)
        progress.start(1)
        progress.note("training")
        progress.advance("tried: constant-image")
        return self.came

    def attack_trace(self, *args: Any, **kwargs: Any) -> Card:
        self._asked("attack", args, kwargs)
        return DONE

    def write_report(self, folder: Path) -> Path:
        self._asked("report", (folder,), {})
        return folder / "report.html"

    def _asked(self, name: str, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        self.asked.append((name, args, kwargs))
        if self.fails is not None:
            raise self.fails


@pytest.fixture
def testbed(monkeypatch: pytest.MonkeyPatch) -> Testbed:
    bed = Testbed()
    for module, name in (
        ("run.runner", "run"),
        ("run.offline", "attack_trace"),
        ("report.page", "write_report"),
    ):
        fake = ModuleType(f"experiments.{module}")
        setattr(fake, name, getattr(bed, name))
        monkeypatch.setitem(sys.modules, f"experiments.{module}", fake)
    return bed


@pytest.fixture
def invoke(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Invoke:
    monkeypatch.chdir(tmp_path)
    (tmp_path / "tried.toml").write_text('name = "tried"\n[[attack]]\nname = "constant-image"\n')
    return lambda *args: CliRunner().invoke(app, args)


def test_the_version_and_the_help(invoke: Invoke) -> None:
    assert invoke("--version").stdout == f"{__version__}\n"
    text = invoke("--help").stdout
    assert all(name in text for name in ("compare", "run", "attack", "report", "list"))


def test_run_shows_progress_summary_reasons_and_report(
    invoke: Invoke, testbed: Testbed, tmp_path: Path
) -> None:
    result = invoke("run", "tried.toml", "-o", "data.nodes=3", "-o", "seed=7")
    assert result.exit_code == 0, result.output
    name, (checked,), options = testbed.asked[0]
    assert (name, checked.data.nodes, checked.seed) == ("run", 3, 7)
    assert options == {"out": Path("runs/tried")}
    assert "1 cell\n[1/1] 0:00:00 gone: tried: constant-image\n" in result.stderr
    assert result.stdout.count("Unfit, 2 of 3 cells: the parts do not fit") == 1
    assert result.stdout.endswith(f"Report: {tmp_path / 'runs/tried/report.html'}\n")
    assert testbed.asked[1] == ("report", (Path("runs/tried"),), {})


def test_the_console_opens_with_what_the_report_opens_with(
    invoke: Invoke, testbed: Testbed, make_card: Callable[..., Card]
) -> None:
    bound = Bound(ceiling=0.9, error=0.01, guesses=1, candidates=400, chance=0.01, told="a lot")
    low = bound.model_copy(update={"ceiling": 0.2})
    testbed.came = [
        make_card(ceiling=bound),
        make_card(ceiling=low, protocol="fedavg", cut=None, attack="dlm"),
    ]
    lines = " ".join(invoke("run", "tried.toml").stdout.split())
    assert lines.startswith("At the same accuracy (95% split, 95% by weight exchange) split learn")
    assert "The best possible guess is told a lot" in lines[: lines.index("identified")]


@pytest.mark.parametrize(
    ("statuses", "code"),
    [
        (("unfit", "unfit"), 2),
        (("unfit", "diverged"), 1),
        (("diverged",), 1),
        (("unfit", "unscored"), 0),
        (("diverged", "done"), 0),
    ],
)
def test_a_run_that_came_to_nothing_ends_with_a_code_of_its_own(
    invoke: Invoke, testbed: Testbed, statuses: tuple[str, ...], code: int
) -> None:
    testbed.came = [CARD.model_copy(update={"status": status}) for status in statuses]
    result = invoke("run", "tried.toml")
    assert result.exit_code == code, result.output
    assert "Report: " in result.stdout  # which gives the reasons


def test_run_writes_where_it_is_told(invoke: Invoke, testbed: Testbed) -> None:
    assert invoke("run", "tried.toml", "--out", "here").exit_code == 0
    assert testbed.asked[0][2] == {"out": Path("here")}


def test_another_scale_is_a_file_beside_the_experiments(
    invoke: Invoke, testbed: Testbed, tmp_path: Path
) -> None:
    (tmp_path / "paper.toml").write_text('name = "big"\n[[attack]]\nname = "constant-image"\n')
    assert invoke("run", "tried.toml", "--scale", "paper", "-o", "seed=7").exit_code == 0
    _, (checked,), options = testbed.asked[0]
    assert (checked.name, checked.seed, options) == ("big", 7, {"out": Path("runs/big")})


@pytest.mark.parametrize("scale", ["papper", "tried"])
def test_a_scale_that_an_experiment_lacks_is_refused_with_those_it_has(
    invoke: Invoke, testbed: Testbed, tmp_path: Path, scale: str
) -> None:
    (tmp_path / "paper.toml").write_text("")
    result = invoke("run", "tried.toml", "--scale", scale)
    assert result.exit_code == 2
    assert f"tried.toml has no settings at scale '{scale}'" in result.stderr
    assert result.stderr.endswith("it has: paper\n")
    assert not testbed.asked


def test_compare_runs_the_flagship(
    invoke: Invoke, testbed: Testbed, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(load, "FLAGSHIP", Path("tried.toml"))
    assert invoke("compare", "--out", "demo", "-o", "data.nodes=2").exit_code == 0
    name, (checked,), options = testbed.asked[0]
    assert (name, checked.name, checked.data.nodes) == ("run", "tried", 2)
    assert options == {"out": Path("demo")}


@pytest.mark.parametrize("command", [("compare",), ("run", "tried.toml")])
def test_a_ray_address_puts_an_experiment_on_that_cluster(
    invoke: Invoke, testbed: Testbed, command: tuple[str, ...]
) -> None:
    assert invoke(*command, "--ray-address", "auto").exit_code == 0
    (settings,) = testbed.asked[0][1]
    assert (settings.grid, settings.ray_address) == ("local", "auto")


def test_attack_reads_its_settings_as_toml_else_as_text(invoke: Invoke, testbed: Testbed) -> None:
    overrides = ("-o", "targets=2", "-o", "when=inference", "-o", "value=0.25")
    result = invoke(
        "attack", "a/trace", "--with", "constant-image", "--answers", "a/answers", *overrides
    )
    assert result.exit_code == 0, result.output
    assert testbed.asked[0] == (
        "attack",
        (Path("a/trace"), "constant-image"),
        {
            "answers": Path("a/answers"),
            "out": Path("a/trace-attacked"),
            "seed": None,
            "device": "auto",
            **NOTHING_SAID,
            "settings": {"targets": 2, "when": "inference", "value": 0.25},
        },
    )
    assert testbed.asked[1][1] == (Path("a/trace-attacked"),)


def test_attack_may_be_told_its_seed_and_device(invoke: Invoke, testbed: Testbed) -> None:
    told = ("--seed", "5", "--device", "cpu")
    assert invoke("attack", "t", "--with", "mean-image", *told).exit_code == 0
    assert (testbed.asked[0][2]["seed"], testbed.asked[0][2]["device"]) == (5, "cpu")
    refused = invoke("attack", "t", "--with", "mean-image", "--seed", "-1")
    assert refused.exit_code == 2


def test_attack_without_answers_goes_where_it_is_told(invoke: Invoke, testbed: Testbed) -> None:
    assert (
        invoke("attack", "t", "--with", "mean-image", "--out", "o", "--model", "mine:Net").exit_code
        == 0
    )
    given = {
        "answers": None,
        "out": Path("o"),
        "settings": {},
        "seed": None,
        "device": "auto",
        **NOTHING_SAID,
        "model": "mine:Net",
    }
    assert testbed.asked[0][2] == given


def test_report_says_where_it_is(invoke: Invoke, testbed: Testbed, tmp_path: Path) -> None:
    assert invoke("report", "r").stdout == f"Report: {tmp_path / 'r/report.html'}\n"


def test_list_names_everything(invoke: Invoke) -> None:
    text = invoke("list").stdout
    assert all(name in text for name in ("mnist-5k", "lenet-sigmoid", "fedavg", "constant-image"))
    assert "value=0.5" in text


@pytest.mark.parametrize(
    ("args", "line"),
    [
        (("run", "absent.toml"), "error: absent.toml is no file"),
        (("run", "tried.toml", "-o", "data.nodse=3"), "did you mean 'nodes'"),
        (("run", "tried.toml", "-o", "nodes"), "must be key=value"),
        (("attack", "t", "--with", "constant-imag"), "did you mean 'constant-image'"),
        (("attack", "t", "--with", "dlm", "-o", "targets"), "must be key=value"),
        (("attack", "t", "--with", "dlm", "-o", "tragets=2"), "did you mean 'targets'"),
        (("attack", "t", "--with", "dlm", "-o", "name=x"), "--with names the attack"),
    ],
)
def test_bad_input_is_one_line_and_runs_nothing(
    invoke: Invoke, testbed: Testbed, args: tuple[str, ...], line: str
) -> None:
    result = invoke(*args)
    assert result.exit_code == 2
    assert line in result.stderr
    assert "Traceback" not in result.output
    assert testbed.asked == []


@pytest.mark.parametrize(
    ("fault", "code", "line"),
    [
        (NodeFailed(1, "train", "it died"), 1, "error: node 1 failed on 'train': it died\n"),
        (CardError("x.json is not a card"), 2, "error: x.json is not a card\n"),
        (PermissionError(13, "Permission denied", "runs"), 1, "error: Permission denied: runs\n"),
        (KeyboardInterrupt(), 130, "interrupted: finished cells stay; the same command resumes\n"),
    ],
)
@pytest.mark.parametrize(
    "args", [("run", "tried.toml"), ("attack", "t", "--with", "mean-image"), ("report", "r")]
)
def test_expected_faults_end_with_their_code(
    invoke: Invoke,
    testbed: Testbed,
    *,
    fault: BaseException,
    code: int,
    line: str,
    args: tuple[str, ...],
) -> None:
    testbed.fails = fault
    result = invoke(*args)
    assert result.exit_code == code
    assert line in result.stderr
    assert result.stdout == ""


def test_a_bug_keeps_its_traceback(invoke: Invoke, testbed: Testbed) -> None:
    testbed.fails = bug = ZeroDivisionError("a bug")
    result = invoke("run", "tried.toml")
    assert result.exception is bug
    assert result.exc_info is not None
    assert result.exc_info[2] is not None


@pytest.mark.parametrize(("flags", "level"), [((), logging.WARNING), (("-v",), logging.DEBUG)])
def test_flowers_log_is_shown_on_request(
    invoke: Invoke, testbed: Testbed, flags: tuple[str, ...], level: int
) -> None:
    logger = logging.getLogger("flwr")
    before = logger.level
    try:
        logger.setLevel(logging.DEBUG)
        assert invoke("run", "tried.toml", *flags).exit_code == 0
        assert logger.level == level
    finally:
        logger.setLevel(before)
