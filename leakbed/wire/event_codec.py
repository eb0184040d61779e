"""Messages into events and back: what the wiretap shows its hooks.

Messages with weights are recognised in any app, by Flower's message types and by the names of their
arrays: of the message API and of older clients (whose arrays are numbered), with or without other
records beside them. What such a message carries beside its weights is told as well. Split messages
are those of :mod:`leakbed.wire.messages`.

An event's arrays are read-only views of the message's own bytes; who wants to write copies them.
"""

import re
from collections.abc import Callable, Iterable, Mapping
from dataclasses import replace
from functools import partial
from typing import Any, NamedTuple, cast

from flwr.app import ArrayRecord, Message, RecordDict

from leakbed.events import (
    Arrays,
    Bottom,
    BottomGradientUp,
    CutGradientDown,
    Event,
    Extras,
    Failed,
    FeaturesDown,
    Foreign,
    Gradients,
    Phase,
    Records,
    Sealed,
    SmashedUp,
    UpdateUp,
    UpperGradientUp,
    WeightsDown,
)
from leakbed.flower_internals import filled
from leakbed.wire.calls import Failure
from leakbed.wire.fields import OWN, STOPPED, Carried
from leakbed.wire.messages import (
    HARNESS,
    HEAD_STEP,
    OWN_EVALUATE,
    OWN_STEP,
    SHARE,
    SPLIT_STEP,
    WEIGHTS,
    WEIGHTS_EVALUATE,
    is_ours,
)
from leakbed.wire.records import (
    BOTTOM_GRADIENT,
    BOTTOMS,
    CONFIG,
    FEATURES,
    GRADIENT,
    METRICS,
    ROUND,
    SEALED,
    SMASHED,
    UPPER_GRADIENT,
    WireError,
    as_arrays,
    as_arrays_under,
    config_of,
    copy_records,
    int_field,
    pack,
    readable,
    shortened,
    sole_arrays,
    weights_key,
    wire_bytes,
)


def events_down(message: Message, node: int) -> list[Event]:
    """Decode a message on its way to a node.

    Args:
        message: As the strategy made it.
        node: The receiving node, by partition id where known.

    Returns:
        Its events in the order a reader would tell them; a message we have no words for gives one
        :class:`~leakbed.events.Foreign`, a harness message none.
    """
    kind = message.metadata.message_type
    if kind in HARNESS:
        return []
    if is_ours(message):
        return _split_down(_said(message), node)
    found = _weights(message, kind)
    if found is None:
        return _gradients(message, node, up=False) or [_foreign(message, node, up=False)]
    key, arrays, skipped = found
    phase = Phase.TRAIN if kind.startswith(WEIGHTS) else Phase.EVALUATE
    down = WeightsDown(node=node, round=_round(message), arrays=arrays, phase=phase)
    return [down, *_extras(message, node, key, skipped, up=False)]


def events_up(sent: Message, reply: Message, node: int) -> list[Event]:
    """Decode a reply, in the light of the message it answers.

    Args:
        sent: The message the reply belongs to.
        reply: What came back.
        node: The sending node, by partition id where known.

    Returns:
        Its events, as for :func:`events_down`.
    """
    kind = sent.metadata.message_type
    if kind in HARNESS:
        return []
    if reply.has_error():
        return [_failed(sent, node, shortened(reply.error.reason))]
    if is_ours(sent):
        return _split_up(_said(sent), _said(reply), node)
    before = _weights(sent, kind)
    if before is not None and kind.split(".")[0] == WEIGHTS:
        asked = sent.content.array_records[before[0]]
        after = _weights(reply, kind, like=asked)
        if after is not None:
            key, arrays, skipped = after
            update = UpdateUp(
                node=node,
                round=_round(sent),
                before=before[1],
                after=arrays,
                examples=_examples(reply),
                train_loss=_train_loss(reply),
            )
            return [update, *_extras(reply, node, key, skipped, up=True, sent=sent)]
    if kind.split(".")[0] == WEIGHTS_EVALUATE and not reply.content.array_records:
        return _extras(reply, node, None, [], up=True, sent=sent)
    gradients = _gradients(reply, node, up=True, sent=sent)
    return gradients or [_foreign(reply, node, up=True, sent=sent)]


