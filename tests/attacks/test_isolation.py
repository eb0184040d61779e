"""Every attack, passive or active, runs where neither data nor the truth can be had."""

import subprocess
import sys
from pathlib import Path

import pytest

from attacks import ADVERSARIES, ATTACKS, INTRUDERS

FENCE = """
import sys
import importlib.abc

FORBIDDEN = ("leakbed.data", "leakbed.oracle", "leakbed.wire", "leakbed.grids", "flwr", "ray")

class Refuse(importlib.abc.MetaPathFinder):
    def find_spec(self, name, path=None, target=None):
        if name in FORBIDDEN or name.startswith(tuple(f + "." for f in FORBIDDEN)):
            raise ImportError(f"an attack imported {name}")

sys.meta_path.insert(0, Refuse())
import sklearn.cluster  # reads files of its own when it is first imported
from attacks import ADVERSARIES, ATTACKS, INTRUDERS
from tests.support.adversary_views import answers
from tests.support.intruder_views import played
from tests.support.attack_views import quick_attack, view_for

ready = {name: (quick_attack(name), view_for(quick_attack(name))) for name in sorted(ATTACKS)}

OWN = (".py", ".pyc", "/proc/self/maps")  # the last: threadpoolctl asks which libraries are loaded

MACHINE = ("/sys/", "/proc/")  # where libraries ask how many processors there are

def refuse(event, arguments):
    name = str(arguments[0]) if event == "open" else ""
    if name and not name.endswith(OWN) and not name.startswith(MACHINE):
        raise PermissionError(f"an attack opened {arguments[0]}")

sys.addaudithook(refuse)

def fenced(name, act):
    try:
        act()
    except Exception as error:
        print(name, "|", error)
    else:
        print(name, "| ran")
"""

ATTACKING = """
for name, (attack, view) in ready.items():
    fenced(name, lambda: attack.run(view, seed=0))
for name in ADVERSARIES:
    fenced(name, lambda: answers(name))
for name in INTRUDERS:
    fenced(name, lambda: played(name))
"""

TRESPASSING = """
fenced("oracle", lambda: __import__("leakbed.oracle"))
fenced("flower", lambda: __import__("flwr"))
fenced("file", lambda: open("private.npy"))
"""


@pytest.fixture(scope="module")
def became() -> dict[str, str]:
    """What became of every act in a fenced process."""
    done = subprocess.run(  # noqa: S603  our own interpreter on our own code
        [sys.executable, "-c", FENCE + ATTACKING + TRESPASSING],
        cwd=Path(__file__).parents[2],
        capture_output=True,
        text=True,
        check=True,
    )
    return dict(line.split(" | ", 1) for line in done.stdout.splitlines())


def test_no_attack_needs_data_or_flower(became: dict[str, str]) -> None:
    ran = {name for name, end in became.items() if end == "ran"}
    assert ran == {*ATTACKS, *ADVERSARIES, *INTRUDERS}


def test_the_fence_holds(became: dict[str, str]) -> None:
    for name in ("oracle", "flower", "file"):
        assert "an attack" in became[name]
