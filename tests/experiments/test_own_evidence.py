"""Attacks whose evidence or knowledge is their own, run from settings to card."""

from pathlib import Path
from typing import Any

import pytest

import leakbed
from experiments.catalogue import check_plugin
from experiments.run import executor
from experiments.run.offline import attack_trace
from experiments.run.runner import run
from experiments.run.targets import MisfitError
from tests.experiments.test_own_plugins import _as_in_a_new_process
from tests.support.own_evidence import Historian, Insider
from tests.support.tiny import images

OWN = "tests.support.own_evidence"
TABLE: dict[str, Any] = {
    "name": "evidence",
    "data": {"name": "tests.support.tiny:images", "nodes": 2, "test": 0.2},
    "model": {"name": "mlp2", "cut": 1, "activation": "sigmoid"},
    "protocol": {"name": "splitfed-v1", "batch_size": 1, "local_steps": 1},
}


def _run(out: Path, *attacks: dict[str, Any], **changes: Any) -> list[Any]:
    named = [{**each, "name": f"{OWN}:{each['name']}"} for each in attacks]
    protocol = {**TABLE["protocol"], **changes}
    return run({**TABLE, "protocol": protocol, "attack": named}, out=out)


def test_a_fed_server_reads_the_relayed_bottoms_as_the_docs_promise(tmp_path: Path) -> None:
    eavesdropper = {"name": "FedReader", "seat": "eavesdropper"}
    server = {"name": "FedReader", "seat": "server"}
    cards = _run(tmp_path, {"name": "FedReader"}, eavesdropper, server)
    assert [card.status for card in cards] == ["done", "done", "unfit"]
    for card in cards[:2]:
        assert card.scores["mse"]["mean"] < 1e-6, "a linear first layer tells its one input"
        assert (card.exposure.rows, card.exposure.steps) == (1, 1)
    assert "exchanges smashed data and cut gradients" in cards[2].why
    (folder,) = (tmp_path / "runs").iterdir()
    again = attack_trace(
        folder / "trace", f"{OWN}:FedReader", answers=folder / "answers", out=tmp_path / "offline"
    )
    assert again.scores["mse"] == cards[0].scores["mse"]


def test_a_run_in_memory_grants_the_same() -> None:
    trained = leakbed.train(
        model="mlp2", data=images, protocol="splitfed-v1", cut=1, nodes=2, rounds=2, batch_size=4
    )
    card = trained.attack(Historian()).card
    assert card.threat is not None
    assert card.threat.evidence == ("round-bottoms",)
    grants = {"bottom": {}, "bottom-queries": {}, "pairs": {"count": 9}, "class-means": {}}
    told = trained.attack(Insider(asks=2), targets=2, grants=grants)
    assert "told it class-means" in " ".join(told.card.notes)


def test_sealed_bottoms_are_refused_before_training(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(executor, "train", pytest.fail)
    (card,) = _run(tmp_path, {"name": "FedReader"}, name="vanilla-split")
    assert card.status == "unfit"
    assert "set protocol.bottoms = 'relayed'" in card.why


def test_several_rounds_and_a_bottoms_gradients_are_kept_and_read(tmp_path: Path) -> None:
    (rounds,) = _run(tmp_path, {"name": "Historian"}, rounds=3)
    steps = {"name": "parallel-split", "sync": "step", "local_steps": 2}
    (gradients,) = _run(tmp_path, {"name": "Historian", "of": "gradients"}, **steps)
    assert (rounds.status, gradients.status) == ("done", "done")
    assert rounds.threat.evidence == ("round-bottoms",)
    assert rounds.settings["keep_rounds"] == [1, 2, 3]
    assert gradients.threat.evidence == ("bottom-gradients",)


def test_what_an_experiment_tells_is_granted_and_named_on_the_card(tmp_path: Path) -> None:
    grants = {"bottom": {}, "bottom-queries": {"queries": 4}, "pairs": {"count": 9}}
    told = {**grants, "class-means": {"of": "all"}}
    insider = {"name": "Insider", "targets": 4, "grants": told}
    card, curious = _run(tmp_path, insider, {**insider, "asks": 5}, name="vanilla-split")
    assert card.status == "done"
    assert card.threat.needs == ("bottom", "bottom-queries", "class-means", "pairs")
    assert card.settings["attack"]["grants"] == told
    assert any("told it pairs (count = 9): other private images" in note for note in card.notes)
    assert curious.status == "unfit"
    assert "asks the bottom about 5 images, and the experiment grants 4" in curious.why
    with pytest.raises(ValueError, match="needs bottom, bottom-queries, class-means, pairs"):
        _run(tmp_path, {"name": "Insider"})
    (folder,) = (tmp_path / "runs").iterdir()
    with pytest.raises(MisfitError, match="needs the answer key"):
        attack_trace(
            folder / "trace", f"{OWN}:Insider", settings={"grants": told}, out=tmp_path / "offline"
        )


def test_evidence_that_is_not_declared_is_refused_by_name(tmp_path: Path) -> None:
    unseen = {"name": "RowReader", "seat": "fed-server"}
    labels = {"name": "RowReader", "guesses": "labels"}
    cards = _run(tmp_path, labels, {"name": "RowReader", "reads": "bottom"}, unseen)
    assert [card.status for card in cards] == ["done", "unfit", "unfit"]
    assert "no untrained-bottom baseline: no untrained network has rows" in cards[0].unreliable
    assert "does not grant 'bottom': the threat model declares rows" in cards[1].why
    assert "'rows' is made of messages that a fed-server does not see: smashed-up" in cards[2].why


def test_an_edit_of_an_evidences_function_attacks_again(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    mine = tmp_path / "mine"
    mine.mkdir()
    text = Path("tests/support/own_evidence.py").read_text()
    start, end = text.index("def _rows("), text.index("ROWS = ")
    (mine / "rows_of_mine.py").write_text(
        "import numpy as np\nimport torch\nfrom leakbed.events import SmashedUp\n\n\n"
        + text[start:end].replace("seen: Seen", "seen").replace("-> Tensor", "")
    )
    (mine / "reads_of_mine.py").write_text(
        text[:start] + "from rows_of_mine import _rows\n" + text[end:]
    )
    monkeypatch.syspath_prepend(str(mine))
    _as_in_a_new_process()
    table = {**TABLE, "attack": [{"name": "reads_of_mine:RowReader"}]}
    (before,) = run(table, out=tmp_path / "out")
    assert before.status == "done"
    edited = (mine / "rows_of_mine.py").read_text().replace("each.row or 0", "0")
    (mine / "rows_of_mine.py").write_text(edited)
    _as_in_a_new_process()
    monkeypatch.setattr(executor, "train", pytest.fail)
    (after,) = run(table, out=tmp_path / "out")
    assert after.status == "done"
    assert after.key != before.key


@pytest.mark.parametrize("name", ["FedReader", "RowReader", "Historian", "Insider"])
def test_the_check_tries_evidence(name: str) -> None:
    assert check_plugin(f"{OWN}:{name}") == []
