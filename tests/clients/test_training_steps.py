"""Plug-ins in the training step: equal to plain loops, on FedAvg and at the cut."""

from collections.abc import Callable
from dataclasses import replace
from typing import Any

import pytest
import torch
from flwr.app import ArrayRecord, ConfigRecord, Context, Message, RecordDict
from torch import Tensor, nn

from clients.node import TrainingPlan
from clients.training_defenses import TrainingDefenses
from leakbed.contracts import DefenseState, IllegalCombinationError
from leakbed.distance_correlation import distance_correlation
from leakbed.grids import DeterministicGrid
from leakbed.node_memory import load_state
from leakbed.seeds import derive, generator, scoped
from tests.support import several_nodes, stepping, tiny
from tests.support.stepping import HERE

pytestmark = pytest.mark.usefixtures("identity")
MOMENTUM = tiny.plan(momentum=0.9)


def own(name: str, **settings: Any) -> tuple[str, dict[str, Any]]:
    return f"{HERE}:{name}", settings


def by_fedavg(
    *defenses: tuple[str, dict[str, Any]],
    plan: TrainingPlan = MOMENTUM,
    model: str = "plain",
    resident: bool = True,
) -> list[Message]:
    """Two rounds of one node that is handed its own weights back."""
    grid = tiny.ready(plan=plan, model=model, defenses=defenses, resident=resident)
    weights = dict(tiny.architecture(model).build(derive(tiny.SEED, "victim-init")).state_dict())
    replies = []
    for round_ in (1, 2):
        config = ConfigRecord({"server-round": round_})
        records = RecordDict({"arrays": ArrayRecord(weights), "config": config})
        (reply,) = grid.send_and_receive([Message(records, dst_node_id=1, message_type="train")])
        assert not reply.has_error(), reply.error
        weights = sent(reply)
        replies.append(reply)
    return replies


def sent(reply: Message) -> dict[str, Tensor]:
    return dict(reply.content.array_records["arrays"].to_torch_state_dict())


Step = Callable[[nn.Module, dict[str, Tensor], Tensor, Tensor, Any], None]


def loop(step: Step, *, plan: TrainingPlan = MOMENTUM, model: str = "plain") -> list[Any]:
    """FedAvg's node as plain PyTorch; ``step`` fills the gradients of one batch."""
    cell = tiny.cell(plan=plan)
    images, labels = cell.rows()
    network = tiny.architecture(model).build(derive(tiny.SEED, "victim-init"))
    ends, steps = [], 0
    stream = derive(cell.defense_stream, "training/0")
    for round_ in (1, 2):
        begun = {name: value.clone() for name, value in network.state_dict().items()}
        optimiser = plan.optimiser(network.parameters())
        with scoped(derive(cell.stream, f"train/{round_}")):
            for batch in cell.batches(round_, len(images)):
                optimiser.zero_grad()
                drawn = generator(derive(stream, f"message/{steps}"))
                step(network, begun, images[batch], labels[batch], drawn)
                optimiser.step()
                steps += 1
        ends.append({name: value.clone() for name, value in network.state_dict().items()})
    return ends


@pytest.mark.parametrize("model", ["plain", "stateful"])
def test_fedprox_as_a_plug_in_is_a_plain_loop_bit_for_bit(model: str) -> None:
    def step(network: nn.Module, begun: Any, images: Tensor, labels: Tensor, _: Any) -> None:
        loss = nn.functional.cross_entropy(network(images), labels)
        far = [(w - begun[name]).square().sum() for name, w in network.named_parameters()]
        (loss + 0.5 * torch.stack(far).sum()).backward()  # type: ignore[no-untyped-call]

    proximal = own("Proximal", mu=1.0)
    expected = loop(step, model=model)
    found = [sent(each) for each in by_fedavg(proximal, model=model)]
    assert all(map(tiny.same, found, expected))
    rebuilt = by_fedavg(proximal, model=model, resident=False)
    assert all(tiny.same(sent(each), end) for each, end in zip(rebuilt, expected, strict=True))
    assert not tiny.same(found[-1], sent(by_fedavg(model=model)[-1]))


