"""What cannot train is refused before training; what can, is not."""

from contextlib import nullcontext
from typing import Any

import pytest

from experiments.run.prepare import prepare
from experiments.run.rehearse import BatchOfOneError
from experiments.settings.cells import Training, cells
from experiments.settings.load import load_settings
from leakbed.models import IllegalCutError, ModelMismatchError
from strategies import PROTOCOLS

TABLE: dict[str, Any] = {
    "name": "small",
    "data": {"name": "tests.support.tiny:images", "nodes": 2, "public": 0.0, "test": 0.1},
    "model": {"cut": 0},
    "protocol": {"name": "vanilla-split", "batch_size": 4, "local_steps": 2},
    "attack": [{"name": "constant-image"}],
}
"""Two nodes with 27 rows each."""


def training(model: str, *overrides: str, **protocol: Any) -> Training:
    table = {
        **TABLE,
        "model": {**TABLE["model"], "name": f"tests.support.strange_networks:{model}"},
        "protocol": {**TABLE["protocol"], **protocol},
    }
    if protocol.get("name") == "fedavg":
        del table["model"]["cut"]
    table["protocol"] = {k: v for k, v in table["protocol"].items() if v is not None}
    return cells(load_settings(table, overrides))[0].training


@pytest.mark.parametrize(
    ("model", "cut", "kind", "message"),
    [
        ("frozen_bottom", 1, IllegalCutError, "cut 1 leaves the bottom nothing to train: .*frozen"),
        ("frozen_top", 1, IllegalCutError, "leaves the top nothing to train: its weights are froz"),
        ("detached_bottom", 0, ModelMismatchError, "no gradient reaches a weight of the bottom"),
        ("auxiliary", 1, ModelMismatchError, "the top returns a tuple in training"),
        ("half_at_the_cut", 2, ModelMismatchError, "the bottom makes float16, .* top are float32"),
        ("one_row", 1, ModelMismatchError, "bottom cannot train on a batch of 2: RuntimeError"),
    ],
)
def test_a_part_that_cannot_train_is_refused_by_name(
    model: str, cut: int, kind: type[Exception], message: str
) -> None:
    with pytest.raises(kind, match=message):
        prepare(training(model, f"model.cut={cut}"), root=None)


@pytest.mark.parametrize("model", ["frozen", "bfloat16"])
def test_a_whole_network_that_cannot_train_is_refused_too(model: str) -> None:
    with pytest.raises(ModelMismatchError, match=r"nothing to train: .*frozen|is bfloat16"):
        prepare(training(model, name="fedavg"), root=None)


@pytest.mark.parametrize("model", ["frozen_bottom", "half_at_the_cut", "double"])
def test_what_trains_whole_may_be_odd_inside(model: str) -> None:
    prepare(training(model, name="fedavg"), root=None)


@pytest.mark.parametrize(
    ("protocol", "model"),
    [
        ("fedavg", {}),
        *((name, {"cut": cut}) for name in ("vanilla-split", "splitfed-v1") for cut in (0, 4)),
        ("splitfed-v2", {"cut": 0}),
        *(("u-shaped", {"cut": cut, "upper_cut": upper}) for cut, upper in ((0, 4), (0, 3))),
    ],
)
def test_a_batch_of_one_that_a_layer_cannot_take_is_refused_with_the_remedy(
    protocol: str, model: dict[str, int]
) -> None:
    overrides = [f"model.{key}={value}" for key, value in model.items()]

    def prepared(**own: Any) -> None:
        settings = {"name": protocol, "batch_size": 13, "local_steps": None, **own}
        prepare(training("normalised_features", *overrides, **settings), root=None)

    with pytest.raises(BatchOfOneError, match=r"node 0 has 27 rows.* batch_size 13 leaves") as why:
        prepared()
    for part in ("Expected more than 1 value per channel", "; set protocol.local_steps = 2 or "):
        assert part in str(why.value)
    prepared(local_steps=2)
    prepared(batch_size=12)


def test_batches_of_one_throughout_name_another_remedy() -> None:
    with pytest.raises(
        BatchOfOneError, match=r"batch_size is 1, .*; set protocol\.batch_size to 2"
    ):
        prepare(training("normalised_features", batch_size=1), root=None)
    prepare(training("one_activation", "model.cut=3", batch_size=1), root=None)


def test_a_layer_that_drops_the_axis_of_a_single_row_is_met_before_training() -> None:
    prepare(training("squeezing"), root=None)
    with pytest.raises(BatchOfOneError, match=r"node 0 has 27 rows.*the top"):
        prepare(training("squeezing", batch_size=13, local_steps=None), root=None)


def test_rows_that_are_trained_on_together_are_no_batch_of_one() -> None:
    together = {"name": "parallel-split", "batch_size": 13, "local_steps": None}
    prepare(training("normalised_features", **together), root=None)
    with pytest.raises(BatchOfOneError, match="node 0"):
        prepare(training("normalised_features", "protocol.fraction=0.5", **together), root=None)
    with pytest.raises(BatchOfOneError, match=r"node 0 .*the bottom cannot train"):
        prepare(training("normalised_features", "model.cut=4", **together), root=None)


def test_a_node_that_is_alone_in_its_last_step_has_a_batch_of_one() -> None:
    uneven = ("data.partition=linear",)
    rows = prepare(training("squeezing", *uneven), root=None).data.split().nodes
    assert [len(each) for each in rows] == [18, 36], (
        "at 7 rows a step: 3 steps and 6, the last of 1"
    )
    for size, alone in ((7, True), (6, False)):
        together = {"name": "parallel-split", "batch_size": size, "local_steps": None}
        found = training("normalised_features", *uneven, **together)
        with pytest.raises(BatchOfOneError, match="1 has 36 rows") if alone else nullcontext():
            prepare(found, root=None)


@pytest.mark.parametrize("protocol", PROTOCOLS)
@pytest.mark.parametrize("model", ["rectified_in_place", "adding", "averaging_norm"])
def test_networks_that_can_train_are_let_through(protocol: str, model: str) -> None:
    overrides = ["model.upper_cut=2"] if protocol == "u-shaped" else []
    if protocol == "vertical-split":
        overrides.append("data.nodes=1")
    prepare(training(model, *overrides, name=protocol), root=None)
