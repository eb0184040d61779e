"""Looking up a class by key or by import path, and what shows of it without running it."""

from dataclasses import dataclass, replace
from pathlib import Path
from typing import ClassVar

import pytest

from attacks import ADVERSARIES, ATTACKS, INTRUDERS
from defenses import DEFENSES
from leakbed import plugins
from leakbed.contracts import BOTTOM, ThreatModel
from leakbed.lookup import ImportPathError
from leakbed.plugins import PluginError, form_breaches, own_class, picked, role_of

KINDS = [
    *(("attack", "attack", kind) for kind in ATTACKS.values()),
    *(("adversary", "attack", kind) for kind in ADVERSARIES.values()),
    *(("intruder", "attack", kind) for kind in INTRUDERS.values()),
    *(("defence", "defence", kind) for kind in DEFENSES.values()),
]


@pytest.mark.parametrize(
    ("role", "contract", "kind"), KINDS, ids=[kind.__name__ for _, _, kind in KINDS]
)
def test_every_class_of_the_catalogue_keeps_its_form(role: str, contract: str, kind: type) -> None:
    assert role_of(kind) == role
    assert form_breaches(kind, contract) == []  # type: ignore[arg-type]
    other = "defence" if contract == "attack" else "attack"
    assert form_breaches(kind, other)  # type: ignore[arg-type]


def test_a_key_is_the_catalogues_and_a_path_is_imported() -> None:
    assert picked("dlm", ATTACKS, "attack") is ATTACKS["dlm"]
    path = "attacks.baselines:ConstantImage"
    assert picked(path, ATTACKS, "attack") is ATTACKS["constant-image"]


def test_what_is_no_class_or_cannot_be_imported_is_named() -> None:
    with pytest.raises(PluginError, match="name a class"):
        own_class("math:pi", "attack")
    with pytest.raises(ImportPathError, match="no_such_module"):
        own_class("no_such_module:Grey", "attack")


def test_only_an_attack_on_a_run_that_is_over_has_kinds_of_its_own() -> None:
    @dataclass(frozen=True, kw_only=True)
    class Told(ADVERSARIES["fsha"]):  # type: ignore[misc]
        """An adversary that would be told the bottom."""

        name: ClassVar[str] = "told"

        @property
        def threat(self) -> ThreatModel:
            """One that needs what is granted of a finished run."""
            return replace(super().threat, needs=frozenset({BOTTOM}))

    (said,) = form_breaches(Told, "attack")
    assert said.startswith("it is an adversary and names bottom, which is granted of a run that is")


def test_what_packages_offer_is_read_once_until_another_is_installed(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    read: list[object] = []
    found = plugins.entry_points

    def counted() -> object:
        read.append(None)
        return found()

    monkeypatch.setattr(plugins, "entry_points", counted)
    monkeypatch.syspath_prepend(str(tmp_path))
    for group in plugins.GROUPS:
        assert "fresh-grey" not in plugins.installed(group)
    assert len(read) == 1
    about = tmp_path / "made"
    about.mkdir()
    (about / "METADATA").write_text("Metadata-Version: 2.1\nName: fresh\nVersion: 1.0\n")
    (about / "entry_points.txt").write_text("[leakbed.attacks]\nfresh-grey = fresh:Grey\n")
    about.rename(tmp_path / "fresh-1.0.dist-info")
    assert plugins.installed("attacks")["fresh-grey"].value == "fresh:Grey"
    assert len(read) == 2
