import copy
from collections.abc import Callable

import pytest
import torch
from torch import Tensor, nn
from torch.func import functional_call, grad, vmap

from leakbed.models import ACTIVATIONS, MODELS, Architecture, cut, draw_alike

SMOOTH = ("elu", "gelu", "sigmoid", "silu", "softplus", "tanh")

# name, image, published shape after each index, parameters of the whole network
PUBLISHED = [
    (
        "mnistnet",
        (1, 28, 28),
        [(8, 24, 24)] * 2
        + [(8, 12, 12)]
        + [(16, 8, 8)] * 2
        + [(16, 4, 4)]
        + [(120,)] * 2
        + [(84,)] * 2,
        208 + 3216 + 30840 + 10164 + 850,
    ),
    (
        "cifarnet",
        (3, 32, 32),
        [(64, 32, 32)] * 4
        + [(64, 16, 16)]
        + [(128, 16, 16)] * 4
        + [(128, 8, 8)] * 5
        + [(128, 4, 4)]
        + [(512,)] * 2,
        None,
    ),
    (
        "lenet-sigmoid",
        (3, 32, 32),
        [(12, 16, 16)] * 2 + [(12, 8, 8)] * 4,
        12 * 76 + 2 * 12 * 301 + 769 * 10,
    ),
    ("mlp2", (1, 28, 28), [(32,)] * 2, 785 * 32 + 33 * 10),
    (
        "fsha-resnet",
        (3, 32, 32),
        [(64, 32, 32)] * 3 + [(64, 16, 16)] * 2 + [(128, 8, 8)] * 2 + [(256, 4, 4)] * 3,
        1_846_656 + 2 * 590_080 + 4097 * 10,
    ),
    ("mlp-bottom", (1, 28, 28), [(128,)] * 2 + [(120,)] * 2 + [(84,)] * 2, 100480 + 15480 + 11014),
    (
        "resnet18",
        (3, 32, 32),
        [(64, 32, 32)] * 5
        + [(128, 16, 16)] * 2
        + [(256, 8, 8)] * 2
        + [(512, 4, 4)] * 2
        + [(512, 1, 1)],
        11_173_962,  # as every count of this network for CIFAR-10 has it
    ),
    ("tabular-mlp", (1, 3, 10), [(32,)] * 8, 31 * 32 + 3 * 33 * 32 + 33 * 10),
    (
        "two-blocks",
        (1, 28, 28),
        [(32, 28, 28)] * 3 + [(32, 14, 14)] + [(64, 14, 14)] * 3 + [(64, 7, 7)],
        320 + 64 + 18_496 + 128 + 3137 * 10,
    ),
]


@pytest.mark.parametrize(("name", "image_shape", "shapes", "parameters"), PUBLISHED)
def test_layers_are_the_published_ones(
    name: str, image_shape: tuple[int, int, int], shapes: list[tuple[int, ...]], parameters: int
) -> None:
    model = Architecture(name=name, image_shape=image_shape, num_classes=10).build(0)
    cuts = [cut(model, at, image_shape=image_shape).smashed_shape for at in range(len(model) - 1)]
    assert cuts == shapes
    if parameters:
        assert sum(p.numel() for p in model.parameters()) == parameters


# parameters up to the four cuts of the paper's figure 3
@pytest.mark.parametrize(
    ("cut_", "parameters"), [(4, 75_776), (5, 371_072), (6, 666_240), (7, 1_846_656)]
)
def test_the_residual_network_has_the_published_splits(cut_: int, parameters: int) -> None:
    architecture = Architecture(
        name="fsha-resnet", image_shape=(3, 32, 32), num_classes=10, cut=cut_
    )
    assert sum(p.numel() for p in architecture.bottom(0).parameters()) == parameters


# parameters of SPADV's four node parts: the first layers, then one stage more each
@pytest.mark.parametrize(
    ("cut_", "parameters"), [(2, 1_856), (4, 149_824), (6, 675_392), (8, 2_775_104)]
)
def test_resnet18_is_cut_at_the_four_places_with_an_activation_before_each(
    cut_: int, parameters: int
) -> None:
    architecture = Architecture(name="resnet18", image_shape=(3, 32, 32), num_classes=10, cut=cut_)
    bottom = architecture.bottom(0)
    assert sum(p.numel() for p in bottom.parameters()) == parameters
    assert bottom(torch.rand(2, 3, 32, 32)).min() >= 0  # a ReLU ends it


