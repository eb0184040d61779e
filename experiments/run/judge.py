"""What the oracle says of a guess: scores beside baselines, rivals and a negative control.

Nothing here attacks: an answer brings the guesses of its rivals with it, so that a kept one is
scored again in seconds.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from statistics import median
from typing import Any

import numpy as np
import torch
from jaxtyping import Float, Int
from safetensors.torch import load_file
from torch import Tensor

from experiments.run.attack import Attacked, Cell, save_tensors
from experiments.run.evasion import Victim, at_the_end, victim_of, whole_network
from experiments.run.guesses import share_on_budget
from experiments.run.malicious_client import UNTRAINED
from experiments.run.malicious_server import decoded_attack
from experiments.run.prepare import Prepared
from experiments.run.targets import Evidences, MisfitError, pick_targets
from experiments.run.training_run import TrainingRun
from leakbed.contracts import Guess
from leakbed.contracts.attack import MaliciousClient
from leakbed.events import Phase, Target
from leakbed.oracle import (
    CONTROL_FAILS,
    CloneScores,
    Scores,
    Truth,
    baselines,
    control_verdict,
    linear_probe,
    score,
    score_clones,
    unranked,
    with_skill,
)
from leakbed.oracle.evasion import Evasion, score_evasion
from leakbed.oracle.metrics import BOUND, HIGHER_LEAKS_MORE, SSIM_WINDOW, has_ssim
from leakbed.oracle.model_scores import NoSuchImagesError, Prototypes, train_judge
from leakbed.oracle.scoring import by_label
from leakbed.oracle.truth import AnswerKey
from leakbed.tap.trace import Trace

_ANSWERED = 16  # samples of which a card keeps what the whole network says: those of a report
_SHOWN = 1000  # samples whose images are kept: of a whole epoch they would be gigabytes
_ALL = 10**9  # targets: every row there is
_LAST = 5  # checkpoints in the median at the end: each is the score of another batch


@dataclass(frozen=True, kw_only=True)
class Verdict:
    """What the oracle says of a guess, as JSON values.

    Attributes:
        scores: Every metric of the guess.
        baselines: Every metric of what needs no evidence.
        control: The negative control.
        unreliable: Why the numbers should not be trusted, or None.
        notes: What a reader of the numbers should know of the scores, one line each.
        stopped_on_budget: Share of the targets at which the attack ran out of its budget of steps.
    """

    scores: dict[str, Any]
    baselines: dict[str, dict[str, float | None]]
    control: dict[str, Any] | None
    unreliable: str | None
    notes: tuple[str, ...] = ()
    stopped_on_budget: float | None = None


def judge(
    attacked: Attacked, answers: AnswerKey, trace: Path | Trace, *, stream: int
) -> tuple[Verdict, Truth]:
    """Score a guess against the truth, its baselines and its negative control.

    Args:
        attacked: The guess, with its rivals.
        answers: The run's answer key.
        trace: The run's trace, for the server's part of the model.
        stream: The oracle's, for the untrained networks that stolen models are compared with.

    Returns:
        The verdict, and the truth it was given by.
    """
    guess, infers = attacked.guess, attacked.attack.threat.infers
    recorded = trace if isinstance(trace, Trace) else Trace(trace, partial=True)
    truth = answers.truth(attacked.targets, attribute=infers)
    if guess.adversarial is not None:
        return _evaded(attacked, answers, recorded, truth), truth
    grouped = guess.clusters is not None
    found = baselines(
        truth, unordered_labels=guess.images is None, clusters=grouped, beside=attacked.rivals
    )
    scores = score(guess, truth, baselines=found)
    control, reasons = _control(guess, truth, found)
    reasons += [*unranked(guess, truth), *attacked.missing]
    if scores.failures:
        reasons.append(f"{scores.failures} of {scores.targets} targets failed")
    result = {**scores.as_dict(), "by_label": _labelled(scores, truth)}
    if grouped:
        result["upper_bound"] = BOUND
    whole = answers.bottom is not None and len(answers.test_images) > 0
    if guess.clones is not None and whole and at_the_end(attacked.targets, recorded):
        result["stolen_model"] = _stolen(guess.clones, answers, recorded, stream).as_dict()
    verdict = Verdict(
        scores=result,
        baselines={name: each.means_and_errors() for name, each in found.items()},
        control=control,
        unreliable="; ".join(reasons) or None,
        notes=_without_ssim(guess, truth),
        stopped_on_budget=share_on_budget(guess),
    )
    return verdict, truth


def _evaded(attacked: Attacked, answers: AnswerKey, trace: Trace, truth: Truth) -> Verdict:
    """Score altered inputs on the whole network, beside rivals, bounds and a control."""
    if attacked.control is None:
        raise MisfitError(
            "altered inputs are scored beside those of rivals, of which none are here"
        )
    victim = victim_of(answers, trace, attacked.targets)
    images, labels = truth.images[:, 0], truth.labels[:, 0]
    rivals = {
        name: scored(each, victim, images=images, labels=labels)
        for name, each in attacked.rivals.items()
    }
    found = {name: as_scores(each) for name, each in rivals.items()}
    own = scored(attacked.guess, victim, images=images, labels=labels)
    control = as_scores(scored(attacked.control, victim, images=images, labels=labels))
    verdict = control_verdict(control, found)
    scores = with_skill(as_scores(own), found)
    reasons = [CONTROL_FAILS + ", ".join(verdict["above"])] if verdict["above"] else []
    if scores.failures:
        reasons.append(f"{scores.failures} of {scores.targets} targets failed")
    return Verdict(
        scores={
            **scores.as_dict(),
            "evasion": {
                "clean_accuracy": own.clean_accuracy,
                "budgets": own.as_list(),
                "beside": {name: each.as_list() for name, each in rivals.items()},
                "answers": {
                    "natural": own.natural[:_ANSWERED].tolist(),
                    "altered": own.altered[:_ANSWERED].tolist(),
                },
            },
        },
        baselines={name: each.means_and_errors() for name, each in found.items()},
        control=dict(verdict),
        unreliable="; ".join(reasons) or None,
    )


def _without_ssim(guess: Guess, truth: Truth) -> tuple[str, ...]:
    """Say where images have no SSIM."""
    if guess.images is None or has_ssim(truth.images):
        return ()
    high, wide = truth.images.shape[-2:]
    return (
        f"SSIM is left out: images of {high} x {wide} pixels hold no window of "
        f"{SSIM_WINDOW} x {SSIM_WINDOW}",
    )


def _labelled(scores: Scores, truth: Truth) -> dict[str, dict[str, float]]:
    """Return the scores label by label, under keys that JSON has."""
    return {str(label): means for label, means in by_label(scores, truth).items()}


def keep_truth(truth: Truth, path: Path) -> None:
    """Write the attacked samples beside the guess, for the owner; of many, labels alone."""
    shown = {"images": truth.images} if truth.labels.numel() <= _SHOWN else {}
    save_tensors({**shown, "labels": truth.labels}, path)


def _control(
    guess: Guess, truth: Truth, found: Mapping[str, Scores]
) -> tuple[dict[str, Any] | None, list[str]]:
    if truth.targets < 2:  # noqa: PLR2004  two things can trade places, one cannot
        return None, ["a single target has no negative control"]
    verdict = control_verdict(score(guess, truth.deranged()), found)
    above = ", ".join(verdict["above"])
    return dict(verdict), [CONTROL_FAILS + above] if above else []


def _stolen(
    clones: Mapping[str, Tensor], answers: AnswerKey, trace: Trace, stream: int
) -> CloneScores:
    bottom, top, architecture = whole_network(answers, trace)
    return score_clones(
        clones,
        architecture=architecture,
        victim_bottom=bottom.eval(),
        server_top=top.eval(),
        images=answers.test_images,
        labels=answers.test_labels,
        stream=stream,
    )


def scored(
    guess: Guess,
    victim: Victim,
    *,
    images: Float[Tensor, " targets channels height width"],
    labels: Int[Tensor, " targets"],
) -> Evasion:
    """Return what the whole network says of a guess's altered images.

    Args:
        guess: With ``adversarial`` and ``budgets``.
        victim: Whose network.
        images: The natural ones.
        labels: Theirs.

    Returns:
        The answers.

    Raises:
        ValueError: If the guess states no altered images or no budgets.
    """
    if guess.adversarial is None or guess.budgets is None:
        raise ValueError("the guess has no altered images, or does not state their budgets")
    return score_evasion(
        guess.adversarial,
        budgets=guess.budgets,
        network=victim.network,
        images=images,
        labels=labels,
        failed=guess.failed,
    )


def as_scores(found: Evasion) -> Scores:
    """Return the misclassification within the first budget in the form of every other score."""
    return Scores(
        metrics={"misclassification": found.misclassification()},
        targets=len(found.labels),
        rows=1,
        candidates=0,
        failures=found.failures,
    )


def never_hijacked(control: TrainingRun, cell: Cell) -> dict[str, Any]:
    """Return the scores of an adversary that hijacked nobody, on the same targets.

    Args:
        control: Trained with the adversary, which forged nothing.
        cell: The adversary's.

    Returns:
        Every metric with its spread, as of any attack.
    """
    honest = decoded_attack(control, cell)
    infers = honest.attack.threat.infers
    truth = AnswerKey.read(control.answers).truth(honest.targets, attribute=infers)
    found = baselines(truth, unordered_labels=honest.guess.images is None)
    return score(honest.guess, truth, baselines=found).as_dict()


def honest_probe(control: TrainingRun, cell: Cell, *, stream: int) -> dict[str, Any]:
    """Return what a linear head reads off honest smashed data, told the truth of half of them.

    Args:
        control: Trained with the adversary, which forged nothing.
        cell: The adversary's; its targets may be of training or of evaluation.
        stream: The oracle's.

    Returns:
        ``honest_probe``, from :func:`leakbed.oracle.linear_probe`; nothing where the adversary
        infers no attribute.
    """
    threat = cell.attack.threat
    if threat.infers is None:
        return {}
    evidences = Evidences.of(Trace(control.trace))
    targets = pick_targets(evidences, threat, when=cell.settings.attack.when, count=_ALL)
    truth = AnswerKey.read(control.answers).truth(targets, attribute=threat.infers)
    found = linear_probe(
        _smashed(evidences, targets),
        torch.empty(0) if truth.attributes is None else truth.attributes[:, 0],
        samples=truth.positions[:, 0],
        stream=stream,
    )
    return {"honest_probe": found}


def _smashed(evidences: Evidences, targets: Sequence[Target]) -> Tensor:
    """Return the smashed row of every target."""
    batches = {(Phase.TRAIN, *place): event for place, event in evidences.smashed.items()}
    batches |= {(Phase.EVALUATE, each.node, each.step): each for each in evidences.evaluated}
    rows = [
        batches[each.phase, each.node, each.step].smashed[int(each.row or 0)] for each in targets
    ]
    return torch.from_numpy(np.stack(rows))


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


def judge_samples(
    attacked: Attacked, run: TrainingRun, prepared: Prepared
) -> tuple[Verdict, Truth]:
    """Score a malicious client's samples beside what needs no victim.

    Args:
        attacked: Its samples.
        run: In which it got them.
        prepared: That run's ingredients.

    Returns:
        The verdict, and as truth the private image of the class nearest to each sample.

    Raises:
        MisfitError: If there are no images to judge by.
    """
    answers, images = AnswerKey.read(run.answers), attacked.guess.images
    if images is None or not isinstance(attacked.attack, MaliciousClient):
        raise MisfitError("only an intruder's samples can be judged by the class they show")
    try:
        prototypes = _prototypes(answers, attacked.attack.aim, prepared.stream("oracle/judge"))
    except NoSuchImagesError as error:
        raise MisfitError(str(error)) from error
    untrained = prototypes.score(_images_of(attacked.rivals[UNTRAINED]))
    found = prototypes.baselines()
    verdict = control_verdict(untrained, {"chance": found["chance"]})
    found[UNTRAINED] = untrained
    scores = with_skill(prototypes.score(images.flatten(0, 1)), found)
    judge = prototypes.judge
    described = {"accuracy": judge.accuracy, "rows": judge.rows, "held_out": judge.held_out}
    turns = load_file(run.samples)["turns"].tolist()
    return (
        Verdict(
            scores={**scores.as_dict(), "judge": described, "turns": turns},
            baselines={name: {**each.means()} for name, each in found.items()},
            control={**verdict, "untrained_victim": untrained.as_dict()},
            unreliable=_doubts(verdict["above"], scores.failures, scores.targets),
        ),
        _nearest(prototypes, images.flatten(0, 1)),
    )


def _images_of(samples: Guess) -> Tensor:
    if samples.images is None:
        raise MisfitError("a malicious client's samples are images, and there are none")
    return samples.images.flatten(0, 1)


def _doubts(above: list[str], failures: int, targets: int) -> str | None:
    reasons = [CONTROL_FAILS + ", ".join(above)] if above else []
    reasons += [f"{failures} of {targets} targets failed"] if failures else []
    return "; ".join(reasons) or None


def _prototypes(answers: AnswerKey, label: int, stream: int) -> Prototypes:
    """Return the class that samples should show, with a judge trained on all private rows."""
    judge = train_judge(
        answers.images,
        answers.labels,
        test_images=answers.test_images,
        test_labels=answers.test_labels,
        num_classes=answers.num_classes,
        stream=stream,
    )
    held = answers.test_labels == label
    return Prototypes(
        judge=judge,
        label=label,
        num_classes=answers.num_classes,
        real=answers.images[answers.labels == label],
        held_out=answers.test_images[held],
        others=answers.test_images[~held],
    )


def _nearest(prototypes: Prototypes, images: Float[Tensor, " count *image"]) -> Truth:
    """Return the private image of the class nearest to each sample, as a truth to be shown."""
    position = prototypes.nearest(images)
    return Truth(
        images=prototypes.real[position].unsqueeze(1),
        labels=torch.full((len(position), 1), prototypes.label),
        num_classes=prototypes.num_classes,
        candidates=prototypes.real,
        positions=position.unsqueeze(1),
    )
