"""Attacks and defences are tried on small tensors, twice."""

from dataclasses import dataclass, replace
from typing import ClassVar, Literal

import pytest
import torch

from attacks import MeanImage
from defenses import SmashedNoise
from leakbed.contract_trials import breaches, small_view
from leakbed.contracts import Guess, Seat, ThreatModel, UnfitViewError, View
from tests.support.own_evidence import ROWS


def test_a_view_has_what_the_threat_model_names_and_sound_classes_break_nothing() -> None:
    view = small_view(MeanImage().threat)
    assert view.public_images is not None
    assert view.smashed is None
    assert breaches(MeanImage()) == []
    assert breaches(SmashedNoise()) == []
    assert breaches(object()) == []


def test_kinds_of_ones_own_are_tried_for_every_seat_and_asked_twice() -> None:
    tried: tuple[tuple[Seat, Literal["row", "node"]], ...] = (
        (Seat.CLIENT, "row"),
        (Seat.CLIENT, "node"),
        (Seat.EAVESDROPPER, "node"),
    )
    for seat, per in tried:
        kind = replace(ROWS, per=per, tensors=lambda seen: torch.arange(len(seen.targets)))
        view = small_view(ThreatModel(seat=seat, evidence=frozenset({kind})))
        assert view.granted["rows"].tolist() == [0, 1, 2]
    drawn = replace(ROWS, tensors=lambda seen: torch.rand(len(seen.targets)))
    (said,) = breaches(_Reads(threat=ThreatModel(seat=Seat.SERVER, evidence=frozenset({drawn}))))
    assert said.startswith("rows is another when it is made again of the same")
    unmade = replace(ROWS, reads=frozenset({"foreign"}))
    with pytest.raises(UnfitViewError, match="made of foreign, which a server is not sent there"):
        small_view(ThreatModel(seat=Seat.SERVER, evidence=frozenset({unmade})))


@dataclass(frozen=True, kw_only=True)
class _Reads:
    """An attack that ignores what it reads."""

    threat: ThreatModel
    name: ClassVar[str] = "reads"
    source: ClassVar[str] = "own"

    def run(self, view: View, *, seed: int) -> Guess:
        """Attack."""
        del seed
        return Guess(images=torch.zeros(view.targets, view.rows, *view.image_shape))
