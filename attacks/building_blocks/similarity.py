"""What similarity-based label inference reads: one vector for each sample, and a few known labels.

Rows wider than a limit are reduced first, since thousands of samples of 4,096 numbers are a
gigabyte: by an uncentred SVD of the first rows, which keeps what they are made of; by a random
projection, which is fitted to nothing and blurs every angle by a few per cent (at an early cut that
cost the nearest neighbour 15 labels in a hundred, where the SVD cost none); or by the published
centred PCA of all rows, for which the attacker would have to train the same epoch twice.

Source: Liu, Lyu, Cui, Tao, *Similarity-Based Label Inference Attack Against Training and Inference
of Split Learning*, IEEE TIFS 2024, https://arxiv.org/abs/2203.05222, and its code,
https://github.com/ZeroWalker10/sl_similarity_label_inference.
"""

from collections.abc import Iterator
from dataclasses import dataclass

import torch
from jaxtyping import Bool, Float, Int
from threadpoolctl import threadpool_limits
from torch import Tensor, nn

from leakbed.contracts import Evidence, MissingKnowledgeError, Seat, UnfitViewError, View
from leakbed.lookup import unknown_name
from leakbed.seeds import derive, generator

SEATS = ("client", "server")
EVIDENCE = ("cut-gradient", "smashed")
REDUCTIONS = ("svd", "random-projection", "pca", "none")
_CHUNK = 2048
"""Rows handled at once: 34 MB of 4,096 numbers, beside a gigabyte that is never copied."""
_FITTED = 2048
"""First rows that the SVD is fitted to: an attacker has them when training has barely begun."""


@dataclass(frozen=True, kw_only=True, eq=False)
class LabelledRows:
    """Vectors to be told apart, of which a few are labelled.

    Attributes:
        rows: One for each usable target, in their order.
        usable: Targets with a finite vector.
        known: Which of ``rows`` are labelled.
        labels: Their labels.
    """

    rows: Float[Tensor, " usable features"]
    usable: Bool[Tensor, " targets"]
    known: Int[Tensor, " known"]
    labels: Int[Tensor, " known"]

    def spread(self, values: Tensor, *, missing: float) -> Tensor:
        """Return one value per target from one per row; ``missing`` where there is no row."""
        every = values.new_full((len(self.usable),), missing)
        every[self.usable] = values
        return every


@dataclass(frozen=True, kw_only=True)
class SimilaritySettings:
    """Where the vectors come from and how they are compared.

    Attributes:
        seat: The ``"client"`` (a feature party that reads cut gradients, or its own smashed data)
            or the ``"server"`` (upper cut gradients of a U-shaped run, or smashed data).
        evidence: ``"cut-gradient"``, or ``"smashed"``: published for trained models, so use it with
            ``when = "inference"``.
        unified: Compare directions of smashed data too, as the published code does; of cut
            gradients only directions are ever compared.
        partial: Let pass that no label of some class is known; such a class is then never guessed.
        reduction: What rows wider than ``width`` are reduced by: ``"svd"``,
            ``"random-projection"``, ``"pca"`` (published) or ``"none"``.
        width: Numbers kept of each row.
    """

    seat: str = "client"
    evidence: str = "cut-gradient"
    unified: bool = False
    partial: bool = False
    reduction: str = "svd"
    width: int = 512

    def __post_init__(self) -> None:
        """Check the settings.

        Raises:
            ValueError: A setting is none of its legal values.
        """
        if self.seat not in SEATS:
            raise ValueError(unknown_name("seat", self.seat, SEATS))
        if self.evidence not in EVIDENCE:
            raise ValueError(unknown_name("evidence", self.evidence, EVIDENCE))
        if self.reduction not in REDUCTIONS:
            raise ValueError(unknown_name("reduction", self.reduction, REDUCTIONS))
        if self.width < 1:
            raise ValueError(f"width is {self.width}; keep one number of each row or more")

    def party(self) -> Seat:
        """Return who attacks."""
        return Seat(self.seat)

    def reads(self) -> frozenset[Evidence]:
        """Return the one kind of message that is compared."""
        return frozenset({Evidence(self.evidence)})

    def read(self, view: View, *, seed: int, name: str) -> LabelledRows:
        """Return a view's messages as vectors, of which the known ones are labelled.

        Args:
            view: What the attack was given.
            seed: Starts the SVD, or draws the projection.
            name: The attack's own, for errors.

        Returns:
            Vectors of unit length where directions are compared.

        Raises:
            MissingKnowledgeError: The message that is compared is missing.
        """
        gradients = self.evidence == "cut-gradient"
        messages = view.cut_gradient if gradients else view.smashed
        if messages is None:
            raise MissingKnowledgeError(
                f"{name} compares {self.evidence} messages and the view has none; a client reads "
                "cut gradients under protocol.labels = 'server', a server those of 'u-shaped'"
            )
        rows = messages.detach().flatten(1)
        usable = torch.cat([part.isfinite().all(1) for part in rows.split(_CHUNK)])
        kept = rows if bool(usable.all()) else rows[usable]
        if kept.shape[1] > self.width and self.reduction != "none" and len(kept):
            kept = reduced(kept, by=self.reduction, width=self.width, stream=derive(seed, "reduce"))
        if gradients or self.unified:
            kept = nn.functional.normalize(kept, dim=1)
        return labelled(view, kept, usable, name=name, partial=self.partial)


