"""UnSplit's label inference: certain from the head's weights, chance from the cut."""

from dataclasses import replace

import pytest
import torch
from torch import Tensor, nn
from torch.nn.functional import cross_entropy

from attacks.unsplit_labels import UnSplitLabels
from leakbed.contracts import Attack, Evidence, MissingKnowledgeError, Seat, UnfitViewError, View
from leakbed.models import Architecture
from leakbed.seeds import derive, generator

HEAD = Architecture(name="mnistnet", image_shape=(1, 28, 28), num_classes=10, cut=9)
SEED = 2


def online_run(count: int, stream: int, layers: Architecture = HEAD) -> tuple[View, Tensor]:
    """The published setting: untrained networks that all learn online, one random image a step."""
    body, head = layers.bottom(stream), layers.top(stream)
    adam = torch.optim.Adam([*body.parameters(), *head.parameters()], lr=1e-3, amsgrad=True)
    pixels = torch.rand(count, 1, 28, 28, generator=generator(stream))
    labels = torch.randint(10, (count,), generator=generator(stream))
    linear = next(layer for layer in head if isinstance(layer, nn.Linear))
    sent: list[list[Tensor]] = [[], [], []]
    for image, label in zip(pixels, labels, strict=True):
        features = body(image[None])
        features.retain_grad()
        adam.zero_grad()
        cross_entropy(head(features), label[None]).backward()
        for kind, tensor in zip(sent, (features, features.grad, linear.weight.grad), strict=True):
            kind.append(tensor.detach().clone())
        adam.step()
    view = View(
        seat=Seat.SERVER,
        image_shape=(1, 28, 28),
        num_classes=10,
        targets=count,
        smashed=torch.cat(sent[0]),
        cut_gradient=torch.cat(sent[1]),
        head_gradient=torch.stack(sent[2]),
        architecture=layers,
    )
    return view, labels


@pytest.mark.parametrize("scale", ["known", "unknown"])
def test_every_label_from_the_heads_weight_gradient(scale: str) -> None:
    view, labels = online_run(100, 50)
    guess = UnSplitLabels(scale=scale).run(view, seed=SEED)
    assert torch.equal(guess.labels[:, 0], labels)
    assert not guess.failed.any()


@pytest.mark.parametrize("scale", ["known", "unknown"])
def test_chance_from_the_cut_gradient(scale: str) -> None:
    attack, accuracies = UnSplitLabels(mode="cut-gradient", scale=scale), []
    for stream in range(60, 76):  # many heads: one pair may happen to agree on a few classes
        view, labels = online_run(25, stream)
        guess = attack.run(view, seed=stream)
        accuracies.append((guess.labels[:, 0] == labels).float().mean())
    mean, spread = torch.stack(accuracies).mean(), torch.stack(accuracies).std()
    assert abs(mean - 0.1) < 3 * spread / len(accuracies) ** 0.5
    assert mean < 0.25


def literal(view: View, mode: str, seed: int) -> list[int]:
    """One candidate at a time, gradients by autograd, as in the published code."""
    head = HEAD.top(derive(seed, "clone-head"))
    adam = torch.optim.Adam(head.parameters(), lr=1e-3, amsgrad=True)
    guesses = []
    for target in range(view.targets):
        row = view.smashed[target][None].clone().requires_grad_()
        distances = []
        for label in range(10):
            loss = cross_entropy(head(row), torch.tensor([label]))
            weights, cut = torch.autograd.grad(loss, [head[0].weight, row])
            wanted, found = (
                (view.cut_gradient[target], cut[0])
                if mode == "cut-gradient"
                else (view.head_gradient[target], weights)
            )
            distances.append(nn.functional.mse_loss(found, wanted).item())
        guesses.append(min(range(10), key=distances.__getitem__))
        adam.zero_grad()
        cross_entropy(head(row), torch.tensor([guesses[-1]])).backward()
        adam.step()
    return guesses


@pytest.mark.parametrize("mode", ["head-weight-gradient", "cut-gradient"])
def test_guesses_are_the_literal_readings(mode: str) -> None:
    view, _ = online_run(30, 70)
    assert UnSplitLabels(mode=mode, scale="known").run(view, seed=SEED).labels[
        :, 0
    ].tolist() == literal(view, mode, SEED)


def test_two_private_layers_are_matched_at_the_first() -> None:
    layers = Architecture(name="mnistnet", image_shape=(1, 28, 28), num_classes=10, cut=7)
    view, labels = online_run(20, 80, layers)
    guess = UnSplitLabels().run(view, seed=SEED)
    assert view.head_gradient.shape == (20, 84, 120)
    assert guess.labels.shape == (20, 1)
    assert (guess.labels[:, 0] == labels).float().mean() < 0.6  # unlike a single private layer


def test_an_unknown_scale_changes_no_guess() -> None:
    view, labels = online_run(40, 90)
    for factor in (1e-4, 1.0, 1e3):
        scaled = replace(view, head_gradient=view.head_gradient * factor)
        assert torch.equal(UnSplitLabels().run(scaled, seed=SEED).labels[:, 0], labels)


def test_a_gradient_that_is_not_finite_fails_alone_and_teaches_nothing() -> None:
    view, _ = online_run(10, 95)
    poisoned = view.head_gradient.clone()
    poisoned[4] = torch.nan
    guess = UnSplitLabels().run(replace(view, head_gradient=poisoned), seed=SEED)
    assert guess.failed.nonzero().tolist() == [[4]]
    keep = [index for index in range(10) if index != 4]
    without = replace(
        view, targets=9, smashed=view.smashed[keep], head_gradient=view.head_gradient[keep]
    )
    alone = UnSplitLabels().run(without, seed=SEED)
    assert torch.equal(guess.objective[keep], alone.objective)


def test_the_threat_follows_the_mode() -> None:
    for mode in ("head-weight-gradient", "cut-gradient"):
        attack = UnSplitLabels(mode=mode)
        assert isinstance(attack, Attack)
        assert attack.threat.evidence == {Evidence.SMASHED, Evidence(mode)}


def test_what_does_not_fit_is_said() -> None:
    view, _ = online_run(2, 99)
    with pytest.raises(UnfitViewError, match="batch size 1"):
        UnSplitLabels().run(replace(view, rows=4), seed=0)
    with pytest.raises(MissingKnowledgeError, match="'cut-gradient'"):
        UnSplitLabels(mode="cut-gradient").run(replace(view, cut_gradient=None), seed=0)
    with pytest.raises(UnfitViewError, match=r"\(10, 3\).*\(10, 84\)"):
        UnSplitLabels().run(replace(view, head_gradient=torch.zeros(2, 10, 3)), seed=0)
    convolutional = Architecture(name="mnistnet", image_shape=(1, 28, 28), num_classes=10, cut=2)
    with pytest.raises(UnfitViewError, match="starts with Conv2d"):
        UnSplitLabels().run(replace(view, architecture=convolutional), seed=0)
    with pytest.raises(ValueError, match="unknown mode"):
        UnSplitLabels(mode="weights")
    with pytest.raises(ValueError, match="unknown scale"):
        UnSplitLabels(scale="any")
    with pytest.raises(ValueError, match="must not be negative"):
        UnSplitLabels(rate=-1.0)


def test_the_seat_is_the_party_without_the_labels() -> None:
    assert UnSplitLabels().threat.seat == "server"
    assert UnSplitLabels(mode="cut-gradient", seat="client").threat.seat == "client"
    with pytest.raises(ValueError, match="did you mean 'client'"):
        UnSplitLabels(seat="clint")
