"""The one way a run of ours fails on the wire: it stops and says which node, what and why."""

_DIVERGED = "UnstableTrainingError: "  # a node's error crosses the wire as its name and its words


class NodeFailed(RuntimeError):  # noqa: N818  the name the design gives it
    """A node answered with an error, or not at all.

    Attributes:
        node: Partition id.
        message_type: Flower's message type.
        cause: What the node or the grid said.
    """

    def __init__(self, node: int, message_type: str, cause: str) -> None:
        """Say which exchange failed.

        Args:
            node: Partition id.
            message_type: Flower's message type.
            cause: What the node or the grid said.
        """
        super().__init__(f"node {node} failed on {message_type!r}: {cause}")
        self.node, self.message_type, self.cause = node, message_type, cause

    @property
    def diverged(self) -> bool:
        """Whether the node's training left the finite numbers, as it would if it were repeated."""
        return self.cause.startswith(_DIVERGED)

    def __reduce__(self) -> tuple[type["NodeFailed"], tuple[int, str, str]]:
        return type(self), (self.node, self.message_type, self.cause)


class NodeDiverged(NodeFailed):
    """What a node sent, or what the server computed from it, is not finite."""

    diverged = True
