import pytest
import torch

from leakbed.data import Dataset, PartitionError, Split, SplitError, load, split
from leakbed.seeds import derive

PARTITIONS: list[tuple[str, dict[str, object]]] = [
    ("iid", {}),
    ("dirichlet", {"alpha": 0.3}),
    ("linear", {}),
    ("pathological", {"num_classes_per_partition": 2}),
    ("shard", {"num_shards_per_partition": 3}),
]


def dataset(*, rows: int = 600, official_test: int = 0) -> Dataset:
    return Dataset(
        name="some",
        images=torch.zeros(rows, 1, 1, 1),
        labels=torch.arange(rows) % 10,
        classes=tuple("0123456789"),
        official_test=official_test,
    )


def rows_of(owned: Split) -> dict[str, list[int]]:
    nodes = {f"node {index}": node.tolist() for index, node in enumerate(owned.nodes)}
    return {**nodes, "public": owned.public.tolist(), "test": owned.test.tolist()}


@pytest.mark.parametrize(("partition", "settings"), PARTITIONS)
@pytest.mark.parametrize("official_test", [0, 100])
@pytest.mark.parametrize("test", [None, 0.0, 0.15])
def test_no_row_has_two_owners(
    partition: str, settings: dict[str, object], official_test: int, test: float | None
) -> None:
    data = dataset(official_test=official_test)
    owned = split(data, nodes=4, stream=5, partition=partition, test=test, **settings)
    everything = [row for rows in rows_of(owned).values() for row in rows]
    assert len(set(everything)) == len(everything)
    assert set(everything) <= set(range(600))
    assert torch.equal(torch.cat(owned.nodes), owned.private)
    trained = [*owned.private.tolist(), *owned.public.tolist()]
    assert all(row < 600 - official_test for row in trained), "a published test row is trained on"
    if official_test:
        assert all(row >= 600 - official_test for row in owned.test.tolist())


@pytest.mark.parametrize(("partition", "settings"), PARTITIONS)
def test_a_pure_function_of_the_stream(partition: str, settings: dict[str, object]) -> None:
    def at(stream: int) -> dict[str, list[int]]:
        return rows_of(split(dataset(), nodes=4, stream=stream, partition=partition, **settings))

    torch.manual_seed(1)
    first = at(5)
    torch.manual_seed(2)
    assert at(5) == first
    other = at(6)
    assert all(other[name] != rows for name, rows in first.items())


def test_sizes_by_share() -> None:
    def sizes(data: Dataset, **settings: float) -> tuple[int, int, int]:
        owned = split(data, nodes=4, stream=5, **settings)
        return len(owned.private), len(owned.public), len(owned.test)

    assert sizes(dataset()) == (432, 108, 60)
    assert sizes(dataset(), test=0.0) == (480, 120, 0)
    assert sizes(dataset(), public=0.0, test=0.5) == (300, 0, 300)
    assert sizes(dataset(official_test=100)) == (400, 100, 100)
    assert sizes(dataset(official_test=100), test=0.1) == (400, 100, 60)


def test_the_default_digits_leave_a_thousand_candidates() -> None:
    digits = load("mnist-5k")
    owned = split(digits, nodes=4, stream=derive(0, "data"))
    assert [len(owned.private), len(owned.public), len(owned.test)] == [3600, 900, 500]
    hijacked = split(digits, nodes=1, stream=derive(0, "data"), test=0.0)
    assert [len(hijacked.private), len(hijacked.public)] == [4000, 1000]


def test_every_part_is_a_random_sample_of_the_classes() -> None:
    digits = load("mnist-5k")  # sorted by class, so a forgotten shuffle shows
    owned = split(digits, nodes=4, stream=5)
    for rows in (*owned.nodes, owned.public, owned.test):
        shares = digits.labels[rows].bincount(minlength=10) / len(rows)
        assert shares.min() > 0.05
        assert shares.max() < 0.16


def test_the_public_share_does_not_move_the_test_rows() -> None:
    few, many = (split(dataset(), nodes=2, stream=5, public=share) for share in (0.1, 0.5))
    assert torch.equal(few.test, many.test)
    assert set(few.public.tolist()) <= set(many.public.tolist())


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"public": 1.0}, "public=1.0 is no share"),
        ({"public": -0.1}, "public=-0.1 is no share"),
        ({"test": 1.0}, "test=1.0 is no share"),
        ({"nodes": 0}, "0 nodes cannot share 432 private samples"),
        (
            {"nodes": 433},
            r"433 nodes cannot share 432 private samples \(data set 'some': 600 rows, 60",
        ),
        ({"test": 0.99, "public": 0.9}, "4 nodes cannot share"),
    ],
)
def test_shares_that_leave_someone_without_are_refused(
    settings: dict[str, float], message: str
) -> None:
    with pytest.raises(SplitError, match=message):
        split(dataset(), **({"nodes": 4, "stream": 5} | settings))


def test_as_many_nodes_as_samples_is_the_limit() -> None:
    assert len(split(dataset(), nodes=432, stream=5).nodes) == 432


def test_more_test_rows_than_were_published_are_refused() -> None:
    with pytest.raises(SplitError, match=r"asks for 120 rows.*has 100; use at most 0.1667"):
        split(dataset(official_test=100), nodes=4, stream=5, test=0.2)


def test_a_partitioner_that_fails_says_so() -> None:
    with pytest.raises(PartitionError, match="missing a required argument: 'alpha'"):
        split(dataset(), nodes=4, stream=5, partition="dirichlet")


def test_aligned_nodes_have_all_private_rows_each_in_an_order_of_its_own() -> None:
    data = dataset()
    owned, dealt = (split(data, nodes=3, stream=5, partition=name) for name in ("aligned", "iid"))
    assert torch.equal(owned.private, dealt.private)
    assert torch.equal(owned.public, dealt.public)
    orders = [node.tolist() for node in owned.nodes]
    assert all(sorted(order) == sorted(owned.private.tolist()) for order in orders)
    assert len({tuple(order) for order in [*orders, owned.private.tolist()]}) == 4


def test_aligned_nodes_take_no_settings() -> None:
    with pytest.raises(PartitionError, match="setting of partition 'aligned': 'alpha'"):
        split(dataset(), nodes=3, stream=5, partition="aligned", alpha=1.0)
