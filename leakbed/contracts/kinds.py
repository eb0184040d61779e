"""Kinds of evidence and knowledge that come with the contracts, made as a plug-in makes its own.

Evidence: weights of several rounds (:data:`ROUND_UPDATES`, :data:`ROUND_BOTTOMS`) and gradients of
a bottom (:data:`BOTTOM_GRADIENTS`). A relayed bottom of the attacked round alone is
``Evidence.UPDATE`` at the seat of the fed-server. Knowledge, which an experiment grants: the node's
bottom (:data:`BOTTOM`), queries to it (:data:`BOTTOM_QUERIES`) and private images with what is sent
of them (:data:`PAIRS`). Importing this needs neither torch nor Flower.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from typing import TYPE_CHECKING, Any

import numpy as np

from leakbed.contracts.attack import UnfitViewError, View
from leakbed.contracts.threat import (
    EvidenceKind,
    Granted,
    KnowledgeKind,
    MissingKnowledgeError,
    Secrets,
    Seen,
)
from leakbed.events import Array, Arrays, Bottom, BottomGradientUp, UpdateUp
from leakbed.seeds import derive, generator

if TYPE_CHECKING:
    from jaxtyping import Float
    from torch import Tensor, nn

Weights = tuple[Arrays, Arrays]
"""What a node started a round from, and what it sent back."""


def _of_rounds(seen: Seen) -> dict[str, Tensor]:
    """Return each target's weights before and after every round that its node took part in."""
    first: dict[tuple[int, int], Arrays] = {}
    last: dict[tuple[int, int], Arrays] = {}
    for event in seen.events:
        place = event.node, event.round
        if isinstance(event, UpdateUp):
            first[place], last[place] = event.before, event.after
        elif isinstance(event, Bottom) and event.up:
            last[place] = event.arrays
        elif isinstance(event, Bottom) and place not in last:  # else it is an average to evaluate
            first.setdefault(place, event.arrays)
    rounds = {
        target.node: [place for place in sorted(last) if place[0] == target.node]
        for target in seen.targets
    }
    if len({len(places) for places in rounds.values()}) > 1:
        took = ", ".join(f"node {node}: {len(places)}" for node, places in sorted(rounds.items()))
        raise UnfitViewError(
            f"the attacked nodes took part in different numbers of rounds ({took}), which do not "
            "stack; set protocol.fraction = 1"
        )
    if lacking := [each for places in rounds.values() for each in places if each not in first]:
        node, number = lacking[0]
        raise UnfitViewError(
            f"node {node} sent a bottom back in round {number}, and the trace has none that was "
            "sent down to it before in that round; record every message of the run, or attack "
            "weights of an earlier round"
        )
    return {
        f"{when}/{name}": _stacked(
            [[held[place][name] for place in rounds[target.node]] for target in seen.targets]
        )
        for when, held in (("before", first), ("after", last))
        for name in _floats(held.values())
    }


def _gradients(seen: Seen) -> dict[str, Tensor]:
    """Return each target's gradients of its node's bottom, step by step."""
    sent: dict[int, dict[int, Arrays]] = {}
    for event in seen.events:
        if isinstance(event, BottomGradientUp):
            sent.setdefault(event.node, {})[event.step] = event.arrays
    steps = {
        target.node: [each for _, each in sorted(sent.get(target.node, {}).items())]
        for target in seen.targets
    }
    if len({len(each) for each in steps.values()}) > 1:
        raise UnfitViewError(
            "the attacked nodes took different numbers of steps, whose gradients do not stack; set "
            "protocol.local_steps"
        )
    every = [arrays for each in steps.values() for arrays in each]
    return {
        name: _stacked([[each[name] for each in steps[target.node]] for target in seen.targets])
        for name in _floats(every)
    }


def _floats(held: Any) -> list[str]:  # noqa: ANN401  a collection of Arrays
    """Return the names of what all of some weights have as numbers with fractions."""
    every: list[Mapping[str, Array]] = list(held)
    return [
        name
        for name, value in (every[0].items() if every else ())
        if value.dtype.kind == "f" and all(name in each for each in every)
    ]


def _stacked(values: Sequence[Sequence[Array]]) -> Float[Tensor, " targets steps *shape"]:
    import torch  # noqa: PLC0415  as the module's first lines say

    return torch.from_numpy(np.stack([np.stack(each) for each in values]))


