"""A trace recorded here is attacked there, with or without its answers."""

import shutil
from pathlib import Path

import pytest
from safetensors.torch import load_file

from experiments.offline import attack_trace
from experiments.runner import run
from experiments.settings import SettingsError
from leakbed.targets import MisfitError
from leakbed.trace import TraceError

TABLE = {
    "name": "small",
    "data": {"size": 400, "nodes": 2},
    "model": {"name": "mnistnet", "cut": 2},
    "protocol": {"name": "vanilla-split", "batch_size": 16, "local_steps": 2},
    "attack": [{"name": "smashed-as-image", "targets": 4}],
}


@pytest.fixture(scope="module")
def recorded(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("run")
    run(TABLE, out=folder)
    (only,) = (folder / "runs").iterdir()
    return only


def test_a_copied_trace_can_be_attacked_without_answers(recorded: Path, tmp_path: Path) -> None:
    trace = shutil.copytree(recorded / "trace", tmp_path / "elsewhere")
    card = attack_trace(trace, "smashed-as-image", out=tmp_path / "out", settings={"targets": 3})
    assert (card.status, card.scores, card.baselines) == ("unscored", {}, {})
    guess = load_file(tmp_path / "out" / "guesses" / f"{card.key}.safetensors")
    assert guess["images"].shape == (3, 1, 1, 28, 28)
    assert not (tmp_path / "out" / "truths").exists()
    assert (tmp_path / "out" / "pictures" / f"{card.key}.png").stat().st_size > 100


def test_with_answers_it_is_scored(recorded: Path, tmp_path: Path) -> None:
    card = attack_trace(
        recorded / "trace",
        "smashed-as-image",
        answers=recorded / "answers",
        out=tmp_path,
        settings={"targets": 4},
    )
    assert card.status == "done"
    assert card.scores["abs_pearson"]["mean"] > 0.3  # type: ignore[index,call-overload,operator]
    assert card.baselines
    assert (card.protocol, card.cut, card.data) == ("vanilla-split", 2, "mnist-5k")


def test_what_does_not_fit_is_refused(recorded: Path, tmp_path: Path) -> None:
    with pytest.raises(MisfitError, match="'fedavg'"):
        attack_trace(recorded / "trace", "dlm-plus", out=tmp_path)
    with pytest.raises(MisfitError, match=r"a recorded trace cannot repeat.*\[\[attack\]\]"):
        attack_trace(recorded / "trace", "fsha", out=tmp_path)
    with pytest.raises(SettingsError, match="did you mean 'unsplit'"):
        attack_trace(recorded / "trace", "unsplitt", out=tmp_path)
    with pytest.raises(TraceError, match="holds no trace"):
        attack_trace(tmp_path, "unsplit", out=tmp_path)
