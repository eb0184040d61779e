from typing import Any

import pytest
import torch
from torch import nn

from attacks.building_blocks.gan_networks import (
    ACTIVATIONS,
    NETS,
    Blueprint,
    NoPilotError,
    blueprint,
)
from leakbed.models import Architecture


def plan(smashed: tuple[int, ...], **settings: Any) -> Blueprint:
    chosen: dict[str, Any] = {"nets": "paper", "activations": "linear", "padding": "auto"}
    image = settings.pop("image", (1, 28, 28))
    return blueprint(image, smashed, **chosen | settings)


def parameters(module: nn.Module) -> int:
    return sum(p.numel() for p in module.parameters())


def kinds(module: nn.Sequential, *wanted: type[nn.Module]) -> list[type[nn.Module]]:
    return [type(layer) for layer in module if isinstance(layer, wanted)]


# of the published code, at the paper's splits
@pytest.mark.parametrize(
    ("smashed", "pilot", "decoder", "critic"),
    [
        ((64, 16, 16), 38_720, 154_627, 7_835_137),
        ((128, 8, 8), 223_232, 593_667, 7_970_305),
        ((256, 4, 4), 960_896, 888_579, 8_262_145),
    ],
)
def test_networks_are_the_published_ones(
    smashed: tuple[int, ...], pilot: int, decoder: int, critic: int
) -> None:
    found = plan(smashed, image=(3, 32, 32), padding="padded")
    assert parameters(found.pilot(0)) == pilot
    assert parameters(found.decoder(0)) == decoder
    assert parameters(found.critic(0)) == critic


@pytest.mark.parametrize("cut", [4, 5, 6, 7])
def test_a_pilot_fits_every_split_of_the_papers_network(cut: int) -> None:
    architecture = Architecture(
        name="fsha-resnet", image_shape=(3, 32, 32), num_classes=10, cut=cut
    )
    found = plan(architecture.smashed_shape, image=(3, 32, 32), padding="padded")
    assert found.pilot(0)(torch.rand(1, 3, 32, 32)).shape[1:] == architecture.smashed_shape


@pytest.mark.parametrize("nets", NETS)
@pytest.mark.parametrize("activations", ACTIVATIONS)
@pytest.mark.parametrize(
    ("image", "smashed"),
    [
        ((1, 28, 28), (8, 28, 28)),
        ((1, 28, 28), (32, 14, 14)),
        ((1, 28, 28), (64, 7, 7)),
        ((1, 28, 28), (16, 4, 4)),
        ((1, 28, 28), (8, 12, 12)),
        ((3, 27, 40), (5, 7, 10)),
        ((3, 29, 40), (5, 12, 18)),
    ],
)
def test_shapes_meet(
    image: tuple[int, int, int], smashed: tuple[int, ...], nets: str, activations: str
) -> None:
    found = plan(smashed, image=image, nets=nets, activations=activations)
    maps = found.pilot(0)(torch.rand(2, *image))
    assert maps.shape == (2, *smashed)
    images = found.decoder(0)(maps)
    assert images.shape == (2, *image)
    assert images.abs().max() <= 1
    assert found.critic(0)(maps).shape == (2, 1)


@pytest.mark.parametrize("nets", NETS)
def test_activations_are_none_or_the_papers(nets: str) -> None:
    linear, swish = (plan((64, 7, 7), nets=nets, activations=each) for each in ACTIVATIONS)
    assert kinds(linear.pilot(0), nn.SiLU, nn.ReLU) == []
    assert kinds(linear.decoder(0), nn.SiLU, nn.ReLU, nn.Tanh) == [nn.Tanh]
    pilot, decoder = swish.pilot(0), swish.decoder(0)
    assert kinds(pilot, nn.SiLU) == [nn.SiLU] * (2 if nets == "paper" else 1)
    assert isinstance(pilot[-1], nn.Conv2d)
    assert kinds(decoder, nn.ReLU, nn.Tanh) == [nn.ReLU, nn.ReLU, nn.Tanh]


def test_the_shallowest_pilot_is_taken_unless_told() -> None:
    assert not plan((16, 4, 4)).padded
    assert plan((16, 4, 4), padding="padded").padded
    assert len(plan((16, 4, 4), padding="padded").sides) == 4
    assert len(plan((16, 4, 4)).sides) == 3


@pytest.mark.parametrize(("nets", "made"), [("small", -0.7), ("paper", 0.0)])
def test_a_small_decoder_starts_at_a_grey(nets: str, made: float) -> None:
    decoder = plan((64, 7, 7), nets=nets).decoder(0, grey=-0.7)
    assert torch.allclose(decoder(torch.zeros(1, 64, 7, 7)), torch.tensor(made))
    black = plan((64, 7, 7), nets=nets).decoder(0, grey=-1.0)
    assert black(torch.zeros(1, 64, 7, 7)).isfinite().all()


def test_the_stream_fixes_the_weights() -> None:
    found = plan((64, 7, 7), nets="small")
    state = torch.get_rng_state()
    for make in (found.pilot, found.decoder, found.critic):
        first, again, other = (next(make(stream).parameters()) for stream in (1, 1, 2))
        assert torch.equal(first, again)
        assert not torch.equal(first, other)
    assert torch.equal(torch.get_rng_state(), state)


@pytest.mark.parametrize(
    ("smashed", "padding", "message"),
    [
        ((120,), "auto", r"\(120,\).*padded: 28x28, 14x14, 7x7, 4x4, 2x2, 1x1; unpadded: 28x28"),
        ((16, 9, 9), "auto", "cut the model where it has such feature maps"),
        ((16, 4, 7), "auto", "no pilot"),
        ((8, 12, 12), "padded", r"sizes: padded: 28x28, 14x14, 7x7, 4x4, 2x2, 1x1;"),
        ((32, 14, 14), "unpadded", r"sizes: unpadded: 28x28, 12x12, 4x4;"),
    ],
)
def test_maps_that_no_pilot_makes_are_refused(
    smashed: tuple[int, ...], padding: str, message: str
) -> None:
    with pytest.raises(NoPilotError, match=message):
        plan(smashed, padding=padding)
