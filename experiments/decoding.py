"""What an active adversary is scored by: its answers on the last smashed data, and its controls.

A passive attack is run on a trace; an adversary has answered by the end of training, and its
answers to the targets are picked here. Beside them stands what the same adversary makes of a client
that was never hijacked: in that run it trains as ever, but nodes get the gradients of the protocol.
"""

from collections.abc import Mapping, Sequence
from statistics import median
from typing import Any

import torch
from safetensors import safe_open
from torch import Tensor

from experiments.attacking import Attacked, make_attack
from experiments.hijacking import FIELDS, place_of
from experiments.run_folder import TrainingRun
from experiments.settings import AttackSettings
from leakbed.contracts import Guess
from leakbed.metrics import HIGHER_LEAKS_MORE
from leakbed.oracle import baselines, score
from leakbed.oracle.answer_key import AnswerKey
from leakbed.targets import Evidences, Target, pick_targets
from leakbed.trace import Trace

_LAST = 5  # checkpoints in the median at the end: each is the score of another batch


def decoded_attack(run: TrainingRun, settings: AttackSettings) -> Attacked:
    """Return an adversary's answers to its targets.

    A run without the smashed data asked for raises :class:`~leakbed.targets.MisfitError`.

    Args:
        run: Trained with the adversary.
        settings: The adversary's, with which targets and how many.

    Returns:
        The answers, in the targets' order.
    """
    adversary = make_attack(settings)
    evidences = Evidences.of(Trace(run.trace))
    when, count = settings.when, settings.targets
    targets = pick_targets(evidences, adversary.threat, when=when, count=count)
    found = _picked(run, targets)
    return Attacked(
        attack=adversary,
        targets=targets,
        guess=Guess(
            images=found.get("images"), labels=found.get("labels"), failed=found.get("failed")
        ),
        seconds=float(run.cost.get("adversary_seconds", 0.0)),
    )


def _picked(run: TrainingRun, targets: Sequence[Target]) -> dict[str, Tensor]:
    """Return the targets' rows of every field that was guessed."""
    rows: dict[str, list[Tensor]] = {}
    with safe_open(run.decoded, framework="pt") as file:
        names = set(file.keys())
        for target in targets:
            place = place_of(target.phase, target.node, target.step)
            for field in FIELDS:
                if f"{place}/{field}" in names:
                    row = file.get_slice(f"{place}/{field}")[int(target.row or 0)]
                    rows.setdefault(field, []).append(row)
    return {field: torch.stack(each) for field, each in rows.items()}


def never_hijacked(control: TrainingRun, settings: AttackSettings) -> dict[str, Any]:
    """Return the scores of an adversary that hijacked nobody, on the same targets.

    Args:
        control: Trained with the adversary, which forged nothing.
        settings: The adversary's.

    Returns:
        Every metric with its spread, as of any attack.
    """
    honest = decoded_attack(control, settings)
    truth = AnswerKey.read(control.answers).truth(honest.targets)
    found = baselines(truth, unordered_labels=honest.guess.images is None)
    return score(honest.guess, truth, baselines=found).as_dict()


def quality(run: TrainingRun) -> dict[str, Any]:
    """Return what an adversary could decode by the number of gradients it had forged.

    Args:
        run: Trained with it.

    Returns:
        ``step`` and each metric as lists, and of each metric its ``peak`` (with its step), its
        value at the ``last`` checkpoint, and the ``median`` of the last five; empty without
        checkpoints.
    """
    if not run.checkpoints:
        return {}
    steps = [int(each["step"]) for each in run.checkpoints]
    names = [name for name in run.checkpoints[0] if name != "step"]
    curves = {name: [each[name] for each in run.checkpoints] for name in names}
    peak: dict[str, Mapping[str, float]] = {}
    for name, curve in curves.items():
        best = max(curve) if HIGHER_LEAKS_MORE.get(name, True) else min(curve)
        peak[name] = {"value": best, "step": steps[curve.index(best)]}
    return {
        "step": steps,
        **curves,
        "peak": peak,
        "last": {name: curve[-1] for name, curve in curves.items()},
        "median": {name: median(curve[-_LAST:]) for name, curve in curves.items()},
    }
