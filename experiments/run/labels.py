"""What of the truth an attack is told, and what of its guess is left to be scored.

Some attacks know the labels of a few attacked samples: a party knows some of its own customers.
The harness tells them the first targets of each class, in the order the messages were sent, and
scores the others alone: a label that was given is no leak. A feature party has its own inputs. Who
alters inputs is given natural ones, which anybody could have: those of the targets, without labels.

**Baselines of label attacks**: what a party could tell of labels without the attacked messages. A
feature party has the inputs whose labels it infers. It may know a few of them, and own public
labelled images besides; with these it can classify its inputs before the protocol begins. And what
an attack reads in smashed data may be what the inputs show through any network: so the attack is
run once more on one that never trained. A score says what the protocol gives away only as far as it
lies above all of these. The oracle's side of the harness computes them, from no more than
:func:`applicable` says the seat has.
"""

from __future__ import annotations

import warnings
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from jaxtyping import Float, Int
from threadpoolctl import threadpool_limits
from torch import Tensor, nn

from experiments.run.guesses import picked
from experiments.run.targets import MisfitError
from experiments.run.view import ADVERSARY, PUBLIC, attacked_architecture, public_images
from experiments.settings.plugins import KNOWN_PER_CLASS, AttackSettings
from experiments.settings.schema import SettingsError
from leakbed.contracts import Evidence, Guess, Knowledge, Seat, ThreatModel, UnfitViewError, View
from leakbed.events import Phase, Target
from leakbed.oracle.rivals import (
    OWN_CLASSIFIER,
    OWN_NEAREST,
    PUBLIC_CLASSIFIER,
    PUBLIC_NEAREST,
    UNTRAINED,
)
from leakbed.oracle.truth import AnswerKey
from leakbed.seeds import derive, scoped

if TYPE_CHECKING:
    from leakbed.models import Architecture
    from leakbed.tap.trace import Trace


@dataclass(frozen=True, kw_only=True, eq=False)
class GrantedLabels:
    """The truth an attack is given; None for what its threat model does not name.

    Attributes:
        labels: Of every target.
        known_labels: Of a few targets, -1 elsewhere.
        own_images: The inputs behind the targets.
        natural_images: The same, for an attack that alters them.
    """

    labels: Int[Tensor, " targets rows"] | None = None
    known_labels: Int[Tensor, " targets rows"] | None = None
    own_images: Float[Tensor, " targets channels height width"] | None = None
    natural_images: Float[Tensor, " targets channels height width"] | None = None


def grant_labels(
    threat: ThreatModel,
    targets: Sequence[Target],
    answers: Path | AnswerKey | None,
    *,
    known_per_class: int | None,
) -> GrantedLabels:
    """Open the answer key for as much as a threat model grants, and no further.

    Args:
        threat: The attack's.
        targets: Its targets.
        answers: The answer key, or its folder; None where there is none, and then nothing is told.
        known_per_class: How many targets of each class are known; None is 1.

    Returns:
        What it is given.
    """
    needed = threat.needs & {
        Knowledge.LABELS,
        Knowledge.KNOWN_LABELS,
        Knowledge.OWN_IMAGES,
        Knowledge.NATURAL_IMAGES,
    }
    count = KNOWN_PER_CLASS if known_per_class is None else known_per_class
    known = None
    if Knowledge.KNOWN_LABELS in needed and count == 0:
        known = torch.full((len(targets), 1), -1)
    if answers is None or needed <= ({Knowledge.KNOWN_LABELS} if count == 0 else set()):
        return GrantedLabels(known_labels=known)
    key = answers if isinstance(answers, AnswerKey) else AnswerKey.read(answers)
    labels = key.labels_of(targets)
    if Knowledge.KNOWN_LABELS in needed and count > 0:
        known = first_of_each_class(labels, count)
    return GrantedLabels(
        labels=labels if Knowledge.LABELS in needed else None,
        known_labels=known,
        own_images=inputs_behind(key, targets) if Knowledge.OWN_IMAGES in needed else None,
        natural_images=inputs_behind(key, targets) if Knowledge.NATURAL_IMAGES in needed else None,
    )


def inputs_behind(key: AnswerKey, targets: Sequence[Target]) -> Float[Tensor, " targets *image"]:
    """Return the inputs behind messages of one sample each; of a party that holds strips, its own.

    Args:
        key: The run's.
        targets: All of one phase.

    Returns:
        One for each target.

    Raises:
        MisfitError: If several samples stand behind a target.
    """
    images = key.truth(targets).images
    if images.shape[1] != 1:
        raise MisfitError(
            f"{images.shape[1]} samples stand behind each message; a party is told its inputs row "
            "by row, so attack rows at a cut"
        )
    return images[:, 0]


