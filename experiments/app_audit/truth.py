"""The answer key of an app that somebody else wrote, from the data that its owner has.

Whoever audits an app owns its data. A function of theirs returns what the node of a partition fed
its network, and from that an :class:`~leakbed.oracle.truth.AnswerKey` is made for a trace::

    def truth(partition: int) -> tuple[Tensor, Tensor]:     # or (partition, round), or a DataLoader
        return images, labels                               # in the order in which they were fed

Images are as the network was fed them. Where the app normalises, ``mean`` and ``std`` of the
trace's ``about`` say how, and the key holds the pictures in [0, 1] that they were made from.
"""

import inspect
from collections.abc import Callable, Iterable, Mapping
from hashlib import sha256
from pathlib import Path
from typing import Any

import torch
from jaxtyping import Float, Int
from torch import Tensor

from experiments.run.view import architecture_of
from leakbed.events import UpdateUp
from leakbed.lookup import ImportPathError, format_error, import_object
from leakbed.models import Architecture
from leakbed.oracle.truth import AnswerKey
from leakbed.tap.trace import Trace

Fed = tuple[Float[Tensor, " rows channels height width"], Int[Tensor, " rows"]]
"""Images and labels in the order in which a network was fed them."""

_NEAR = 1e-3  # how far rounding may take pixels out of [0, 1]
_IMAGE_AXES = 4


class OwnedTruthError(ValueError):
    """A truth that cannot be that of a trace; the message says which node's and why."""


def made_answers(path: str, trace: Trace, folder: Path) -> tuple[AnswerKey, Path]:
    """Make the answer key of a trace from its owner's data, and write it.

    Args:
        path: ``package.module:function``.
        trace: With an ``architecture``; its updates are what is answered for.
        folder: Where the key goes, readable by its owner only.

    Returns:
        The key and the folder.

    Raises:
        OwnedTruthError: The data cannot be those that the trace's updates were made from.
    """
    function = _function(path)
    counts = {(e.node, e.round): e.examples for e in trace.events(UpdateUp)}  # type: ignore[attr-defined]
    if not counts:
        raise OwnedTruthError("the trace holds no updates, and --truth answers for nothing else")
    partitions = _partitions(trace.about, sorted({node for node, _ in counts}))
    fed = {
        place: _called(function, path, partitions[place[0]], place[1]) for place in sorted(counts)
    }
    for (node, round_), (images, _) in fed.items():
        expected = counts[node, round_]
        if expected is not None and expected != len(images):
            raise OwnedTruthError(
                f"{path}({partitions[node]}) returned {len(images)} samples, and node {node} said "
                f"in round {round_} that it trained on {expected}; return those it was fed in that "
                "round, or take the round as a second argument"
            )
    key = answers_of(fed, architecture_of(trace.about))
    key.write(folder, trace=trace.folder)
    return key, folder


def answers_of(fed: Mapping[tuple[int, int], Fed], architecture: Architecture) -> AnswerKey:
    """Return the answer key of what nodes were fed; a sample that comes again is one row of it.

    A second copy among the candidates would make both unidentifiable, whatever the guess.

    Args:
        fed: By node and round.
        architecture: Of the network, which says what was made of pictures before.

    Returns:
        A key without test images and without images of the adversary.

    Raises:
        OwnedTruthError: The images are not such pictures.
    """
    images, labels, order = [], [], {}
    places: dict[tuple[bytes, int], int] = {}  # of each sample, by digest of its pixels and label
    for (node, round_), (each, named) in fed.items():
        shown, rows, new = pictures(each, architecture), [], []
        for row, (picture, label) in enumerate(zip(shown, named.tolist(), strict=True)):
            sample = sha256(picture.detach().cpu().numpy().tobytes()).digest(), label
            if sample not in places:
                places[sample] = len(places)
                new.append(row)
            rows.append(places[sample])
        images.append(shown[new])
        labels.append(named[new])
        order[node, round_, 0] = rows
    whole, named = torch.cat(images), torch.cat(labels)
    if len(named) and not 0 <= int(named.min()) <= int(named.max()) < architecture.num_classes:
        raise OwnedTruthError(
            f"labels go from {int(named.min())} to {int(named.max())}, and the run has "
            f"num_classes = {architecture.num_classes}"
        )
    return AnswerKey(
        images=whole,
        labels=named,
        test_images=whole[:0],
        test_labels=named[:0],
        order=order,
        num_classes=architecture.num_classes,
        public_images=whole[:0],
        public_labels=named[:0],
    )


