"""Attacks and defences of one's own, named by import path, in a folder outside the repository."""

import importlib
import json
import re
import sys
from pathlib import Path
from typing import Any

import pytest

from experiments.catalogue import check_plugin
from experiments.report.page import write_report
from experiments.run import executor
from experiments.run.offline import attack_trace
from experiments.run.prepare import prepare
from experiments.run.runner import run
from experiments.settings import plugins
from experiments.settings.cells import cells
from experiments.settings.load import load_settings
from experiments.settings.schema import SettingsError
from leakbed import contract_trials, provenance
from leakbed.contracts import BrokenPluginError
from leakbed.errors import came_to_nothing
from leakbed.plugins import own_class

ATTACK = '''
"""An attack of my own."""
from dataclasses import dataclass
from typing import ClassVar
import torch
import shade_of_mine
from leakbed.contracts import Evidence, Guess, Seat, ThreatModel, View


@dataclass(frozen=True, kw_only=True)
class Grey:
    """Guesses one grey."""

    name: ClassVar[str] = "mine-grey"
    source: ClassVar[str] = "own"
    grey: float = shade_of_mine.SHADE

    @property
    def threat(self) -> ThreatModel:
        """A server that reads smashed data."""
        return ThreatModel(seat=Seat.SERVER, evidence=frozenset({Evidence.SMASHED}))

    def run(self, view: View, *, seed: int) -> Guess:
        """Attack."""
        return Guess(images=torch.full((view.targets, 1, *view.image_shape), self.grey))
'''
DEFENSE = '''
"""A defence of my own."""
from dataclasses import dataclass
from typing import ClassVar
import torch
from leakbed.contracts import Defense, Protects


@dataclass(frozen=True, kw_only=True)
class RandomMask(Defense):
    """Zeroes entries at random."""

    name: ClassVar[str] = "random-mask"
    source: ClassVar[str] = "own"
    protects: ClassVar[frozenset[Protects]] = frozenset({Protects.SMASHED})
    share: float = 0.5

    def protect_smashed(self, state, smashed):
        """Drop entries."""
        draw = torch.rand(smashed.shape, generator=state.generator())
        return state, smashed * (draw >= self.share)
'''
TABLE: dict[str, Any] = {
    "name": "own",
    "data": {"name": "tests.support.tiny:images", "nodes": 2, "test": 0.2},
    "model": {"name": "tests.support.tiny:plain", "cut": 1},
    "protocol": {"name": "vanilla-split", "batch_size": 5, "local_steps": 2},
    "attack": [{"name": "grey_of_mine:Grey", "targets": 2}],
}


