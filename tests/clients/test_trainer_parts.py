import pytest
import torch
from torch import nn

from clients.trainer import Part, blank, draws
from leakbed.models import DETERMINISTIC
from tests.support import tiny

CPU = torch.device("cpu")


@pytest.mark.parametrize("part", ["whole", "bottom"])
def test_every_caller_gets_a_part_of_its_own(part: Part) -> None:
    architecture = tiny.architecture("stateful")
    one, two = blank(architecture, part, CPU), blank(architecture, part, CPU)
    expected = architecture.build(0) if part == "whole" else architecture.bottom(0)
    assert one.state_dict().keys() == expected.state_dict().keys()
    next(one.parameters()).data.zero_()
    assert next(two.parameters()).abs().sum() > 0
    assert blank(architecture, part, CPU).state_dict().keys() == one.state_dict().keys()


class Noisy(nn.Linear):
    """A linear layer that its author made random."""


@pytest.mark.parametrize(
    ("layer", "expected"),
    [
        (nn.Linear(2, 2), False),
        (nn.BatchNorm1d(2), False),
        (nn.Dropout(0.5), True),
        (Noisy(2, 2), True),
    ],
)
def test_only_layers_known_to_draw_nothing_are_trusted(layer: nn.Module, expected: bool) -> None:
    assert draws(nn.Sequential(nn.Flatten(), layer)) is expected


def test_a_layer_with_a_hook_is_not_trusted() -> None:
    network = nn.Sequential(nn.Linear(2, 2))
    network[0].register_forward_hook(lambda *_: None)
    assert draws(network)


MADE = {
    "AvgPool2d": (2,),
    "BasicBlock": (3, 3),
    "BatchNorm1d": (3,),
    "BatchNorm2d": (3,),
    "Conv2d": (3, 3, 1),
    "FlattenLinear": (3, 3),
    "Linear": (3, 3),
    "MaxPool2d": (2,),
    "ResidualBlock": (3, 3),
}

MAPS = {"BasicBlock", "ResidualBlock"}


@pytest.mark.parametrize(
    "kind",
    sorted(DETERMINISTIC, key=lambda kind: kind.__name__),
    ids=lambda kind: kind.__name__,
)
def test_no_layer_that_is_trusted_draws(kind: type[nn.Module]) -> None:
    layer = kind(*MADE.get(kind.__name__, ())).train()
    before = torch.get_rng_state()
    maps = kind.__name__.endswith("2d") or kind.__name__ in MAPS
    layer(torch.ones(3, 3, 3, 3) if maps else torch.ones(3, 3))
    assert torch.equal(torch.get_rng_state(), before)
