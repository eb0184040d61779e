"""The node's app is the one every grid runs, and says how to get what it needs."""

import importlib
import sys

import pytest

from clients import node_app
from leakbed.testbed import MissingTestbedError


def test_is_the_app_of_all_grids() -> None:
    module = importlib.import_module("experiments.client_app")
    assert module.app is node_app


def test_a_missing_torch_names_the_command(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in [m for m in sys.modules if m.partition(".")[0] == "clients"]:
        monkeypatch.delitem(sys.modules, name)
    monkeypatch.delitem(sys.modules, "experiments.client_app", raising=False)
    monkeypatch.setitem(sys.modules, "leakbed.models", None)
    with pytest.raises(MissingTestbedError, match="make setup"):
        importlib.import_module("experiments.client_app")
