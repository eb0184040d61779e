"""The template: what it forbids the browser, and that it is one page for paper and phone."""

import re

import pytest
from jinja2 import Environment, StrictUndefined, UndefinedError, meta

from experiments.report.template import PAGE, STYLE


def test_the_browser_is_told_to_load_nothing() -> None:
    policy = re.search(r'Content-Security-Policy"\s+content="([^"]+)"', PAGE)
    assert policy
    assert policy[1] == "default-src 'none'; img-src data:; style-src 'unsafe-inline'"
    assert "url(" not in STYLE
    assert "@import" not in STYLE


def test_every_class_used_is_styled_or_a_hook() -> None:
    used = {name for group in re.findall(r'class="([a-z ]+)"', PAGE) for name in group.split()}
    assert {name for name in used if f".{name}" not in STYLE} <= {"scores"}


def test_what_is_folded_away_on_a_screen_is_printed() -> None:
    paper = STYLE[STYLE.index("@media print") :]
    assert re.search(r"details.part::details-content \{[^}]*content-visibility: visible", paper)
    assert "display: none" not in paper


def test_both_schemes_define_the_same_colours() -> None:
    light, dark = re.findall(r":root \{([^}]+)\}", STYLE)
    names = [set(re.findall(r"--[a-z-]+(?=:)", block)) for block in (light, dark)]
    assert names[0] == names[1]
    assert set(re.findall(r"var\((--[a-z-]+)\)", STYLE)) <= names[0]


def test_a_forgotten_value_is_an_error_not_a_blank() -> None:
    environment = Environment(autoescape=True, undefined=StrictUndefined)
    assert "sentences" in meta.find_undeclared_variables(environment.parse(PAGE))
    with pytest.raises(UndefinedError):
        environment.from_string(PAGE).render()
