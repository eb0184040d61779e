"""What a weight update says, and what dummy images and labels would have said instead.

The server holds the weights it sent and those it got back; their difference is, for plain SGD, the
node's gradient times an unknown learning rate. From dummy images and soft labels it computes the
gradient they would have caused at the same weights.

Source: Zhu, Liu, Han, *Deep Leakage from Gradients*, NeurIPS 2019,
https://arxiv.org/abs/1906.08935; labels from the last bias: Zhao, Mopuri, Bilen, *iDLG: Improved
Deep Leakage from Gradients*, 2020, https://arxiv.org/abs/2001.02610.

Departures:
- The last bias stands for iDLG's last weights: it needs no activation of a known sign.
- BatchNorm takes the statistics of the dummies, as the victim trained on those of its batch; with
  several local steps, the dummies are dealt out to the steps in order.
- Weights that the victim did not train come with its buffers: their gradient is not matched.
- The network is any module that can be called; it need not be one that can be cut. An earlier
  version (until 2026-11-29) refused every network that was no ``nn.Sequential`` and named no
  ``stages``.
- What else differs between training and evaluation (dropout) is refused: nobody can repeat it.
"""

from collections.abc import Mapping, Sequence
from copy import deepcopy
from dataclasses import dataclass
from math import prod
from typing import NamedTuple

import torch
from jaxtyping import Float, Int
from torch import Tensor, nn
from torch.func import functional_call, grad, replace_all_batch_norm_modules_
from torch.nn.functional import one_hot

from attacks.building_blocks.stacked_networks import one_line_of_vmap
from leakbed.contracts import MissingKnowledgeError, UnfitViewError, View
from leakbed.models import Architecture, weights_as_run
from leakbed.seeds import generator, scoped

Weights = Mapping[str, Tensor]
"""One tensor per weight, by name; gradients and differences of weights have the same form."""


PRECISION = torch.float64  # in float32 2 more of 16 random starts got lost
BATCH_NORMS = (nn.BatchNorm1d, nn.BatchNorm2d, nn.BatchNorm3d, nn.SyncBatchNorm)


class Clues(NamedTuple):
    """What the adversary computes with; the leading axis of every tensor is the target.

    A tuple, so that ``torch.func.vmap`` hands a function the clues about one target.

    Attributes:
        weights: Those each victim started from.
        update: The weights it started from less those it sent.
        labels: One-hot; no columns where they are to be inferred.
        rounding: How far rounding moved the weights that were sent, about: a quarter of their
            spacing.
    """

    weights: Weights
    update: Weights
    labels: Tensor
    rounding: Weights

    @property
    def last(self) -> Float[Tensor, " targets classes *features"]:
        """The update of the last tensor, in most networks a bias.

        Of a bias it is the learning rate times the mean of (prediction - label).
        """
        return list(self.update.values())[-1]

    def of(self, targets: Int[Tensor, " some"]) -> "Clues":
        """Return the clues about some targets, in that order."""
        return Clues(
            weights={name: tensor[targets] for name, tensor in self.weights.items()},
            update={name: tensor[targets] for name, tensor in self.update.items()},
            labels=self.labels[targets],
            rounding={name: tensor[targets] for name, tensor in self.rounding.items()},
        )


def clues(view: View, *, labels: str) -> Clues:
    """Read a view.

    Args:
        view: With ``before`` and ``after``, and ``labels`` if they are given.
        labels: ``"inferred"``, ``"analytic"`` or ``"given"``.

    Returns:
        The same, as the attacks compute with it.

    Raises:
        MissingKnowledgeError: The view lacks weights.
    """
    if view.before is None or view.after is None:
        raise MissingKnowledgeError(
            "the view holds no weights before and after training; this attack reads FedAvg updates"
        )
    names = list(view.before)
    if view.architecture is not None:  # in the order of their use, so that the last one is the last
        run = weights_as_run(view.architecture.build(0), view.image_shape)
        names.sort(key=run.index)
    weights = {name: view.before[name].to(PRECISION) for name in names}
    update = {name: tensor - view.after[name].to(PRECISION) for name, tensor in weights.items()}
    return Clues(
        weights=weights,
        update=update,
        labels=_labels(view, update, labels=labels),
        rounding={
            name: tensor.abs().to(PRECISION) * (torch.finfo(tensor.dtype).eps / 4)
            for name, tensor in view.after.items()
        },
    )


