"""Model completion: a few labels of features that part the classes tell the others."""

from dataclasses import replace

import pytest
import torch
from torch import Tensor

from attacks.model_completion import ModelCompletion, _mixmatch
from leakbed.contracts import (
    Attack,
    Evidence,
    Guess,
    Knowledge,
    MissingKnowledgeError,
    Seat,
    UnfitViewError,
    View,
)
from leakbed.seeds import generator
from tests.support.cut_runs import even_run, first_known, rare_run

QUICK = ModelCompletion(steps=150)


def right(guess: Guess, labels: Tensor, view: View) -> float:
    unknown = view.known_labels[:, 0] < 0
    return float((guess.labels[:, 0] == labels)[unknown].float().mean())


@pytest.mark.parametrize("head", ["architecture", "published"])
def test_few_labels_of_a_trained_bottom_tell_the_others(head: str) -> None:
    view, labels = even_run(0, steps=60)
    view = replace(view, known_labels=first_known(labels, 2))
    assert right(replace(QUICK, head=head).run(view, seed=0), labels, view) > 0.9


def test_the_other_rows_help() -> None:
    gained = []
    for stream in range(3):
        view, labels = even_run(stream, steps=20)
        found = [
            right(replace(QUICK, unlabelled=weight).run(view, seed=stream), labels, view)
            for weight in (50.0, 0.0)
        ]
        gained.append(found[0] - found[1])
    assert sum(gained) > 0


def test_unrelated_rows_are_chance() -> None:
    view, labels = even_run(0, steps=60)
    drawn, found = generator(3), []
    for _ in range(3):
        shuffled = view.smashed[torch.randperm(len(labels), generator=drawn)]
        asked = replace(view, smashed=shuffled)
        found.append(right(QUICK.run(asked, seed=0), labels, asked))
    assert abs(sum(found) / 3 - 0.25) < 0.06


def test_the_loss_is_cross_entropy_and_weighted_squared_error() -> None:
    logits = torch.tensor([[2.0, 0.0], [0.0, 0.0], [1.0, 0.0]])
    targets = torch.tensor([[1.0, 0.0], [0.5, 0.5], [0.0, 1.0]])
    shares = torch.softmax(logits, 1)
    known = -shares[0, 0].log()
    others = ((shares[1] - targets[1]) ** 2).sum() + ((shares[2] - targets[2]) ** 2).sum()
    found = _mixmatch(logits, targets, known=1, weight=50.0)
    assert found == pytest.approx(float(known + 50 * others / 4))


def test_of_two_labels_it_ranks_too() -> None:
    view, labels = rare_run(0)
    guess = QUICK.run(replace(view, known_labels=first_known(labels, 2)), seed=0)
    assert guess.scores[labels == 1].mean() > guess.scores[labels == 0].mean() + 0.5
    many, _ = even_run(0, steps=0)
    assert ModelCompletion(steps=1).run(many, seed=0).scores is None


def test_rows_that_are_not_finite_fail_alone() -> None:
    view, _ = even_run(0, steps=5)
    poisoned, place = view.smashed.clone(), int((view.known_labels[:, 0] < 0).nonzero()[0])
    poisoned[place] = torch.nan
    guess = ModelCompletion(steps=5).run(replace(view, smashed=poisoned), seed=0)
    assert guess.failed.nonzero().tolist() == [[place]]


def test_the_threat_needs_labels_of_a_few() -> None:
    assert isinstance(ModelCompletion(), Attack)
    assert ModelCompletion().threat.evidence == {Evidence.SMASHED}
    assert ModelCompletion().threat.needs == {Knowledge.ARCHITECTURE, Knowledge.KNOWN_LABELS}
    assert ModelCompletion(seat="server").threat.seat == Seat.SERVER


def test_what_does_not_fit_is_said() -> None:
    view, _ = even_run(3, steps=0)
    for lacking in ("smashed", "architecture"):
        with pytest.raises(MissingKnowledgeError, match="model-completion trains a top"):
            QUICK.run(replace(view, **{lacking: None}), seed=0)
    unknown = torch.full_like(view.known_labels, -1)
    for known in (None, unknown):
        with pytest.raises(MissingKnowledgeError, match="known_per_class"):
            QUICK.run(replace(view, known_labels=known), seed=0)
    partly = torch.where(view.known_labels == 2, -1, view.known_labels)
    # Without the hint at a setting that other attacks have.
    with pytest.raises(MissingKnowledgeError, match=r"no label of class 2.*are known\)$"):
        QUICK.run(replace(view, known_labels=partly), seed=0)
    with pytest.raises(UnfitViewError, match="as of a regression"):
        QUICK.run(replace(view, num_classes=1), seed=0)
    with pytest.raises(UnfitViewError, match="4 samples stand behind"):
        QUICK.run(replace(view, rows=4), seed=0)
    with pytest.raises(UnfitViewError, match=r"shape \(7,\).*reads \(32,\)"):
        QUICK.run(replace(view, smashed=view.smashed[:, :7]), seed=0)


@pytest.mark.parametrize(
    ("settings", "says"),
    [
        ({"steps": 0}, "steps is 0"),
        ({"batch": 0}, "batch 0"),
        ({"rate": 0.0}, "rate is 0.0"),
        ({"temperature": 0.0}, "temperature 0.0"),
        ({"unlabelled": -1.0}, "unlabelled is -1.0"),
        ({"averaging": 1.0}, "averaging is 1.0"),
        ({"head": "small"}, "unknown head"),
        ({"seat": "clint"}, "did you mean 'client'"),
    ],
)
def test_illegal_settings_are_refused(settings: dict[str, object], says: str) -> None:
    with pytest.raises(ValueError, match=says):
        ModelCompletion(**settings)
