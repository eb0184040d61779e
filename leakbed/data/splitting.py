"""Who owns which rows: private ones by node, the adversary's public ones, and those for testing.

The three are cut out of one shuffle, so they are disjoint by construction, and each is a pure
function of the data set, the settings and the stream. Test rows are drawn from a stream of their
own: changing the public share does not change what is tested on.
"""

from dataclasses import dataclass

import torch
from jaxtyping import Int
from torch import Tensor

from leakbed.data.dataset import Dataset
from leakbed.data.partitioning import partition as dealt
from leakbed.seeds import derive, generator

# A tenth is 500 of mnist-5k: accuracy to +-1 % at 95 %, and 3,600 private rows remain.
_TEST_SHARE = 0.1


class SplitError(ValueError):
    """Shares that leave someone without a row."""


@dataclass(frozen=True, kw_only=True, eq=False)
class Split:
    """Row numbers of a data set by owner; no row has two.

    Attributes:
        nodes: Private rows of each node, in the order its partitioner dealt them.
        private: All of them, node after node.
        public: Rows the adversary owns.
        test: Rows nobody trains on.
    """

    nodes: tuple[Int[Tensor, " _"], ...]
    private: Int[Tensor, " private"]
    public: Int[Tensor, " public"]
    test: Int[Tensor, " test"]


def split(
    dataset: Dataset,
    *,
    nodes: int,
    stream: int,
    partition: str = "iid",
    public: float = 0.2,
    test: float | None = None,
    **settings: object,
) -> Split:
    """Return who owns which rows.

    A partitioner that cannot deal the private rows out is a :class:`PartitionError`.

    Args:
        dataset: What to split.
        nodes: How many nodes share the private rows.
        stream: Seed of the split's own random stream.
        partition: A key of ``PARTITIONERS``.
        public: Share of the rows not tested on that the adversary owns, from 0 to below 1.
        test: Share of all rows that is tested on, from 0 to below 1. It is drawn from the published
            test part where there is one, whose other rows are then nobody's. ``None`` takes the
            whole published test part, or a tenth where there is none.
        **settings: The partitioner's own, such as ``alpha`` of ``dirichlet``.

    Returns:
        Row numbers by owner.

    Raises:
        SplitError: A share is out of range, or fewer private rows remain than there are nodes.
    """
    for name, share in (("public", public), ("test", test)):
        if share is not None and not 0 <= share < 1:
            raise SplitError(f"{name}={share} is no share; use 0 to below 1")
    rows = len(dataset)
    trained = rows - dataset.official_test
    tested = _tested(dataset, test=test, stream=stream)
    free = torch.ones(trained, dtype=torch.bool)
    free[tested[tested < trained]] = False
    rest = _shuffled(free.nonzero().flatten(), stream=derive(stream, "rows"))
    count = round(public * len(rest))
    if nodes < 1 or len(rest) - count < nodes:
        raise SplitError(
            f"{nodes} nodes cannot share {len(rest) - count} private samples (data set "
            f"{dataset.name!r}: {rows} rows, {len(tested)} for testing, {count} public); use at "
            "least 1 node, at most one per sample, or smaller shares"
        )
    private = rest[count:]
    parts = dealt(
        dataset.labels[private],
        nodes=nodes,
        name=partition,
        stream=derive(stream, "partition"),
        **settings,
    )
    owned = tuple(private[part] for part in parts)
    return Split(nodes=owned, private=torch.cat(owned), public=rest[:count], test=tested)


def _tested(dataset: Dataset, *, test: float | None, stream: int) -> Int[Tensor, " test"]:
    """Return the rows to test on, in random order."""
    rows, official = len(dataset), dataset.official_test
    pool = torch.arange(rows - official if official else 0, rows)
    count = round((_TEST_SHARE if test is None else test) * rows)
    if test is None and official:
        count = official
    if count > len(pool):
        raise SplitError(
            f"test={test} asks for {count} rows, but the published test part of {dataset.name!r} "
            f"has {official}; use at most {official / rows:.4f}, or leave `test` out"
        )
    return _shuffled(pool, stream=derive(stream, "test"))[:count]


def _shuffled(rows: Int[Tensor, " rows"], *, stream: int) -> Int[Tensor, " rows"]:
    return rows[torch.randperm(len(rows), generator=generator(stream))]