def test_client_side_dp_sgd_as_a_plug_in_is_the_literal_loop() -> None:
    clip, noise = 0.5, 0.1

    def step(network: nn.Module, _: Any, images: Tensor, labels: Tensor, drawn: Any) -> None:
        """Abadi et al. 2016, algorithm 1: each row's gradient, clipped; noise on the sum."""
        losses = nn.functional.cross_entropy(network(images), labels, reduction="none")
        sums = [torch.zeros_like(w) for w in network.parameters()]
        for loss in losses:
            rows = torch.autograd.grad(loss, list(network.parameters()), retain_graph=True)
            norm = torch.cat([each.flatten() for each in rows]).norm()
            for total, each in zip(sums, rows, strict=True):
                total.add_(each / torch.maximum(torch.ones(()), norm / clip))
        for w, total in zip(network.parameters(), sums, strict=True):
            w.grad = (total + noise * clip * torch.randn(w.shape, generator=drawn)) / len(images)

    replies = by_fedavg(own("RowClipping", clip=clip, noise=noise))
    for reply, expected in zip(replies, loop(step), strict=True):
        found = sent(reply)
        for name, value in expected.items():
            torch.testing.assert_close(found[name], value, rtol=1e-5, atol=1e-6)
        # It claims privacy of the weights, and a loss in the clear would name the batch behind it.
        assert list(reply.content.metric_records["metrics"]) == ["num-examples"]


def test_mixup_as_a_plug_in_is_a_plain_loop_bit_for_bit() -> None:
    def step(network: nn.Module, _: Any, images: Tensor, labels: Tensor, drawn: Any) -> None:
        others = torch.randperm(len(images), generator=drawn)
        logits = network(images.lerp(images[others], 0.3))
        loss = 0.7 * nn.functional.cross_entropy(logits, labels)
        (loss + 0.3 * nn.functional.cross_entropy(logits, labels[others])).backward()  # type: ignore[no-untyped-call]

    found = [sent(each) for each in by_fedavg(own("Mixup", share=0.3), model="stateful")]
    assert all(map(tiny.same, found, loop(step, model="stateful")))


def test_adversarial_training_on_fedavg_is_a_slow_literal_reading() -> None:
    cell, moved = tiny.cell(plan=MOMENTUM), {}
    drawn = generator(derive(derive(cell.defense_stream, "training/0"), "message/0"))
    images, _ = cell.rows()
    first = torch.empty(images.shape).uniform_(-0.3, 0.3, generator=drawn)
    moved.update({image.numpy().tobytes(): at for image, at in zip(images, first, strict=True)})

    def step(network: nn.Module, _: Any, images: Tensor, labels: Tensor, __: Any) -> None:
        keys = [image.numpy().tobytes() for image in images]
        at = torch.stack([moved[key] for key in keys])
        shown = (images + at).clamp(0, 1).requires_grad_()
        nn.functional.cross_entropy(network(shown), labels).backward()  # type: ignore[no-untyped-call]
        assert shown.grad is not None
        stepped = (at + 0.25 * 0.3 * shown.grad.sign()).clamp(-0.3, 0.3)
        moved.update(dict(zip(keys, stepped, strict=True)))

    replies = by_fedavg(("adversarial-training", {"budget": 0.3, "stride": 0.25}))
    assert all(map(tiny.same, map(sent, replies), loop(step)))


def test_nopeek_is_the_literal_step_bit_for_bit() -> None:
    """Backpropagation of the task, then of the penalty, into one gradient."""
    plan = tiny.plan(momentum=0.9)
    grid = tiny.ready(plan=plan, defenses=(("nopeek", {"alpha": 2.0}),))
    found = tiny.train_split(grid, tiny.split_strategy(settings=plan), rounds=2)
    cell = tiny.cell(plan=plan)
    parts = tiny.architecture().parts(derive(tiny.SEED, "victim-init"))
    optimisers = [plan.optimiser(part.parameters()) for part in (parts.bottom, parts.top)]
    images, labels = cell.rows()
    for round_ in (1, 2):
        for batch in cell.batches(round_, len(images)):
            for each in optimisers:
                each.zero_grad()
            smashed = parts.bottom(images[batch])
            cut = smashed.detach().requires_grad_()
            nn.functional.cross_entropy(parts.top(cut), labels[batch]).backward()  # type: ignore[no-untyped-call]
            assert cut.grad is not None
            smashed.backward(cut.grad, retain_graph=True)  # type: ignore[no-untyped-call]
            (2.0 * distance_correlation(images[batch], smashed)).backward()
            for each in optimisers:
                each.step()
    assert tiny.same(found, parts.bottom.state_dict() | parts.top.state_dict())


