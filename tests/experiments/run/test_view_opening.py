"""What an adversary is granted before the first message."""

from dataclasses import replace

import numpy as np
import pytest
import torch

from experiments.run.server_part import layers
from experiments.run.targets import MisfitError
from experiments.run.view import initial_view
from leakbed.contracts import Evidence, Knowledge, Seat, ThreatModel, View
from leakbed.contracts.attributes import UnfitAttributeError
from leakbed.events import Arrays
from tests.support.tiny import architecture

THREAT = ThreatModel(
    seat=Seat.SERVER,
    evidence=frozenset({Evidence.SMASHED}),
    needs=frozenset({Knowledge.PUBLIC_IMAGES, Knowledge.ARCHITECTURE}),
    active=True,
)
OWNED: Arrays = {
    "images": np.ones((3, 1, 6, 6), dtype=np.float32),
    "labels": np.arange(3, dtype=np.int64),
}


def opened(*needs: Knowledge, public: Arrays | None = OWNED, infers: str | None = None) -> View:
    return initial_view(
        replace(THREAT, needs=frozenset(needs), infers=infers),
        architecture(),
        rows=8,
        public=public,
        device=torch.device("cpu"),
        classes=("4", "5", "6"),
    )


def test_it_has_shapes_and_no_evidence() -> None:
    view = opened()
    assert (view.targets, view.rows, view.smashed_shape) == (0, 8, architecture().smashed_shape)
    assert (view.image_shape, view.num_classes) == ((1, 6, 6), 3)
    granted = ("smashed", "cut_gradient", "labels", "before", "after", "architecture")
    assert all(getattr(view, name) is None for name in (*granted, "public_images"))


def test_what_the_threat_model_names_is_granted() -> None:
    view = opened(Knowledge.PUBLIC_IMAGES, Knowledge.PUBLIC_LABELS, Knowledge.ARCHITECTURE)
    assert view.architecture == architecture()
    assert view.public_images is not None
    assert view.public_labels is not None
    assert view.public_images.shape == (3, 1, 6, 6)
    assert view.public_labels.tolist() == [0, 1, 2]


def test_images_and_their_labels_are_granted_apart() -> None:
    images, labels = opened(Knowledge.PUBLIC_IMAGES), opened(Knowledge.PUBLIC_LABELS)
    assert images.public_labels is None
    assert labels.public_images is None
    assert labels.public_labels is not None
    unlabelled = {"images": OWNED["images"]}
    assert opened(Knowledge.PUBLIC_IMAGES, public=unlabelled).public_images is not None
    for public in (unlabelled, None):
        with pytest.raises(MisfitError, match=r"labels of public images; set data\.public"):
            opened(Knowledge.PUBLIC_LABELS, public=public)


def test_the_servers_part_is_granted_to_a_server_that_names_it() -> None:
    part = layers(architecture())
    grant = {
        "rows": 8,
        "public": None,
        "device": torch.device("cpu"),
        "part": part,
    }
    named = replace(THREAT, needs=frozenset({Knowledge.SERVER_PART}))
    assert initial_view(named, architecture(), **grant).server_part is part
    unnamed = replace(THREAT, needs=frozenset())
    assert initial_view(unnamed, architecture(), **grant).server_part is None
    with pytest.raises(MisfitError, match="the server's alone: a client has none"):
        initial_view(replace(named, seat=Seat.CLIENT), architecture(), **grant)


def test_an_adversary_that_owns_nothing_is_told_what_to_set() -> None:
    with pytest.raises(MisfitError, match=r"set data\.public above 0"):
        opened(Knowledge.PUBLIC_IMAGES, public=None)
    assert opened(public=None).public_images is None


def test_an_attribute_is_granted_where_it_is_inferred_and_needed() -> None:
    both = (Knowledge.PUBLIC_IMAGES, Knowledge.PUBLIC_ATTRIBUTES)
    view = opened(*both, infers="parity")
    assert view.public_attributes is not None
    assert view.public_attributes.tolist() == [0, 1, 0]
    assert view.attribute_values == 2
    assert opened(Knowledge.PUBLIC_ATTRIBUTES, infers="label").attribute_values == 3
    for other in (opened(Knowledge.PUBLIC_IMAGES, infers="parity"), opened(*both)):
        assert other.public_attributes is None
        assert other.attribute_values is None


def test_an_attribute_the_classes_do_not_tell_is_refused() -> None:
    with pytest.raises(UnfitAttributeError, match="use high-digit or label or parity"):
        opened(Knowledge.PUBLIC_ATTRIBUTES, infers="animal")