def silence(sent: Message, node: int) -> list[Event]:
    """Return the :class:`~leakbed.events.Failed` of a message that was never answered."""
    return [_failed(sent, node, "no reply")]


def unasked(reply: Message, node: int) -> list[Event]:
    """Return the events of a reply whose message is not known.

    Args:
        reply: What came.
        node: The sending node, by partition id where known.

    Returns:
        One event, as for a message we have no words for.
    """
    if reply.has_error():
        return [_failed(reply, node, shortened(reply.error.reason))]
    return [_foreign(reply, node, up=True)]


def unread(message: Message, node: int, *, up: bool, why: str) -> Foreign | Failed:
    """Return the event of a message that could not be decoded, so that none is lost in silence.

    Args:
        message: Of one of our own types, with other records than that has.
        node: At its other end, by partition id where known.
        up: True from node to server.
        why: What went wrong.

    Returns:
        What it carries, as it is.
    """
    if not message.has_content():
        return _failed(message, node, why)
    return replace(_foreign(message, node, up=up), skipped=f"its meaning: {shortened(why)}")


def rewritten(message: Message, event: Event) -> RecordDict:
    """Return a message's records with an event's arrays in place of its own.

    Args:
        message: The message the event was decoded from; never changed.
        event: The event as an active hook wants it on the wire.

    Returns:
        New records.

    Raises:
        WireError: If events of this kind cannot be written back.
    """
    records = copy_records(message.content)
    if isinstance(event, CutGradientDown):
        records[GRADIENT] = pack({"gradient": event.gradient})
    elif isinstance(event, FeaturesDown):
        records[FEATURES] = pack({"features": event.features})
    elif isinstance(event, UpperGradientUp):
        records[UPPER_GRADIENT] = pack({"gradient": event.gradient})
    elif isinstance(event, SmashedUp):
        batch = {**as_arrays(records.array_records[SMASHED]), "smashed": event.smashed}
        records[SMASHED] = pack(batch)
    elif isinstance(event, UpdateUp | WeightsDown | Gradients):
        records.update(_repacked(message, event))
    elif isinstance(event, Records):
        kept = records.items()  # of a foreign message its event tells all but what is sealed
        if isinstance(event, Foreign):
            kept = {key: record for key, record in kept if key.startswith(SEALED)}.items()
        return RecordDict({**dict(kept), **copy_records(event.content)})
    else:
        raise WireError(f"{type(event).__name__} cannot be rewritten")
    return records


def _repacked(
    message: Message, event: UpdateUp | WeightsDown | Gradients
) -> dict[str, ArrayRecord]:
    arrays = pack(event.after if isinstance(event, UpdateUp) else event.arrays)
    like = arrays if isinstance(event, UpdateUp) else None
    key = sole_arrays(message) or weights_key(message, like=like)
    return {str(key): arrays}


class _Said(NamedTuple):
    """What a message of ours says, whether it travels as one or goes from hand to hand.

    Attributes:
        kind: Its type.
        number: Returns one of its whole numbers by name.
        arrays: Returns the arrays under a key, of which one may be needed; None if there are none.
        bottom: The node's part: its bytes where it passes sealed, else a way to read its arrays;
            None where it is not there.
        records: Returns all it holds, to look for what only a protocol of one's own has.
    """

    kind: str
    number: Callable[[str], int]
    arrays: Callable[..., Arrays | None]
    bottom: int | Callable[[], Arrays] | None
    records: Callable[[], RecordDict]