@pytest.fixture
def mine(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """Return a folder on the path with an attack, what it imports, and a defence."""
    folder = tmp_path / "mine"
    folder.mkdir()
    (folder / "grey_of_mine.py").write_text(ATTACK)
    (folder / "shade_of_mine.py").write_text("SHADE = 0.25\n")
    (folder / "mask_of_mine.py").write_text(DEFENSE)
    monkeypatch.syspath_prepend(str(folder))
    _as_in_a_new_process()
    return folder


def _as_in_a_new_process() -> None:
    provenance._FIRST.clear()
    own_class.cache_clear()
    plugins.own_fields.cache_clear()
    for name in [name for name in sys.modules if name.endswith("_of_mine")]:
        del sys.modules[name]
    importlib.invalidate_caches()


def test_an_attack_and_a_defense_run_by_import_path(mine: Path, tmp_path: Path) -> None:
    table = {**TABLE, "defense": [{"name": "none"}, {"name": "mask_of_mine:RandomMask"}]}
    table["attack"] = [{"name": "grey_of_mine:Grey", "grey": 0.75, "targets": 2}]
    cards = run(table, out=tmp_path / "out")
    assert [card.status for card in cards] == ["done", "done"]
    assert {card.attack for card in cards} == {"grey_of_mine:Grey"}
    assert [card.defense for card in cards] == ["none", "mask_of_mine:RandomMask"]
    assert json.loads(cards[0].model_dump_json())["settings"]["attack"]["own"] == {"grey": 0.75}
    trace, _ = sorted((tmp_path / "out" / "runs").glob("*/trace"))
    offline = attack_trace(
        trace,
        "grey_of_mine:Grey",
        settings={"targets": 2},
        out=tmp_path / "offline",
        model="tests.support.tiny:plain",
    )
    assert offline.attack == "grey_of_mine:Grey"


def test_the_types_of_its_settings_are_checked_whatever_they_are(mine: Path) -> None:
    text = ATTACK.replace("import ClassVar", "import ClassVar, Literal")
    field = "    shades: Literal['few', 'many'] = 'few'\n    grey: float"
    (mine / "typed_of_mine.py").write_text(text.replace("    grey: float", field))
    attack = {"name": "typed_of_mine:Grey", "targets": 2}
    load_settings({**TABLE, "attack": [{**attack, "shades": "many"}]})
    both = load_settings({**TABLE, "attack": [{**attack, "shades": ["few", "many"]}]})
    assert [each.own["shades"] for each in both.attack] == ["few", "many"]
    with pytest.raises(SettingsError, match=r"shades: Input should be 'few' or 'many' .got 'all'"):
        load_settings({**TABLE, "attack": [{**attack, "shades": "all"}]})


def test_a_comment_grants_no_labels(mine: Path) -> None:
    text = ATTACK.replace(
        "import shade_of_mine", "import shade_of_mine  # no Knowledge.KNOWN_LABELS"
    )
    (mine / "modest_of_mine.py").write_text(text)
    attack = {"name": "modest_of_mine:Grey", "targets": 2, "known_per_class": 1}
    with pytest.raises(SettingsError, match="known_per_class"):
        load_settings({**TABLE, "attack": [attack]})


@pytest.mark.parametrize("edited", ["grey_of_mine.py", "shade_of_mine.py"])
def test_an_edit_of_an_attack_or_of_what_it_imports_attacks_again_and_trains_nothing(
    mine: Path, tmp_path: Path, edited: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    other = {"name": "smashed-as-image", "targets": 2}
    table = {**TABLE, "attack": [*TABLE["attack"], other]}
    before = run(table, out=tmp_path / "out")
    (mine / edited).write_text((mine / edited).read_text() + "EDITED = True\n")
    _as_in_a_new_process()
    monkeypatch.setattr(executor, "train", pytest.fail)
    after = run(table, out=tmp_path / "out")
    assert [new.key == old.key for new, old in zip(after, before, strict=True)] == [False, True]


def test_an_edit_of_a_defense_trains_again(mine: Path, tmp_path: Path) -> None:
    table = {**TABLE, "defense": [{"name": "mask_of_mine:RandomMask"}]}
    run(table, out=tmp_path / "out")
    (mine / "mask_of_mine.py").write_text(DEFENSE + "EDITED = True\n")
    _as_in_a_new_process()
    run(table, out=tmp_path / "out")
    assert len(list((tmp_path / "out" / "runs").iterdir())) == 2


@pytest.mark.parametrize(
    ("table", "said"),
    [
        ({"name": "grey_of_mine:Gray"}, "did you mean 'Grey'"),
        ({"name": "no_such_module:Grey"}, "No module named 'no_such_module'"),
        ({"name": "grey_of_mine:Grey", "gray": 0.5}, "did you mean 'grey'"),
        ({"name": "grey_of_mine:Grey", "grey": "dark"}, "grey: Input should be a valid number"),
        (
            {"name": "mask_of_mine:RandomMask"},
            r"it is a defence; name it in a table \[\[defense\]\]",
        ),
        ({"name": "grey_of_mine:View"}, "has the methods of no attack"),
    ],
)
def test_what_cannot_be_used_is_named_before_training(
    mine: Path, table: dict[str, Any], said: str
) -> None:
    with pytest.raises(SettingsError, match=said):
        load_settings({**TABLE, "attack": [table]})


@pytest.mark.parametrize(
    ("old", "new", "said"),
    [
        ("(frozen=True, kw_only=True)", "", "it can be changed"),
        ("@dataclass(frozen=True, kw_only=True)\n", "", "it is no dataclass"),
        ("grey: float = shade_of_mine.SHADE", "grey: float", "setting grey has no default"),
        ('name: ClassVar[str] = "mine-grey"', 'name: ClassVar[str] = "dlm"', "the catalogue's own"),
        ('name: ClassVar[str] = "mine-grey"\n', "\n", "name is None"),
        ("grey: float =", "targets: int = 3; grey: float =", "is a key of every attack"),
        ("seat=Seat.SERVER", "active=True, seat=Seat.SERVER", "threat.active is True"),
        ("import torch\n", "import torch\n1 / 0\n", "ZeroDivisionError.*line 6"),
        ("return ThreatModel", "return repr  # ThreatModel", "threat is <built-in"),
    ],
)
def test_a_class_that_breaks_the_contract_is_refused_by_what_it_breaks(
    mine: Path, old: str, new: str, said: str
) -> None:
    assert old in ATTACK
    (mine / "grey_of_mine.py").write_text(ATTACK.replace(old, new, 1))
    with pytest.raises(SettingsError, match=said):
        load_settings(TABLE)


def test_what_is_tried_out_does_not_train(mine: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    table = {**TABLE, "defense": [{"name": "mask_of_mine:RandomMask"}]}
    (cell,) = cells(load_settings(table))
    prepared, tried = prepare(cell.training, root=None), list[object]()
    monkeypatch.setattr(executor, "refuse_breaches", tried.append)
    executor._try_out(prepared.settings)
    assert tried == [*prepared.defenses]
    assert tried[0] is not prepared.defenses[0]


def test_a_class_that_is_no_defense_is_refused_as_one(mine: Path) -> None:
    with pytest.raises(SettingsError, match="it is an attack"):
        load_settings({**TABLE, "defense": [{"name": "grey_of_mine:Grey"}]})


@pytest.mark.parametrize(
    ("answer", "said"),
    [
        ("raise IndexError('index 5')", r"raised IndexError: index 5 \(grey_of_mine.py, line 25\)"),
        (
            "return torch.zeros(2) @ torch.zeros(3)",
            r"raised RuntimeError: .*mine.py, line 25",
        ),
        ("return None", "returned None; return a leakbed.contracts.Guess"),
        ("return Guess(images=torch.zeros(view.targets, *view.image_shape))", r"\(2, 1, 6, 6\) wh"),
        (
            "return Guess(images=torch.zeros(2, 1, 1, 6, 6).numpy())",
            "a numpy.ndarray where",
        ),
    ],
)
def test_a_cell_that_fails_is_a_card_and_the_others_go_on(
    mine: Path, tmp_path: Path, answer: str, said: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    sound = "return Guess(images=torch.full((view.targets, 1, *view.image_shape), self.grey))"
    file = mine / "grey_of_mine.py"
    file.write_text(ATTACK.replace(sound, answer))
    table = {**TABLE, "attack": [*TABLE["attack"], {"name": "smashed-as-image", "targets": 2}]}
    failed, other = run(table, out=tmp_path / "out")
    assert (failed.status, other.status) == ("failed", "done")
    assert str(failed.why).startswith("the code of attack mine-grey (Grey) ")
    assert re.search(said, str(failed.why))
    assert came_to_nothing([failed.status, other.status]) == 1
    write_report(tmp_path / "out")
    with pytest.raises(BrokenPluginError, match=said):
        run({**table, "on_error": "stop"}, out=tmp_path / "out")
    monkeypatch.setattr(executor, "train", pytest.fail)
    (again, _) = run(table, out=tmp_path / "out")  # it is tried again: nothing remembers it
    assert again.status == "failed"
    (tmp_path / "out" / "cards" / f"{failed.key}.json").unlink()
    file.write_text(ATTACK)
    _as_in_a_new_process()
    assert [card.status for card in run(table, out=tmp_path / "out")] == ["done", "done"]


@pytest.mark.parametrize(
    ("answer", "said"),
    [
        (
            "return state, smashed[:, :1]",
            r"returned a tensor of shape \(5, 1, 4, 4\) where \(5, 4, ",
        ),
        ("return state, smashed.double()", "a tensor of torch.float64 for one of torch.float32"),
        ("return state, smashed / 0 * 0", "returned values that are not finite"),
        ("return state, None", "returned None where a torch tensor"),
        ("raise KeyError('epsilon')", r"raised KeyError: 'epsilon' \(mask_of_mine.py, line 20\)$"),
    ],
)
def test_a_defense_that_breaks_is_blamed_by_name(
    mine: Path, tmp_path: Path, answer: str, said: str
) -> None:
    sound = "draw = torch.rand(smashed.shape, generator=state.generator())"
    (mine / "mask_of_mine.py").write_text(DEFENSE.replace(sound, answer))
    table = {**TABLE, "defense": [{"name": "mask_of_mine:RandomMask"}, {"name": "none"}]}
    failed, other = run(table, out=tmp_path / "out")
    assert (failed.status, other.status) == ("failed", "done")
    assert str(failed.why).startswith("the code of defence random-mask (RandomMask) ")
    assert re.search(said, str(failed.why))


@pytest.mark.parametrize(
    ("hook", "answer", "said"),
    [
        (
            "TRAINING alter_images(self, state, images, rows)",
            "images[:, :, :2]",
            r"\(5, 1, 2, 6\)",
        ),
        ("TRAINING alter_images(self, state, images, rows)", "images / 0", "not finite"),
        ("TRAINING alter_images(self, state, images, rows)", "images.turn", "AttributeError"),
        (
            "TRAINING train_step(self, state, step)",
            "(state, step.output)",
            r"\(5, 4, 4, 4\)",
        ),
        ("TRAINING train_step(self, state, step)", "(state, 0.5)", "builtins.float"),
        (
            "TRAINING train_step(self, state, step)",
            "(state, step.output.sum() / 0)",
            "finite",
        ),
        (
            "CUT_GRADIENT protect_cut_gradient(self, state, gradient)",
            "(state, gradient[:1])",
            "1,",
        ),
        (
            "CUT_GRADIENT protect_cut_gradient(self, state, gradient)",
            "(state, gradient / 0)",
            "fin",
        ),
    ],
)
def test_a_defense_in_training_or_at_the_server_that_breaks_is_blamed_by_name(
    mine: Path, tmp_path: Path, hook: str, answer: str, said: str
) -> None:
    protects, _, method = hook.partition(" ")
    head = DEFENSE.replace("Protects.SMASHED", f"Protects.{protects}")
    head = head[: head.index("    def protect_smashed")]
    (mine / "mask_of_mine.py").write_text(f"{head}    def {method}:\n        return {answer}\n")
    (card,) = run({**TABLE, "defense": [{"name": "mask_of_mine:RandomMask"}]}, out=tmp_path / "out")
    assert card.status == "failed"
    assert str(card.why).startswith("the code of defence random-mask (RandomMask) ")
    assert re.search(said, str(card.why))


@pytest.mark.parametrize(
    ("answer", "said"),
    [
        ("{}", r"returned \[\] where \["),
        ("{name: each / 0 for name, each in after.items()}", "returned values that are not finite"),
        ("{name: each[:1] for name, each in after.items()}", "returned a tensor of shape"),
    ],
)
def test_a_defense_of_updates_that_breaks_is_blamed_by_name(
    mine: Path, tmp_path: Path, answer: str, said: str
) -> None:
    head = DEFENSE.replace("Protects.SMASHED", "Protects.UPDATE")
    head = head[: head.index("    def protect_smashed")]
    hook = "protect_update(self, state, before, after)"
    text = f"{head}    def {hook}:\n        return state, {answer}\n"
    (mine / "mask_of_mine.py").write_text(text)
    table = {**TABLE, "attack": [{"name": "constant-image", "targets": 2}]}
    table |= {"protocol": {"name": "fedavg", "batch_size": 5, "local_steps": 1}}
    (card,) = run({**table, "defense": [{"name": "mask_of_mine:RandomMask"}]}, out=tmp_path / "out")
    assert card.status == "failed"
    assert str(card.why).startswith("the code of defence random-mask (RandomMask) ")
    assert re.search(said, str(card.why))


@pytest.mark.parametrize(
    ("name", "old", "new", "said"),
    [
        ("grey", "self.grey)", "self.grey) + view.smashed.zero_().sum()", "changes smashed"),
        ("grey", "self.grey)", "COUNT.append(1) or len(COUNT))", "other images from one"),
        ("mask", "generator=state.generator()", "", "torch's global generator"),
        ("mask", "return state, smashed", "return state, smashed.mul_(2)", "changes the smashed"),
    ],
)
def test_a_breach_is_found_by_the_check_and_by_the_first_use(
    mine: Path, name: str, old: str, new: str, said: str
) -> None:
    name = {"grey": "grey_of_mine:Grey", "mask": "mask_of_mine:RandomMask"}[name]
    assert check_plugin(name) == []
    file = mine / f"{name.partition(':')[0]}.py"
    text = file.read_text().replace("@dataclass", "COUNT = []\n\n\n@dataclass", 1)
    assert old in text
    file.write_text(text.replace(old, new, 1))
    _as_in_a_new_process()
    contract_trials._TRIED.clear()
    (found, *_) = check_plugin(name)
    assert said in found
    stack = [{"name": name}] if name.startswith("mask") else [{"name": "none"}]
    (card,) = run({**TABLE, "defense": stack}, out=mine.parent / "out")
    assert card.status == "failed"
    assert said in str(card.why)
