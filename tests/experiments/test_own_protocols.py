"""A protocol of one's own, by import path; what installed packages offer beside methods."""

import importlib
import sys
from importlib.metadata import EntryPoint
from pathlib import Path
from typing import Any

import pytest

from experiments.catalogue import catalogue
from experiments.run import executor
from experiments.run.offline import attack_trace
from experiments.run.runner import run
from experiments.settings import plugins
from experiments.settings.load import load_settings
from experiments.settings.schema import SettingsError
from leakbed import provenance
from leakbed.contracts import BrokenPluginError

RING = '''
"""A ring of my own."""
from strategies import Protocol
from strategies.protocol import BuiltProtocol
from strategies.server_model import TopTrainer
from strategies.vanilla_split import VanillaSplit


class Backwards(VanillaSplit):
    """Vanilla split learning, the last node first."""

    def train_round(self, sessions):
        """Train with every node in turn."""
        super().train_round(sessions[::-1])

    def closing_sessions(self):
        """Return the session of the node that trained last."""
        return super(VanillaSplit, self).closing_sessions()[:1]


def build(setup):
    """Return the strategy with the first weights of both parts."""
    parts = setup.architecture.parts(setup.init_stream)
    part = setup.part(TopTrainer, parts.top)
    strategy = Backwards(part, setup.arrays(parts.bottom), **setup.common())
    return BuiltProtocol(strategy=strategy, arrays=part.arrays(), bottom=lambda: strategy.bottom)


RING = Protocol(exchanges="split", build=build, in_turn=True)
'''
TABLE: dict[str, Any] = {
    "name": "own",
    "data": {"name": "tests.support.tiny:images", "nodes": 2, "test": 0.2},
    "model": {"name": "tests.support.tiny:plain", "cut": 1},
    "protocol": {"name": "ring_of_mine:RING", "batch_size": 5, "local_steps": 2},
    "attack": [{"name": "smashed-as-image", "targets": 2}],
}


