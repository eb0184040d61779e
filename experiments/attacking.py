"""One attack on one recorded run: from trace to guess, from guess to scores.

The attack gets a view and a stream of its own; only afterwards does the oracle open the answers.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, fields
from pathlib import Path
from time import perf_counter
from typing import Any

import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

from attacks import ADVERSARIES, ATTACKS, INTRUDERS
from experiments.guesses import better, on_cpu
from experiments.known_labels import refuse_untold, tell, unknown_only
from experiments.settings import AttackSettings
from leakbed.contracts import Adversary, Attack, Guess, UnfitViewError
from leakbed.events import Arrays
from leakbed.intruding import Intruder
from leakbed.models import resolve_device
from leakbed.oracle import (
    CloneScores,
    Scores,
    Truth,
    baselines,
    control_verdict,
    score,
    score_clones,
    unranked,
)
from leakbed.oracle.answer_key import AnswerKey
from leakbed.oracle.by_label import by_label
from leakbed.oracle.grouping import BOUND
from leakbed.seeds import derive
from leakbed.targets import Evidences, MisfitError, Target, pick_targets
from leakbed.trace import Trace
from leakbed.views import architecture_of, build_view

_SHOWN = 1000  # samples whose images are kept: of a whole epoch they would be gigabytes


@dataclass(frozen=True, kw_only=True, eq=False)
class Attacked:
    """An attack's answer, with what it took.

    Attributes:
        attack: With its settings.
        targets: Which messages were attacked, without those whose label the attack was told.
        guess: On the CPU.
        seconds: Time the attack itself took.
    """

    attack: Attack | Adversary[Any] | Intruder
    targets: Sequence[Target]
    guess: Guess
    seconds: float


def make_attack(settings: AttackSettings) -> Attack | Adversary[Any] | Intruder:
    """Return a passive attack, an active adversary or a malicious client with its settings.

    Args:
        settings: Checked; values out of range raise the attack's own errors.

    Returns:
        The attack.
    """
    catalogue: dict[str, type[Attack | Adversary[Any] | Intruder]] = {
        **ATTACKS,
        **ADVERSARIES,
        **INTRUDERS,
    }
    kind = catalogue[settings.name]
    own = dict(settings.own)
    if settings.restarts is not None and "restarts" in _fields(kind):
        own["restarts"] = settings.restarts
    attack = kind(**own)
    refuse_untold(attack.threat, settings)
    return attack


def attack_run(
    trace: Path,
    settings: AttackSettings,
    *,
    stream: int,
    device: str,
    answers: Path | None = None,
) -> Attacked:
    """Attack a recorded run.

    A run without the messages the attack reads raises :class:`~leakbed.targets.MisfitError`.

    Args:
        trace: Its trace.
        settings: The attack's.
        stream: The adversary's.
        device: As for :func:`leakbed.models.resolve_device`.
        answers: Opened only for an attack whose threat model declares that it is given labels, of
            all targets or of a few.

    Returns:
        The guess of the restart with the lowest objective of the attack's own, target by target.

    Raises:
        UnfitViewError: If restarts are asked of an attack that cannot choose among them.
        MisfitError: If the attack is an active one: what is over cannot be rewritten.
    """
    recorded = Trace(trace)
    evidences = Evidences.of(recorded, settings.collect)
    attack = make_attack(settings)
    if not isinstance(attack, Attack):
        raise MisfitError(
            f"{attack.name} rewrites messages while a run trains, which a recorded trace cannot "
            f"repeat; name it in an experiment's [[attack]] and run that"
        )
    targets = pick_targets(evidences, attack.threat, when=settings.when, count=settings.targets)
    where = resolve_device(device)
    told = tell(attack.threat, targets, answers, known_per_class=settings.known_per_class)
    view = build_view(
        recorded,
        evidences,
        attack.threat,
        targets,
        device=where,
        labels=told.labels,
        known_labels=told.known_labels,
        own_images=told.own_images,
    )
    repeats = 1 if "restarts" in _fields(type(attack)) else settings.restarts or 1
    started = perf_counter()
    guess = attack.run(view, seed=derive(stream, "restart/0"))
    if repeats > 1 and guess.objective is None:
        raise UnfitViewError(f"{attack.name} has no objective to choose by; leave restarts out")
    for repeat in range(1, repeats):
        guess = better(guess, attack.run(view, seed=derive(stream, f"restart/{repeat}")))
    seconds = perf_counter() - started
    targets, guess = unknown_only(targets, on_cpu(guess), told.known_labels)
    return Attacked(attack=attack, targets=targets, guess=guess, seconds=seconds)


@dataclass(frozen=True, kw_only=True)
class Verdict:
    """What the oracle says of a guess, as JSON values.

    Attributes:
        scores: Every metric of the guess.
        baselines: Every metric of what needs no evidence.
        control: The negative control.
        unreliable: Why the numbers should not be trusted, or None.
    """

    scores: dict[str, Any]
    baselines: dict[str, dict[str, float | None]]
    control: dict[str, Any] | None
    unreliable: str | None


def judge(
    attacked: Attacked, answers: AnswerKey, trace: Path, *, stream: int
) -> tuple[Verdict, Truth]:
    """Score a guess against the truth, its baselines and its negative control.

    Args:
        attacked: The guess.
        answers: The run's answer key.
        trace: The run's trace, for the server's part of the model.
        stream: The oracle's, for the untrained bottom stolen models are compared with.

    Returns:
        The verdict, and the truth it was given by.
    """
    guess, infers = attacked.guess, attacked.attack.threat.infers
    truth = answers.truth(attacked.targets, attribute=infers)
    grouped = guess.clusters is not None
    found = baselines(truth, unordered_labels=guess.images is None, clusters=grouped)
    scores = score(guess, truth, baselines=found)
    control, reasons = _control(guess, truth, found)
    reasons += unranked(guess, truth)
    if scores.failures:
        reasons.append(f"{scores.failures} of {scores.targets} targets failed")
    result = {**scores.as_dict(), "by_label": _labelled(scores, truth)}
    if grouped:
        result["upper_bound"] = BOUND
    whole = answers.bottom is not None and len(answers.test_images) > 0
    if guess.clones is not None and whole and _at_the_end(attacked, trace):
        result["stolen_model"] = _stolen(guess.clones, answers, trace, stream).as_dict()
    verdict = Verdict(
        scores=result,
        baselines={name: {**each.means()} for name, each in found.items()},
        control=control,
        unreliable="; ".join(reasons) or None,
    )
    return verdict, truth


def _labelled(scores: Scores, truth: Truth) -> dict[str, dict[str, float]]:
    """Return the scores label by label, under keys that JSON has."""
    return {str(label): means for label, means in by_label(scores, truth).items()}


def keep_guess(attacked: Attacked, path: Path) -> None:
    """Write a guess, so that a later metric can score it without attacking again.

    Args:
        attacked: The guess.
        path: Of a safetensors file.
    """
    guess = attacked.guess
    tensors = {
        name: getattr(guess, name)
        for name in ("images", "labels", "clusters", "attributes", "scores", "objective", "failed")
        if getattr(guess, name) is not None
    }
    _save(tensors, path)


def keep_truth(truth: Truth, path: Path) -> None:
    """Write the attacked samples beside the guess, for the owner's report; of many, labels alone.

    Args:
        truth: Of the attacked targets.
        path: Of a safetensors file.
    """
    shown = {"images": truth.images} if truth.labels.numel() <= _SHOWN else {}
    _save({**shown, "labels": truth.labels}, path)


def read_guess(path: Path) -> Guess:
    """Return a kept guess.

    Args:
        path: From :func:`keep_guess`.

    Returns:
        The guess, without its clones.
    """
    return Guess(**load_file(path))


def _save(tensors: Mapping[str, Tensor], path: Path) -> None:
    path.parent.mkdir(mode=0o700, parents=True, exist_ok=True)
    partial = path.with_suffix(".partial")
    save_file({name: value.contiguous() for name, value in tensors.items()}, partial)
    partial.chmod(0o600)
    partial.replace(path)


def _control(
    guess: Guess, truth: Truth, found: Mapping[str, Scores]
) -> tuple[dict[str, Any] | None, list[str]]:
    if truth.targets < 2:  # noqa: PLR2004  two things can trade places, one cannot
        return None, ["a single target has no negative control"]
    verdict = control_verdict(score(guess, truth.deranged()), found)
    above = ", ".join(verdict["above"])
    reasons = [f"the negative control beats its baseline in {above}"] if above else []
    return dict(verdict), reasons


def _at_the_end(attacked: Attacked, trace: Path) -> bool:
    """Say whether the last round was attacked: the oracle keeps no bottom of an earlier one."""
    number = attacked.targets[0].round
    return bool(number == Trace(trace).about.get("rounds", number))


def _stolen(
    clones: Mapping[str, Tensor], answers: AnswerKey, trace: Path, stream: int
) -> CloneScores:
    recorded = Trace(trace)
    architecture = architecture_of(recorded.about)
    bottom, top = architecture.bottom(0), architecture.top(0)
    held = recorded.holding("server", f"model/round-{recorded.about['rounds']}")
    # Of a U-shaped model the server lacks the head: a clone is scored under the node's own.
    whole = {**_tensors(answers.bottom or {}), **_tensors(held or {})}
    for part in (bottom, top):
        part.load_state_dict({name: whole[name] for name in part.state_dict()})
    return score_clones(
        clones,
        architecture=architecture,
        victim_bottom=bottom.eval(),
        server_top=top.eval(),
        images=answers.test_images,
        labels=answers.test_labels,
        stream=stream,
    )


def _tensors(arrays: Arrays) -> dict[str, Tensor]:
    return {name: torch.from_numpy(value) for name, value in arrays.items()}


def _fields(kind: Any) -> set[str]:  # noqa: ANN401  a dataclass, which a Protocol cannot say
    return {each.name for each in fields(kind)}
