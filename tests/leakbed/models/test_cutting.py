from collections import OrderedDict

import pytest
import torch
from torch import nn

from leakbed.models import Architecture, IllegalCutError, cut, join
from leakbed.models.cutting import linear_above

SHAPE = (1, 28, 28)


@pytest.fixture
def model() -> nn.Sequential:
    return Architecture(name="mnistnet", image_shape=SHAPE, num_classes=10).build(0)


def test_every_cut_computes_what_the_whole_does(model: nn.Sequential) -> None:
    images = torch.rand(3, *SHAPE)
    for at in range(len(model) - 1):
        parts = cut(model, at, image_shape=SHAPE)
        smashed = parts.bottom(images)
        assert smashed.shape == (3, *parts.smashed_shape)
        assert torch.equal(parts.top(smashed), model(images))
        assert len(parts.bottom) == at + 1


def test_names_of_both_parts_make_up_the_whole(model: nn.Sequential) -> None:
    parts = cut(model, 5, image_shape=SHAPE)
    assert set(parts.top.state_dict()) == {
        f"{index}.{kind}" for index in (6, 8, 10) for kind in ("weight", "bias")
    }
    whole = join(parts.bottom, parts.top)
    assert list(whole.state_dict()) == list(model.state_dict())
    assert all(whole.state_dict()[name] is not None for name in model.state_dict())
    fresh = Architecture(name="mnistnet", image_shape=SHAPE, num_classes=10).build(1)
    fresh.load_state_dict({**parts.bottom.state_dict(), **parts.top.state_dict()})
    assert torch.equal(fresh(torch.ones(1, *SHAPE)), model(torch.ones(1, *SHAPE)))


@pytest.mark.parametrize("at", [-1, 10, 11, 99])
def test_an_illegal_cut_names_the_legal_ones(model: nn.Sequential, at: int) -> None:
    with pytest.raises(IllegalCutError, match=r"0 \(Conv2d\), 1 \(ReLU\).*9 \(ReLU\)$"):
        cut(model, at, image_shape=SHAPE)


def test_a_linear_top_keeps_the_place_of_an_activation_that_is_used_twice() -> None:
    activation = nn.ReLU()
    layers = nn.Sequential(nn.Flatten(), activation, nn.Linear(4, 4), activation, nn.Linear(4, 2))
    kinds = [type(layer) for layer in linear_above(layers, 1)]
    assert kinds == [nn.Flatten, nn.ReLU, nn.Linear, nn.Identity, nn.Linear]


def test_a_linear_top_is_one_map_above_the_same_bottom(model: nn.Sequential) -> None:
    linear = Architecture(
        name="mnistnet", image_shape=SHAPE, num_classes=10, cut=5, linear_top=True
    )
    parts = linear.parts(0)
    assert list(linear.build(0).state_dict()) == list(model.state_dict())
    images = torch.rand(3, *SHAPE)
    smashed = parts.bottom(images)
    assert torch.equal(smashed, cut(model, 5, image_shape=SHAPE).bottom(images))
    halves = parts.top(smashed / 2) * 2 - parts.top(torch.zeros_like(smashed))
    assert torch.allclose(halves, parts.top(smashed), atol=1e-5)
    assert not torch.allclose(parts.top(smashed), model(images), atol=1e-5)


def test_without_a_cut_there_is_no_top_to_make_linear() -> None:
    whole = Architecture(name="mnistnet", image_shape=SHAPE, num_classes=10, linear_top=True)
    with pytest.raises(IllegalCutError, match=r"set model\.cut"):
        whole.build(0)


def test_a_layer_with_activations_inside_cannot_be_made_linear() -> None:
    deep = Architecture(
        name="fsha-resnet", image_shape=(3, 32, 32), num_classes=10, cut=2, linear_top=True
    )
    with pytest.raises(IllegalCutError, match="a ResidualBlock with activations inside"):
        deep.build(0)


