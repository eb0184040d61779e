"""The adversary's own images: which it may use, and in which order it trains on them.

Images that differ from the client's in number, shape or range are refused before training: the
critic of a hijack would tell the two apart by that alone.
"""

import torch
from jaxtyping import Float, Int
from torch import Tensor

from leakbed.contracts import MissingKnowledgeError, UnfitViewError, View
from leakbed.seeds import generator
from leakbed.tensors import placed


class BatchSampler:
    """Public images in batches: each once, in random order, then again in another.

    Attributes:
        images: All of them, as the view has them.
    """

    def __init__(self, images: Float[Tensor, " public *image"], *, stream: int) -> None:
        """Begin before the first image.

        Args:
            images: Never changed.
            stream: Fixes the orders.
        """
        self.images = images
        self._generator = generator(stream)
        self._order: Int[Tensor, " public"] = torch.empty(0, dtype=torch.long)

    def batch(self, rows: int) -> Float[Tensor, " rows *image"]:
        """Return the next images, in [-1, 1]; as a copy, as many as :meth:`places` gives."""
        return self.images[self.places(rows)].mul(2).sub(1)

    def places(self, rows: int) -> Int[Tensor, " rows"]:
        """Say where the next images lie; the last few before a new order are left out.

        Args:
            rows: How many; more than there are is an :class:`UnfitViewError`.

        Returns:
            Indices into ``images``, where they lie.
        """
        check_rows(self.images, rows)
        if len(self._order) < rows:
            order = torch.randperm(len(self.images), generator=self._generator)
            self._order = placed(order, self.images.device)
        chosen, self._order = self._order[:rows], self._order[rows:]
        return chosen

    def like(self, tensor: Float[Tensor, " batch *shape"]) -> Float[Tensor, " batch *shape"]:
        """Return a tensor of the images' type, where they lie."""
        return tensor.detach().to(self.images)


def public_images(
    view: View, *, without_class: int = -1
) -> tuple[Float[Tensor, " public *image"], Int[Tensor, " public"] | None]:
    """Return the images an adversary may use, and their labels where it has them.

    Args:
        view: With ``public_images``, ``image_shape`` and ``rows``.
        without_class: Images of this label are left out; -1 leaves all.

    Returns:
        On the view's device.

    Raises:
        MissingKnowledgeError: If there are none, or no labels to leave a class out by.
        UnfitViewError: If they are of another shape or range than the client's, or too few.
    """
    images, labels = view.public_images, view.public_labels
    if images is None:
        raise MissingKnowledgeError(
            "the attack trains on the adversary's own images and the view has none; give the "
            "adversary a public share of the data"
        )
    if without_class >= 0:
        if labels is None:
            raise MissingKnowledgeError(
                f"without_class = {without_class} needs the public images' labels"
            )
        kept = labels != without_class
        images, labels = images[kept], labels[kept]
    if tuple(images.shape[1:]) != view.image_shape:
        raise UnfitViewError(
            f"public images have shape {tuple(images.shape[1:])}, the client's "
            f"{view.image_shape}; resize them, or choose another public set"
        )
    check_rows(images, view.rows)
    least, most = (float(bound) for bound in images.aminmax())
    if not 0 <= least <= most <= 1:
        raise UnfitViewError(
            f"public pixels lie between {least:.4g} and {most:.4g}; scale them to [0, 1]"
        )
    device = view.device
    return images.detach().to(device), None if labels is None else labels.to(device)


def check_rows(images: Float[Tensor, " public *image"], rows: int) -> None:
    """Refuse a public set that cannot fill a batch.

    Args:
        images: All of it.
        rows: Size of the private batch.

    Raises:
        UnfitViewError: If there are fewer images.
    """
    if rows > len(images):
        raise UnfitViewError(
            f"{len(images)} public images cannot fill a batch as large as the private one, which "
            f"has {rows}; give the adversary more, or lower protocol.batch_size"
        )
