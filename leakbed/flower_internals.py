"""The only file that touches Flower's internal API (flwr 1.41), and why.

Flower builds messages only inside its own runtimes: ``Message(...)`` reads ``TaskIdentity``, and a
message gets its id from the SuperLink. A grid of our own must do both.
"""

from collections.abc import Iterator
from contextlib import contextmanager

from flwr.app import Message, RecordDict
from flwr.common.constant import SUPERLINK_NODE_ID, ErrorCode
from flwr.supercore.task_identity import TaskIdentity

CLIENT_RAISED = int(ErrorCode.CLIENT_APP_RAISED_EXCEPTION)
NODE_UNAVAILABLE = int(ErrorCode.NODE_UNAVAILABLE)

_IDENTITY = {"_run_id": 0, "_task_id": 0, "_node_id": SUPERLINK_NODE_ID}


class FlowerMovedError(RuntimeError):
    """Flower's internal API is not the one this file was written for."""


@contextmanager
def task_identity() -> Iterator[None]:
    """Let this process create messages, and restore its identity on leaving.

    Inside ``flwr run`` the identity is already set and stays as it is.

    Raises:
        FlowerMovedError: If flwr no longer keeps its identity where 1.41 does.
    """
    if not all(hasattr(TaskIdentity, name) for name in _IDENTITY):
        raise FlowerMovedError(
            "flwr.supercore.task_identity.TaskIdentity changed; install flwr>=1.41,<1.42"
        )
    unset = {
        name: value for name, value in _IDENTITY.items() if getattr(TaskIdentity, name) is None
    }
    for name, value in unset.items():
        setattr(TaskIdentity, name, value)
    try:
        yield
    finally:
        for name in unset:
            setattr(TaskIdentity, name, None)


def set_message_id(message: Message, message_id: str) -> None:
    """Give a message the id a SuperLink would have given it.

    Args:
        message: Changed in place, as Flower's grids do.
        message_id: Unique within the run.
    """
    message.metadata.__dict__["_message_id"] = message_id


def with_content(message: Message, content: RecordDict) -> Message:
    """Return a message with the same metadata and other records.

    Args:
        message: Never changed.
        content: The new message's records.

    Returns:
        A new message that answers, or is answered, as the given one.
    """
    return Message(content=content, metadata=message.metadata)  # type: ignore[call-overload,no-any-return]
