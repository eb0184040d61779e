"""The server's part of a split model in training: a top with its loss, or a middle without one."""

from collections.abc import Callable, Sequence

import torch
from flwr.app import ArrayRecord
from jaxtyping import Float, Int, Shaped
from torch import Tensor, nn

from leakbed.contracts import Defense, Protects
from leakbed.gradient_defences import GradientDefences
from strategies.private_steps import PrivateSteps


class UnfitBatchError(ValueError):
    """A smashed batch, or its labels, that the server's part of the model cannot read.

    Attributes:
        row: The first such row, of all that were trained on together.
    """

    def __init__(self, message: str, *, row: int = 0) -> None:
        """Say what does not fit, and where."""
        super().__init__(message)
        self.row = row


class ServerPart:
    """Weights, optimiser and the defences of the cut gradient; what every server part has."""

    def __init__(
        self,
        module: nn.Module,
        optimiser: torch.optim.Optimizer,
        *,
        defences: tuple[Defense, ...] = (),
        defence_stream: int = 0,
    ) -> None:
        """Take the module.

        Args:
            module: Trained in place.
            optimiser: Over its parameters.
            defences: Those of the cut gradient are applied, in order, to each before it is sent.
            defence_stream: The secret seed of their noise.
        """
        self.module = module
        self._optimiser = optimiser
        self._fresh = optimiser.state_dict()
        sent = tuple(d for d in defences if Protects.CUT_GRADIENT in d.protects)
        self._defences = GradientDefences(sent, stream=defence_stream)
        first = next(module.parameters(), torch.empty(0))
        self._device, self._dtype = first.device, first.dtype

    def load(self, arrays: ArrayRecord) -> None:
        """Take weights and buffers from a Flower record."""
        self.module.load_state_dict(arrays.to_torch_state_dict())

    def arrays(self) -> ArrayRecord:
        """Return the weights and buffers as a Flower record."""
        state = {name: value.detach().cpu() for name, value in self.module.state_dict().items()}
        return ArrayRecord(state)

    def forget(self) -> None:
        """Drop the optimiser's momenta and step counts, as at the start."""
        self._optimiser.load_state_dict(self._fresh)

    def protected(
        self,
        gradient: Float[Tensor, " batch *cut"],
        labels: Int[Tensor, " batch"] | None = None,
    ) -> Float[Tensor, " batch *cut"]:
        """Return a cut gradient on the CPU as it may be sent.

        Args:
            gradient: dL/d(smashed).
            labels: Of its rows, where this part has them.

        Returns:
            It, changed by every defence in turn.
        """
        return self._defences.protect(gradient.cpu(), labels)

    def received(self, smashed: Shaped[Tensor, " batch *cut"]) -> Float[Tensor, " batch *cut"]:
        """Return a smashed batch as a leaf that takes a gradient.

        One of another type than the weights is an :class:`UnfitBatchError`.

        Args:
            smashed: As received; never written to.

        Returns:
            It, on this part's device.
        """
        self._check_type(smashed)
        return smashed.to(self._device).detach().requires_grad_()

    def _check_type(self, smashed: Tensor, *, row: int = 0) -> None:
        if smashed.dtype != self._dtype:
            raise UnfitBatchError(
                f"smashed data are {smashed.dtype}, the server's part is {self._dtype}", row=row
            )

    def _training(self) -> None:
        if not self.module.training:
            self.module.train()

    def step(self) -> None:
        """Take one optimiser step with the gradients that backward passes left."""
        self._optimiser.step()

    def backward(self, output: Tensor, gradient: Tensor | None = None) -> None:
        """Fill the gradients of this part's weights and of what it received."""
        self._optimiser.zero_grad()
        output.backward(gradient)


