"""What a node's local training makes of each candidate, for the ceiling of a FedAvg update.

The attacked row's place in the round's batches is taken by each candidate in turn, everything else
as it was. Two ways give the same weights: networks without buffers or draws are trained side by
side, all candidates at once; others one after another, by torch's own optimiser.
"""

from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor, nn
from torch.func import functional_call, grad_and_value, vmap

from leakbed.contracts.noise_laws import NoCeilingError
from leakbed.models import DETERMINISTIC
from leakbed.seeds import scoped

Weights = dict[str, Tensor]

_AT_ONCE = 100  # candidates, each with weights and momenta of its own


@dataclass(frozen=True, kw_only=True, eq=False)
class LocalTraining:
    """One node's training in one round.

    Attributes:
        network: The whole model; its own weights are of no meaning.
        before: Weights and buffers the node received.
        batches: Rows of ``images`` in each step.
        images: Private inputs.
        labels: Their labels, as the node trains with them.
        optimiser: Makes the node's, of torch's own kinds, over the parameters.
        stream: Of draws inside the network, such as dropout's; None where it is not known.
    """

    network: nn.Module
    before: Mapping[str, Tensor]
    batches: Sequence[Int[Tensor, " batch"]]
    images: Float[Tensor, " rows *image"]
    labels: Int[Tensor, " rows"]
    optimiser: Callable[[Iterable[nn.Parameter]], torch.optim.Optimizer]
    stream: int | None = None

    def of(
        self, row: int, candidates: Int[Tensor, " candidates"]
    ) -> tuple[list[Weights], Float[Tensor, " candidates"]]:
        """Return the weights and the last loss that each candidate leads to.

        Args:
            row: The attacked row of ``images``, in one batch of the round or more.
            candidates: Rows that take its place.

        Returns:
            Weights and buffers after the round, under the model's names, and losses.

        Raises:
            NoCeilingError: If the row is in no batch, the network draws numbers from a stream
                that is not known, or the optimiser's steps are not repeated here.
        """
        if not any((batch == row).any() for batch in self.batches):
            raise NoCeilingError(f"row {row} is in none of the round's batches")
        known = all(type(layer) in DETERMINISTIC for layer in self.network.modules())
        if not known and self.stream is None:
            raise NoCeilingError(
                "the network draws numbers in training, such as dropout's, and the answer key does "
                "not say the run's seed; record the run again"
            )
        if known and not dict(self.network.named_buffers()) and self._trains_all():
            parts = [self._side_by_side(row, part) for part in candidates.split(_AT_ONCE)]
            return [w for weights, _ in parts for w in weights], torch.cat([x for _, x in parts])
        return self._one_by_one(row, candidates)

    def _trains_all(self) -> bool:
        return all(p.requires_grad for p in self.network.parameters())

    def _one_by_one(
        self, row: int, candidates: Int[Tensor, " candidates"]
    ) -> tuple[list[Weights], Float[Tensor, " candidates"]]:
        """The literal way: torch's own training, once for each candidate."""
        made, losses = [], []
        for candidate in candidates.tolist():
            network = self.network
            network.load_state_dict(dict(self.before))
            network.train()
            optimiser = self.optimiser(network.parameters())
            loss = torch.zeros(())
            with scoped(self.stream or 0):
                for batch in self.batches:
                    shown = torch.where(batch == row, candidate, batch)
                    optimiser.zero_grad()
                    logits = network(self.images[shown])
                    loss = nn.functional.cross_entropy(logits, self.labels[shown])
                    loss.backward()
                    optimiser.step()
            made.append({k: v.detach().clone() for k, v in network.state_dict().items()})
            losses.append(loss.detach())
        return made, torch.stack(losses)

    def _side_by_side(
        self, row: int, candidates: Int[Tensor, " candidates"]
    ) -> tuple[list[Weights], Float[Tensor, " candidates"]]:
        """All candidates at once; they part at the first batch that holds the row."""
        names = [name for name, _ in self.network.named_parameters()]
        weights = {name: self.before[name] for name in names}
        memory: dict[str, dict[str, Any]] = {name: {} for name in names}
        step = _step_of(self.optimiser(self.network.parameters()))
        losses, apart = torch.zeros(len(candidates)), False
        self.network.train()
        for batch in self.batches:
            here = batch == row
            if apart:
                gradients, losses = self._each(weights, batch, here, candidates)
            elif here.any():
                gradients, losses = self._parting(weights, batch, here, candidates)
                apart = True
            else:
                gradients, loss = _gradient_and_value(self._loss)(weights, batch)
                losses = loss.expand(len(candidates))
            weights = {name: step(weights[name], gradients[name], memory[name]) for name in names}
        return [{k: v[i] for k, v in weights.items()} for i in range(len(candidates))], losses

    def _loss(self, weights: Weights, rows: Tensor) -> Tensor:
        return self._loss_of(weights, self.images[rows], self.labels[rows])

    def _loss_of(self, weights: Weights, images: Tensor, labels: Tensor) -> Tensor:
        logits = functional_call(self.network, weights, (images,))
        return nn.functional.cross_entropy(logits, labels)

    def _parting(
        self,
        weights: Weights,
        batch: Int[Tensor, " batch"],
        here: Bool[Tensor, " batch"],
        candidates: Int[Tensor, " candidates"],
    ) -> tuple[Weights, Float[Tensor, " candidates"]]:
        """The first such step: all weights are the same, so one gradient a candidate is enough."""

        def alone(weights: Weights, image: Tensor, label: Tensor) -> Tensor:
            return self._loss_of(weights, image.unsqueeze(0), label.unsqueeze(0))

        own, losses = vmap(_gradient_and_value(alone), in_dims=(None, 0, 0))(
            weights, self.images[candidates], self.labels[candidates]
        )
        share = int(here.sum()) / len(batch)
        if share == 1:
            return own, losses
        others, loss = _gradient_and_value(self._loss)(weights, batch[~here])
        gradients = {k: (1 - share) * others[k] + share * own[k] for k in weights}
        return gradients, (1 - share) * loss + share * losses

    def _each(
        self,
        weights: Weights,
        batch: Int[Tensor, " batch"],
        here: Bool[Tensor, " batch"],
        candidates: Int[Tensor, " candidates"],
    ) -> tuple[Weights, Float[Tensor, " candidates"]]:
        """A later step: every candidate has weights of its own, which all see the same batch."""
        images, labels = self.images[batch], self.labels[batch]
        if not here.any():
            made: tuple[Weights, Tensor] = vmap(
                _gradient_and_value(self._loss_of), in_dims=(0, None, None)
            )(weights, images, labels)
            return made
        rows = torch.where(here, candidates.unsqueeze(1), batch)
        made = vmap(_gradient_and_value(self._loss_of))(
            weights, self.images[rows], self.labels[rows]
        )
        return made