def _said(message: Message) -> _Said:
    sealed = message.content.get(BOTTOMS["sealed"])
    relayed = message.content.get(BOTTOMS["relayed"])
    bottom: int | Callable[[], Arrays] | None = None
    if isinstance(sealed, ArrayRecord):
        bottom = sealed.count_bytes()
    elif isinstance(relayed, ArrayRecord):
        bottom = partial(as_arrays, relayed)
    return _Said(
        message.metadata.message_type,
        lambda key: int_field(message, config_of(message), key),
        partial(as_arrays_under, message),
        bottom,
        lambda: message.content,
    )


def _called(kind: str, carried: Carried) -> _Said:
    groups = carried.groups()
    sealed, relayed = (groups.get(BOTTOMS[policy]) for policy in ("sealed", "relayed"))
    bottom: int | Callable[[], Arrays] | None = None
    if sealed is not None:
        bottom = sum(len(name) + wire_bytes(array) for name, array in sealed.items())
    elif relayed is not None:
        bottom = partial(dict, relayed)
    return _Said(
        kind,
        lambda key: int(groups[CONFIG][key]),
        lambda key, needs=None: groups.get(key),  # noqa: ARG005  a table knows no record without it
        bottom,
        carried.records,
    )


def request_events(kind: str, request: Carried, node: int) -> list[Event]:
    """Return the events of a typed call's request, as :func:`events_down` of its message would.

    Args:
        kind: Type of the message it would travel in.
        request: As handed over.
        node: The receiving node, by partition id where known.

    Returns:
        Its events; their arrays are the request's own, which nobody may write to.
    """
    return _split_down(_called(kind, request), node)


def reply_events(kind: str, request: Carried, reply: Carried | Failure, node: int) -> list[Event]:
    """Return the events of a typed call's reply, as :func:`events_up` of its message would.

    Args:
        kind: Type of the message the request would travel in.
        request: What it answers.
        reply: As handed over.
        node: The sending node, by partition id where known.

    Returns:
        Its events, as for :func:`request_events`.
    """
    asked = _called(kind, request)
    if isinstance(reply, Failure):
        why = shortened(reply.reason)
        return [Failed(node=node, round=asked.number(ROUND), message_type=kind, reason=why)]
    return _split_up(asked, _called(kind, reply), node)


def replaced(carried: Carried, event: Event) -> Carried:
    """Return a request or reply of a typed call with an event's arrays in place of its own.

    Args:
        carried: What the event tells of; never changed.
        event: The event as an active hook wants it on the wire.

    Returns:
        As handed over.

    Raises:
        WireError: If events of this kind cannot be written back.
    """
    for kind, name in _REPLACED.items():
        if isinstance(event, kind):
            changed: Any = replace(carried, **{name: getattr(event, name)})  # type: ignore[type-var]
            return cast("Carried", changed.handed_over())
    raise WireError(f"{type(event).__name__} cannot be rewritten")


_REPLACED: Mapping[type[Event], str] = {
    CutGradientDown: "gradient",
    FeaturesDown: "features",
    UpperGradientUp: "gradient",
    SmashedUp: "smashed",
}


def _split_down(said: _Said, node: int) -> list[Event]:
    round_, kind = said.number(ROUND), said.kind
    events = _bottom_events(said, node, round_, up=False)
    if (arrays := said.arrays(GRADIENT, needs="gradient")) is not None:
        # The message of the next step brings the gradient of the batch before.
        step = said.number("step") - (kind in {SPLIT_STEP, OWN_STEP})
        gradient = arrays["gradient"]
        events.append(CutGradientDown(node=node, round=round_, step=step, gradient=gradient))
    if (arrays := said.arrays(FEATURES, needs="features")) is not None:
        training = kind in {HEAD_STEP, OWN_STEP}
        features = FeaturesDown(
            node=node,
            round=round_,
            step=said.number("step" if training else "start"),
            features=arrays["features"],
            phase=Phase.TRAIN if training else Phase.EVALUATE,
        )
        events.append(features)
    return events + _own(said, node, round_, up=False)


