"""A whole experiment on small data: cards, resuming, sharing runs, failures, misfits."""

import json
import re
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from traceback import extract_stack
from types import SimpleNamespace
from typing import Any, ClassVar

import pytest
import torch
from flwr.clientapp import ClientApp
from flwr.serverapp import Grid
from flwr.serverapp.strategy import Strategy
from torch import Tensor, nn
from typer.testing import CliRunner

from clients.node import BatchTooLargeError
from experiments.cli import app
from experiments.report.page import write_report
from experiments.results.cards import Card, Exposure
from experiments.results.folder import left_out
from experiments.run import attack, executor, training_run
from experiments.run.attack import Cell
from experiments.run.fit import fitting
from experiments.run.runner import run
from experiments.run.train import NonFiniteError
from experiments.settings.cells import cells
from experiments.settings.load import FLAGSHIP, load_settings
from leakbed import provenance
from leakbed.contracts import Evidence, Guess, Seat, ThreatModel, View
from leakbed.data.config import DataConfig
from leakbed.grids import LocalGrid, NodeFailed
from leakbed.hijack import HijackDivergedError
from leakbed.models import IllegalCutError
from leakbed.provenance import EditedCodeError
from leakbed.tap.trace import Trace

EXPERIMENTS = Path(executor.__file__).parents[1]
TABLE: dict[str, Any] = {
    "name": "small",
    "data": {"name": "mnist-5k", "size": 200, "nodes": 2},
    "model": {"name": "mlp2", "cut": 1},
    "protocol": {"name": "vanilla-split", "batch_size": 16, "local_steps": 3},
    "attack": [{"name": "smashed-as-image", "targets": 4}, {"name": "constant-image"}],
}


class Told:
    def __init__(self) -> None:
        self.total, self.left_out, self.done, self.notes = 0, 0, list[str](), list[str]()

    def start(self, total: int, *, left_out: int = 0) -> None:
        self.total, self.left_out = total, left_out

    def advance(self, label: str) -> None:
        self.done.append(label)

    def note(self, text: str) -> None:
        self.notes.append(text)


def test_writes_a_card_per_cell_and_keeps_what_it_needs(tmp_path: Path) -> None:
    told = Told()
    cards = run(TABLE, out=tmp_path, progress=told)
    assert [card.status for card in cards] == ["done", "done"]
    assert (told.total, len(told.done)) == (2, 2)
    first = cards[0]
    pearson = [card.scores["abs_pearson"]["mean"] for card in cards]  # type: ignore[index,call-overload]
    assert pearson[0] > pearson[1] == 0, "a constant correlates with nothing"
    assert 0 <= float(str(first.utility["test_accuracy"])) <= 1
    assert min(float(str(first.cost[way])) for way in ("bytes_up", "bytes_down")) > 0
    assert first.threat is not None
    assert {"constant", "mean-public", "nearest-public", "chance"} <= set(first.baselines)
    for card in cards:
        written = json.loads((tmp_path / "cards" / f"{card.key}.json").read_text())
        assert written["attack"] == card.attack
        for folder in ("guesses", "truths"):
            assert (tmp_path / folder / f"{card.guess_key}.safetensors").stat().st_mode & 0o077 == 0
    assert len(list((tmp_path / "runs").iterdir())) == 1, "both attacks share one run"


