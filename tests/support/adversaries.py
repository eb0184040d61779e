"""Adversaries small enough for unit tests: one changes nothing, others only what they must."""

from dataclasses import dataclass, replace
from typing import Any, ClassVar

import torch
from torch import Tensor, nn

from leakbed.contracts import (
    Evidence,
    Guess,
    Knowledge,
    MissingKnowledgeError,
    Seat,
    ThreatModel,
    View,
)


@dataclass
class Memory:
    """What a stand-in carries: its generator, how often it forged, and an image of its own."""

    noise: torch.Generator
    image: Tensor
    forged: int = 0


@dataclass(frozen=True, kw_only=True)
class Echo:
    """Returns the gradient it was given; draws, learns and guesses all the same."""

    name: ClassVar[str] = "echo"
    source: ClassVar[str] = "https://example.org"
    threat: ClassVar[ThreatModel] = ThreatModel(
        seat=Seat.SERVER,
        evidence=frozenset({Evidence.SMASHED, Evidence.CUT_GRADIENT}),
        needs=frozenset({Knowledge.PUBLIC_IMAGES}),
        active=True,
    )
    scale: float = 1.0

    def begin(self, view: View, *, seed: int) -> Memory:
        if view.public_images is None or view.smashed_shape is None:
            raise MissingKnowledgeError("an echo wants images of its own")
        torch.rand(3)  # from the global generator, which the training must not notice
        return Memory(noise=torch.Generator().manual_seed(seed), image=view.public_images[0])

    def forge(self, state: Memory, smashed: Tensor, cut_gradient: Tensor) -> tuple[Memory, Tensor]:
        torch.rand(len(smashed))
        state.forged += 1
        drawn = torch.rand(
            state.image.shape, generator=state.noise
        )  # on the CPU: the same anywhere
        state.image = state.image + 0.01 * drawn.to(state.image.device)
        return state, cut_gradient * self.scale

    def guess(self, state: Memory, smashed: Tensor) -> Guess:
        torch.rand(2)
        bright = smashed.flatten(1).mean(1)[:, None, None, None, None]
        return Guess(images=state.image * bright.sigmoid())


@dataclass(frozen=True, kw_only=True)
class Doubling(Echo):
    """Doubles every gradient."""

    name: ClassVar[str] = "doubling"
    scale: float = 2.0


@dataclass(frozen=True, kw_only=True)
class Telling(Echo):
    """Tells an attribute by how bright a smashed row is, and undoes what its client learns."""

    name: ClassVar[str] = "telling"
    scale: float = -20.0
    attribute: str = "parity"

    @property
    def threat(self) -> ThreatModel:  # type: ignore[override]  of a setting, as real ones
        needs = frozenset({Knowledge.PUBLIC_IMAGES, Knowledge.PUBLIC_ATTRIBUTES})
        return replace(Echo.threat, needs=needs, infers=self.attribute)

    def begin(self, view: View, *, seed: int) -> Memory:
        if view.public_attributes is None or view.attribute_values is None:
            raise MissingKnowledgeError("a teller wants attributes of its own images")
        if not 0 <= int(view.public_attributes.max()) < view.attribute_values:
            raise MissingKnowledgeError("a teller wants every value numbered")
        return super().begin(view, seed=seed)

    def guess(self, state: Memory, smashed: Tensor) -> Guess:
        bright = smashed.flatten(1).mean(1, keepdim=True)
        return Guess(attributes=(bright > bright.median()).long())


@dataclass(frozen=True, kw_only=True)
class Looking:
    """Keeps a copy of all it is shown; may overwrite what it was shown, and draws in any case."""

    name: ClassVar[str] = "looking"
    source: ClassVar[str] = "https://example.org"
    meddles: bool = False
    reads_part: bool = True

    @property
    def threat(self) -> ThreatModel:
        needs = frozenset({Knowledge.SERVER_PART} if self.reads_part else set())
        return ThreatModel(seat=Seat.SERVER, evidence=frozenset({Evidence.SMASHED}), needs=needs)

    def run(self, view: View, *, seed: int) -> Guess:
        del seed
        return Guess(images=torch.zeros(view.targets, 1, *view.image_shape))

    def begin(self, view: View, *, seed: int) -> list[Any]:
        del view, seed
        torch.rand(3)
        return []

    def watch(
        self,
        state: list[Any],
        smashed: Tensor,
        *,
        labels: Tensor | None,
        part: nn.Module | None,
    ) -> list[Any]:
        torch.rand(len(smashed))
        weights = None if part is None else part.state_dict()
        copied = None if weights is None else {n: value.clone() for n, value in weights.items()}
        frozen = part is None or not (
            part.training or any(each.requires_grad for each in part.parameters())
        )
        shown = (smashed.clone(), None if labels is None else labels.clone(), copied, frozen)
        if self.meddles:
            smashed.zero_()
            for tensor in [labels, *(weights or {}).values()]:
                if tensor is not None:
                    tensor.zero_()
        return [*state, shown]

    def guess(self, state: list[Any], smashed: Tensor) -> Guess:
        del state
        torch.rand(2)
        bright = smashed.flatten(1).mean(1)[:, None, None, None, None]
        return Guess(images=bright.sigmoid().expand(-1, 1, 1, 6, 6))
