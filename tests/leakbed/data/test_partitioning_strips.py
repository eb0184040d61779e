"""Strips tile every image from left to right, the wider ones first."""

import pytest
import torch

from leakbed.data.partitioning import StripError, columns, strip, strip_architecture
from leakbed.models import Architecture


@pytest.mark.parametrize(("width", "parties"), [(28, 1), (28, 2), (28, 3), (7, 7), (6, 4)])
def test_strips_put_side_by_side_are_the_image(width: int, parties: int) -> None:
    images = torch.rand(3, 2, 4, width)
    parts = [strip(images, party=party, parties=parties) for party in range(parties)]
    assert torch.equal(torch.cat(parts, dim=-1), images)
    widths = [part.shape[-1] for part in parts]
    assert max(widths) - min(widths) <= 1
    assert widths == sorted(widths, reverse=True)


@pytest.mark.parametrize(("party", "parties"), [(0, 7), (2, 2), (-1, 2), (0, 0)])
def test_a_party_without_a_column_is_refused(party: int, parties: int) -> None:
    with pytest.raises(StripError, match="images 6 pixels wide; use at most 6 nodes"):
        columns(6, party=party, parties=parties)


def test_a_partys_network_reads_its_strip() -> None:
    whole = Architecture(name="mlp2", image_shape=(3, 8, 5), num_classes=4, cut=1)
    held = [strip_architecture(whole, party=party, parties=2) for party in range(2)]
    assert [each.image_shape for each in held] == [(3, 8, 3), (3, 8, 2)]
    assert {(each.name, each.num_classes, each.cut) for each in held} == {("mlp2", 4, 1)}
    assert strip_architecture(whole, party=0, parties=1) == whole