def check_last_bias(view: View, *, setting: str, instead: str) -> None:
    """Refuse to read a last bias that the victim did not train.

    Args:
        view: What the attack is given.
        setting: What reads it, for the message.
        instead: What to use, likewise.

    Raises:
        UnfitViewError: The network's last weights are frozen, or are not those of the layer whose
            outputs are the scores.
    """
    if view.architecture is None:
        return
    network = view.architecture.build(0)
    last = weights_as_run(network, view.image_shape)[-1]
    if not network.get_parameter(last).requires_grad:
        raise UnfitViewError(
            f"{setting} reads the update of the last layer, and its {last!r} is not trained; "
            f"use {instead}"
        )
    if not isinstance(network, nn.Sequential) and not _scores_with(network, last, view):
        raise UnfitViewError(
            f"{setting} reads the update of the layer whose outputs are the scores, and those of "
            f"{view.architecture.name!r} are not what its last layer, of {last!r}, returns; use "
            f"{instead}"
        )


def _scores_with(network: nn.Module, last: str, view: View) -> bool:
    """Say whether a network returns what its layer of some name does, but for a log-softmax."""
    layer = network.eval().get_submodule(last.rpartition(".")[0])
    made: list[Tensor] = []
    hook = layer.register_forward_hook(lambda *call: made.append(call[2]))
    with torch.no_grad():
        scores = network(torch.rand(2, *view.image_shape, generator=generator(0)))
    hook.remove()
    if not made or made[-1].shape != scores.shape:
        return False
    return torch.allclose(made[-1].log_softmax(-1), scores.log_softmax(-1), atol=1e-6)


def _labels(view: View, update: Weights, *, labels: str) -> Float[Tensor, " targets rows known"]:
    """Return the labels the adversary need not search for, one-hot."""
    if labels == "inferred":
        return torch.empty(view.targets, view.rows, 0, device=view.device, dtype=PRECISION)
    if labels == "given":
        if view.labels is None:
            raise MissingKnowledgeError("labels = 'given', but the view holds none")
        return one_hot(view.labels, view.num_classes).to(PRECISION)
    check_last_bias(view, setting="labels = 'analytic'", instead="'inferred'")
    last = list(update.values())[-1]
    if view.rows != 1 or last.shape[1:] != (view.num_classes,):
        raise UnfitViewError(
            f"labels = 'analytic' needs one sample per update, not {view.rows}, and a last bias of "
            f"{view.num_classes} entries, not of shape {tuple(last.shape[1:])}; use 'inferred'"
        )
    # Only the true class has a negative entry of prediction - label (iDLG, equation 3).
    return one_hot(last.argmin(-1, keepdim=True), view.num_classes).to(PRECISION)


