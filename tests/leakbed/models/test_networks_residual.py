import pytest
import torch
from torch import Tensor, nn

from leakbed.models.networks import BasicBlock, ResidualBlock, glorot


def maps() -> Tensor:
    return torch.randn(2, 3, 7, 8, generator=torch.Generator().manual_seed(0))


def test_a_block_adds_two_convolutions_to_what_it_reads() -> None:
    block, read = ResidualBlock(3, 3), maps()
    relu = nn.functional.relu
    expected = read + block.second(relu(block.first(relu(read))))
    assert torch.equal(block(read), expected)


@pytest.mark.parametrize(("outputs", "stride", "sides"), [(5, 1, (7, 8)), (3, 2, (4, 4))])
def test_a_block_of_another_shape_adds_to_a_convolution(
    outputs: int, stride: int, sides: tuple[int, int]
) -> None:
    block = ResidualBlock(3, outputs, stride=stride)
    assert block(maps()).shape == (2, outputs, *sides)
    assert isinstance(block.shortcut, nn.Conv2d)
    assert block.shortcut.kernel_size == (3, 3)
    nn.init.zeros_(block.second.weight)
    nn.init.zeros_(block.second.bias)  # type: ignore[arg-type]
    assert torch.equal(block(maps()), block.shortcut(maps()))


def test_the_activation_is_replaced_everywhere() -> None:
    block = ResidualBlock(3, 3, activation=nn.Identity)
    expected = maps() + block.second(block.first(maps()))
    assert torch.equal(block(maps()), expected)


@pytest.mark.parametrize(("outputs", "stride", "sides"), [(3, 1, (7, 8)), (5, 2, (4, 4))])
def test_a_basic_block_is_convolutions_with_batchnorm_and_an_activation_of_the_sum(
    outputs: int, stride: int, sides: tuple[int, int]
) -> None:
    block, read = BasicBlock(3, outputs, stride=stride).eval(), maps()
    first, norm, _, second, last = block.inner
    inner = last(second(norm(first(read)).relu()))
    plain = outputs == 3
    short = read if plain else block.shortcut(read)
    assert isinstance(block.shortcut, nn.Identity) == plain
    made = block(read)
    assert made.shape == (2, outputs, *sides)
    assert torch.equal(made, (inner + short).relu())


def test_glorot_draws_every_weight_and_zeroes_every_bias() -> None:
    block = ResidualBlock(3, 5)
    glorot(block)
    bound = (6 / (9 * (3 + 5))) ** 0.5  # Glorot and Bengio 2010, equation 16
    assert 0.8 * bound < float(block.first.weight.detach().abs().max()) <= bound
    assert not any(name.endswith("bias") and p.any() for name, p in block.named_parameters())
