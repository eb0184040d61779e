"""Deal rows out to nodes with the partitioners of Flower Datasets, by their own names.

A partitioner sees labels and row numbers, never images. Its seed comes from the caller's stream,
so the same stream gives the same rows on every machine.

Source: Flower Datasets, https://flower.ai/docs/datasets/.

Departures:
- A warning that a partitioner prints goes to this module's log; what it warns of (an empty part, a
  row given twice) is an error here, and rows it leaves out belong to no node.
- Partitioners by natural id, by column or by a Python function do not apply to labels alone.
"""

import inspect
import logging
import warnings
from collections.abc import Callable, Mapping
from typing import Any

import numpy as np
import torch
from jaxtyping import Int
from torch import Tensor

from leakbed.naming import unknown
from leakbed.seeds import derive, scoped

PARTITIONERS: dict[str, str] = {
    "continuous": "ContinuousPartitioner",
    "dirichlet": "DirichletPartitioner",
    "distribution": "DistributionPartitioner",
    "exponential": "ExponentialPartitioner",
    "iid": "IidPartitioner",
    "inner-dirichlet": "InnerDirichletPartitioner",
    "linear": "LinearPartitioner",
    "pathological": "PathologicalPartitioner",
    "shard": "ShardPartitioner",
    "size": "SizePartitioner",
    "square": "SquarePartitioner",
}

_OURS = ("num_partitions", "partition_by", "seed")
_log = logging.getLogger(__name__)


class PartitionError(ValueError):
    """Rows that cannot be dealt out as asked."""


def partition(
    labels: Int[Tensor, " rows"],
    *,
    nodes: int,
    stream: int,
    name: str = "iid",
    **settings: object,
) -> tuple[Int[Tensor, " _"], ...]:
    """Return which positions of ``labels`` each node gets; no position twice, no node without.

    Args:
        labels: Class of each row. ``iid`` deals them out in order, so shuffle before.
        nodes: How many parts.
        stream: Seed of the partitioner's own random stream.
        name: A key of ``PARTITIONERS``.
        **settings: The partitioner's own, such as ``alpha`` of ``dirichlet``.

    Returns:
        One tensor of positions per node.

    Raises:
        PartitionError: An unknown partitioner or setting, a setting it refuses, more nodes than
            rows, a part that comes out empty, or another number of parts than ``nodes``.
    """
    if not 1 <= nodes <= len(labels):
        raise PartitionError(f"{nodes} nodes cannot share {len(labels)} samples; use 1 to as many")
    if name not in PARTITIONERS:
        raise PartitionError(unknown("partition", name, PARTITIONERS))
    make, arguments = _bound(name, nodes=nodes, settings=settings, stream=stream)
    with warnings.catch_warnings(record=True) as caught, scoped(stream):
        warnings.simplefilter("always")
        try:
            parts = _parts(labels, make(**arguments))
        except (ValueError, TypeError, LookupError, ArithmeticError) as error:
            raise PartitionError(
                f"partition {name!r} cannot deal {len(labels)} samples to {nodes} nodes with "
                f"{settings or 'its defaults'}: {error}"
            ) from error
    for warning in caught:
        _log.info("partition %r: %s", name, warning.message)
    _check(parts, nodes=nodes, name=name, settings=settings)
    return parts


def _parts(labels: Int[Tensor, " rows"], partitioner: Any) -> tuple[Int[Tensor, " _"], ...]:  # noqa: ANN401  untyped library
    """Run a partitioner over a table of labels and row numbers."""
    from datasets import Dataset  # noqa: PLC0415  slow; a process that only trains needs it not

    columns = {"label": labels.tolist(), "row": list(range(len(labels)))}
    partitioner.dataset = Dataset.from_dict(columns)
    return tuple(
        torch.tensor(partitioner.load_partition(index)["row"][:], dtype=torch.int64)
        for index in range(partitioner.num_partitions)
    )


def _bound(
    name: str, *, nodes: int, settings: Mapping[str, object], stream: int
) -> tuple[Callable[..., Any], dict[str, object]]:
    """Return a partitioner and its arguments, or say which setting it lacks or does not know."""
    from flwr_datasets import partitioner as flower  # noqa: PLC0415  slow, as above

    make: Callable[..., Any] = getattr(flower, PARTITIONERS[name])
    ours = {"num_partitions": nodes, "partition_by": "label", "seed": derive(stream, "partitioner")}
    signature = inspect.signature(make)
    legal = [key for key in signature.parameters if key not in _OURS]
    for key in settings:
        if key not in legal:
            raise PartitionError(unknown(f"setting of partition {name!r}:", key, legal))
    given = {key: value for key, value in ours.items() if key in signature.parameters}
    given |= {key: _as_flower_takes(key, value) for key, value in settings.items()}
    try:
        signature.bind(**given)
    except TypeError as error:
        raise PartitionError(f"partition {name!r}: {error}; legal: {', '.join(legal)}") from error
    return make, given


def _as_flower_takes(key: str, value: object) -> object:
    """Return a setting in the one type its partitioner accepts: an array, or no tuple."""
    if key == "distribution_array":
        return np.asarray(value)
    return list(value) if isinstance(value, tuple) else value


def _check(
    parts: tuple[Int[Tensor, " _"], ...], *, nodes: int, name: str, settings: Mapping[str, object]
) -> None:
    """Refuse parts that are too few, too many, empty or overlapping."""
    if len(parts) != nodes:
        raise PartitionError(
            f"partition {name!r} with {dict(settings)} makes {len(parts)} parts for {nodes} nodes"
        )
    for node, part in enumerate(parts):
        if len(part) == 0:
            raise PartitionError(
                f"partition {name!r} leaves node {node} of {nodes} without a sample; use fewer "
                f"nodes, more data or milder settings than {dict(settings)}"
            )
    rows = torch.cat(parts).tolist()
    if len(set(rows)) < len(rows):
        raise PartitionError(f"partition {name!r} with {dict(settings)} gives a sample twice")