def _split_up(asked: _Said, reply: _Said, node: int) -> list[Event]:
    training = asked.kind.startswith(WEIGHTS)
    round_ = asked.number(ROUND)
    step = asked.number("step" if training else "start")
    events = _bottom_events(reply, node, round_, up=True)
    if (batch := reply.arrays(SMASHED, needs="smashed")) is not None:
        smashed = SmashedUp(
            node=node,
            round=round_,
            step=step,
            smashed=batch["smashed"],
            labels=batch.get("labels"),
            rows=batch.get("rows"),
            phase=Phase.TRAIN if training else Phase.EVALUATE,
        )
        events.append(smashed)
    if (upper := reply.arrays(UPPER_GRADIENT, needs="gradient")) is not None:
        gradient = upper["gradient"]
        events.append(UpperGradientUp(node=node, round=round_, step=step, gradient=gradient))
    if (own := reply.arrays(BOTTOM_GRADIENT)) is not None:
        events.append(BottomGradientUp(node=node, round=round_, step=step, arrays=own))
    return events + _own(reply, node, round_, up=True)


def _own(said: _Said, node: int, round_: int, *, up: bool) -> list[Event]:
    """Return what only a protocol of one's own sends, as one event; none of any other."""
    if said.kind not in {OWN_STEP, OWN_EVALUATE}:
        return []
    left = copy_records(said.records())
    for key, record in list(left.items()):
        told = _OWN_TOLD.get(key, frozenset())
        for name in [name for name in record if told is None or name in told]:
            del record[name]
        if not record or told is None or key.startswith(SEALED):
            del left[key]
    if not left:
        return []
    return [
        Extras(node=node, round=round_, message_type=said.kind, up=up, content=left),
    ]


_OWN_TOLD: Mapping[str, frozenset[str] | None] = {
    CONFIG: frozenset({ROUND, "step", "start", "stop", SHARE}),
    METRICS: frozenset({"step", "steps", "num-examples", "correct"}),
    SMASHED: frozenset({"smashed", "labels", "rows"}),
    GRADIENT: frozenset({"gradient"}),
    FEATURES: frozenset({"features"}),
    UPPER_GRADIENT: frozenset({"gradient"}),
    BOTTOM_GRADIENT: None,
    BOTTOMS["relayed"]: None,
    OWN: None,
    STOPPED: None,
}
"""By record, what other events tell of it; None where that is all of it."""


def _bottom_events(said: _Said, node: int, round_: int, *, up: bool) -> list[Event]:
    if said.bottom is None:
        return []
    if isinstance(said.bottom, int):
        return [Sealed(node=node, round=round_, size=said.bottom, up=up)]
    return [Bottom(node=node, round=round_, arrays=said.bottom(), up=up)]


def _weights(
    message: Message, kind: str, *, like: ArrayRecord | None = None
) -> tuple[str, Arrays, list[str]] | None:
    """Return key, readable arrays and what is said of the others; None of a message without."""
    key = weights_key(message, like=like)
    if key is None or kind.split(".", maxsplit=1)[0] not in {WEIGHTS, WEIGHTS_EVALUATE}:
        return None
    if _says_gradient(message, key):
        return None
    arrays, skipped = readable(message.content.array_records[key])
    return None if skipped and not arrays else (key, arrays, skipped)


def _gradients(
    message: Message, node: int, *, up: bool, sent: Message | None = None
) -> list[Event]:
    """Return the gradients of a message of which they are the only arrays, and what is beside."""
    key = sole_arrays(message)
    if key is None or not _says_gradient(message, key):
        return []
    arrays, skipped = readable(message.content.array_records[key])
    if skipped:
        return []
    found = Gradients(node=node, round=_round_of(message, sent), arrays=arrays, up=up)
    return [found, *_extras(message, node, key, [], up=up, sent=sent, told=frozenset())]


def _says_gradient(message: Message, key: str) -> bool:
    """Say whether a message's type, the key of its arrays or all their names say "gradient"."""
    action = message.metadata.message_type.partition(".")[2]
    names = list(message.content.array_records[key])
    every = bool(names) and all(map(_named_gradient, names))
    return every or _named_gradient(key) or _named_gradient(action)


