"""What the grids of our own share: nodes known from the start, and no Flower run behind them."""

from collections.abc import Iterable
from typing import Any, NoReturn

from flwr.app import Message
from flwr.serverapp import Grid

from leakbed.grids.nodes import node_ids


class ResidentGrid(Grid):
    """A Flower grid whose nodes this process started; subclasses say where they run.

    Attributes:
        roster: Partition id by Flower node id.
    """

    def __init__(self, nodes: int) -> None:
        """Name the nodes.

        Args:
            nodes: How many there are.

        Raises:
            ValueError: If there is no node.
        """
        if nodes < 1:
            raise ValueError(f"a grid needs at least one node, got nodes={nodes}")
        self.roster = node_ids(nodes)

    def set_run(self, run: Any) -> None:  # noqa: ANN401  Flower's Run moved between versions
        """Do nothing: there is only one run."""

    @property
    def run(self) -> NoReturn:
        """There is no Flower run behind this grid.

        Raises:
            AttributeError: Always.
        """
        raise AttributeError(f"a {type(self).__name__} has no Flower run")

    def create_message(self, *args: Any, **kwargs: Any) -> Message:  # noqa: ANN401
        """Create a message (deprecated by Flower; use ``Message``)."""
        return Message(*args, **kwargs)

    def get_node_ids(self) -> Iterable[int]:
        """Return the nodes, by partition."""
        return list(self.roster)
