"""Every fast layer gives what each copy gives alone: values, and gradients both ways."""

from collections.abc import Callable
from copy import deepcopy

import pytest
import torch
from torch import Tensor, nn

from attacks.building_blocks.stacked_networks import (
    _RULES,
    Network,
    Weights,
    _has_rule,
    mapped,
    stack_weights,
    stacked,
)
from leakbed.models import Architecture
from leakbed.models.networks import FlattenLinear
from leakbed.seeds import generator, scoped

COPIES = 3


def small() -> dict[str, nn.Sequential]:
    return {
        "valid": nn.Sequential(nn.Conv2d(2, 3, 3), nn.Tanh()),
        "strided": nn.Sequential(
            nn.Conv2d(2, 4, (3, 2), stride=(2, 1), padding=(1, 2), bias=False)
        ),
        "stride over kernel": nn.Sequential(nn.Conv2d(2, 3, 2, stride=3)),
        "average": nn.Sequential(nn.Conv2d(2, 3, 3), nn.AvgPool2d(2), nn.Sigmoid()),
        "odd pool": nn.Sequential(nn.Conv2d(2, 3, 2), nn.MaxPool2d(2)),
        "wide pool": nn.Sequential(nn.MaxPool2d(3, stride=2), nn.Conv2d(2, 2, 2)),
        "linear": nn.Sequential(nn.Flatten(), nn.Linear(2 * 8 * 8, 5), nn.ReLU(), nn.Linear(5, 2)),
        "linear on maps": nn.Sequential(nn.Linear(8, 4, bias=False), nn.MaxPool2d(2)),
        "flatten inside": nn.Sequential(nn.Conv2d(2, 3, 3), nn.ELU(), FlattenLinear(3 * 36, 4)),
    }


def slow() -> dict[str, nn.Sequential]:
    return {
        "in place": nn.Sequential(nn.Conv2d(2, 3, 3), nn.ReLU(inplace=True)),
        "grouped": nn.Sequential(nn.Conv2d(2, 4, 3, groups=2), nn.MaxPool2d(2)),
        "dilated": nn.Sequential(nn.Conv2d(2, 4, 3, dilation=2)),
        "named padding": nn.Sequential(nn.Conv2d(2, 4, 3, padding="same")),
        "normalised": nn.Sequential(nn.Conv2d(2, 4, 3), nn.BatchNorm2d(4), nn.Dropout(0.5)),
        "nested": nn.Sequential(nn.Sequential(nn.Conv2d(2, 4, 3), nn.Tanh()), nn.MaxPool2d(2)),
    }


def catalogued() -> dict[str, nn.Sequential]:
    digits = [("mnistnet", (1, 28, 28), cut) for cut in range(10)]
    others = [
        ("lenet-sigmoid", (1, 28, 28), 5),
        ("mlp2", (1, 28, 28), 1),
        ("cifarnet", (3, 8, 8), 9),
    ]
    return {
        f"{name}/{cut}": Architecture(
            name=name, image_shape=shape, num_classes=10, activation="softplus", cut=cut
        ).bottom(5)
        for name, shape, cut in digits + others
    }


def fresh_copies(network: nn.Sequential) -> list[nn.Sequential]:
    copies = []
    for index in range(COPIES):
        with scoped(index):
            copy = deepcopy(network).double().eval()
            for parameter in copy.parameters():
                nn.init.uniform_(parameter, -0.5, 0.5)
        copies.append(copy)
    return copies


def inputs_for(name: str) -> Tensor:
    shape = (3, 8, 8) if name.startswith("cifarnet") else (1, 28, 28) if "/" in name else (2, 8, 8)
    return torch.randn(COPIES, *shape, generator=generator(9), dtype=torch.float64)


def gradients(run: Network, weights: Weights, inputs: Tensor, pull: Tensor) -> list[Tensor]:
    leaves = {name: each.clone().requires_grad_() for name, each in weights.items()}
    image = inputs.clone().requires_grad_()
    output = run(leaves, image)
    found = torch.autograd.grad(output, [image, *leaves.values()], pull.reshape(output.shape))
    return [output.detach(), *found]


