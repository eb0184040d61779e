from dataclasses import dataclass, replace
from typing import Any, ClassVar

import pytest

from defenses import DPCutGradient, GradientCompression, Marvell, SmashedNoise
from experiments.run.prepare import check_defenses
from experiments.settings.cells import cells
from experiments.settings.load import load_settings
from leakbed.contracts import Defense, IllegalCombinationError, Protects
from leakbed.contracts.defense import Run
from leakbed.models import Architecture
from tests.support import stepping

ARCHITECTURE = Architecture(name="mlp2", image_shape=(1, 4, 4), num_classes=3, cut=1)
SEEN: list[Any] = []


@dataclass(frozen=True, kw_only=True)
class Asking(Defense):
    name: ClassVar[str] = "asking"
    source: ClassVar[str] = "nowhere"
    protects: ClassVar[frozenset[Protects]] = frozenset({Protects.LABELS})

    def check(self, *, rows: int, batch_size: int) -> None:
        SEEN.append((rows, batch_size))

    def check_run(self, run: Run) -> None:
        SEEN.append(run)


@dataclass(frozen=True, kw_only=True)
class Stirring(Defense):
    name: ClassVar[str] = "stirring"
    source: ClassVar[str] = "nowhere"
    protects: ClassVar[frozenset[Protects]] = frozenset({Protects.SMASHED})


def asked(
    protocol: str = "vanilla-split", *, data: dict[str, Any] | None = None, **settings: Any
) -> list[Any]:
    table = {
        "data": data or {},
        "name": "small",
        "protocol": {"name": protocol, "batch_size": 4, "rounds": 3, **settings},
        "attack": [{"name": "constant-image"}],
    }
    SEEN.clear()
    training = cells(load_settings(table, ()))[0].training
    check_defenses((Asking(),), training, ARCHITECTURE, rows=(10, 8, 10))
    return list(SEEN)


def test_a_defense_is_told_each_nodes_rows() -> None:
    sizes, runs = asked()[:3], asked()[3:]
    assert sizes == [(10, 4), (8, 4), (10, 4)]
    assert [run.rows for run in runs] == [8, 10]
    assert {(run.classes, run.batch_size) for run in runs} == {(3, 4)}
    assert [type(layer).__name__ for layer in runs[0].top] == ["Linear"]


@pytest.mark.parametrize(
    ("steps", "taken", "passes"),
    [(None, [6, 9], [3, 3]), (2, [6, 6], [3, 3]), (5, [15, 15], [9, 6])],
)
def test_steps_and_passes_are_those_of_the_whole_run(
    steps: int | None, taken: list[int], passes: list[int]
) -> None:
    settings = {} if steps is None else {"local_steps": steps}
    runs = asked(**settings)[3:]
    assert [run.steps for run in runs] == taken
    assert [run.passes for run in runs] == passes


@pytest.mark.parametrize(
    ("steps", "smallest", "straddles"), [(None, [4, 2], [False] * 2), (3, [4, 4], [False, True])]
)
def test_batches_of_their_own_kind_are_told(
    steps: int | None, smallest: list[int], straddles: list[bool]
) -> None:
    runs = asked(**({} if steps is None else {"local_steps": steps}))[3:]
    assert [run.smallest_batch for run in runs] == smallest
    assert [run.straddles for run in runs] == straddles
    assert [type(layer).__name__ for layer in runs[0].bottom] == ["FlattenLinear", "ReLU"]


def test_weights_are_no_run_of_a_split_defense() -> None:
    assert asked("fedavg") == [(10, 4), (8, 4), (10, 4)]


def test_parties_that_hold_strips_are_each_sent_a_row() -> None:
    for nodes in (2, 3):
        runs = asked("vertical-split", data={"nodes": nodes})[3:]
        assert {run.passes for run in runs} == {3 * nodes}


@pytest.mark.parametrize("protocol", ["vanilla-split", "fedavg"])
def test_what_adds_to_a_step_that_is_claimed_private_is_refused(protocol: str) -> None:
    stack = (stepping.RowClipping(), stepping.Proximal())
    table = {
        "name": "small",
        "protocol": {"name": protocol, "batch_size": 4},
        "attack": [{"name": "constant-image"}],
    }
    training = cells(load_settings(table, ()))[0].training
    with pytest.raises(IllegalCombinationError, match="proximal takes part in a training step be"):
        check_defenses(stack, training, ARCHITECTURE, rows=(10,))


def test_the_order_of_defenses_is_looked_at() -> None:
    table = {
        "name": "small",
        "protocol": {"name": "vanilla-split", "batch_size": 4},
        "attack": [{"name": "constant-image"}],
    }
    training = cells(load_settings(table, ()))[0].training
    binary = replace(ARCHITECTURE, num_classes=2)
    for stack, told in (
        ((DPCutGradient(), Marvell()), "leave one of them out"),
        ((Marvell(), DPCutGradient()), "leave one of them out"),
        ((GradientCompression(), DPCutGradient()), "put dp-cut-gradient first"),
        ((Stirring(), SmashedNoise(clip=1.0)), "put smashed-noise first"),
    ):
        with pytest.raises(IllegalCombinationError, match=told):
            check_defenses(stack, training, binary, rows=(10,))
    check_defenses((Stirring(), SmashedNoise()), training, binary, rows=(10,))  # claims nothing
