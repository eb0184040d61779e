"""A training in memory and the attacks on it: the numbers of an experiment, and nothing left."""

import os
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, ClassVar

import pytest
import torch
from torch import Tensor, nn

import experiments.run.executor
import leakbed
from attacks.unsplit import UnSplit
from defenses.smashed_noise import SmashedNoise
from experiments.notebook import NoScoresError, Run
from experiments.run.runner import run as run_experiment
from experiments.settings.schema import SettingsError
from leakbed.contracts import (
    BrokenPluginError,
    DefenseState,
    Evidence,
    Guess,
    Knowledge,
    Seat,
    ThreatModel,
    View,
)
from leakbed.data import BadDataError
from leakbed.models import IllegalCutError
from strategies import PROTOCOLS, Protocol
from tests.support.adversaries import Doubling
from tests.support.tiny import images, plain

ROOT = Path(__file__).resolve().parents[2]
SETTINGS: dict[str, Any] = {"nodes": 2, "test": 0.2, "batch_size": 5, "local_steps": 2}
PACED = Protocol(
    exchanges="split", build=PROTOCOLS["vanilla-split"].build, options={"pace": (1, 2)}
)
SHORT = UnSplit(outer_steps=2, input_steps=2, model_steps=2)


@pytest.fixture(scope="module")
def temporary(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Path]:
    """The system's folder of temporary ones, empty before."""
    folder = tmp_path_factory.mktemp("temporary")
    with pytest.MonkeyPatch.context() as patched:
        patched.setattr(tempfile, "tempdir", str(folder))
        yield folder


@pytest.fixture(scope="module")
def run(temporary: Path) -> Run:
    found: Run = leakbed.train(
        model=plain(), data=images(), cut=1, defense=SmashedNoise(sigma=0.1), **SETTINGS
    )
    return found


@dataclass(frozen=True, kw_only=True)
class Looking:
    """Answers with one grey, and tells what it was given."""

    name: ClassVar[str] = "looking"
    source: ClassVar[str] = "of the tests"
    seen: ClassVar[list[View]] = []
    seat: str = "server"
    knows: str = ""

    @property
    def threat(self) -> ThreatModel:
        return ThreatModel(
            seat=Seat(self.seat),
            evidence=frozenset({Evidence.SMASHED}),
            needs=frozenset({Knowledge(self.knows)} if self.knows else ()),
        )

    def run(self, view: View, *, seed: int) -> Guess:
        self.seen.append(view)
        return Guess(images=torch.full((view.targets, view.rows, *view.image_shape), 0.5))


def test_objects_score_as_the_names_of_an_experiment_do(run: Run, tmp_path: Path) -> None:
    steps = {"outer_steps": 2, "input_steps": 2, "model_steps": 2}
    (named,) = run_experiment(
        {
            "name": "named",
            "data": {"name": "tests.support.tiny:images", "nodes": 2, "test": 0.2},
            "model": {"name": "tests.support.tiny:plain", "cut": 1},
            "protocol": {"name": "vanilla-split", "batch_size": 5, "local_steps": 2},
            "attack": [{"name": "unsplit", "targets": 4, **steps}],
            "defense": [{"name": "smashed-noise", "sigma": 0.1}],
        },
        out=tmp_path,
    )
    found = run.attack(SHORT, targets=4)
    assert found.scores == named.scores
    assert (found.baselines, found.card.control) == (named.baselines, named.control)
    assert (found.card.attack, found.card.utility) == ("unsplit", named.utility)
    assert run.attack("unsplit", targets=4, **steps).scores == named.scores


def test_the_recorded_noise_is_checked(run: Run, monkeypatch: pytest.MonkeyPatch) -> None:
    assert run.attack("mean-image", targets=2).card.noise == ()
    honest = SmashedNoise.protect_smashed

    def planted(self: SmashedNoise, state: DefenseState, smashed: Tensor) -> Any:
        return honest(self, replace(state, messages=0, stream=1), smashed)

    monkeypatch.setattr(SmashedNoise, "protect_smashed", planted)
    repeats: Run = leakbed.train(
        model=plain(), data=images(), cut=1, defense=SmashedNoise(sigma=0.1), **SETTINGS
    )
    found = repeats.attack("mean-image", targets=2)
    assert any("noise of two messages: NOT" in each for each in found.card.noise)
    assert "noise of two messages: NOT" in repr(found)
    monkeypatch.setattr(experiments.run.executor, "noise_of_run", None)  # checked once for all
    assert repeats.attack("constant-image", targets=2).card.noise == found.card.noise


