"""Merges make one of several, and cuts they do not fit are refused with those they do."""

import pytest
import torch

from leakbed.models import Architecture, IllegalCutError
from strategies.vertical_split import MERGES, party_architectures


def network(name: str, cut: int) -> Architecture:
    return Architecture(name=name, image_shape=(1, 28, 28), num_classes=10, cut=cut)


@pytest.mark.parametrize("merge", MERGES)
def test_one_part_merges_to_itself(merge: str) -> None:
    part = torch.rand(3, 2, 4, 5)
    assert torch.equal(MERGES[merge]([part]), part)


def test_maps_lie_side_by_side_and_vectors_end_to_end() -> None:
    left, right = torch.rand(3, 2, 4, 5), torch.rand(3, 2, 4, 6)
    joined = MERGES["concat"]([left, right])
    assert torch.equal(joined[..., :5], left)
    assert torch.equal(joined[..., 5:], right)
    assert MERGES["concat"]([torch.rand(3, 7), torch.rand(3, 2)]).shape == (3, 9)
    three = list(torch.rand(3, 5, 7))
    assert torch.allclose(MERGES["sum"](three), three[0] + three[1] + three[2])
    with pytest.raises(RuntimeError, match="equal size"):
        MERGES["sum"]([torch.rand(3, 7), torch.rand(3, 1)])


@pytest.mark.parametrize("name", ["mlp2", "lenet-sigmoid", "mnistnet"])
@pytest.mark.parametrize("merge", MERGES)
def test_one_party_has_the_uncut_network(name: str, merge: str) -> None:
    whole = network(name, 1)
    assert party_architectures(whole, nodes=1, merge=merge) == (whole,)


def test_strips_are_as_even_as_can_be_and_fit() -> None:
    parties = party_architectures(network("mlp2", 1), nodes=3, merge="sum")
    assert [party.image_shape for party in parties] == [(1, 28, 10), (1, 28, 9), (1, 28, 9)]
    joined = party_architectures(network("lenet-sigmoid", 1), nodes=2, merge="concat")
    assert [party.smashed_shape for party in joined] == [(12, 14, 7), (12, 14, 7)]


@pytest.mark.parametrize(
    ("name", "cut", "nodes", "merge", "why"),
    [
        ("mlp2", 1, 2, "concat", "makes 64 of them, but the top reads 32; .* cut 1 with 'sum'"),
        ("lenet-sigmoid", 3, 2, "concat", "7 x 8 of them, .* 12 x 7 x 7; .* cut 1 with 'concat'"),
        ("lenet-sigmoid", 1, 2, "sum", "12 x 14 x 7 and 12 x 14 x 7; .* cut 0 with 'concat'"),
        ("lenet-sigmoid", 1, 3, "concat", "no other cut or merge of it fits"),
        ("lenet-sigmoid", 1, 11, "sum", "makes nothing of them"),
        ("mnistnet", 2, 2, "concat", "14 pixels wide, which 'mnistnet' cannot read .*fewer nodes"),
    ],
)
def test_a_cut_that_does_not_fit_is_refused_with_what_does(
    name: str, cut: int, nodes: int, merge: str, why: str
) -> None:
    with pytest.raises(IllegalCutError, match=why):
        party_architectures(network(name, cut), nodes=nodes, merge=merge)
