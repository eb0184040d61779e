"""The generator grows images of any size, in [0, 1]; the published one where the paper has it."""

import pytest
import torch
from torch import nn
from torch.func import functional_call

from attacks.building_blocks.gan_networks import LEAST_SIDE, network, skeleton


@pytest.mark.parametrize("shape", [(1, 28, 28), (3, 32, 32), (1, LEAST_SIDE, 6), (2, 13, 9)])
def test_images_have_the_size_asked_for_and_lie_in_the_unit_interval(
    shape: tuple[int, int, int],
) -> None:
    made = network(shape, 5, 8)(torch.randn(3, 5)).detach()
    assert made.shape == (3, *shape)
    assert 0 <= float(made.min()) < float(made.max()) <= 1


def test_layers_are_the_published_ones() -> None:
    layers = list(network((1, 28, 28), 100, 256))
    dense = layers[0]
    assert isinstance(dense, nn.Linear)
    assert (dense.in_features, dense.out_features) == (100, 7 * 7 * 256)
    found = [layer for layer in layers if isinstance(layer, nn.ConvTranspose2d)]
    assert [(each.out_channels, each.kernel_size, each.stride) for each in found] == [
        (128, (5, 5), (1, 1)),
        (64, (5, 5), (2, 2)),
        (1, (5, 5), (2, 2)),
    ]
    assert all(each.bias is None for each in [dense, *found])
    slopes = {layer.negative_slope for layer in layers if isinstance(layer, nn.LeakyReLU)}
    assert slopes == {0.3}


def test_one_image_can_be_made_and_no_statistics_are_kept() -> None:
    made = network((1, 8, 8), 5, 8)
    assert made(torch.randn(1, 5)).isfinite().all()
    assert not list(made.buffers())


def test_a_skeleton_called_with_weights_is_the_network() -> None:
    made, noise = network((1, 8, 8), 5, 8), torch.randn(4, 5)
    form = skeleton((1, 8, 8), 5, 8)
    assert all(parameter.is_meta for parameter in form.parameters())
    weights = dict(made.named_parameters())
    assert torch.equal(functional_call(form, weights, (noise,)), made(noise))
    assert skeleton((1, 8, 8), 5, 8) is form


def test_weights_are_drawn_as_published() -> None:
    """Glorot uniform, as Keras draws where nothing is said; each layer almost fills its range."""
    torch.manual_seed(0)
    for layer in network((1, 28, 28), 100, 256):
        if isinstance(layer, nn.Linear | nn.ConvTranspose2d):
            fans = sum(layer.weight.shape[:2]) * layer.weight[0, 0].numel()
            bound = (6 / fans) ** 0.5
            assert 0.95 * bound < float(layer.weight.detach().abs().max()) <= bound


def test_fresh_images_are_not_saturated() -> None:
    """Drawn three times too wide, one pixel in six began where tanh is flat."""
    torch.manual_seed(0)
    made = network((1, 28, 28), 100, 256)(torch.randn(64, 100)).detach()
    assert float(((made < 0.01) | (made > 0.99)).float().mean()) < 0.01


def test_normalisation_has_the_published_floor() -> None:
    layers = network((1, 28, 28), 100, 256)
    assert {layer.eps for layer in layers if isinstance(layer, nn.BatchNorm2d)} == {1e-3}
