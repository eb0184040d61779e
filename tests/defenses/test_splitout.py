from dataclasses import replace

import pytest
import torch
from torch import Tensor, nn

from defenses import SplitOut
from defenses.splitout import HONEST, WINDOW, outlier, simulated
from leakbed.contracts import DefenseState, IllegalCombinationError
from leakbed.contracts.defense import NO_ALARM, Holdings, ReturnedGradient, Run
from leakbed.seeds import derive
from tests.support import tiny
from tests.support.played import architecture, play, random_critic


def normal(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def literal_factor(honest: Tensor, point: Tensor) -> float:
    """Breunig et al. 2000 of a new point, all but one of the old ones being neighbours."""
    k, rows = len(honest) - 1, list(honest)

    def nearest(p: Tensor, others: list[Tensor]) -> list[tuple[float, int]]:
        found = [(float((p - q).norm()), i) for i, q in enumerate(others)]
        return sorted(found)[:k]

    def without(i: int) -> list[tuple[float, int]]:
        rest = [j for j in range(len(rows)) if j != i]
        return [(d, rest[at]) for d, at in nearest(rows[i], [rows[j] for j in rest])]

    reach = [without(i)[-1][0] for i in range(len(rows))]

    def density(neighbours: list[tuple[float, int]]) -> float:
        return len(neighbours) / sum(max(reach[j], d) for d, j in neighbours)

    mine = nearest(point, rows)
    return sum(density(without(j)) for _, j in mine) / len(mine) / density(mine)


def test_an_outlier_is_a_point_whose_local_factor_exceeds_one_and_a_half() -> None:
    honest, direction = normal(8, 4), normal(4, seed=9)
    factors = [literal_factor(honest, step / 8 * direction) for step in range(40)]
    found = [outlier(honest, step / 8 * direction) for step in range(40)]
    assert found == [factor > 1.5 for factor in factors]
    assert set(found) == {True, False}


def test_both_verdicts_occur() -> None:
    honest = normal(12, 4)
    assert not outlier(honest, honest.mean(0))
    assert outlier(honest, honest.mean(0) + 20)
    assert outlier(honest, torch.full((4,), torch.nan, dtype=torch.float64))


def holdings(batch_size: int = 8) -> Holdings:
    images, labels = tiny.images()
    plan = tiny.plan(momentum=0.9)
    return Holdings(
        images=images,
        labels=labels,
        architecture=tiny.architecture(),
        bottom=tiny.architecture().bottom(77).state_dict(),
        batch_size=batch_size,
        optimiser=plan.optimiser,
    )


def test_the_simulation_is_honest_training_from_the_bottom_received_and_a_top_of_its_own() -> None:
    first = simulated(holdings(60), stream=4, share=1.0, epochs=2)
    assert first.shape == (2, 36)  # one batch of all rows, twice; 4 x 1 x 3 x 3 weights
    images, labels = tiny.images()
    network = tiny.architecture().build(derive(4, "network"))
    bottom = tiny.architecture().bottom(77).state_dict()
    network.load_state_dict({**network.state_dict(), **bottom})
    optimiser = tiny.plan(momentum=0.9).optimiser(network.parameters())
    for step in range(2):
        optimiser.zero_grad()
        nn.functional.cross_entropy(network(images), labels).backward()
        expected = next(network.parameters()).grad
        assert expected is not None
        torch.testing.assert_close(first[step], expected.flatten())
        optimiser.step()


def test_the_simulation_takes_its_share_of_the_rows_and_repeats() -> None:
    assert len(simulated(holdings(), stream=4, share=0.5, epochs=3)) == 3 * 4  # 30 rows by 8
    one, two, other = (simulated(holdings(), stream=s, share=0.5, epochs=1) for s in (4, 4, 5))
    assert torch.equal(one, two)
    assert not torch.equal(one, other)


def seen(gradient: Tensor) -> ReturnedGradient:
    return ReturnedGradient(
        cut_gradient=torch.zeros(1, 1), labels=torch.tensor([0]), first_gradient=gradient
    )


def voted(votes: list[bool], window: int) -> DefenseState:
    defense, honest = SplitOut(window=window), normal(12, 4)
    empty = torch.zeros(0, dtype=torch.bool)
    state = replace(defense.begin(1), tensors={HONEST: honest, WINDOW: empty})
    for vote in votes:
        state = defense.inspect(state, seen(honest.mean(0) + 50 * vote)).next()
    return state


@pytest.mark.parametrize(
    ("votes", "alarm"),
    [
        ([True] * 3, NO_ALARM),  # the window is not full
        ([True] * 4, 4),
        ([True, True, False, False], NO_ALARM),  # no majority
        ([False, False, True, True, True], 5),
        ([False] * 4 + [True] * 3 + [False] * 9, 7),
        ([True, False] * 8, NO_ALARM),
    ],
)
def test_the_alarm_is_a_majority_of_a_full_window(votes: list[bool], alarm: int) -> None:
    assert voted(votes, 4).alarm == alarm


def test_the_score_is_the_largest_share_of_outliers() -> None:
    assert voted([True, True, False, False, False, False, False], 4).score == 0.5
    assert voted([False] * 4, 4).score == 0


def test_fewer_gradients_than_the_window_are_refused_before_training() -> None:
    SplitOut(share=0.1).check(rows=6400, batch_size=64)
    with pytest.raises(IllegalCombinationError, match=r"simulates 9 .* window of 10 needs 10"):
        SplitOut(share=0.1).check(rows=5760, batch_size=64)
    SplitOut(share=0.1, epochs=2).check(rows=5760, batch_size=64)
    with pytest.raises(IllegalCombinationError, match=r"simulates 1 .* needs 2"):
        SplitOut(window=1).check(rows=8, batch_size=8)


def test_every_round_is_simulated_anew_and_the_window_goes_on() -> None:
    defense, held = SplitOut(window=2), holdings()
    state = defense.prepare(defense.begin(1), held)
    first = state.tensors[HONEST]
    for _ in range(3):
        state = defense.inspect(state, seen(first[0].reshape(4, 1, 3, 3))).next()
    trained = replace(held, bottom=tiny.architecture().bottom(78).state_dict())
    after = defense.prepare(state, trained)
    assert not torch.equal(after.tensors[HONEST], first)
    assert torch.equal(after.tensors[WINDOW], state.tensors[WINDOW])
    assert len(after.tensors[WINDOW]) == 2


def test_nodes_that_go_on_from_where_others_stopped_do_not_accuse_an_honest_server() -> None:
    """Simulated from fresh weights, later nodes saw outliers in half of a window or in all."""
    seed, nodes = 101, 2
    parts, scores = architecture(5).parts(derive(seed, "init")), []
    for node in range(nodes):
        turn = {"seed": seed + 1000 * node, "rows": 900, "batch_size": 32, "cut": 5}
        state = play(SplitOut(), parts=parts, steps=28, **turn)[-1]
        assert state.alarm == NO_ALARM
        scores.append(state.score)
    assert max(scores) < 0.25
    forge = random_critic(seed, 5)
    assert play(SplitOut(), parts=parts, steps=12, forge=forge, **turn)[-1].alarm == 10


def test_a_run_shorter_than_the_window_is_refused() -> None:
    run = Run(classes=10, rows=64, batch_size=8, steps=10, passes=2, top=nn.Identity())
    SplitOut().check_run(run)
    with pytest.raises(IllegalCombinationError, match=r"9 gradients in all.* window of 10"):
        SplitOut().check_run(replace(run, steps=9))


def test_honest_training_is_let_be_and_a_forger_is_caught_at_the_first_full_window() -> None:
    honest = play(SplitOut(), seed=0, steps=20, rows=2500)[-1]
    assert honest.alarm == NO_ALARM
    forged = play(SplitOut(), seed=0, steps=12, rows=2500, forge=random_critic(0))[-1]
    assert forged.alarm == 10


@pytest.mark.parametrize("wrong", [{"share": 0.0}, {"share": 1.1}, {"epochs": 0}, {"window": 0}])
def test_settings_out_of_range_are_refused(wrong: dict[str, float]) -> None:
    with pytest.raises(ValueError, match="splitout needs"):
        SplitOut(**wrong)  # type: ignore[arg-type]