def kept(grid: Any, node: int, index: int = 0) -> DefenseState:
    """A defence's state as a node keeps it between rounds."""
    state = load_state(grid._host._contexts[node], f"leakbed.training-defence.{index}")
    assert state is not None
    return state


@pytest.mark.parametrize(
    "settings",
    [{"momentum": 0.9}, {"momentum": 0.9, "optimizer_state": "fresh"}, {"optimizer": "adam"}],
)
def test_an_auxiliary_head_trains_with_the_bottom_as_one_objective(
    settings: dict[str, Any],
) -> None:
    plan = tiny.plan(**settings)
    grid = tiny.ready(plan=plan, defenses=(own("AuxiliaryHead", weight=0.5),))
    found = tiny.train_split(grid, tiny.split_strategy(settings=plan), rounds=2)
    cell = tiny.cell(plan=plan)
    network = tiny.architecture().build(derive(tiny.SEED, "victim-init"))
    drawn = generator(derive(derive(cell.defense_stream, "training/0"), "message/0"))
    head = nn.Linear(64, 3)
    with torch.no_grad():
        head.weight.copy_(torch.randn(3, 64, generator=drawn) / 8)
        head.bias.zero_()
    top = plan.optimiser(network[2:].parameters())
    at_node = [*network[:2].parameters(), *head.parameters()]
    optimiser = plan.optimiser(at_node)
    images, labels = cell.rows()
    for round_ in (1, 2):
        if plan.optimizer_state == "fresh":
            optimiser = plan.optimiser(at_node)
        for batch in cell.batches(round_, len(images)):
            optimiser.zero_grad()
            top.zero_grad()
            smashed = network[:2](images[batch])
            loss = nn.functional.cross_entropy(network[2:](smashed), labels[batch])
            aside = nn.functional.cross_entropy(head(smashed.flatten(1)), labels[batch])
            (loss + 0.5 * aside).backward()
            optimiser.step()
            top.step()
    trained = kept(grid, 1).trained
    expected = dict(network.state_dict()) | {"weight": head.weight, "bias": head.bias}
    for name, value in expected.items():
        torch.testing.assert_close({**found, **trained}[name], value, rtol=1e-4, atol=1e-5)


def test_each_node_has_a_head_of_its_own_that_survives_a_change_of_process() -> None:
    plan, ends = tiny.plan(momentum=0.9), []
    for resident in (True, False):
        inner = tiny.ready(
            2, plan=plan, model="stateful", defenses=(own("AuxiliaryHead"),), resident=resident
        )
        grid = DeterministicGrid(inner, stream=0, roster=inner.roster)
        strategy = tiny.split_strategy("stateful", settings=plan)
        ends.append(tiny.train_split(grid, strategy, rounds=2))
        if resident:
            first, second = kept(inner, 1), kept(inner, 2)
    assert tiny.same(*ends)
    assert not tiny.same(first.trained, second.trained)
    assert first.messages == 6
    assert len(first.momenta) == 2


@pytest.mark.parametrize("share", [0.25, 1e-39])
def test_own_weights_learn_alike_whatever_share_of_a_joint_loss_the_node_has(share: float) -> None:
    def stepped(share: float) -> DefenseState:
        cell = tiny.cell(plan=MOMENTUM, defenses=(own("AuxiliaryHead"),))
        guard = TrainingDefenses.of(cell)
        assert guard is not None
        guard.restore(Context(1, 1, {}, RecordDict(), {}))
        guard.open({})
        module = tiny.architecture().bottom(0)
        images, labels = (each[:8] for each in cell.rows())
        step = replace(stepping.step(images, module(images), labels), module=module)
        answers = guard.ask(step)
        assert answers[0] is not None
        assert answers[0].loss is not None
        weighed = answers[0].loss * share
        literal = torch.autograd.grad(weighed, list(module.parameters()), retain_graph=True)
        guard.follow_answers(answers, module, share=share)
        for weight, expected in zip(module.parameters(), literal, strict=True):
            assert weight.grad is not None
            assert torch.equal(weight.grad, expected)
        return guard._states[0]

    whole, part = stepped(1.0), stepped(share)
    assert tiny.same(whole.trained, part.trained)
    assert tiny.same(whole.momenta, part.momenta)
    assert part.trained["bias"].abs().min() > 0  # where it began


