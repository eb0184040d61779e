"""The hooks of a node's training: what they are given, where their state lives, what they do."""

import pickle
from collections.abc import Iterator
from dataclasses import replace
from typing import Any

import numpy as np
import pytest
import torch
from flwr.app import Message
from torch import Tensor, nn

from clients.training_defenses import TrainingDefenses
from leakbed.contracts import IllegalCombinationError
from leakbed.events import Arrays, Event, SmashedUp
from leakbed.grids import DeterministicGrid
from leakbed.seeds import derive, generator
from leakbed.tap.wiretap import Wiretap
from leakbed.wire.fields import ALARMS, STOPPED, alarms_of, stop_of
from leakbed.wire.messages import BACKWARD_STEP, SPLIT_STEP, BackwardReply, SplitReply, SplitRequest
from strategies.node_channel import NodeStopped
from strategies.node_session import NodeSession
from strategies.vanilla_split import VanillaSplit
from tests.support import guarded, intruded, tiny


@pytest.fixture(autouse=True)
def identity() -> Iterator[None]:
    with tiny.identity(), guarded.catalogued():
        yield


PLAN = tiny.plan(momentum=0.9)


def trained(
    *defenses: tuple[str, dict[str, Any]], resident: bool = True, nodes: int = 1, rounds: int = 2
) -> tuple[dict[str, Tensor], VanillaSplit]:
    inner = tiny.ready(nodes, resident=resident, plan=PLAN, model="stateful", defenses=defenses)
    grid = DeterministicGrid(inner, stream=0, roster=inner.roster)
    strategy = tiny.split_strategy("stateful", settings=PLAN)
    return tiny.train_split(grid, strategy, rounds=rounds), strategy


def test_a_defense_that_only_looks_changes_no_bit_and_nothing_on_the_wire() -> None:
    plain, honest = trained()
    watched, strategy = trained(("witness", {}))
    assert tiny.same(plain, watched)
    assert honest.alarms == {}
    assert list(strategy.alarms) == [0]


def test_hooks_are_called_with_the_batch_and_what_came_back_for_it() -> None:
    trained(("witness", {}), rounds=1)
    cell = tiny.cell(plan=PLAN, model="stateful")
    images, labels = cell.rows()
    batches = cell.batches(1, len(images))
    order = [name for name, _ in guarded.CALLS]
    assert order == ["prepare", *["labels", "train_step", "inspect"] * 3]
    (held,) = guarded.called("prepare")
    assert torch.equal(held.images, images)
    assert (held.batch_size, held.architecture) == (8, tiny.architecture("stateful"))
    inspected = guarded.called("inspect")
    for step, batch in enumerate(batches):
        shown, _ = guarded.called("train_step")[step]
        state, seen = inspected[step]
        assert torch.equal(shown, images[batch])
        assert torch.equal(guarded.called("labels")[step], labels[batch])
        assert torch.equal(seen.labels, labels[batch])
        assert len(seen.cut_gradient) == len(batch)
        assert state.messages == step


