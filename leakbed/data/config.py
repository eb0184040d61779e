"""A cell's data as settings: what the harness, the nodes and the oracle all derive it from."""

import hashlib
from dataclasses import dataclass, field, replace
from functools import lru_cache
from pathlib import Path
from typing import Any

import torch
from jaxtyping import Float, Int, Shaped
from torch import Tensor

from leakbed.data import BadDataError, Dataset, Split, load, split
from leakbed.data.dataset import fitted
from leakbed.data.partitioning import ALIGNED, strip
from leakbed.lookup import listed, pairs
from leakbed.seeds import derive, generator


@dataclass(frozen=True, kw_only=True)
class DataConfig:
    """Everything a cell's private, public and test rows are a function of.

    Attributes:
        name: Data set, as for :func:`leakbed.data.load`.
        nodes: Number of data holders.
        stream: The cell's ``data`` stream.
        root: Folder that holds downloaded sets, or None.
        size: Keep only this many rows; None keeps all.
        image_size: Resize images to this side; None refuses folders of mixed sizes.
        channels: 1 makes images grey, 3 coloured; None keeps them.
        partition: Name of the partitioner; ``"aligned"`` gives every node a strip of all rows.
        partition_settings: Its own settings, as pairs.
        public: Share of the rows the adversary owns.
        public_from: Data set of which it owns as many rows instead, made to fit in shape; None is
            the same one.
        test: Share of the rows held out for testing; None as for :func:`leakbed.data.split`.
        download: Whether a missing set may be downloaded.
        canaries: How many private rows have a label that was drawn from the private rows' labels,
            whatever the image shows: what an attack tells of such a label it read in messages.
        settings: Further keywords of one's own function, as pairs; ``public_from`` is read without.
    """

    name: str
    nodes: int
    stream: int
    root: str | None = None
    size: int | None = None
    image_size: int | None = None
    channels: int | None = None
    partition: str = "iid"
    partition_settings: tuple[tuple[str, Any], ...] = field(default=())
    public: float = 0.2
    public_from: str | None = None
    test: float | None = None
    download: bool = False
    canaries: int = 0
    settings: tuple[tuple[str, Any], ...] = field(default=())

    def __post_init__(self) -> None:
        """Make settings hashable: lists (of TOML, of JSON) become tuples."""
        object.__setattr__(self, "partition_settings", pairs(self.partition_settings))
        object.__setattr__(self, "settings", pairs(self.settings))

    def dataset(self) -> Dataset:
        """Return the whole data set, with canaries' labels; decoded once per process."""
        return _with_canaries(self) if self.canaries else _own(self)

    def canary_places(self) -> Int[Tensor, " canaries"]:
        """Return which private rows have a drawn label, by their place among the private ones.

        Returns:
            In order.

        Raises:
            BadDataError: If there are fewer private rows than canaries.
        """
        private = len(self.split().private)
        if self.canaries > private:
            raise BadDataError(
                f"data.canaries is {self.canaries}, but there are {private} private rows; ask for "
                "fewer, or for more data"
            )
        order = torch.randperm(private, generator=generator(derive(self.stream, "canaries")))
        return order[: self.canaries].sort().values

    @property
    def num_classes(self) -> int:
        """How many classes the labels have; a network may have outputs that no label uses."""
        return len(self.dataset().classes)

    def digest(self) -> str:
        """Return a checksum of all images and labels; computed once per process."""
        foreign = [] if self.public_from is None else [_digest(_foreign(self))]
        return ":".join([_digest(self.dataset()), *foreign])

    def split(self) -> Split:
        """Return the rows of every part; computed once per process."""
        return _split(self)

    def owned(
        self,
    ) -> tuple[Float[Tensor, " public channels height width"], Int[Tensor, " public"]]:
        """Return the images and labels that the adversary owns.

        Returns:
            Rows of the data set that no node has, or as many of ``public_from``, spread over it.

        Raises:
            BadDataError: If the other data set has too few rows, or labels that the task has not.
        """
        dataset, rows = self.dataset(), self.split().public
        if self.public_from is None:
            return dataset.images[rows], dataset.labels[rows]
        other = _foreign(self)
        if len(other) < len(rows):
            raise BadDataError(
                f"data.public_from {self.public_from!r} has {len(other)} rows, but the adversary "
                f"is to own {len(rows)}; lower data.public, or choose a larger set"
            )
        if other.num_classes > dataset.num_classes:
            raise BadDataError(
                f"data.public_from {self.public_from!r} has {other.num_classes} classes, "
                f"{self.name!r} {dataset.num_classes}; choose a set with as many or fewer"
            )
        chosen = torch.arange(len(rows)) * len(other) // max(len(rows), 1)
        images = fitted(other.images[chosen], shape=dataset.image_shape)
        return images, other.labels[chosen]

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
        """
        dataset, owned = self.dataset(), self.split()
        stored = owned.nodes[node]
        images = self.seen_by(dataset.images[stored], node)
        if not self.aligned:
            return images, dataset.labels[stored]
        place = torch.empty(len(dataset), dtype=torch.long)
        place[stored] = torch.arange(len(stored))  # where this party keeps each row
        return images[place[owned.private]], torch.full((len(stored),), -1)


def _loaded(recipe: DataConfig, name: str, **kept: Any) -> Dataset:  # noqa: ANN401  of load
    """Return a data set from where the recipe reads; :func:`load` decodes it once per process."""
    folder = Path(recipe.root) if recipe.root else None
    size, download = recipe.image_size, recipe.download
    return load(name, root=folder, image_size=size, download=download, **kept)


def _own(recipe: DataConfig) -> Dataset:
    """Return the data set as its source has it."""
    own = {"size": recipe.size, "channels": recipe.channels, "settings": recipe.settings}
    return _loaded(recipe, recipe.name, **own)


@lru_cache(maxsize=4)
def _with_canaries(recipe: DataConfig) -> Dataset:
    """Return the data set with drawn labels of some private rows; rows were dealt out before."""
    dataset, private = _own(recipe), recipe.split().private
    rows, draw = private[recipe.canary_places()], generator(derive(recipe.stream, "canary-labels"))
    chosen = torch.randint(len(private), (len(rows),), generator=draw)
    labels = dataset.labels.clone()
    labels[rows] = dataset.labels[private[chosen]]
    return replace(dataset, labels=labels)


def _foreign(recipe: DataConfig) -> Dataset:
    """Return the other data set that an adversary's images come from."""
    return _loaded(recipe, str(recipe.public_from))


@lru_cache(maxsize=4)
def _split(recipe: DataConfig) -> Split:
    return split(
        _own(recipe),
        nodes=recipe.nodes,
        partition=recipe.partition,
        public=recipe.public,
        test=recipe.test,
        stream=recipe.stream,
        **{key: listed(value) for key, value in recipe.partition_settings},
    )


@lru_cache(maxsize=4)
def _digest(dataset: Dataset) -> str:
    digest = hashlib.sha256(str(dataset.classes).encode())
    for tensor in (dataset.images, dataset.labels):
        digest.update(tensor.contiguous().numpy().data)  # no copy of gigabytes
    return digest.hexdigest()
