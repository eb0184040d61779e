"""One attack on one recorded run: from trace to guess, which is kept so that it is scored again.

The attack gets a view and a stream of its own. Whatever would have to run it once more for a score
(the guesses of its rivals, of its control) is made here too and kept with it: what
:mod:`experiments.run.judge` says of an answer needs no attack.
"""

import json
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass, field, fields, replace
from functools import partial
from pathlib import Path
from time import perf_counter
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor

from attacks import ADVERSARIES, ATTACKS, INTRUDERS
from attacks.building_blocks.gradient_matching import GradientMatching
from experiments.results.cards import Exposure, written_whole
from experiments.run.evasion import beside, of_another, victim_of
from experiments.run.granted import grant_kinds, refuse_grants
from experiments.run.guesses import best_restart, on_cpu
from experiments.run.labels import (
    Rivalry,
    grant_labels,
    infers_labels,
    refuse_ungranted,
    unknown_only,
)
from experiments.run.targets import Evidences, MisfitError, exposure, left_out, pick_targets
from experiments.run.training_run import TrainingRun
from experiments.run.view import architecture_of, build_view
from experiments.settings.cells import CellSettings
from experiments.settings.plugins import AttackSettings
from experiments.settings.schema import SettingsError
from leakbed.contract_checks import blame, blamed, guess_breaches
from leakbed.contract_trials import refuse_breaches
from leakbed.contracts import (
    Adversary,
    Attack,
    BrokenPluginError,
    Evidence,
    Guess,
    UnfitError,
    UnfitViewError,
    View,
    Watcher,
)
from leakbed.contracts.attack import MaliciousClient
from leakbed.contracts.kinds import renewed
from leakbed.events import Phase, Target
from leakbed.lookup import ImportPathError
from leakbed.models import Architecture, ModelMismatchError, UnknownModelError
from leakbed.objects import steady
from leakbed.oracle.truth import AnswerKey
from leakbed.plugins import is_own, picked
from leakbed.seeds import derive, generator, scoped
from leakbed.tap.trace import Trace
from leakbed.tensors import resolve_device
from strategies import Protocol, find_protocol

Method = Attack | Adversary[Any] | MaliciousClient
"""An attack of any of the three contracts."""
_ANSWERS = ("images", "labels", "clusters", "attributes", "scores", "adversarial", "clones")


class EmptyGuessError(UnfitError):
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
            of an attack that guesses something else, was not run on a trace, or was kept.
        rivals: What its labels, altered inputs or samples are compared with, of the same targets.
        control: What it makes of another network's messages, where it alters inputs.
        missing: Why a rival is not there.
        exposure: When and from how many rows the attacked messages were made.
        objective: What it minimised, beside what noise and other images would leave of it.
        notes: What a reader of the numbers should know of the attack, one line each.
    """

    attack: Method
    targets: Sequence[Target]
    guess: Guess
    seconds: float
    rivalry: Rivalry | None = None
    rivals: Mapping[str, Guess] = field(default_factory=dict)
    control: Guess | None = None
    missing: tuple[str, ...] = ()
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


@dataclass(frozen=True, kw_only=True, eq=False)
class Cell:
    """A cell with its attack, which is made once and for this cell alone.

    By contract an attack holds settings and no state. One of a user's that holds some all the same
    can so pass it to no other cell; what acts in a training is made there, of its settings.

    Attributes:
        settings: Which alone go to another process.
        attack: Of those settings.
    """

    settings: CellSettings
    attack: Method

    @classmethod
    def of(cls, settings: CellSettings) -> "Cell":
        """Make a cell's attack; values out of range raise the attack's own errors."""
        return cls(settings=settings, attack=make_attack(settings.attack))


def make_attack(settings: AttackSettings) -> Method:
    """Return a passive attack, an active adversary or a malicious client with its settings.

    Args:
        settings: Checked; values out of range raise the attack's own errors.

    Returns:
        The attack.

    Raises:
        SettingsError: If it is to learn live, and can only read a run that is over.
    """
    catalogue: dict[str, type[Method]] = {
        **ATTACKS,
        **ADVERSARIES,
        **INTRUDERS,
    }
    kind = picked(settings.name, catalogue, "attack")
    own = dict(settings.own)
    if settings.restarts is not None and "restarts" in _fields(kind):
        own["restarts"] = settings.restarts
    attack: Method = kind(**own)
    refuse_ungranted(attack.threat, settings)
    refuse_grants(attack.threat, settings)
    if settings.live and not isinstance(attack, Watcher):
        live = [name for name, each in ATTACKS.items() if hasattr(each, "watch")]
        raise SettingsError(
            f"attack {settings.name}: live = true, but it reads a run that is over and has nothing "
            f"that learns beside one; leave live out, or use {' or '.join(live)}"
        )
    if settings.live and attack.threat.kinds:
        raise SettingsError(
            f"attack {settings.name}: live = true, but {', '.join(attack.threat.kinds)} is granted "
            "of a run that is over; leave live out"
        )
    return attack


def attack_run(
    trace: Path | Trace,
    settings: AttackSettings,
    *,
    stream: int,
    device: str,
    answers: Path | AnswerKey | None = None,
    attack: Method | None = None,
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
        attack: Of those settings, where it was made before.

    Returns:
        The guess of the restart with the lowest objective of the attack's own, target by target.

    Raises:
        MisfitError: If the attack is an active one: what is over cannot be rewritten.
    """
    recorded = _opened(trace)
    evidences = Evidences.of(recorded, settings.collect)
    attack = make_attack(settings) if attack is None else attack
    if not isinstance(attack, Attack):
        raise MisfitError(
            f"{attack.name} rewrites messages while a run trains, which a recorded trace cannot "
            f"repeat; name it in an experiment's [[attack]] and run that"
        )
    if Evidence.UPDATE in attack.threat.evidence or attack.threat.evidence_kinds:
        evidences = evidences.by_node(recorded)
    targets = pick_targets(evidences, attack.threat, when=settings.when, count=settings.targets)
    where = resolve_device(device)
    told = grant_labels(attack.threat, targets, answers, known_per_class=settings.known_per_class)
    kinds, granted = grant_kinds(
        attack.threat, settings, recorded, targets, answers=answers, device=where, stream=stream
    )
    view = build_view(
        recorded,
        evidences,
        attack.threat,
        targets,
        device=where,
        kinds=kinds,
        **{each.name: getattr(told, each.name) for each in fields(told)},
    )
    if is_own(settings.name):
        refuse_breaches(attack)
    repeats = 1 if "restarts" in _fields(type(attack)) else settings.restarts or 1
    again = partial(_best, attack, repeats)
    started = perf_counter()
    guess = again(view, stream)
    seconds = perf_counter() - started
    compares = infers_labels(guess, attack.threat) or guess.adversarial is not None
    rivalry = Rivalry(threat=attack.threat, view=view, targets=targets, run=again)
    exposed, notes = met(recorded, evidences, targets, asked=settings.targets)
    compared = compared_objective(attack, view, guess, stream=derive(stream, "objective"))
    left, guess = unknown_only(targets, on_cpu(guess), told.known_labels)
    return Attacked(
        attack=attack,
        targets=left,
        guess=guess,
        seconds=seconds,
        rivalry=rivalry if compares else None,
        exposure=exposed,
        objective=compared,
        notes=(*notes, *granted),
    )


