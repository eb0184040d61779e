import dataclasses
from typing import Any

import numpy as np
import pytest

from leakbed import events
from leakbed.events import (
    EVENT_TYPES,
    CutGradientDown,
    Event,
    Foreign,
    Phase,
    Records,
    SmashedUp,
    UpdateUp,
    WeightsDown,
    arrays_of,
    scalars_of,
)

ONE, TWO = np.ones((2, 3)), np.arange(4)


def test_every_event_but_the_foreign_one_has_a_name_of_its_own() -> None:
    kinds = {
        kind
        for kind in vars(events).values()
        if isinstance(kind, type) and issubclass(kind, Event) and kind is not Event
    }
    assert set(EVENT_TYPES.values()) == kinds - {Foreign, Records}
    assert len(set(EVENT_TYPES.values())) == len(EVENT_TYPES)


@pytest.mark.parametrize(
    ("event", "arrays", "scalars"),
    [
        (
            WeightsDown(node=1, round=2, arrays={"w": ONE}, phase=Phase.EVALUATE),
            {"arrays": {"w": ONE}},
            {"node": 1, "round": 2, "step": 0, "phase": "evaluate"},
        ),
        (
            UpdateUp(node=1, round=2, before={"w": ONE}, after={"w": TWO}),
            {"before": {"w": ONE}, "after": {"w": TWO}},
            {"node": 1, "round": 2, "step": 0},
        ),
        (
            SmashedUp(node=1, round=2, step=3, smashed=ONE, rows=TWO),
            {"smashed": {"smashed": ONE}, "rows": {"rows": TWO}},
            {"node": 1, "round": 2, "step": 3, "phase": "train"},
        ),
        (
            CutGradientDown(node=1, round=2, step=3, gradient=ONE),
            {"gradient": {"gradient": ONE}},
            {"node": 1, "round": 2, "step": 3},
        ),
    ],
)
def test_arrays_and_scalars_are_all_an_event_holds(
    event: Event, arrays: dict[str, dict[str, Any]], scalars: dict[str, Any]
) -> None:
    assert arrays_of(event) == arrays
    assert scalars_of(event) == scalars
    held = {f.name for f in dataclasses.fields(event) if getattr(event, f.name) is not None}
    assert held == {*arrays, *scalars}


def test_an_event_cannot_be_changed_in_place() -> None:
    event = CutGradientDown(node=1, round=2, gradient=ONE)
    with pytest.raises(dataclasses.FrozenInstanceError):
        event.gradient = TWO  # type: ignore[misc]
