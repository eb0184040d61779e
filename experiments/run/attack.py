"""One attack on one recorded run: from trace to guess, from guess to scores.

The attack gets a view and a stream of its own; only afterwards does the oracle open the answers.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, fields
from functools import partial
from pathlib import Path
from time import perf_counter
from typing import Any

import torch
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from attacks import ADVERSARIES, ATTACKS, INTRUDERS
from attacks.building_blocks.gradient_matching import GradientMatching
from experiments.results.cards import Exposure
from experiments.run.evasion import Victim, as_scores, beside, of_another, scored
from experiments.run.guesses import best_restart, on_cpu, share_on_budget
from experiments.run.labels import (
    Rivalry,
    grant_labels,
    infers_labels,
    refuse_ungranted,
    unknown_only,
)
from experiments.run.targets import Evidences, MisfitError, exposure, left_out, pick_targets
from experiments.run.view import architecture_of, build_view
from experiments.settings.plugins import AttackSettings
from experiments.settings.schema import SettingsError
from leakbed.contract_checks import blame, blamed, guess_breaches
from leakbed.contract_trials import refuse_breaches
from leakbed.contracts import (
    Adversary,
    Attack,
    BrokenPluginError,
    Guess,
    UnfitViewError,
    View,
    Watcher,
)
from leakbed.contracts.attack import MaliciousClient
from leakbed.errors import naming_folder
from leakbed.events import Arrays
from leakbed.models import Architecture, ModelMismatchError, UnknownModelError
from leakbed.oracle import (
    CONTROL_FAILS,
    CloneScores,
    Scores,
    Truth,
    baselines,
    control_verdict,
    score,
    score_clones,
    unranked,
    with_skill,
)
from leakbed.oracle.metrics import BOUND, SSIM_WINDOW, has_ssim
from leakbed.oracle.scoring import by_label
from leakbed.oracle.truth import AnswerKey, Target
from leakbed.plugins import is_own, picked
from leakbed.seeds import derive, generator, scoped
from leakbed.tap.trace import Trace
from leakbed.tensors import load, resolve_device
from strategies import PROTOCOLS

_ANSWERED = 16  # samples of which a card keeps what the whole network says: those of a report
_SHOWN = 1000  # samples whose images are kept: of a whole epoch they would be gigabytes


_ANSWERS = ("images", "labels", "clusters", "attributes", "scores", "adversarial", "clones")


class EmptyGuessError(ValueError):
    """An attack that answered with nothing."""


@dataclass(frozen=True, kw_only=True, eq=False)
class Attacked:
    """An attack's answer, with what it took.

    Attributes:
        attack: With its settings.
        targets: Which messages were attacked, without those whose label the attack was told.
        guess: On the CPU.
        seconds: Time the attack itself took.
        rivalry: How to run it again, for what its labels or altered inputs are compared with; None
            of an attack that guesses something else, or was not run on a trace.
        exposure: When and from how many rows the attacked messages were made.
        objective: What it minimised, beside what noise and other images would leave of it.
        notes: What a reader of the numbers should know of the attack, one line each.
    """

    attack: Attack | Adversary[Any] | MaliciousClient
    targets: Sequence[Target]
    guess: Guess
    seconds: float
    rivalry: Rivalry | None = None
    exposure: Exposure | None = None
    objective: Mapping[str, float] = field(default_factory=dict)
    notes: tuple[str, ...] = ()

    def __post_init__(self) -> None:
        """Refuse an answer that says nothing.

        Raises:
            EmptyGuessError: No field that could be scored is there.
        """
        if all(getattr(self.guess, name) is None for name in _ANSWERS):
            raise EmptyGuessError(
                f"{self.attack.name} returned a Guess of nothing; set at least one of "
                f"{', '.join(_ANSWERS)}"
            )


def make_attack(settings: AttackSettings) -> Attack | Adversary[Any] | MaliciousClient:
    """Return a passive attack, an active adversary or a malicious client with its settings.

    Args:
        settings: Checked; values out of range raise the attack's own errors.

    Returns:
        The attack.

    Raises:
        SettingsError: If it is to learn live, and can only read a run that is over.
    """
    catalogue: dict[str, type[Attack | Adversary[Any] | MaliciousClient]] = {
        **ATTACKS,
        **ADVERSARIES,
        **INTRUDERS,
    }
    kind = picked(settings.name, catalogue, "attack")
    own = dict(settings.own)
    if settings.restarts is not None and "restarts" in _fields(kind):
        own["restarts"] = settings.restarts
    attack = kind(**own)
    refuse_ungranted(attack.threat, settings)
    if settings.live and not isinstance(attack, Watcher):
        live = [name for name, each in ATTACKS.items() if hasattr(each, "watch")]
        raise SettingsError(
            f"attack {settings.name}: live = true, but it reads a run that is over and has nothing "
            f"that learns beside one; leave live out, or use {' or '.join(live)}"
        )
    return attack


def attack_run(
    trace: Path | Trace,
    settings: AttackSettings,
    *,
    stream: int,
    device: str,
    answers: Path | None = None,
) -> Attacked:
    """Attack a recorded run.

    A run without the messages the attack reads raises
    :class:`~experiments.run.targets.MisfitError`, and restarts asked of an attack that cannot
    choose among them a :class:`~leakbed.contracts.UnfitViewError`.

    Args:
        trace: Its trace; an opened one may say other things of its run than were recorded.
        settings: The attack's.
        stream: The adversary's.
        device: As for :func:`leakbed.models.resolve_device`.
        answers: Opened only for an attack whose threat model declares that it is given labels, of
            all targets or of a few.

    Returns:
        The guess of the restart with the lowest objective of the attack's own, target by target.

    Raises:
        MisfitError: If the attack is an active one: what is over cannot be rewritten.
    """
    recorded = _opened(trace)
    evidences = Evidences.of(recorded, settings.collect)
    attack = make_attack(settings)
    if not isinstance(attack, Attack):
        raise MisfitError(
            f"{attack.name} rewrites messages while a run trains, which a recorded trace cannot "
            f"repeat; name it in an experiment's [[attack]] and run that"
        )
    targets = pick_targets(evidences, attack.threat, when=settings.when, count=settings.targets)
    where = resolve_device(device)
    told = grant_labels(attack.threat, targets, answers, known_per_class=settings.known_per_class)
    view = build_view(
        recorded,
        evidences,
        attack.threat,
        targets,
        device=where,
        labels=told.labels,
        known_labels=told.known_labels,
        own_images=told.own_images,
        natural_images=told.natural_images,
    )
    if is_own(settings.name):
        refuse_breaches(attack)
    repeats = 1 if "restarts" in _fields(type(attack)) else settings.restarts or 1
    again = partial(_best, attack, repeats)
    started = perf_counter()
    guess = again(view, stream)
    seconds = perf_counter() - started
    rivalry = None
    if infers_labels(guess, attack.threat) or guess.adversarial is not None:
        rivalry = Rivalry(threat=attack.threat, view=view, targets=targets, run=again)
    exposed, notes = met(recorded, evidences, targets, asked=settings.targets)
    compared = compared_objective(attack, view, guess, stream=derive(stream, "objective"))
    left, guess = unknown_only(targets, on_cpu(guess), told.known_labels)
    return Attacked(
        attack=attack,
        targets=left,
        guess=guess,
        seconds=seconds,
        rivalry=rivalry,
        exposure=exposed,
        objective=compared,
        notes=notes,
    )


def _opened(trace: Path | Trace) -> Trace:
    return trace if isinstance(trace, Trace) else Trace(trace, partial=True)


def compared_objective(
    attack: Attack, view: View, guess: Guess, *, stream: int
) -> dict[str, float]:
    """Say what an attack minimised, and what images that it never saw would leave of it.

    Without the truth nothing else tells an attack that found its images from one that did not.

    Args:
        attack: Any; of one that matches no gradients there is nothing to compare.
        view: What it read.
        guess: What it found.
        stream: Draws the noise.

    Returns:
        Means over targets: of the guess, of noise in [0, 1], of grey, and of the mean public image
        where the view has any, all under the guessed labels; and how many targets are solved.
    """
    if not isinstance(attack, GradientMatching) or guess.images is None or guess.labels is None:
        return {}
    rows = guess.images.shape
    beside = {
        "attack": guess.images,
        "noise": torch.rand(rows, generator=generator(stream)).to(guess.images),
        "grey": torch.full_like(guess.images, 0.5),
    }
    if view.public_images is not None and len(view.public_images):
        beside["public image"] = view.public_images.mean(0).expand(rows).to(guess.images)
    found = {name: attack.explained(view, each, guess.labels) for name, each in beside.items()}
    objective = found["attack"][0] if guess.objective is None else guess.objective
    solved = objective <= found["attack"][1].to(objective)
    means = {name: float(values.mean()) for name, (values, _) in found.items()}
    return {**means, "attack": float(objective.mean()), "solved": int(solved.sum())}


def _best(attack: Attack, repeats: int, view: View, stream: int) -> Guess:
    """Return the guess of the restart with the lowest objective, target by target."""
    guess = _once(attack, view, seed=derive(stream, "restart/0"))
    if repeats > 1 and guess.objective is None:
        raise UnfitViewError(f"{attack.name} has no objective to choose by; leave restarts out")
    for repeat in range(1, repeats):
        again = _once(attack, view, seed=derive(stream, f"restart/{repeat}"))
        guess = best_restart(guess, again)
    return guess


def met(
    trace: Trace, evidences: Evidences, targets: Sequence[Target], *, asked: int
) -> tuple[Exposure, tuple[str, ...]]:
    """Say what an attack met in a run.

    Args:
        trace: Of the run.
        evidences: The attacked round.
        targets: All that were attacked.
        asked: How many targets were asked for.

    Returns:
        When and from how many rows the messages were made, and notes for the card.
    """
    entry = PROTOCOLS.get(str(trace.about.get("protocol")))
    in_turn = entry is not None and entry.in_turn
    exposed = exposure(evidences, targets, trace.about, in_turn=in_turn)
    notes = []
    if len(targets) < asked:
        notes.append(
            f"{len(targets)} targets of the {asked} asked for: round {targets[0].round} holds no "
            "more messages to attack"
        )
    if trace.incomplete is not None:
        notes.append(f"the trace is incomplete: {trace.incomplete}")
    if (others := left_out(evidences, targets)) is not None:
        notes.append(others)
    if _returns_probabilities(architecture_of(trace.about)):
        notes.append(
            "the network ends in a Softmax, of which the loss takes the softmax again: gradients "
            "are smaller than those of a network that ends in a linear layer"
        )
    return exposed, tuple(notes)


def _returns_probabilities(architecture: Architecture) -> bool:
    """Say whether a network's outputs are probabilities already; of one not here, nobody knows."""
    try:
        network = architecture.build(0).eval()
    except (UnknownModelError, ModelMismatchError):
        return False
    noise = torch.rand(4, *architecture.image_shape, generator=torch.Generator().manual_seed(0))
    with torch.no_grad():
        outputs = network(noise)
    sums = outputs.sum(1)
    several = architecture.num_classes > 1
    return several and bool((outputs >= 0).all() and torch.allclose(sums, torch.ones_like(sums)))