def refuse_ungranted(threat: ThreatModel, settings: AttackSettings) -> None:
    """Refuse an attack that should know labels and, with its other settings, is told none.

    Args:
        threat: The attack's.
        settings: From which it was made.

    Raises:
        SettingsError: If so.
    """
    count = settings.known_per_class
    if count not in {None, KNOWN_PER_CLASS} and Knowledge.KNOWN_LABELS not in threat.needs:
        raise SettingsError(
            f"attack {settings.name}: known_per_class is {count}, but with its other settings it "
            "is told no label; leave the key out"
        )


def first_of_each_class(
    labels: Int[Tensor, " targets rows"], count: int
) -> Int[Tensor, " targets rows"]:
    """Return the labels of the first targets of each class, -1 elsewhere.

    Args:
        labels: Of all targets, in the order their messages were sent.
        count: Targets to know of each class; all of a class that has fewer.

    Returns:
        What the adversary knows.

    Raises:
        MisfitError: If several samples stand behind a target.
    """
    if labels.shape[1] != 1:
        raise MisfitError(
            f"{labels.shape[1]} samples stand behind each message; a label is known of one sample, "
            "so attack rows at a cut, or updates of one step on one sample"
        )
    flat = labels.flatten()
    known = torch.full_like(flat, -1)
    for label in flat.unique():
        first = (flat == label).nonzero().flatten()[:count]
        known[first] = label
    return known.unsqueeze(1)


def unknown_only(
    targets: Sequence[Target], guess: Guess, known_labels: Int[Tensor, " targets rows"] | None
) -> tuple[list[Target], Guess]:
    """Return what is scored: the targets whose label was not given, and the guess of them.

    Args:
        targets: All that were attacked.
        guess: Of all of them.
        known_labels: What the attack was told, -1 elsewhere; None if nothing.

    Returns:
        The others, in their order.

    Raises:
        MisfitError: If every label was given, so that nothing is left to infer.
    """
    if known_labels is None or bool((known_labels < 0).all()):
        return list(targets), guess
    unknown = (known_labels < 0).all(1)
    if not bool(unknown.any()):
        raise MisfitError(
            f"the labels of all {len(targets)} targets are known, so none is left to infer; attack "
            "more targets or lower known_per_class"
        )
    left = [target for target, free in zip(targets, unknown.tolist(), strict=True) if free]
    return left, picked(guess, unknown)


_OF_A_NETWORK = {Evidence.SMASHED, Evidence.CUT_GRADIENT, Evidence.HEAD_WEIGHT_GRADIENT}
_PASSES = 200  # of the classifier's fit; stopped there it still guesses
_MOST = 5000  # public images that are learned from: of more, the first
_CHUNK = 512  # inputs that pass a network, or are compared, at once
_BINARY = 2
_LINEAR = 2  # parameters of a top that is one linear layer: weight and bias


def infers_labels(guess: Guess, threat: ThreatModel) -> bool:
    """Say whether a guess is one of labels alone, so that these baselines stand beside it.

    Args:
        guess: An attack's.
        threat: Its threat model.

    Returns:
        Not of an attack that guesses images (labels are then its by-product), or an attribute.
    """
    told = (guess.labels, guess.clusters, guess.scores)
    return guess.images is None and threat.infers is None and any(t is not None for t in told)


