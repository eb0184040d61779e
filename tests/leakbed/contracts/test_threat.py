"""Kinds of evidence and knowledge that a plug-in adds to the contracts' own."""

from typing import Any

import pytest
import torch

from leakbed.contracts import (
    BOTTOM,
    Evidence,
    EvidenceKind,
    Knowledge,
    KnowledgeKind,
    MissingKnowledgeError,
    Seat,
    ThreatModel,
)
from leakbed.contracts.threat import Granted, sees
from leakbed.tap.trace_index import TYPES


def _kind(**changes: Any) -> EvidenceKind:
    given = {
        "name": "history",
        "in_words": "every round's rows",
        "reads": frozenset({"smashed-up"}),
        "tensors": lambda seen: torch.zeros(len(seen.targets)),
    }
    return EvidenceKind(**given | changes)


def test_a_threat_model_names_its_own_kinds_beside_the_contracts() -> None:
    threat = ThreatModel(
        seat=Seat.SERVER,
        evidence=frozenset({_kind(), Evidence.SMASHED}),
        needs=frozenset({BOTTOM, Knowledge.ARCHITECTURE}),
    )
    assert threat.kinds == ("history", "bottom")
    assert "reads every round's rows, the activations a node sends at the cut" in threat.in_words()
    assert "knows the layers of the part it does not hold" in threat.in_words()
    assert "the weights of the node's bottom as the last round left it" in threat.in_words()


@pytest.mark.parametrize(
    ("changes", "said"),
    [
        ({"name": "smashed"}, "'smashed' is evidence of the contracts already"),
        ({"name": "My/Own"}, "use lower case without slashes"),
        ({"reads": frozenset()}, "reads no messages; name their kinds"),
        ({"reads": frozenset({"smashed"})}, "evidence 'history': .*did you mean 'smashed-up'"),
    ],
)
def test_a_kind_without_a_name_or_messages_of_its_own_is_refused(
    changes: dict[str, Any], said: str
) -> None:
    with pytest.raises(ValueError, match=said):
        _kind(**changes)


def test_two_kinds_of_one_name_and_a_name_of_the_contracts_are_refused() -> None:
    with pytest.raises(ValueError, match="two kinds are called 'history'"):
        ThreatModel(seat=Seat.SERVER, evidence=frozenset({_kind(), _kind()}))
    with pytest.raises(ValueError, match="'labels' is knowledge of the contracts already"):
        KnowledgeKind(name="labels", in_words="them", grant=lambda secrets: secrets.labels)


def test_what_is_not_declared_is_refused_by_name() -> None:
    granted = Granted(rows=torch.zeros(2))
    assert len(granted["rows"]) == 2
    with pytest.raises(
        MissingKnowledgeError, match=r"'bottom'.*declares rows, and an attack reads"
    ):
        granted["bottom"]


def test_a_seat_sees_its_own_messages_alone() -> None:
    seen = {seat: {kind for kind in TYPES if sees(seat, kind)} for seat in Seat}
    assert seen[Seat.EAVESDROPPER] == seen[Seat.CLIENT] == set(TYPES)
    assert seen[Seat.LABEL_PARTY] == set()
    assert {"bottom", "bottom-gradient-up"} == seen[Seat.FED_SERVER] - seen[Seat.SERVER]
    assert {"smashed-up", "cut-gradient-down"} <= seen[Seat.SERVER] - seen[Seat.FED_SERVER]