def _once(attack: Attack, view: View, *, seed: int) -> Guess:
    """Run an attack once; what it draws from the global generators is fixed by its seed as well."""
    with scoped(derive(seed, "global")), blamed(attack, "attack"):
        guess = attack.run(view, seed=seed)
        if said := guess_breaches(guess, view):
            raise BrokenPluginError(blame(attack, "attack", f"returned {said[0]}"))
        return guess


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
        attacked: The guess.
        answers: The run's answer key.
        trace: The run's trace, for the server's part of the model.
        stream: The oracle's, for the untrained networks that stolen models and attacks on labels
            are compared with.

    Returns:
        The verdict, and the truth it was given by.
    """
    guess, infers = attacked.guess, attacked.attack.threat.infers
    truth = answers.truth(attacked.targets, attribute=infers)
    if guess.adversarial is not None:
        return _evaded(attacked, answers, trace, truth, stream=derive(stream, "evasion")), truth
    grouped = guess.clusters is not None
    beside, missing = _rivals(attacked, answers, trace, stream)
    found = baselines(truth, unordered_labels=guess.images is None, clusters=grouped, beside=beside)
    scores = score(guess, truth, baselines=found)
    control, reasons = _control(guess, truth, found)
    reasons += [*unranked(guess, truth), *missing]
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
        baselines={name: each.means_and_errors() for name, each in found.items()},
        control=control,
        unreliable="; ".join(reasons) or None,
        notes=_without_ssim(guess, truth),
        stopped_on_budget=share_on_budget(guess),
    )
    return verdict, truth


def _evaded(
    attacked: Attacked, answers: AnswerKey, trace: Path | Trace, truth: Truth, *, stream: int
) -> Verdict:
    """Score altered inputs on the whole network, beside rivals, bounds and a control."""
    rivalry, guess = attacked.rivalry, attacked.guess
    if rivalry is None or answers.bottom is None or not _at_the_end(attacked, trace):
        raise MisfitError(
            "altered inputs are scored on the whole network as the last round left it, which the "
            "answer key has of a split run that ended; use collect = 'last'"
        )
    bottom, top, architecture = _whole(answers, trace)
    victim = Victim(
        bottom=bottom.eval(),
        network=nn.Sequential(bottom, top).eval().requires_grad_(requires_grad=False),
        architecture=architecture,
        answers=answers,
    )
    view, images, labels = rivalry.view, truth.images[:, 0], truth.labels[:, 0]
    budgets = guess.budgets or ()
    given = beside(attacked.attack, view, victim, budgets=budgets, labels=labels, stream=stream)
    rivals = {
        name: scored(Guess(adversarial=each, budgets=budgets), victim, images=images, labels=labels)
        for name, each in given.items()
    }
    found = {name: as_scores(each) for name, each in rivals.items()}
    own = scored(guess, victim, images=images, labels=labels)
    other = rivalry.run(of_another(view, victim, stream=stream), derive(stream, "control"))
    control = as_scores(scored(on_cpu(other), victim, images=images, labels=labels))
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


def _rivals(
    attacked: Attacked, answers: AnswerKey, trace: Path | Trace, stream: int
) -> tuple[dict[str, Guess], list[str]]:
    """Return what needs no message of labels, of the scored targets, and why one is missing."""
    rivalry = attacked.rivalry
    if rivalry is None:
        return {}, []
    told = rivalry.view.known_labels
    drawn = derive(stream, "label-baselines")
    found, missing = rivalry.guesses(answers, _opened(trace), stream=drawn)
    known, targets = None if told is None else told.cpu(), rivalry.targets
    scored = {name: unknown_only(targets, on_cpu(each), known)[1] for name, each in found.items()}
    return scored, missing


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


def keep_guess(attacked: Attacked, path: Path) -> None:
    """Write a guess, so that a later metric can score it without attacking again.

    Args:
        attacked: The guess.
        path: Of a safetensors file.
    """
    tensors = {
        each.name: getattr(attacked.guess, each.name)
        for each in fields(Guess)
        if isinstance(getattr(attacked.guess, each.name), Tensor)
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
    with naming_folder(path.parent):
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
    return dict(verdict), [CONTROL_FAILS + above] if above else []


def _at_the_end(attacked: Attacked, trace: Path | Trace) -> bool:
    """Say whether the last round was attacked: the oracle keeps no bottom of an earlier one."""
    number = attacked.targets[0].round
    return bool(number == _opened(trace).about.get("rounds", number))


def _stolen(
    clones: Mapping[str, Tensor], answers: AnswerKey, trace: Path | Trace, stream: int
) -> CloneScores:
    bottom, top, architecture = _whole(answers, trace)
    return score_clones(
        clones,
        architecture=architecture,
        victim_bottom=bottom.eval(),
        server_top=top.eval(),
        images=answers.test_images,
        labels=answers.test_labels,
        stream=stream,
    )


def _whole(
    answers: AnswerKey, trace: Path | Trace
) -> tuple[nn.Sequential, nn.Sequential, Architecture]:
    """Return the network as the last round left it, in two parts, and its layers."""
    recorded = _opened(trace)
    architecture = architecture_of(recorded.about)
    bottom, top = architecture.bottom(0), architecture.top(0)
    held = recorded.holding("server", f"model/round-{recorded.about['rounds']}")
    # Of a U-shaped model the server lacks the head, which the answer key has beside the bottom.
    whole = {**_tensors(answers.bottom or {}), **_tensors(held or {})}
    for part in (bottom, top):
        load(part, {name: whole[name] for name in part.state_dict()})
    return bottom, top, architecture


def _tensors(arrays: Arrays) -> dict[str, Tensor]:
    return {name: torch.from_numpy(value) for name, value in arrays.items()}


def _fields(kind: Any) -> set[str]:  # noqa: ANN401  a dataclass, which a Protocol cannot say
    return {each.name for each in fields(kind)}
