"""An edit of the oracle scores kept guesses again: nothing trains, nothing attacks."""

import json
from collections.abc import Callable, Iterator
from pathlib import Path
from shutil import copytree
from typing import Any

import pytest
from safetensors import safe_open
from typer.testing import CliRunner

from experiments.app_audit import gate as gating
from experiments.cli import app
from experiments.results.cards import Card
from experiments.results.folder import ResultsFolderError
from experiments.run import executor
from experiments.run.rescore import rescore
from experiments.run.runner import run
from leakbed import reach

TABLE: dict[str, Any] = {
    "name": "kept",
    "data": {"name": "mnist-5k", "size": 200, "nodes": 2},
    "model": {"name": "mlp2", "cut": 1},
    "protocol": {"name": "vanilla-split", "batch_size": 16, "local_steps": 3, "labels": "server"},
    "attack": [
        {"name": "smashed-as-image", "targets": 4},
        {"name": "similarity-distance", "targets": 40},
    ],
}
METRICS = "leakbed/oracle/metrics.py"


Finished = Callable[[Path], list[Card]]


@pytest.fixture(scope="module")
def finished(tmp_path_factory: pytest.TempPathFactory) -> Finished:
    """Put the results of one run of the table into a folder."""
    kept = tmp_path_factory.mktemp("kept")
    cards = run(TABLE, out=kept)

    def put(folder: Path) -> list[Card]:
        copytree(kept, folder, dirs_exist_ok=True)
        return cards

    return put


class Edits:
    """Sources as they would be read after an edit, in a new process."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch) -> None:
        self._read, self._patch = reach.text_of, monkeypatch
        self._edits: dict[str, bytes] = {}
        monkeypatch.setattr(reach, "text_of", self._text)
        reach.digest.cache_clear()

    def _text(self, file: Path) -> bytes:
        more = [text for end, text in self._edits.items() if file.as_posix().endswith(end)]
        return self._read(file) + b"".join(more)

    def edit(self, file: str, text: bytes = b"\nEDITED = 1\n") -> None:
        self._edits[file] = text
        reach.digest.cache_clear()


@pytest.fixture
def edits(monkeypatch: pytest.MonkeyPatch) -> Iterator[Edits]:
    yield Edits(monkeypatch)
    reach.digest.cache_clear()


def forbid(monkeypatch: pytest.MonkeyPatch, *names: str) -> None:
    for name in names:
        monkeypatch.setattr(executor, name, pytest.fail)


class Told:
    def __init__(self) -> None:
        self.notes = list[str]()

    def start(self, total: int, *, left_out: int = 0) -> None: ...
    def advance(self, label: str) -> None: ...
    def note(self, text: str) -> None:
        self.notes.append(text)


def told(cards: list[Card]) -> list[Any]:
    return [(card.scores, card.baselines, card.control, card.exposure) for card in cards]


def test_a_comment_in_an_attack_neither_trains_nor_attacks_again(
    tmp_path: Path, finished: Finished, edits: Edits, monkeypatch: pytest.MonkeyPatch
) -> None:
    before = finished(tmp_path)
    edits.edit("attacks/smashed_as_image.py", b"\n# a comment\n")
    forbid(monkeypatch, "train", "answer", "judge")
    assert run(TABLE, out=tmp_path) == before


def test_an_edit_of_an_attack_attacks_its_own_cells_again_and_trains_nothing(
    tmp_path: Path, finished: Finished, edits: Edits, monkeypatch: pytest.MonkeyPatch
) -> None:
    before = finished(tmp_path)
    edits.edit("attacks/smashed_as_image.py")
    forbid(monkeypatch, "train")
    after = run(TABLE, out=tmp_path)
    assert [card.key == old.key for card, old in zip(after, before, strict=True)] == [False, True]
    assert told(after) == told(before)


@pytest.mark.parametrize("again", ["run", "rescore"])
def test_an_edit_of_the_oracle_attacks_nothing_again(
    tmp_path: Path, finished: Finished, edits: Edits, monkeypatch: pytest.MonkeyPatch, again: str
) -> None:
    before = finished(tmp_path)
    edits.edit(METRICS)
    forbid(monkeypatch, "train", "answer")
    if again == "run":
        after = run(TABLE, out=tmp_path)
    else:
        found = rescore(tmp_path)
        after = found.cards
        assert (found.changed, found.lacking) == (2, {})
    assert {card.key for card in before}.isdisjoint(card.key for card in after)
    assert told(after) == told(before)
    assert [card.guess for card in after] == [card.guess for card in before]
    noted = json.loads((tmp_path / "last-run.json").read_text())["keys"]
    assert noted == [card.key for card in after]
    forbid(monkeypatch, "judge")
    assert run(TABLE, out=tmp_path) == after
    assert rescore(tmp_path).changed == 0


def test_what_was_not_kept_says_so_and_is_attacked_anew_by_the_next_run(
    tmp_path: Path, finished: Finished, edits: Edits
) -> None:
    before = finished(tmp_path)
    (tmp_path / "guesses" / f"{before[0].guess_key}.safetensors").unlink()
    edits.edit(METRICS)
    done = CliRunner().invoke(app, ["rescore", str(tmp_path)])
    assert done.exit_code == 0, done.output
    assert "not scored again: kept: smashed-as-image / none: its guess is not in" in done.stderr
    assert "1 of 2 results scored again" in done.output
    after = run(TABLE, out=tmp_path)
    assert told(after) == told(before)


def test_a_guess_goes_with_its_card(tmp_path: Path, finished: Finished) -> None:
    before = finished(tmp_path)
    (tmp_path / "cards" / f"{before[0].key}.json").unlink()
    again = run({**TABLE, "attack": TABLE["attack"][1:]}, out=tmp_path)
    kept = {file.stem for part in ("guesses", "truths") for file in (tmp_path / part).iterdir()}
    assert kept == {again[0].guess}


def test_the_results_of_an_earlier_version_stay_and_are_told_of(
    tmp_path: Path, finished: Finished
) -> None:
    (card, _) = finished(tmp_path)
    note = tmp_path / "last-run.json"
    old = tmp_path / "cards" / f"{'a' * 16}.json"
    old.write_text(card.model_copy(update={"key": "a" * 16}).model_dump_json())
    note.write_text(json.dumps({"name": "kept", "keys": ["a" * 16], "left_out": 0}))
    with pytest.raises(ResultsFolderError, match=r"earlier version.*the cards.*stay"):
        rescore(tmp_path)
    progress = Told()
    run(TABLE, out=tmp_path, progress=progress)
    assert any("1 results of the last run here are of other" in each for each in progress.notes)
    assert old.exists()


def test_a_gate_hands_on_no_guess(tmp_path: Path, finished: Finished) -> None:
    finished(tmp_path)
    gating.gate(tmp_path, most={"identification": 1.0}, least={}).write(tmp_path / "gate")
    assert not list((tmp_path / "gate").rglob("*.safetensors"))


def test_rivals_of_a_label_attack_are_kept_with_it(tmp_path: Path, finished: Finished) -> None:
    (_, card) = finished(tmp_path)
    assert card.status == "done", card.why
    assert "untrained-bottom" in card.baselines
    names = safe_open(tmp_path / "guesses" / f"{card.guess}.safetensors", framework="pt").keys()
    assert "rivals/untrained-bottom/labels" in names