Step = Callable[[Tensor, Tensor, dict[str, Any]], Tensor]
"""From a weight and its gradient, of many candidates at once, to the weight after one step; the
weight's own memory is written to."""


def _step_of(optimiser: torch.optim.Optimizer) -> Step:
    """Return the step of an optimiser that has taken none yet, entry by entry as torch takes it."""
    (group,) = optimiser.param_groups
    steps = {torch.optim.SGD: _sgd, torch.optim.Adam: _adam}
    changed = {
        name: group[name]
        for name in ("amsgrad", "maximize", "nesterov", "dampening", "decoupled_weight_decay")
        if group.get(name)
    }
    if type(optimiser) not in steps or changed:
        raise NoCeilingError(
            f"no ceiling: the node's optimiser is {type(optimiser).__name__} {changed or ''}; the "
            "steps of plain SGD and Adam alone are repeated here"
        )
    return partial(steps[type(optimiser)], group)


def _sgd(
    group: Mapping[str, Any], weight: Tensor, gradient: Tensor, memory: dict[str, Any]
) -> Tensor:
    gradient = gradient + group["weight_decay"] * weight
    if group["momentum"]:
        kept = memory.get("kept")
        gradient = gradient if kept is None else kept * group["momentum"] + gradient
        memory["kept"] = gradient
    moved: Tensor = weight - group["lr"] * gradient
    return moved


def _adam(
    group: Mapping[str, Any], weight: Tensor, gradient: Tensor, memory: dict[str, Any]
) -> Tensor:
    gradient = gradient + group["weight_decay"] * weight
    first, second = group["betas"]
    count = memory["count"] = memory.get("count", 0) + 1
    mean = memory.get("mean", torch.zeros_like(gradient))
    square = memory.get("square", torch.zeros_like(gradient))
    memory["mean"] = mean = mean.lerp(gradient, 1 - first)
    memory["square"] = square = square * second + (1 - second) * gradient * gradient
    size = square.sqrt() / (1 - second**count) ** 0.5 + group["eps"]
    moved: Tensor = weight - group["lr"] / (1 - first**count) * mean / size
    return moved


def _gradient_and_value(loss: Callable[..., Tensor]) -> Callable[..., tuple[Weights, Tensor]]:
    made: Callable[..., tuple[Weights, Tensor]] = grad_and_value(loss)
    return made