def test_a_trace_is_verified_once_for_all_attacks_on_it(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    opened = []

    class Counted(Trace):
        def __init__(self, folder: str | Path, *, partial: bool = False) -> None:
            opened.append(folder)
            super().__init__(folder, partial=partial)

    for module in (attack, executor, training_run):
        monkeypatch.setattr(module, "Trace", Counted, raising=False)
    assert len(run(TABLE, out=tmp_path)) == 2
    assert len(opened) == 1


def test_a_finished_cell_is_not_run_again(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    before = run(TABLE, out=tmp_path)
    monkeypatch.setattr(executor, "train", pytest.fail)
    monkeypatch.setattr(executor, "answer", pytest.fail)
    assert run(TABLE, out=tmp_path) == before


def test_runs_can_be_left_out_once_their_cells_are_done(tmp_path: Path) -> None:
    kept, tidied = (
        run(TABLE, out=tmp_path / name, overrides=[f"keep_runs={value}"])
        for name, value in (("a", "true"), ("b", "false"))
    )
    assert [card.key for card in kept] == [card.key for card in tidied]
    assert [card.scores for card in kept] == [card.scores for card in tidied]
    assert len(list((tmp_path / "a" / "runs").iterdir())) == 1
    assert list((tmp_path / "b" / "runs").iterdir()) == []
    assert len(list((tmp_path / "b" / "guesses").iterdir())) == 2


@pytest.mark.parametrize("protocol", ["vanilla-split", "splitfed-v1", "fedavg"])
def test_training_that_diverges_is_a_result_and_the_other_cells_run(
    tmp_path: Path, protocol: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    trainings: list[float] = []
    train = executor.train

    def counted(prepared: Any, *rest: Any, **more: Any) -> Any:
        trainings.append(prepared.settings.protocol.learning_rate)
        return train(prepared, *rest, **more)

    monkeypatch.setattr(executor, "train", counted)
    table = {**TABLE, "protocol": {**TABLE["protocol"], "name": protocol}}
    table["attack"] = [{"name": "mean-image", "targets": 2}, {"name": "constant-image"}]
    sweep = ["sweep={'protocol.learning_rate'=[1e30, 0.1]}"]
    cards = run(table, out=tmp_path, overrides=sweep)
    assert [card.status for card in cards] == ["diverged", "diverged", "done", "done"]
    assert trainings == [1e30, 0.1], "a run that diverges is tried once, whoever would attack it"
    for card in cards[:2]:
        assert re.search(r"node \d.* round 1.*learning_rate", str(card.why))
        assert (card.scores, card.utility) == ({}, {})
    assert len(list((tmp_path / "runs").iterdir())) == 1, "nothing of it is left"
    monkeypatch.setattr(executor, "train", pytest.fail)
    assert run(table, out=tmp_path, overrides=sweep) == cards


@pytest.mark.parametrize(
    "error",
    [
        HijackDivergedError("fsha left the finite numbers"),
        NonFiniteError("smashed of node 0"),
        # As Flower's deployment and its simulation pass a node's error on.
        NodeFailed(
            0, "train", "<class 'clients.node.UnstableTrainingError'>:<'left the finite numbers'>"
        ),
        NodeFailed(0, "train", "ClientAppException: training at node 0 left the finite numbers"),
    ],
)
def test_whoever_diverged_there_is_a_card(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, error: Exception
) -> None:
    def fail(*_: Any, **__: Any) -> None:
        raise error

    monkeypatch.setattr(executor, "train", fail)
    cards = run(TABLE, out=tmp_path)
    assert [(card.status, card.why) for card in cards] == [("diverged", str(error))] * 2


def test_a_run_stays_until_the_last_group_that_may_need_it_is_done(tmp_path: Path) -> None:
    first, second = (SimpleNamespace(runs={tmp_path / own, tmp_path / "shared"}) for own in "ab")
    for name in ("a", "b", "shared", "foreign"):
        (tmp_path / name).mkdir()
    tidying: Any = executor.RunCleanup([first, second], keep=False)  # type: ignore[list-item]
    tidying.after(second)
    assert {path.name for path in tmp_path.iterdir()} == {"a", "shared", "foreign"}
    tidying.after(first)
    assert [path.name for path in tmp_path.iterdir()] == ["foreign"]


def test_a_missing_card_is_attacked_again_without_training(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    before = run(TABLE, out=tmp_path)
    (tmp_path / "cards" / f"{before[0].key}.json").unlink()
    monkeypatch.setattr(executor, "train", pytest.fail)
    again = run(TABLE, out=tmp_path)
    assert again[0].scores == before[0].scores


TINY: dict[str, Any] = {
    "name": "tiny",
    "data": {"name": "tests.support.tiny:images", "nodes": 2, "test": 0.2},
    "model": {"name": "tests.support.tiny:plain", "cut": 1},
    "protocol": {"name": "vanilla-split", "batch_size": 5, "rounds": 2, "local_steps": 2},
}


@pytest.mark.parametrize("protocol", ["vanilla-split", "fedavg"])
def test_a_card_says_what_decides_its_numbers(tmp_path: Path, protocol: str) -> None:
    attacks: list[dict[str, Any]] = [
        {"name": "constant-image", "targets": 2, "tuned_on": "published"},
        {"name": "mean-image", "targets": 2, "collect": "first"},
    ]
    if protocol == "vanilla-split":
        attacks.append({"name": "constant-image", "targets": 3, "when": "inference"})
    cards = run({**TINY, "attack": attacks}, out=tmp_path, overrides=[f"protocol.name={protocol}"])
    assert [card.tuned_on for card in cards] == ["published", "default", "default"][: len(attacks)]
    found = [card.exposure for card in cards if card.exposure is not None]
    split = protocol == "vanilla-split"
    rows, steps = (5, None) if split else (10, 2)
    last = Exposure(round=2, trained="yes", mode="train", rows=rows, steps=steps)
    # Of a first round in turn the second node starts from what the first one left.
    partly: Any = "partly" if split else "no"
    first = Exposure(round=1, trained=partly, mode="train", rows=rows, steps=steps)
    assert found[:2] == [last, first]
    if split:
        assert (found[2].mode, found[2].trained, found[2].round) == ("eval", "yes", 2)


def test_the_mode_on_a_card_is_the_networks(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    modes = list[bool]()
    forward = nn.BatchNorm2d.forward

    def watched(layer: nn.BatchNorm2d, images: Tensor) -> Tensor:
        modes.append(layer.training)
        return forward(layer, images)

    table = {**TINY, "attack": [{"name": "constant-image", "targets": 2}]}
    for protocol in ("vanilla-split", "fedavg"):
        modes.clear()
        with monkeypatch.context() as patch:
            patch.setattr(nn.BatchNorm2d, "forward", watched)
            chosen = [
                f"protocol.name={protocol}",
                "model.name='tests.support.tiny:stateful'",
                "model.cut=3",
            ]
            (card,) = run(table, out=tmp_path / protocol, overrides=chosen)
        assert card.exposure is not None
        assert card.exposure.mode == "train"
        assert True in modes


@dataclass(frozen=True, kw_only=True)
class Silent:
    """An attack that answers nothing."""

    name: ClassVar[str] = "constant-image"
    source: ClassVar[str] = "https://example.org"
    threat: ClassVar[ThreatModel] = ThreatModel(
        seat=Seat.SERVER, evidence=frozenset({Evidence.NOTHING})
    )

    def run(self, view: View, *, seed: int) -> Guess:
        return Guess(objective=torch.zeros(view.targets))


@dataclass(frozen=True, kw_only=True)
class Loud(Silent):
    """An attack that answers with more than white."""

    def run(self, view: View, *, seed: int) -> Guess:
        return Guess(images=torch.full((view.targets, 1, *view.image_shape), 1.5))


def test_what_a_reader_should_know_is_one_line_each(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    attacks = [{"name": "constant-image", "targets": 500}]
    name = "model.name='tests.support.tiny:ending_in_softmax'"
    with monkeypatch.context() as patch:
        patch.setitem(attack.ATTACKS, "constant-image", Loud)
        (card,) = run({**TINY, "attack": attacks}, out=tmp_path, overrides=[name])
    few, softmax, small = card.notes
    assert few == "20 targets of the 500 asked for: round 2 holds no more messages to attack"
    assert softmax.startswith("the network ends in a Softmax, of which the loss takes the softmax")
    assert small == "SSIM is left out: images of 6 x 6 pixels hold no window of 11 x 11"
    assert card.scores["clipped"] == 1
    (plain,) = run(
        {**TINY, "attack": [{"name": "constant-image", "targets": 2}]}, out=tmp_path / "plain"
    )
    assert plain.notes == (small,)
    assert plain.scores["clipped"] == 0


def test_an_empty_guess_is_refused_and_the_other_cells_run(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(attack.ATTACKS, "constant-image", Silent)
    attacks = [{"name": "constant-image", "targets": 2}, {"name": "mean-image", "targets": 2}]
    silent, other = run({**TINY, "attack": attacks}, out=tmp_path)
    assert (silent.status, other.status) == ("unfit", "done")
    assert str(silent.why).startswith("constant-image returned a Guess of nothing; set at least")


def test_the_same_settings_give_the_same_scores(tmp_path: Path) -> None:
    first, second = (run(TABLE, out=tmp_path / name) for name in ("a", "b"))
    assert [card.scores for card in first] == [card.scores for card in second]
    other = run(TABLE, out=tmp_path / "c", overrides=["seed=1"])
    assert other[0].scores != first[0].scores


def test_pairs_that_do_not_fit_are_cards_that_say_why(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(executor, "train", pytest.fail)  # nothing fits, so nothing is trained
    table = {
        **TABLE,
        "attack": [{"name": "dlm-plus"}],
        "defense": [{"name": "none"}, {"name": "weight-noise"}],
    }
    attack, defense = run(table, out=tmp_path)
    assert attack.status == defense.status == "unfit"
    assert "'fedavg'" in str(attack.why)
    assert "smashed-noise" in str(defense.why).partition("; use ")[2].split(" or ")


CROSSED: dict[str, Any] = {
    **TABLE,
    "attack": [
        {"name": "smashed-as-image", "targets": 4},
        {"name": "mean-image", "targets": 4},
        {"name": "constant-image", "targets": 4},
    ],
    "defense": [{"name": "none"}, {"name": "weight-noise"}],
    "case": [
        {"name": "weights", "protocol.name": "fedavg"},
        {"name": "split", "attacks": ["constant-image"]},
    ],
}


def pairs(cards: list[Card]) -> list[tuple[str, str, str, str]]:
    return [(card.case, card.attack, card.defense, card.status) for card in cards]


def test_pairs_that_cannot_fit_and_that_no_case_names_are_no_cells(tmp_path: Path) -> None:
    told = Told()
    cards = run(CROSSED, out=tmp_path, progress=told)
    wanted = [
        ("weights", "mean-image", "none", "done"),
        ("weights", "constant-image", "none", "done"),
        ("weights", "mean-image", "weight-noise", "done"),
        ("weights", "constant-image", "weight-noise", "done"),
        ("split", "constant-image", "none", "done"),
    ]
    # smashed-as-image fits no case, and nothing but its cards says so.
    assert [pair for pair in pairs(cards) if pair[1] != "smashed-as-image"] == wanted
    unfit = [pair for pair in pairs(cards) if pair[1] == "smashed-as-image"]
    assert {status for *_, status in unfit} == {"unfit"}
    assert len(unfit) == 2
    assert (told.total, told.left_out) == (7, 1)
    assert left_out(tmp_path) == 1
    assert "1 more pair of a case" in write_report(tmp_path).read_text()


def test_what_a_case_names_is_a_cell_also_where_it_cannot_fit(tmp_path: Path) -> None:
    weights, split = CROSSED["case"]
    named = {"attacks": ["smashed-as-image"], "defenses": ["none", "weight-noise"]}
    attacks = CROSSED["attack"][:2]
    table = {**CROSSED, "attack": attacks, "case": [weights, {**split, **named}]}
    assert {pair[2:] for pair in pairs(run(table, out=tmp_path)) if pair[0] == "split"} == {
        ("none", "done"),
        ("weight-noise", "unfit"),
    }


def test_the_demonstration_has_the_cells_that_fit() -> None:
    asked = [Cell.of(each) for each in cells(load_settings(FLAGSHIP))]
    assert (len(asked), len(fitting(asked))) == (94, 64)


def test_the_demonstration_reports_no_seed_that_its_noise_was_chosen_on() -> None:
    text = FLAGSHIP.read_text()
    assert "chosen on seeds 101 and 102" in text
    found = cells(load_settings(FLAGSHIP))
    assert {cell.training.seed for cell in found}.isdisjoint({101, 102})
    assert all(cell.ceiling is not None for cell in found)


def test_federated_weights_go_through_the_same_runner(tmp_path: Path) -> None:
    protocol = {"name": "fedavg", "batch_size": 1, "local_steps": 1, "learning_rate": 0.1}
    attack = {"name": "dlm-plus", "targets": 2, "iterations": 40, "restarts": 1}
    table = {
        **TABLE,
        "model": {"name": "mlp2", "activation": "sigmoid", "initialisation": "uniform"},
        "protocol": protocol,
        "attack": [attack, {"name": "mean-image", "targets": 2}],
    }
    cards = run(table, out=tmp_path)
    assert [card.status for card in cards] == ["done", "done"]
    assert cards[0].scores["label_accuracy"] is not None
    assert cards[0].stopped_on_budget == 1
    assert cards[0].budget_bound is not None
    assert cards[1].stopped_on_budget is None


def test_what_cannot_run_is_refused_before_training(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(executor, "train", pytest.fail)
    with pytest.raises(IllegalCutError):
        run(TABLE, out=tmp_path, overrides=["model.cut=9"])
    with pytest.raises(BatchTooLargeError, match="batch_size is 1000"):
        run(TABLE, out=tmp_path, overrides=["protocol.batch_size=1000"])
    with pytest.raises(ValueError, match="ratio"):
        run({**TABLE, "defense": [{"name": "weight-sparsification", "ratio": 2.0}]}, out=tmp_path)
    for own, message in (
        ({"tolerance": 0.0}, "tolerance is 0.0"),
        ({"iterations": 0}, "iterations is 0"),
    ):
        with pytest.raises(ValueError, match=message):
            run({**TABLE, "attack": [{"name": "dlm-plus", **own}]}, out=tmp_path)


def test_a_failing_node_stops_the_run_and_leaves_no_half_run(tmp_path: Path) -> None:
    run(TABLE, out=tmp_path)
    broken = ClientApp()

    @contextmanager
    def grids(nodes: int) -> Iterator[tuple[Grid, Mapping[int, int]]]:
        grid = LocalGrid(broken, nodes=nodes)
        yield grid, grid.roster

    with pytest.raises(NodeFailed, match=r"node 0 failed on 'query.setup'"):
        run(TABLE, out=tmp_path, grids=grids, overrides=["seed=4"])
    assert len(list((tmp_path / "cards").iterdir())) == 2, "cards already written stay"
    finished = [run for run in (tmp_path / "runs").iterdir() if run.suffix != ".unfinished"]
    assert len(finished) == 1


def test_bad_input_of_a_later_case_is_refused_before_the_first_is_trained(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(executor, "train", pytest.fail)
    cases = [{"name": "good"}, {"name": "bad", "model.cut": 99}]
    with pytest.raises(IllegalCutError):
        run({**TABLE, "case": cases}, out=tmp_path)


def test_other_data_under_the_same_settings_is_another_cell(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    before = run(TABLE, out=tmp_path)
    monkeypatch.setattr(DataConfig, "digest", lambda _: "other pictures")
    after = run(TABLE, out=tmp_path)
    assert {card.key for card in before}.isdisjoint(card.key for card in after)


def test_code_of_the_users_own_that_changes_in_mid_process_is_refused_then_another_cell(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.syspath_prepend(str(tmp_path))
    module = tmp_path / "own_network_of_a_test.py"
    layers = "nn.Flatten(), nn.Linear(784, 9), nn.Linear(9, 10)"
    text = f"from torch import nn\n\ndef network():\n    return nn.Sequential({layers})\n"
    table = {**TABLE, "model": {"name": "own_network_of_a_test:network", "cut": 1}}
    module.write_text(text)
    with pytest.raises(IllegalCutError, match="the bottom nothing to train"):
        run(table, out=tmp_path / "out", overrides=["model.cut=0"])
    first = run(table, out=tmp_path / "out")
    module.write_text(text + "OTHER = 1\n")
    with pytest.raises(EditedCodeError, match=r"own_network_of_a_test\.py was changed after"):
        run(table, out=tmp_path / "out")
    monkeypatch.setattr(provenance, "_FIRST", {})  # as in a new process
    second = run(table, out=tmp_path / "out")
    assert {card.key for card in first}.isdisjoint(card.key for card in second)


def test_the_last_run_says_which_cards_are_its_own(tmp_path: Path) -> None:
    cards = run(TABLE, out=tmp_path)
    last = json.loads((tmp_path / "last-run.json").read_text())
    told = last.pop("settings")
    assert last == {"name": "small", "keys": [card.key for card in cards], "left_out": 0}
    assert load_settings(told) == load_settings(TABLE)


def test_five_calls_lead_from_the_command_to_the_training_loop(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """With ``main`` of the console entry point before them six."""
    found: list[str] = []

    def start(*_: Any, **__: Any) -> None:
        ours = [each for each in extract_stack() if EXPERIMENTS in Path(each.filename).parents]
        found.extend(each.name for each in ours)
        raise RuntimeError("it has begun")

    monkeypatch.setattr(Strategy, "start", start)
    arguments = ["run", str(EXPERIMENTS / "studies/first/settings.toml"), "--out", str(tmp_path)]
    result = CliRunner().invoke(app, arguments)
    assert str(result.exception) == "it has begun"
    assert found == ["run", "run", "cards", "trained", "train"]
