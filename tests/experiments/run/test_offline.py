"""A trace recorded here is attacked there, with or without its answers."""

import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file

from experiments.results.cards import Card, card_key
from experiments.run.offline import attack_trace
from experiments.run.runner import run
from experiments.run.targets import MisfitError
from experiments.settings.schema import SettingsError
from leakbed.tap.segments import TraceError
from leakbed.tensors import UnavailableDeviceError, describe_device, resolve_device

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
    guess = load_file(tmp_path / "out" / "guesses" / f"{card.guess_key}.safetensors")
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


def test_the_numbers_are_those_of_the_runs_card_unless_a_seed_is_asked_for(tmp_path: Path) -> None:
    unsplit = {"targets": 2, "outer_steps": 2, "input_steps": 3, "model_steps": 3}
    (card,) = run(
        {**TABLE, "seed": 3, "attack": [{"name": "unsplit", **unsplit}]}, out=tmp_path / "run"
    )
    (recorded,) = (tmp_path / "run" / "runs").iterdir()
    trace, answers = recorded / "trace", recorded / "answers"

    def again(name: str, **more: Any) -> Card:
        return attack_trace(trace, "unsplit", out=tmp_path / name, settings=unsplit, **more)

    scored = again("scored", answers=answers)
    assert (scored.seed, scored.attack_seed) == (3, 3)
    assert scored.scores == card.scores
    assert scored.baselines == card.baselines
    blind = again("blind")  # the run's folder says its seed where the answers are not given
    assert (blind.seed, blind.attack_seed) == (3, 3)
    guesses = [
        load_file(tmp_path / name / "guesses" / f"{each.guess_key}.safetensors")["images"]
        for name, each in (("run", card), ("blind", blind))
    ]
    assert torch.equal(*guesses)
    anew = again("anew", answers=answers, seed=4)
    assert (anew.seed, anew.attack_seed) == (3, 4)
    assert anew.scores["mse"] != card.scores["mse"]
    assert anew.key != scored.key
    shutil.copytree(trace, tmp_path / "alone" / "trace")
    (tmp_path / "alone" / "trace").rename(tmp_path / "given")
    alone = attack_trace(tmp_path / "given", "unsplit", out=tmp_path / "out", settings=unsplit)
    assert (alone.seed, alone.attack_seed) == (0, 0)  # a trace alone does not say what the run was
    assert not any(b'"seed"' in file.read_bytes() for file in trace.rglob("*.jsonl"))


def test_what_does_not_fit_is_refused(recorded: Path, tmp_path: Path) -> None:
    with pytest.raises(MisfitError, match="'fedavg'"):
        attack_trace(recorded / "trace", "dlm-plus", out=tmp_path)
    with pytest.raises(MisfitError, match=r"a recorded trace cannot repeat.*\[\[attack\]\]"):
        attack_trace(recorded / "trace", "fsha", out=tmp_path)
    with pytest.raises(SettingsError, match="did you mean 'unsplit'"):
        attack_trace(recorded / "trace", "unsplitt", out=tmp_path)
    with pytest.raises(TraceError, match="holds no trace"):
        attack_trace(tmp_path, "unsplit", out=tmp_path)


def test_the_card_says_what_computed_it_and_its_key_depends_on_the_type(
    recorded: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    keyed: list[Any] = []

    def key(settings: dict[str, Any], source: str) -> str:
        keyed.append(settings["device"])
        return card_key(settings, source)

    monkeypatch.setattr("experiments.run.offline.card_key", key)
    card = attack_trace(recorded / "trace", "constant-image", out=tmp_path)
    found = resolve_device("auto")
    assert card.device == describe_device(found)
    assert keyed == [found.type], "the type that 'auto' found, so that a GPU's card is another"
    with pytest.raises(UnavailableDeviceError):
        attack_trace(recorded / "trace", "constant-image", out=tmp_path, device="cuda:99")
