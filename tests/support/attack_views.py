"""Views that every attack of the catalogue can be run on, small and quick."""

from typing import Any

import torch
from torch import nn

from attacks import ATTACKS
from leakbed.contracts import Attack, Evidence, Knowledge, View
from leakbed.models import Architecture

SHAPE, CLASSES, TARGETS, KNOWN = (1, 8, 8), 4, 3, 2
TWO_CLASSES = {"cosine-score", "exploit", "model-completion", "norm-score"}
"""Attacks that tell two labels apart, or that must know a sample of every class."""
QUICK: dict[str, dict[str, Any]] = {
    "dlm": {"iterations": 3, "restarts": 1},
    "dlm-plus": {"iterations": 3, "restarts": 1},
    "similarity-clustering": {"partial": True},
    "similarity-distance": {"partial": True},
    "similarity-transfer": {"partial": True, "epochs": 1},
    "exploit": {"steps": 3},
    "model-completion": {"steps": 3},
    "spadv": {"steps": 3, "batch": 4, "ascent": 2},
    "fora": {"steps": 2},
    "sdar": {"steps": 2},
    "unsplit": {"outer_steps": 2, "input_steps": 2, "model_steps": 2},
}


def quick_attack(name: str) -> Attack:
    """Return an attack of the catalogue with a budget for a test."""
    return ATTACKS[name](**QUICK.get(name, {}))


def view_for(attack: Attack) -> View:
    """Return a view that grants what an attack's threat model names, from a small victim."""
    stream = torch.Generator().manual_seed(7)
    images = torch.rand(TARGETS, *SHAPE, generator=stream)
    labels = torch.randint(CLASSES, (TARGETS,), generator=stream)
    classes = CLASSES
    if attack.name in TWO_CLASSES:
        labels, classes = torch.arange(TARGETS) % 2, 2
    architecture = Architecture(
        name="mlp2", image_shape=SHAPE, num_classes=classes, activation="sigmoid", cut=1
    )
    threat = attack.threat
    granted: dict[str, Any] = {}
    if Evidence.UPDATE in threat.evidence:
        granted |= _weights(architecture, images, labels)
    if threat.evidence & {
        Evidence.SMASHED,
        Evidence.ROUND_SMASHED,
        Evidence.CUT_GRADIENT,
        Evidence.HEAD_WEIGHT_GRADIENT,
    }:
        granted |= _cut(architecture, images, labels)
    if Evidence.ROUND_SMASHED in threat.evidence:
        granted["round_smashed"] = granted["smashed"]
    owned = {
        Knowledge.ARCHITECTURE: ("architecture", architecture),
        Knowledge.SERVER_PART: ("server_part", architecture.top(11).eval()),
        Knowledge.PUBLIC_IMAGES: ("public_images", torch.rand(5, *SHAPE, generator=stream)),
        Knowledge.PUBLIC_LABELS: (
            "public_labels",
            torch.randint(CLASSES, (5,), generator=stream),
        ),
        Knowledge.OWN_IMAGES: ("own_images", images),
        Knowledge.NATURAL_IMAGES: ("natural_images", images),
        Knowledge.KNOWN_LABELS: (
            "known_labels",
            torch.where(torch.arange(TARGETS) < KNOWN, labels, -1)[:, None],
        ),
    }
    granted |= dict(owned[need] for need in threat.needs if need in owned)
    return View(
        seat=threat.seat,
        image_shape=SHAPE,
        num_classes=classes,
        targets=TARGETS,
        device=torch.device("cpu"),
        **granted,
    )


def _weights(architecture: Architecture, images: torch.Tensor, labels: torch.Tensor) -> Any:
    model = architecture.build(11)
    before = {name: value.detach() for name, value in model.named_parameters()}
    after: dict[str, list[torch.Tensor]] = {name: [] for name in before}
    for image, label in zip(images, labels, strict=True):
        loss = nn.functional.cross_entropy(model(image[None]), label[None])
        gradients = torch.autograd.grad(loss, list(model.parameters()))
        for name, gradient in zip(before, gradients, strict=True):
            after[name].append(before[name] - 0.1 * gradient)
    return {
        "before": {name: value.expand(TARGETS, *value.shape) for name, value in before.items()},
        "after": {name: torch.stack(values) for name, values in after.items()},
        "buffers": {},
    }


def _cut(architecture: Architecture, images: torch.Tensor, labels: torch.Tensor) -> Any:
    parts = architecture.parts(11)
    smashed = parts.bottom(images).detach().requires_grad_()
    loss = nn.functional.cross_entropy(parts.top(smashed), labels, reduction="sum")
    (gradient,) = torch.autograd.grad(loss, smashed)
    errors = torch.softmax(parts.top(smashed), 1) - nn.functional.one_hot(
        labels, architecture.num_classes
    )
    head = torch.einsum("tc,tf->tcf", errors, smashed).detach()
    return {"smashed": smashed.detach(), "cut_gradient": gradient, "head_gradient": head}