def test_row_clipping_at_the_cut_is_the_literal_loop() -> None:
    plan = tiny.plan()
    grid = tiny.ready(plan=plan, defenses=(own("RowClipping", clip=0.05, noise=0.0),))
    found = tiny.train_split(grid, tiny.split_strategy(settings=plan), rounds=1)
    parts = tiny.architecture().parts(derive(tiny.SEED, "victim-init"))
    images, labels = tiny.cell().rows()
    for batch in tiny.cell(plan=plan).batches(1, len(images)):
        cut = parts.bottom(images[batch]).detach().requires_grad_()
        nn.functional.cross_entropy(parts.top(cut), labels[batch]).backward()  # type: ignore[no-untyped-call]
        assert cut.grad is not None
        moves = [torch.zeros_like(w) for w in parts.bottom.parameters()]
        for image, behind in zip(images[batch], cut.grad * len(batch), strict=True):
            made = torch.autograd.grad(
                parts.bottom(image[None]), list(parts.bottom.parameters()), behind[None]
            )
            norm = torch.cat([each.flatten() for each in made]).norm()
            for move, each in zip(moves, made, strict=True):
                move.add_(each * (0.05 / norm).clamp_max(1.0) / len(batch))
        with torch.no_grad():
            for w, move in zip(parts.bottom.parameters(), moves, strict=True):
                w.sub_(0.1 * move)
            for w in parts.top.parameters():
                assert w.grad is not None
                w.sub_(0.1 * w.grad)
                w.grad = None
    for name, value in (parts.bottom.state_dict() | parts.top.state_dict()).items():
        torch.testing.assert_close(found[name], value, rtol=1e-4, atol=1e-6)


@pytest.mark.parametrize("exchanges", ["split", "weights"])
def test_a_node_refuses_what_adds_to_a_step_that_is_claimed_private(exchanges: str) -> None:
    cell = tiny.cell(plan=MOMENTUM, defenses=(own("RowClipping"), own("Proximal")))
    with pytest.raises(IllegalCombinationError, match="proximal takes part in a training step be"):
        TrainingDefenses.of(cell, exchanges=exchanges)


def test_a_clipping_norm_means_the_same_in_either_scale_of_a_joint_loss() -> None:
    """In the global scale each of four nodes is sent a quarter of its own loss's gradient."""
    ends = []
    for clip in (0.05, 5.0):
        for scale in ("global", "local"):
            found = several_nodes.trained(
                "parallel-split",
                several_nodes.plan(local_steps=2, learning_rate=0.1),
                rounds=1,
                options={"sync": "step", "gradient_scale": scale},
                at_nodes=[own("RowClipping", clip=clip, noise=0.0)],
            )
            ends.append(found)
    assert several_nodes.distance(ends[0], ends[1]) < 1e-10
    assert several_nodes.distance(ends[2], ends[3]) < 1e-10
    assert several_nodes.distance(ends[0], ends[2]) > 1e-4


@pytest.mark.parametrize(
    ("defense", "said"),
    [
        (("nopeek", {}), "nopeek takes part in training where nodes exchange 'split', and this"),
        (own("AuxiliaryHead"), "auxiliary-head takes part in training where nodes exchange 'spli"),
        (("splitout", {}), "splitout overrides inspect, which is called where a network is split"),
    ],
)
def test_fedavg_refuses_what_hooks_into_split_training_by_name(
    defense: tuple[str, dict[str, Any]], said: str
) -> None:
    with pytest.raises(AssertionError, match=f"IllegalCombinationError: {said}"):
        by_fedavg(defense)