def labelled(
    view: View,
    rows: Float[Tensor, " usable features"],
    usable: Bool[Tensor, " targets"],
    *,
    name: str,
    partial: bool | None = None,
) -> LabelledRows:
    """Return rows with the labels that a view says are known.

    Args:
        view: With ``known_labels``, -1 where a label is not known.
        rows: One for each usable target.
        usable: Which targets those are.
        name: The attack's own, for errors.
        partial: Whether classes without a known label are let pass, where any is known at all; None
            for an attack that never does and has no such setting.

    Returns:
        What the attack works on.

    Raises:
        MissingKnowledgeError: Nothing says which labels are known, or a class has none.
        UnfitViewError: Labels are no classes, belong to the seat anyway, or several samples stand
            behind a message.
    """
    if view.known_labels is None:
        raise MissingKnowledgeError(
            f"{name} needs to be told which labels are known, -1 where none is; the view says "
            "nothing (known_per_class = 0 knows none)"
        )
    if view.labels is not None:
        raise UnfitViewError(
            f"this protocol gives the {view.seat} every label, so {name} has nothing to infer; use "
            "the other seat, or protocol.labels = 'server' or 'client'"
        )
    if view.rows != 1:
        raise UnfitViewError(
            f"{view.rows} samples stand behind each message; {name} compares messages of one "
            "sample, so attack rows at a cut"
        )
    known_labels = view.known_labels.flatten()
    if known_labels.is_floating_point():
        raise UnfitViewError(
            f"known labels are of type {known_labels.dtype}; {name} infers classes, numbered from "
            "0, and not the values of a regression"
        )
    here = known_labels.to(rows.device)[usable]
    known = (here >= 0).nonzero().flatten()
    labels = here[known].long()
    _check_classes(labels, view.num_classes, name=name, partial=partial)
    return LabelledRows(rows=rows, usable=usable, known=known, labels=labels)


def _check_classes(labels: Tensor, num_classes: int, *, name: str, partial: bool | None) -> None:
    """Refuse labels that are no class, and classes of which none is known."""
    if len(labels) and int(labels.max()) >= num_classes:
        raise UnfitViewError(
            f"a known label is {int(labels.max())}, but there are {num_classes} classes, 0 to "
            f"{num_classes - 1}"
        )
    missing = sorted(set(range(num_classes)) - set(labels.tolist()))
    if len(labels) and missing and not partial:
        instead = "" if partial is None else ", or set partial = true"
        raise MissingKnowledgeError(
            f"{name} knows no label of class {', '.join(map(str, missing))}, which it could then "
            f"never guess; attack more targets (the first of each class are known){instead}"
        )


def reduced(
    rows: Float[Tensor, " rows features"], *, by: str, width: int, stream: int
) -> Float[Tensor, " rows width"]:
    """Return narrower rows, made chunk by chunk: the wide ones are never copied whole.

    Args:
        rows: At least one.
        by: A key of ``REDUCTIONS`` but ``"none"``.
        width: Numbers to keep of each row; an SVD and a PCA keep no more than they are fitted to.
        stream: Draws the projection, and starts the SVD.

    Returns:
        As many rows.
    """
    shift = None
    if by == "random-projection":
        noise = torch.randn(rows.shape[1], width, generator=generator(stream))
        axes = noise / width**0.5
    elif by == "svd":
        axes = _svd_axes(rows[:_FITTED], width, stream)
    else:
        axes, shift = _pca_axes(rows, width)
    axes = axes.to(rows)
    narrow = rows.new_empty(len(rows), axes.shape[1])
    for start, part in _chunks(rows):
        centred = part if shift is None else part - shift.to(rows)
        torch.matmul(centred, axes, out=narrow[start : start + len(part)])
    return narrow


def _chunks(rows: Tensor) -> Iterator[tuple[int, Tensor]]:
    return ((start, rows[start : start + _CHUNK]) for start in range(0, len(rows), _CHUNK))


def _svd_axes(rows: Tensor, width: int, stream: int) -> Float[Tensor, " features width"]:
    """Return the directions in which the first rows are largest, their mean not taken away."""
    from sklearn.decomposition import TruncatedSVD  # noqa: PLC0415  a second to import

    fit = TruncatedSVD(min(width, *rows.shape), random_state=stream % 2**32)
    with threadpool_limits(1):  # the same seed, the same bits
        return torch.from_numpy(fit.fit(rows.cpu().numpy()).components_.T.copy())


def _pca_axes(rows: Tensor, width: int) -> tuple[Tensor, Tensor]:
    """Return the directions in which all rows vary most, and their mean."""
    from sklearn.decomposition import IncrementalPCA  # noqa: PLC0415  a second to import

    kept = min(width, len(rows), rows.shape[1])
    fit = IncrementalPCA(kept)
    for start in range(0, len(rows) - kept + 1, max(_CHUNK, kept)):
        end = start + max(_CHUNK, kept)
        last = len(rows) - end < kept  # too few for a part of their own go with this one
        with threadpool_limits(1):
            fit.partial_fit(rows[start : len(rows) if last else end].cpu().numpy())
        if last:
            break
    return torch.from_numpy(fit.components_.T.copy()), torch.from_numpy(fit.mean_)
