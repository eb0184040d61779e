"""Attacks with evidence and knowledge of their own, named by import path as a user's would be."""

from dataclasses import dataclass
from typing import ClassVar

import numpy as np
import torch
from torch import Tensor, nn

from leakbed.contracts import (
    BOTTOM,
    BOTTOM_GRADIENTS,
    BOTTOM_QUERIES,
    PAIRS,
    ROUND_BOTTOMS,
    Evidence,
    EvidenceKind,
    Guess,
    KnowledgeKind,
    Seat,
    Secrets,
    Seen,
    ThreatModel,
    View,
)
from leakbed.events import SmashedUp


def _rows(seen: Seen) -> Tensor:
    """Return the smashed row of each target, as the contracts' own evidence would have it."""
    sent = {
        (event.node, event.round, event.step): event.smashed
        for event in seen.events
        if isinstance(event, SmashedUp) and event.phase == "train"
    }
    picked = [sent[each.node, each.round, each.step][each.row or 0] for each in seen.targets]
    return torch.from_numpy(np.stack(picked))


ROWS = EvidenceKind(
    name="rows", in_words="rows at the cut", reads=frozenset({"smashed-up"}), tensors=_rows
)
CLASS_MEANS = KnowledgeKind(
    name="class-means",
    in_words="the mean private image of each class",
    grant=lambda secrets, *, of: _means(secrets) if of == "classes" else secrets.images.mean(0),
    settings={"of": "classes"},
)


def _means(secrets: Secrets) -> Tensor:
    return torch.stack([secrets.images[secrets.labels == c].mean(0) for c in range(3)])


def _grey(view: View) -> Guess:
    return Guess(images=torch.full((view.targets, view.rows, *view.image_shape), 0.5))


@dataclass(frozen=True, kw_only=True)
class FedReader:
    """Solves a linear first layer for its input, which the change of its weights and bias tells."""

    name: ClassVar[str] = "fed-reader"
    source: ClassVar[str] = "own"
    seat: str = "fed-server"

    @property
    def threat(self) -> ThreatModel:
        """Who reads the bottoms that nodes send to be averaged."""
        return ThreatModel(seat=Seat(self.seat), evidence=frozenset({Evidence.UPDATE}))

    def run(self, view: View, *, seed: int) -> Guess:
        """Attack."""
        del seed
        assert view.before is not None
        assert view.after is not None
        weight, bias = view.before
        if view.before[weight].ndim > 3:
            return _grey(view)
        moved = view.after[weight] - view.before[weight], view.after[bias] - view.before[bias]
        surest = moved[1].abs().argmax(1)
        each = torch.arange(view.targets)
        found = moved[0][each, surest] / moved[1][each, surest].unsqueeze(1)
        return Guess(images=found.reshape(view.targets, 1, *view.image_shape))


@dataclass(frozen=True, kw_only=True)
class RowReader:
    """Reads smashed rows by an evidence of its own."""

    name: ClassVar[str] = "row-reader"
    source: ClassVar[str] = "own"
    seat: str = "server"
    reads: str = "rows"
    guesses: str = "images"

    @property
    def threat(self) -> ThreatModel:
        """A seat that reads rows."""
        return ThreatModel(seat=Seat(self.seat), evidence=frozenset({ROWS}))

    def run(self, view: View, *, seed: int) -> Guess:
        """Attack."""
        del seed
        assert view.smashed is None
        assert len(view.granted[self.reads]) == view.targets
        if self.guesses == "labels":
            return Guess(labels=torch.zeros(view.targets, view.rows, dtype=torch.long))
        return _grey(view)


@dataclass(frozen=True, kw_only=True)
class Historian:
    """Reads relayed bottoms of every round, or the gradients of one."""

    name: ClassVar[str] = "historian"
    source: ClassVar[str] = "own"
    of: str = "rounds"

    @property
    def threat(self) -> ThreatModel:
        """A fed-server."""
        kind = ROUND_BOTTOMS if self.of == "rounds" else BOTTOM_GRADIENTS
        return ThreatModel(seat=Seat.FED_SERVER, evidence=frozenset({kind}))

    def run(self, view: View, *, seed: int) -> Guess:
        """Attack."""
        del seed
        (found,) = view.granted.values()
        assert {len(value) for value in found.values()} == {view.targets}
        return _grey(view)


@dataclass(frozen=True, kw_only=True)
class Insider:
    """Is told the bottom, may ask it, has pairs and the mean of each class."""

    name: ClassVar[str] = "insider"
    source: ClassVar[str] = "own"
    asks: int = 4

    @property
    def threat(self) -> ThreatModel:
        """A server that is told much."""
        return ThreatModel(
            seat=Seat.SERVER,
            evidence=frozenset({Evidence.SMASHED}),
            needs=frozenset({BOTTOM, BOTTOM_QUERIES, PAIRS, CLASS_MEANS}),
        )

    def run(self, view: View, *, seed: int) -> Guess:
        """Answer with the pair's image whose smashed row is nearest."""
        del seed
        assert view.smashed is not None
        bottom, ask, pairs = (view.granted[name] for name in ("bottom", "bottom-queries", "pairs"))
        assert isinstance(bottom, nn.Module)
        asked = ask(pairs["images"][: self.asks])
        torch.testing.assert_close(asked, bottom(pairs["images"][: self.asks]))
        torch.testing.assert_close(asked, pairs["smashed"][: self.asks])
        nearest = torch.cdist(view.smashed.flatten(1), pairs["smashed"].flatten(1)).argmin(1)
        return Guess(images=pairs["images"][nearest].unsqueeze(1))
