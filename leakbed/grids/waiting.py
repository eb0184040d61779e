"""Wait for replies by pulling, a little longer each time: Flower's own wait sleeps 3 s at a time.

In a deployment most of an exchange is the start of a process at the SuperNode (docs/decisions/0008).
"""

from collections.abc import Iterable, Sequence
from time import monotonic, sleep

from flwr.app import Message
from flwr.serverapp import Grid

_SHARE = 0.1  # of the time already waited, slept before the next look
_LONGEST = 0.25  # seconds; of one sleep


def wait_for(grid: Grid, ids: Iterable[str], *, timeout: float | None) -> list[Message]:
    """Pull until every message is answered, or time is up.

    Args:
        grid: Where the messages were pushed.
        ids: Theirs.
        timeout: Seconds to wait; None to wait as long as it takes.

    Returns:
        The replies that came, those of one look after another.
    """
    missing = set(ids)
    started, replies = monotonic(), list[Message]()
    while True:
        late = timeout is not None and monotonic() - started >= timeout
        replies += (came := list(grid.pull_messages(sorted(missing))))
        missing -= {reply.metadata.reply_to_message_id for reply in came}
        if late or not missing:
            return replies
        if getattr(grid, "pull_waits", False):
            continue
        pause = min(_LONGEST, (monotonic() - started) * _SHARE)
        if timeout is not None:
            pause = min(pause, max(0.0, started + timeout - monotonic()))
        sleep(pause)


def exchanged(grid: Grid, messages: Sequence[Message], *, timeout: float | None) -> list[Message]:
    """Send messages and return the replies that come in time, without Flower's long sleeps.

    Args:
        grid: Any.
        messages: At least one.
        timeout: Seconds to wait; None to wait as long as it takes.

    Returns:
        The replies; a message that could not be sent has none.
    """
    if not type(grid).__module__.startswith("flwr."):  # ours wait for events, not by the clock
        return list(grid.send_and_receive(messages, timeout=timeout))
    ids = [message_id for message_id in grid.push_messages(messages) if message_id]
    return wait_for(grid, ids, timeout=timeout)
