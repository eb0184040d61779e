"""The only file that touches Flower's internal API (flwr 1.41), and why.

Flower builds messages only inside its own runtimes: ``Message(...)`` reads ``TaskIdentity``, and a
message gets its id from the SuperLink. A grid of our own must do both.
"""

from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from typing import Any, TypeVar

from flwr.app import ArrayRecord, ConfigRecord, Message, Metadata, MetricRecord, RecordDict
from flwr.clientapp import ClientApp
from flwr.clientapp.typing import Mod

Record = TypeVar("Record", RecordDict, ArrayRecord, ConfigRecord, MetricRecord)


class FlowerMovedError(RuntimeError):
    """Flower's internal API is not the one this file was written for."""

    def __init__(self, what: str) -> None:
        """Say what moved.

        Args:
            what: The part of Flower that is not where 1.41 has it.
        """
        super().__init__(f"{what} is not what it was in flwr 1.41; install flwr>=1.41,<1.42")


try:
    from flwr.app.constants import DEFAULT_TTL
    from flwr.common.constant import SUPERLINK_NODE_ID, ErrorCode
    from flwr.supercore.differential_privacy import KEY_CLIPPING_NORM
    from flwr.supercore.task_identity import TaskIdentity
except ImportError as error:
    raise FlowerMovedError(str(error)) from error

CLIENT_RAISED = int(ErrorCode.CLIENT_APP_RAISED_EXCEPTION)
NODE_UNAVAILABLE = int(ErrorCode.NODE_UNAVAILABLE)
USUAL_TTL = float(DEFAULT_TTL)  # seconds, of a message that names none
CLIPPING_NORM = str(KEY_CLIPPING_NORM)  # where wrappers tell Flower's clipping mods their norm

_IDENTITY = {"_run_id": 0, "_task_id": 0, "_node_id": SUPERLINK_NODE_ID}


@contextmanager
def task_identity() -> Iterator[None]:
    """Let this process create messages, and restore its identity on leaving.

    Inside ``flwr run`` the identity is already set and stays as it is.

    Raises:
        FlowerMovedError: If flwr no longer keeps its identity where 1.41 does.
    """
    if not all(hasattr(TaskIdentity, name) for name in _IDENTITY):
        raise FlowerMovedError("flwr.supercore.task_identity.TaskIdentity")
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


def mods_of(app: ClientApp) -> tuple[Mod, ...]:
    """Return the mods that Flower puts around each handler registered on an app.

    Args:
        app: Any.

    Returns:
        In the order they are called in.

    Raises:
        FlowerMovedError: If flwr no longer keeps them where 1.41 does.
    """
    mods = app.__dict__.get("_mods")
    if not isinstance(mods, list):
        raise FlowerMovedError("flwr.clientapp.ClientApp")
    return tuple(mods)


def set_message_id(message: Message, message_id: str) -> None:
    """Give a message the id a SuperLink would have given it.

    Args:
        message: Changed in place, as Flower's grids do.
        message_id: Unique within the run.

    Raises:
        FlowerMovedError: If flwr no longer keeps the id where 1.41 does.
    """
    message.metadata.__dict__["_message_id"] = message_id
    if message.metadata.message_id != message_id:
        raise FlowerMovedError("flwr.app.Metadata")


def with_content(message: Message, content: RecordDict) -> Message:
    """Return a message with the same metadata and other records.

    Args:
        message: Never changed.
        content: The new message's records.

    Returns:
        A new message that answers, or is answered, as the given one.
    """
    return assembled(message.metadata, content)


def assembled(metadata: Metadata, content: RecordDict) -> Message:
    """Return the message of these metadata and records, as it was before they travelled apart.

    Args:
        metadata: Becomes the message's own.
        content: Its records.

    Returns:
        The message.

    Raises:
        FlowerMovedError: If flwr no longer takes metadata as 1.41 does.
    """
    try:
        message: Message = Message(content=content, metadata=metadata)  # type: ignore[call-overload]
    except TypeError as error:
        raise FlowerMovedError(f"flwr.app.Message ({error})") from error
    return message


def filled(record: Record, items: Mapping[str, Any]) -> Record:
    """Fill a new record with what a record of its kind may hold, without Flower's look at each.

    Those looks are the largest single cost of a short message. For what was in a record before, or
    was made to be in one; anything else goes through the record itself.

    Args:
        record: Empty.
        items: Become its own.

    Returns:
        The same record.

    Raises:
        FlowerMovedError: If flwr no longer keeps items where 1.41 does.
    """
    held = record.__dict__.get("_data")
    if not isinstance(held, dict):
        raise FlowerMovedError(f"flwr.app.{type(record).__name__}")
    held.update(items)
    return record
