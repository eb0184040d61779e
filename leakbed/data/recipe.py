"""A cell's data as settings: what the harness, the nodes and the oracle all derive it from."""

import hashlib
from dataclasses import dataclass, field
from functools import lru_cache
from pathlib import Path
from typing import Any

import torch
from jaxtyping import Float, Int, Shaped
from torch import Tensor

from leakbed.data import Dataset, Split, load, split
from leakbed.data.splitting import ALIGNED
from leakbed.strips import strip


@dataclass(frozen=True, kw_only=True)
class DataRecipe:
    """Everything a cell's private, public and test rows are a function of.

    Attributes:
        name: Data set, as for :func:`leakbed.data.load`.
        nodes: Number of data holders.
        stream: The cell's ``data`` stream.
        root: Folder that holds downloaded sets, or None.
        size: Keep only this many rows; None keeps all.
        image_size: Resize image folders to this side; None refuses mixed sizes.
        partition: Name of the partitioner; ``"aligned"`` gives every node a strip of all rows.
        partition_settings: Its own settings, as pairs.
        public: Share of the rows the adversary owns.
        test: Share of the rows held out for testing; None as for :func:`leakbed.data.split`.
        download: Whether a missing set may be downloaded.
    """

    name: str
    nodes: int
    stream: int
    root: str | None = None
    size: int | None = None
    image_size: int | None = None
    partition: str = "iid"
    partition_settings: tuple[tuple[str, Any], ...] = field(default=())
    public: float = 0.2
    test: float | None = None
    download: bool = False

    def __post_init__(self) -> None:
        """Make the partitioner's settings hashable: lists (of TOML, of JSON) become tuples."""
        settings = tuple((str(key), _hashable(value)) for key, value in self.partition_settings)
        object.__setattr__(self, "partition_settings", settings)

    def dataset(self) -> Dataset:
        """Return the whole data set; decoded once per process."""
        return _dataset(self.name, self.root, self.size, self.image_size, self.download)

    def digest(self) -> str:
        """Return a checksum of all images and labels; computed once per process."""
        return _digest(self.dataset())

    def split(self) -> Split:
        """Return the rows of every part; computed once per process."""
        return _split(self)

    @property
    def aligned(self) -> bool:
        """Whether every node has all private rows, of each a strip of its columns."""
        return self.partition == ALIGNED

    def seen_by(
        self, images: Shaped[Tensor, "*rows channels height width"], node: int
    ) -> Shaped[Tensor, "*rows channels height strip"]:
        """Return what a node sees of images: its strip of columns, or all of them."""
        return strip(images, party=node, parties=self.nodes) if self.aligned else images

    def rows_of(
        self, node: int
    ) -> tuple[Float[Tensor, " rows channels height strip"], Int[Tensor, " rows"]]:
        """Return a node's private images and labels.

        Where nodes are aligned, the node looks its rows up by their common ids, whatever order it
        stores them in, and has no labels: they are the label party's. -1 stands for each, which no
        loss takes.

        Args:
            node: Which node.

        Returns:
            Images and labels.
        """
        dataset, owned = self.dataset(), self.split()
        stored = owned.nodes[node]
        images = self.seen_by(dataset.images[stored], node)
        if not self.aligned:
            return images, dataset.labels[stored]
        place = torch.empty(len(dataset), dtype=torch.long)
        place[stored] = torch.arange(len(stored))  # where this party keeps each row
        return images[place[owned.private]], torch.full((len(stored),), -1)


@lru_cache(maxsize=2)  # by what it depends on alone: cells of other seeds share it
def _dataset(
    name: str, root: str | None, size: int | None, image_size: int | None, download: bool
) -> Dataset:
    folder = Path(root) if root else None
    return load(name, root=folder, size=size, image_size=image_size, download=download)


@lru_cache(maxsize=4)
def _split(recipe: DataRecipe) -> Split:
    return split(
        recipe.dataset(),
        nodes=recipe.nodes,
        partition=recipe.partition,
        public=recipe.public,
        test=recipe.test,
        stream=recipe.stream,
        **{key: _listed(value) for key, value in recipe.partition_settings},
    )


@lru_cache(maxsize=2)
def _digest(dataset: Dataset) -> str:
    digest = hashlib.sha256(str(dataset.classes).encode())
    for tensor in (dataset.images, dataset.labels):
        digest.update(tensor.numpy().tobytes())
    return digest.hexdigest()


def _hashable(value: object) -> object:
    return tuple(map(_hashable, value)) if isinstance(value, list | tuple) else value


def _listed(value: object) -> object:
    return list(map(_listed, value)) if isinstance(value, tuple) else value