def answer(run: TrainingRun, cell: Cell, *, trace: Trace) -> Attacked:
    """Attack a run of ours as a cell says, with what stands beside the answer."""
    training, asked = cell.settings.training, cell.settings.attack
    attacked = attack_run(
        trace,
        asked,
        stream=derive(training.seed, f"adversary/{steady(asked.name)}"),
        device=training.device,
        answers=run.answers if run.held is None else run.answer_key(),
        attack=cell.attack,
    )
    if attacked.rivalry is None:
        return attacked
    return with_rivals(attacked, run.answer_key(), trace, stream=derive(training.seed, "oracle"))


def with_rivals(
    attacked: Attacked, answers: AnswerKey, trace: Path | Trace, *, stream: int
) -> Attacked:
    """Return an answer with what stands beside it, for which the attack may run again.

    Altered inputs without the whole network raise :class:`~experiments.run.targets.MisfitError`.

    Args:
        attacked: From :func:`attack_run`.
        answers: The run's answer key.
        trace: The run's.
        stream: The oracle's, for the untrained networks of rivals.

    Returns:
        The same answer where nothing of the kind is compared with it.
    """
    rivalry, guess = attacked.rivalry, attacked.guess
    if rivalry is None:
        return attacked
    recorded = _opened(trace)
    if guess.adversarial is not None:
        return _beside_altered(attacked, rivalry, answers, recorded, derive(stream, "evasion"))
    told = rivalry.view.known_labels
    drawn = derive(stream, "label-baselines")
    found, missing = rivalry.guesses(answers, recorded, stream=drawn)
    known, targets = None if told is None else told.cpu(), rivalry.targets
    rivals = {name: unknown_only(targets, on_cpu(each), known)[1] for name, each in found.items()}
    return replace(attacked, rivals=rivals, missing=tuple(missing))


def _beside_altered(
    attacked: Attacked, rivalry: Rivalry, answers: AnswerKey, trace: Trace, stream: int
) -> Attacked:
    """Return altered inputs with those of rivals and bounds, and of the control."""
    if rivalry.threat.kinds:
        raise MisfitError(
            "altered inputs stand beside the same attack on another network's messages, of which "
            f"nobody has {', '.join(rivalry.threat.kinds)}; alter them by the contracts' own "
            "evidence and knowledge"
        )
    victim, view = victim_of(answers, trace, attacked.targets), rivalry.view
    budgets, truth = attacked.guess.budgets or (), answers.truth(attacked.targets)
    labels = truth.labels[:, 0]
    given = beside(attacked.attack, view, victim, budgets=budgets, labels=labels, stream=stream)
    other = rivalry.run(of_another(view, victim, stream=stream), derive(stream, "control"))
    return replace(
        attacked,
        rivals={name: Guess(adversarial=each, budgets=budgets) for name, each in given.items()},
        control=on_cpu(other),
    )


