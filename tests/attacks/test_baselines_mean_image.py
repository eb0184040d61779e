"""The mean public image: the best constant guess, and only public images are read."""

import pytest
import torch

from attacks.baselines import MeanImage
from leakbed.contracts import Attack, Knowledge, MissingKnowledgeError, Seat, View
from leakbed.seeds import generator


def view(public: torch.Tensor | None) -> View:
    return View(
        seat=Seat.SERVER,
        image_shape=(2, 4, 4),
        num_classes=10,
        targets=3,
        rows=5,
        public_images=public,
    )


def test_every_guess_is_the_mean() -> None:
    public = torch.rand(7, 2, 4, 4, generator=generator(0))
    guess = MeanImage().run(view(public), seed=0)
    assert guess.images.shape == (3, 5, 2, 4, 4)
    torch.testing.assert_close(guess.images[2, 4], sum(public) / 7)
    guess.images[0, 0] = 9  # a copy of its own for every sample
    assert not (guess.images[1] == 9).any()
    assert (public <= 1).all()


@pytest.mark.parametrize("public", [None, torch.empty(0, 2, 4, 4)])
def test_without_public_images_it_says_so(public: torch.Tensor | None) -> None:
    assert isinstance(MeanImage(), Attack)
    assert MeanImage().threat.needs == {Knowledge.PUBLIC_IMAGES}
    with pytest.raises(MissingKnowledgeError, match="public share"):
        MeanImage().run(view(public), seed=0)
