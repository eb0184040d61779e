"""A grid around a grid: delegation that every wrapper shares."""

from collections.abc import Iterable
from typing import Any

from flwr.app import Message
from flwr.serverapp import Grid


class GridWrapper(Grid):
    """A Flower grid that passes everything on to the one it wraps, until overridden."""

    def __init__(self, grid: Grid) -> None:
        """Wrap a grid.

        Args:
            grid: Any Flower grid.
        """
        self._grid = grid

    def __getattr__(self, name: str) -> Any:  # noqa: ANN401  whatever the wrapped grid has
        """Delegate what this class does not define."""
        return getattr(self.__dict__["_grid"], name)

    def set_run(self, run: Any) -> None:  # noqa: ANN401  Flower's Run moved between versions
        """Set the wrapped grid's run."""
        self._grid.set_run(run)

    @property
    def run(self) -> Any:  # noqa: ANN401
        """The wrapped grid's run."""
        return self._grid.run

    def create_message(self, *args: Any, **kwargs: Any) -> Message:  # noqa: ANN401
        """Create a message as the wrapped grid does (deprecated by Flower)."""
        return self._grid.create_message(*args, **kwargs)

    def get_node_ids(self) -> Iterable[int]:
        """Return the wrapped grid's nodes."""
        return self._grid.get_node_ids()

    def get_nodes(self) -> Iterable[Any]:
        """Return what the wrapped grid knows of its nodes."""
        return self._grid.get_nodes()

    def push_messages(self, messages: Iterable[Message]) -> Iterable[str]:
        """Push messages through the wrapped grid."""
        return self._grid.push_messages(messages)

    def pull_messages(self, message_ids: Iterable[str]) -> Iterable[Message]:
        """Pull replies through the wrapped grid."""
        return self._grid.pull_messages(message_ids)

    def send_and_receive(
        self, messages: Iterable[Message], *, timeout: float | None = None
    ) -> Iterable[Message]:
        """Exchange messages through the wrapped grid."""
        return self._grid.send_and_receive(messages, timeout=timeout)
