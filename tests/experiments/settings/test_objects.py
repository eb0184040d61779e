"""Objects in settings become names: the same as a file's where there are any."""

import sys
from dataclasses import dataclass, replace
from pathlib import Path
from types import ModuleType
from typing import Any, ClassVar

import numpy as np
import pytest
import torch
from torch import Tensor, nn

import strategies
from attacks.cosine_score import CosineScore
from attacks.unsplit import UnSplit
from defenses.smashed_noise import SmashedNoise
from experiments.run.runner import planned, run
from experiments.settings.load import load_settings
from experiments.settings.objects import named, refuse_elsewhere
from experiments.settings.schema import Settings, SettingsError
from leakbed.contracts import (
    Defense,
    DefenseState,
    Evidence,
    Guess,
    Knowledge,
    Protects,
    Seat,
    ThreatModel,
    View,
)
from leakbed.lookup import ImportPathError, import_object
from leakbed.objects import lent
from tests.support.tiny import images, plain

BASE: dict[str, Any] = {"name": "objects", "attack": [{"name": "constant-image"}]}


@dataclass(frozen=True, kw_only=True)
class Given(Defense):
    """Adds to smashed data what a layer of its own makes of nothing."""

    name: ClassVar[str] = "given"
    source: ClassVar[str] = "of the tests"
    protects: ClassVar[frozenset[Protects]] = frozenset({Protects.SMASHED})
    scale: float = 1.0
    layer: Any = None

    def protect_smashed(self, state: DefenseState, smashed: Tensor) -> tuple[DefenseState, Tensor]:
        return state, smashed * self.scale


def grey() -> type:
    """Return a label attack's class as a cell would define it."""

    @dataclass(frozen=True, kw_only=True)
    class Grey:
        name: ClassVar[str] = "cell-grey"
        source: ClassVar[str] = "of the tests"
        grey: float = 0.5

        @property
        def threat(self) -> ThreatModel:
            return ThreatModel(
                seat=Seat.CLIENT,
                evidence=frozenset({Evidence.CUT_GRADIENT}),
                needs=frozenset({Knowledge.KNOWN_LABELS}),
            )

        def run(self, view: View, *, seed: int) -> Guess:
            return Guess(labels=torch.zeros(view.targets, 1, dtype=torch.long))

    return Grey


def test_objects_of_catalogues_and_modules_are_their_names_and_settings() -> None:
    found = named(
        {
            "data": images,
            "model": {"name": plain, "cut": 1},
            "attack": [UnSplit, UnSplit(tv=0.2), {"name": CosineScore(), "targets": 3}],
            "defense": [{"name": "none"}, Given(scale=0.5), {"stack": [SmashedNoise(), Given]}],
        }
    )
    here = f"{Given.__module__}:Given"
    assert found == {
        "data": {"name": "tests.support.tiny:images"},
        "model": {"name": "tests.support.tiny:plain", "cut": 1},
        "attack": [
            {"name": "unsplit"},
            {"name": "unsplit", "tv": 0.2},
            {"name": "cosine-score", "targets": 3},
        ],
        "defense": [
            {"name": "none"},
            {"name": here, "scale": 0.5},
            {"stack": [{"name": "smashed-noise"}, {"name": here}]},
        ],
    }


def test_settings_of_the_catalogues_classes_are_plain() -> None:
    attack = UnSplit()  # whose types are checked in tests alone, and when it is made
    object.__setattr__(attack, "tv", np.float32(0.5))
    assert named({"attack": [attack]})["attack"] == [{"name": "unsplit", "tv": 0.5}]
    object.__setattr__(attack, "tv", torch.tensor(0.5))
    with pytest.raises(SettingsError, match=r"attack unsplit: tv is a torch\.Tensor.*\.item\(\)"):
        named({"attack": [attack]})


def test_what_a_file_can_hold_stays_as_it_is() -> None:
    table = {
        **BASE,
        "data": {"name": "mnist-5k"},
        "case": [{"name": "a", "model": {"cut": 1}}, {"name": "b", "model.cut": 2}],
        "sweep": {"data.nodes": [1, 2], "model.name": ["mlp2", "lenet"]},
        "model": 3,
        "defense": "none",
    }
    assert named(table) == table


