import json
from dataclasses import asdict, replace

import pytest
import torch

from leakbed.data import BadDataError, load, split
from leakbed.data.config import DataConfig
from tests.support import tiny


def test_rows_are_those_of_the_data_and_the_split_it_names() -> None:
    recipe = tiny.recipe(3, partition="dirichlet", partition_settings=(("alpha", 5.0),))
    dataset = load("tests.support.tiny:images")
    assert torch.equal(recipe.dataset().images, dataset.images)
    expected = split(
        dataset,
        nodes=3,
        stream=recipe.stream,
        partition="dirichlet",
        alpha=5.0,
        public=0.2,
        test=0.1,
    )
    found = recipe.split()
    assert all(torch.equal(a, b) for a, b in zip(found.nodes, expected.nodes, strict=True))
    assert torch.equal(found.public, expected.public)
    assert torch.equal(found.test, expected.test)


def test_data_are_decoded_once_for_all_seeds_and_shares() -> None:
    one = tiny.recipe(2)
    two = DataConfig(name=one.name, nodes=3, stream=one.stream + 1, public=0.4, test=0.2)
    assert one.dataset() is two.dataset()
    assert one.split() is tiny.recipe(2).split()
    assert not torch.equal(one.split().test, two.split().test[: len(one.split().test)])


@pytest.mark.parametrize("size", [None, 30])
def test_size_keeps_so_many_rows(size: int | None) -> None:
    assert len(tiny.recipe(size=size).dataset()) == (size or 60)


def test_lists_among_a_partitioners_settings_survive_json_and_caching() -> None:
    settings = (("partition_sizes", [80, 200]),)
    recipe = DataConfig(
        name="mnist-5k", size=400, nodes=2, stream=1, partition="size", partition_settings=settings
    )
    assert [len(rows) for rows in recipe.split().nodes] == [80, 200]
    sent = json.loads(json.dumps(asdict(recipe)))
    for pairs in ("partition_settings", "settings"):
        sent[pairs] = tuple(map(tuple, sent[pairs]))
    assert hash(recipe) == hash(DataConfig(**sent))


def test_the_digest_tells_data_apart_and_nothing_else() -> None:
    one, two = (DataConfig(name="mnist-5k", size=100, nodes=n, stream=n) for n in (1, 2))
    assert one.digest() == two.digest()
    assert one.digest() != DataConfig(name="mnist-5k", size=101, nodes=1, stream=1).digest()


@pytest.mark.parametrize("nodes", [1, 4])
def test_aligned_nodes_find_their_strips_by_the_rows_common_ids(nodes: int) -> None:
    recipe = tiny.recipe(nodes, partition="aligned")
    assert recipe.aligned
    whole = recipe.dataset().images[recipe.split().private]
    strips = [recipe.rows_of(node)[0] for node in range(nodes)]
    assert torch.equal(torch.cat(strips, dim=-1), whole)
    assert torch.equal(recipe.seen_by(whole, nodes - 1), strips[-1])


def test_aligned_nodes_have_no_labels() -> None:
    images, labels = tiny.recipe(2, partition="aligned").rows_of(1)
    assert labels.tolist() == [-1] * len(images)


def test_nodes_that_divide_rows_see_whole_images() -> None:
    recipe = tiny.recipe(2)
    images, labels = recipe.rows_of(1)
    rows = recipe.split().nodes[1]
    assert torch.equal(images, recipe.dataset().images[rows])
    assert torch.equal(labels, recipe.dataset().labels[rows])
    assert torch.equal(recipe.seen_by(images, 1), images)


def test_the_adversary_owns_public_rows() -> None:
    recipe = tiny.recipe(2)
    images, labels = recipe.owned()
    rows = recipe.split().public
    assert torch.equal(images, recipe.dataset().images[rows])
    assert torch.equal(labels, recipe.dataset().labels[rows])


def test_images_of_another_set_take_the_place_of_public_rows_and_of_nothing_else() -> None:
    own = DataConfig(name="mnist-5k", size=50, nodes=2, stream=1)
    foreign = replace(own, public_from="tests.support.own_data:colour_floats")
    assert torch.equal(own.split().private, foreign.split().private)
    images, labels = foreign.owned()
    assert images.shape == own.owned()[0].shape == (9, 1, 28, 28)
    assert labels.unique().tolist() == [0, 1, 2]
    assert (images.diff(dim=0).flatten(1) > 0).all()  # its pixels rise from row to row
    assert own.digest() != foreign.digest()


@pytest.mark.parametrize(
    ("name", "other", "message"),
    [
        ("mnist-5k", "tests.support.tiny:images", "has 60 rows, but the adversary is to own 900"),
        ("tests.support.tiny:images", "mnist-5k", "has 10 classes.* 3; choose"),
    ],
)
def test_another_set_that_does_not_fit_is_refused(name: str, other: str, message: str) -> None:
    with pytest.raises(BadDataError, match=message):
        DataConfig(name=name, nodes=2, stream=1, public_from=other).owned()


def test_canaries_are_private_rows_whose_labels_are_drawn() -> None:
    plain = DataConfig(name="mnist-5k", size=400, nodes=2, stream=1)
    marked = replace(plain, canaries=100)
    private = plain.split().private
    rows = private[marked.canary_places()]
    assert len(rows) == len(rows.unique()) == 100
    assert all(
        torch.equal(a, b) for a, b in zip(plain.split().nodes, marked.split().nodes, strict=True)
    )
    before, after = plain.dataset().labels, marked.dataset().labels
    changed = (before != after).nonzero().flatten()
    assert set(changed.tolist()) < set(rows.tolist())
    assert 80 < len(changed) < 100  # one of ten is drawn as it was
    assert torch.equal(plain.dataset().images, marked.dataset().images)
    assert plain.digest() != marked.digest()
    with pytest.raises(BadDataError, match=r"data.canaries is 1000, but there are \d+ private"):
        replace(plain, canaries=1000).canary_places()