@pytest.mark.parametrize("resident", [True, False])
def test_every_round_begins_with_the_bottom_that_the_node_received(
    resident: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    opened: list[dict[str, Tensor]] = []
    original = NodeSession.open

    def noted(self: NodeSession, bottom: Arrays | None, *, sender: int | None = None) -> None:
        assert bottom is not None
        opened.append({name: torch.from_numpy(array.copy()) for name, array in bottom.items()})
        original(self, bottom, sender=sender)

    monkeypatch.setattr(NodeSession, "open", noted)
    trained(("witness", {}), nodes=2, resident=resident)
    held = [holdings.bottom for holdings in guarded.called("prepare")]
    assert len(held) == len(opened) == 4
    assert all(tiny.same(shown, sent_down) for shown, sent_down in zip(held, opened, strict=True))
    assert not tiny.same(held[0], held[1])


def test_the_first_gradient_is_what_the_cut_gradient_makes_of_the_first_weights() -> None:
    plan = tiny.plan(local_steps=1, learning_rate=0.25)
    grid = tiny.ready(plan=plan, defenses=(("witness", {"weight": 3.0}),))
    strategy = tiny.split_strategy(settings=plan)
    before = torch.from_numpy(strategy.bottom["0.weight"].copy())
    tiny.train_split(grid, strategy, rounds=1)
    ((_, seen),) = guarded.called("inspect")
    ((images, smashed),) = guarded.called("train_step")
    bottom = tiny.architecture().bottom(derive(tiny.SEED, "victim-init"))
    made = bottom(images)
    assert torch.equal(made.detach(), smashed)
    (task,) = torch.autograd.grad(made, [bottom[0].weight], seen.cut_gradient, retain_graph=True)
    (extra,) = torch.autograd.grad(3.0 * made.square().mean(), [bottom[0].weight])
    torch.testing.assert_close(seen.first_gradient, task)  # without the penalty
    after = torch.from_numpy(strategy.bottom["0.weight"])
    torch.testing.assert_close(after, before - 0.25 * (task + extra))


def test_a_penalty_trains_as_the_whole_objective_does() -> None:
    """Slow reading: the uncut network on task + penalty, with one optimiser for each part."""
    plan = tiny.plan(momentum=0.9)
    grid = tiny.ready(plan=plan, defenses=(("witness", {"weight": 2.0}),))
    found = tiny.train_split(grid, tiny.split_strategy(settings=plan), rounds=1)
    network = tiny.architecture().build(derive(tiny.SEED, "victim-init"))
    optimiser = plan.optimiser(network.parameters())
    images, labels = tiny.cell().rows()
    for batch in tiny.cell(plan=plan).batches(1, len(images)):
        optimiser.zero_grad()
        smashed = network[:2](images[batch])
        task = nn.functional.cross_entropy(network[2:](smashed), labels[batch])
        (task + 2.0 * smashed.square().mean()).backward()
        optimiser.step()
    for name, value in network.state_dict().items():
        torch.testing.assert_close(found[name], value, rtol=1e-5, atol=1e-6)


def test_adversarial_training_is_a_slow_literal_reading() -> None:
    """The uncut network on perturbed rows, whose gradient then moves their perturbations."""
    plan, budget = tiny.plan(), 0.3
    settings = {"budget": budget, "stride": 0.25}
    grid = tiny.ready(plan=plan, defenses=(("adversarial-training", settings),))
    found = tiny.train_split(grid, tiny.split_strategy(settings=plan), rounds=2)
    cell = tiny.cell(plan=plan)
    network = tiny.architecture().build(derive(tiny.SEED, "victim-init"))
    optimiser = plan.optimiser(network.parameters())
    images, labels = cell.rows()
    drawn = generator(derive(derive(cell.defense_stream, "training/0"), "message/0"))
    moved = torch.empty(images.shape).uniform_(-budget, budget, generator=drawn)
    first = moved.clone()
    for round_ in (1, 2):
        for batch in cell.batches(round_, len(images)):
            shown = (images[batch] + moved[batch]).clamp(0, 1).requires_grad_()
            optimiser.zero_grad()
            nn.functional.cross_entropy(network(shown), labels[batch]).backward()
            optimiser.step()
            assert shown.grad is not None
            stepped = moved[batch] + 0.25 * budget * shown.grad.sign()
            moved[batch] = stepped.clamp(-budget, budget)
    assert not torch.equal(moved, first)
    for name, value in network.state_dict().items():
        torch.testing.assert_close(found[name], value, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("probed", [True, False])
def test_perturbations_do_not_follow_the_answer_to_a_probe(
    probed: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Where every label was made up, a row is altered in the second round as in the first."""
    shown: dict[int, list[Tensor]] = {}
    original = TrainingDefenses.altered

    def noted(self: TrainingDefenses, images: Tensor, rows: Tensor) -> Tensor:
        made = original(self, images, rows)
        for row, image in zip(rows.tolist(), made.detach(), strict=True):
            shown.setdefault(row, []).append(image)
        return made

    monkeypatch.setattr(TrainingDefenses, "altered", noted)
    probes = tuple(range(20)) if probed else ()
    hooks = (("adversarial-training", {}), ("witness", {"probes": probes}))
    grid = tiny.ready(plan=tiny.plan(), defenses=hooks)
    tiny.train_split(grid, tiny.split_strategy(settings=tiny.plan()), rounds=2)
    images, _ = tiny.cell().rows()
    again = {row: altered for row, altered in shown.items() if len(altered) > 1}
    assert len(again) > 10
    for row, (first, *later) in again.items():
        assert not torch.equal(first, images[row])
        assert all(torch.equal(first, each) for each in later) == probed


@pytest.mark.parametrize("nodes", [1, 2])
def test_state_survives_a_change_of_process(nodes: int) -> None:
    hooks = ("witness", {"weight": 0.5, "probes": (1, 4), "alarm": 5})
    kept, one = trained(hooks, nodes=nodes)
    forgotten, two = trained(hooks, nodes=nodes, resident=False)
    assert tiny.same(kept, forgotten)
    assert one.alarms == two.alarms
    assert [found["witness"][0] for found in one.alarms.values()] == [5] * nodes


def test_a_node_learns_nothing_from_a_probe_but_the_server_does() -> None:
    plan = tiny.plan(local_steps=1, momentum=0.9)
    grid = tiny.ready(plan=plan, defenses=(("witness", {"probes": (0,), "weight": 1.0}),))
    strategy = tiny.split_strategy(settings=plan)
    before = {name: value.copy() for name, value in strategy.bottom.items()}
    top = {name: value.clone() for name, value in strategy.part.module.state_dict().items()}
    tiny.train_split(grid, strategy, rounds=1)
    assert all((strategy.bottom[name] == value).all() for name, value in before.items())
    assert not tiny.same(top, strategy.part.module.state_dict())
    tiny.train_split(grid, strategy, rounds=1)
    assert not (strategy.bottom["0.weight"] == before["0.weight"]).all()


def test_a_probe_s_labels_reach_the_server_wrong() -> None:
    seen: list[Any] = []
    plan = tiny.plan(local_steps=2)
    grid = tiny.ready(plan=plan, defenses=(("witness", {"probes": (1,)}),))
    strategy = tiny.split_strategy(settings=plan)
    train = strategy.part.train

    def noted(smashed: Tensor, labels: Tensor, *origin: Any) -> Tensor:
        seen.append(labels)
        return train(smashed, labels, *origin)

    strategy.part.train = noted  # type: ignore[method-assign]
    tiny.train_split(grid, strategy, rounds=1)
    _, labels = tiny.cell().rows()
    batches = tiny.cell(plan=plan).batches(1, len(labels))
    assert torch.equal(seen[0], labels[batches[0]])
    assert torch.equal(seen[1], (labels[batches[1]] + 1) % tiny.CLASSES)


@pytest.mark.parametrize("resident", [True, False])
def test_a_detector_told_to_stop_ends_the_run_and_says_who_and_when(resident: bool) -> None:
    hooks = ("witness", {"alarm": 5, "stop": True})
    with pytest.raises(NodeStopped, match=r"node 0 .* witness takes the server") as caught:
        trained(hooks, resident=resident)
    stop = caught.value
    assert (stop.node, stop.by) == (0, "witness")
    assert stop.alarms["witness"][::3] == (5, 5)  # its alarm, and the gradients it has seen
    assert pickle.loads(pickle.dumps(stop)).alarms == stop.alarms  # noqa: S301  our own bytes


@pytest.mark.parametrize("resident", [True, False])
@pytest.mark.parametrize("kind", [SPLIT_STEP, BACKWARD_STEP])
def test_a_node_that_stopped_says_so_ever_after_and_learns_no_more(
    resident: bool, kind: str
) -> None:
    grid = tiny.ready(
        plan=PLAN, resident=resident, defenses=(("witness", {"alarm": 1, "stop": True}),)
    )
    bottom = tiny.split_strategy(settings=PLAN).bottom
    opening = SplitRequest(round=1, step=0, bottom=bottom)
    smashed = SplitReply.of(sent(grid, opening, SPLIT_STEP)).smashed
    assert smashed is not None
    step = 1 if kind == SPLIT_STEP else 0
    back = SplitRequest(round=1, step=step, gradient=np.full_like(smashed, 0.1))
    for request, asked in ((back, kind), (SplitRequest(round=2, step=0), SPLIT_STEP)):
        answer = sent(grid, request, asked)
        assert stop_of(answer) == "witness"
        assert set(answer.content) == {ALARMS, STOPPED}
        assert alarms_of(answer)["witness"].gradients == 1  # type: ignore[index]
    with pytest.raises(NodeStopped):
        tiny.train_split(grid, tiny.split_strategy(settings=PLAN), rounds=1)


def test_a_stop_at_the_closing_message_is_one_of_its_partition() -> None:
    hooks = (("witness", {"alarm": 3, "stop": True}),)  # a round has three batches
    inner = tiny.ready(2, plan=PLAN, model="stateful", defenses=hooks)
    grid = DeterministicGrid(inner, stream=0, roster=inner.roster)
    strategy = tiny.split_strategy("stateful", settings=PLAN)
    with pytest.raises(NodeStopped, match="node 0 ") as caught:
        tiny.train_split(grid, strategy, rounds=1)
    assert caught.value.alarms["witness"].gradients == 3
    assert strategy.alarms == {}


def test_an_alarm_without_stop_is_reported_and_training_goes_on() -> None:
    plain, _ = trained()
    alarmed, strategy = trained(("witness", {"alarm": 2}))
    assert tiny.same(plain, alarmed)
    step, score, last, gradients = strategy.alarms[0]["witness"]
    assert (step, gradients) == (2, 6)
    first = [seen.first_gradient.double().sum() for _, seen in guarded.called("inspect")]
    sums = torch.stack(first).cumsum(0).tolist()
    assert (score, last) == (pytest.approx(max(sums)), pytest.approx(sums[-1]))


@pytest.mark.parametrize("name", ["splitguard", "splitout", "gradients-scrutinizer"])
def test_a_detector_refuses_a_node_that_has_no_labels(name: str) -> None:
    cell = tiny.cell(plan=tiny.plan(labels="server"), defenses=((name, {}),))
    with pytest.raises(IllegalCombinationError, match=f"{name} cannot work with .* = 'server'"):
        TrainingDefenses.of(cell)


def test_fake_labels_are_of_the_data_s_classes_where_the_network_has_outputs_to_spare() -> None:
    """A label that no sample has tells the server which batches are fake."""
    spare = replace(intruded.network(), upper_cut=None)
    assert spare.num_classes > tiny.CLASSES
    hooks = (("splitguard", {"warm_up": 0, "probability": 0.99}),)
    grid = tiny.ready(plan=PLAN, architecture=spare, defenses=hooks)
    weights = spare.bottom(0).state_dict()
    bottom = {name: value.numpy() for name, value in weights.items()}
    sent_labels = []
    for round_ in range(1, 9):
        opening = SplitRequest(round=round_, step=0, bottom=bottom)
        reply = SplitReply.of(sent(grid, opening, SPLIT_STEP))
        assert reply.labels is not None
        sent_labels += reply.labels.tolist()
    assert set(sent_labels) == set(range(tiny.CLASSES))


def test_a_cell_without_hooks_has_no_guard() -> None:
    assert TrainingDefenses.of(tiny.cell()) is None
    assert TrainingDefenses.of(tiny.cell(defenses=(("smashed-noise", {}),))) is None


@pytest.mark.parametrize("resident", [True, False])
def test_a_backward_pass_alone_calls_the_hooks_too(resident: bool) -> None:
    def gradients(**settings: Any) -> Any:
        hooks = (("witness", settings),)
        grid = tiny.ready(plan=tiny.plan(), resident=resident, defenses=hooks)
        bottom = tiny.split_strategy(settings=tiny.plan()).bottom
        opening = SplitRequest(round=1, step=0, bottom=bottom)
        reply = SplitReply.of(sent(grid, opening, SPLIT_STEP))
        assert reply.smashed is not None
        back = SplitRequest(round=1, step=0, gradient=np.full_like(reply.smashed, 0.1))
        return BackwardReply.of(sent(grid, back, BACKWARD_STEP)).gradient["0.weight"]

    plain, penalised, probed = gradients(), gradients(weight=1.0), gradients(probes=(0,))
    assert np.abs(plain).min() > 0
    assert not np.allclose(plain, penalised)
    assert (probed == 0).all()


def sent(grid: Any, request: SplitRequest, kind: str) -> Message:
    message = Message(request.records(), dst_node_id=1, message_type=kind)
    (reply,) = grid.send_and_receive([message])
    assert not reply.has_error(), reply.error
    answer: Message = reply
    return answer


@pytest.mark.parametrize(
    ("name", "settings"),
    [
        ("adversarial-training", {"budget": 0.1}),
        ("nopeek", {"alpha": 0.1}),
        ("splitguard", {"warm_up": 0, "probability": 0.5, "fakes": 1}),
        ("splitout", {"window": 2}),
        ("gradients-scrutinizer", {"every": 4}),
    ],
)
def test_published_defenses_do_the_same_in_one_process_and_in_many(
    name: str, settings: dict[str, Any]
) -> None:
    kept, one = trained((name, settings), rounds=3)
    forgotten, two = trained((name, settings), rounds=3, resident=False)
    assert tiny.same(kept, forgotten)
    assert repr(one.alarms) == repr(two.alarms)  # a score that is not there yet is not a number
    assert bool(one.alarms) == (name not in {"adversarial-training", "nopeek"})
    plain, _ = trained(rounds=3)
    only_looks = name in {"splitout", "gradients-scrutinizer"}
    assert tiny.same(kept, plain) == only_looks


def test_message_defenses_and_hooks_work_side_by_side() -> None:
    noise = ("smashed-noise", {"sigma": 0.5})
    alone, _ = trained(noise)
    both, strategy = trained(("witness", {}), noise)
    assert tiny.same(alone, both)
    assert set(strategy.alarms[0]) == {"witness"}


def test_no_detector_sees_a_passive_adversary_that_attacks_while_they_watch() -> None:
    """Whatever it draws, guesses and overwrites: the same bits, the same scores."""

    def meddle(event: Event) -> None:
        torch.manual_seed(3)
        if isinstance(event, SmashedUp):
            clone = tiny.architecture("stateful").bottom(9)
            guess = torch.rand(len(event.smashed), *tiny.IMAGE_SHAPE, requires_grad=True)
            nn.functional.mse_loss(clone(guess), torch.from_numpy(event.smashed)).backward()
            event.smashed[...] = 7
            attacked.append(event.step)

    def watched(*hooks: Any) -> tuple[dict[str, Tensor], VanillaSplit]:
        detectors = (
            ("splitguard", {"warm_up": 0, "probability": 0.5, "fakes": 1, "threshold": 0.0}),
            ("splitout", {"window": 2}),
            ("gradients-scrutinizer", {"every": 4, "threshold": 0.0}),
        )
        inner = tiny.ready(plan=PLAN, model="stateful", defenses=detectors)
        grid = Wiretap(DeterministicGrid(inner, stream=0, roster=inner.roster), hooks, strict=True)
        strategy = tiny.split_strategy("stateful", settings=PLAN)
        return tiny.train_split(grid, strategy, rounds=4), strategy

    attacked: list[int] = []
    alone, attended = watched(), watched(meddle)
    assert len(attacked) == 12
    assert tiny.same(alone[0], attended[0])
    assert repr(alone[1].alarms) == repr(attended[1].alarms)
    assert {finding.alarm for finding in attended[1].alarms[0].values()} == {-1}
    assert all(finding.score == finding.score for finding in attended[1].alarms[0].values())