def test_what_only_this_process_has_is_named_and_found_again() -> None:
    network, kind, layer = plain(), grey(), nn.Linear(2, 2)
    protocol = replace(strategies.PROTOCOLS["vanilla-split"])
    checked = load_settings(
        {
            "name": "objects",
            "data": images(),
            "model": {"name": network, "cut": 1},
            "protocol": protocol,
            "attack": [{"name": kind(grey=0.25), "known_per_class": 2}],
            "defense": [Given(layer=layer)],
            "sweep": {"model.name": [plain(), "tests.support.tiny:plain"]},
        }
    )
    assert import_object(checked.protocol.name) is protocol
    attack = checked.attack[0]
    assert import_object(attack.name) is kind
    assert (attack.own, attack.known_per_class) == ({"grey": 0.25}, 2)
    ((defense, own),) = checked.defense[0].stack
    made = import_object(defense)
    assert callable(made)
    assert (own, made().layer) == ({}, layer)
    assert all(map(lent, [[checked.data.name], [checked.model.name], [defense]]))
    assert len(lent(checked.sweep["model.name"])) == 1


def test_what_the_program_that_runs_defines_is_never_taken_for_what_it_was(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    script = ModuleType("__main__")
    monkeypatch.setitem(sys.modules, "__main__", script)
    kinds = []
    for value in (0.1, 0.9):  # the cell is run, edited and run again
        script.Grey = kind = grey()  # type: ignore[attr-defined]
        kind.shade = value  # type: ignore[attr-defined]
        checked = load_settings({**BASE, "attack": [{"name": "__main__:Grey"}]})
        kinds.append(import_object(checked.attack[0].name))
    assert [kind.shade for kind in kinds] == [0.1, 0.9]  # type: ignore[attr-defined]


@pytest.mark.parametrize(
    ("section", "value", "said"),
    [
        (
            "attack",
            [grey()],
            "attack: leakbed.objects:Grey_.* is a class that .* within a function",
        ),
        ("defense", [Given(layer=torch.ones(1))], "setting 'layer' is a torch.Tensor"),
        ("model", plain(), "model: leakbed.objects:Sequential_.*a network of this process"),
        ("data", images(), "data: leakbed.objects:data_.*write it to a module and give"),
        ("sweep", {"model.name": [plain()]}, "model: leakbed.objects:Sequential_"),
    ],
)
@pytest.mark.parametrize("shared", [{"grid": "ray"}, {"jobs": 2}, {"ray_address": "auto"}])
def test_other_processes_get_no_objects(
    section: str, value: object, said: str, shared: dict[str, Any], tmp_path: Path
) -> None:
    with pytest.raises(SettingsError, match=said):
        run({**BASE, **shared, section: value}, out=tmp_path / "never")
    assert not (tmp_path / "never").exists()
    refuse_elsewhere(load_settings({**BASE, section: value}))  # on one process they are welcome


def test_cells_of_handed_over_data_are_resumed_and_those_of_networks_are_not(
    tmp_path: Path,
) -> None:
    def keys(**parts: Any) -> set[str]:
        table = {**BASE, "data": images, "model": plain, "protocol": {"batch_size": 5}, **parts}
        return set(planned(load_settings(table), folder=tmp_path, root=None).cells)

    assert keys(data=images()) == keys(data=images())
    brighter = images()[0].sqrt(), images()[1]
    assert not keys(data=images()) & keys(data=brighter)
    network = plain()
    assert not keys(model=network) & keys(model=network)
    assert keys(attack=[UnSplit(tv=0.2)]) == keys(attack=[{"name": "unsplit", "tv": 0.2}])


def test_a_file_that_holds_an_objects_name_says_what_to_do(tmp_path: Path) -> None:
    file = tmp_path / "settings.toml"
    for name, said in (
        ("leakbed.objects:Grey_0f0f0f0f_1", "an object that another process was handed.*module"),
        ("__main__:Gone", "a name of the program that runs.*a module of its own"),
        ("<mine.Grey object at 0x7f>", "unknown attack '<mine.Grey object.*'package.module:Class'"),
    ):
        file.write_text(f'name = "a"\n[[attack]]\nname = "{name}"\n')
        with pytest.raises((SettingsError, ImportPathError), match=said):
            load_settings(file)


def test_checked_settings_are_checked_again_alike() -> None:
    checked = load_settings({**BASE, "model": plain(), "defense": [Given(layer=plain())]})
    assert isinstance(checked, Settings)
    assert load_settings(checked) == checked
