"""The constant image: right shapes, no evidence."""

import pytest

from attacks.baselines import ConstantImage
from leakbed.contracts import Attack, Seat, View


def test_every_sample_of_every_target_is_the_same_grey() -> None:
    view = View(seat=Seat.SERVER, image_shape=(3, 4, 5), num_classes=10, targets=2, rows=6)
    guess = ConstantImage(value=0.25).run(view, seed=0)
    assert guess.images.shape == (2, 6, 3, 4, 5)
    assert (guess.images == 0.25).all()
    assert guess.labels is None
    assert isinstance(ConstantImage(), Attack)
    assert not ConstantImage().threat.needs


@pytest.mark.parametrize("value", [-0.1, 1.1])
def test_a_grey_outside_the_pixel_range_is_refused(value: float) -> None:
    with pytest.raises(ValueError, match="between 0 and 1"):
        ConstantImage(value=value)
