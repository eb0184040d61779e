"""Bottoms stepped again with recorded gradients make what was recorded, protocol by protocol."""

from pathlib import Path
from statistics import fmean
from typing import Any

import pytest
import torch
from scipy.stats import binom

from experiments.run.ceiling_results import RunCeiling
from experiments.run.ceilings import ceiling_of_run
from experiments.run.recorded import Recorded
from experiments.run.runner import run
from leakbed.contracts.noise_laws import NoCeilingError
from leakbed.events import Bottom, CutGradientDown
from leakbed.tap.facts import UnpermittedModelError
from leakbed.tensors import load

FEW: dict[str, Any] = {"candidates": 30, "targets": 4, "draws": 2}


def recorded(
    folder: Path, protocol: str, *, model: dict[str, Any], sigma: float = 0.05, **own: Any
) -> Path:
    table: dict[str, Any] = {
        "name": "small",
        "keep_rounds": "all",
        "data": {"size": 200, "nodes": 2},
        "model": model,
        "protocol": {
            "name": protocol,
            "rounds": 2,
            "batch_size": 8,
            "local_steps": 2,
            "optimizer": "sgd",
            "momentum": 0.9,
            **own,
        },
        "attack": [{"name": "mean-image", "targets": 2}],
        "defense": [{"name": "smashed-noise", "sigma": sigma}],
    }
    run(table, out=folder)
    (only,) = (folder / "runs").iterdir()
    return only


def sound(found: RunCeiling) -> bool:
    assert all(each.sound for each in found.findings), list(map(str, found.findings))
    return bool(found.findings)


@pytest.mark.parametrize(
    ("protocol", "model"),
    [
        ("splitfed-v1", {"name": "mnistnet", "cut": 2}),
        ("splitfed-v2", {"name": "mnistnet", "cut": 2}),
        ("parallel-split", {"name": "mnistnet", "cut": 2}),
        ("u-shaped", {"name": "mnistnet", "cut": 2, "upper_cut": 7}),
    ],
)
def test_the_last_round_and_test_rows_are_made_again(
    protocol: str, model: dict[str, Any], tmp_path: Path
) -> None:
    folder = recorded(tmp_path, protocol, model=model)
    assert sound(ceiling_of_run(folder, collect="last", **FEW))
    whole = ceiling_of_run(folder, span="training", candidates=5, targets=1, draws=2)
    assert sound(whole)
    relayed = Recorded.open(folder).plan.bottoms == "relayed"
    assert (whole.messages[0].without_bottoms is not None) == relayed
    assert ("fed-server" in whole.seat) == relayed
    tested = ceiling_of_run(folder, when="inference", **FEW)
    assert sound(tested)
    # A head reports how many test rows are right: beside the features that tells the label.
    assert tested.told.endswith("the row's label") == (protocol == "u-shaped")
    assert {each.label is None for each in tested.messages} == {protocol == "u-shaped"}


def names_by_bottom(folder: Path, *, node: int, row: int, candidates: int) -> bool:
    """Say whether the bottom that a node hands over after one step of SGD names a row."""
    run = Recorded.open(folder)
    sent = [e for e in run.trace.events(Bottom, CutGradientDown, round_=1) if e.node == node]
    (gradient,) = [e.gradient for e in sent if isinstance(e, CutGradientDown)]
    (after,) = [e.arrays for e in sent if isinstance(e, Bottom) and e.up]
    before = next(e.arrays for e in sent if isinstance(e, Bottom))
    rows = list(run.key.order[node, 1, 0])
    gaps = {}
    for guess in {int(rows[row]), *range(candidates)} - {*rows[:row], *rows[row + 1 :]}:
        bottom = run.architecture.bottom(0)
        load(bottom, {name: before[name] for name in bottom.state_dict()})
        batch = run.key.images[[*rows[:row], guess, *rows[row + 1 :]]]
        bottom(batch).backward(torch.tensor(gradient))
        gaps[guess] = sum(
            float((w.data - run.plan.learning_rate * w.grad - torch.tensor(after[name])).norm())
            for name, w in bottom.named_parameters()
            if w.grad is not None
        )
    return min(gaps, key=lambda guess: gaps[guess]) == rows[row]


