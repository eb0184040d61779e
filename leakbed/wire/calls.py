"""Typed calls: a request handed to a node's handler as it is, and its reply handed back.

A message of ours can travel as Flower's message, in records of bytes, or go from hand to hand where
strategy and node meet on a grid of our own. Both ends are written once, for requests and replies
themselves: :func:`serve` puts a handler of those behind a ClientApp's messages, and
:func:`handler_of` finds it again for a grid that can call it.

A call is never made past anybody. A grid that can make one offers it itself
(:func:`offers_calls`); a wrapper of a stranger's, a subclass, or a grid whose methods were replaced
offers none, and gets messages. So does a node whose app has a mod, or a lifespan, that knows
messages alone.
"""

from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from typing import TYPE_CHECKING, Any, TypeAlias, TypeVar
from weakref import WeakKeyDictionary

from flwr.app import Context, Message
from flwr.clientapp import ClientApp

from leakbed.flower_internals import is_plain, mods_of
from leakbed.wire.fields import Carried

if TYPE_CHECKING:
    from flwr.clientapp.typing import ClientAppCallable, Mod


@dataclass(frozen=True)
class Failure:
    """A typed call without a reply.

    Attributes:
        reason: What the node or the grid says went wrong.
    """

    reason: str


Answer: TypeAlias = Carried | Failure
Wait: TypeAlias = Callable[[], Answer]
"""Waits for the answer to one request; called once."""
Handler: TypeAlias = Callable[[Any, Context], Carried]
"""What a node does with a request; its argument is of the class its type of message has."""
GridType = TypeVar("GridType", bound=type)


Call: TypeAlias = Callable[[int, Carried, float | None], Wait]
"""A grid's way of handing requests of one type to its nodes: told Flower's node id, a request as
:meth:`~leakbed.wire.fields.Carried.handed_over` makes it, and for how many seconds to wait for its
answer (None for as long as it takes)."""

_METHODS = "push_messages", "pull_messages", "send_and_receive"
_OFFERING: dict[type, tuple[Any, ...]] = {}


def offers_calls(grid: GridType) -> GridType:
    """Mark a class of grids that has a method ``typed``, which returns its calls of one type.

    Args:
        grid: The class; those derived from it are not marked with it.

    Returns:
        The same.
    """
    _OFFERING[grid] = tuple(vars(grid).get(name) for name in _METHODS)
    return grid


def typed_call(grid: object, kind: str) -> Call | None:
    """Return how this very grid hands over requests of one type.

    Args:
        grid: Any.
        kind: Type of the message a request would travel in.

    Returns:
        None where it has to be sent a message: the grid is none of ours, or another's code in it or
        around it sees messages alone.
    """
    methods = _OFFERING.get(type(grid))
    if methods is None or any(name in vars(grid) for name in _METHODS):
        return None
    if methods != tuple(vars(type(grid)).get(name) for name in _METHODS):
        return None
    call: Call | None = vars(type(grid))["typed"](grid, kind)
    return call


@dataclass(frozen=True)
class NodeMod:
    """A mod of Flower's that knows what it does to a typed call as well.

    Attributes:
        on_message: The mod.
        on_call: The same for a request: told the type of its message, the handler to call next,
            the request, and the node's context.
    """

    on_message: "Mod"
    on_call: Callable[[str, Handler, Any, Context], Carried]

    def __call__(
        self, message: Message, context: Context, call_next: "ClientAppCallable"
    ) -> Message:
        """Do as Flower's mods do."""
        return self.on_message(message, context, call_next)


def before(act: Callable[[Context], None]) -> NodeMod:
    """Return a mod that does something before every handler, whatever comes."""

    def on_message(message: Message, context: Context, call_next: "ClientAppCallable") -> Message:
        act(context)
        return call_next(message, context)

    def on_call(kind: str, call_next: Handler, request: Any, context: Context) -> Carried:  # noqa: ANN401  of its type
        del kind
        act(context)
        return call_next(request, context)

    return NodeMod(on_message, on_call)


_HANDLERS: WeakKeyDictionary[ClientApp, dict[str, Handler]] = WeakKeyDictionary()


def serve(
    app: ClientApp,
    kind: str,
    request: type[Carried],
    *,
    first: Callable[[Context], None] | None = None,
) -> Callable[[Handler], Handler]:
    """Return a decorator that registers what nodes do with requests of one type.

    Args:
        app: Answers messages of that type from then on.
        kind: ``category.action``.
        request: The class of its requests.
        first: What a node does before it reads a message.

    Returns:
        It returns the handler as it was.
    """
    category, _, action = kind.partition(".")

    def register(handler: Handler) -> Handler:
        def answer(message: Message, context: Context) -> Message:
            if first is not None:
                first(context)
            reply = handler(request.of(message), context)
            return Message(reply.records(), reply_to=message)

        getattr(app, category)(action)(answer)
        if (whole := _within(mods_of(app), kind, handler)) is not None:
            _HANDLERS.setdefault(app, {})[kind] = whole
        return handler

    return register


def handler_of(app: ClientApp, kind: str) -> Handler | None:
    """Return what an app does with requests of one type, its mods included.

    Args:
        app: Any.
        kind: Type of the message a request would travel in.

    Returns:
        None where it must be sent the message.
    """
    return _HANDLERS.get(app, {}).get(kind) if is_plain(app) else None


def kinds_of(app: ClientApp) -> frozenset[str]:
    """Return the types of messages for which :func:`handler_of` finds something."""
    return frozenset(_HANDLERS.get(app, {})) if is_plain(app) else frozenset()


def _within(mods: "tuple[Mod, ...]", kind: str, handler: Handler) -> Handler | None:
    """Return a handler with an app's mods around it; None if one of them knows messages alone."""
    for mod in reversed(mods):
        if not isinstance(mod, NodeMod):
            return None
        handler = partial(mod.on_call, kind, handler)
    return handler
