from typing import Any

import pytest
import torch
from torch import Tensor

from attacks.building_blocks.public_images import BatchSampler, public_images
from leakbed.contracts import MissingKnowledgeError, Seat, UnfitViewError, View


def images(count: int = 7) -> Tensor:
    return torch.arange(float(count)).reshape(count, 1, 1, 1).expand(count, 1, 2, 2) / 10


def view(**changes: Any) -> View:
    known: dict[str, Any] = {
        "seat": Seat.SERVER,
        "image_shape": (1, 2, 2),
        "num_classes": 3,
        "targets": 0,
        "rows": 3,
        "public_images": images(),
        "public_labels": torch.arange(7) % 3,
        "device": torch.device("cpu"),
    }
    return View(**known | changes)


def test_every_image_comes_once_before_any_comes_again() -> None:
    draws = BatchSampler(images(), stream=1)
    passes = [[draws.batch(3) for _ in range(2)] for _ in range(3)]
    found = [sorted(((b[:, 0, 0, 0] + 1) * 5).round().int().tolist()) for p in passes for b in p]
    for one, two in zip(found[::2], found[1::2], strict=True):
        assert len({*one, *two}) == 6  # the seventh is left out
    assert len({tuple(each) for each in found}) > 2


def test_batches_lie_between_minus_one_and_one_and_are_copies() -> None:
    owned = images()
    draws = BatchSampler(owned, stream=1)
    batch = draws.batch(7)
    assert torch.allclose(batch.sort(0).values, 2 * owned - 1)
    batch.zero_()
    assert torch.equal(draws.images, images())


def test_the_stream_fixes_the_order() -> None:
    first, again, other = (BatchSampler(images(), stream=stream).batch(5) for stream in (1, 1, 2))
    assert torch.equal(first, again)
    assert not torch.equal(first, other)


def test_a_larger_batch_than_the_set_is_refused_at_any_time() -> None:
    with pytest.raises(UnfitViewError, match=r"7 public images .* has 8"):
        BatchSampler(images(), stream=1).batch(8)


def test_a_class_can_be_left_out() -> None:
    owned, labels = public_images(view(), without_class=0)
    assert labels is not None
    assert labels.tolist() == [1, 2, 1, 2]
    assert torch.equal(owned, images()[[1, 2, 4, 5]])
    whole, _ = public_images(view())
    assert torch.equal(whole, images())


@pytest.mark.parametrize(
    ("changes", "without", "error", "message"),
    [
        ({"public_images": None}, -1, MissingKnowledgeError, "public share"),
        ({"public_labels": None}, 0, MissingKnowledgeError, "without_class = 0"),
        ({"rows": 8}, -1, UnfitViewError, r"7 public images .* has 8"),
        ({"rows": 5}, 0, UnfitViewError, r"4 public images .* has 5"),
        ({"image_shape": (3, 2, 2)}, -1, UnfitViewError, r"\(1, 2, 2\), the client's \(3, 2, 2\)"),
        ({"public_images": images() * 255}, -1, UnfitViewError, r"0 and 153; scale"),
        ({"public_images": images() - 1}, -1, UnfitViewError, r"-1 and -0.4; scale"),
        ({"public_images": images() * torch.nan}, -1, UnfitViewError, "nan"),
    ],
)
def test_what_cannot_be_used_is_refused(
    changes: dict[str, Any], without: int, error: type[Exception], message: str
) -> None:
    with pytest.raises(error, match=message):
        public_images(view(**changes), without_class=without)


def test_places_are_those_of_the_batches() -> None:
    owned = images()
    batches, places = BatchSampler(owned, stream=1), BatchSampler(owned, stream=1)
    for _ in range(5):
        chosen = places.places(3)
        assert torch.equal(batches.batch(3), owned[chosen].mul(2).sub(1))
