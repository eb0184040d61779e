"""FedAvg's node: train the model it receives for some steps, send the weights back.

The optimiser starts afresh every round, as McMahan et al. describe FedAvg's clients. An intruder at
the node makes the batches; what it learns from the model costs it no step and no message.
Source: McMahan, Moore, Ramage, Hampson, Aguera y Arcas. "Communication-Efficient Learning of Deep
Networks from Decentralized Data", AISTATS 2017, https://arxiv.org/abs/1602.05629.
"""

from functools import lru_cache

import torch
from flwr.app import Context, Message, MetricRecord, RecordDict
from flwr.clientapp import ClientApp
from jaxtyping import Float
from torch import Tensor, nn

from clients.malicious import MaliciousClientSession
from clients.node import NodeConfig, UnstableTrainingError
from leakbed.models import Architecture
from leakbed.seeds import derive, scoped
from leakbed.tensors import finite, load, placed
from leakbed.wire.records import ROUND, as_arrays, pack


def register(app: ClientApp) -> None:
    """Register the handler of Flower's own ``train`` message.

    Args:
        app: The node's app.
    """

    @app.train()
    def train(message: Message, context: Context) -> Message:
        cell = NodeConfig.of(context)
        round_ = int(message.content.config_records["config"][ROUND])  # type: ignore[arg-type]
        model = _model(cell.architecture, cell.torch_device())
        received = as_arrays(message.content.array_records["arrays"])
        load(model, received)
        intrusion = MaliciousClientSession.of(cell, context)
        loss, examples = _train(cell, model, round_, intrusion)
        if intrusion is not None:
            intrusion.store(context)
        trained = {name: value.cpu().numpy() for name, value in model.state_dict().items()}
        metrics = MetricRecord({"num-examples": examples, "train-loss": loss})
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
    cell: NodeConfig, model: nn.Module, round_: int, intrusion: MaliciousClientSession | None
) -> tuple[float, int]:
    """Run the round's local steps in place; return the last loss and the samples used."""
    device = cell.torch_device()
    images, labels = cell.rows()
    optimizer = cell.plan.optimiser(model.parameters())
    model.train()
    losses, examples = [], 0
    with scoped(derive(cell.stream, f"train/{round_}")):
        for batch in cell.batches(round_, len(images)):
            made = None if intrusion is None else intrusion.local_batch(model, len(batch))
            shown, named = made or (images[batch], labels[batch])
            optimizer.zero_grad()
            logits = model(placed(shown, device))
            loss = nn.functional.cross_entropy(logits, placed(named, device))
            loss.backward()
            optimizer.step()
            losses.append(loss.detach())
            examples += len(batch)
    _check_finite(cell, model, torch.stack(losses), round_)
    return losses[-1].item(), examples


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
