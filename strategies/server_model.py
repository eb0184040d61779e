"""The server's part of a split model in training: a top with its loss, or a middle without one.

**Defended steps** of the top need each sample's own gradient. Opacus's hooks see every layer's
backward pass and leave each sample's gradient beside the batch's; what the defence makes of them is
what the optimiser steps with. The gradient of what the top received is none of their business: it
leaves as it is.
"""

from collections.abc import Callable, Sequence
from typing import Any, ClassVar, NamedTuple

import torch
from flwr.app import ArrayRecord
from jaxtyping import Float, Int, Shaped
from torch import Tensor, nn

from leakbed.contracts import Defense, IllegalCombinationError, Protects, select
from leakbed.contracts.gradient_defenses import GradientDefenses, Horizon, Origin
from leakbed.contracts.hooks import refuse_uncalled
from leakbed.models.cutting import guarded
from leakbed.seeds import derive
from leakbed.tensors import load, placed, predicted


class PrivateSteps:
    """The defence of a top's steps, with its state."""

    def __init__(
        self, module: nn.Module, defense: Defense, *, stream: int, protocol: str = "the protocol"
    ) -> None:
        """Hook into the module.

        Args:
            module: The top; its batches' losses are means.
            defense: Of its steps.
            stream: The secret seed of its noise.
            protocol: Who takes the steps, for errors.

        Raises:
            IllegalCombinationError: If samples of a batch do not have gradients of their own.
        """
        from opacus.grad_sample import GradSampleModule  # noqa: PLC0415  seconds that few runs need
        from opacus.validators import ModuleValidator  # noqa: PLC0415

        if errors := ModuleValidator.validate(module, strict=False):
            raise IllegalCombinationError(
                f"{defense.name} needs each sample's own gradient, which this top does not have: "
                f"{'; '.join(map(str, errors))}; cut above that layer, or use another network"
            )
        self._module = module
        self._hooks = GradSampleModule(module, batch_first=True, loss_reduction="mean")
        self._defense, self._state = defense, defense.begin(stream)
        self._horizon = Horizon(defense, protocol=protocol, unit="step")

    @classmethod
    def of(
        cls,
        module: nn.Module,
        defenses: Sequence[Defense],
        *,
        stream: int,
        protocol: str = "the protocol",
    ) -> "PrivateSteps | None":
        """Return the steps of a top; None where no defence changes them.

        Args:
            module: The top.
            defenses: All of the server's.
            stream: The secret seed of their noise.
            protocol: Who takes the steps, for errors.

        Returns:
            Hooked into the module.

        Raises:
            IllegalCombinationError: If there are several, or samples have no gradients of their
                own.
        """
        chosen = select(defenses, Protects.TOP)
        if len(chosen) > 1:
            names = " and ".join(defense.name for defense in chosen)
            raise IllegalCombinationError(f"{names} all change the top's steps; keep one of them")
        # A stream of its own: the same defences' messages have noise from theirs.
        own = derive(stream, "top")
        return cls(module, chosen[0], stream=own, protocol=protocol) if chosen else None

    def replace_gradients(self, origins: Sequence[Origin | None] = (None,)) -> None:
        """Put what the defence makes of the samples' gradients in the place of the batch's.

        A step that the defence's claim does not cover is a
        :class:`~leakbed.contracts.gradient_defenses.HorizonError`.

        Args:
            origins: Of the batches that the step is taken on.
        """
        self._horizon.step(origins)
        # Any: opacus hangs its own attribute on parameters.
        weights: dict[str, Any] = {
            name: each for name, each in self._module.named_parameters() if each.requires_grad
        }
        samples = {name: weight.grad_sample for name, weight in weights.items()}
        state, made = self._defense.protect_weight_gradients(self._state, samples)
        self._state = state.next()
        for name, weight in weights.items():
            weight.grad, weight.grad_sample = made[name], None


def refuse_private_copies(defenses: Sequence[Defense]) -> None:
    """Refuse defences of a top's steps where every node has a top of its own.

    Args:
        defenses: All of the server's.

    Raises:
        IllegalCombinationError: If there is one.
    """
    for defense in defenses:
        if Protects.TOP in defense.protects:
            raise IllegalCombinationError(
                f"{defense.name} makes the steps of one top private, but here every node has a "
                "copy of its own; use 'vanilla-split', 'parallel-split' or 'splitfed-v2'"
            )


class UnfitBatchError(ValueError):
    """A smashed batch, or its labels, that the server's part of the model cannot read.

    Attributes:
        row: The first such row, of all that were trained on together.
    """

    def __init__(self, message: str, *, row: int = 0) -> None:
        """Say what does not fit, and where."""
        super().__init__(message)
        self.row = row