def applicable(threat: ThreatModel, *, known: bool, public: bool) -> tuple[str, ...]:
    """Say which of these baselines a label attack's threat model allows.

    ========================= ============================================ =========================
    baseline                  what it is                                   who gets it
    ========================= ============================================ =========================
    ``own-inputs-classifier`` logistic regression on the party's own raw   the client, where it is
                              inputs, learned from the same known labels   told any label
    ``own-inputs-nearest``    the label of the nearest known one of them   the same
    ``public-label-           the party's own inputs, classified by        the client, in a run that
    classifier``              logistic regression on public images         gives adversaries public
                                                                           labelled images
    ``public-label-nearest``  the label of the nearest public image        the same
    ``untrained-bottom``      the same attack on what a network of fresh   any seat whose attack
                              weights makes of the same inputs             reads smashed data or
                                                                           their gradients
    ========================= ============================================ =========================

    Only a client owns inputs; a server that reads smashed data or the upper cut gets the last one
    alone, since it could classify nothing with public images before a bottom was trained. An attack
    that reads no message has no counterpart on an untrained network, and of one with evidence or
    knowledge of its own the card says that nobody can make it. Public images count where the
    run has them (``data.public`` above 0), whether or not the attack itself asks for them, as they
    do for every other baseline.

    Args:
        threat: The attack's.
        known: Whether it was told any label.
        public: Whether adversaries of the run own labelled images.

    Returns:
        Names of baselines.
    """
    own = threat.seat == Seat.CLIENT
    told = known and Knowledge.KNOWN_LABELS in threat.needs
    return (
        *((OWN_CLASSIFIER, OWN_NEAREST) if own and told else ()),
        *((PUBLIC_CLASSIFIER, PUBLIC_NEAREST) if own and public else ()),
        *((UNTRAINED,) if threat.evidence & _OF_A_NETWORK or threat.evidence_kinds else ()),
    )


@dataclass(frozen=True, kw_only=True, eq=False)
class Rivalry:
    """An attack on labels as it was run, which its rivals repeat.

    Attributes:
        threat: The attack's.
        view: What it read.
        targets: All that it attacked, those whose label it was told included.
        run: Runs it, restarts and all, on another view and from another stream.
    """

    threat: ThreatModel
    view: View
    targets: Sequence[Target]
    run: Callable[[View, int], Guess]

    def guesses(
        self, answers: AnswerKey, trace: Trace, *, stream: int
    ) -> tuple[dict[str, Guess], list[str]]:
        """Return the guess of every rival, for all targets.

        Args:
            answers: The run's, of which the inputs are taken and no label.
            trace: The run's, for its architecture and what adversaries own.
            stream: Draws the untrained network, and the attack on it.

        Returns:
            Guesses by the names of :func:`applicable`; and why the attack could not read what an
            untrained network sends, where it could not.
        """
        told = self.view.known_labels
        known = (told.flatten() >= 0) if told is not None else torch.zeros(0, dtype=torch.bool)
        public = trace.holding(ADVERSARY, PUBLIC) is not None
        names = applicable(self.threat, known=bool(known.any()), public=public)
        missing = []
        if UNTRAINED in names and self.threat.kinds:
            said = ", ".join(self.threat.kinds)
            missing = [f"there is no {UNTRAINED} baseline: no untrained network has {said}"]
            names = tuple(name for name in names if name != UNTRAINED)
        if not names:
            return {}, missing
        inputs = inputs_behind(answers, self.targets).to(self.view.device)
        found: dict[str, Guess] = {}
        if told is not None and OWN_CLASSIFIER in names:
            labels = told.flatten()[known]
            found[OWN_CLASSIFIER] = classified(inputs[known], labels, inputs)
            found[OWN_NEAREST] = nearest(inputs[known], labels, inputs)
        if PUBLIC_CLASSIFIER in names:
            labelled = frozenset({Knowledge.PUBLIC_IMAGES, Knowledge.PUBLIC_LABELS})
            owner = replace(self.threat, needs=labelled)
            held = public_images(trace, owner, self.targets[0].node, inputs.device)
            images, labels = held["public_images"][:_MOST], held["public_labels"][:_MOST].long()
            found[PUBLIC_CLASSIFIER] = classified(images, labels, inputs)
            found[PUBLIC_NEAREST] = nearest(images, labels, inputs)
        if UNTRAINED in names:
            network = attacked_architecture(trace.about, self.threat, self.targets[0])
            training = self.targets[0].phase == Phase.TRAIN
            fresh = derive(stream, "untrained/network")
            view = untrained(self.view, network, inputs, training=training, stream=fresh)
            try:
                found[UNTRAINED] = self.run(view, derive(stream, "untrained/attack"))
            except UnfitViewError as error:
                missing = [f"there is no {UNTRAINED} baseline: {error}"]
        return found, missing