def test_nothing_is_printed_and_no_folder_left(
    run: Run, temporary: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    leakbed.train(model=plain, data=images, cut=1, **SETTINGS)
    run.attack("smashed-as-image", targets=2)
    with pytest.raises(BadDataError):
        leakbed.train(model=plain, data=(images()[0] * 9, images()[1]), cut=1, **SETTINGS)
    assert list(temporary.glob("leakbed*")) == []
    assert capfd.readouterr() == ("", "")


def test_what_was_sent_stands_beside_what_was_behind_it(run: Run) -> None:
    assert list(run.smashed) == list(run.cut_gradients) == list(run.truth)
    assert sorted(run.smashed) == [(node, 1, step) for node in (0, 1) for step in (0, 1)]
    assert run.updates == {}
    undefended: Run = leakbed.train(model=plain(), data=images(), cut=1, **SETTINGS)
    prepared = undefended.prepared
    bottom = prepared.architecture.bottom(prepared.stream("victim-init"))
    first = next(iter(undefended.truth))  # the first batch of the run meets the first weights
    private = undefended.truth[first]
    torch.testing.assert_close(bottom(private.images), undefended.smashed[first])
    bright = torch.stack([private.images[:, 0, 2 * k : 2 * k + 2].mean((1, 2)) for k in range(3)])
    assert torch.equal(bright.argmax(0), private.labels)


def test_the_guess_and_the_truth_behind_it_stand_beside_the_scores(run: Run) -> None:
    found = run.attack(Looking, targets=4)
    assert found.guess is not None
    assert found.truth is not None
    guessed, private = found.guess.images, found.truth.images
    assert guessed is not None
    assert private.shape == guessed.shape == (4, 1, 1, 6, 6)
    mse = (guessed - private).square().flatten(1).mean(1)
    assert found.scores["mse"]["values"] == pytest.approx(mse.tolist())
    last = [place for place in run.truth if place[1] == 1]
    sent = torch.cat([run.truth[place].images for place in last])
    assert all(any(torch.equal(one, other) for other in sent) for one in private[:, 0])
    lines = repr(found).splitlines()
    assert "reads the activations a node sends at the cut" in lines[0]
    assert any("mse" in line and "mean-public" in line for line in lines)


def test_updates_stand_beside_all_rows_of_a_round() -> None:
    run: Run = leakbed.train(
        model=plain(), data=images(), protocol="fedavg", rounds=2, learning_rate=0.5, **SETTINGS
    )
    assert list(run.updates) == list(run.truth) == [(n, r) for r in (1, 2) for n in (0, 1)]
    before, after = run.updates[0, 1]
    assert before.keys() == plain().state_dict().keys()
    assert not torch.equal(before["0.weight"], after["0.weight"])
    assert run.truth[0, 1].images.shape == (10, 1, 6, 6)
    assert (run.smashed, run.cut_gradients) == ({}, {})
    assert run.attack("constant-image", targets=2).card.protocol == "fedavg"


def test_an_attack_sees_what_its_threat_model_names_alone(run: Run) -> None:
    card = run.attack(Looking, targets=3).card
    view = Looking.seen[-1]
    assert card.threat is not None
    assert "server" in card.threat.in_words
    for private in ("known_labels", "own_images", "public_images", "architecture"):
        assert getattr(view, private) is None
    assert view.cut_gradient is None
    assert view.smashed is not None


def test_who_knows_the_layers_of_a_network_knows_no_weights() -> None:
    network = plain()
    run: Run = leakbed.train(model=network, data=images(), cut=1, **SETTINGS)
    run.attack(Looking(knows="architecture"), targets=1)
    drawn = Looking.seen[-1].architecture.bottom(7)[0].weight
    prepared = run.prepared
    victims = prepared.architecture.bottom(prepared.stream("victim-init"))[0].weight
    handed_over = network[0].weight
    assert isinstance(drawn, Tensor)
    for other in (victims, handed_over):
        assert isinstance(other, Tensor)
        assert not torch.equal(drawn, other)


def test_a_seat_that_has_no_such_knowledge_is_refused(run: Run) -> None:
    with pytest.raises(NoScoresError, match="inputs belong to the node"):
        run.attack(Looking(knows="own-images"), targets=2)
    with pytest.raises(NoScoresError, match="reads update"):
        run.attack("dlm", targets=2)


def test_an_active_attack_gets_a_training_of_its_own_with_a_control(run: Run) -> None:
    card = run.attack(Doubling, targets=4, checkpoint_every=2).card
    assert card.control is not None
    assert "never_hijacked" in card.control


def test_an_attack_that_breaks_is_told_with_its_line(run: Run) -> None:
    @dataclass(frozen=True, kw_only=True)
    class Broken(Looking):
        name: ClassVar[str] = "broken"

        def run(self, view: View, *, seed: int) -> Guess:
            raise ZeroDivisionError("by nothing")

    with pytest.raises(BrokenPluginError, match=r"Broken.*ZeroDivisionError: by nothing.*line"):
        run.attack(Broken)


def test_a_cell_that_is_run_again_draws_the_same(run: Run) -> None:
    def cell() -> type:
        @dataclass(frozen=True, kw_only=True)
        class Noise(Looking):
            name: ClassVar[str] = "noise"

            def run(self, view: View, *, seed: int) -> Guess:
                drawn = torch.Generator().manual_seed(seed)
                shape = (view.targets, view.rows, *view.image_shape)
                return Guess(images=torch.rand(shape, generator=drawn))

        return Noise

    first, again = (run.attack(cell(), targets=3) for _ in range(2))
    assert first.card.attack != again.card.attack
    assert first.scores == again.scores
    assert any("this card alone does not tell how" in note for note in first.card.notes)


def test_a_class_of_a_cell_that_is_mended_is_tried_anew(run: Run) -> None:
    def cell(*, careless: bool) -> type:
        @dataclass(frozen=True, kw_only=True)
        class Drawing(Looking):
            name: ClassVar[str] = "drawing"
            drawn: ClassVar[list[float]] = []

            def run(self, view: View, *, seed: int) -> Guess:
                self.drawn.append(0.1 * careless)
                shape = (view.targets, view.rows, *view.image_shape)
                return Guess(images=torch.full(shape, sum(self.drawn)))

        return Drawing

    with pytest.raises(BrokenPluginError, match="answers twice with other images"):
        run.attack(cell(careless=True), targets=2)
    assert run.attack(cell(careless=False), targets=2).scores["mse"]["mean"] > 0


@pytest.mark.parametrize(
    ("given", "error", "said"),
    [
        ({"nodse": 2}, SettingsError, "unknown setting of a training 'nodse'; did you mean 'nodes"),
        ({"cut": 9}, IllegalCutError, "9"),
        ({"defense": "weight-nois"}, SettingsError, "did you mean 'weight-noise'"),
        ({"defense": "weight-noise"}, SettingsError, "protects update messages"),
        ({"model": 3}, SettingsError, r"model\.name.*valid string.*3"),
        ({"model": object()}, SettingsError, "model: <object object.*no model to use"),
        ({"protocol": object()}, SettingsError, "protocol: <object object.*strategies.Protocol"),
        ({"protocol": PACED, "pace": 3}, SettingsError, "pace = 3: .*protocol_.* takes 1 or 2"),
        ({"protocol": PACED, "pac": 2}, SettingsError, "setting of a training 'pac'; .*'pace'"),
        ({"pace": 2}, SettingsError, "unknown setting of a training 'pace'"),
        ({"data": {"a": 1}}, SettingsError, r"data\.name.*valid string"),
        ({"data": {1, 2}}, BadDataError, "data set: this is nothing to read rows from"),
        ({"defense": Looking()}, SettingsError, "Looking.* is no defence to use: it is an attack"),
    ],
)
def test_bad_input_is_named(given: dict[str, Any], error: type[Exception], said: str) -> None:
    good: dict[str, Any] = {"model": plain, "data": images, "cut": 1, **SETTINGS}
    with pytest.raises(error, match=said):
        leakbed.train(**{**good, **given})


def test_what_a_run_did_not_keep_cannot_be_attacked(run: Run) -> None:
    last: Run = leakbed.train(
        model=plain, data=images, cut=1, rounds=2, keep_rounds="last", **SETTINGS
    )
    with pytest.raises(SettingsError, match="keeps its last round alone"):
        last.attack("smashed-as-image", collect="first")
    with pytest.raises(SettingsError, match="2 attacks; call attack once for each"):
        run.attack(Looking, seat=["server", "client"])


class Layers(nn.Module):
    """A network with an attention layer, whose weights are drawn in another way."""

    def __init__(self) -> None:
        super().__init__()
        self.attends = nn.MultiheadAttention(6, 2, batch_first=True)
        self.top = nn.Linear(36, 3)

    def forward(self, given: Tensor) -> Tensor:
        rows = given.flatten(1, 2)
        seen, _ = self.attends(rows, rows, rows)
        found: Tensor = self.top(seen.flatten(1))
        return found


def test_a_module_that_is_no_sequence_trains_whole() -> None:
    run: Run = leakbed.train(model=Layers(), data=images(), protocol="fedavg", **SETTINGS)
    assert run.updates[0, 1].before.keys() == Layers().state_dict().keys()
    assert "fedavg" in repr(run)


@pytest.mark.runtime
def test_the_page_runs_in_a_fresh_process_outside_the_repository(tmp_path: Path) -> None:
    page = (ROOT / "docs" / "notebook.md").read_text()
    first, *others = [each.partition("```")[0] for each in page.split("```python\n")[1:]]
    assert len(first.strip().splitlines()) <= 10
    here, temporary = tmp_path / "here", tmp_path / "temporary"
    here.mkdir()
    temporary.mkdir()
    done = subprocess.run(
        [sys.executable, "-"],
        input="\n".join([first, *others]),
        cwd=here,
        env={**os.environ, "PYTHONPATH": str(ROOT), "TMPDIR": str(temporary)},
        check=True,
        capture_output=True,
        text=True,
    )
    scores = [float(each) for each in done.stdout.split()]
    assert len(scores) == 2, done.stdout
    assert done.stderr == ""
    assert [each.name for each in here.iterdir()] == ["results"]
    assert list(temporary.glob("leakbed*")) == []