class Labelled(NamedTuple):
    """What a server that holds the loss trains on.

    Attributes:
        smashed: One row per sample.
        labels: Of the rows.
        origin: Which batch of whose rows it is; None where that is not known.
    """

    smashed: Tensor
    labels: Tensor
    origin: Origin | None = None


def shares_of_rows(rows: Sequence[int]) -> list[float]:
    """Return what share of the rows that are trained on together each node has.

    The one weight between a loss over all rows and a node's own: the gradient of the mean over all
    rows is a node's own mean's times its share. Whoever scales gradients, adds them up, or weighs a
    node's own penalty against them takes it from here.

    Args:
        rows: Of each node.

    Returns:
        Shares that sum to 1, by node.
    """
    return [each / sum(rows) for each in rows]


class ServerPart:
    """Weights, optimiser and the defences of the cut gradient; what every server part has.

    Attributes:
        applies: What the defences it is given may protect.
    """

    applies: ClassVar[frozenset[Protects]] = frozenset({Protects.CUT_GRADIENT})

    def __init__(
        self,
        module: nn.Module,
        optimiser: torch.optim.Optimizer,
        *,
        defenses: tuple[Defense, ...] = (),
        defense_stream: int = 0,
        protocol: str = "the protocol",
        passes: int = 1,
    ) -> None:
        """Take the module.

        Args:
            module: Trained in place. Where its first layer may write to what it is given, it gets
                a copy: :func:`~leakbed.models.cutting.guarded`.
            optimiser: Over its parameters.
            defenses: Those of the cut gradient are applied, in order, to each before it is sent;
                a top's steps may be defended as well.
            defense_stream: The secret seed of their noise.
            protocol: Who trains it, for errors.
            passes: In how many batches a node's row is, at most, in the whole run.

        Raises:
            IllegalCombinationError: If one protects nothing that this part could. One with a hook
                that nobody would call is an :class:`~leakbed.contracts.hooks.UncalledHookError`.
        """
        for defense in defenses:
            refuse_uncalled(type(defense))
            if not defense.protects & self.applies:
                raise IllegalCombinationError(
                    f"{defense.name} protects {', '.join(sorted(defense.protects))}, which is not "
                    f"for a {type(self).__name__} to do; give it to whoever sends that"
                )
        self.module = guarded(module)
        self._optimizer = optimiser
        self._fresh = optimiser.state_dict()
        sent = select(defenses, Protects.CUT_GRADIENT)
        self._defenses = GradientDefenses(
            sent, stream=defense_stream, protocol=protocol, passes=passes
        )
        self._private = PrivateSteps.of(module, defenses, stream=defense_stream, protocol=protocol)
        first = next(module.parameters(), torch.empty(0))
        self._device, self._dtype = first.device, first.dtype
        self.numbers = torch.empty(0, dtype=first.dtype).numpy().dtype  # as they travel

    def load(self, arrays: ArrayRecord) -> None:
        """Take weights and buffers from a Flower record."""
        load(self.module, arrays.to_torch_state_dict())

    def arrays(self) -> ArrayRecord:
        """Return the weights and buffers as a Flower record."""
        state = {name: value.detach().cpu() for name, value in self.module.state_dict().items()}
        return ArrayRecord(state)

    def forget(self) -> None:
        """Drop the optimiser's momenta and step counts, as at the start."""
        self._optimizer.load_state_dict(self._fresh)

    def protected(
        self,
        gradient: Float[Tensor, " batch *cut"],
        labels: Int[Tensor, " batch"] | None = None,
        origin: Origin | None = None,
    ) -> Float[Tensor, " batch *cut"]:
        """Return a cut gradient on the CPU as it may be sent.

        Args:
            gradient: dL/d(smashed).
            labels: Of its rows, where this part has them.
            origin: Which batch it is of; claims of privacy are counted by it.

        Returns:
            It, changed by every defence in turn.
        """
        return self._defenses.protect(gradient.cpu(), labels, origin)

    def received(self, smashed: Shaped[Tensor, " batch *cut"]) -> Float[Tensor, " batch *cut"]:
        """Return a smashed batch as a leaf that takes a gradient.

        One of another type than the weights is an :class:`UnfitBatchError`.

        Args:
            smashed: As received; never written to.

        Returns:
            It, on this part's device.
        """
        self._check_type(smashed)
        return placed(smashed, self._device).detach().requires_grad_()

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
        self._optimizer.step()

    def backward(self, output: Tensor, gradient: Tensor | None = None) -> None:
        """Fill the gradients of this part's weights and of what it received."""
        self._optimizer.zero_grad()
        output.backward(gradient)


