"""A recording that lacks something, or is of another model: what is missing is said, no number."""

import json
import shutil
from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from experiments.run import recorded
from experiments.run.ceilings import ceiling_of_run
from experiments.run.runner import run
from experiments.run.targets import Evidences
from leakbed.contracts.noise_laws import NoCeilingError

FEW: dict[str, Any] = {"candidates": 40, "targets": 2, "draws": 2}


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    out = tmp_path_factory.mktemp("fedavg")
    table: dict[str, Any] = {
        "name": "small",
        "data": {"size": 200, "nodes": 2},
        "model": {"name": "mnistnet"},
        "protocol": {"name": "fedavg", "rounds": 1, "batch_size": 4, "local_steps": 1},
        "attack": [{"name": "mean-image", "targets": 1}],
        "defense": [{"name": "weight-noise", "scale": 0.01, "form": "corrected"}],
    }
    run(table, out=out)
    (only,) = (out / "runs").iterdir()
    return only


def keyed(folder: Path, out: Path, **changes: Any) -> Path:
    """Return a copy of a run whose answer key says something else."""
    copy = Path(shutil.copytree(folder, out / "copy"))
    file = copy / "answers" / "answers.json"
    file.write_text(json.dumps({**json.loads(file.read_text()), **changes}))
    return copy


def test_a_sound_recording_has_a_number(folder: Path) -> None:
    assert 0 < ceiling_of_run(folder, **FEW).value <= 1


@pytest.mark.parametrize(
    ("own", "why"),
    [
        ({"intruder": True}, "a node of this run was malicious"),
        ({"defenses": [["nobody.has:It", {}]]}, "a class of somebody's own"),
    ],
)
def test_how_nodes_trained_must_be_covered(
    own: dict[str, Any], why: str, folder: Path, tmp_path: Path
) -> None:
    about = json.loads((folder / "answers" / "answers.json").read_text())
    copy = keyed(folder, tmp_path, training={**about["training"], **own})
    with pytest.raises(NoCeilingError, match=why):
        ceiling_of_run(copy, **FEW)


def test_strips_of_images_have_no_ceiling_yet(folder: Path, tmp_path: Path) -> None:
    with pytest.raises(NoCeilingError, match="strips of images"):
        ceiling_of_run(keyed(folder, tmp_path, parties=2), **FEW)


def test_weights_of_another_model_are_refused_by_name(
    folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    honest = recorded.architecture_of

    def other(about: Mapping[str, Any]) -> Any:
        return replace(honest(about), num_classes=12)

    monkeypatch.setattr(recorded, "architecture_of", other)
    with pytest.raises(NoCeilingError, match=r"of another model: '.*' is \(10, .*has \(12, "):
        ceiling_of_run(folder, **FEW)


def test_arrays_in_another_order_are_taken_by_their_names(
    folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    expected = ceiling_of_run(folder, **FEW)
    honest = Evidences.of

    def turned(*given: Any) -> Evidences:
        found = honest(*given)
        updates = [
            replace(
                each,
                before=dict(reversed(each.before.items())),
                after=dict(reversed(each.after.items())),
            )
            for each in found.updates
        ]
        return replace(found, updates=updates)

    monkeypatch.setattr(Evidences, "of", turned)
    assert ceiling_of_run(folder, **FEW).table() == expected.table()


def test_a_node_that_does_not_count_its_samples_has_no_share_of_the_sum(
    folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    honest = Evidences.of

    def uncounted(*given: Any) -> Evidences:
        found = honest(*given)
        return replace(found, updates=[replace(each, examples=None) for each in found.updates])

    monkeypatch.setattr(Evidences, "of", uncounted)
    with pytest.raises(NoCeilingError, match="how many samples it trained on"):
        ceiling_of_run(folder, summed=True, **FEW)


def test_canaries_hide_by_which_labels_rows_were_dealt_out(folder: Path, tmp_path: Path) -> None:
    about = json.loads((folder / "answers" / "answers.json").read_text())
    for partition in ("linear", "dirichlet"):
        training = {**about["training"], "partition": partition}
        copy = keyed(folder, tmp_path / partition, canaries=[0], training=training)
        if partition == "linear":
            assert 0 < ceiling_of_run(copy, **FEW).value <= 1
            continue
        with pytest.raises(NoCeilingError, match="those of canaries were drawn anew"):
            ceiling_of_run(copy, **FEW)