def test_published_activations() -> None:
    def of(name: str) -> list[type[nn.Module]]:
        model = Architecture(name=name, image_shape=(3, 32, 32), num_classes=10).build(0)
        plain = (nn.Conv2d, nn.Linear, nn.MaxPool2d)
        return [type(layer) for layer in model if not isinstance(layer, plain)]

    assert of("lenet-sigmoid") == [nn.Sigmoid] * 3
    assert of("mlp2") == [nn.ReLU]
    assert of("mnistnet") == [nn.ReLU] * 4
    assert of("cifarnet") == [nn.ReLU] * 6 + [nn.Sigmoid]


@pytest.mark.parametrize("name", MODELS)
@pytest.mark.parametrize("image_shape", [(1, 28, 28), (3, 32, 32), (3, 28, 40)])
def test_every_image_shape_gives_one_logit_per_class(
    name: str, image_shape: tuple[int, int, int]
) -> None:
    model = Architecture(name=name, image_shape=image_shape, num_classes=7).build(0)
    assert model(torch.rand(2, *image_shape)).shape == (2, 7)


@pytest.mark.parametrize("name", MODELS)
def test_no_layer_changes_what_it_reads(name: str) -> None:
    model = Architecture(name=name, image_shape=(1, 28, 28), num_classes=10).build(0)
    value = torch.rand(2, 1, 28, 28)
    for layer in model:
        before = value.clone()
        after = layer(value)
        assert torch.equal(before, value), layer
        value = after.detach()


def squared_gradient(model: nn.Module, image: Tensor, label: Tensor) -> Tensor:
    weights = {name: value.detach() for name, value in model.named_parameters()}

    def loss(weights: dict[str, Tensor]) -> Tensor:
        logits = functional_call(model, weights, (image.unsqueeze(0),))
        return nn.functional.cross_entropy(logits, label.unsqueeze(0))

    return sum((value**2).sum() for value in grad(loss)(weights).values())


@pytest.mark.parametrize(
    ("name", "activation"),
    [*((name, "tanh") for name in MODELS), *(("mnistnet", each) for each in SMOOTH)],
)
def test_gradient_matching_works_batched_over_victims(name: str, activation: str) -> None:
    """The gradient of a gradient under vmap equals plain autograd, one victim at a time."""
    side = 16  # the smallest every network reads
    model = Architecture(
        name=name, image_shape=(1, side, side), num_classes=3, activation=activation
    ).build(0)
    model = model.double().eval()  # in training BatchNorm counts in place, which vmap refuses
    generator = torch.Generator().manual_seed(0)
    images = torch.rand(2, 1, side, side, generator=generator, dtype=torch.float64)
    labels = torch.tensor([0, 2])

    batched = vmap(grad(lambda image, label: squared_gradient(model, image, label)))(images, labels)

    for image, label, guess in zip(images, labels, batched, strict=True):
        variable = image.clone().requires_grad_(True)
        loss = nn.functional.cross_entropy(model(variable.unsqueeze(0)), label.unsqueeze(0))
        first = torch.autograd.grad(loss, list(model.parameters()), create_graph=True)
        (second,) = torch.autograd.grad(sum((value**2).sum() for value in first), variable)
        assert second.abs().max() > 0
        assert torch.allclose(second, guess, rtol=1e-9, atol=1e-15)


def test_activations_have_names_in_kebab_case() -> None:
    assert all(name == name.lower() and "_" not in name for name in ACTIVATIONS)
    assert set(SMOOTH) <= set(ACTIVATIONS)


DROPOUTS = {
    nn.Dropout: (20, 6),
    nn.Dropout1d: (4, 20, 3),
    nn.Dropout2d: (4, 20, 3, 2),
    nn.Dropout3d: (4, 20, 3, 2, 2),
}


@pytest.mark.parametrize("kind", DROPOUTS)
def test_dropout_draws_from_the_cpu_wherever_it_computes(
    kind: Callable[[float], nn.Module],
) -> None:
    plain, layer = kind(0.25), draw_alike(nn.Sequential(kind(0.25)))
    assert repr(layer[0]) == repr(plain)  # type: ignore[index]
    rows = torch.ones(DROPOUTS[kind])  # type: ignore[index]
    states = []
    for run, given in ((plain, rows), (copy.deepcopy(layer), rows), (layer, rows.to("meta"))):
        torch.default_generator.manual_seed(3)
        made = run(given)
        states.append((made, torch.get_rng_state()))
    assert torch.equal(states[0][0], states[1][0])  # the same bits as torch's own
    assert states[2][0].device.type == "meta"
    assert all(torch.equal(state, states[0][1]) for _, state in states)


def test_dropout_in_evaluation_draws_nothing() -> None:
    layer, rows = draw_alike(nn.Dropout(0.5)).eval(), torch.ones(3, device="meta")
    before = torch.get_rng_state()
    assert layer(rows).shape == (3,)
    assert torch.equal(torch.get_rng_state(), before)