def literal(copies: list[nn.Sequential], inputs: Tensor, pull: Tensor) -> list[Tensor]:
    rows = []
    for copy, row, cotangent in zip(copies, inputs, pull, strict=True):
        image = row[None].clone().requires_grad_()
        output = copy(image)
        leaves = [image, *copy.parameters()]
        rows.append(
            [output[0], *torch.autograd.grad(output, leaves, cotangent.reshape(output.shape))]
        )
    stacks = [torch.stack(parts).detach() for parts in zip(*rows, strict=True)]
    return [stacks[0], stacks[1].squeeze(1), *stacks[2:]]


ALL = {**small(), **slow(), **catalogued()}


@pytest.mark.parametrize("name", ALL)
@pytest.mark.parametrize("way", [stacked, mapped])
def test_every_copy_computes_what_it_computes_alone(
    name: str, way: Callable[[nn.Sequential], Network]
) -> None:
    copies = fresh_copies(ALL[name])
    weights, inputs = stack_weights(copies), inputs_for(name)
    size = copies[0](inputs[:1]).numel()
    pull = torch.randn(COPIES, size, generator=generator(3), dtype=torch.float64)
    expected = literal(copies, inputs, pull)
    for got, want in zip(gradients(way(copies[0]), weights, inputs, pull), expected, strict=True):
        torch.testing.assert_close(got, want, rtol=1e-8, atol=1e-10)


def test_what_has_a_rule_takes_the_fast_way() -> None:
    for name, network in {**small(), **catalogued()}.items():
        assert all(_has_rule(layer) for layer in network), name
    for name, network in slow().items():
        assert not all(_has_rule(layer) for layer in network), name
    assert not _has_rule(nn.Flatten(0))
    assert not _has_rule(nn.MaxPool2d(2, return_indices=True))
    assert all(issubclass(layer, nn.Module) for layer in _RULES)


def test_of_equal_values_torchs_choice_gets_the_gradient() -> None:
    network = nn.Sequential(nn.MaxPool2d(2))
    inputs = torch.randint(0, 3, (COPIES, 2, 8, 8), generator=generator(1)).double()
    pull = torch.randn(COPIES, 2 * 16, generator=generator(2), dtype=torch.float64)
    image = inputs.clone().requires_grad_()
    (got,) = torch.autograd.grad(stacked(network)({}, image), image, pull.reshape(COPIES, 2, 4, 4))
    (want,) = torch.autograd.grad(network(image), image, pull.reshape(COPIES, 2, 4, 4))
    assert torch.equal(got, want)


def test_one_copys_weights_do_not_reach_another() -> None:
    network = small()["valid"]
    weights = stack_weights(fresh_copies(network))
    inputs = inputs_for("valid")
    before = stacked(network)(weights, inputs)
    weights["0.weight"][1] = torch.nan
    after = stacked(network)(weights, inputs)
    assert torch.equal(after[[0, 2]], before[[0, 2]])
    assert after[1].isnan().all()


def test_the_network_itself_stays_as_it_was() -> None:
    network = slow()["normalised"].double().train()
    weights = stack_weights([network] * COPIES)
    stacked(network)(weights, inputs_for("valid"))
    assert network.training
    assert network[1].num_batches_tracked == 0


def used_twice() -> dict[str, nn.Sequential]:
    activation, layer = nn.Tanh(), nn.Linear(8, 8)
    first, second = nn.Linear(8, 8), nn.Linear(8, 8)
    second.weight = first.weight
    return {
        "an activation": nn.Sequential(nn.Linear(8, 8), activation, nn.Linear(8, 8), activation),
        "a layer": nn.Sequential(layer, nn.ReLU(), layer, nn.Linear(8, 2)),
        "a weight": nn.Sequential(first, nn.ReLU(), second),
    }


@pytest.mark.parametrize("run_by", [stacked, mapped])
@pytest.mark.parametrize("name", sorted(used_twice()))
def test_what_is_used_twice_runs_twice(name: str, run_by: Callable[..., Network]) -> None:
    network = used_twice()[name]
    weights = stack_weights([network] * COPIES)
    inputs = torch.rand(COPIES, 8, generator=generator(5))
    torch.testing.assert_close(run_by(network)(weights, inputs), network(inputs))
