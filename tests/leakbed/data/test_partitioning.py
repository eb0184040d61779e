import inspect
import logging
import random
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Any

import flwr_datasets.partitioner as flower
import pytest
import torch

from leakbed.data import PARTITIONERS, PartitionError, partition_rows, partitioning

LABELS = torch.arange(10).repeat(40)

# Every partitioner with settings that fit 400 labels of 10 classes and 5 nodes.
SETTINGS: dict[str, dict[str, Any]] = {
    "continuous": {"strictness": 0.5},
    "dirichlet": {"alpha": 0.5},
    "distribution": {
        "distribution_array": [[1.0, 3.0]] * 10,
        "num_unique_labels_per_partition": 2,
        "preassigned_num_samples_per_label": 2,
    },
    "exponential": {},
    "iid": {},
    "inner-dirichlet": {"alpha": 0.5, "partition_sizes": [20, 40, 60, 80, 100]},
    "linear": {},
    "pathological": {"num_classes_per_partition": 3, "class_assignment_mode": "deterministic"},
    "shard": {"num_shards_per_partition": 2},
    "size": {"partition_sizes": [20, 40, 60, 80, 100]},
    "square": {},
}


def deal(name: str, *, stream: int = 1, **changes: object) -> tuple[torch.Tensor, ...]:
    nodes = 10 if name == "distribution" else 5
    return partition_rows(
        LABELS, nodes=nodes, name=name, stream=stream, **(SETTINGS[name] | changes)
    )


def test_every_partitioner_is_tried_here_and_is_flowers() -> None:
    assert set(SETTINGS) == set(PARTITIONERS)
    assert all(inspect.isclass(getattr(flower, name)) for name in PARTITIONERS.values())


@pytest.mark.parametrize("name", PARTITIONERS)
def test_parts_are_disjoint_non_empty_and_repeatable(name: str) -> None:
    parts = deal(name)
    rows = torch.cat(parts)
    assert len(rows.unique()) == len(rows)
    assert all(len(part) > 0 for part in parts)
    assert rows.max() < len(LABELS)
    again = deal(name)
    assert all(torch.equal(one, other) for one, other in zip(parts, again, strict=True))


@pytest.mark.parametrize("name", ["continuous", "dirichlet", "inner-dirichlet", "shard"])
def test_another_stream_deals_other_rows(name: str) -> None:
    one, other = deal(name, stream=1), deal(name, stream=2)
    assert any(a.tolist() != b.tolist() for a, b in zip(one, other, strict=True))


@pytest.mark.parametrize("name", ["dirichlet", "exponential", "iid", "linear", "shard", "square"])
def test_these_leave_no_row_out(name: str) -> None:
    assert torch.cat(deal(name)).sort().values.tolist() == list(range(len(LABELS)))


@pytest.mark.parametrize(("rows", "nodes"), [(400, 5), (403, 5), (7, 3), (3, 3), (9, 1)])
def test_iid_deals_as_flowers_own(rows: int, nodes: int) -> None:
    labels = torch.zeros(rows, dtype=torch.int64)
    flowers = partitioning._parts(labels, flower.IidPartitioner(nodes))
    ours = partition_rows(labels, nodes=nodes, stream=1)
    assert [part.tolist() for part in ours] == [part.tolist() for part in flowers]


def test_settings_reach_the_partitioner() -> None:
    assert [len(part) for part in deal("size")] == [20, 40, 60, 80, 100]
    as_tuple = deal("inner-dirichlet", partition_sizes=(20, 40, 60, 80, 100))
    assert [len(part) for part in as_tuple] == [20, 40, 60, 80, 100]
    assert all(len(LABELS[part].unique()) == 3 for part in deal("pathological"))

    def skew(alpha: float) -> float:
        parts = deal("dirichlet", alpha=alpha)
        counts = torch.stack([LABELS[part].bincount(minlength=10) for part in parts]).double()
        return float((counts / counts.sum(1, keepdim=True)).max(1).values.mean())

    assert skew(0.2) > 2 * skew(1000.0)


def test_global_generators_and_temporary_files_stay_as_they_were(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    torch.manual_seed(3)
    before = torch.get_rng_state()
    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path))
    monkeypatch.chdir(tmp_path)
    deal("shard")
    deal("dirichlet")
    assert torch.equal(before, torch.get_rng_state())
    assert not list(tmp_path.iterdir())


def test_what_a_partitioner_warns_of_is_logged(caplog: pytest.LogCaptureFixture) -> None:
    with caplog.at_level(logging.INFO, logger="leakbed.data.partitioning"):
        deal("size")
    assert "partition 'size'" in caplog.text


def test_nothing_is_printed(capfd: pytest.CaptureFixture[str]) -> None:
    for name in PARTITIONERS:
        deal(name)
    assert capfd.readouterr() == ("", "")


@pytest.mark.parametrize(
    ("name", "settings", "message"),
    [
        ("dirichlett", {}, "unknown partition 'dirichlett'; did you mean 'dirichlet'"),
        ("dirichlet", {"alfa": 1.0}, "'alfa'; did you mean 'alpha'"),
        ("dirichlet", {}, "missing a required argument: 'alpha'"),
        ("dirichlet", {"alpha": -1.0}, "strictly greater than zero"),
        ("dirichlet", {"alpha": 0.5, "seed": 3}, "'seed'"),
        ("dirichlet", {"alpha": 0.5, "min_partition_size": 300}, "max number of attempts"),
        ("iid", {"alpha": 0.5}, "setting of partition 'iid': 'alpha'"),
        ("size", {"partition_sizes": [20, 40]}, "makes 2 parts for 5 nodes"),
        ("size", {"partition_sizes": [200] * 5}, "The sum of partition sizes"),
        ("pathological", {"num_classes_per_partition": 30}, "greater than the number"),
        ("shard", {}, "shard_size needs to be specified"),
    ],
)
def test_what_cannot_be_dealt_is_refused(
    name: str, settings: dict[str, object], message: str
) -> None:
    with pytest.raises(PartitionError, match=message):
        partition_rows(LABELS, nodes=5, name=name, stream=1, **settings)


@pytest.mark.parametrize("nodes", [0, 401])
def test_more_nodes_than_rows_or_none_are_refused(nodes: int) -> None:
    with pytest.raises(PartitionError, match=f"{nodes} nodes cannot share 400 samples"):
        partition_rows(LABELS, nodes=nodes, stream=1)


def test_an_empty_part_is_refused() -> None:
    with pytest.raises(PartitionError, match="leaves node 0 of 5 without a sample"):
        partition_rows(
            LABELS,
            nodes=5,
            name="dirichlet",
            stream=8,
            alpha=[0.001, 9.0, 9.0, 9.0, 9.0],
            min_partition_size=0,
        )


def test_the_first_deal_of_a_process_draws_from_no_generator_of_the_app() -> None:
    """Importing Flower's partitioners does, and the app may be sampling nodes just then."""
    asked = (
        "import random, torch; from leakbed.data import partition_rows; random.seed(1);"
        "partition_rows(torch.arange(8), nodes=2, stream=1); print(random.random())"
    )
    printed = subprocess.run(  # noqa: S603
        [sys.executable, "-c", asked], capture_output=True, check=True, text=True
    )
    random.seed(1)
    assert float(printed.stdout) == random.random()