def classified(
    images: Float[Tensor, " known *image"],
    labels: Int[Tensor, " known"],
    inputs: Float[Tensor, " targets *image"],
) -> Guess:
    """Return what logistic regression on raw pixels says of a party's inputs.

    The penalty is scikit-learn's own, chosen on nothing.

    Args:
        images: With labels, one or more.
        labels: Theirs.
        inputs: To classify.

    Returns:
        Labels; of two also scores.
    """
    from sklearn.exceptions import ConvergenceWarning  # noqa: PLC0415  a second to import
    from sklearn.linear_model import LogisticRegression  # noqa: PLC0415

    if len(labels.unique()) < _BINARY:
        return Guess(labels=labels[:1].expand(len(inputs), 1).clone().cpu())
    fit = LogisticRegression(max_iter=_PASSES)
    with warnings.catch_warnings(), threadpool_limits(1):  # the same seed, the same bits
        warnings.simplefilter("ignore", ConvergenceWarning)
        fit.fit(images.flatten(1).double().cpu().numpy(), labels.cpu().numpy())
    odds = torch.from_numpy(fit.predict_proba(inputs.flatten(1).double().cpu().numpy()))
    classes = torch.from_numpy(fit.classes_)
    binary = classes.tolist() == [0, 1]
    return Guess(
        labels=classes[odds.argmax(1)][:, None], scores=odds[:, 1:].float() if binary else None
    )


def nearest(
    images: Float[Tensor, " known *image"],
    labels: Int[Tensor, " known"],
    inputs: Float[Tensor, " targets *image"],
) -> Guess:
    """Return the label of the labelled image that lies nearest to each of a party's inputs.

    Args:
        images: With labels, one or more.
        labels: Theirs.
        inputs: To classify.

    Returns:
        Labels; of two also scores, by how much nearer the nearest image of label 1 is than that of
        label 0.
    """
    known = images.flatten(1)
    classes, places = labels.unique(return_inverse=True)
    distances = inputs.new_full((len(inputs), len(classes)), torch.inf)
    for start in range(0, len(inputs), _CHUNK):
        apart = torch.cdist(inputs[start : start + _CHUNK].flatten(1), known)
        for place in range(len(classes)):
            distances[start : start + _CHUNK, place] = apart[:, places == place].amin(1)
    told = classes[distances.argmin(1)][:, None].cpu()
    binary = classes.tolist() == [0, 1]
    scores = (distances[:, :1] - distances[:, 1:]).cpu() if binary else None
    return Guess(labels=told, scores=scores)


def untrained(
    view: View,
    architecture: Architecture,
    inputs: Float[Tensor, " targets *image"],
    *,
    training: bool,
    stream: int,
) -> View:
    """Return a view of what a network that never trained, nor will, makes of the same inputs.

    Smashed data come from a fresh bottom. Gradients come from it and a fresh top, under a loss to
    which every label is equally likely: whoever infers labels does not know which to take, and with
    the true ones the gradients would be a message of the protocol, its leak included. So they say
    of a sample what it looks like and nothing of its label. No defence acts on either. A party that
    holds strips passes its own strip through parts of its own.

    Args:
        view: What the attack read.
        architecture: From :func:`experiments.run.view.attacked_architecture`.
        inputs: Behind the targets.
        training: Whether layers such as BatchNorm act as in training.
        stream: Draws the weights.

    Returns:
        The view with its messages exchanged; all that it says of knowledge stays.
    """
    parts = architecture.parts(derive(stream, "weights"))
    training = training and len(inputs) > 1  # BatchNorm has no spread of one input
    bottom, top = (part.to(inputs.device).train(training) for part in (parts.bottom, parts.top))
    made: dict[str, Any] = {
        name: torch.empty_like(message)
        for name in ("smashed", "cut_gradient", "head_gradient")
        if (message := getattr(view, name)) is not None
    }
    start = 0
    with scoped(derive(stream, "layers")):
        for chunk in inputs.chunk(-(-len(inputs) // _CHUNK)):
            end = start + len(chunk)
            for name, value in _sent(bottom, top, chunk).items():
                if name in made:
                    made[name][start:end] = value.reshape(made[name][start:end].shape)
            start = end
    return replace(view, **made)


def _sent(
    bottom: nn.Module, top: nn.Module, inputs: Float[Tensor, " rows *image"]
) -> dict[str, Tensor]:
    """Return what crosses the cut of a fresh network, and its top's weight gradient if linear."""
    with torch.no_grad():
        smashed = bottom(inputs)
    smashed.requires_grad_()
    logits = top(smashed)
    loss = (logits.logsumexp(1) - logits.mean(1)).sum()
    (gradient,) = torch.autograd.grad(loss, smashed)
    rows, sent = smashed.detach(), {"smashed": smashed.detach(), "cut_gradient": gradient}
    if len(list(top.parameters())) <= _LINEAR:
        error = logits.detach().softmax(1) - 1 / logits.shape[1]
        sent["head_gradient"] = torch.einsum("tc,tf->tcf", error, rows.flatten(1))
    return sent
