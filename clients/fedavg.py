"""FedAvg's node: train the model it receives for some steps, send the weights back.

The optimiser starts afresh every round, as McMahan et al. describe FedAvg's clients. An intruder at
the node makes the batches; what it learns from the model costs it no step and no message. Defences
that hook into training take part in every step, as they do at a bottom.
Source: McMahan, Moore, Ramage, Hampson, Aguera y Arcas. "Communication-Efficient Learning of Deep
Networks from Decentralized Data", AISTATS 2017, https://arxiv.org/abs/1602.05629.
"""

from functools import lru_cache

import torch
from flwr.app import Context, Message, MetricRecord, RecordDict
from flwr.clientapp import ClientApp
from jaxtyping import Float, Int
from torch import Tensor, nn

from clients.malicious import MaliciousClientSession
from clients.node import NodeConfig, UnstableTrainingError
from clients.trainer import gradients_of
from clients.training_defenses import TrainingDefenses
from leakbed.contracts import TrainingStep
from leakbed.contracts.training_steps import Answered
from leakbed.models import Architecture
from leakbed.seeds import derive, scoped
from leakbed.tensors import as_tensor, finite, load, placed
from leakbed.wire.records import ROUND, as_arrays, pack


def register(app: ClientApp) -> None:
    """Register the handler of Flower's own ``train`` message."""

    @app.train()
    def train(message: Message, context: Context) -> Message:
        cell = NodeConfig.of(context)
        round_ = int(message.content.config_records["config"][ROUND])  # type: ignore[arg-type]
        model = _model(cell.architecture, cell.torch_device())
        received = as_arrays(message.content.array_records["arrays"])
        load(model, received)
        intrusion = MaliciousClientSession.of(cell, context)
        guard = TrainingDefenses.of(cell, exchanges="weights") if intrusion is None else None
        if guard is not None:
            guard.restore(context)
            guard.forget()
            guard.open({name: as_tensor(array) for name, array in received.items()})
        loss, examples = _train(cell, model, round_, intrusion, guard)
        for kept in (intrusion, guard):
            if kept is not None:
                kept.store(context)
        trained = {name: value.cpu().numpy() for name, value in model.state_dict().items()}
        metrics = MetricRecord({"num-examples": examples})
        if guard is None or not guard.claiming:  # a loss in the clear names the batch behind it
            metrics["train-loss"] = loss
        records = RecordDict({"arrays": pack(trained), "metrics": metrics})
        return Message(records, reply_to=message)


@lru_cache(maxsize=4)
def _model(architecture: Architecture, device: torch.device) -> nn.Module:
    """Return this process's network to load weights into; its own fresh ones are never used.

    One for all nodes: what a node remembers is in the weights it is sent, so that none need be kept
    for the thousands that are not sampled.
    """
    model: nn.Module = architecture.build(0).to(device)
    return model


def _train(
    cell: NodeConfig,
    model: nn.Module,
    round_: int,
    intrusion: MaliciousClientSession | None,
    guard: TrainingDefenses | None,
) -> tuple[float, int]:
    """Run the round's local steps in place; return the last loss and the samples used."""
    device = cell.torch_device()
    images, labels = cell.rows()
    optimizer = cell.plan.optimiser(model.parameters())
    model.train()
    losses, examples = [], 0
    with scoped(derive(cell.stream, f"train/{round_}")):
        for step, batch in enumerate(cell.batches(round_, len(images))):
            made = None if intrusion is None else intrusion.local_batch(model, len(batch))
            shown, named = made or (images[batch], labels[batch])
            shown, named = placed(shown, device), placed(named, device)
            optimizer.zero_grad()
            if guard is None:
                loss = nn.functional.cross_entropy(model(shown), named)
                loss.backward()
            else:
                loss = _guarded(guard, model, shown, named, place=(round_, step), rows=batch)
            optimizer.step()
            losses.append(loss.detach())
            examples += len(batch)
    _check_finite(cell, model, torch.stack(losses), round_)
    return losses[-1].item(), examples


def _guarded(
    guard: TrainingDefenses,
    model: nn.Module,
    images: Float[Tensor, " batch *image"],
    labels: Int[Tensor, " batch"],
    *,
    place: tuple[int, int],
    rows: Int[Tensor, " batch"],
) -> Float[Tensor, ""]:
    """Fill the model's gradients as defences let it; return the task's loss."""
    shown = guard.altered(images, rows)
    logits = model(shown)
    logits.retain_grad()
    loss = nn.functional.cross_entropy(logits, labels)
    loss.backward(retain_graph=guard.takes_part)
    answers: list[Answered | None] = []
    if guard.takes_part:
        step = TrainingStep(
            round=place[0],
            step=place[1],
            rows=rows,
            images=images,
            shown=shown.detach(),
            labels=labels,
            module=model,
            output=logits,
            output_gradient=torch.zeros_like(logits) if logits.grad is None else logits.grad,
            gradients=gradients_of(model),
        )
        answers = guard.ask(step)
    if guard.follows and shown.grad is not None:
        guard.follow(shown.grad, rows)
    if answers:
        guard.follow_answers(answers, model)
    guard.advance()
    return loss


def _check_finite(
    cell: NodeConfig, model: nn.Module, losses: Float[Tensor, " steps"], round_: int
) -> None:
    """Refuse a round whose loss or weights left the numbers, and say at which step."""
    if finite(losses) and all(map(finite, model.state_dict().values())):
        return
    bad = ~losses.isfinite()
    step = int(bad.nonzero()[0]) if bad.any() else len(losses) - 1
    raise UnstableTrainingError(
        f"training at node {cell.partition} left the finite numbers in round {round_}, step "
        f"{step} (loss {losses[step].item():g}); lower protocol.learning_rate"
    )