class TopTrainer(ServerPart):
    """The top with the loss: for protocols whose labels are at the server."""

    applies = ServerPart.applies | {Protects.TOP}

    def train(
        self,
        smashed: Shaped[Tensor, " batch *cut"],
        labels: Int[Tensor, " labels"],
        origin: Origin | None = None,
    ) -> Float[Tensor, " batch *cut"]:
        """Train on one smashed batch: ``part.train(*batch.labelled)``.

        Args:
            smashed: As received.
            labels: Its labels.
            origin: Which batch it is; claims of privacy are counted by it.

        Returns:
            dL/d(smashed), with L the mean cross-entropy of the batch, as it may be sent.
        """
        received = self.received(smashed)
        self._descend(received, labels, [origin])
        return self.protected(_gradient(received), labels, origin)

    def train_jointly(
        self, batches: Sequence[Labelled | tuple[Tensor, Tensor]], *, own_mean: bool = False
    ) -> list[Tensor]:
        """Train on several nodes' batches at once, as on one batch of all their rows.

        Args:
            batches: Smashed rows, their labels and whose they are, by node.
            own_mean: Whether each node is sent the gradient of the mean of its own rows' losses.

        Returns:
            dL/d(smashed) of each, with L the mean cross-entropy of *all* rows, or of its own.
        """
        known = [Labelled(*batch) for batch in batches]
        sizes = [len(batch.smashed) for batch in known]
        for place, batch in enumerate(known):
            self._check_type(batch.smashed, row=sum(sizes[:place]))
        received = self.received(torch.cat([batch.smashed for batch in known]))
        labels = torch.cat([batch.labels for batch in known])
        self._descend(received, labels, [batch.origin for batch in known])
        parts = _gradient(received).split(sizes)
        if own_mean:
            shares = shares_of_rows(sizes)
            parts = tuple(part / share for part, share in zip(parts, shares, strict=True))
        pairs = zip(parts, known, strict=True)
        return [self.protected(part, batch.labels, batch.origin) for part, batch in pairs]

    def train_merged(
        self,
        received: Sequence[Tensor],
        labels: Int[Tensor, " labels"],
        *,
        merge: Callable[[Sequence[Tensor]], Tensor],
        origin: Origin | None = None,
    ) -> list[Tensor]:
        """Train on one batch whose rows several parties hold parts of.

        Args:
            received: Each party's smashed batch, from :meth:`received`.
            labels: Of the rows.
            merge: Makes one smashed batch of them all, which the top does not write to.
            origin: Of the rows, the same for all parties; each is sent a gradient of them.

        Returns:
            dL/d(smashed) of each party, as it may be sent.
        """
        self._descend(merge(received), labels, [origin])
        return [self.protected(_gradient(each), labels, origin) for each in received]

    def predict(self, smashed: Shaped[Tensor, " batch *cut"]) -> Int[Tensor, " batch"]:
        """Return the predicted label of each smashed row; -1 where the logits are not finite."""
        self.module.eval()
        with torch.no_grad():
            logits: Tensor = self.module(self.received(smashed))
        return predicted(logits).cpu()

    def _descend(
        self,
        received: Float[Tensor, " batch *cut"],
        labels: Int[Tensor, " labels"],
        origins: Sequence[Origin | None],
    ) -> None:
        self._training()
        try:
            logits: Tensor = self.module(received)
        except ValueError as error:  # such as BatchNorm's, of a batch of one row
            raise UnfitBatchError(f"the top cannot train on this batch: {error}") from error
        rows, classes = logits.shape
        least, most = labels.aminmax()
        if labels.shape[0] != rows or not 0 <= least.item() <= most.item() < classes:
            illegal = (labels < 0) | (labels >= classes)
            raise UnfitBatchError(
                f"{len(labels)} labels from {labels.min()} to {labels.max()} came with "
                f"{len(received)} smashed rows of a model with {classes} classes",
                row=int(illegal.int().argmax()),
            )
        self.backward(nn.functional.cross_entropy(logits, placed(labels, logits.device)))
        if self._private is not None:
            self._private.replace_gradients(origins)
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
        self.backward(self._features, placed(gradient, self._device))
        self.step()
        return self.protected(_gradient(self._waiting))

    def features(self, smashed: Shaped[Tensor, " batch *cut"]) -> Float[Tensor, " batch *upper"]:
        """Return the features of a smashed batch without training."""
        self.module.eval()
        with torch.no_grad():
            made: Tensor = self.module(self.received(smashed))
        return made.cpu()


def _gradient(received: Tensor) -> Tensor:
    return received.grad if received.grad is not None else torch.zeros_like(received)