def _named_gradient(name: str) -> bool:
    lower = name.lower()
    return "grad" in lower and _GRADIENT.search(lower) is not None


_GRADIENT = re.compile(r"(?<![a-z])(grad|grads|gradients?)(?![a-z])")


_TOLD = frozenset({ROUND, "num-examples", "train-loss", "train_loss"})


def _extras(
    message: Message,
    node: int,
    key: str | None,
    skipped: list[str],
    *,
    up: bool,
    sent: Message | None = None,
    told: frozenset[str] = _TOLD,
) -> list[Event]:
    """Return what a message carries beside its arrays and the numbers that their event tells."""
    beside = [
        name for name, record in message.content.items() if name != key and not set(record) <= told
    ]
    content = _opened(message, beside)
    if not content and not skipped:
        return []
    return [
        Extras(
            node=node,
            round=_round_of(message, sent),
            message_type=message.metadata.message_type,
            up=up,
            content=content,
            skipped=", ".join(f"{key}/{name}" for name in skipped) or None,
        )
    ]


def _opened(message: Message, names: Iterable[str]) -> RecordDict:
    """Return copies of some of a message's records, those that pass sealed left out."""
    open_ = {name: message.content[name] for name in names if not name.startswith(SEALED)}
    return copy_records(filled(RecordDict(), open_))


def _foreign(message: Message, node: int, *, up: bool, sent: Message | None = None) -> Foreign:
    return Foreign(
        node=node,
        round=_round_of(message, sent),
        message_type=message.metadata.message_type,
        up=up,
        content=_opened(message, message.content),
    )


def _failed(sent: Message, node: int, reason: str) -> Failed:
    kind = sent.metadata.message_type
    return Failed(node=node, round=_round(sent), message_type=kind, reason=reason)


def _round_of(message: Message, sent: Message | None) -> int:
    return _round(message) or (0 if sent is None else _round(sent))


def _round(message: Message) -> int:
    """Return the round that a message names, else its group's number: older apps' only word."""
    configs = message.content.config_records if message.has_content() else {}
    for config in configs.values():
        if isinstance(number := config.get(ROUND), int):
            return number
    group = message.metadata.group_id
    return int(group) if _ROUND.fullmatch(group or "") else 0


_ROUND = re.compile(r"[0-9]{1,9}")


def _examples(message: Message) -> int | None:
    """Return how many samples a reply says it was trained on, by whatever name.

    Flower's own names come first. An app may weigh by any key of its metrics (``weighted_by_key``):
    then the one whose name speaks of a number of samples is taken, or else the only whole number.
    """
    metrics = list(message.content.metric_records.values())
    for name in _COUNTS:
        for each in metrics:
            if (count := _count(each.get(name))) is not None:
                return count
    named = {k: v for each in metrics for k, v in each.items() if _COUNTING.search(k.lower())}
    int_field = {k: v for each in metrics for k, v in each.items() if isinstance(v, int)}
    for found in (_counted(named.values()), _counted(int_field.values())):
        if len(found) == 1:
            return found[0]
    return None


_COUNTS = ("num-examples", "num_examples")  # of Flower's message API, and of its older clients
_COUNTING = re.compile(
    r"(?<![a-z])(examples?|samples?|rows|images|instances|datapoints|n|num|count|size|len)(?![a-z])"
)


def _counted(values: Iterable[object]) -> list[int]:
    return [count for value in values if (count := _count(value)) is not None]


def _count(value: object) -> int | None:
    """Return a metric as a number of samples; None of what is none."""
    if isinstance(value, bool) or not isinstance(value, int | float):
        return None
    return int(value) if float(value).is_integer() and value >= 0 else None


def _train_loss(message: Message) -> float | None:
    for metrics in message.content.metric_records.values():
        for key in ("train-loss", "train_loss"):  # ours, and that of Flower's own apps
            if isinstance(number := metrics.get(key), int | float):
                return float(number)
    return None
