"""An attack and a defence for which a GPU never has the memory."""

from dataclasses import dataclass
from typing import Any, ClassVar

import torch
from torch import Tensor

from leakbed.contracts import Defense, Evidence, Guess, Protects, Seat, ThreatModel, View

FULL = "CUDA out of memory. Tried to allocate 20.00 MiB. GPU 0 has a total capacity of 8.00 GiB"


@dataclass(frozen=True, kw_only=True)
class Attack:
    """Asks for too much."""

    name: ClassVar[str] = "hungry"
    source: ClassVar[str] = "https://example.org"
    threat: ClassVar[ThreatModel] = ThreatModel(
        seat=Seat.SERVER, evidence=frozenset({Evidence.SMASHED})
    )

    def run(self, view: View, *, seed: int) -> Guess:
        raise torch.OutOfMemoryError(FULL)


@dataclass(frozen=True, kw_only=True)
class AtNode(Defense):
    """Asks for too much where the node trains."""

    name: ClassVar[str] = "hungry-at-node"
    source: ClassVar[str] = "https://example.org"
    protects: ClassVar[frozenset[Protects]] = frozenset({Protects.SMASHED})

    def protect_smashed(self, state: Any, smashed: Tensor) -> tuple[Any, Tensor]:
        raise torch.OutOfMemoryError(FULL)


@dataclass(frozen=True, kw_only=True)
class AtServer(Defense):
    """Asks for too much where the server answers."""

    name: ClassVar[str] = "hungry-at-server"
    source: ClassVar[str] = "https://example.org"
    protects: ClassVar[frozenset[Protects]] = frozenset({Protects.CUT_GRADIENT})

    def protect_cut_gradient(self, state: Any, gradient: Tensor) -> tuple[Any, Tensor]:
        raise torch.OutOfMemoryError(FULL)