@pytest.fixture
def mine(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """Return a file on the path with a protocol."""
    folder = tmp_path / "mine"
    folder.mkdir()
    (folder / "ring_of_mine.py").write_text(RING)
    monkeypatch.syspath_prepend(str(folder))
    _as_in_a_new_process()
    return folder / "ring_of_mine.py"


def _as_in_a_new_process() -> None:
    provenance._FIRST.clear()
    sys.modules.pop("ring_of_mine", None)
    importlib.invalidate_caches()


def _offer(monkeypatch: pytest.MonkeyPatch, group: str, name: str, value: str) -> None:
    offered = EntryPoint(name, value, f"leakbed.{group}")
    found = {group: {name: offered}}
    monkeypatch.setattr(plugins, "installed", lambda asked: found.get(asked, {}))
    monkeypatch.setattr("experiments.catalogue.installed", lambda asked: found.get(asked, {}))
    monkeypatch.setattr("leakbed.plugins.installed", lambda asked: found.get(asked, {}))


def test_a_protocol_runs_by_import_path_and_is_another_than_the_catalogues(
    mine: Path, tmp_path: Path
) -> None:
    (card,) = run(TABLE, out=tmp_path / "out")
    assert (card.status, card.protocol, card.cut) == ("done", "ring_of_mine:RING", 1)
    vanilla = {**TABLE, "protocol": {**TABLE["protocol"], "name": "vanilla-split"}}
    (other,) = run(vanilla, out=tmp_path / "out")
    assert card.scores["mse"] != other.scores["mse"]  # the nodes trained in another order
    trace = next((tmp_path / "out" / "runs").glob("*/trace"))
    offline = attack_trace(
        trace,
        "smashed-as-image",
        settings={"targets": 2},
        out=tmp_path / "offline",
        model="tests.support.tiny:plain",
    )
    assert offline.status == "unscored"  # it was given no answers


def test_an_edit_of_a_protocol_trains_again(mine: Path, tmp_path: Path) -> None:
    run(TABLE, out=tmp_path / "out")
    mine.write_text(RING + "EDITED = True\n")
    _as_in_a_new_process()
    run(TABLE, out=tmp_path / "out")
    assert len(list((tmp_path / "out" / "runs").iterdir())) == 2


def test_a_protocol_of_ones_own_leaves_the_keys_of_others_alone(
    mine: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    vanilla = {**TABLE, "protocol": {**TABLE["protocol"], "name": "vanilla-split"}}
    (before,) = run(vanilla, out=tmp_path / "out")
    mine.write_text(RING + "EDITED = True\n")
    _as_in_a_new_process()
    monkeypatch.setattr(executor, "train", pytest.fail)
    (after,) = run(vanilla, out=tmp_path / "out")
    assert after.key == before.key


@pytest.mark.parametrize(
    ("name", "said"),
    [
        ("vanilla-splt", "did you mean 'vanilla-split'.*or 'package.module:name' for your own"),
        ("no_such_module:RING", "No module named 'no_such_module'"),
        ("ring_of_mine:RIN", "did you mean 'RING'"),
        ("ring_of_mine:build", "no protocol; name a `strategies.Protocol"),
        ("ring_of_mine:Backwards", "no protocol; name a `strategies.Protocol"),
    ],
)
def test_what_is_no_protocol_is_named_before_training(mine: Path, name: str, said: str) -> None:
    with pytest.raises(SettingsError, match=said):
        load_settings({**TABLE, "protocol": {"name": name}})


def test_a_protocol_reads_an_option_of_its_own(mine: Path, tmp_path: Path) -> None:
    text = RING.replace("in_turn=True", "in_turn=True, options={'order': ('back', 'forth')}")
    text = text.replace("sessions[::-1]", "sessions if self.forth else sessions[::-1]")
    text = text.replace("()[:1]", "()[slice(-1, None) if self.forth else slice(1)]")
    given = "strategy.forth = setup.chosen['order'] == 'forth'"
    mine.write_text(text.replace("    return Built", f"    {given}\n    return Built"))
    default, back, forth = (
        run({**TABLE, "protocol": {**TABLE["protocol"], **option}}, out=tmp_path / "out")[0]
        for option in ({}, {"order": "back"}, {"order": "forth"})
    )
    assert back.key == default.key
    assert forth.settings["protocol"]["order"] == "forth"
    assert forth.scores["mse"] != back.scores["mse"]
    with pytest.raises(SettingsError, match="order = 'fort': ring_of_mine:RING takes 'back' or"):
        load_settings({**TABLE, "protocol": {**TABLE["protocol"], "order": "fort"}})
    with pytest.raises(SettingsError, match=r"unknown key .*'ordr'; did you mean 'order'"):
        load_settings({**TABLE, "protocol": {**TABLE["protocol"], "ordr": "forth"}})


def test_a_module_that_raises_says_so_with_its_line(mine: Path) -> None:
    mine.write_text(RING + "1 / 0\n")
    with pytest.raises(SettingsError, match=r"ZeroDivisionError.*ring_of_mine.py, line 30"):
        load_settings(TABLE)


@pytest.mark.parametrize(
    ("old", "new"),
    [
        ("super().train_round(sessions[::-1])", "raise KeyError('turn')"),
        ("parts = setup.architecture", "raise KeyError('turn')  # "),
    ],
)
def test_a_protocol_that_raises_is_a_failed_card_that_names_it(
    mine: Path, tmp_path: Path, old: str, new: str
) -> None:
    mine.write_text(RING.replace(old, new))
    line = 1 + RING[: RING.index(old)].count("\n")
    (card,) = run(TABLE, out=tmp_path / "out")
    assert card.status == "failed"
    wanted = f"raised KeyError: 'turn' (ring_of_mine.py, line {line})"
    assert str(card.why) == f"the code of protocol ring_of_mine:RING {wanted}"
    with pytest.raises(BrokenPluginError, match="ring_of_mine:RING"):
        run({**TABLE, "on_error": "stop"}, out=tmp_path / "out")


@pytest.mark.parametrize(
    ("group", "section", "path"),
    [
        ("protocols", "protocol", "ring_of_mine:RING"),
        ("models", "model", "tests.support.tiny:plain"),
        ("data", "data", "tests.support.tiny:images"),
    ],
)
def test_an_entry_point_is_a_short_name_in_settings_and_in_the_listing(
    mine: Path, monkeypatch: pytest.MonkeyPatch, group: str, section: str, path: str
) -> None:
    _offer(monkeypatch, group, "short", path)
    table = {**TABLE, section: {**TABLE[section], "name": "short"}}
    assert getattr(load_settings(table), section).name == path
    kind = {"protocols": "protocols", "models": "models", "data": "data sets"}[group]
    assert "cannot be used" not in catalogue()[kind]["short"]["line"]
    assert catalogue()[kind]["short"]["line"]


@pytest.mark.parametrize(
    ("group", "section", "name"),
    [
        ("protocols", "protocol", "fedavg"),
        ("models", "model", "mlp2"),
        ("data", "data", "mnist-5k"),
    ],
)
def test_an_entry_point_with_a_name_of_the_catalogue_is_refused(
    mine: Path, monkeypatch: pytest.MonkeyPatch, group: str, section: str, name: str
) -> None:
    _offer(monkeypatch, group, name, "ring_of_mine:RING")
    with pytest.raises(SettingsError, match=f"offers '{name}', which is the catalogue's own"):
        load_settings({**TABLE, section: {**TABLE[section], "name": name}})


def _install(site: Path, package: str, group: str, value: str) -> None:
    """Write what pip writes of a package that offers ``shipped-by-two``."""
    folder = site / f"{package}-1.0.dist-info"
    folder.mkdir()
    (folder / "METADATA").write_text(f"Name: {package}\nVersion: 1.0\n")
    (folder / "entry_points.txt").write_text(f"[leakbed.{group}]\nshipped-by-two = {value}\n")


@pytest.mark.parametrize(("group", "section"), [("protocols", "protocol"), ("models", "model")])
def test_a_name_that_two_packages_offer_is_refused_and_their_paths_are_not(
    mine: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, group: str, section: str
) -> None:
    _install(tmp_path, "first", group, "one_of_mine:IT")
    _install(tmp_path, "second", group, "ring_of_mine:RING")
    monkeypatch.syspath_prepend(str(tmp_path))
    said = "first and second both offer 'shipped-by-two'; uninstall one, or write the import path"
    with pytest.raises(SettingsError, match=said):
        load_settings({**TABLE, section: {**TABLE[section], "name": "shipped-by-two"}})


@pytest.mark.parametrize("section", ["protocol", "model", "data"])
def test_a_mistyped_short_name_is_told_those_of_installed_packages(
    mine: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, section: str
) -> None:
    group = {"protocol": "protocols", "model": "models"}.get(section, section)
    _offer(monkeypatch, group, "short", "ring_of_mine:RING")
    for name, said in (
        ("shorn", "did you mean 'short'.*legal: .*short.*or install the package that offers it"),
        ("net.of.mine", r"or an import path, with a colon: 'net\.of:mine'"),
    ):
        with pytest.raises(ValueError, match=said):
            run({**TABLE, section: {**TABLE[section], "name": name}}, out=tmp_path / "out")


def test_a_short_name_of_another_kind_is_told_its_own(
    mine: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    _offer(monkeypatch, "attacks", "short", "ring_of_mine:RING")
    with pytest.raises(SettingsError, match=r"'short' is offered as one of leakbed\.attacks"):
        load_settings({**TABLE, "defense": [{"name": "short"}]})
