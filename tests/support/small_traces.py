"""Traces of a few hand-made events, for tests of what is read from them."""

from collections.abc import Callable
from pathlib import Path

import numpy as np
import torch

from leakbed.contracts import Evidence, Seat, ThreatModel
from leakbed.events import Event, Phase, SmashedUp, UpdateUp
from leakbed.tap.trace import Recorder, Trace

ABOUT = {
    "local_steps": 1,
    "architecture": {"name": "mlp2", "image_shape": [1, 4, 4], "num_classes": 3, "cut": 1},
}
CPU = torch.device("cpu")
UPDATE = ThreatModel(seat=Seat.SERVER, evidence=frozenset({Evidence.UPDATE}))
SMASHED = ThreatModel(seat=Seat.SERVER, evidence=frozenset({Evidence.SMASHED}))
Make = Callable[..., Trace]


def make_trace(folder: Path, events: list[Event], **about: object) -> Trace:
    """Return a trace of these events, with two public images."""
    with Recorder(folder, about={**ABOUT, **about}) as recorder:
        public = {"images": np.zeros((2, 1, 4, 4), np.float32), "labels": np.arange(2)}
        recorder.hold("adversary", "public", public)
        for event in events:
            recorder(event)
    return Trace(folder)


def smashed(node: int, step: int, *, rows: int = 2, phase: Phase = Phase.TRAIN) -> SmashedUp:
    """Return a batch whose rows tell node, step and place apart."""
    values = np.full((rows, 32), 100 * node + 10 * step, np.float32) + np.arange(rows)[:, None]
    return SmashedUp(
        node=node,
        round=2,
        step=step,
        smashed=values.astype(np.float32),
        labels=np.arange(rows),
        phase=phase,
    )


def update(node: int, *, examples: int = 1) -> UpdateUp:
    """Return an update whose weights are the node's number, and one more afterwards."""
    shapes = {"0.weight": (32, 16), "0.bias": (32,), "2.weight": (3, 32), "2.bias": (3,)}
    names = {name: np.full(shape, float(node), np.float32) for name, shape in shapes.items()}
    return UpdateUp(
        node=node,
        round=2,
        before=names,
        after={k: v + 1 for k, v in names.items()},
        examples=examples,
    )
