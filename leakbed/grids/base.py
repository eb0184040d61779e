"""What the grids of our own share: nodes known from the start, and no Flower run behind them.

A :class:`NodeHost` owns the contexts of some nodes and runs a ClientApp on their messages. Its
contexts are sticky: what a handler keeps in ``context.live`` is still there at the next message,
so models and data need not be rebuilt. On Flower's runtimes contexts have no such attribute. A node
that keeps nothing alive is its ``context.state`` alone, and may go on in any other host.

A node that fails ends the run with a :class:`NodeFailed`, which says which node, what and why.

Replies of Flower's grids are waited for by pulling, a little longer each time, as Flower's own wait
sleeps 3 s at a time. In a deployment most of an exchange is a process that the SuperNode starts
(docs/decisions/0008). Flower's own pull also waits inside the call, up to three minutes, for what a
node announced and has not uploaded yet. So each reply is pulled in a thread of its own, and only
its own node waits.
"""

import re
from collections.abc import Iterable, Mapping, Sequence
from concurrent.futures import Future, wait
from itertools import count
from threading import Thread
from time import monotonic, sleep
from typing import Any, NoReturn
from weakref import WeakKeyDictionary

from flwr.app import Context, Error, Message, RecordDict
from flwr.clientapp import ClientApp
from flwr.serverapp import Grid

from leakbed.errors import no_memory
from leakbed.flower_internals import CLIENT_RAISED, NODE_UNAVAILABLE, set_message_id
from leakbed.wire.bounds import Asked, Bounds
from leakbed.wire.calls import Answer, Failure, Handler, handler_of, kinds_of
from leakbed.wire.fields import Carried
from leakbed.wire.records import WireError, shortened

_RUN_ID = 1


class StickyContext(Context):
    """A node's context, with memory that lives as long as the node stays in this process.

    Attributes:
        live: Anything the node's handlers keep between messages; never sent or stored. Empty, it
            says that all the node must remember is in its ``state``.
    """

    def __init__(
        self, node_id: int, partition: int, partitions: int, *, state: RecordDict | None = None
    ) -> None:
        """Make the context of one node.

        Args:
            node_id: Flower's id of the node.
            partition: The node's identity.
            partitions: How many nodes there are.
            state: What the node remembers; None for a new one.
        """
        super().__init__(
            run_id=_RUN_ID,
            node_id=node_id,
            node_config={"partition-id": partition, "num-partitions": partitions},
            state=RecordDict() if state is None else state,
            run_config={},
        )
        self.live: dict[str, Any] = {}


def node_ids(partitions: int) -> dict[int, int]:
    """Return the roster of a grid of ours; node ids start at 1, as Flower takes 0 for none."""
    return {partition + 1: partition for partition in range(partitions)}


class NodeHost:
    """Runs a ClientApp for the nodes that live in this process."""

    def __init__(self, app: ClientApp, roster: Mapping[int, int]) -> None:
        """Host nodes.

        Args:
            app: The app every node runs.
            roster: Partition id by node id, of all nodes of the grid.
        """
        self._app = app
        self._roster = roster
        self._contexts: dict[int, StickyContext] = {}

    def settle(self, node_id: int, state: RecordDict) -> None:
        """Take in a node that was elsewhere."""
        self._contexts[node_id] = StickyContext(
            node_id, self._roster[node_id], len(self._roster), state=state
        )

    def depart(self, node_id: int) -> RecordDict | None:
        """Let a node go that keeps nothing alive.

        Args:
            node_id: Of a node here.

        Returns:
            All it remembers; None if it must stay, with what it keeps in ``live``.
        """
        if self._contexts[node_id].live:
            return None
        state: RecordDict = self._contexts.pop(node_id).state
        return state

    @property
    def kinds(self) -> frozenset[str]:
        """Types of messages whose requests the nodes also take by themselves."""
        return kinds_of(self._app)

    def handler(self, kind: str) -> Handler | None:
        """Return what the nodes do with requests of a type; None where they take messages alone."""
        return handler_of(self._app, kind)

    def call(self, node_id: int, handler: Handler, request: Carried) -> Answer:
        """Hand a request to a node; an exception becomes a failure, in the words of :meth:`handle`.

        Args:
            node_id: One of the roster's.
            handler: From :meth:`handler`.
            request: As handed over.

        Returns:
            The reply, as handed over.
        """
        try:
            return handler(request, self._context(node_id)).handed_over()
        except Exception as error:  # noqa: BLE001  reported to the server, as Flower does
            return Failure(describe(error))

    def handle(self, message: Message) -> Message:
        """Run the app on one message; an exception becomes an error reply, as in Flower.

        Args:
            message: To one of the roster's nodes; the host's own copy.

        Returns:
            The reply.
        """
        context = self._context(message.metadata.dst_node_id)
        try:
            return self._app(message, context)
        except Exception as error:  # noqa: BLE001  reported to the server, as Flower does
            return Message(Error(CLIENT_RAISED, describe(error)), reply_to=message)

    def _context(self, node_id: int) -> StickyContext:
        """Return a node's context; nodes come to life with their first message."""
        if node_id not in self._contexts:
            self.settle(node_id, RecordDict())
        return self._contexts[node_id]


