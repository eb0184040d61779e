"""The majority label: counted from public labels only."""

import pytest
import torch

from attacks.baselines import MajorityLabel
from leakbed.contracts import Attack, Knowledge, MissingKnowledgeError, Seat, View


def view(public: list[int] | None) -> View:
    return View(
        seat=Seat.SERVER,
        image_shape=(1, 4, 4),
        num_classes=10,
        targets=3,
        rows=2,
        public_labels=None if public is None else torch.tensor(public, dtype=torch.int64),
    )


def test_every_guess_is_the_most_frequent_public_label() -> None:
    guess = MajorityLabel().run(view([7, 3, 7, 3, 1, 7]), seed=0)
    assert guess.labels.tolist() == [[7, 7]] * 3
    assert guess.images is None
    assert MajorityLabel().run(view([9, 4]), seed=0).labels[0, 0] == 4  # ties: the smallest
    assert MajorityLabel().threat.needs == {Knowledge.PUBLIC_LABELS}
    assert isinstance(MajorityLabel(), Attack)


def test_without_counting_it_needs_nothing() -> None:
    blind = MajorityLabel(public=False)
    assert not blind.threat.needs
    assert blind.run(view(None), seed=0).labels.tolist() == [[0, 0]] * 3


@pytest.mark.parametrize("public", [None, []])
def test_without_public_labels_it_says_so(public: list[int] | None) -> None:
    with pytest.raises(MissingKnowledgeError, match="public = false"):
        MajorityLabel().run(view(public), seed=0)