@pytest.mark.parametrize(
    ("protocol", "span", "own"),
    [("splitfed-v1", "training", {}), ("u-shaped", "round", {"bottoms": "relayed"})],
)
def test_relayed_bottoms_are_read_and_an_attack_on_them_is_not_above_the_ceiling(
    protocol: str, span: str, own: dict[str, Any], tmp_path: Path
) -> None:
    own = {"local_steps": 1, "momentum": 0.0, **own}
    model = {"name": "mnistnet", "cut": 2, **({"upper_cut": 7} if protocol == "u-shaped" else {})}
    folder = recorded(tmp_path, protocol, model=model, sigma=30.0, **own)
    found = ceiling_of_run(folder, collect="first", span=span, **{**FEW, "targets": 8})
    assert sound(found)
    hits = sum(
        names_by_bottom(folder, node=each.node, row=each.row, candidates=30)
        for each in found.messages
    )
    assert hits == len(found.messages) == 8
    assert found.value == pytest.approx(1.0)
    without = fmean(float(m.without_bottoms or 0) for m in found.messages)
    assert without > 0.1  # candidates of the row's label are left
    assert binom.sf(hits - 1, len(found.messages), without) < 0.001
    assert f"no bottom the ceiling is {without:.3f}" in "\n".join(found.lines())


def test_bottoms_that_step_together_have_a_first_message_only(tmp_path: Path) -> None:
    own = {"name": "mnistnet", "cut": 2}
    folder = recorded(tmp_path, "parallel-split", model=own, sync="step")
    assert sound(ceiling_of_run(folder, collect="first", **FEW))
    for asked in ({"collect": "last"}, {"collect": "first", "span": "round"}):
        with pytest.raises(NoCeilingError, match="how bottoms of 'parallel-split' step together"):
            ceiling_of_run(folder, **asked, **FEW)


def test_batchnorm_makes_a_batch_one_message(tmp_path: Path) -> None:
    own = {"name": "tests.support.deployed_network:network", "cut": 3}
    folder = recorded(tmp_path, "vanilla-split", model=own)
    with pytest.raises(UnpermittedModelError, match=rf"--model {own['name']}"):
        ceiling_of_run(folder, collect="last", **FEW)
    found = ceiling_of_run(folder, collect="last", model=str(own["name"]), **FEW)
    assert sound(found)
    assert {each.guesses for each in found.messages} == {1}


@pytest.mark.parametrize(
    "own", [{}, {"optimizer": "adam", "momentum": 0.0, "learning_rate": 0.01}], ids=["sgd", "adam"]
)
def test_later_messages_of_the_node_are_made_again_and_add_to_the_ceiling(
    own: dict[str, Any], tmp_path: Path
) -> None:
    model = {"name": "mnistnet", "cut": 5}
    folder = recorded(tmp_path, "vanilla-split", model=model, sigma=1.0, local_steps=4, **own)
    few = {"candidates": 60, "targets": 4, "draws": 40}
    more = ceiling_of_run(folder, collect="last", span="round", **few)
    assert sound(more)
    gains = [each.ceiling - float(each.alone or 1) for each in more.messages]  # same candidates
    error = max(2**0.5 * each.error for each in more.messages)
    assert min(gains) > -4 * error
    if own:  # Adam takes a whole step for one exchanged row, which shows in all later rows
        assert max(gains) > 4 * error
    few |= {"candidates": 10, "targets": 1}
    whole = ceiling_of_run(folder, collect="last", span="training", **few)
    assert sound(whole)
    assert not any(each.used_before for each in whole.messages)
    assert {each.round for each in whole.messages} == {1}  # the row's first use, whenever picked
    read = [each.read for each in whole.messages]
    places = [8 * (each.round - 1) + 4 * each.node + each.step for each in whole.messages]
    # Both nodes' batches from the row's first on, and test rows behind the last bottom.
    assert read == [2 * 2 * 4 - place + 1 for place in places]
    assert all(each.ceiling > float(each.alone or 0) - 4 * error for each in whole.messages)
    assert "over the training. Its first message alone" in "\n".join(whole.lines())