class TopTrainer(ServerPart):
    """The top with the loss: for protocols whose labels are at the server."""

    def __init__(
        self,
        module: nn.Module,
        optimiser: torch.optim.Optimizer,
        *,
        defences: tuple[Defense, ...] = (),
        defence_stream: int = 0,
    ) -> None:
        """Take the module, as every part does.

        Args:
            module: Trained in place.
            optimiser: Over its parameters.
            defences: Of the cut gradient, and of the top's own steps.
            defence_stream: The secret seed of their noise.
        """
        super().__init__(module, optimiser, defences=defences, defence_stream=defence_stream)
        self._private = PrivateSteps.of(module, defences, stream=defence_stream)

    def train(
        self, smashed: Shaped[Tensor, " batch *cut"], labels: Int[Tensor, " labels"]
    ) -> Float[Tensor, " batch *cut"]:
        """Train on one smashed batch.

        Args:
            smashed: As received.
            labels: Its labels.

        Returns:
            dL/d(smashed), with L the mean cross-entropy of the batch, as it may be sent.
        """
        received = self.received(smashed)
        self._descend(received, labels)
        return self.protected(_gradient(received), labels)

    def train_jointly(
        self, batches: Sequence[tuple[Tensor, Tensor]], *, own_mean: bool = False
    ) -> list[Tensor]:
        """Train on several nodes' batches at once, as on one batch of all their rows.

        Args:
            batches: Smashed rows and their labels, by node.
            own_mean: Whether each node is sent the gradient of the mean of its own rows' losses.

        Returns:
            dL/d(smashed) of each, with L the mean cross-entropy of *all* rows, or of its own.
        """
        sizes = [len(smashed) for smashed, _ in batches]
        for place, (smashed, _) in enumerate(batches):
            self._check_type(smashed, row=sum(sizes[:place]))
        received = self.received(torch.cat([smashed for smashed, _ in batches]))
        self._descend(received, torch.cat([labels for _, labels in batches]))
        parts = _gradient(received).split(sizes)
        if own_mean:
            parts = tuple(part * (len(received) / len(part)) for part in parts)
        pairs = zip(parts, batches, strict=True)
        return [self.protected(part, labels) for part, (_, labels) in pairs]

    def train_merged(
        self,
        received: Sequence[Tensor],
        labels: Int[Tensor, " labels"],
        *,
        merge: Callable[[Sequence[Tensor]], Tensor],
    ) -> list[Tensor]:
        """Train on one batch whose rows several parties hold parts of.

        Args:
            received: Each party's smashed batch, from :meth:`received`.
            labels: Of the rows.
            merge: Makes one smashed batch of them all.

        Returns:
            dL/d(smashed) of each party, as it may be sent.
        """
        self._descend(merge(received), labels)
        return [self.protected(_gradient(each), labels) for each in received]

    def predict(self, smashed: Shaped[Tensor, " batch *cut"]) -> Int[Tensor, " batch"]:
        """Return the predicted label of each smashed row."""
        self.module.eval()
        with torch.no_grad():
            logits: Tensor = self.module(self.received(smashed).clone())
        return logits.argmax(1).cpu()

    def _descend(
        self, received: Float[Tensor, " batch *cut"], labels: Int[Tensor, " labels"]
    ) -> None:
        self._training()
        try:
            logits: Tensor = self.module(received)
        except ValueError as error:  # such as BatchNorm's, of a batch of one row
            raise UnfitBatchError(f"the top cannot train on this batch: {error}") from error
        rows, classes = logits.shape
        least, most = labels.aminmax()
        if len(labels) != rows or not 0 <= least.item() <= most.item() < classes:
            illegal = (labels < 0) | (labels >= classes)
            raise UnfitBatchError(
                f"{len(labels)} labels from {labels.min()} to {labels.max()} came with "
                f"{len(received)} smashed rows of a model with {classes} classes",
                row=int(illegal.int().argmax()),
            )
        self.backward(nn.functional.cross_entropy(logits, labels.to(logits.device)))
        if self._private is not None:
            self._private.replace_gradients()
        self.step()


class MiddleTrainer(ServerPart):
    """The middle of a U-shaped model: no loss, no labels; both its gradients come from the node."""

    def forward(self, smashed: Shaped[Tensor, " batch *cut"]) -> Float[Tensor, " batch *upper"]:
        """Return the features of a smashed batch, and keep the graph for :meth:`finish`."""
        self._training()
        self._waiting = self.received(smashed)
        self._features: Tensor = self.module(self._waiting)
        sent: Tensor = self._features.detach().cpu()
        return sent

    def finish(self, gradient: Shaped[Tensor, " batch *upper"]) -> Float[Tensor, " batch *cut"]:
        """Train on the batch that waits.

        Args:
            gradient: dL/d(features), from the node.

        Returns:
            dL/d(smashed), as it may be sent.

        Raises:
            UnfitBatchError: If the gradient has another shape or type than the features.
        """
        if (gradient.shape, gradient.dtype) != (self._features.shape, self._features.dtype):
            raise UnfitBatchError(
                f"a gradient of {tuple(gradient.shape)} {gradient.dtype} came for features of "
                f"{tuple(self._features.shape)} {self._features.dtype}"
            )
        self.backward(self._features, gradient.to(self._device))
        self.step()
        return self.protected(_gradient(self._waiting))

    def features(self, smashed: Shaped[Tensor, " batch *cut"]) -> Float[Tensor, " batch *upper"]:
        """Return the features of a smashed batch without training."""
        self.module.eval()
        with torch.no_grad():
            made: Tensor = self.module(self.received(smashed).clone())
        return made.cpu()


def _gradient(received: Tensor) -> Tensor:
    return received.grad if received.grad is not None else torch.zeros_like(received)
