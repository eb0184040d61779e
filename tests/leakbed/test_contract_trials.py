"""Attacks and defences are tried on small tensors, twice."""

from collections.abc import Mapping
from dataclasses import dataclass, replace
from threading import Lock
from typing import ClassVar, Literal

import pytest
import torch
from torch import Tensor

from attacks import MeanImage
from defenses import SmashedNoise
from leakbed.contract_checks import BrokenPluginError
from leakbed.contract_trials import breaches, small_view
from leakbed.contracts import (
    Defense,
    DefenseState,
    Guess,
    Protects,
    Seat,
    ThreatModel,
    UnfitViewError,
    View,
)
from leakbed.mods import applied
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


@dataclass(frozen=True, kw_only=True)
class _Keeps(Defense):
    """A defence that keeps a lock in its state."""

    name: ClassVar[str] = "keeps"
    source: ClassVar[str] = "own"
    protects: ClassVar[frozenset[Protects]] = frozenset(
        {Protects.SMASHED, Protects.UPDATE, Protects.CUT_GRADIENT}
    )

    def protect_smashed(self, state: DefenseState, smashed: Tensor) -> tuple[DefenseState, Tensor]:
        """Keep a lock among the tensors."""
        return replace(state, tensors={"mine": Lock()}), smashed  # type: ignore[dict-item]

    def protect_update(
        self, state: DefenseState, before: Mapping[str, Tensor], after: Mapping[str, Tensor]
    ) -> tuple[DefenseState, Mapping[str, Tensor]]:
        """Keep a lock among the tensors."""
        return self.protect_smashed(state, torch.zeros(1))[0], after

    protect_cut_gradient = protect_smashed


@dataclass(frozen=True, kw_only=True)
class _Counts(_Keeps):
    """A defence whose state is no state."""

    def protect_smashed(self, state: DefenseState, smashed: Tensor) -> tuple[DefenseState, Tensor]:
        """Return a number as state."""
        return 1, smashed  # type: ignore[return-value]


@pytest.mark.parametrize("kind", sorted(_Keeps.protects))
def test_a_state_that_no_other_process_could_be_sent_is_blamed_on_its_defence(
    kind: Protects,
) -> None:
    said = r"defence keeps \(.*_Keeps\) keeps lock 'mine' in its state, where tensors belong"
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(_Keeps, "protects", frozenset({kind}))
        with pytest.raises(BrokenPluginError, match=said):
            breaches(_Keeps())


def test_a_state_that_becomes_such_while_a_run_trains_is_blamed_too() -> None:
    smashed = torch.zeros(2, 3)
    stage = ("0", _Keeps(), _Keeps().begin(1))
    with pytest.raises(BrokenPluginError, match="keeps lock 'mine' in its state"):
        applied([stage], smashed)
    with pytest.raises(BrokenPluginError, match="where its next DefenseState"):
        applied([("0", _Counts(), _Counts().begin(1))], smashed)
