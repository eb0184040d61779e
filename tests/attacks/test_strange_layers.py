"""Networks that an attack cannot compute with are one line that says why, and no traceback."""

import pytest
import torch

from attacks.building_blocks.gradient_matching import GradientMatching
from attacks.deep_leakage_from_model import DeepLeakageFromModel
from attacks.deep_leakage_from_model_plus import DeepLeakageFromModelPlus
from attacks.unsplit import UnSplit
from leakbed.contracts import UnfitViewError
from leakbed.models import Architecture
from tests.support.unsplit_reading import view_of
from tests.support.weight_updates import train


def network(name: str, cut: int | None = None) -> Architecture:
    return Architecture(
        name=f"tests.support.strange_networks:{name}", image_shape=(1, 6, 6), num_classes=3, cut=cut
    )


@pytest.mark.parametrize("attack", [DeepLeakageFromModel(), DeepLeakageFromModelPlus()])
@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("single", r"layer 1 \(Conv2d\) cannot compute in float64.*leave casts out"),
        ("branching", "many copies of the network at once.*branches on its values"),
    ],
)
def test_gradient_matching_says_what_it_cannot_compute_with(
    attack: GradientMatching, name: str, message: str
) -> None:
    view = train(torch.rand(1, 1, 1, 6, 6), torch.tensor([[1]]), architecture=network(name)).view
    with pytest.raises(UnfitViewError, match=message) as caught:
        attack.run(view, seed=0)
    assert "\n" not in str(caught.value)


def test_unsplit_says_what_it_cannot_compute_with() -> None:
    layers = network("branching", cut=1)
    view = view_of(layers.bottom(3), torch.rand(2, 1, 6, 6), layers)
    with pytest.raises(UnfitViewError, match="many copies of the network at once"):
        UnSplit(outer_steps=1).run(view, seed=0)
