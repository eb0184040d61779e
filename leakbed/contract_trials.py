"""Attacks and defences tried out on small tensors, to see whether they keep their contracts.

The tests of the catalogue, ``leakbed check`` and the first use of a class of one's own ask here.
:mod:`leakbed.plugins` has what shows without running a class, :mod:`leakbed.contract_checks` what a
run holds every answer to.
"""

from collections.abc import Callable, Mapping
from typing import Any

import torch
from torch import Tensor

from leakbed.contract_checks import blame, blamed, guess_breaches, refuse_unsent, values_breach
from leakbed.contracts import (
    Attack,
    BrokenPluginError,
    Defense,
    DefenseState,
    Evidence,
    Knowledge,
    Metric,
    Protects,
    ThreatModel,
    View,
)
from leakbed.models import Architecture
from leakbed.seeds import derive, scoped

Hook = Callable[[DefenseState, Tensor], Any]
_SEED = 3
_DRAW = "draw from state.generator()"
_SHAPE, _TARGETS, _KNOWN = (1, 8, 8), 3, 2
_TRIED: dict[str, list[str]] = {}


def attack_breaches(attack: Attack, view: View) -> list[str]:
    """Return in what a passive attack breaks its contract on a view, by running it twice.

    Args:
        attack: With its settings.
        view: What its threat model grants.

    Returns:
        One phrase for each breach; empty for none.

    Raises:
        BrokenPluginError: It raised, or its answer is none.
    """
    before = {name: each.clone() for name, each in _tensors(view).items()}
    guesses = []
    for _ in range(2):
        with scoped(derive(_SEED, "global")), blamed(attack, "attack"):
            guesses.append(attack.run(view, seed=_SEED))
        if said := guess_breaches(guesses[-1], view):
            raise BrokenPluginError(blame(attack, "attack", f"returned {said[0]}"))
    found = [
        f"changes {name} of the view; work on a clone"
        for name, each in _tensors(view).items()
        if not _same(each, before[name])
    ]
    first, second = (_tensors(guess) for guess in guesses)
    found += [
        f"answers twice with other {name} from one seed; draw from a torch.Generator of the seed"
        for name, each in first.items()
        if name not in second or not _same(each, second[name])
    ]
    return found if first else [*found, "answers with a Guess of nothing"]


def defense_breaches(defense: Defense) -> list[str]:
    """Return in what a defence's hooks on messages break their contract, by calling each twice.

    What they raise is raised on, as :func:`blamed` has it, and so is an answer that is none.

    Args:
        defense: With its settings.

    Returns:
        One phrase for each breach; empty for none.
    """
    found = []
    stream = torch.Generator().manual_seed(_SEED)
    tensor = torch.rand(3, 2, 4, 4, generator=stream)
    labels = torch.tensor([0, 1, 1])
    hooks: Mapping[Protects, Hook] = {
        Protects.UPDATE: lambda s, t: defense.protect_update(s, {"w": t / 2}, {"w": t})[1]["w"],
        Protects.SMASHED: lambda s, t: defense.protect_smashed(s, t)[1],
        Protects.CUT_GRADIENT: lambda s, t: defense.protect_labelled_gradient(s, t, labels)[1],
    }
    for kind in sorted(defense.protects & hooks.keys()):
        given, state = tensor.clone(), defense.begin(_SEED)
        with scoped(_SEED), blamed(defense, "defence"):
            generators = torch.get_rng_state()
            first = hooks[kind](state, given)
            if not torch.equal(generators, torch.get_rng_state()):
                found.append(f"draws from torch's global generator for {kind}; {_DRAW}")
            refuse_unsent(defense, {str(kind): first}, {str(kind): tensor})
            if not torch.equal(given, tensor):
                found.append(f"changes the {kind} it is given; work on a clone")
            elif not torch.equal(first, hooks[kind](state, given)):
                found.append(f"answers twice with another {kind} from one state; {_DRAW}")
    return found


def metric_breaches(metric: Metric) -> list[str]:
    """Return in what a metric breaks its contract, by measuring a few small images twice.

    Args:
        metric: With its settings.

    Returns:
        One phrase for each breach; empty for none.

    Raises:
        BrokenPluginError: It raised, or returned something else than one number per image.
    """
    stream = torch.Generator().manual_seed(_SEED)
    guess, truth = torch.rand(2, _TARGETS, *_SHAPE, generator=stream)
    given = guess.clone(), truth.clone()
    with blamed(metric, "metric"):
        first, second = metric.measure(*given), metric.measure(guess.clone(), truth.clone())
    if said := values_breach(first, _TARGETS):
        raise BrokenPluginError(blame(metric, "metric", f"returned {said}"))
    found = []
    if not (torch.equal(given[0], guess) and torch.equal(given[1], truth)):
        found.append("changes the images it is given; work on a clone")
    if not _same(first, second):
        found.append("measures the same images twice with other values; draw nothing at random")
    return found


