import copy
import inspect
from typing import Any

import pytest
from flwr.serverapp import Grid

from leakbed.tap.wiretap import GridWrapper, Wiretap


class Spy(Grid):
    """A grid that notes how it was called."""

    extra = "a grid's own attribute"

    def __init__(self) -> None:
        self.calls: list[Any] = []

    def set_run(self, run: Any) -> None:
        self.calls.append(("set_run", run))

    @property
    def run(self) -> Any:
        return "the run"

    def create_message(self, *args: Any, **kwargs: Any) -> Any:
        return ("create_message", args, kwargs)

    def get_node_ids(self) -> Any:
        return [4, 2]

    def get_nodes(self) -> Any:
        return ["a node"]

    def push_messages(self, messages: Any) -> Any:
        return ("push", messages)

    def pull_messages(self, message_ids: Any) -> Any:
        return ("pull", message_ids)

    def send_and_receive(self, messages: Any, *, timeout: float | None = None) -> Any:
        return ("send", messages, timeout)


def test_everything_reaches_the_wrapped_grid() -> None:
    spy = Spy()
    grid: Any = GridWrapper(spy)
    grid.set_run(7)
    assert spy.calls == [("set_run", 7)]
    assert grid.run == "the run"
    assert grid.create_message(1, x=2) == ("create_message", (1,), {"x": 2})
    assert grid.get_node_ids() == [4, 2]
    assert grid.get_nodes() == ["a node"]
    assert grid.push_messages([1]) == ("push", [1])
    assert grid.pull_messages(["a"]) == ("pull", ["a"])
    assert grid.send_and_receive([1], timeout=3.0) == ("send", [1], 3.0)
    assert grid.extra == "a grid's own attribute"


def test_wrappers_stack() -> None:
    tap: Any = Wiretap(GridWrapper(Spy()))
    assert isinstance(tap, Grid)
    assert tap.extra == "a grid's own attribute"
    assert tap.get_node_ids() == [4, 2]


def test_what_nobody_has_is_an_attribute_error() -> None:
    grid: Any = GridWrapper(Spy())
    with pytest.raises(AttributeError, match="'Spy' object has no attribute 'nonsense'"):
        _ = grid.nonsense
    assert not hasattr(grid, "nonsense")


def test_no_method_of_flowers_grid_falls_through_to_its_default() -> None:
    """A method Flower gives a default would hide the wrapped grid's own."""
    public = {name for name, _ in inspect.getmembers(Grid) if not name.startswith("_")}
    assert public <= set(vars(GridWrapper))


def test_a_wrapper_can_be_copied() -> None:
    spy = Spy()
    copied: Any = copy.copy(Wiretap(spy))
    assert copied.get_node_ids() == [4, 2]
    assert copied._grid is spy
    with pytest.raises(AttributeError, match="_nonsense"):
        _ = copied._nonsense
