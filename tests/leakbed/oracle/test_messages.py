"""What candidates would send: densities on lines and points, and laws that are not of one kind."""

import pytest
import torch

from leakbed.contracts.noise_laws import Axial, Fixed, NoCeilingError, alike
from leakbed.oracle.ceiling import beliefs, ceiling
from leakbed.oracle.gathered import Gathered
from leakbed.oracle.messages import Messages


def test_noise_on_a_line_rules_out_what_is_off_it() -> None:
    axis = torch.eye(3).unsqueeze(1)
    laws = [
        Axial(
            mean={"cut-gradient": each},
            axis=each,
            along=torch.tensor([2.0]),
            across=torch.tensor([0.0]),
        )
        for each in axis
    ]
    assert ceiling(Messages.of(laws), draws=10, stream=5)[1].value == 1.0
    wide = [
        Axial(mean=law.mean, axis=law.axis, along=torch.tensor([90.0]), across=torch.tensor([90.0]))
        for law in laws
    ]
    assert ceiling(Messages.of(wide), draws=200, stream=5)[1].value == pytest.approx(
        1 / 3, abs=0.01
    )


def test_a_point_is_likelier_than_any_density_near_it() -> None:
    """One candidate's row has no noise, another's has some that is far narrower than 1."""
    narrow = [
        Axial(
            mean={"cut-gradient": torch.full((1, 3), value)},
            axis=torch.tensor([[1.0, 0.0, 0.0]]),
            along=torch.tensor([width]),
            across=torch.tensor([width]),
        )
        for value, width in ((1.0, 0.0), (1.0001, 1e-3))
    ]
    messages = Messages.of(narrow)
    assert beliefs(messages, torch.ones(1, 3))[0].tolist() == [1.0, 0.0]
    assert beliefs(messages, torch.full((1, 3), 1.001))[0].tolist() == [0.0, 1.0]


def test_laws_of_several_kinds_are_refused() -> None:
    one = alike({"w": torch.zeros(3)}, 1.0)
    with pytest.raises(NoCeilingError, match="2 kinds"):
        Messages.of([one, Fixed(mean={"w": torch.zeros(3)})])


def test_a_message_on_its_line_is_possible_however_far_the_noise_took_it() -> None:
    drawn = torch.randn(2, 32, 30, generator=torch.Generator().manual_seed(0))
    laws = [
        Axial(
            mean={"cut-gradient": 0.01 * rows},
            axis=(rows[0] / torch.linalg.vector_norm(rows[0])).expand(32, -1),
            along=torch.full((32,), 0.02),
            across=torch.zeros(32),
        )
        for rows in drawn
    ]
    messages, random = Messages.of(laws), torch.Generator().manual_seed(1)
    truths = torch.arange(2).repeat(20)
    believed = beliefs(messages, messages.drawn(truths, random))
    assert torch.equal(believed.argmax(1), truths)


def test_what_all_candidates_share_hides_no_difference() -> None:
    """Updates of small steps: a reader of the differences names each, though weights are large."""
    random = torch.Generator().manual_seed(0)
    weights = torch.randn(5000, generator=random)
    moves = 3e-7 * torch.randn(8, 5000, generator=random)
    moves[7] = moves[6]
    messages = Messages.of([Fixed(mean={"w": weights + move}) for move in moves])
    assert (messages.means - messages.means[3]).square().sum(1).argmin() == 3
    found = ceiling(messages, stream=5)[1]
    assert found.value == pytest.approx(7 / 8, abs=1e-3)
    assert found.records[:6].tolist() == [1] * 6
    assert beliefs(messages, messages.means[3:4])[0, 3] == pytest.approx(1.0)
    gathered = Gathered()
    for _ in range(2):
        gathered.add(messages, messages.means[0])
    together, seen = gathered.together()
    assert ceiling(together, stream=5)[1].value == pytest.approx(7 / 8, abs=1e-3)
    assert beliefs(together, seen, clear=torch.zeros(1, 0))[0, 0] == pytest.approx(1.0)


def test_any_bit_tells_messages_without_noise_apart() -> None:
    random = torch.Generator().manual_seed(0)
    weights = 0.1 * torch.randn(5000, generator=random)
    biases = -1e-10 * torch.randn(8, 10, generator=random)  # that began at zero, after a small step
    small = Messages.of([Fixed(mean={"w": weights, "b": bias}) for bias in biases])
    near = weights + 1e-5 * torch.randn(3, 5000, generator=random)
    far = 1e3 * torch.randn(5, 5000, generator=random)
    uneven = Messages.of([Fixed(mean={"w": each}) for each in (*near, *far)])
    for messages in (small, uneven):
        gathered = Gathered()
        gathered.add(messages, messages.means[0])
        assert ceiling(messages, stream=5)[1].value == 1.0
        assert ceiling(gathered.together()[0], stream=5)[1].value == 1.0


def test_candidates_that_send_the_same_are_not_told_apart() -> None:
    gathered = Gathered()
    gathered.add(Messages.of([Fixed(mean={"w": torch.ones(3)})] * 4), torch.ones(3))
    together, seen = gathered.together()
    assert ceiling(together, stream=5)[1].value == pytest.approx(1 / 4)
    assert beliefs(together, seen, clear=torch.zeros(1, 0)).tolist() == [[0.25] * 4]
