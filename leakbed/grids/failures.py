"""The one way a run of ours fails on the wire: it stops and says which node, what and why."""


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

    def __reduce__(self) -> tuple[type["NodeFailed"], tuple[int, str, str]]:
        return type(self), (self.node, self.message_type, self.cause)