@dataclass(frozen=True, kw_only=True, eq=False)
class Dummies:
    """How the dummy images and labels of one target lie in a point of the search.

    Attributes:
        network: Any module that makes class scores of images, with the victims' buffers, computing
            as in training; its weights are not read.
        image_shape: Channels, height, width.
        rows: Samples behind a target.
        num_classes: Number of labels.
        batches: How many passes the rows take through the network; matters to BatchNorm alone.
        start: Mean and spread of each channel of what a search starts from: of what the network is
            fed they are 0 and 1.
    """

    network: nn.Module
    image_shape: tuple[int, int, int]
    rows: int
    num_classes: int
    batches: int = 1
    start: tuple[Sequence[float], Sequence[float]] | None = None

    @classmethod
    def of(cls, view: View) -> "Dummies":
        """Return the dummies of a view.

        A layer that in training computes what no dummy can repeat is an :class:`UnfitViewError`.

        Args:
            view: With ``architecture``; its buffers are those of every target.

        Returns:
            Their layout and the network they pass through.

        Raises:
            MissingKnowledgeError: The view lacks the architecture.
            UnfitViewError: Under BatchNorm, the last step had a smaller batch.
        """
        if view.architecture is None:
            raise MissingKnowledgeError(
                "the view holds no architecture; dummies need a network to cause a gradient in"
            )
        network = view.architecture.build(0).eval()  # stream 0: these weights are never read
        network.load_state_dict(dict(view.buffers or {}), strict=False)
        network = network.to(device=view.device, dtype=PRECISION)
        normalises = any(isinstance(layer, BATCH_NORMS) for layer in network.modules())
        batches = view.local_steps if normalises else 1
        if view.rows % batches:
            raise UnfitViewError(
                f"{view.rows} samples in {batches} steps leave a smaller batch, whose BatchNorm "
                "statistics no even dealing repeats; set protocol.local_steps"
            )
        replace_all_batch_norm_modules_(network)  # without running statistics: those of the batch
        _check_training(network, view, rows=max(view.rows // batches, 1))
        return cls(
            network=network,
            image_shape=view.image_shape,
            rows=view.rows,
            num_classes=view.num_classes,
            batches=batches,
            start=_start(view.architecture),
        )

    @property
    def sizes(self) -> tuple[int, int]:
        """Where in a point the pixels end, and where the label scores after them end."""
        pixels = self.rows * prod(self.image_shape)
        return pixels, pixels + self.rows * self.num_classes

    def images(self, point: Float[Tensor, " *stack size"]) -> Float[Tensor, " *stack rows c h w"]:
        """Return the dummy images of a point, or of each of a stack.

        Args:
            point: Pixels, label scores, other unknowns.

        Returns:
            Any range, as the search is not bound to [0, 1].
        """
        images: Tensor = point[..., : self.sizes[0]].unflatten(-1, (self.rows, *self.image_shape))
        return images

    def soft_labels(
        self, point: Float[Tensor, " *stack size"], clues: Clues
    ) -> Float[Tensor, " *stack rows classes"]:
        """Return the known labels, else the dummy ones of a point, or of each of a stack.

        Args:
            point: Pixels, label scores, other unknowns.
            clues: About the same target or targets.

        Returns:
            Rows that sum to 1.
        """
        if clues.labels.shape[-1]:
            return clues.labels
        pixels, size = self.sizes
        scores: Tensor = point[..., pixels:size].unflatten(-1, (self.rows, self.num_classes))
        return scores.softmax(-1)

    def draw(self, stream: int) -> Float[Tensor, " size"]:
        """Return random dummies: inputs of the network and label scores from N(0, 1).

        Args:
            stream: Seed of the draw.

        Returns:
            A point without other unknowns, on the CPU.
        """
        point = torch.randn(self.sizes[1], generator=generator(stream), dtype=PRECISION)
        if self.start is not None:
            mean, std = (torch.tensor(each, dtype=PRECISION).view(-1, 1, 1) for each in self.start)
            point[: self.sizes[0]] = (self.images(point) * std + mean).flatten()
        return point

    def gradient(self, point: Float[Tensor, " size"], clues: Clues) -> dict[str, Tensor]:
        """Return the gradient one target's dummies cause.

        Args:
            point: Pixels, label scores, other unknowns.
            clues: About this target alone, without the leading axis.

        Returns:
            One tensor per weight, by name.
        """
        labels = self.soft_labels(point, clues)
        with one_line_of_vmap():
            gradient: dict[str, Tensor] = grad(self._loss)(
                dict(clues.weights), self.images(point), labels
            )
        return gradient

    def _loss(
        self,
        weights: dict[str, Tensor],
        images: Float[Tensor, " rows channels height width"],
        labels: Float[Tensor, " rows classes"],
    ) -> Float[Tensor, ""]:
        """Return the mean cross-entropy between soft labels and predictions."""
        batches = images.chunk(self.batches)
        logits = torch.cat([functional_call(self.network, weights, (each,)) for each in batches])
        return -(labels * logits.log_softmax(-1)).sum(-1).mean()


def _start(architecture: Architecture) -> tuple[Sequence[float], Sequence[float]] | None:
    """Return where pixels start, so that what a network is fed starts from N(0, 1)."""
    if architecture.mean is None or architecture.std is None:
        return None
    return architecture.mean, architecture.std


def _check_training(network: nn.Module, view: View, *, rows: int) -> None:
    """Refuse a network that does something else in training than it does here, by layers if any."""
    noise = torch.rand(rows, *view.image_shape, generator=generator(0), dtype=PRECISION)
    here = noise.to(view.device)
    for name, layer in _named_steps(network):
        try:
            with torch.no_grad(), scoped(0):  # two streams: random draws differ in any mode
                trained = deepcopy(layer).train()(here.clone())
            with torch.no_grad(), scoped(1):
                here = deepcopy(layer)(here.clone())
        except ValueError as error:
            raise UnfitViewError(
                f"{name} cannot have trained on batches of {rows}: {error}"
            ) from error
        except RuntimeError as error:
            if "dtype" not in str(error) and "type" not in str(error):
                raise
            raise UnfitViewError(
                f"{name} cannot compute in float64, in which this attack searches, after a cast "
                f"below it: {' '.join(str(error).split())}; leave casts out of the network"
            ) from error
        if not torch.allclose(trained, here, equal_nan=True):
            raise UnfitViewError(
                f"{name} computes something else in training than dummies can: by random draws "
                "that only the victim knows, or by statistics of its own; attack an architecture "
                "without it"
            )


def _named_steps(network: nn.Module) -> list[tuple[str, nn.Module]]:
    """Return what runs one after another, in words: layers, or a module that hides its own."""
    if isinstance(network, nn.Sequential):
        return [(f"layer {at} ({type(each).__name__})", each) for at, each in enumerate(network)]
    layers = [type(each).__name__ for each in network.modules() if each is not network]
    kinds = {each for each in layers if "Drop" in each}
    inside = f", with {', '.join(sorted(kinds))} inside," if kinds else ""
    return [(f"{type(network).__name__}{inside}", network)]