def refused(message: Message, error: WireError) -> Message:
    """Return the error reply that takes the place of one that the plan does not allow."""
    return Message(Error(CLIENT_RAISED, refusal(error)), reply_to=message)


def refusal(error: WireError) -> str:
    """Say that a reply was not read, and why."""
    return f"refused, unread: {error}"


def unavailable(message: Message, reason: str) -> Message:
    """Return the error reply of a node that cannot answer a message."""
    return Message(Error(NODE_UNAVAILABLE, reason), reply_to=message)


def expired(message: Message) -> Message:
    """Return the error reply to a message whose time to live has passed."""
    return unavailable(message, lateness(message.metadata.ttl))


def lateness(seconds: float) -> str:
    """Say that a node took longer than it may."""
    return f"no reply within {seconds:g} s"


def describe(error: BaseException) -> str:
    """Say an exception in 1,000 characters, with the place that raised it."""
    trace = error.__traceback__
    while trace is not None and trace.tb_next is not None:
        trace = trace.tb_next
    name = trace.tb_frame.f_code.co_filename.rpartition("/")[2] if trace else "?"
    place = f"({name}, line {trace.tb_lineno if trace else 0})"
    return f"{shortened(f'{type(error).__name__}: {error}')} {place}"


class MessageIds:
    """Numbers messages as a SuperLink would."""

    def __init__(self, prefix: str) -> None:
        """Start counting.

        Args:
            prefix: Keeps the ids of several grids apart.
        """
        self._prefix, self._numbers = prefix, count()

    def stamp(self, message: Message) -> str:
        """Give a message the next id and return it."""
        message_id = self.fresh()
        set_message_id(message, message_id)
        return message_id

    def fresh(self) -> str:
        """Return the next id."""
        return f"{self._prefix}-{next(self._numbers)}"


class ResidentGrid(Grid):
    """A Flower grid whose nodes this process started; subclasses say where they run.

    Attributes:
        roster: Partition id by Flower node id.
        pull_waits: Whether ``pull_messages`` waits for a reply by itself.
        bounds: What replies may be, as far as whoever uses the grid has said so.
    """

    pull_waits = True

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
        self.bounds = Bounds()

    def bound_by(self, bounds: Bounds) -> None:
        """Take from now on no replies but those that a plan allows.

        A typed call's are refused here, before anybody sees them, a message's where they are copied
        or else where they are read.
        """
        self.bounds = bounds

    def allowed(self, asked: Asked, reply: Answer) -> Answer:
        """Return a typed call's reply, or a failure if it is one that the plan does not allow."""
        if not isinstance(reply, Failure):
            try:
                self.bounds.refuse_answer(asked, reply)
            except WireError as error:
                return Failure(refusal(error))
        return reply

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


