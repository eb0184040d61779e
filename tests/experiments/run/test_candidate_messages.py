"""Messages made again: what memory cannot hold, and the floor behind a linear bottom."""

from dataclasses import dataclass
from pathlib import Path
from typing import Any, ClassVar

import pytest
import torch
from torch import Tensor

from experiments.run import candidate_messages
from experiments.run.candidate_messages import CandidateMessages
from experiments.run.ceilings import ceiling_of_run
from experiments.run.recorded import Recorded
from experiments.run.runner import run
from experiments.run.targets import Evidences
from leakbed.contracts import Defense, DefenseState, Protects
from leakbed.contracts.noise_laws import Clean, Law, NoCeilingError, alike
from leakbed.events import Phase, Target
from leakbed.oracle.ceiling import points


@dataclass(frozen=True, kw_only=True)
class OfBatch(Defense):
    """Noise that follows the norm of a whole batch."""

    name: ClassVar[str] = "of-batch"
    source: ClassVar[str] = "ours"
    protects: ClassVar[frozenset[Protects]] = frozenset({Protects.SMASHED})

    def protect_smashed(self, state: DefenseState, smashed: Tensor) -> tuple[DefenseState, Tensor]:
        noise = torch.randn(smashed.shape, generator=state.generator())
        return state, smashed + self._deviation(smashed) * noise

    def law(self, clean: Clean) -> Law:
        return alike(clean.arrays, self._deviation(clean.array))

    def _deviation(self, smashed: Tensor) -> Tensor:
        return 0.01 * torch.linalg.vector_norm(smashed.detach())


FEW: dict[str, Any] = {"candidates": 40, "targets": 2, "draws": 2}


def recorded(
    out: Path, name: str = "smashed-noise", *, batch: int = 4, steps: int = 1, **noise: float
) -> Path:
    table: dict[str, Any] = {
        "name": "small",
        "data": {"size": 200, "nodes": 2},
        "model": {"name": "mnistnet", "cut": 0},
        "protocol": {"name": "vanilla-split", "batch_size": batch, "local_steps": steps},
        "attack": [{"name": "mean-image", "targets": 1}],
        "defense": [{"name": name, **noise}],
    }
    run(table, out=out)
    (only,) = (out / "runs").iterdir()
    return only


@pytest.fixture(scope="module")
def linear(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return recorded(tmp_path_factory.mktemp("linear"), sigma=0.5)


def test_a_linear_bottom_has_a_floor_of_reconstruction(linear: Path, tmp_path: Path) -> None:
    found = ceiling_of_run(linear, **FEW)
    floors = [float(each.floor or 0) for each in found.messages]
    assert all(0 < floor < 0.1 for floor in floors)  # under the pixels' own variance
    assert "no linear reconstruction" in "\n".join(found.lines())
    clipped = ceiling_of_run(recorded(tmp_path, sigma=0.5, clip=1.0), **FEW)
    assert {each.floor for each in clipped.messages} == {None}  # a clip is not linear


def test_more_candidates_than_memory_holds_are_refused(
    linear: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(candidate_messages, "_MEMORY", 2**16)
    with pytest.raises(NoCeilingError, match=r"candidates' messages of \d+ numbers are .* at most"):
        ceiling_of_run(linear, **FEW)


def test_noise_that_follows_a_batch_is_that_of_the_batch_of_test_rows(tmp_path: Path) -> None:
    folder = recorded(tmp_path, f"{__name__}:OfBatch")
    found = ceiling_of_run(folder, when="inference", candidates=8, targets=6, draws=2)
    assert all(each.sound for each in found.findings), list(map(str, found.findings))


def test_a_row_that_is_twice_in_its_batch_is_read_twice(tmp_path: Path) -> None:
    folder = recorded(tmp_path, batch=40, steps=2, sigma=3.0, clip=1.0)
    run_ = Recorded.open(folder)
    rows = list(run_.key.order[0, 1, 1])
    twice = next(place for place, row in enumerate(rows) if rows.count(row) == 2)
    once = next(place for place, row in enumerate(rows) if rows.count(row) == 1)
    made = CandidateMessages(run_, Evidences.of(run_.trace), told=False, summed=False)
    apart = []
    for place in (twice, once):
        target = Target(node=0, round=1, step=1, row=place, phase=Phase.TRAIN)
        part = made.row(target, torch.tensor([rows[place], *range(120, 140)]))
        found = points(part.messages).places
        apart.append(torch.cdist(found, found).square().sum())
        assert (part.messages.mu is None) == (place == twice)
    assert apart[0] > 1.5 * apart[1]
