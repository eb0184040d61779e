"""Layers that are not trained: an attack on updates reads the others, and demands no zero of them.

From a trace to a guess, since what is trained is told by the network that the trace names.
"""

from dataclasses import asdict, replace
from pathlib import Path

import pytest
import torch
from torch import Tensor
from torch.nn.functional import cross_entropy

from attacks.building_blocks.gradient_matching import GradientMatching
from attacks.deep_leakage_from_model import DeepLeakageFromModel
from attacks.deep_leakage_from_model_plus import DeepLeakageFromModelPlus
from experiments.run.targets import Evidences, pick_targets
from experiments.run.view import build_view
from leakbed.contracts import UnfitViewError, View
from leakbed.events import Event, UpdateUp
from leakbed.models import Architecture
from tests.support.small_traces import CPU, make_trace
from tests.support.weight_updates import SMALL, smooth_images

NODES = 2
FROZEN = Architecture(
    name="tests.support.strange_networks:half_frozen",
    image_shape=SMALL,
    num_classes=4,
    initialisation="uniform",
)


def updates(architecture: Architecture, images: Tensor) -> list[Event]:
    """One step of plain SGD on one image at each node, all from the same weights."""
    events: list[Event] = []
    for node, image in enumerate(images):
        model = architecture.build(100)
        before = {name: value.numpy().copy() for name, value in model.state_dict().items()}
        trained = torch.optim.SGD(model.parameters(), lr=0.01)
        cross_entropy(model(image[None]), torch.tensor([node])).backward()
        trained.step()
        after = {name: value.numpy().copy() for name, value in model.state_dict().items()}
        events.append(UpdateUp(node=node, round=1, before=before, after=after, examples=1))
    return events


def seen(
    folder: Path, attack: GradientMatching, images: Tensor, architecture: Architecture = FROZEN
) -> View:
    """What the attack is given of a network of which a layer is frozen."""
    about = asdict(architecture)
    trace = make_trace(folder, updates(architecture, images), architecture=about)
    evidences = Evidences.of(trace)
    targets = pick_targets(evidences, attack.threat, when="training", count=NODES)
    return build_view(trace, evidences, attack.threat, targets, device=CPU)


@pytest.mark.parametrize(
    "attack",
    [
        DeepLeakageFromModel(labels="analytic", restarts=2, good_enough=1e-8),
        DeepLeakageFromModelPlus(labels="analytic", scaling="each", restarts=1, good_enough=1e-8),
    ],
)
def test_frozen_layers_do_not_hide_the_image(tmp_path: Path, attack: GradientMatching) -> None:
    images = smooth_images(NODES)
    guess = attack.run(seen(tmp_path / "trace", attack, images), seed=6)
    assert guess.images is not None
    errors = (guess.images[:, 0] - images).square().flatten(1).mean(1)
    assert errors.max() < 1e-3
    assert guess.labels is not None
    assert guess.labels[:, 0].tolist() == list(range(NODES))


def test_the_frozen_layer_is_the_one_that_was_sent(tmp_path: Path) -> None:
    """Not one the attack drew itself: other weights of it explain the update less."""
    attack = DeepLeakageFromModelPlus(labels="analytic", restarts=1, iterations=40)
    view = seen(tmp_path / "trace", attack, smooth_images(NODES))
    assert view.buffers is not None
    other = {name: -value for name, value in view.buffers.items()}
    found, worse = (attack.run(each, seed=6) for each in (view, replace(view, buffers=other)))
    assert found.objective is not None
    assert worse.objective is not None
    assert (found.objective < worse.objective).all()


@pytest.mark.parametrize(
    ("attack", "instead"),
    [
        (DeepLeakageFromModel(), "scale = 'published'"),
        (DeepLeakageFromModelPlus(labels="analytic"), "'inferred'"),
    ],
)
def test_a_last_bias_that_is_not_trained_says_nothing(
    tmp_path: Path, attack: GradientMatching, instead: str
) -> None:
    """The bias below it has as many entries, and is no substitute."""
    head = replace(FROZEN, name="tests.support.strange_networks:frozen_head", image_shape=(1, 6, 6))
    head = replace(head, num_classes=3)
    view = seen(tmp_path / "trace", attack, smooth_images(NODES, (1, 6, 6)), head)
    with pytest.raises(UnfitViewError, match=f"'3.bias' is not trained; use {instead}"):
        attack.run(view, seed=6)
    free = DeepLeakageFromModelPlus(iterations=3, restarts=1)
    assert free.run(view, seed=6).images is not None
