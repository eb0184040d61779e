"""What a run's detectors found, from the strategy to the card, with what was read before the alarm.

A run whose node stopped is a result like any other. It ended with the gradient that raised the
alarm: nothing was evaluated after it, so it has no utility and no last bottom, its trace holds all
there was, and its adversary decodes what it saw last with the state it had then.
"""

from collections.abc import Mapping, Sequence
from math import isfinite
from typing import Any

from experiments.run.training_run import TrainingRun
from experiments.settings.plugins import JsonObject
from leakbed.contracts.defense import NO_ALARM
from leakbed.wire.fields import Alarms, Finding
from strategies.node_channel import NodeStopped


def found(alarms: Mapping[int, Alarms], stop: NodeStopped | None) -> JsonObject:
    """Return what a run's detectors found, as its summary keeps it.

    Args:
        alarms: By partition, as of the last round each node closed.
        stop: The node that ended the run, where one did, with what its detectors found then.

    Returns:
        ``hijacked``: no, until :func:`timed` says otherwise; ``nodes``: by partition and detector
        after how many gradients it raised its ``alarm``, its most suspicious ``score``, its
        ``last`` one, and the ``gradients`` it saw; ``stopped``: the ``node`` that stopped, and
        ``by`` which detector. Empty where there is no detector.
    """
    known = {**alarms, **({} if stop is None else {stop.node: stop.alarms})}
    if not known:
        return {}
    return {
        "hijacked": False,
        "nodes": {
            str(node): {name: _plain(finding) for name, finding in known[node].items()}
            for node in sorted(known)
        },
        "stopped": None if stop is None else {"node": stop.node, "by": stop.by},
    }


def timed(
    detection: JsonObject, forged: Mapping[int, Sequence[int]], *, hijacked: bool
) -> JsonObject:
    """Return what was found under an adversary, with each alarm's place among all its forgeries.

    Args:
        detection: From :func:`found`.
        forged: For every node, how many gradients had been forged in all with each of its own.
        hijacked: Whether nodes got what was forged.

    Returns:
        The same, with ``iteration`` beside each ``alarm``.
    """
    if not detection:
        return {}
    nodes = {
        node: {
            name: {**finding, "iteration": _iteration(finding["alarm"], forged.get(int(node), ()))}
            for name, finding in findings.items()
        }
        for node, findings in detection["nodes"].items()
    }
    return {**detection, "hijacked": hijacked, "nodes": nodes}


def detected(run: TrainingRun) -> JsonObject:
    """Return what a card says of a run's detectors.

    Args:
        run: Finished, or stopped.

    Returns:
        What :func:`found` and :func:`timed` say, and beside each alarm of a hijacked run the scores
        of the adversary's last checkpoint at or ``before`` it; None where there was none. Empty
        where there is no detector.
    """
    if not run.detection:
        return {}
    hijacked = run.detection["hijacked"]
    nodes = {
        node: {
            name: {**finding, **({"before": _before(run, finding)} if hijacked else {})}
            for name, finding in findings.items()
        }
        for node, findings in run.detection["nodes"].items()
    }
    return {**run.detection, "nodes": nodes}


def _plain(finding: Finding) -> dict[str, float | None]:
    """Return a finding as JSON values: what is not there yet is null."""
    return {
        "alarm": None if finding.alarm == NO_ALARM else finding.alarm,
        "score": finding.score if isfinite(finding.score) else None,
        "last": finding.last if isfinite(finding.last) else None,
        "gradients": finding.gradients,
    }


def _iteration(alarm: int | None, forged: Sequence[int]) -> int | None:
    return None if alarm is None or alarm > len(forged) else forged[alarm - 1]


def _before(run: TrainingRun, finding: Mapping[str, Any]) -> Mapping[str, float] | None:
    if (alarm := finding.get("iteration")) is None:
        return None
    earlier = [point for point in run.checkpoints if point["step"] <= alarm]
    return earlier[-1] if earlier else None
