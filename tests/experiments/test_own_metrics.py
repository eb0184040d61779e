"""Metrics of one's own, by import path: scored, in the report, and in their own cards' keys."""

import importlib
import re
import sys
from pathlib import Path
from typing import Any

import pytest
from rich.console import Console

from experiments.catalogue import check_plugin
from experiments.console import summary
from experiments.report.page import write_report
from experiments.run import executor
from experiments.run.runner import run
from experiments.settings import plugins
from experiments.settings.load import load_settings
from experiments.settings.schema import SettingsError
from leakbed import provenance
from leakbed.plugins import own_class

METRIC = '''
"""A metric of my own."""
from dataclasses import dataclass
from typing import ClassVar

import torch


@dataclass(frozen=True, kw_only=True)
class FarPixels:
    """Share of the pixels that are further from the truth than a bound."""

    name: ClassVar[str] = "far-pixels"
    source: ClassVar[str] = "own"
    higher_leaks_more: ClassVar[bool] = False
    bound: float = 0.1

    def measure(self, guess, truth):
        """Count pixels."""
        return ((guess - truth).abs() > self.bound).double().flatten(1).mean(1)
'''
TABLE: dict[str, Any] = {
    "name": "own",
    "data": {"name": "tests.support.tiny:images", "nodes": 2, "test": 0.2},
    "model": {"name": "tests.support.tiny:plain", "cut": 1},
    "protocol": {"name": "vanilla-split", "batch_size": 5, "local_steps": 2},
    "attack": [{"name": "smashed-as-image", "targets": 2}],
}
MEASURED = {**TABLE, "metric": [{"name": "far_of_mine:FarPixels", "bound": 0.25}]}


@pytest.fixture
def mine(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """Return a file on the path with a metric."""
    folder = tmp_path / "mine"
    folder.mkdir()
    (folder / "far_of_mine.py").write_text(METRIC)
    monkeypatch.syspath_prepend(str(folder))
    _as_in_a_new_process()
    return folder / "far_of_mine.py"


def _as_in_a_new_process() -> None:
    provenance._FIRST.clear()
    own_class.cache_clear()
    plugins.own_fields.cache_clear()
    sys.modules.pop("far_of_mine", None)
    importlib.invalidate_caches()


def test_a_metric_is_scored_with_its_baselines_and_shown(
    mine: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (card,) = run(MEASURED, out=tmp_path / "out")
    entry = card.scores["far-pixels"]
    assert isinstance(entry, dict)
    assert 0 < entry["mean"] <= 1  # type: ignore[operator]
    assert len(entry["values"]) == 2  # type: ignore[arg-type]
    assert entry["higher_leaks_more"] is False
    assert "far-pixels" in card.baselines["constant"]
    lowest = min(
        each["far-pixels"]
        for name, each in card.baselines.items()
        if "far-pixels" in each and name != "nearest-public" and each["far-pixels"] is not None
    )
    page = write_report(tmp_path / "out").read_text()
    assert "far-pixels" in page
    console = Console(width=200)
    for part in summary([card]):
        console.print(part)
    shown = re.search(r"smashed-as-image.*", capsys.readouterr().out)
    assert shown is not None
    assert f"{entry['mean']:.2f} ({lowest:.2f})" in shown[0]


def test_a_metric_changes_no_key_of_others_and_an_edit_of_it_scores_again(
    mine: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (plain,) = run(TABLE, out=tmp_path / "out")
    monkeypatch.setattr(executor, "train", pytest.fail)  # the same run serves every metric
    (before,) = run(MEASURED, out=tmp_path / "out")
    mine.write_text(METRIC + "EDITED = True\n")
    _as_in_a_new_process()
    (after,) = run(MEASURED, out=tmp_path / "out")
    (again,) = run(TABLE, out=tmp_path / "out")
    assert len({plain.key, before.key, after.key}) == 3
    assert again.key == plain.key


@pytest.mark.parametrize(
    ("metric", "said"),
    [
        ({"name": "ssim"}, "has the oracle's own metrics anyhow"),
        ({"name": "no_such_module:Far"}, "No module named 'no_such_module'"),
        ({"name": "far_of_mine:FarPixel"}, "did you mean 'FarPixels'"),
        ({"name": "far_of_mine:FarPixels", "bond": 1.0}, "did you mean 'bound'"),
        ({"name": "far_of_mine:FarPixels", "bound": "x"}, "bound: Input should be a valid number"),
        ({"name": "attacks.baselines:ConstantImage"}, "it is an attack"),
        ({"name": "far_of_mine:ClassVar"}, "name a class"),
        ({"name": "far_of_mine:dataclass"}, "name a class"),
    ],
)
def test_what_is_no_metric_is_named_before_training(
    mine: Path, metric: dict[str, Any], said: str
) -> None:
    with pytest.raises(SettingsError, match=said):
        load_settings({**TABLE, "metric": [metric]})


def test_two_metrics_of_one_name_are_refused(mine: Path) -> None:
    twice = [{"name": "far_of_mine:FarPixels", "bound": bound} for bound in (0.1, 0.2)]
    with pytest.raises(SettingsError, match=r"two .* are called 'far-pixels'"):
        load_settings({**TABLE, "metric": twice})


@pytest.mark.parametrize(
    ("old", "new", "said"),
    [
        ("higher_leaks_more: ClassVar[bool] = False", "", "higher_leaks_more is None"),
        ('"far-pixels"', '"ssim"', "the catalogue's own"),
        ('"far-pixels"', '"seconds"', r"'seconds', under which .* is none of attack, .*, seconds,"),
        ('"far-pixels"', '"targets"', "'targets', under which a card or `leakbed results`"),
        ('"far-pixels"', '"ssim_skill"', "'ssim_skill', under which .* end in .*, _skill"),
        ('"far-pixels"', '"far_low"', "'far_low', under which .* end in _low,"),
        ('"far-pixels"', '"attack.far"', r"'attack\.far', under which .* without a dot"),
        ("def measure", "def mesure", "it has no method `measure`"),
        ("(frozen=True, kw_only=True)", "", "it can be changed"),
    ],
)
def test_a_class_that_breaks_the_contract_is_refused(
    mine: Path, old: str, new: str, said: str
) -> None:
    assert old in METRIC
    mine.write_text(METRIC.replace(old, new))
    with pytest.raises(SettingsError, match=said):
        load_settings(MEASURED)


@pytest.mark.parametrize(
    ("answer", "said"),
    [
        ("return 0.5", "returned a builtins.float where a torch tensor of shape"),
        ("return guess", r"returned a tensor of shape \(\d, 1, \d, \d\) where"),
        ("return guess.flatten(1).sum(1) / 0", "returned values that are not finite"),
        ("raise KeyError('bound')", r"raised KeyError: 'bound' \(far_of_mine.py, line 20\)"),
    ],
)
def test_a_metric_that_breaks_is_a_failed_card_and_found_by_the_check(
    mine: Path, tmp_path: Path, answer: str, said: str
) -> None:
    assert check_plugin("far_of_mine:FarPixels") == []
    sound = METRIC[METRIC.index("return ((") :].strip()
    mine.write_text(METRIC.replace(sound, answer))
    _as_in_a_new_process()
    (found,) = check_plugin("far_of_mine:FarPixels")
    assert re.search(said, found)
    (card,) = run(MEASURED, out=tmp_path / "out")
    assert card.status == "failed"
    assert str(card.why).startswith("the code of metric far-pixels (FarPixels) ")
    assert re.search(said, str(card.why))
