"""Every intruder of the catalogue keeps the contract. A new one needs nothing here but its name."""

from dataclasses import FrozenInstanceError, fields

import pytest
import torch

from attacks import ADVERSARIES, ATTACKS, INTRUDERS
from leakbed.contracts import Seat
from leakbed.contracts.attack import MaliciousClient, MaliciousClientState
from tests.support.intruder_views import CYCLE, ROWS, SHAPE, gradient, played, quick, view

NAMES = sorted(INTRUDERS)


@pytest.mark.parametrize("name", NAMES)
def test_the_same_seed_gives_the_same_bits_whoever_looks(name: str) -> None:
    (first, state), (again, after) = played(name), played(name, looking=True)
    assert len(first) > 1
    assert all(torch.equal(a, b) for a, b in zip(first, again, strict=True))
    assert state.turns == after.turns == CYCLE
    assert state.tensors.keys() == after.tensors.keys()
    assert all(torch.equal(state.tensors[key], after.tensors[key]) for key in state.tensors)


@pytest.mark.parametrize("name", NAMES)
def test_states_and_gradients_are_never_written(name: str) -> None:
    intruder, process = quick(name), torch.get_rng_state()
    state = intruder.begin(view(), seed=3)
    for step in range(CYCLE):
        kept = {key: value.clone() for key, value in state.tensors.items()}
        turn, back = intruder.turn(view(), state, rows=ROWS), gradient(step)
        after = intruder.learn(state, turn, back)
        assert all(torch.equal(state.tensors[key], value) for key, value in kept.items())
        assert torch.equal(back, gradient(step))
        state = after
    assert torch.equal(torch.get_rng_state(), process)


@pytest.mark.parametrize("name", NAMES)
def test_a_state_is_its_numbers_and_goes_on_after_a_journey(name: str) -> None:
    intruder = quick(name)
    _, state = played(name)
    travelled = MaliciousClientState(
        stream=int(str(state.stream)),
        turns=state.turns,
        tensors={key: torch.from_numpy(v.numpy().copy()) for key, v in state.tensors.items()},
    )
    turns = [intruder.turn(view(), each, rows=ROWS) for each in (state, travelled)]
    assert all(turn.images is not None for turn in turns)
    assert torch.equal(*[turn.images for turn in turns])  # type: ignore[arg-type]  none is None


@pytest.mark.parametrize("name", NAMES)
def test_a_turn_is_a_batch_of_labels_the_network_has(name: str) -> None:
    intruder = quick(name)
    state = intruder.begin(view(), seed=3)
    for step in range(CYCLE):
        turn = intruder.turn(view(), state, rows=ROWS)
        assert (turn.images is None) == (turn.labels is None)
        if turn.images is not None and turn.labels is not None:
            assert turn.images.shape == (ROWS, *SHAPE)
            assert turn.labels.shape == (ROWS,)
            assert 0 <= int(turn.labels.min()) <= int(turn.labels.max()) < view().outputs
        assert 0 < turn.scale <= 1
        assert intruder.scales or turn.scale == 1
        state = intruder.learn(state, turn, gradient(step))
    assert intruder.samples(view(), state, count=7).shape == (7, *SHAPE)


@pytest.mark.parametrize("name", NAMES)
def test_names_its_source_and_holds_settings_only(name: str) -> None:
    intruder = quick(name)
    assert isinstance(intruder, MaliciousClient)
    assert INTRUDERS[name].name == intruder.name == name
    assert "https://" in intruder.source
    assert intruder.threat.active
    assert intruder.threat.seat == Seat.CLIENT
    for field in fields(intruder):  # type: ignore[arg-type]  a frozen dataclass by contract
        with pytest.raises(FrozenInstanceError):
            setattr(intruder, field.name, None)


def test_no_name_is_in_two_catalogues() -> None:
    names = [*ATTACKS, *ADVERSARIES, *INTRUDERS]
    assert len(set(names)) == len(names)