ROUND_UPDATES = EvidenceKind(
    name="round-updates",
    in_words="the weights before and after a node's local training in every round until then",
    reads=frozenset({"update-up"}),
    tensors=_of_rounds,
    per="node",
    rounds="until",
)
"""``before/NAME`` and ``after/NAME`` of every weight: targets, rounds, its shape."""

ROUND_BOTTOMS = EvidenceKind(
    name="round-bottoms",
    in_words="a node's relayed bottom before and after every round until then",
    reads=frozenset({"bottom"}),
    tensors=_of_rounds,
    per="node",
    rounds="until",
)
"""The same of relayed bottoms."""

BOTTOM_GRADIENTS = EvidenceKind(
    name="bottom-gradients",
    in_words="the gradient of a node's bottom at every step of the round",
    reads=frozenset({"bottom-gradient-up"}),
    tensors=_gradients,
    per="node",
)
"""By parameter name: targets, steps, its shape; of ``parallel-split`` with ``sync = "step"``."""


class Queries:
    """Answers of a node to images of an adversary's choosing, as many as were granted."""

    def __init__(
        self,
        sends: Callable[..., Float[Tensor, " batch *cut"]],
        *,
        granted: int,
        stream: int,
    ) -> None:
        """Ask nothing yet.

        Args:
            sends: Returns what the node sends of images.
            granted: Images it answers for, all calls of one run of an attack together.
            stream: Of what the node draws.
        """
        self._sends, self._granted, self._stream = sends, granted, stream
        self._asked = 0

    @property
    def left(self) -> int:
        """How many more images it answers for."""
        return self._granted - self._asked

    def __call__(self, images: Float[Tensor, " batch *image"]) -> Float[Tensor, " batch *cut"]:
        """Return what the node sends of some images; no gradient passes.

        Args:
            images: Pixel values in [0, 1].

        Returns:
            A row for each.

        Raises:
            MissingKnowledgeError: More are asked than were granted.
        """
        if len(images) > self.left:
            raise MissingKnowledgeError(
                f"the attack asks the bottom about {self._asked + len(images)} images, and the "
                f"experiment grants {self._granted}; ask fewer, or raise queries of "
                "bottom-queries in the attack's grants"
            )
        answer = self._sends(images, derive(self._stream, f"query/{self._asked}"))
        self._asked += len(images)
        return answer

    def renewed(self) -> Queries:
        """Return the same with all queries left, for another run of the attack."""
        return Queries(self._sends, granted=self._granted, stream=self._stream)


def renewed(view: View) -> View:
    """Return a view whose queries are all left, as every run of an attack begins."""
    fresh = {k: v.renewed() if isinstance(v, Queries) else v for k, v in view.granted.items()}
    return replace(view, granted=Granted(fresh))


def _told(secrets: Secrets) -> nn.Module:
    return secrets.bottom()


def _asked(secrets: Secrets, *, queries: int) -> Queries:
    return Queries(secrets.sends, granted=queries, stream=secrets.stream)


def _pairs(secrets: Secrets, *, count: int) -> dict[str, Tensor]:
    """Return private images that stand behind no target, and what is sent of them."""
    import torch  # noqa: PLC0415  as the module's first lines say

    others = torch.ones(len(secrets.images), dtype=torch.bool)
    if secrets.targets[0].phase == "train":
        others[secrets.behind.flatten()] = False
    free = others.nonzero().flatten()
    if len(free) < count:
        raise UnfitViewError(
            f"pairs: {count} are granted, and {len(free)} private images stand behind no target; "
            "grant fewer, or attack fewer targets"
        )
    drawn = free[torch.randperm(len(free), generator=generator(secrets.stream))[:count]]
    images = secrets.images[drawn].to(secrets.device)
    return {"images": images, "smashed": secrets.sends(images, derive(secrets.stream, "sent"))}


BOTTOM = KnowledgeKind(
    name="bottom",
    in_words="the weights of the node's bottom as the last round left it",
    grant=_told,
)
"""An ``nn.Module``, frozen and in evaluation mode."""

BOTTOM_QUERIES = KnowledgeKind(
    name="bottom-queries",
    in_words="what the node sends of images that it chooses",
    grant=_asked,
    settings={"queries": 1000},
)
"""A function from images to smashed rows, for so many images: :class:`Queries`."""

PAIRS = KnowledgeKind(
    name="pairs",
    in_words="other private images beside what the node sends of them",
    grant=_pairs,
    settings={"count": 50},
)
"""``images`` and ``smashed`` of private images that stand behind no target."""
