"""Planted faults of the noise are found, and sound noise is not called a fault."""

import pytest
import torch
from torch import Tensor

from defenses import DPCutGradient, LocalDP, SmashedNoise, WeightNoise
from experiments.results.cards import ABOVE
from leakbed.contracts import Defense, DefenseState, Protects
from leakbed.contracts.noise_laws import Clean, sent_law
from leakbed.oracle.ceiling import beliefs, ceiling
from leakbed.oracle.messages import Messages
from leakbed.oracle.noise_checks import Finding, above, check_hits, check_noise
from leakbed.seeds import derive


def noise(seed: int, messages: int = 12, entries: int = 1000) -> list[Tensor]:
    drawn = torch.randn(messages, entries, generator=torch.Generator().manual_seed(seed))
    return list(drawn)


def alarms(residuals: list[Tensor]) -> set[str]:
    return {each.check for each in check_noise(residuals) if not each.sound}


def test_a_hundred_sound_runs_raise_no_alarm() -> None:
    assert [seed for seed in range(100) if alarms(noise(seed))] == []


SOUND = [
    SmashedNoise(sigma=0.5, clip=1.0),
    DPCutGradient(epsilon=4.0, clip=1.0),
    LocalDP(epsilon=8.0, clip=1.0),
    WeightNoise(form="corrected", scale=0.3, clip=1.0),
]


def recorded(defense: Defense, seed: int, *, every: float = 1.0) -> list[Finding]:
    """What all checks find of three nodes that send five messages each, of 12 candidates."""
    (kind,) = defense.protects
    rows = torch.randn(12, 4, 25, generator=torch.Generator().manual_seed(seed)) / 10
    before = {"w": torch.zeros(4, 25)}
    residuals, hits, best = [], [], []
    for node in range(3):
        stream = derive(seed, f"defence/{node}")
        for message in range(5):
            state = DefenseState(stream=stream, messages=message)
            made = [
                sent_law([defense], Clean(kind=kind, arrays={"w": each}, before=before))
                if kind == Protects.UPDATE
                else sent_law([defense], Clean(kind=kind, arrays={kind: each}))
                for each in rows
            ]
            messages, true = Messages.of(made), (5 * node + message) % 12
            if kind == Protects.UPDATE:
                sent = defense.protect_update(state, before, {"w": rows[true]})[1]["w"]
            elif kind == Protects.SMASHED:
                sent = defense.protect_smashed(state, rows[true])[1]
            else:
                sent = defense.protect_cut_gradient(state, rows[true])[1]
            seen = sent.detach().flatten().unsqueeze(0)
            residuals.append(every * (seen[0] - messages.means[true]) / messages.scales[true, 0])
            found = beliefs(messages, seen)[0]
            hits.append(float(found.argmax() == true))
            best.append(ceiling(messages, stream=derive(seed, f"{node}/{message}"))[1].value)
    return [*check_noise(residuals), check_hits(hits, best)]


@pytest.mark.parametrize("defense", SOUND, ids=lambda each: each.name)
def test_a_hundred_sound_runs_of_a_mechanism_raise_no_alarm(defense: Defense) -> None:
    """25 of each mechanism, by its own hook and streams, with hits held against the ceiling."""
    flagged = [str(f) for seed in range(25) for f in recorded(defense, seed) if not f.sound]
    assert flagged == []
    assert any(not f.sound for f in recorded(defense, 0, every=1.2))


def test_noise_that_repeats_is_found_and_placed() -> None:
    residuals = noise(0)
    residuals[9] = residuals[3].clone()
    (found,) = [each for each in check_noise(residuals) if not each.sound]
    assert (found.check, found.where) == ("noise of two messages", (3, 9))
    assert found.z > 20
    assert "NOT what the law says" in str(found)


def test_one_stream_for_all_nodes_is_found_at_other_lengths_too() -> None:
    node, other = noise(0, messages=4), noise(1, messages=4, entries=700)
    assert alarms([*node, *(each.clone() for each in node), *other]) == {"noise of two messages"}


@pytest.mark.parametrize(("factor", "found"), [(1.05, True), (0.95, True), (1.0, False)])
def test_a_wrong_deviation_is_found(factor: float, found: bool) -> None:
    assert ("variance" in alarms([factor * each for each in noise(2)])) is found


def test_a_shift_and_another_shape_are_found() -> None:
    assert "mean" in alarms([each + 0.1 for each in noise(3)])
    uniform = torch.rand(12, 1000, generator=torch.Generator().manual_seed(4)) - 0.5
    assert alarms(list(uniform * 12**0.5)) == {"kurtosis"}


def test_one_message_alone_has_no_pair() -> None:
    assert {each.check for each in check_noise(noise(0, messages=1))} == {
        "mean",
        "variance",
        "kurtosis",
    }


def test_hits_are_held_against_the_ceiling_on_both_sides() -> None:
    assert check_hits([1.0] * 45 + [0.0] * 5, [0.9] * 50).sound
    assert not check_hits([1.0] * 50, [0.3] * 50).sound
    assert not check_hits([0.0] * 50, [0.9] * 50).sound
    assert check_hits([1.0] * 5, [1.0] * 5).z == 0


def test_a_card_is_above_its_ceiling_only_beyond_chance() -> None:
    assert above(8, 64, ceiling=0.1, error=0.0) > ABOVE
    assert above(20, 64, ceiling=0.1, error=0.0) < ABOVE
    assert above(20, 64, ceiling=0.1, error=0.06) > ABOVE
    assert above(0, 64, ceiling=0.0, error=0.0) == 1.0
    assert Finding(check="mean", z=-9.0, limit=5.0).sound is False