def test_one_layer_cannot_be_cut() -> None:
    with pytest.raises(IllegalCutError, match="none, the network has too few layers"):
        cut(nn.Sequential(nn.Flatten()), 0, image_shape=SHAPE)


def test_cutting_does_not_touch_the_model() -> None:
    model = nn.Sequential(nn.Conv2d(1, 2, 3), nn.BatchNorm2d(2), nn.Dropout(0.5), nn.Flatten())
    state = torch.get_rng_state()
    cut(model, 2, image_shape=SHAPE)
    assert model[1].num_batches_tracked == 0
    assert model.training
    assert model[2].training
    assert torch.equal(state, torch.get_rng_state())


def test_a_layer_used_twice_keeps_both_places() -> None:
    activation = nn.ReLU()
    model = nn.Sequential(
        OrderedDict(
            flat=nn.Flatten(),
            one=nn.Linear(784, 4),
            a=activation,
            two=nn.Linear(4, 4),
            b=activation,
        )
    )
    parts = cut(model, 3, image_shape=SHAPE)
    assert [len(parts.bottom), len(parts.top), len(join(parts.bottom, parts.top))] == [4, 1, 5]


def test_a_parameter_on_both_sides_is_refused() -> None:
    shared = nn.Linear(784, 784)
    model = nn.Sequential(nn.Flatten(), shared, nn.ReLU(), shared)
    assert cut(model, 0, image_shape=SHAPE).smashed_shape == (784,)
    with pytest.raises(IllegalCutError, match="shared parameter on both sides"):
        cut(model, 1, image_shape=SHAPE)


def test_a_sequence_with_its_own_forward_is_checked() -> None:
    class Doubling(nn.Sequential):
        def forward(self, images: torch.Tensor) -> torch.Tensor:
            return 2 * super().forward(images)

    with pytest.raises(IllegalCutError, match=r"Doubling.forward returns something else"):
        cut(Doubling(nn.Flatten(), nn.Linear(784, 2)), 0, image_shape=SHAPE)


def test_a_stage_named_twice_is_refused() -> None:
    class Repeating(nn.Module):
        stages = ("act", "act")

        def __init__(self) -> None:
            super().__init__()
            self.act = nn.ReLU()

    with pytest.raises(IllegalCutError, match="names a submodule twice"):
        cut(Repeating(), 0, image_shape=SHAPE)


def test_shapes_are_measured_where_the_weights_are() -> None:
    model = nn.Sequential(nn.Flatten(), nn.Linear(784, 3), nn.ReLU()).double()
    assert cut(model, 1, image_shape=SHAPE).smashed_shape == (3,)


def test_a_layer_at_several_places_keeps_all_of_them_under_a_linear_top() -> None:
    plain, linear = (
        Architecture(
            name="tests.support.strange_networks:one_activation",
            image_shape=(1, 6, 6),
            num_classes=3,
            cut=1,
            linear_top=linear,
        )
        for linear in (False, True)
    )
    kinds = [type(layer) for layer in linear.build(0)]
    assert len(kinds) == len(plain.build(0)) == 8
    assert [kinds.index(nn.Tanh), kinds.count(nn.Tanh)] == [1, 1], "that of the bottom"
    assert [index for index, kind in enumerate(kinds) if kind is nn.Identity] == [3, 6]
    images = torch.rand(2, 1, 6, 6)
    assert linear.top(0)(linear.bottom(0)(images)).shape == (2, 3)


def test_one_normalisation_cannot_count_on_both_sides_of_a_cut() -> None:
    named = Architecture(
        name="tests.support.strange_networks:normalised_twice", image_shape=(1, 6, 6), num_classes=3
    )
    with pytest.raises(IllegalCutError, match="one shared buffer on both sides"):
        cut(named.build(0), 1, image_shape=(1, 6, 6))
    assert len(cut(named.build(0), 3, image_shape=(1, 6, 6)).bottom) == 4
