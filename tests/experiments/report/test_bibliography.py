"""Every entry of the catalogue that has a source has a citation, and a run prints those it used."""

import re
import sys
from collections.abc import Callable
from types import ModuleType
from typing import Any

import pytest

from attacks import ADVERSARIES, ATTACKS, INTRUDERS
from defenses import DEFENSES
from experiments.report.bibliography import CITED, bibliography, entries, keys_of
from experiments.results.cards import Card
from leakbed.data import DATASETS
from leakbed.models import MODELS
from strategies import PROTOCOLS

MakeCard = Callable[..., Card]
KINDS: dict[str, Any] = {**ATTACKS, **ADVERSARIES, **INTRUDERS, **DEFENSES}


@pytest.mark.parametrize("name", KINDS)
def test_every_source_with_an_address_is_in_the_bibliography(name: str) -> None:
    source = KINDS[name].source
    assert len(keys_of(source)) == source.count("https://"), source
    assert keys_of(source) or source.startswith("own baseline")


def test_everything_else_of_the_catalogue_is_cited_by_keys_that_exist() -> None:
    assert set(CITED["protocols"]) == set(PROTOCOLS)
    assert set(CITED["data"]) == set(DATASETS)
    assert set(CITED["models"]) == set(MODELS)
    cited = {key for kind in CITED.values() for keys in kind.values() for key in keys}
    assert cited <= set(entries())
    used = cited | {key for kind in KINDS.values() for key in keys_of(kind.source)}
    assert set(entries()) == used  # an entry that nothing cites is left over


@pytest.mark.parametrize("key", entries())
def test_an_entry_is_whole(key: str) -> None:
    text = entries()[key]
    fields = dict(re.findall(r"^  (\w+) = \{(.*)\},$", text, re.M))
    assert {"author", "title", "year"} <= set(fields)
    assert len(fields) == text.count("\n") - 1  # no line that is no field
    assert text.count("{") == text.count("}")
    assert re.fullmatch(r"(19|20)\d\d", fields["year"])
    assert fields["year"] in key
    assert text.isascii()


def test_a_run_prints_what_it_used_and_says_for_what(make_card: MakeCard) -> None:
    stack = {"stack": [["smashed-noise", {}], ["nopeek", {}]]}
    settings = {"defense": stack, "data": {"public_from": "fashion-mnist"}}
    text = bibliography(
        [
            make_card(defense="smashed-noise+nopeek", settings=settings),
            make_card(attack="constant-image"),
        ]
    )
    assert re.findall(r"^@\w+\{([^,]+),", text, re.M) == [
        "erdogan2022unsplit",
        "gupta2018distributed",
        "he2019model",
        "lecun1998gradient",
        "raschka2018mlxtend",
        "titcombe2021practical",
        "vepakomma2020nopeek",
        "xiao2017fashion",
    ]
    assert "% For network mnistnet, attack unsplit.\n@inproceedings{erdogan2022unsplit," in text
    assert "No entry" not in text  # a baseline of the project's own needs none


def test_a_class_of_ones_own_brings_its_entry_or_is_named_as_lacking_one(
    make_card: MakeCard, monkeypatch: pytest.MonkeyPatch
) -> None:
    module = ModuleType("tests_cited")
    own = {"source": "unpublished", "bibtex": "@misc{me2026,\n  title = {Mine},\n}"}
    module.Cited = type("Cited", (), own)  # type: ignore[attr-defined]
    module.Bare = type("Bare", (), {"source": "unpublished"})  # type: ignore[attr-defined]
    monkeypatch.setitem(sys.modules, module.__name__, module)
    text = bibliography(
        [make_card(attack=f"tests_cited:{name}") for name in ("Cited", "Bare", "Gone")]
        + [make_card(data="elsewhere:rows")]
    )
    assert "% For attack tests_cited:Cited.\n@misc{me2026," in text
    assert text.endswith(
        "% No entry is known of: attack tests_cited:Bare, attack tests_cited:Gone, data set "
        "elsewhere:rows.\n"
    )
