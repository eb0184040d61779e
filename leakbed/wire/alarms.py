"""What a node's detectors found, as it travels to the harness at a round's end.

It is for whoever measures, so it travels sealed: no tap, trace or view of the server holds it. A
real client would tell nobody but its owner.
"""

from collections.abc import Mapping

from flwr.app import Message, MetricRecord

from leakbed.wire.records import SEALED, WireError, where

ALARMS = f"{SEALED}alarms"

Alarms = Mapping[str, tuple[int, float]]
"""By detector: after how many gradients it raised its alarm, or -1, and its worst score."""


def pack_alarms(alarms: Alarms) -> MetricRecord:
    """Return what detectors found as a Flower record."""
    record = MetricRecord()
    for name, (step, score) in alarms.items():
        record[f"{name}.alarm-step"], record[f"{name}.score"] = step, score
    return record


def alarms_of(message: Message) -> Alarms | None:
    """Return what the detectors behind a reply found, or None where there are none.

    Args:
        message: A reply of type ``train.split``.

    Returns:
        By detector.

    Raises:
        WireError: If the record is no record of alarms.
    """
    if ALARMS not in message.content:
        return None
    record = message.content[ALARMS]
    if not isinstance(record, MetricRecord):
        raise WireError(f"{where(message)} needs a MetricRecord under {ALARMS!r}")
    found: dict[str, tuple[int, float]] = {}
    for key in record:
        name, _, kind = key.rpartition(".")
        step, score = record.get(f"{name}.alarm-step"), record.get(f"{name}.score")
        if kind not in {"alarm-step", "score"} or not _fits(step, score):
            raise WireError(f"{where(message)}: {key!r} is no alarm and score of a detector")
        found[name] = int(str(step)), float(str(score))
    return found


def _fits(step: object, score: object) -> bool:
    return isinstance(step, int) and isinstance(score, int | float)