KEPT_BYTES = 256 * 2**20
"""Of an answer with its rivals; a larger one is not kept, and is attacked for anew."""
_FORM, _ABOUT = 1, "answer"


def keep_answer(attacked: Attacked, path: Path) -> str | None:
    """Write an answer and its rivals, so that it is scored again without attacking.

    Args:
        attacked: From :func:`with_rivals`, or an answer without rivals.
        path: Of a safetensors file, readable by its owner only.

    Returns:
        None; of one too large to be kept, a note for the card.
    """
    guesses = {"": attacked.guess, **{f"rivals/{n}/": each for n, each in attacked.rivals.items()}}
    if attacked.control is not None:
        guesses["control/"] = attacked.control
    tensors = {
        place + name: each for place, guess in guesses.items() for name, each in _parts(guess)
    }
    size = sum(each.nbytes for each in tensors.values())
    if size > KEPT_BYTES:
        path.unlink(missing_ok=True)
        return (
            f"its guess and rivals take {size / 2**20:.0f} MiB, more than {KEPT_BYTES >> 20}, and "
            "were not kept: to score it again is to attack anew"
        )
    about = {
        "form": _FORM,
        "targets": [asdict(each) for each in attacked.targets],
        "seconds": attacked.seconds,
        "rivals": list(attacked.rivals),
        "budgets": {place: guess.budgets for place, guess in guesses.items() if guess.budgets},
        "missing": attacked.missing,
        "exposure": attacked.exposure and attacked.exposure.model_dump(mode="json"),
        "objective": dict(attacked.objective),
        "notes": attacked.notes,
    }
    save_tensors(tensors, path, about={_ABOUT: json.dumps(about)})
    return None


def kept_answer(path: Path, attack: Method) -> Attacked | None:
    """Return a kept answer.

    Args:
        path: From :func:`keep_answer`.
        attack: That answered.

    Returns:
        The answer with its rivals; None where none is kept, or an earlier version kept less.
    """
    try:
        with safe_open(path, framework="pt") as file:
            told = json.loads((file.metadata() or {}).get(_ABOUT, "{}"))
            tensors = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118  no dict
    except (OSError, SafetensorError, ValueError):
        return None
    if told.get("form") != _FORM:
        return None

    def guess(place: str) -> Guess:
        own = {
            name.removeprefix(place): each
            for name, each in tensors.items()
            if name.startswith(place)
        }
        clones = {
            name.removeprefix(_CLONES): own.pop(name) for name in [*own] if name.startswith(_CLONES)
        }
        plain = {name: each for name, each in own.items() if "/" not in name}
        budgets = told["budgets"].get(place)
        return Guess(**plain, clones=clones or None, budgets=tuple(budgets) if budgets else None)

    exposed = told["exposure"]
    return Attacked(
        attack=attack,
        targets=[Target(**{**each, "phase": Phase(each["phase"])}) for each in told["targets"]],
        guess=guess(""),
        seconds=told["seconds"],
        rivals={name: guess(f"rivals/{name}/") for name in told["rivals"]},
        control=guess("control/") if any(n.startswith("control/") for n in tensors) else None,
        missing=tuple(told["missing"]),
        exposure=None if exposed is None else Exposure(**exposed),
        objective=told["objective"],
        notes=tuple(told["notes"]),
    )


_CLONES = "clones/"


def _parts(guess: Guess) -> Iterator[tuple[str, Tensor]]:
    """Yield the tensors of a guess by name."""
    for each in fields(Guess):
        value = getattr(guess, each.name)
        if isinstance(value, Tensor):
            yield each.name, value
        elif isinstance(value, Mapping):
            yield from (
                (f"{_CLONES}{name}", tensor.detach().cpu()) for name, tensor in value.items()
            )


def save_tensors(
    tensors: Mapping[str, Tensor], path: Path, *, about: dict[str, str] | None = None
) -> None:
    """Write tensors, whole or not at all, readable by their owner only.

    Args:
        tensors: By name.
        path: Of a safetensors file; its folder is made.
        about: Texts beside them.
    """
    path.parent.mkdir(mode=0o700, parents=True, exist_ok=True)
    with written_whole(path) as partial:
        partial.touch(mode=0o600)
        save_file({name: value.contiguous() for name, value in tensors.items()}, partial, about)


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
    entry = _protocol(str(trace.about.get("protocol")))
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


def _protocol(name: str) -> Protocol | None:
    """Return the protocol of a trace, which may be another's and not be importable here."""
    try:
        return find_protocol(name)
    except (KeyError, ImportPathError):
        return None


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
        guess = attack.run(renewed(view), seed=seed)
        if said := guess_breaches(guess, view):
            raise BrokenPluginError(blame(attack, "attack", f"returned {said[0]}"))
        return guess


def _fields(kind: Any) -> set[str]:  # noqa: ANN401  a dataclass, which a Protocol cannot say
    return {each.name for each in fields(kind)}
