"""What protocols are by definition: plain loops over whole tensors, without a message."""

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from clients.node import NodeConfig
from leakbed.seeds import derive, generator, scoped
from tests.support import tiny

Weights = dict[str, Tensor]


def uncut(cell: NodeConfig, *, rounds: int) -> Weights:
    """Vanilla split learning with one node: one network, one optimiser, its batches in order."""
    network = first(cell)
    optimiser = cell.plan.optimiser(network.parameters())
    images, labels = cell.rows()
    for round_ in range(1, rounds + 1):
        for step, batch in enumerate(cell.batches(round_, len(images))):
            optimiser.zero_grad()
            with scoped(derive(cell.stream, f"forward/{round_}/{step}")):
                loss = nn.functional.cross_entropy(network(images[batch]), labels[batch])
            loss.backward()
            optimiser.step()
    return dict(network.state_dict())


def concatenated(
    cells: Sequence[NodeConfig],
    *,
    rounds: int,
    present: Sequence[Sequence[int]] | None = None,
    penalty: Callable[[Tensor, Tensor], Tensor] | None = None,
) -> Weights:
    """Parallel split learning in step: one network, and in each step all nodes' rows as a batch.

    ``penalty`` is of a node's images and smashed data; its mean by rows is added to the loss.
    """
    settings, network = cells[0].plan, first(cells[0])
    optimiser = settings.optimiser(network.parameters())
    for round_ in range(1, rounds + 1):
        if settings.optimizer_state == "fresh":
            optimiser = settings.optimiser(network.parameters())
        here = [cells[node] for node in (present[round_ - 1] if present else range(len(cells)))]
        plans = [cell.batches(round_, len(cell.rows()[0])) for cell in here]
        for step in range(max(map(len, plans))):
            chosen = [
                (cell.rows(), batches[step])
                for cell, batches in zip(here, plans, strict=True)
                if step < len(batches)
            ]
            images = torch.cat([images[batch] for (images, _), batch in chosen])
            labels = torch.cat([labels[batch] for (_, labels), batch in chosen])
            optimiser.zero_grad()
            loss = nn.functional.cross_entropy(network(images), labels)
            if penalty is not None:
                bottom = network[: cells[0].architecture.cut + 1]
                for (own, _), batch in chosen:
                    loss = loss + penalty(own[batch], bottom(own[batch])) * len(batch) / len(images)
            loss.backward()
            optimiser.step()
    return dict(network.state_dict())


def interleaved(cells: Sequence[NodeConfig], *, rounds: int) -> Weights:
    """SplitFed v2: one top, one optimiser, a bottom for each node, batches in the drawn order."""
    settings = cells[0].plan
    parts = cells[0].architecture.parts(derive(tiny.SEED, "victim-init"))
    bottoms = [cell.architecture.bottom(0) for cell in cells]
    optimizers = [settings.optimiser(bottom.parameters()) for bottom in bottoms]
    top = settings.optimiser(parts.top.parameters())
    merged = parts.bottom.state_dict()
    for round_ in range(1, rounds + 1):
        plans = [cell.batches(round_, len(cell.rows()[0])) for cell in cells]
        for bottom in bottoms:
            bottom.load_state_dict(merged)
        for step in range(max(map(len, plans))):
            for node in order(left(cells, step=step), round_=round_, step=step):
                images, labels = cells[node].rows()
                batch = plans[node][step]
                optimizers[node].zero_grad()
                top.zero_grad()
                logits = parts.top(bottoms[node](images[batch]))
                nn.functional.cross_entropy(logits, labels[batch]).backward()
                optimizers[node].step()
                top.step()
        counts = [sum(map(len, batches)) for batches in plans]
        states = [bottom.state_dict() for bottom in bottoms]
        merged = {
            name: sum(s[name] * (n / sum(counts)) for s, n in zip(states, counts, strict=True))
            for name in merged
        }
    return merged | parts.top.state_dict()


def order(nodes: list[int], *, round_: int, step: int) -> list[int]:
    """A step's nodes as SplitFed v2's documented draw puts them."""
    stream = derive(derive(tiny.SEED, "server/lots"), f"order/{round_}/{step}")
    drawn = torch.randperm(len(nodes), generator=generator(stream)).tolist()
    return [nodes[place] for place in drawn]


def left(cells: Sequence[NodeConfig], *, step: int) -> list[int]:
    """The nodes that have a batch in a step, by partition."""
    return [c.partition for c in cells if len(c.batches(1, len(c.rows()[0]))) > step]


def first(cell: NodeConfig) -> Any:
    """The uncut network as training begins with it."""
    return cell.architecture.build(derive(tiny.SEED, "victim-init"))
