"""The check of a training run's recorded noise, of every run whose defence states a normal law.

It needs no ceiling: the truth's own message is made again, and what was recorded is held against
it. Looked at are the updates of the last recorded round, test rows behind the last bottom, the
first smashed batches of the first round and the first cut gradients of the first round, as far as
they are in the trace and few steps lead to them. An experiment with ``[ceiling]`` checks more
messages, those that its ceilings are of.
"""

from __future__ import annotations

from collections.abc import Iterator
from itertools import islice

import torch
from torch import Tensor

from experiments.run.candidate_messages import CandidateMessages, Part
from experiments.run.label_ceilings import recorded_gradients
from experiments.run.recorded import Recorded
from experiments.run.targets import Evidences, MisfitError, pick_targets
from leakbed.contracts import Evidence, Protects, Seat, ThreatModel, select
from leakbed.contracts.noise_laws import NoCeilingError
from leakbed.events import Phase, Target
from leakbed.oracle.noise_checks import Finding, check_noise
from leakbed.oracle.truth import AnswerKey
from leakbed.tap.trace import Trace

_MOST = 8  # messages of a kind, and batches that are stepped again before one
_NOISED = (Protects.UPDATE, Protects.SMASHED, Protects.CUT_GRADIENT)


def noise_of_run(
    trace: Trace, key: AnswerKey, *, forged: bool = False, model: str | None = None
) -> list[Finding]:
    """Return what the check of a training run's recorded noise found.

    Args:
        trace: Its messages, on disk or in memory.
        key: Its truth.
        forged: Whether somebody forged the recorded cut gradients, which are then not looked at.
        model: As for :func:`~experiments.run.ceilings.ceiling_of_run`.

    Returns:
        Nothing where no defence noises a message, or none of normal noise can be made again here.
    """
    torch.set_num_threads(1)
    try:
        recorded = Recorded.of(trace, key, model=model)
    except NoCeilingError:
        return []
    if not select(recorded.defenses, *_NOISED):
        return []
    found: list[Finding] = []
    gradients = iter(()) if forged else recorded_gradients(recorded, most=_MOST)
    for residuals in (_of_messages(recorded), gradients):
        try:
            kept = list(residuals)
        except (NoCeilingError, MisfitError):
            continue
        found += check_noise(kept) if kept else []
    return found


def _of_messages(run: Recorded) -> Iterator[Tensor]:
    """Yield residuals of updates, of smashed test rows and of first smashed batches."""
    if not select(run.defenses, Protects.UPDATE, Protects.SMASHED):
        return
    for collect, when in (("last", "training"), ("last", "inference"), ("first", "training")):
        try:
            evidences = Evidences.of(run.trace, collect)
            if bool(evidences.updates) != (collect == "last" and when == "training"):
                continue
            reads = Evidence.UPDATE if evidences.updates else Evidence.SMASHED
            threat = ThreatModel(seat=Seat.SERVER, evidence=frozenset({reads}))
            targets = pick_targets(evidences, threat, when=when, count=10**9)
            made = CandidateMessages(run, evidences, told=False, summed=False)
            for target in islice(filter(_near, targets), _MOST):
                yield from _residual(_remade(made, target))
        except (NoCeilingError, MisfitError):
            continue


def _near(target: Target) -> bool:
    """Say whether few steps lead to a message: first rows of the first node's first batches."""
    if target.row is None or target.phase == Phase.EVALUATE:
        return True
    return target.row == 0 and target.node == 0 and target.step < _MOST


def _remade(made: CandidateMessages, target: Target) -> Part:
    own = torch.tensor([made.rows_behind(target)[0]])
    return made.update(target, int(own), own) if target.row is None else made.row(target, own)


def _residual(part: Part) -> Iterator[Tensor]:
    if part.messages.family == "normal":
        scale = part.messages.scales[0].repeat_interleave(torch.tensor(part.messages.sizes))
        yield (part.seen[0].double() - part.messages.means[0].double()) / scale
