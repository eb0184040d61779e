"""Messages into events and back: what the wiretap shows its hooks.

Messages with weights are recognised in any app, by Flower's message types and by the names of their
arrays: of the message API and of older clients (whose arrays are numbered), with or without other
records beside them. What such a message carries beside its weights is told as well. Split messages
are those of :mod:`leakbed.wire.messages`.

An event's arrays are read-only views of the message's own bytes; who wants to write copies them.
"""

import re
from collections.abc import Iterable
from dataclasses import replace

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
from leakbed.wire.messages import (
    BACKWARD_STEP,
    HARNESS,
    HEAD_EVALUATE,
    HEAD_STEP,
    SPLIT_EVALUATE,
    SPLIT_STEP,
    WEIGHTS,
    WEIGHTS_EVALUATE,
)
from leakbed.wire.records import (
    BOTTOM_GRADIENT,
    BOTTOMS,
    FEATURES,
    GRADIENT,
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
)

SPLIT = frozenset({SPLIT_STEP, SPLIT_EVALUATE, HEAD_STEP, HEAD_EVALUATE, BACKWARD_STEP})


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
    if kind in SPLIT:
        return _split_down(message, node)
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
    if kind in SPLIT:
        return _split_up(sent, reply, node)
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
    """Return the event of a message that was never answered.

    Args:
        sent: The message.
        node: The silent node, by partition id where known.

    Returns:
        One :class:`~leakbed.events.Failed`.
    """
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


def _split_down(message: Message, node: int) -> list[Event]:
    config = config_of(message)
    round_ = int_field(message, config, ROUND)
    kind = message.metadata.message_type
    events = _bottom_events(message, node, round_, up=False)
    if (arrays := _own(message, GRADIENT, "gradient")) is not None:
        # The message of the next step brings the gradient of the batch before.
        step = int_field(message, config, "step") - (kind == SPLIT_STEP)
        gradient = arrays["gradient"]
        events.append(CutGradientDown(node=node, round=round_, step=step, gradient=gradient))
    if (arrays := _own(message, FEATURES, "features")) is not None:
        training = kind == HEAD_STEP
        features = FeaturesDown(
            node=node,
            round=round_,
            step=int_field(message, config, "step" if training else "start"),
            features=arrays["features"],
            phase=Phase.TRAIN if training else Phase.EVALUATE,
        )
        events.append(features)
    return events


def _split_up(sent: Message, reply: Message, node: int) -> list[Event]:
    config = config_of(sent)
    training = sent.metadata.message_type.startswith(WEIGHTS)
    round_ = int_field(sent, config, ROUND)
    step = int_field(sent, config, "step" if training else "start")
    events = _bottom_events(reply, node, round_, up=True)
    if (batch := _own(reply, SMASHED, "smashed")) is not None:
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
    if (upper := _own(reply, UPPER_GRADIENT, "gradient")) is not None:
        gradient = upper["gradient"]
        events.append(UpperGradientUp(node=node, round=round_, step=step, gradient=gradient))
    if (own := _own(reply, BOTTOM_GRADIENT)) is not None:
        events.append(BottomGradientUp(node=node, round=round_, step=step, arrays=own))
    return events


def _own(message: Message, key: str, needs: str | None = None) -> Arrays | None:
    return as_arrays_under(message, key, needs=needs)


def _bottom_events(message: Message, node: int, round_: int, *, up: bool) -> list[Event]:
    sealed = message.content.get(BOTTOMS["sealed"])
    relayed = message.content.get(BOTTOMS["relayed"])
    if isinstance(sealed, ArrayRecord):
        return [Sealed(node=node, round=round_, size=sealed.count_bytes(), up=up)]
    if isinstance(relayed, ArrayRecord):
        return [Bottom(node=node, round=round_, arrays=as_arrays(relayed), up=up)]
    return []


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
    return _GRADIENT.search(name.lower()) is not None


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
    content = _opened(message)
    if key is not None:
        del content[key]
    for name in [name for name, record in content.items() if set(record) <= told]:
        del content[name]
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


def _opened(message: Message) -> RecordDict:
    """Return copies of a message's records, those that pass sealed left out."""
    content = copy_records(message.content)
    for key in [key for key in content if key.startswith(SEALED)]:
        del content[key]
    return content


def _foreign(message: Message, node: int, *, up: bool, sent: Message | None = None) -> Foreign:
    return Foreign(
        node=node,
        round=_round_of(message, sent),
        message_type=message.metadata.message_type,
        up=up,
        content=_opened(message),
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