_WHERE = re.compile(r" \(contract_checks\.py, line \d+\).*$")
_DIVERGED = "left the finite numbers"  # nodes' own words: each runtime wraps them in its own way
BROKEN = "the code of defence"  # likewise
UNFIT_BOTTOM = "the bottom it was sent does not fit"  # likewise
_LESS_MEMORY = (
    "; set a smaller protocol.batch_size, smaller images (data.image_size) or, on Ray, fewer "
    "workers with a larger gpus_per_worker; finished cells stay"
)


class NodeFailed(RuntimeError):  # noqa: N818  the name the design gives it
    """A node answered with an error, or not at all.

    Attributes:
        node: Partition id.
        message_type: Flower's message type.
        cause: What the node or the grid said; the first 1,000 characters of more.
    """

    def __init__(self, node: int, message_type: str, cause: str | None) -> None:
        """Say which exchange failed.

        Args:
            node: Partition id.
            message_type: Flower's message type.
            cause: What the node or the grid said; None where it gave no reason.
        """
        cause = shortened(cause)
        remedy = _LESS_MEMORY if no_memory(cause) else ""
        super().__init__(f"node {node} failed on {message_type!r}: {cause}{remedy}")
        self.node, self.message_type, self.cause = node, message_type, cause

    @property
    def diverged(self) -> bool:
        """Whether the node's training left the finite numbers, as it would if it were repeated."""
        return _DIVERGED in self.cause

    @property
    def broken_plugin(self) -> str | None:
        """What a defence at the node did wrong, in its own words; None where it was no defence."""
        _, found, said = self.cause.partition(BROKEN)
        if not found or not said.strip():
            return None
        line = said.splitlines()[0]
        return f"{BROKEN}{_WHERE.sub('', line)}"  # the place in our file, behind that in theirs

    @property
    def refuses_bottom(self) -> bool:
        """Whether the node says that the bottom it was to go on from is not whole or not sound."""
        return UNFIT_BOTTOM in self.cause

    def __reduce__(self) -> tuple[type["NodeFailed"], tuple[int, str, str]]:
        return type(self), (self.node, self.message_type, self.cause)


class NodeDiverged(NodeFailed):
    """What a node sent, or what the server computed from it, is not finite."""

    diverged = True


_SHARE = 0.1  # of the time already waited, slept before the next look
_LONGEST = 0.25  # seconds; of one sleep
_LOOK = 1.0  # seconds a look waits for pulls that it started; most end within milliseconds
_Pull = Future[list[Message]]

# By grid and message: a pull that took longer than its look is asked for by the next.
_pulls: WeakKeyDictionary[Grid, dict[str, _Pull]] = WeakKeyDictionary()


def pulled(grid: Grid, ids: Iterable[str]) -> list[Message]:
    """Look once for replies; of a grid of Flower's, without waiting for what is not uploaded."""
    if not _is_flowers(grid):
        return list(grid.pull_messages(ids))
    wanted, running = list(ids), _pulls.setdefault(grid, {})
    started = {i: _started(grid, i) for i in wanted if i not in running}
    running |= started
    wait(started.values(), timeout=_LOOK)
    done = [i for i in wanted if running[i].done()]
    return [reply for i in done for reply in running.pop(i).result()]


def _started(grid: Grid, message_id: str) -> _Pull:
    """Start to pull one reply; a thread that nobody waits for ends with the process."""
    pull: _Pull = Future()

    def run() -> None:
        try:
            pull.set_result(list(grid.pull_messages([message_id])))
        except BaseException as error:  # noqa: BLE001  raised again by who looks
            pull.set_exception(error)

    Thread(target=run, daemon=True).start()
    return pull


def _is_flowers(grid: Grid) -> bool:
    return type(grid).__module__.startswith("flwr.")


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
        replies += (came := pulled(grid, sorted(missing)))
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
    if not _is_flowers(grid):  # ours wait for events, not by the clock
        return list(grid.send_and_receive(messages, timeout=timeout))
    ids = [message_id for message_id in grid.push_messages(messages) if message_id]
    return wait_for(grid, ids, timeout=timeout)