def refuse_breaches(plugin: object) -> None:
    """Refuse an attack or a defence of one's own that breaks its contract, tried on small tensors.

    One that raises there is left for the run to judge, whose tensors may be what it needs. What
    was tried once with its settings is not tried again in this process.

    Args:
        plugin: With its settings.

    Raises:
        BrokenPluginError: It breaks its contract; the message has each breach.
    """
    asked = f"{type(plugin).__module__}:{plugin!r}"
    if asked not in _TRIED:
        try:
            _TRIED[asked] = breaches(plugin)
        except (BrokenPluginError, ValueError, LookupError):
            _TRIED[asked] = []
    if said := _TRIED[asked]:
        what = "defence" if isinstance(plugin, Defense) else "attack"
        raise BrokenPluginError(blame(plugin, what, f"breaks its contract: {'; '.join(said)}"))


def breaches(plugin: object) -> list[str]:
    """Return in what an attack or a defence breaks its contract, tried on small tensors.

    Args:
        plugin: With its settings. Of an adversary or a malicious client nothing is tried.

    Returns:
        One phrase for each breach. What it raises is raised on.
    """
    if isinstance(plugin, Defense):
        return defense_breaches(plugin)
    if isinstance(plugin, Attack):
        return attack_breaches(plugin, small_view(plugin.threat))
    if isinstance(plugin, Metric):
        return metric_breaches(plugin)
    return []


def small_view(threat: ThreatModel, *, classes: int = 4) -> View:
    """Return a view that grants what a threat model names, from a small victim.

    Args:
        threat: The attack's.
        classes: How many labels there are; with two, the targets have them in turn.

    Returns:
        Three targets: images of 8 x 8 pixels behind a small network.
    """
    stream = torch.Generator().manual_seed(7)
    images = torch.rand(_TARGETS, *_SHAPE, generator=stream)
    labels = torch.randint(4, (_TARGETS,), generator=stream)
    if classes == 2:  # noqa: PLR2004  the two that some attacks tell apart
        labels = torch.arange(_TARGETS) % 2
    architecture = Architecture(
        name="mlp2", image_shape=_SHAPE, num_classes=classes, activation="sigmoid", cut=1
    )
    granted: dict[str, Any] = {}
    if Evidence.UPDATE in threat.evidence:
        granted |= _weights(architecture, images, labels)
    at_cut = {Evidence.SMASHED, Evidence.CUT_GRADIENT, Evidence.HEAD_WEIGHT_GRADIENT}
    if threat.evidence & {*at_cut, Evidence.ROUND_SMASHED}:
        granted |= _cut(architecture, images, labels)
    if Evidence.ROUND_SMASHED in threat.evidence:
        granted["round_smashed"] = granted["smashed"]
    known = torch.where(torch.arange(_TARGETS) < _KNOWN, labels, -1)[:, None]
    owned = {
        Knowledge.ARCHITECTURE: ("architecture", architecture),
        Knowledge.SERVER_PART: ("server_part", architecture.top(11).eval()),
        Knowledge.PUBLIC_IMAGES: ("public_images", torch.rand(5, *_SHAPE, generator=stream)),
        Knowledge.PUBLIC_LABELS: ("public_labels", torch.randint(4, (5,), generator=stream)),
        Knowledge.OWN_IMAGES: ("own_images", images),
        Knowledge.NATURAL_IMAGES: ("natural_images", images),
        Knowledge.KNOWN_LABELS: ("known_labels", known),
    }
    granted |= dict(owned[need] for need in threat.needs if need in owned)
    return View(
        seat=threat.seat,
        image_shape=_SHAPE,
        num_classes=classes,
        targets=_TARGETS,
        device=torch.device("cpu"),
        **granted,
    )


def _weights(architecture: Architecture, images: Tensor, labels: Tensor) -> dict[str, Any]:
    model = architecture.build(11)
    before = {name: value.detach() for name, value in model.named_parameters()}
    after: dict[str, list[Tensor]] = {name: [] for name in before}
    for image, label in zip(images, labels, strict=True):
        loss = torch.nn.functional.cross_entropy(model(image[None]), label[None])
        gradients = torch.autograd.grad(loss, list(model.parameters()))
        for name, gradient in zip(before, gradients, strict=True):
            after[name].append(before[name] - 0.1 * gradient)
    return {
        "before": {name: value.expand(_TARGETS, *value.shape) for name, value in before.items()},
        "after": {name: torch.stack(values) for name, values in after.items()},
        "buffers": {},
    }


def _cut(architecture: Architecture, images: Tensor, labels: Tensor) -> dict[str, Any]:
    parts = architecture.parts(11)
    smashed = parts.bottom(images).detach().requires_grad_()
    loss = torch.nn.functional.cross_entropy(parts.top(smashed), labels, reduction="sum")
    (gradient,) = torch.autograd.grad(loss, smashed)
    told = torch.nn.functional.one_hot(labels, architecture.num_classes)
    errors = torch.softmax(parts.top(smashed), 1) - told
    head = torch.einsum("tc,tf->tcf", errors, smashed).detach()
    return {"smashed": smashed.detach(), "cut_gradient": gradient, "head_gradient": head}


def _tensors(holder: object) -> dict[str, Tensor]:
    """Return the tensors of a view or a guess by name, those in mappings included."""
    found: dict[str, Tensor] = {}
    for name, value in vars(holder).items():
        parts = value if isinstance(value, Mapping) else {"": value}
        found |= {f"{name}{k}": each for k, each in parts.items() if isinstance(each, Tensor)}
    return found


def _same(first: Tensor, second: Tensor) -> bool:
    return bool(torch.equal(first.nan_to_num(), second.nan_to_num()))
