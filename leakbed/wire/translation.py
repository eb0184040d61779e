"""Messages into events and back: what the wiretap shows its hooks.

FedAvg-style messages are Flower's own (one ``ArrayRecord`` each way) and are recognised in any app;
split messages are those of :mod:`leakbed.wire.messages`.
"""

from flwr.app import ArrayRecord, Message, RecordDict

from leakbed.events import (
    Bottom,
    CutGradientDown,
    Event,
    Failed,
    Foreign,
    Phase,
    Sealed,
    SmashedUp,
    UpdateUp,
    WeightsDown,
)
from leakbed.wire.messages import (
    HARNESS,
    SPLIT_EVALUATE,
    SPLIT_STEP,
    WEIGHTS,
    WEIGHTS_EVALUATE,
)
from leakbed.wire.records import (
    BOTTOMS,
    GRADIENT,
    ROUND,
    SEALED,
    SMASHED,
    WireError,
    arrays_under,
    config_of,
    copy_records,
    pack,
    sole_arrays,
    unpack,
    whole,
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
    if kind in {SPLIT_STEP, SPLIT_EVALUATE}:
        return _split_down(message, node)
    key = sole_arrays(message)
    if key is not None and kind.split(".")[0] in {WEIGHTS, WEIGHTS_EVALUATE}:
        phase = Phase.TRAIN if kind.startswith(WEIGHTS) else Phase.EVALUATE
        arrays = unpack(message.content.array_records[key])
        return [WeightsDown(node=node, round=_round(message), arrays=arrays, phase=phase)]
    return [_foreign(message, node, up=False)]


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
        return [_failed(sent, node, reply.error.reason or "no reason given")]
    if kind in {SPLIT_STEP, SPLIT_EVALUATE}:
        return _split_up(sent, reply, node)
    before, after = sole_arrays(sent), sole_arrays(reply)
    if before is not None and after is not None and kind.split(".")[0] == WEIGHTS:
        return [
            UpdateUp(
                node=node,
                round=_round(sent),
                before=unpack(sent.content.array_records[before]),
                after=unpack(reply.content.array_records[after]),
                examples=_examples(reply),
            )
        ]
    if kind.split(".")[0] == WEIGHTS_EVALUATE and not reply.content.array_records:
        return []  # metrics only: nothing an attack could read
    return [_foreign(reply, node, up=True)]


def silence(sent: Message, node: int) -> list[Event]:
    """Return the event of a message that was never answered.

    Args:
        sent: The message.
        node: The silent node, by partition id where known.

    Returns:
        One :class:`~leakbed.events.Failed`.
    """
    return [_failed(sent, node, "no reply")]


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
    elif isinstance(event, SmashedUp):
        batch = {**unpack(records.array_records[SMASHED]), "smashed": event.smashed}
        records[SMASHED] = pack(batch)
    elif isinstance(event, UpdateUp | WeightsDown):
        arrays = event.after if isinstance(event, UpdateUp) else event.arrays
        records[str(sole_arrays(message))] = pack(arrays)
    elif isinstance(event, Foreign):
        sealed = {key: record for key, record in records.items() if key.startswith(SEALED)}
        return RecordDict({**sealed, **copy_records(event.content)})
    else:
        raise WireError(f"{type(event).__name__} cannot be rewritten")
    return records


def _split_down(message: Message, node: int) -> list[Event]:
    config = config_of(message)
    round_ = whole(message, config, ROUND)
    events = _bottom_events(message, node, round_, up=False)
    if (arrays := arrays_under(message, GRADIENT, needs="gradient")) is not None:
        step = whole(message, config, "step") - 1  # the gradient belongs to the batch before
        gradient = arrays["gradient"]
        events.append(CutGradientDown(node=node, round=round_, step=step, gradient=gradient))
    return events


def _split_up(sent: Message, reply: Message, node: int) -> list[Event]:
    config = config_of(sent)
    training = sent.metadata.message_type == SPLIT_STEP
    round_ = whole(sent, config, ROUND)
    events = _bottom_events(reply, node, round_, up=True)
    if (batch := arrays_under(reply, SMASHED, needs="smashed")) is not None:
        smashed = SmashedUp(
            node=node,
            round=round_,
            step=whole(sent, config, "step" if training else "start"),
            smashed=batch["smashed"],
            labels=batch.get("labels"),
            rows=batch.get("rows"),
            phase=Phase.TRAIN if training else Phase.EVALUATE,
        )
        events.append(smashed)
    return events


def _bottom_events(message: Message, node: int, round_: int, *, up: bool) -> list[Event]:
    sealed = message.content.get(BOTTOMS["sealed"])
    relayed = message.content.get(BOTTOMS["relayed"])
    if isinstance(sealed, ArrayRecord):
        return [Sealed(node=node, round=round_, size=sealed.count_bytes(), up=up)]
    if isinstance(relayed, ArrayRecord):
        return [Bottom(node=node, round=round_, arrays=unpack(relayed), up=up)]
    return []


def _foreign(message: Message, node: int, *, up: bool) -> Foreign:
    content = copy_records(message.content)
    for key in [key for key in content if key.startswith(SEALED)]:
        del content[key]
    kind = message.metadata.message_type
    return Foreign(node=node, round=_round(message), message_type=kind, up=up, content=content)


def _failed(sent: Message, node: int, reason: str) -> Failed:
    kind = sent.metadata.message_type
    return Failed(node=node, round=_round(sent), message_type=kind, reason=reason)


def _round(message: Message) -> int:
    for config in message.content.config_records.values():
        if isinstance(number := config.get(ROUND), int):
            return number
    return 0


def _examples(message: Message) -> int | None:
    for metrics in message.content.metric_records.values():
        if isinstance(number := metrics.get("num-examples"), int):
            return number
    return None
