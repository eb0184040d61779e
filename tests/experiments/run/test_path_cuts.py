"""A network that is cut at a path is trained, recorded, attacked and reported as any other."""

from pathlib import Path
from typing import Any

import numpy as np
from typer.testing import CliRunner

from experiments.cli import app as commands
from experiments.results.cards import read_cards
from experiments.run.runner import run
from leakbed.events import CutGradientDown, SmashedUp
from leakbed.tap import Trace

NESTED, UNNESTED = (f"tests.support.strange_networks:{name}" for name in ("Nested", "unnested"))


def trained(folder: Path, name: str, cut: int | str) -> Trace:
    """Train one round of split learning and attack it."""
    table: dict[str, Any] = {
        "name": "path",
        "data": {"name": "tests.support.tiny:images", "nodes": 2, "public": 0.0},
        "model": {"name": name, "cut": cut},
        "protocol": {"name": "vanilla-split", "batch_size": 3, "local_steps": 2},
        "attack": [{"name": "smashed-as-image", "targets": 2}],
    }
    (card,) = run(table, out=folder)
    assert (card.status, card.cut) == ("done", cut)
    (only,) = (folder / "runs").iterdir()
    return Trace(only / "trace")


def test_what_crosses_is_that_of_the_same_layers_cut_by_index(tmp_path: Path) -> None:
    traces = trained(tmp_path / "path", NESTED, "features.1"), trained(tmp_path / "at", UNNESTED, 1)
    assert traces[0].about["architecture"]["cut"] == "features.1"
    for kind, name in ((SmashedUp, "smashed"), (CutGradientDown, "gradient")):
        by_path, by_index = ([getattr(e, name) for e in t.events(kind)] for t in traces)
        assert len(by_path) > 3
        assert all(map(np.array_equal, by_path, by_index))
    assert {each.cut for each in read_cards(tmp_path / "path")} == {"features.1"}

    def attacked(cut: str) -> Any:
        words = ["attack", str(traces[0].folder), "--with", "smashed-as-image", "--model", NESTED]
        out = ["--out", str(tmp_path / "again"), "-o", "targets=2"]
        return CliRunner().invoke(commands, [*words, "--cut", cut, *out])

    assert attacked("features.1").exit_code == 0
    refused = attacked("features.9")
    assert refused.exit_code == 2
    assert "unknown layer that Sequential runs '9'" in refused.output