def pictures(fed: Float[Tensor, " rows c h w"], architecture: Architecture) -> Tensor:
    """Return the pictures in [0, 1] that what a network was fed was made from.

    Args:
        fed: By its app.
        architecture: Says with which mean and spread they were normalised, if at all.

    Returns:
        In float32.

    Raises:
        OwnedTruthError: They have another shape, or do not lie in [0, 1].
    """
    if tuple(fed.shape[1:]) != architecture.image_shape:
        raise OwnedTruthError(
            f"images have shape {tuple(fed.shape[1:])}, and the run has image_shape = "
            f"{architecture.image_shape}"
        )
    made = fed.float()
    if architecture.mean is not None and architecture.std is not None:
        mean, std = (torch.tensor(e).view(-1, 1, 1) for e in (architecture.mean, architecture.std))
        made = made * std + mean
    low, high = float(made.min()), float(made.max())
    if low < -_NEAR or high > 1 + _NEAR:
        raise OwnedTruthError(
            f"pixels lie between {low:.3g} and {high:.3g}, not in [0, 1]; say what the app made of "
            "them with --about mean=[...] --about std=[...], one number a channel, as its "
            "Normalize has them"
        )
    return made.clamp(0, 1)


def _function(path: str) -> Callable[..., Any]:
    try:
        found = import_object(path)
    except ImportPathError as error:
        raise OwnedTruthError(f"truth: {error}") from error
    if not callable(found):
        raise OwnedTruthError(f"truth {path!r} is a {type(found).__name__}; name a function")
    return found


def _partitions(about: Mapping[str, Any], nodes: list[int]) -> dict[int, int]:
    """Return the partition of each node, which no message says."""
    said = {
        int(node): int(partition) for node, partition in (about.get("partitions") or {}).items()
    }
    if not said and nodes == list(range(1, len(nodes) + 1)):
        return {node: node - 1 for node in nodes}  # as grids of our own number them
    if missing := [node for node in nodes if node not in said]:
        raise OwnedTruthError(
            f"nothing says which partition node {missing[0]} holds; say it with "
            f"--about 'partitions={{{missing[0]} = 0, ...}}'"
        )
    return said


def _called(function: Callable[..., Any], path: str, partition: int, round_: int) -> Fed:
    """Return what a user's function says of a partition."""
    takes = len(inspect.signature(function).parameters)
    given = (partition, round_)[: max(takes, 1)]
    try:
        found = function(*given)
        images, labels = found if isinstance(found, tuple) else _drained(found)
    except OwnedTruthError:
        raise
    except Exception as error:  # a user's own
        raise OwnedTruthError(f"truth {path}{given} raised {format_error(error)}") from error
    images, labels = torch.as_tensor(images), torch.as_tensor(labels).long()
    if images.ndim != _IMAGE_AXES or labels.shape != images.shape[:1]:
        raise OwnedTruthError(
            f"truth {path}{given} returned images of shape {tuple(images.shape)} and labels of "
            f"shape {tuple(labels.shape)}; return (rows, channels, height, width) and (rows,)"
        )
    return images, labels


def _drained(loader: Iterable[Any]) -> tuple[Tensor, Tensor]:
    """Return all that a loader yields: pairs, or mappings of which one holds images."""
    sampler = getattr(loader, "sampler", None)
    if isinstance(sampler, torch.utils.data.RandomSampler):
        raise OwnedTruthError(
            "the loader shuffles, so it says not in which order its rows were fed; return one with "
            "shuffle=False, or the images and labels as they were fed"
        )
    batches = [_pair(batch) for batch in loader]
    images, labels = zip(*batches, strict=True)
    return torch.cat(images), torch.cat(labels)


def _pair(batch: Any) -> tuple[Tensor, Tensor]:  # noqa: ANN401  of a user's loader
    if not isinstance(batch, Mapping):
        images, labels = batch
        return torch.as_tensor(images), torch.as_tensor(labels)
    tensors = [torch.as_tensor(v) for v in batch.values() if not isinstance(v, str)]
    image = next(each for each in tensors if each.ndim == _IMAGE_AXES)
    return image, next(each for each in tensors if each.ndim == 1)
